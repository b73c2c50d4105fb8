"""The demo's view: the right numbers of the right run, spikes where they were, nothing invented."""

from __future__ import annotations

import io
import math
import socket
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from gradwatch.demo.processes import free_port
from gradwatch.demo.view import CURVE, Curve, Numbers, line, read_metrics, render

EXPOSITION = """\
# TYPE gradwatch_steps_total counter
gradwatch_steps_total{model="churn-lstm",run="a",optimizer="default"} 200
gradwatch_steps_total{model="churn-lstm",run="b",optimizer="default"} 999
# TYPE gradwatch_clipped_steps_total counter
gradwatch_clipped_steps_total{model="churn-lstm",run="a",optimizer="default"} 30
# TYPE gradwatch_step gauge
gradwatch_step{model="churn-lstm",run="a",optimizer="default"} 199
# TYPE gradwatch_grad_norm_q gauge
gradwatch_grad_norm_q{model="churn-lstm",run="a",optimizer="default",q="0.5"} 0.55
gradwatch_grad_norm_q{model="churn-lstm",run="a",optimizer="default",q="0.95"} 2
gradwatch_grad_norm_q{model="churn-lstm",run="a",optimizer="default",q="0.99"} 3.1
# TYPE gradwatch_loss gauge
gradwatch_loss{model="churn-lstm",run="a",split="train",slice=""} 0.61
gradwatch_loss{model="churn-lstm",run="a",split="validation",slice=""} 0.59
# TYPE gradwatch_generalization_gap gauge
gradwatch_generalization_gap{model="churn-lstm",run="a",metric="loss",slice=""} -0.03
# TYPE gradwatch_run_state gauge
gradwatch_run_state{model="churn-lstm",run="a",state="running"} 1
gradwatch_run_state{model="churn-lstm",run="a",state="finished"} 0
# TYPE gradwatch_findings_total counter
gradwatch_findings_total{model="churn-lstm",run="a",code="gradient-spike",severity="info"} 4
gradwatch_findings_total{model="churn-lstm",run="a",code="clip-missing",severity="ticket"} 0
"""


def shown(numbers: Numbers, curve: Curve) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(render(numbers, curve, 1200, "http://127.0.0.1:9460/metrics"))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_numbers_are_those_of_the_run() -> None:
    numbers = read_metrics(EXPOSITION, "a")
    assert (numbers.step, numbers.steps, numbers.clip_rate) == (199, 200, 0.15)
    assert (numbers.p50, numbers.p99) == (0.55, 3.1)
    assert (numbers.loss, numbers.validation_loss, numbers.gap) == (0.61, 0.59, -0.03)
    assert (numbers.state, numbers.findings) == ("running", {"gradient-spike": 4})
    assert line(numbers, 1200) == "step 200/1200  loss 0.61  norm p50 0.55 p99 3.1  clip rate 15.0 %  gap -3.0 %"


def test_the_panel_shows_them() -> None:
    text = shown(read_metrics(EXPOSITION, "a"), curve_of([0.5] * 30))
    for part in ("200/1200", "p50 0.55, p99 3.1", "15.0 %", "-3.0 %", "gradient-spike ×4", "running", ":9460/metrics"):
        assert part in text


def test_what_is_not_known_is_a_dash_and_not_a_number() -> None:
    assert line(Numbers(), 8) == "step –/8  loss –  norm p50 – p99 –  clip rate –  gap –"
    assert "nan" not in shown(Numbers(), curve_of([]))


def test_a_spike_stands_at_its_place_in_red() -> None:
    values = [0.5] * CURVE
    values[17] = 40.0
    text = curve_of(values).render(threshold=1.0)
    assert text.plain[17] == "█"
    assert set(text.plain) == {"▁", "█"}
    assert [str(span.style) for span in text.spans if span.start == 17] == ["bold red"]


def curve_of(values: list[float]) -> Curve:
    curve = Curve(Path("nowhere"), steps=1200)
    curve.largest = np.array(values + [math.nan] * (CURVE - len(values)))
    return curve


def test_a_taken_port_gives_the_next_free_one() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        chosen = free_port(port)
        assert chosen is not None
        assert chosen > port


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
def test_a_norm_without_a_logarithm_leaves_a_gap(value: float) -> None:
    assert curve_of([0.5, value, 0.6]).render(1.0).plain[1] == " "
