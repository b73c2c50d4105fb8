"""What a run recorded about its training, read back from MLflow: hyperparameters under plain names, scores, gaps.

The bridge shows it of every version, and the gates judge by it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gradwatch.journal.manifest import clean_text
from gradwatch.sinks.mlflow.entities import METRIC_PREFIX, PREFIX

#: What an inference costs: logged by the run as a score or parameter, or given as a tag of the version.
COSTS: Final = ("model_size_bytes", "latency_p95_seconds", "cost_per_inference")
#: A model's tag: the version that was current before.
PREVIOUS_TAG: Final = f"{PREFIX}previous_version"

#: Parts of recorded facts that describe the run, its machine or its shape, and are no choice of training.
_NO_HYPERPARAMETER: Final = ("model", "machine", "git", "device", "precision", "host", "script", "seed", "world_size")
_OF_A_GROUP: Final = frozenset({"tensors", "parameters", "biases", "norms", "name"})
_WORDS: Final = ("optimizer", "scheduler")
_OF_AN_OPTIMIZER: Final = frozenset({"decay", "linear", "class"})

MAX_LABEL: Final = 120


@dataclass(frozen=True, slots=True)
class Facts:
    """What a run recorded about its training: numbers and words under plain names, scores and gaps."""

    numbers: Mapping[str, float]
    words: Mapping[str, str]
    scores: Mapping[str, float]
    gaps: Mapping[str, float]
    #: What an audit misses.
    missing: tuple[str, ...]


def facts_of(run: Any) -> Facts:
    """The facts of an ``mlflow.entities.Run``."""
    params = {k.removeprefix(PREFIX): v for k, v in run.data.params.items() if k.startswith(PREFIX)}
    metrics = {k.removeprefix(METRIC_PREFIX): float(v) for k, v in run.data.metrics.items()}
    numbers, words = hyperparameters(params)
    datasets = bool(getattr(getattr(run, "inputs", None), "dataset_inputs", None))
    return Facts(
        numbers,
        words,
        _of_all_data(metrics, "validation/"),
        _of_all_data(metrics, "generalization_gap/"),
        missing_metadata(params, words | dict.fromkeys(numbers, ""), datasets),
    )


def _of_all_data(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    """Validation figures without those of a cohort, whose names have one more part."""
    named = {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
    return {clean_text(k, MAX_LABEL): v for k, v in named.items() if "/" not in k and math.isfinite(v)}


def hyperparameters(params: Mapping[str, str]) -> tuple[dict[str, float], dict[str, str]]:
    """Recorded parameters as numbers and words under plain names.

    ``group.<optimizer>.<i>.<name>`` becomes ``<name>`` with the value of the
    group that holds most parameters; ``optimizer.<o>.<name>`` and
    ``config.<name>`` lose their first parts, where the plain name is not taken.
    The words ``optimizer`` and ``scheduler`` are the classes.
    """
    found: dict[str, str] = {}
    for name, value in _groups_by_size(params):
        found.setdefault(name, value)
    if "max_norm" in params:
        found["max_norm"] = params["max_norm"]
    for key, value in sorted(params.items()):
        first, _, rest = key.partition(".")
        plain = {"optimizer": rest.partition(".")[2], "config": rest}.get(first, key)
        if first in _NO_HYPERPARAMETER or first in ("group", "max_norm") or plain in _OF_AN_OPTIMIZER or not plain:
            continue
        found.setdefault(plain, value)
    for key in [key for key in found if key.endswith(".batch_size")]:
        found.setdefault("batch_size", found[key])
    numbers = {clean_text(k, MAX_LABEL): n for k, v in found.items() if (n := number(v)) is not None}
    words = _classes(params)
    words |= {k: v for k in _WORDS if k not in words and (v := found.get(k)) and number(v) is None}
    return numbers, {k: clean_text(v, MAX_LABEL) for k, v in words.items()}


def _classes(params: Mapping[str, str]) -> dict[str, str]:
    """Classes of optimizers and schedulers, each once."""
    found: dict[str, dict[str, None]] = {}
    for key, value in sorted(params.items()):
        first = key.partition(".")[0]
        if first in _WORDS and key.endswith(".class"):
            found.setdefault(first, {})[value] = None
    return {first: ",".join(classes) for first, classes in found.items()}


def _groups_by_size(params: Mapping[str, str]) -> list[tuple[str, str]]:
    """Settings of parameter groups, those of the largest group first."""
    sizes: dict[str, float] = {}
    settings: list[tuple[str, str, str]] = []
    for key, value in params.items():
        parts = key.split(".", 3)
        if parts[0] != "group" or len(parts) < 4:
            continue
        group, name = f"{parts[1]}.{parts[2]}", parts[3]
        if name == "parameters":
            sizes[group] = number(value) or 0.0
        elif name not in _OF_A_GROUP:
            settings.append((group, name, value))
    settings.sort(key=lambda setting: (-sizes.get(setting[0], 0.0), setting[0]))
    return [(name, value) for _, name, value in settings]


def number(text: str | None) -> float | None:
    """A finite number, or None; a truth value is none."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


# -- completeness

#: What an audit asks a version for, and the names under which it may stand, also at the end of a longer name.


AUDITED: Final[Mapping[str, tuple[str, ...]]] = {
    "weight decay": ("weight_decay",),
    "learning rate": ("lr", "learning_rate"),
    "optimizer": ("optimizer",),
    "schedule": ("scheduler", "schedule", "lr_schedule"),
    "batch size": ("batch_size", "train_batch_size", "per_device_train_batch_size"),
    "accumulation": (
        "accumulation", "accumulation_steps", "gradient_accumulation", "gradient_accumulation_steps",
        "accumulate_grad_batches",
    ),
    "clip threshold": ("max_norm", "max_grad_norm", "gradient_clip_val"),
    "precision": ("precision.training", "precision"),
    "seed": ("seed",),
    "commit": ("git.commit", "commit"),
    "data fingerprint": ("data_fingerprint", "dataset_fingerprint", "dataset_digest"),
}  # fmt: skip


def missing_metadata(params: Mapping[str, str], plain: Mapping[str, str], datasets: bool) -> tuple[str, ...]:
    """Names of :data:`AUDITED` that stand nowhere; a dataset logged as MLflow's input is a data fingerprint."""
    there = {key for key, value in params.items() if value not in ("", "None", "null")} | set(plain)
    ends = {".".join(parts[start:]) for key in there if (parts := key.split(".")) for start in range(len(parts))}
    missing = [what for what, names in AUDITED.items() if ends.isdisjoint(names)]
    return tuple(what for what in missing if not (what == "data fingerprint" and datasets))
