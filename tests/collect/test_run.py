"""A run over its life: attempts, replays, several optimizers, late losses, ends, stalls, and agents that die."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest

from gradwatch.collect.fold import RunFold
from gradwatch.collect.run import Observation, RunTail
from gradwatch.journal.layout import Place
from gradwatch.testing import FakeClock, JournalBuilder
from tests.journals import follow, offer, read_on


def windows(seen: list[Observation]) -> list[tuple[int, int, int, int]]:
    return [(w.attempt, w.first_step, w.last_step, w.replayed) for o in seen for w in o.told.windows]


def test_replayed_steps_are_counted_as_replayed_and_nothing_twice(tmp_path: Path) -> None:
    clock = FakeClock()
    with JournalBuilder(tmp_path, clock=clock) as first:
        for i in range(30):
            first.step(grad_norm=2.0 if i % 3 == 0 else 0.5, clip_threshold=1.0, samples=4)
    first = JournalBuilder(tmp_path, clock=clock, attempt=1, first_step=20)
    for i in range(20, 50):
        first.step(grad_norm=2.0 if i % 3 == 0 else 0.5, clip_threshold=1.0, samples=4)
    run = follow(tmp_path, clock=clock)
    seen = [*read_on(run)]
    assert (run.state, run.fold.facts.attempt) == ("running", 1)  # type: ignore[union-attr]
    first.end()
    seen += read_on(run)
    fold = run.fold.optimizers["default"]
    assert (fold.steps, fold.replayed, fold.step) == (50, 10, 49)
    assert fold.clipped == sum(i % 3 == 0 for i in range(50))
    assert run.fold.samples == 240
    assert (
        windows(seen) == [(0, 0, 9, 0), (0, 10, 29, 0), (1, 20, 29, 10), (1, 30, 49, 0)]
        or sum(w[3] for w in windows(seen)) == 10
    )
    assert run.ended


def test_a_scaler_skips_attempts_not_steps(tmp_path: Path) -> None:
    with JournalBuilder(tmp_path) as journal:
        for i in range(10):
            if i in (0, 5):
                journal.step(grad_norm=math.inf, skipped=True, loss_scale=1024.0, clip_threshold=1.0)
            journal.step(grad_norm=0.5, loss_scale=512.0, clip_threshold=1.0)
        journal.step(grad_norm=math.inf, clip_threshold=1.0)
        journal.step(grad_norm=math.nan, grad_norm_l2=math.nan, nonfinite=3, clip_threshold=1.0)
    run = follow(tmp_path)
    read_on(run)
    fold = run.fold.optimizers["default"]
    assert (fold.steps, fold.skipped, fold.nonfinite, fold.nonfinite_in_a_row) == (12, 2, 2, 2)
    assert (fold.clipped, fold.replayed, fold.recent.counts.nonfinite) == (0, 0, 2)
    assert math.isnan(fold.last["grad_norm"])
    assert run.fold.loss_scale == 512.0


def test_the_coefficient_decides_where_the_norm_is_not_what_was_compared(tmp_path: Path) -> None:
    with JournalBuilder(tmp_path) as journal:
        # Gradients still multiplied with a loss scale of 1,000: the clip saw a norm of 500.
        journal.step(grad_norm=0.5, clip_threshold=1.0, flags=128)
        sequence = journal.step(grad_norm=0.5, clip_threshold=1.0, flags=128)
        journal.land(sequence, clip_coefficient=0.002)
    run = follow(tmp_path)
    read_on(run)
    assert run.fold.optimizers["default"].clipped == 1


def test_optimizers_are_counted_apart(tmp_path: Path) -> None:
    with JournalBuilder(tmp_path, optimizers=("generator", "critic")) as journal:
        for i in range(60):
            journal.step(optimizer=1, grad_norm=float(i + 1), clip_threshold=10.0)
            if i % 5 == 4:
                journal.step(optimizer=0, grad_norm=0.1)
    run = follow(tmp_path)
    read_on(run)
    generator, critic = run.fold.optimizers["generator"], run.fold.optimizers["critic"]
    assert (generator.steps, critic.steps, critic.clipped, generator.clipped) == (12, 60, 50, 0)
    assert critic.recent.quantiles[0.5] == pytest.approx(30.5)
    assert "clip_threshold" not in generator.last
    assert run.last_step == 59


def test_a_late_loss_is_in_its_window_exactly_once(tmp_path: Path) -> None:
    clock = FakeClock()
    losses = [1.0 + i / 10 for i in range(20)]
    run = follow(tmp_path, clock=clock)
    seen: list[Observation] = []
    with JournalBuilder(tmp_path, clock=clock, seconds_a_step=2.0) as journal:
        for loss in losses:
            journal.step(loss=math.nan)
            offer(run, tmp_path)
            seen += read_on(run, clock)  # the row is shown without its loss
            journal.late_loss(99.0)
            seen += read_on(run)
            journal.late_loss(loss)
    seen += read_on(run)
    values = [w.values for o in seen for w in o.told.windows]
    assert [v["loss_mean"] for v in values] == pytest.approx([sum(losses[:10]) / 10, sum(losses[10:]) / 10])
    assert [v["loss_last"] for v in values] == pytest.approx([losses[9], losses[19]])


def test_device_values_that_land_late_count_once_and_in_their_row(tmp_path: Path) -> None:
    clock = FakeClock()
    run = follow(tmp_path, clock=clock)
    with JournalBuilder(tmp_path, clock=clock) as journal:
        waiting: list[tuple[int, float]] = []
        for i in range(60):
            norm = float(i % 7)
            sequence = journal.step(grad_norm=norm, clip_threshold=3.0, landed=False)
            waiting.append((sequence, norm))
            if len(waiting) > 4:
                sequence, norm = waiting.pop(0)
                journal.land(sequence, grad_norm=norm, grad_norm_l2=norm, nonfinite=0.0)
            offer(run, tmp_path)
            run.poll()
            clock.advance(0.6)
            run.poll()
            # That a step was made is seen at once, its norm when it has landed.
            assert run.views[0].step == i
            assert run.fold.optimizers["default"].steps == max(0, i - 3)
        for sequence, norm in waiting:
            journal.land(sequence, grad_norm=norm, grad_norm_l2=norm, nonfinite=0.0)
    read_on(run, clock)
    fold = run.fold.optimizers["default"]
    assert (fold.steps, fold.clipped) == (60, sum(i % 7 > 3 for i in range(60)))
    assert fold.norms.sum == sum(i % 7 for i in range(60))


@pytest.mark.parametrize("seed", range(6))
def test_agents_that_die_at_any_point_lose_nothing_and_count_nothing_twice(tmp_path: Path, seed: int) -> None:
    """States are kept now and then; after each death the next agent starts from the last one kept."""
    rng = random.Random(seed)
    clock = FakeClock()
    run, kept = follow(tmp_path, clock=clock), None
    emitted: dict[tuple[int, int], int] = {}
    values = np.random.default_rng(seed).lognormal(size=900)
    with JournalBuilder(tmp_path, clock=clock) as journal:
        for i, norm in enumerate(values):
            journal.step(loss=float(i), grad_norm=float(norm), clip_threshold=1.5, samples=2)
            if i % 100 == 99:
                journal.validation(loss=1.0, train={"loss": 0.9})
            if rng.random() < 0.1:
                offer(run, tmp_path)
                for seen in run.poll():
                    for w in seen.told.windows:
                        emitted[w.attempt, w.first_step] = w.steps
            if rng.random() < 0.05:
                kept = json.loads(json.dumps(run.to_state()))
            if rng.random() < 0.05:
                run.release()
                run = follow(tmp_path, clock=clock)
                if kept is not None:
                    run.restore(kept)
    offer(run, tmp_path)
    for seen in read_on(run, clock):
        for w in seen.told.windows:
            emitted[w.attempt, w.first_step] = w.steps
    fold = run.fold.optimizers["default"]
    assert (fold.steps, fold.clipped) == (900, int((values > 1.5).sum()))
    assert fold.norms.sum == pytest.approx(float(values.sum()), rel=1e-9)
    assert (run.fold.samples, run.fold.validations.count) == (1_800, 9)
    assert run.views[0].probe_seconds == pytest.approx(900e-6)
    # Windows that were told again have the same keys; together they are all steps.
    assert sum(emitted.values()) == 900
    assert run.ranks[0].missed == 0


def test_rows_that_were_overwritten_are_missed_not_invented(tmp_path: Path) -> None:
    with JournalBuilder(tmp_path, capacity=128 * 1024) as journal:
        rows = 2 * journal.writer.steps.geometry.capacity
        for _ in range(rows):
            journal.step()
    run = follow(tmp_path)
    read_on(run)
    assert run.ranks[0].missed + run.fold.optimizers["default"].steps == rows
    assert run.ranks[0].missed > 0


def test_an_end_that_nobody_told_is_abrupt(tmp_path: Path) -> None:
    clock = FakeClock()
    journal = JournalBuilder(tmp_path, clock=clock, boot_id="this-boot")
    journal.step()
    run = RunTail("run-1", monotonic=clock, wall=clock, boot_id="this-boot")
    offer(run, tmp_path)
    read_on(run, clock)
    assert run.state == "running"
    journal.vanish()
    read_on(run)
    assert run.end is not None
    assert (run.end.state, run.end.last_step) == ("abrupt", 0)
    assert "SIGKILL" in run.end.reason


def test_another_boot_tells_a_reboot(tmp_path: Path) -> None:
    clock = FakeClock()
    journal = JournalBuilder(tmp_path, clock=clock, boot_id="a-former-boot")
    journal.step()
    journal.vanish()
    run = RunTail("run-1", monotonic=clock, wall=clock, boot_id="this-boot")
    offer(run, tmp_path)
    read_on(run)
    assert run.end is not None
    assert run.end.reason.startswith("reboot")


def test_an_end_that_was_told_is_told_on(tmp_path: Path) -> None:
    journal = JournalBuilder(tmp_path)
    journal.step()
    journal.end("failed", reason="ValueError", type="ValueError", message="no\x00 data\n", exit_code=1)
    run = follow(tmp_path)
    read_on(run)
    assert run.end is not None
    assert (run.end.state, run.end.type, run.end.exit_code) == ("failed", "ValueError", 1)
    assert "\n" not in run.end.message
    assert len(run.last_rows()["grad_norm"]) == 1


def test_a_run_that_does_not_move_is_stalled_and_back_when_it_does(tmp_path: Path) -> None:
    clock = FakeClock()
    run = follow(tmp_path, clock=clock)
    journal = JournalBuilder(tmp_path, clock=clock, seconds_a_step=1.0)
    offer(run, tmp_path)
    read_on(run)
    assert run.state == "starting"
    clock.advance(1_799)
    assert run.state == "starting"
    clock.advance(2)
    assert run.state == "stalled"
    for _ in range(20):
        journal.step()
    read_on(run, clock)
    assert run.state == "running"
    clock.advance(590)
    assert run.state == "running"
    clock.advance(20)
    assert run.state == "stalled"
    journal.step(duration=610.0)
    read_on(run, clock)
    assert run.state == "running"
    # It has paused for 610 s before: now it gets twice that.
    clock.advance(1_200)
    assert run.state == "running"
    clock.advance(30)
    assert run.state == "stalled"
    journal.end()


def test_slow_steps_get_twenty_times_their_median(tmp_path: Path) -> None:
    clock = FakeClock()
    with JournalBuilder(tmp_path, clock=clock, seconds_a_step=60.0) as journal:
        for _ in range(10):
            journal.step()
        run = follow(tmp_path, clock=clock)
        read_on(run, clock)
        clock.advance(1_190)
        assert run.state == "running"
        clock.advance(20)
        assert run.state == "stalled"


def test_what_is_learned_later_is_merged_over_the_hyperparameters(tmp_path: Path) -> None:
    with JournalBuilder(tmp_path, hyperparameters={"batch_size": 8, "seed": 1}) as journal:
        journal.event("metadata", values={"accumulation": 4, "seed": 2, "odd": {"nested": 1}})
        journal.event("mlflow", run_id="abc", tracking_uri="http://there")
        journal.event("slo", slo="latency", good=9, bad=1)
        journal.event("slo", slo="latency", good=1, bad=-5)
        journal.event("group", optimizer="default", group=1, values={"lr": 0.5})
    run = follow(tmp_path)
    seen = read_on(run)
    facts = run.fold.facts
    assert facts is not None
    assert facts.hyperparameters == {"batch_size": 8, "seed": 2, "accumulation": 4, "group.default.1.lr": 0.5}
    assert facts.manifest.mlflow["run_id"] == "abc"
    assert run.fold.slos == {"latency": (10, 1)}
    assert any(o.told.facts_changed for o in seen)


def test_ranks_beside_rank_0_have_series_of_their_own(tmp_path: Path) -> None:
    clock = FakeClock()
    builders = [JournalBuilder(tmp_path, rank=r, world_size=2, clock=clock) for r in range(2)]
    for i in range(10):
        for rank, builder in enumerate(builders):
            builder.step(grad_norm=3.0, grad_norm_l2=1.0 + rank, duration=0.1 * (rank + 1), step=i)
    run = follow(tmp_path, clock=clock)
    read_on(run, clock)
    assert run.views[1].step == 9
    assert (run.views[1].grad_norm, run.views[1].grad_norm_local) == (3.0, 2.0)
    assert run.views[1].step_duration == 0.2
    assert run.fold.optimizers["default"].steps == 10
    for builder in builders:
        builder.end()
    read_on(run, clock)
    assert run.ended


def test_the_forensics_of_the_first_broken_step_stay_with_the_run(tmp_path: Path) -> None:
    tail = RunTail("r", monotonic=FakeClock(), wall=FakeClock())
    with JournalBuilder(tmp_path, run="r") as journal:
        tail.offer(Place("r", 0, 0, journal.directory))
        journal.step()
        journal.event("nonfinite", step=1, tensor="layer2.weight", layer="layer2", norms={"step": [0]})
        journal.event("nonfinite", step=500, tensor="layer1.weight", layer="layer1", norms={})
        journal.event("nonfinite", step=1, tensor="x" * 900, norms={"step": [0] * 20_000})
        tail.poll()
        assert (tail.fold.nonfinite["step"], tail.fold.nonfinite["layer"]) == (1, "layer2")
        assert tail.fold.facts is not None
        again = RunFold.from_state("r", tail.fold.to_state(), 0, tail.fold.facts.manifest)
        assert again.nonfinite == tail.fold.nonfinite
