"""What the detectors over curves share: blocks, robust pasts, warmup, and a watcher that fails."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.collect.model import Finding
from gradwatch.collect.rows import Rows
from gradwatch.detect.curve import BLOCK, Block, Blocks, Reference, median
from gradwatch.detect.curves import Curves, Moment
from gradwatch.detect.past import Warmup, given_back
from gradwatch.testing import JournalBuilder
from tests.detect.support import Curve
from tests.journals import follow, read_on

COLUMNS = ("optimizer", "flags", "clip_threshold", "lr_0", "lr_1", "loss", "grad_norm", "clip_coefficient", "nonfinite")


def rows(count: int, first: int = 0, seed: int = 0) -> Rows:
    """Rows with values of every kind."""
    numbers = np.random.default_rng(seed)
    step = np.arange(first, first + count, dtype=np.int64)
    values = np.column_stack(
        [
            np.zeros(count),
            np.zeros(count),
            np.full(count, 2.0),
            np.full(count, 0.1),
            numbers.choice([0.2, 0.3, math.nan], count),
            numbers.choice([1.0, 2.0, math.nan, math.inf], count),
            numbers.choice([1.0, 3.0, math.nan], count),
            numbers.choice([1.0, 0.5], count),
            np.zeros(count),
        ]
    )
    return Rows(COLUMNS, step + 1, step, step.astype(np.float64) + 0.5, values)


@given(st.lists(st.integers(0, 25), max_size=12))
def test_blocks_do_not_depend_on_how_rows_come(pieces: list[int]) -> None:
    whole = rows(sum(pieces))
    expected = Blocks().add(whole)
    blocks, at, told = Blocks(), 0, []
    for piece in pieces:
        told += blocks.add(whole.take(slice(at, at + piece)))
        blocks = Blocks.from_state(blocks.to_state())
        at += piece
    assert list(map(repr, told)) == list(map(repr, expected))
    assert len(told) == sum(pieces) // BLOCK


def test_a_block_is_what_its_rows_are() -> None:
    table = rows(30)
    block = Blocks().add(table)[1]
    own = table.take(slice(10, 20))
    finite = own["loss"][np.isfinite(own["loss"])]
    assert (block.first_step, block.step, block.position) == (10, 19, 20)
    assert block.losses.tolist() == finite.tolist()
    assert block.loss == pytest.approx(float(np.median(finite)))
    assert block.norm == pytest.approx(float(np.nanmedian(own["grad_norm"])))
    assert block.rate == pytest.approx(np.nanmax([own["lr_0"][-1], own["lr_1"][-1]]))
    assert block.clipped == int((own["grad_norm"] > 2.0).sum())
    assert block.threshold == 2.0


def test_the_median_of_a_row_leaves_out_what_is_missing() -> None:
    table = np.array([[3.0, math.nan, 1.0, 2.0], [math.nan] * 4, [4.0, 1.0, 2.0, 3.0]])
    assert median(table) == pytest.approx([2.0, math.nan, 2.5], nan_ok=True)


def test_a_past_is_bounded_and_its_tail_is_that_of_its_values() -> None:
    past = Reference(100)
    values = np.random.default_rng(0).normal(5.0, 2.0, size=1_000)
    for part in np.split(values, 100):
        past.accept(part)
    last = values[-100:]
    assert len(past) == 100
    assert past.tail.median == pytest.approx(float(np.median(last)), abs=0.2)
    assert past.tail.q90 == pytest.approx(float(np.quantile(last, 0.9)), abs=0.3)
    assert past.tail.largest == last.max()
    assert past.tail.excess == pytest.approx(float((last[last > past.tail.q90] - past.tail.q90).mean()))


@pytest.mark.parametrize("draw", ["normal", "chisquare"])
def test_the_error_of_a_median_is_that_of_many_medians(draw: str) -> None:
    numbers = np.random.default_rng(0)
    values = numbers.normal(size=1_000_000) if draw == "normal" else numbers.chisquare(1, size=1_000_000)
    past = Reference(100_000)
    past.accept(values[:100_000])
    medians = np.median(values.reshape(-1, 100), axis=1)
    assert past.tail.error / 10 == pytest.approx(float(medians.std()), rel=0.05)


@pytest.mark.parametrize(
    ("rates", "over_at"),
    [
        ([0.1] * 20, 6),
        ([0.01 * min(i + 1, 30) for i in range(60)], 35),
        ([math.nan] * 20, 5),
        ([0.1 * 0.99**i for i in range(30)], 6),
        ([1e-6 * (i + 1) for i in range(3_000)], None),
    ],
)
def test_warmup_is_over_when_the_rate_rises_no_more(rates: list[float], over_at: int | None) -> None:
    warmup = Warmup()
    over = []
    for rate in rates:
        warmup.add(rate, BLOCK)
        over.append(warmup.over)
    assert (over.index(True) + 1 if True in over else None) == over_at


@pytest.mark.parametrize(
    ("level", "best", "start", "share"),
    [
        (1.0, 1.0, 2.0, 0.0),
        (1.5, 1.0, 2.0, 0.5),
        (2.0, 1.0, 2.0, 1.0),
        (1.5, 1.0, 1.1, 0.5),
        (-1.0, -3.0, 1.0, -0.5),
        (3.0, -3.0, 1.0, 0.5),
        (-0.1, -1.0, -0.5, -0.1),
    ],
)
def test_what_a_loss_gives_back(level: float, best: float, start: float, share: float) -> None:
    assert given_back(level, best, start) == pytest.approx(share)


class Broken:
    code = "broken"

    def judge(self, now: Moment) -> list[Finding]:
        raise RuntimeError("odd")

    def begin(self) -> None: ...
    def to_state(self) -> object: ...
    def restore(self, state: object) -> None: ...


class Keeps(Broken):
    code = "loss-spike"

    def __init__(self, seen: list[Block]) -> None:
        self._seen = seen

    def judge(self, now: Moment) -> list[Finding]:
        self._seen.append(now.block)
        return []


def test_a_watcher_that_fails_takes_nobody_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with JournalBuilder(tmp_path) as journal:
        Curve(journal).steps(50)
    blocks: list[Block] = []
    curves = Curves((Broken, lambda: Keeps(blocks)))
    for seen in read_on(follow(tmp_path)):
        curves.observe(seen)
    assert len(blocks) == 5
    assert caplog.text.count("detector-failed") == 1
