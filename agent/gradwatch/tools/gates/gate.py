"""The gate: whether a run may take the champion's place, check by check, all data and each cohort alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from gradwatch.catalog import FINDING
from gradwatch.collect.validations import is_better_high
from gradwatch.sinks.mlflow.facts import AUDITED, COSTS
from gradwatch.tools.gates.checks import Check, judged, skipped
from gradwatch.tools.gates.evidence import Evidence, Where
from gradwatch.tools.gates.policy import Policy, limit

CALIBRATION: Final = "ece"
#: First parts of parameters that are choices of training; of ``precision`` only what it trains in.
_CHOICES: Final = ("group", "optimizer", "scheduler", "config", "max_norm")
#: Parts of a group that follow from the model.
_OF_THE_MODEL: Final = ("tensors", "parameters", "biases", "norms")
_DECLARE: Final = "where it is meant, say --declare NAME, or list it in `declared` of the policy"
_RETRAIN: Final = "look at `gradwatch findings` and `gradwatch report` of the run"


def gate(run: Evidence, champion: Evidence, policy: Policy, declared: Sequence[str] = ()) -> list[Check]:
    """Every check of ``run`` against ``champion``; ``declared`` adds to the policy's."""
    meant = (*policy.declared, *declared)
    return [
        judged("end", run.state == "finished", f"the run is {run.state}", "only a finished run can be promoted"),
        _findings(run, policy),
        *_gaps(run, policy),
        *_scores(run, champion, policy),
        *_calibration(run, champion, policy),
        _clip_rate(run, policy),
        _nonfinite(run, policy),
        *_costs(run, champion, policy),
        _weight_norm(run, champion, policy, meant),
        *_hyperparameters(run, champion, meant),
    ]


def _findings(run: Evidence, policy: Policy) -> Check:
    found = [f for f in run.findings if f.severity != "info" and f.code not in policy.allow_findings]
    message = "; ".join(f"{f.code}: {f.message}" for f in found) or "none is open"
    advice = " ".join(dict.fromkeys(FINDING[f.code].advice for f in found if f.code in FINDING))
    return judged("open findings", not found, message, advice or _RETRAIN)


def _gaps(run: Evidence, policy: Policy) -> Iterator[Check]:
    if not run.gaps:
        yield skipped("generalization gap", "none is recorded: nothing was validated beside training values")
    for where, gap in sorted(run.gaps.items()):
        most = limit(policy.max_gap, *where)
        message = f"{gap:+.1%} worse on validation than on training, at most {most:.1%}"
        yield judged(f"generalization gap of {_named(where)}", gap <= most, message, "see docs/tuning.md on the gap")


def _scores(run: Evidence, champion: Evidence, policy: Policy) -> Iterator[Check]:
    """The champion's scores; one that it has and the run lacks fails."""
    asked = {where: old for where, old in sorted(champion.scores.items()) if where[0] not in (CALIBRATION, *COSTS)}
    if not asked:
        yield judged("score", False, "no validation is recorded of the champion", "log one with run.log_validation")
    told = dict.fromkeys(policy.lower_is_better, False)
    for where, old in asked.items():
        new, most = run.scores.get(where), limit(policy.max_score_drop, *where)
        name = f"score {_named(where)}"
        if new is None:
            yield judged(
                name, False, f"{old:.4g} before, not recorded now", "validate what the champion was validated on"
            )
            continue
        drop = _relative(old, new) * (-1 if is_better_high(where[0], told) else 1)
        message = (
            f"{old:.4g} → {new:.4g}, {'worse' if drop > 0 else 'better'} by {abs(drop):.1%}, at most {most:.1%} worse"
        )
        yield judged(name, drop <= most, message, "look at `gradwatch report` of both runs")


def _calibration(run: Evidence, champion: Evidence, policy: Policy) -> Iterator[Check]:
    """Expected calibration error, absolute."""
    known = {where: old for where, old in sorted(champion.scores.items()) if where[0] == CALIBRATION}
    if not known:
        yield skipped("calibration", "the champion has no ece: log_validation(probabilities=, targets=) records it")
    for where, old in known.items():
        new, most = run.scores.get(where, math.nan), policy.max_calibration_rise
        message = f"{old:.4g} → {new:.4g}, at most {most:.4g} more"
        yield judged(f"calibration {_named(where)}", new - old <= most, message, FINDING["calibration-worse"].advice)


def _clip_rate(run: Evidence, policy: Policy) -> Check:
    if run.clip_rate is None:
        return skipped("clip rate", "nothing clipped")
    ok = run.clip_rate <= policy.max_clip_rate
    message = f"{run.clip_rate:.1%} of the steps, at most {policy.max_clip_rate:.1%}"
    return judged("clip rate", ok, message, FINDING["clip-rate-high"].advice)


def _nonfinite(run: Evidence, policy: Policy) -> Check:
    count = run.nonfinite_steps
    if count is None:
        return judged("non-finite steps", False, "no step is recorded", "train with gradwatch.watch")
    ok = count <= policy.max_nonfinite_steps
    return judged("non-finite steps", ok, f"{count}, at most {policy.max_nonfinite_steps:g}", _RETRAIN)


def _costs(run: Evidence, champion: Evidence, policy: Policy) -> Iterator[Check]:
    """Size, latency and cost of an inference, where both sides have them."""
    limits = dict(zip(COSTS, (policy.max_size_rise, policy.max_latency_rise, policy.max_cost_rise), strict=True))
    for name, most in limits.items():
        old, new = champion.costs.get(name), run.costs.get(name)
        if old is None or new is None:
            yield skipped(name, f"not known of the {'champion' if old is None else 'run'}")
            continue
        rise = _relative(old, new)
        message = f"{old:.4g} → {new:.4g}, {rise:+.1%}, at most {most:+.1%}"
        yield judged(name, rise <= most, message, "make the model smaller, or raise the limit in the policy")


def _weight_norm(run: Evidence, champion: Evidence, policy: Policy, declared: Sequence[str]) -> Check:
    name, old, new = "weight_norm", champion.weight_norm, run.weight_norm
    if old is None or new is None:
        return skipped(name, f"not known of the {'champion' if old is None else 'run'}")
    change, most = abs(_relative(old, new)), policy.max_weight_norm_change
    message = f"{old:.4g} → {new:.4g}, changed by {change:.1%}; beyond {most:.1%} it must be declared"
    return judged(name, change <= most or name in declared, message, _DECLARE)


def _hyperparameters(run: Evidence, champion: Evidence, declared: Sequence[str]) -> Iterator[Check]:
    """A check for each difference; one in all where there is none."""
    differences = dict(_differences(choices(champion.params), choices(run.params)))
    if not differences:
        yield judged("hyperparameters", True, "the same as the champion's")
    for key, (old, new) in differences.items():
        ok = any(key == name or key.endswith(f".{name}") or key.startswith(f"{name}.") for name in declared)
        message = f"{old} → {new}, {'declared' if ok else 'not declared'}"
        yield judged(f"hyperparameter {key}", ok, message, _DECLARE)


def choices(params: Mapping[str, str]) -> dict[str, str]:
    """Parameters that somebody chose: without the machine, the data, the seed and what follows from the model."""
    found = {}
    for key, value in params.items():
        last = key.rpartition(".")[2]
        if (key.partition(".")[0] == "group" and last in _OF_THE_MODEL) or last in AUDITED["data fingerprint"]:
            continue
        if key.partition(".")[0] in _CHOICES or key == "precision.training":
            found[key] = value
    return found


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, str]]]:
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            yield key, (old.get(key, "none"), new.get(key, "none"))


def _relative(old: float, new: float) -> float:
    """(new − old) / |old|; infinite where it left zero."""
    if old == new:
        return 0.0
    return (new - old) / abs(old) if old else math.copysign(math.inf, new - old)


def _named(where: Where) -> str:
    metric, cohort = where
    return f"{metric} on {cohort}" if cohort else metric
