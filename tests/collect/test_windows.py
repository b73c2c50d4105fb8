"""Windows: their edges, and each of their values against the rows that they fold."""

from __future__ import annotations

import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.collect.model import Window
from gradwatch.collect.rows import Rows
from gradwatch.collect.windows import Windows, nice_at_least

COLUMNS = (
    "loss", "grad_norm", "grad_norm_l2", "clip_coefficient", "clip_threshold", "nonfinite", "flags", "duration",
    "samples", "lr_0", "wd_0", "loss_scale",
)  # fmt: skip


def rows(first: int, norms: list[float], losses: list[float], *, every: float = 0.5, start: float = 1_000.0) -> Rows:
    count = len(norms)
    values = np.array(
        [
            [loss, n, n, min(1.0, 2.0 / n), 2.0, float(not math.isfinite(n)), 4.0, every, 8.0, 0.1 / (i + 1), 0.01, 1.0]
            for i, (n, loss) in enumerate(zip(norms, losses), first)
        ]
    ).reshape(count, len(COLUMNS))
    step = np.arange(first, first + count)
    return Rows(COLUMNS, step + 1, step, start + every * step.astype(float), values)


def fold(windows: Windows, block: Rows) -> list[Window]:
    return windows.add(block, np.zeros(len(block), np.bool_), {})


def test_the_series_of_lengths() -> None:
    assert [nice_at_least(n) for n in (0.1, 10, 10.1, 20.5, 51, 1_001, 5e99)] == [
        10, 10, 20, 50, 100, 2_000, 10**9,
    ]  # fmt: skip


def test_values_are_those_of_the_rows() -> None:
    norms = [1.0, 3.0, 0.5, 2.5, math.inf, 1.0, 1.0, 1.5, 4.0, 2.0]
    losses = [1.0, 0.9, math.inf, 0.7, 0.6, math.nan, 0.4, 0.3, 0.2, 0.1]
    [window] = fold(Windows("default", 0, 1_000.0, ("0",)), rows(0, norms, losses))
    finite = [n for n in norms if math.isfinite(n)]
    known = [loss for loss in losses if math.isfinite(loss)]
    assert (window.first_step, window.last_step, window.steps) == (0, 9, 10)
    assert (window.clipped, window.nonfinite) == (3, 1)
    assert (window.start_time, window.end_time) == (1_000.0, 1_004.5)
    expected = {
        "loss_mean": statistics.fmean(known),
        "loss_max": max(known),
        "loss_last": 0.1,
        "grad_norm_mean": statistics.fmean(finite),
        "grad_norm_max": 4.0,
        "grad_norm_last": 2.0,
        "clip_coefficient_mean": statistics.fmean([min(1.0, 2.0 / n) for n in norms]),
        "clip_threshold_last": 2.0,
        "learning_rate_last/0": 0.1 / 10,
        "weight_decay_last/0": 0.01,
        "loss_scale_last": 1.0,
        "step_seconds_mean": 0.5,
        "samples": 80.0,
        "nonfinite_values": 2.0,
    }
    assert window.values == pytest.approx(expected)


def test_edges_are_multiples_of_a_length_that_takes_a_second_or_a_thousandth_of_the_age() -> None:
    windows = Windows("default", 0, 1_000.0, ("0",))
    quick = fold(windows, rows(0, [1.0] * 3_000, [1.0] * 3_000, every=0.005))
    # The first window comes before a step time is known; then 200 steps of 5 ms are a second.
    assert [(w.first_step, w.last_step) for w in quick[:3]] == [(0, 9), (10, 199), (200, 399)]
    assert all((w.last_step + 1) % 200 == 0 and w.steps == 200 for w in quick[2:])
    # Ten thousand seconds later a window is ten seconds.
    later = fold(windows, rows(3_000, [1.0] * 8_000, [1.0] * 8_000, every=0.005, start=11_000.0))
    lengths = [w.steps for w in later]
    assert lengths == sorted(lengths)
    assert later[-1].first_step % later[-1].steps == 0


def test_windows_do_not_shrink_when_steps_become_slower() -> None:
    windows = Windows("default", 0, 1_000.0, ("0",))
    fold(windows, rows(0, [1.0] * 400, [1.0] * 400, every=0.005))
    slow = fold(windows, rows(400, [1.0] * 1_000, [1.0] * 1_000, every=1.0))
    assert [(w.first_step, w.last_step) for w in slow] == [(i, i + 199) for i in range(400, 1_400, 200)]


def test_a_month_makes_no_more_points_than_promised() -> None:
    windows = Windows("default", 0, 0.0, ("0",))
    count = 0
    for hour in range(24 * 30):
        count += len(fold(windows, rows(hour * 3_600, [1.0] * 3_600, [1.0] * 3_600, every=1.0, start=0.0)))
    assert 1_000 < count < 9_000


def test_a_window_that_the_attempt_leaves_unfinished_is_told_at_its_end() -> None:
    windows = Windows("default", 0, 1_000.0, ("0",))
    assert fold(windows, rows(0, [1.0] * 7, [1.0] * 7)) == []
    [rest] = windows.finish()
    assert (rest.first_step, rest.last_step, rest.steps) == (0, 6, 7)
    assert windows.finish() == []


def test_a_resumed_attempt_keeps_to_the_edges() -> None:
    windows = Windows("default", 1, 1_000.0, ("0",))
    done = fold(windows, rows(37, [1.0] * 20, [1.0] * 20))
    assert [(w.attempt, w.first_step, w.last_step) for w in done] == [(1, 37, 39), (1, 40, 49)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400),
    st.lists(st.integers(1, 60), min_size=1, max_size=20),
    st.floats(0.001, 30.0),
)
def test_cuts_and_restarts_change_nothing(count: int, cuts: list[int], every: float) -> None:
    rng = np.random.default_rng(count)
    block = rows(0, list(rng.lognormal(size=count)), list(rng.normal(size=count)), every=every)
    whole, cut = Windows("default", 0, 900.0, ("0",)), Windows("default", 0, 900.0, ("0",))
    expected = fold(whole, block) + whole.finish()
    got: list[Window] = []
    at = turn = 0
    while at < count:
        size = cuts[turn % len(cuts)]
        got += fold(cut, block.take(slice(at, at + size)))
        state = json.loads(json.dumps(cut.to_state()))
        cut = Windows("default", 0, 900.0, ("0",))
        cut.restore(state)
        at, turn = at + size, turn + 1
    got += cut.finish()
    assert [(w.first_step, w.last_step, w.steps, w.clipped) for w in got] == [
        (w.first_step, w.last_step, w.steps, w.clipped) for w in expected
    ]
    for one, other in zip(got, expected):
        assert one.values == pytest.approx(other.values, rel=1e-9)
    assert sum(w.steps for w in got) == count
