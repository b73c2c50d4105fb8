"""Recommendations: against distributions whose quantiles are known, sums by hand, and weights that torch shrinks."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.cli.findings import read_findings
from gradwatch.cli.locate import find
from gradwatch.collect.rows import F64
from gradwatch.detect.spike import EXCESSES, outliers
from gradwatch.journal.manifest import Optimizer
from gradwatch.testing import JournalBuilder
from gradwatch.tools.recommend.advice import Advice, as_text, recommend
from gradwatch.tools.recommend.moving import percentile_of_the_past
from gradwatch.tools.recommend.norms import block_length, drift, medians, quantiles, tail_index
from gradwatch.tools.recommend.threshold import ClipAdvice
from gradwatch.tools.report.record import read
from tests.tools.gated import call
from tests.watching import _alone, watch

__all__ = ["_alone", "watch"]

SIGMA = 0.3


def lognormal(count: int, seed: int = 0, sigma: float = SIGMA) -> F64:
    return np.random.default_rng(seed).lognormal(sigma=sigma, size=count)


def percentile(share: float, sigma: float = SIGMA) -> float:
    """The quantile of the lognormal by its definition."""
    return math.exp(sigma * NormalDist().inv_cdf(share))


def write(root: Path, norms: Sequence[float] | F64, rates: Sequence[float] | None = None, **more: Any) -> None:
    threshold = more.pop("threshold", math.nan)
    with JournalBuilder(root, **more) as journal:
        for step, norm in enumerate(norms):
            rate = 0.1 if rates is None else rates[step]
            journal.step(grad_norm=float(norm), loss=1.0, lr=rate, clip_threshold=threshold)


def advise(root: Path) -> Advice:
    recorded = find(str(root))
    return recommend(read(recorded.places), read_findings(recorded))


def clip_of(root: Path) -> ClipAdvice:
    (clip,) = advise(root).clip
    return clip


# -- which steps count


def test_the_threshold_is_the_p99_of_good_steps_and_corrupt_ones_are_set_aside(tmp_path: Path) -> None:
    norms = lognormal(4_000)
    corrupt = np.arange(800, 4_000, 160)
    norms[corrupt] = 80.0
    write(tmp_path, norms)
    clip = clip_of(tmp_path)
    assert clip.rule == "p99"
    assert clip.max_norm == pytest.approx(percentile(0.99), rel=0.05)
    assert clip.seen.aside == {"first tenth": 400, "findings": 21 * len(corrupt)}
    assert clip.seen.used == 3_600 - 21 * len(corrupt)
    # What it will clip is counted with the corrupt steps in it.
    assert clip.clip_rate == pytest.approx((norms[400:] > clip.max_norm).mean())
    assert clip.clip_rate > len(corrupt) / 3_600


def test_warmup_and_first_tenth_are_no_part_of_it(tmp_path: Path) -> None:
    norms = lognormal(2_000)
    norms[:600] *= 1.3
    write(tmp_path, norms, rates=[min(1.0, (step + 1) / 600) for step in range(2_000)])
    clip = clip_of(tmp_path)
    assert clip.seen.aside == {"first tenth": 200, "warmup": 400}
    assert clip.max_norm == pytest.approx(np.quantile(norms[600:], 0.99), rel=5e-3)


def test_a_finding_that_lasts_takes_the_rest_of_the_run_along(tmp_path: Path) -> None:
    norms = lognormal(3_000)
    norms[2_000:] *= 100
    with JournalBuilder(tmp_path) as journal:
        for step, norm in enumerate(norms):
            journal.step(grad_norm=norm, loss=1.0 if step < 2_000 else 5.0)
    clip = clip_of(tmp_path)
    assert "gradient-exploding" in clip.seen.findings
    assert clip.seen.used <= 1_700
    assert clip.max_norm == pytest.approx(percentile(0.99), rel=0.1)
    assert any(
        "of all steps: " in reason and "that findings touch (gradient-exploding, " in reason for reason in clip.reasons
    )


def test_steps_that_a_restart_went_back_over_count_as_they_were_trained_last(tmp_path: Path) -> None:
    norms = lognormal(2_000)
    killed = JournalBuilder(tmp_path)
    for norm in norms[:1_500]:
        killed.step(grad_norm=3 * norm)
    killed.vanish()
    with JournalBuilder(tmp_path, attempt=1, first_step=200) as journal:
        for norm in norms[200:]:
            journal.step(grad_norm=norm)
    clip = clip_of(tmp_path)
    assert (clip.seen.steps, clip.seen.aside) == (2_000, {"first tenth": 200})
    assert clip.max_norm == pytest.approx(np.quantile(norms[200:], 0.99), rel=5e-3)


def test_it_says_which_steps_the_journal_still_had(tmp_path: Path) -> None:
    write(tmp_path, lognormal(9_000), capacity=2**20)
    advice = advise(tmp_path)
    seen = advice.clip[0].seen
    assert seen.partial
    assert seen.first_step > 0
    assert (seen.last_step, seen.steps) == (8_999, 9_000 - seen.first_step)
    # The first tenth is that of the run, and it is gone already.
    assert seen.aside.get("first tenth", 0) == max(0, 900 - seen.first_step)
    assert f"steps seen  {seen.first_step:,} to 8,999 (the journal keeps no earlier ones)" in as_text(advice)


def test_outliers_are_those_of_the_finding_and_a_new_regime_is_none() -> None:
    norms = lognormal(600)
    norms[300] = 60.0
    norms[400:] *= 50
    marked = np.flatnonzero(outliers(norms))
    assert marked.tolist() == [300]
    window = np.log(norms[44:300])
    q90 = np.quantile(window, 0.9)
    assert math.log(60.0) - q90 > EXCESSES * (window[window > q90] - q90).mean()


# -- when it does not name a constant


def test_it_abstains_below_500_steps_and_offers_a_percentile_of_the_past(tmp_path: Path) -> None:
    norms = lognormal(400)
    write(tmp_path, norms)
    clip = clip_of(tmp_path)
    assert clip.max_norm is None
    assert "360 good steps are too few for a p99; 500 are needed, 140 more." in clip.reasons
    (moving,) = clip.instead
    clipped = [norms[i] > np.quantile(norms[: i - i % 10], 0.99) for i in range(100, 400)]
    assert moving.kind == "percentile"
    assert moving.clip_rate == pytest.approx(np.mean(clipped))
    assert moving.by_quarter == pytest.approx([np.mean(part) for part in np.array_split(clipped, 4)])


def test_it_abstains_where_the_scale_drifts_and_offers_two_stages(tmp_path: Path) -> None:
    norms = lognormal(4_000)
    norms[:1_300] *= 6
    write(tmp_path, norms)
    clip = clip_of(tmp_path)
    assert clip.max_norm is None
    assert clip.drift is not None
    assert clip.drift == pytest.approx(6, rel=0.05)
    stages, moving = clip.instead
    assert (stages.kind, moving.kind) == ("warmup-aware", "percentile")
    (_, early), (boundary, late) = stages.stages
    assert early == pytest.approx(np.quantile(norms[:boundary], 0.99), rel=5e-3)
    assert late == pytest.approx(np.quantile(norms[boundary:], 0.99), rel=5e-3)
    expected = np.concatenate([norms[400:boundary] > early, norms[boundary:] > late])
    assert stages.clip_rate == pytest.approx(expected.mean(), abs=1e-3)


def test_a_drift_of_less_than_three_times_is_named_and_borne(tmp_path: Path) -> None:
    write(tmp_path, lognormal(4_000) * np.geomspace(3, 1, 4_000))
    clip = clip_of(tmp_path)
    assert clip.max_norm is not None
    assert clip.drift is not None
    assert 1.9 < clip.drift < 3
    (p99,) = [c for c in clip.candidates if c.name == "p99"]
    assert p99.by_quarter[0] > 3 * p99.by_quarter[3]


@pytest.mark.parametrize("code", ["clip-scaled-gradients", "gradients-not-cleared"])
def test_norms_that_a_contract_finding_calls_wrong_are_not_learned_from(tmp_path: Path, code: str) -> None:
    with JournalBuilder(tmp_path) as journal:
        for norm in lognormal(2_000):
            journal.step(grad_norm=norm)
        journal.event("finding", code=code, severity="ticket", message="wrong", evidence={}, first_step=5)
    clip = clip_of(tmp_path)
    assert (clip.max_norm, clip.instead) == (None, ())
    assert any(code in reason for reason in clip.reasons)


# -- the statistics


def test_a_heavy_tail_asks_for_p95(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    write(tmp_path, random.pareto(1.4, 4_000) + 1)
    clip = clip_of(tmp_path)
    assert clip.rule == "p95"
    assert clip.max_norm == pytest.approx(0.05 ** (-1 / 1.4), rel=0.1)


@pytest.mark.parametrize("alpha", [1.2, 1.8, 3.0])
def test_the_tail_index_of_a_pareto_is_its_own(alpha: float) -> None:
    norms = np.random.default_rng(0).pareto(alpha, 60_000) + 1
    assert tail_index(norms) == pytest.approx(alpha, rel=0.06)


def test_a_lognormal_of_healthy_width_has_no_heavy_tail() -> None:
    assert tail_index(lognormal(4_000, sigma=0.8)) > 2


def test_intervals_hold_the_truth_though_neighbours_are_alike() -> None:
    """Over 40 runs of an AR(1) process in the logarithm the interval of the median covers it; blocks are why."""
    covered = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        noise = random.normal(size=1_500)
        logs = np.empty(1_500)
        logs[0] = noise[0]
        for i in range(1, 1_500):
            logs[i] = 0.9 * logs[i - 1] + math.sqrt(1 - 0.81) * noise[i]
        median = quantiles(np.exp(SIGMA * logs))[0]
        assert median.low <= median.value <= median.high
        covered += median.low <= 1.0 <= median.high
    assert covered >= 33
    assert block_length(np.exp(SIGMA * logs)) > 25


def test_of_independent_norms_the_block_is_short_and_the_interval_is_that_of_the_binomial() -> None:
    norms = lognormal(4_000)
    assert block_length(norms) == 16
    ordered = np.sort(norms)
    for quantile in quantiles(norms):
        share = quantile.percentile / 100
        spread = 1.96 * math.sqrt(4_000 * share * (1 - share))
        low, high = ordered[int(4_000 * share - spread)], ordered[min(3_999, int(4_000 * share + spread))]
        assert quantile.high - quantile.low == pytest.approx(high - low, rel=0.4)


def test_drift_and_quarters() -> None:
    norms = np.repeat([4.0, 2.0, 1.0, 3.0], 25)
    assert medians(norms) == [4.0, 2.0, 1.0, 3.0]
    assert drift(medians(norms)) == 4.0


def test_candidates_have_the_rates_of_the_rows(tmp_path: Path) -> None:
    norms = lognormal(2_000)
    write(tmp_path, norms, threshold=1.5)
    clip = clip_of(tmp_path)
    behind = norms[200:]
    assert [c.name for c in clip.candidates] == ["p50", "p90", "p95", "p99", "as it was"]
    for candidate in clip.candidates:
        assert candidate.clip_rate == pytest.approx((behind > candidate.max_norm).mean())
        by_hand = [(part > candidate.max_norm).mean() for part in np.split(behind, 4)]
        assert candidate.by_quarter == pytest.approx(by_hand)
    assert clip.candidates[-1].max_norm == 1.5


def test_the_moving_percentile_knows_only_the_past() -> None:
    values = lognormal(1_500)
    thresholds = percentile_of_the_past(values)
    assert np.isinf(thresholds[:100]).all()
    assert thresholds[1_437] == np.quantile(values[430:1_430], 0.99)


# -- what it depends on


def test_norms_of_a_clipped_trajectory_are_conditional(tmp_path: Path) -> None:
    write(tmp_path / "clipped", lognormal(2_000), threshold=1.5)
    write(tmp_path / "free", lognormal(2_000))
    write(tmp_path / "staging", lognormal(2_000), threshold=math.inf)
    clipped, free, staging = (clip_of(tmp_path / name) for name in ("clipped", "free", "staging"))
    assert clipped.clipped is not None
    assert clipped.clipped.clip_rate == pytest.approx((lognormal(2_000) > 1.5).mean())
    assert any("conditional on it" in reason for reason in clipped.reasons)
    assert free.clipped is None
    assert not any("conditional" in reason for reason in (*free.reasons, *staging.reasons))
    assert any("max_norm=math.inf" in reason for reason in clipped.reasons)
    assert staging.clipped is None
    assert staging.max_norm == free.max_norm


def test_a_clip_of_a_part_is_said_to_have_compared_another_norm(tmp_path: Path) -> None:
    with JournalBuilder(tmp_path) as journal:
        for norm in lognormal(1_000):
            journal.step(grad_norm=norm, clip_threshold=0.5, flags=64)
    # Bit 64: the coefficient decides, and the builder's is that of the whole norm.
    assert not any("another norm" in reason for reason in clip_of(tmp_path).reasons)


@pytest.mark.parametrize("linear", [True, False])
def test_the_reasons_know_the_optimizer(tmp_path: Path, linear: bool) -> None:
    optimizer = Optimizer("default", "SGD" if linear else "AdamW", linear, ({"lr": 0.1, "weight_decay": 0.0},))
    write(tmp_path, lognormal(1_000), optimizers=(optimizer,))
    text = " ".join(clip_of(tmp_path).reasons)
    assert ("smaller learning rate" in text) is linear
    assert ("takes a constant clip coefficient out again" in text) is not linear


def test_each_optimizer_has_its_own(tmp_path: Path) -> None:
    values = lognormal(1_000)
    with JournalBuilder(tmp_path, optimizers=("generator", "critic")) as journal:
        for norm in values:
            journal.step(optimizer=0, grad_norm=norm)
            journal.step(optimizer=1, grad_norm=10 * norm)
    generator, critic = advise(tmp_path).clip
    assert (generator.optimizer, critic.optimizer) == ("generator", "critic")
    assert generator.max_norm is not None
    assert critic.max_norm == pytest.approx(10 * generator.max_norm, rel=0.01)


# -- weight decay


@pytest.mark.parametrize(
    ("make", "loops"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.2), 300),
        (lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.2), 300),
        (lambda p: torch.optim.SGD(p, lr=0.001, momentum=0.9, weight_decay=0.2), 600),
    ],
    ids=["adamw", "sgd", "sgd-momentum"],
)
def test_the_shrinkage_is_that_of_weights_without_gradient(
    watch: Callable[..., gradwatch.Run],
    make: Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer],
    loops: int,
    tmp_path: Path,
) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    module = torch.nn.Module()
    module.weight = weight
    optimizer = make([weight])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, loops)
    run = watch(module, optimizer)
    for _ in range(loops):
        weight.grad = torch.zeros(4)
        optimizer.step()
        schedule.step()
    run.finish()
    (decay,) = advise(tmp_path / "runs").weight_decay
    assert decay.shrinkage is not None
    assert 1 - decay.shrinkage == pytest.approx(float(weight.detach()[0]), rel=0.01)


def test_adam_couples_and_is_told_so(watch: Callable[..., gradwatch.Run], tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=0.1)
    run = watch(model, optimizer)
    for _ in range(20):
        model(torch.randn(8, 4)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    run.finish()
    (decay,) = advise(tmp_path / "runs").weight_decay
    assert (decay.move, decay.total, decay.weight_decay) == ("decouple", None, None)


ADAMW = Optimizer("default", "AdamW", False, ({"lr": 0.01, "weight_decay": 0.1, "parameters": 20},))


def decayed(
    root: Path,
    *,
    decay: float = 0.1,
    rate: float = 0.01,
    validation: Sequence[float] = (),
    train: Sequence[float] = (),
    weights: Sequence[float] = (),
) -> Any:
    """A run of 1,000 steps of AdamW with validations, and weight norms, at equal distances."""
    known = {"optimizer.default.decay": "decoupled"}
    with JournalBuilder(root, optimizers=(ADAMW,), hyperparameters=known) as journal:
        for step in range(1_000):
            journal.step(grad_norm=1.0, loss=1.0, lr=rate, weight_decay=decay)
            for values, write in ((validation, _validate(journal, train)), (weights, _sample(journal))):
                if values and (step + 1) % (1_000 // len(values)) == 0:
                    write((step + 1) // (1_000 // len(values)) - 1, values)
    (advice,) = advise(root).weight_decay
    return advice


def _validate(journal: JournalBuilder, train: Sequence[float]) -> Callable[[int, Sequence[float]], None]:
    return lambda index, values: journal.validation(loss=values[index], train={"loss": train[index]})


def _sample(journal: JournalBuilder) -> Callable[[int, Sequence[float]], None]:
    return lambda index, values: journal.sample([values[index]] * 2, [1e-3, 1e-3])


FALLS = (1.0, 0.8, 0.6, 0.4, 0.3)
RISES = (1.2, 1.0, 0.9, 1.0, 1.3)
WELL = (1.05, 0.84, 0.63, 0.42, 0.31)


def test_below_one_percent_it_cannot_matter(tmp_path: Path) -> None:
    advice = decayed(tmp_path, decay=5e-4, validation=WELL, train=FALLS)
    assert advice.total == pytest.approx(1_000 * 0.01 * 5e-4)
    assert (advice.move, advice.weight_decay) == ("cannot matter", None)
    assert any("λ = 0.01 would take 10% off" in reason for reason in advice.reasons)


def test_what_cannot_matter_is_raised_to_what_can_where_it_overfits(tmp_path: Path) -> None:
    advice = decayed(tmp_path, decay=0.0, validation=RISES, train=FALLS)
    assert (advice.move, advice.weight_decay) == ("raise", 0.01)


def test_overfitting_asks_for_three_times_as_much(tmp_path: Path) -> None:
    advice = decayed(tmp_path, validation=RISES, train=FALLS, weights=(1.0, 1.5, 2.0, 2.5, 3.0))
    assert (advice.move, advice.weight_decay) == ("raise", 0.3)
    assert advice.gap == pytest.approx(1.3 / 0.3 - 1)
    assert advice.norm_trend == pytest.approx(3.0 / 2.0)
    assert advice.timescale == pytest.approx(1_000)
    assert any("Smith 2018" in prior for prior in advice.priors)


def test_a_healthy_run_keeps_its_decay(tmp_path: Path) -> None:
    advice = decayed(tmp_path, validation=WELL, train=FALLS)
    assert (advice.move, advice.weight_decay) == ("keep", None)


def test_weights_that_shrink_while_training_is_no_better_than_validation_ask_for_less(tmp_path: Path) -> None:
    advice = decayed(
        tmp_path, decay=1.0, validation=(1.0, 0.98, 0.97, 0.97, 0.97), train=(1.0, 1.0, 1.0, 1.0, 1.0),
        weights=(3.0, 2.0, 1.0, 0.7, 0.5),
    )  # fmt: skip
    assert (advice.move, advice.weight_decay) == ("lower", 0.3)


def test_without_a_validation_it_says_that_it_cannot_tell(tmp_path: Path) -> None:
    assert decayed(tmp_path).move == "unknown"


# -- the command, over real trainings


def test_the_command_over_a_training_with_corrupt_batches(
    watch: Callable[..., gradwatch.Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    run = watch(model, optimizer, model_name="churn", run_name="noisy")
    norms = []
    for step in range(900):
        x = torch.randn(32, 8)
        y = 0.1 * x.sum(1, keepdim=True) + torch.randn(32, 1)
        y = y * 20 if step % 100 == 50 else y
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)))
        optimizer.step()
        optimizer.zero_grad()
        run.log_train(loss=loss)
    run.finish()
    code, output, _ = call(capsys, "recommend", "noisy", "--dir", str(tmp_path / "runs"), "--json")
    (clip,) = json.loads(output)["clip"]
    healthy = [norm for step, norm in enumerate(norms) if step >= 90 and (step - 50) % 100 > 20]
    assert code == 0
    assert clip["max_norm"] == pytest.approx(np.quantile(healthy, 0.99), rel=0.1)
    assert clip["max_norm"] < min(norm for step, norm in enumerate(norms) if step % 100 == 50)
    code, text, _ = call(capsys, "recommend", str(run.directory))
    assert code == 0
    assert f"Clip threshold: max_norm = {clip['max_norm']:g} (p99; " in text
    assert "Weight decay: " in text
    assert "arXiv:1211.5063" in text


def test_a_run_without_steps_is_no_reason_to_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, [])
    code, output, _ = call(capsys, "recommend", str(tmp_path))
    assert code == 0
    assert "no constant is recommended" in output
    assert json.loads(call(capsys, "recommend", str(tmp_path), "--json")[1])["clip"][0]["candidates"] == []
