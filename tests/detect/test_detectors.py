"""Each detector: what it finds, with which evidence, and what it leaves alone."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gradwatch.catalog import FINDING
from gradwatch.collect.model import Finding
from gradwatch.detect.ledger import DETECTORS, Ledger
from gradwatch.detect.replay import replay
from gradwatch.detect.spike import FEWEST, WINDOW
from gradwatch.journal import JournalError
from gradwatch.testing import FakeClock, JournalBuilder
from tests.journals import follow, offer, read_on

Write = Callable[[JournalBuilder], None]


def findings(root: Path, write: Write, **builder: object) -> list[Finding]:
    with JournalBuilder(root, **builder) as journal:  # type: ignore[arg-type]
        write(journal)
    return replay(root)


def quiet(journal: JournalBuilder, count: int, seed: int = 0, **fields: float) -> None:
    for norm in np.random.default_rng(seed).lognormal(sigma=0.3, size=count):
        journal.step(**({"grad_norm": float(norm), "loss": 1.0, "clip_threshold": 5.0} | fields))  # type: ignore[arg-type]


def codes(found: list[Finding]) -> list[tuple[str, str, int]]:
    return [(f.code, f.severity, f.step) for f in found]


def test_every_code_is_in_the_catalogue_and_has_one_detector_or_comes_from_the_probe() -> None:
    told = [code for make in DETECTORS for code in make().codes]
    assert set(told) == set(FINDING)


def test_a_healthy_run_has_no_finding(tmp_path: Path) -> None:
    def learning(journal: JournalBuilder) -> None:
        for i in range(30):
            quiet(journal, 100, seed=i, loss=2.0 - 0.05 * i)

    assert findings(tmp_path, learning) == []


# -- non-finite


def test_the_first_broken_gradient_is_named_with_its_tensor_step_and_rank(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        quiet(journal, 10)
        journal.step(grad_norm=math.inf, loss=1.0, nonfinite=1)
        journal.step(grad_norm=math.inf, loss=1.0, nonfinite=1)
        quiet(journal, 150)

    [found] = findings(tmp_path, write)
    assert (found.code, found.severity, found.step, found.active) == ("nonfinite-gradient", "ticket", 10, False)
    assert found.evidence["first_tensors"] == ["layer1.weight"]
    assert "layer1.weight" in found.message
    assert found.advice == FINDING["nonfinite-gradient"].advice


def test_ten_broken_steps_in_a_row_are_a_page(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        for _ in range(12):
            journal.step(grad_norm=math.inf, loss=1.0, nonfinite=2)

    found = findings(tmp_path, write)
    assert codes(found) == [("nonfinite-gradient", "ticket", 0), ("nonfinite-gradient", "page", 9)]
    assert [f.active for f in found] == [False, True]


def test_what_a_scaler_skipped_is_no_finding(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        for _ in range(20):
            journal.step(grad_norm=math.inf, skipped=True)

    assert findings(tmp_path, write) == []


@pytest.mark.parametrize("loss", [math.inf, -math.inf, math.copysign(math.nan, -1.0)])
def test_a_loss_that_is_not_finite(tmp_path: Path, loss: float) -> None:
    def write(journal: JournalBuilder) -> None:
        quiet(journal, 5)
        journal.step(loss=loss, grad_norm=1.0)
        quiet(journal, 5)

    assert codes(findings(tmp_path, write)) == [("nonfinite-loss", "ticket", 5)]


def test_a_missing_loss_beside_a_broken_gradient_is_a_nan_where_every_step_had_one(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        quiet(journal, 5)
        journal.step(loss=math.nan, grad_norm=math.nan, nonfinite=3, grad_norm_l2=math.nan)

    assert codes(findings(tmp_path, write)) == [("nonfinite-gradient", "ticket", 5), ("nonfinite-loss", "ticket", 5)]


def test_a_loss_that_is_logged_now_and_then_is_none(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        for i in range(50):
            journal.step(loss=1.0 if i % 10 == 0 else math.nan)
        journal.step(loss=math.nan, grad_norm=math.inf)

    assert codes(findings(tmp_path, write)) == [("nonfinite-gradient", "ticket", 50)]


# -- spikes


@pytest.mark.parametrize(("threshold", "severity"), [(5.0, "info"), (math.nan, "ticket")])
def test_a_spike_is_info_where_a_clip_bounded_it(tmp_path: Path, threshold: float, severity: str) -> None:
    def write(journal: JournalBuilder) -> None:
        quiet(journal, 300, clip_threshold=threshold)
        journal.step(grad_norm=500.0, loss=1.0, clip_threshold=threshold)
        quiet(journal, 100, seed=1, clip_threshold=threshold)

    [found] = findings(tmp_path, write)
    assert (found.code, found.severity, found.step, found.active) == ("gradient-spike", severity, 300, False)
    norms = np.random.default_rng(0).lognormal(sigma=0.3, size=300)[-WINDOW:]
    assert found.evidence["largest_before"] == pytest.approx(norms.max())
    assert found.evidence["q90_before"] == pytest.approx(math.exp(np.quantile(np.log(norms), 0.9)))


def test_a_clipped_spike_whose_loss_follows_is_a_ticket(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        quiet(journal, 300)
        journal.step(grad_norm=500.0, loss=1.0, clip_threshold=5.0)
        quiet(journal, 100, seed=1, loss=3.0)

    found = [f for f in findings(tmp_path, write) if f.code == "gradient-spike"]
    assert codes(found) == [("gradient-spike", "info", 300), ("gradient-spike", "ticket", 320)]


def test_too_short_a_past_and_a_large_but_usual_norm_are_no_spikes(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        quiet(journal, FEWEST - 1)
        journal.step(grad_norm=500.0, loss=1.0, clip_threshold=1_000.0)

    assert findings(tmp_path / "a", write) == []

    def wide(journal: JournalBuilder) -> None:
        for norm in np.random.default_rng(1).lognormal(sigma=1.5, size=3_000):
            journal.step(grad_norm=float(norm))

    assert findings(tmp_path / "b", wide) == []


def test_a_new_regime_is_told_once_and_becomes_the_past(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        quiet(journal, 300, clip_threshold=math.nan)
        for norm in np.random.default_rng(2).lognormal(mean=6.0, sigma=0.3, size=400):
            journal.step(grad_norm=float(norm), loss=1.0)

    assert codes(findings(tmp_path, write)) == [("gradient-spike", "ticket", 300)]


# -- clip rate


def clip(journal: JournalBuilder, count: int, share: float) -> None:
    for i in range(count):
        above = int((i + 1) * share) > int(i * share)
        journal.step(grad_norm=2.0 if above else 0.5, clip_threshold=1.0, loss=1.0)


@pytest.mark.parametrize(
    ("share", "tier", "severities"),
    [
        (0.08, "experiment", []),
        (0.15, "experiment", ["ticket"]),
        (0.6, "experiment", ["ticket"]),
        (0.6, "production", ["page"]),
        (0.15, "production", ["ticket"]),
    ],
)
def test_the_clip_rate_against_the_budget(tmp_path: Path, share: float, tier: str, severities: list[str]) -> None:
    found = findings(tmp_path, lambda journal: clip(journal, 800, share), tier=tier)
    assert [f.severity for f in found] == severities
    for f in found:
        assert f.evidence["clip_rate"] == pytest.approx(share, abs=0.01)
        assert f.step == 399


def test_warmup_is_not_judged_and_a_rate_that_falls_is_over(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        clip(journal, 200, 1.0)
        clip(journal, 400, 0.05)

    assert findings(tmp_path / "a", write) == []

    def high_then_low(journal: JournalBuilder) -> None:
        clip(journal, 200, 0.0)
        clip(journal, 200, 0.3)
        clip(journal, 1_000, 0.0)

    [found] = [f for f in findings(tmp_path / "b", high_then_low) if f.code == "clip-rate-high"]
    assert not found.active


def test_a_budget_of_the_run_counts(tmp_path: Path) -> None:
    found = findings(tmp_path, lambda journal: clip(journal, 500, 0.3), budgets={"clip_rate": 0.4})
    assert found == []


# -- generalization gap


@pytest.mark.parametrize(("tier", "severity"), [("experiment", "ticket"), ("production", "page")])
def test_a_gap_above_budget_in_three_validations_running(tmp_path: Path, tier: str, severity: str) -> None:
    def write(journal: JournalBuilder) -> None:
        for i, loss in enumerate([1.2, 1.2, 1.0, 1.2, 1.3, 1.4, 1.5]):
            journal.step()
            journal.validation(loss=loss, train={"loss": 1.0})
            assert i < 7

    [found] = findings(tmp_path, write, tier=tier)
    assert (found.code, found.severity, found.step, found.active) == ("generalization-gap", severity, 5, True)
    assert found.evidence["gaps"] == pytest.approx([0.2, 0.3, 0.4])


def test_gaps_of_metrics_and_slices_are_judged_apart(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        for _ in range(3):
            journal.step()
            journal.validation(loss=1.0, auc=0.5, train={"loss": 1.0, "auc": 0.9})
            journal.validation(loss=1.5, slice="tenant-7")
        journal.step()
        journal.validation(loss=1.0, auc=0.9, train={"loss": 1.0, "auc": 0.9})

    found = findings(tmp_path, write)
    assert sorted((f.evidence["metric"], f.evidence["slice"], f.active) for f in found) == [
        ("auc", "", False),
        ("loss", "tenant-7", True),
    ]


# -- ranks


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 0), (1.001, 0), (1.05, 1)])
def test_ranks_that_clip_by_different_norms(tmp_path: Path, factor: float, expected: int) -> None:
    builders = [JournalBuilder(tmp_path, rank=r, world_size=2) for r in range(2)]
    for i in range(50):
        for rank, builder in enumerate(builders):
            builder.step(grad_norm=2.0 * (factor if rank and i >= 10 else 1.0), loss=1.0)
    for builder in builders:
        builder.end()
    found = replay(tmp_path)
    assert [f.code for f in found] == ["norm-differs-between-ranks"] * expected
    assert all(f.step == 12 for f in found)


# -- contract findings


def test_contract_findings_are_passed_on_with_advice_and_resolved(tmp_path: Path) -> None:
    def write(journal: JournalBuilder) -> None:
        journal.step()
        journal.event("finding", code="clip-missing", severity="ticket", message="no clip seen", first_step=0)
        journal.event("finding", code="from-a-newer-trainer", severity="ticket", message="?")
        journal.event("finding", code="decay-coupled", severity="absurd", message=3, evidence=[1])
        journal.event("resolved", code="clip-missing")

    found = findings(tmp_path, write)
    assert [(f.code, f.severity, f.active) for f in found] == [
        ("clip-missing", "ticket", False),
        ("decay-coupled", "ticket", True),
    ]
    assert found[0].advice == FINDING["clip-missing"].advice
    assert found[1].message == FINDING["decay-coupled"].title


# -- all of them


def busy(journal: JournalBuilder) -> None:
    """Something of everything, at places that cuts can fall on."""
    rng = np.random.default_rng(7)
    for i in range(1_200):
        norm = float(rng.lognormal(sigma=0.4))
        norm = norm * 300 if i in (350, 351, 700) else math.inf if i in (500, 501, 900) else norm
        loss = math.inf if i == 800 else 1.0 + (0.0 if i < 700 else 1.0)
        journal.step(grad_norm=norm, loss=loss, clip_threshold=1.3)
        if i % 100 == 50:
            journal.validation(loss=1.5, train={"loss": 1.0})


@pytest.mark.parametrize("every", [1, 13, 64, 300])
def test_what_is_found_does_not_depend_on_how_the_stream_is_cut_nor_on_restarts(tmp_path: Path, every: int) -> None:
    expected = findings(tmp_path / "whole", busy)
    assert {f.code for f in expected} >= {
        "nonfinite-gradient", "nonfinite-loss", "gradient-spike", "clip-rate-high", "generalization-gap", "loss-spike",
    }  # fmt: skip
    clock = FakeClock()
    run, ledger = follow(tmp_path / "cut", clock=clock), Ledger()

    def look() -> None:
        nonlocal ledger
        offer(run, tmp_path / "cut")
        for seen in run.poll():
            ledger.observe(seen)
        state = json.loads(json.dumps(ledger.to_state()))
        ledger = Ledger()
        ledger.restore(state)

    class Watched(JournalBuilder):
        def step(self, **fields: object) -> int:  # type: ignore[override]
            sequence = super().step(**fields)  # type: ignore[arg-type]
            if sequence % every == 0:
                look()
            return sequence

    with Watched(tmp_path / "cut", clock=clock) as journal:
        busy(journal)
    for seen in read_on(run, clock):
        ledger.observe(seen)
    assert ledger.all == expected


def test_a_detector_that_fails_takes_nobody_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        codes = ("x",)

        def observe(self, seen: object) -> list[Finding]:
            raise RuntimeError("odd")

    with JournalBuilder(tmp_path) as journal:
        journal.step(grad_norm=math.inf)
    ledger = Ledger()
    ledger._detectors.insert(0, Broken())  # type: ignore[arg-type]
    for seen in read_on(follow(tmp_path)):
        ledger.observe(seen)
    assert ledger.is_active("nonfinite-gradient", "ticket")
    assert caplog.text.count("detector-failed") == 1


def test_what_is_damaged_hides_nothing_of_what_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    damaged = []
    for run, rank in (("a", 0), ("a", 1), ("b", 0)):
        with JournalBuilder(tmp_path, run=run, rank=rank, world_size=2) as journal:
            journal.step(grad_norm=math.inf)
        damaged.append(journal.directory / "manifest.json")
    damaged[1].write_text("{")
    assert [(f.run, f.rank) for f in replay(tmp_path / "a")] == [("a", 0)]
    assert "left out: " in caplog.text
    assert "rank-1/attempt-0/manifest.json: not valid JSON" in caplog.text
    damaged[2].write_text("{")
    assert [(f.run, f.rank) for f in replay(tmp_path)] == [("a", 0)]
    damaged[0].write_text("{")
    with pytest.raises(JournalError, match="not valid JSON"):
        replay(tmp_path)


def test_replay_reads_a_root_a_run_a_rank_and_an_attempt(tmp_path: Path) -> None:
    for run in ("a", "b"):
        with JournalBuilder(tmp_path, run=run) as journal:
            journal.step(grad_norm=math.inf)
    attempt = journal.directory
    assert [f.run for f in replay(tmp_path)] == ["a", "b"]
    for path in (attempt, attempt.parent, attempt.parent.parent):
        assert [f.run for f in replay(path)] == ["b"]
    with pytest.raises(JournalError, match="no journal"):
        replay(tmp_path / "nothing")
