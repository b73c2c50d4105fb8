"""What can be said before the first step: decay, groups, and what reproduction needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from gradwatch.catalog import Severity
from gradwatch.probe.contract.report import Report
from gradwatch.probe.tensors import TensorRow

#: Where Σ lr·λ over a run stays below this, decay shrinks a weight by less than one per cent.
NEGLIGIBLE: Final = 0.01
#: Steps assumed for Σ lr·λ where nobody knows how long a run will be.
ASSUMED_STEPS: Final = 10_000
_BATCH_KEYS: Final = ("batch_size", "batchsize", "bs", "batch", "train_batch_size", "per_device_train_batch_size",
                      "micro_batch_size", "global_batch_size", "tokens_per_batch")  # fmt: skip


def check_decay(report: Report, optimizers: Sequence[Mapping[str, Any]], table: Sequence[TensorRow]) -> None:
    """``decay-on-bias-or-norm`` and ``decay-coupled``, from the parameter groups alone."""
    for index, optimizer in enumerate(optimizers):
        rate = 0.0
        names: list[str] = []
        for number, group in enumerate(optimizer["groups"]):
            decay, lr = _number(group.get("weight_decay")), _number(group.get("lr"))
            if not decay:
                continue
            rate = max(rate, lr * decay)
            held = [r.tensor for r in table if (r.tensor.optimizer, r.tensor.group) == (index, number)]
            names += [t.name for t in held if t.kind in ("bias", "norm")]
        total = rate * ASSUMED_STEPS
        if names:
            severity: Severity = "info" if total < NEGLIGIBLE else "ticket"
            report.violation(
                "decay-on-bias-or-norm",
                0,
                f"weight decay falls on {len(names)} biases or normalisation scales, such as {names[0]}",
                {
                    "tensors": names[:20],
                    "count_tensors": len(names),
                    "optimizer": optimizer["name"],
                    "sum_lr_decay": total,
                    "assumed_steps": ASSUMED_STEPS,
                },
                severity=severity,
            )
        if rate and optimizer["decay"] == "coupled" and not optimizer["linear"]:
            report.violation(
                "decay-coupled",
                0,
                f"{optimizer['class']} adds its weight decay to the gradient, where adaptive scaling divides it away",
                {"optimizer": optimizer["name"], "class": optimizer["class"], "sum_lr_decay": total},
            )


def check_coverage(report: Report, unheld: Sequence[str]) -> None:
    """``parameters-not-optimized``: trainable parameters that no optimizer holds."""
    if unheld:
        report.violation(
            "parameters-not-optimized",
            0,
            f"{len(unheld)} trainable tensors are in no optimizer, such as {unheld[0]}",
            {"tensors": list(unheld[:20]), "count_tensors": len(unheld)},
        )


def missing_hyperparameters(
    config: Mapping[str, Any], optimizers: Sequence[Mapping[str, Any]], samples_logged: bool, clip_known: bool
) -> list[str]:
    """What reproduction needs and nobody said: batch size, decay, clip threshold."""
    missing = []
    if not samples_logged and not _has_key(config, _BATCH_KEYS):
        missing.append("batch_size")
    if any(o["decay"] == "unknown" for o in optimizers):
        missing.append("weight_decay")
    if not clip_known:
        missing.append("clip_threshold")
    return missing


def _has_key(config: Mapping[str, Any], keys: Sequence[str]) -> bool:
    for key, value in config.items():
        if str(key).lower().replace("-", "_") in keys:
            return True
        if isinstance(value, Mapping) and _has_key(value, keys):
            return True
    return False


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0
