"""Rows become countable with their device values, final with the row behind them; each once, in order."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.collect.line import PATIENCE, Line
from gradwatch.collect.rows import Rows

COLUMNS = ("loss", "grad_norm", "nonfinite")


def rows(*items: tuple[int, float, bool]) -> Rows:
    """(sequence, loss, whether its device values are there)"""
    values = [[loss, 1.0, 0.0] if landed else [math.nan] * 3 for _, loss, landed in items]
    sequence = np.array([item[0] for item in items], dtype=np.int64)
    shape = np.array(values, dtype=float).reshape(len(items), 3)
    return Rows(COLUMNS, sequence, sequence - 1, sequence.astype(float), shape)


def test_the_newest_row_counts_at_once_and_is_final_when_another_follows() -> None:
    line = Line()
    first = line.feed(rows((1, 0.5, True)), rows())
    assert (len(first.counted), len(first.final)) == (1, 0)
    second = line.feed(rows((2, 0.4, True)), rows())
    assert second.counted.sequence.tolist() == [2]
    assert second.final.sequence.tolist() == [1]
    last = line.feed(rows(), rows(), closed=True)
    assert (len(last.counted), last.final.sequence.tolist()) == (0, [2])


def test_a_loss_that_comes_late_is_in_the_final_row_once() -> None:
    line = Line()
    line.feed(rows((1, math.nan, True)), rows())
    line.feed(rows(), rows((1, 0.7, True)))
    done = line.feed(rows((2, 0.6, True)), rows((1, 0.8, True)))
    assert done.final["loss"].tolist() == [0.8]
    assert done.counted.sequence.tolist() == [2]


def test_rows_wait_in_order_for_an_accelerator() -> None:
    line = Line()
    waits = line.feed(rows((1, 0.1, True), (2, math.nan, False), (3, math.nan, False)), rows())
    assert (waits.counted.sequence.tolist(), waits.final.sequence.tolist()) == ([1], [1])
    assert line.newest is not None
    assert line.newest.step.tolist() == [2]
    # The third one lands first: it may not overtake.
    assert len(line.feed(rows(), rows((3, 0.3, True))).counted) == 0
    landed = line.feed(rows(), rows((2, 0.2, True)))
    assert landed.counted["loss"].tolist() == [0.2, 0.3]
    assert landed.final.sequence.tolist() == [2]


def test_values_that_never_come_hold_up_nothing_for_ever() -> None:
    line = Line()
    line.feed(rows((1, math.nan, False)), rows())
    done = line.feed(rows(*((i, 0.1, True) for i in range(2, PATIENCE + 2))), rows())
    assert done.counted.sequence.tolist() == list(range(1, PATIENCE + 2))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=30),
    st.data(),
)
def test_every_row_counts_once_and_is_final_once_however_polls_are_cut(
    polls: list[tuple[int, bool]], data: st.DataObject
) -> None:
    """Rows come in polls of any size, their values then or later; in between, the agent may be a new one."""
    line, counted, final = Line(), [], []
    written = 0
    missing: set[int] = set()
    whole: dict[int, float] = {}
    for size, restart in polls:
        if restart:
            first = line.first_open
            line = Line(line.counted)
            again = range(first, written + 1) if first is not None else range(0)
        else:
            again = range(0)
        fresh = range(written + 1, written + 1 + size)
        written += size
        missing |= set(data.draw(st.sets(st.sampled_from(sorted(fresh)))))
        landing = data.draw(st.sets(st.sampled_from(sorted(missing)))) if missing else set()
        landing -= set(fresh)
        missing -= landing
        whole |= {s: s / 10 for s in range(1, written + 1) if s not in missing}
        brought = rows(*((s, whole.get(s, math.nan), s not in missing) for s in [*again, *fresh]))
        amended = rows(*((s, whole[s], True) for s in sorted(landing) if s not in again))
        progress = line.feed(brought, amended)
        counted += progress.counted.sequence.tolist()
        final += progress.final.sequence.tolist()
    last = line.feed(rows(), rows(), closed=True)
    counted += last.counted.sequence.tolist()
    final += last.final.sequence.tolist()
    assert counted == final == list(range(1, written + 1))
