"""The recent window, the minute's maximum and the quantiles, against the plain lists that they stand for."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.collect.recent import QUANTILE_STEPS, RECENT_SECONDS, RECENT_STEPS, Recent
from gradwatch.collect.rows import Rows

COLUMNS = ("grad_norm", "grad_norm_l2", "clip_threshold", "clip_coefficient", "nonfinite", "flags")


def rows(times: list[float], norms: list[float], threshold: float = 1.0) -> Rows:
    count = len(times)
    values = np.array(
        [[n, n, threshold, min(1.0, threshold / n), float(not math.isfinite(n)), 4.0] for n in norms]
    ).reshape(count, 6)
    sequence = np.arange(1, count + 1)
    return Rows(COLUMNS, sequence, sequence - 1, np.array(times, dtype=float), values)


def test_a_fast_run_has_half_an_hour_of_steps() -> None:
    times = [1_000.0 + i * 0.5 for i in range(10_000)]
    norms = [2.0 if i % 10 == 0 else 0.5 for i in range(10_000)]
    recent = Recent()
    for begin in range(0, 10_000, 997):
        recent.add(rows(times[begin : begin + 997], norms[begin : begin + 997]))
    edge = math.floor(times[-1]) - RECENT_SECONDS
    inside = [n for t, n in zip(times, norms) if math.floor(t) > edge]
    counts = recent.counts
    assert counts.steps == len(inside) == 3_600
    assert counts.clipped == sum(n > 1 for n in inside) == 360


def test_a_slow_run_reaches_back_to_two_hundred_steps() -> None:
    times = [i * 60.0 + 1 for i in range(300)]
    recent = Recent()
    recent.add(rows(times, [2.0] * 100 + [0.5] * 100 + [2.0] * 100))
    assert (recent.counts.steps, recent.counts.clipped) == (RECENT_STEPS, 100)


def test_the_minutes_maximum_forgets_what_is_older_and_what_is_not_finite() -> None:
    recent = Recent()
    recent.add(rows([100.0, 130.0, 131.0, 189.0], [9.0, 4.0, math.inf, 1.0]))
    assert recent.largest_norm == 4.0
    recent.add(rows([250.0], [math.nan]))
    assert recent.largest_norm is None


def test_quantiles_are_of_the_finite_norms_of_the_last_thousand_steps() -> None:
    norms = list(np.random.default_rng(0).lognormal(size=2_500))
    norms[-3] = math.inf
    recent = Recent()
    recent.add(rows([float(i + 1) for i in range(2_500)], norms))
    last = [n for n in norms[-QUANTILE_STEPS:] if math.isfinite(n)]
    ordered = sorted(last)
    for q, value in recent.quantiles.items():
        position = q * (len(ordered) - 1)
        low = math.floor(position)
        between = ordered[low] + (position - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])
        assert value == pytest.approx(between, rel=1e-12)


def test_a_clock_set_back_neither_loses_steps_nor_keeps_them_for_ever() -> None:
    recent = Recent()
    recent.add(rows([10_000.0 + i for i in range(150)], [2.0] * 150))
    recent.add(rows([1_000.0 + i for i in range(150)], [2.0] * 150))
    assert recent.counts.steps == 300
    recent.add(rows([1_150.0 + i for i in range(2_500)], [2.0] * 2_500))
    assert recent.counts.steps == RECENT_SECONDS


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 400), st.floats(0.01, 10)), min_size=1, max_size=300),
    st.lists(st.integers(1, 50), min_size=1),
)
def test_cuts_and_restarts_change_nothing(steps: list[tuple[float, float]], cuts: list[int]) -> None:
    times = list(np.cumsum([gap for gap, _ in steps]) + 1)
    norms = [norm for _, norm in steps]
    whole, cut = Recent(), Recent()
    whole.add(rows(times, norms))
    at = turn = 0
    while at < len(times):
        size = cuts[turn % len(cuts)]
        cut.add(rows(times[at : at + size], norms[at : at + size]))
        cut = Recent.from_state(json.loads(json.dumps(cut.to_state())))
        at, turn = at + size, turn + 1
    assert cut.counts == whole.counts
    assert cut.quantiles == whole.quantiles
    assert cut.largest_norm == whole.largest_norm
