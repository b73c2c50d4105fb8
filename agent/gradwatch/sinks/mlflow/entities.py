"""Facts as MLflow's entities: names, limits, units. Pure functions; nothing here knows a server."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from gradwatch.collect.model import Finding, RunEnd, RunFacts, Validation, Window

METRIC_PREFIX: Final = "gradwatch/"
PREFIX: Final = "gradwatch."
#: Longest key that every server takes.
MAX_KEY: Final = 250
#: Lengths of a parameter's value that servers take: since 2.8, since 1.28, before; tried in this order.
PARAM_LENGTHS: Final = (6000, 500, 250)
#: Longest value of a tag that we write; servers take 5,000.
MAX_TAG: Final = 1000
#: Parameters of a run; what is beyond stands in ``gradwatch/hyperparameters.json`` only.
MAX_PARAMS: Final = 1000
#: Ends a value that was cut.
CUT: Final = "… [cut; whole in gradwatch/hyperparameters.json]"

_BAD_CHARACTERS: Final = re.compile(r"[^\w.\- /]", re.ASCII)
_STATUS: Final = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED", "abrupt": "FAILED"}
#: SIGINT, SIGKILL, SIGTERM: somebody ended it.
_KILLS: Final = frozenset({2, 9, 15})

Metric = tuple[str, float, int, int]  # key, value, timestamp in ms, step


@dataclass(frozen=True, slots=True)
class Rows:
    """The metrics of one window or validation: all of one step and one time."""

    keys: tuple[str, ...]
    values: tuple[float, ...]
    #: Unix time of the row in milliseconds.
    timestamp: int
    step: int

    @property
    def size(self) -> int:
        """Bytes in memory, about; keys are shared between windows."""
        return 200 + 32 * len(self.values)

    def metrics(self) -> list[Metric]:
        return [(key, value, self.timestamp, self.step) for key, value in zip(self.keys, self.values, strict=True)]


def safe_key(text: str) -> str:
    """A key that every MLflow store takes: its characters, no path tricks, at most 250 long.

    A key that had to be cut ends with a digest of the whole, so that two of them stay two.
    """
    segments = _BAD_CHARACTERS.sub("_", text).split("/")
    key = "/".join("_" if segment.strip(". ") == "" else segment for segment in segments)
    return key if len(key) <= MAX_KEY else _with_digest(key, text)


def _free_key(text: str, taken: Mapping[str, Any]) -> str:
    """``safe_key``, and another one where that is taken by another name."""
    key = safe_key(text)
    return _with_digest(key, text) if key in taken else key


def _with_digest(key: str, text: str) -> str:
    return f"{key[: MAX_KEY - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# -- metrics


def window_rows(facts: RunFacts, window: Window) -> Rows:
    """A window: every value of the fold as it is, the clip rate, and what went wrong in it where something did.

    ``clip_rate`` = clipped / steps. ``nonfinite_steps``, ``skipped_steps``,
    ``replayed_steps`` and ``nonfinite_values`` are there where they are not 0.
    """
    values = dict(window.values)
    nonfinite_values = values.pop("nonfinite_values", 0.0)
    values["steps"] = float(window.steps)
    if window.steps and ("clip_threshold_last" in values or window.clipped):
        values["clip_rate"] = window.clipped / window.steps
    counts = {"nonfinite": window.nonfinite, "skipped": window.skipped, "replayed": window.replayed}
    values |= {f"{name}_steps": float(count) for name, count in counts.items() if count}
    several = len(facts.manifest.optimizers) > 1 and window.optimizer != "default"
    prefix = f"{METRIC_PREFIX}{window.optimizer.replace('/', '_')}/" if several else METRIC_PREFIX
    return _rows(prefix, values, nonfinite_values, window.end_time, window.last_step)


def validation_rows(validation: Validation) -> Rows:
    """``gradwatch/validation/<metric>[/<slice>]`` and ``gradwatch/generalization_gap/<metric>[/<slice>]``."""
    suffix = f"/{validation.slice.replace('/', '_')}" if validation.slice not in ("", "all") else ""
    values = {f"validation/{name}{suffix}": value for name, value in validation.metrics.items()}
    values |= {f"generalization_gap/{name}{suffix}": value for name, value in validation.gaps.items()}
    return _rows(METRIC_PREFIX, values, 0.0, validation.time, validation.step)


def _rows(prefix: str, values: Mapping[str, float], nonfinite: float, time: float, step: int) -> Rows:
    """Finite values as rows; the others are counted."""
    kept: dict[str, float] = {}
    for name, value in values.items():
        if math.isfinite(value):
            kept[_free_key(prefix + name, kept)] = float(value)
        else:
            nonfinite += 1
    if nonfinite and math.isfinite(nonfinite):
        kept[safe_key(prefix + "nonfinite_values")] = float(nonfinite)
    timestamp = round(time * 1000) if math.isfinite(time) else 0
    timestamp = min(max(timestamp, 0), 2**62)
    return Rows(_shared(tuple(kept)), tuple(kept.values()), timestamp, min(max(step, -(2**62)), 2**62))


_KEYS: dict[tuple[str, ...], tuple[str, ...]] = {}


def _shared(keys: tuple[str, ...]) -> tuple[str, ...]:
    """One tuple for all windows with the same keys."""
    if len(_KEYS) > 1000:
        _KEYS.clear()
    return _KEYS.setdefault(keys, keys)


# -- parameters


def parameters(hyperparameters: Mapping[str, Any]) -> dict[str, str]:
    """Hyperparameters as ``gradwatch.<name>`` → text, at most ``MAX_PARAMS``; two names never share a key."""
    result: dict[str, str] = {}
    for name, value in hyperparameters.items():
        if len(result) >= MAX_PARAMS:
            break
        result[_free_key(PREFIX + name, result)] = cut(str(value), PARAM_LENGTHS[0])
    return result


def cut(text: str, limit: int) -> str:
    """``text``, or its beginning with a mark that says so and where the whole is."""
    return text if len(text) <= limit else text[: limit - len(CUT)] + CUT


# -- tags


def identity_tags(facts: RunFacts) -> dict[str, str]:
    """What identifies a run and its attempt."""
    manifest = facts.manifest
    commit = facts.hyperparameters.get("git.commit") or facts.hyperparameters.get("commit")
    tags = {
        "run": facts.run,
        "run_name": facts.run_name,
        "attempt": facts.attempt,
        "world_size": manifest.world_size,
        "commit": commit,
        "model": facts.model,
        "tier": manifest.tier,
        "version": manifest.gradwatch,
    }
    return {PREFIX + name: tag_text(value) for name, value in tags.items() if value not in (None, "")}


def heartbeat_tags(state: str, step: int, time: float) -> dict[str, str]:
    """State, last step, and the heartbeat in Unix seconds."""
    return {
        PREFIX + "state": tag_text(state),
        PREFIX + "step": str(step),
        PREFIX + "heartbeat": str(int(time)) if math.isfinite(time) else "0",
    }


def finding_tag(finding: Finding) -> tuple[str, str]:
    """``gradwatch.finding.<code>`` → severity, step and message in one line."""
    state = "" if finding.active else "resolved: "
    text = f"{state}{finding.severity} at step {finding.step}: {finding.message}"
    return safe_key(f"{PREFIX}finding.{finding.code}"), tag_text(text)


def end_tags(end: RunEnd) -> dict[str, str]:
    """How the run ended, as far as known."""
    tags = {
        "state": end.state,
        "reason": end.reason,
        "step": end.last_step,
        "heartbeat": int(end.time) if math.isfinite(end.time) else 0,
        "exception": f"{end.type}: {end.message}".strip(": ") if end.type or end.message else None,
        "exit_code": end.exit_code,
        "signal": end.signal,
    }
    return {PREFIX + name: tag_text(value) for name, value in tags.items() if value is not None}


def tag_text(value: object) -> str:
    text = str(value)
    return text if len(text) <= MAX_TAG else text[: MAX_TAG - 1] + "…"


# -- status


def status_of(end: RunEnd) -> str:
    """MLflow's word for an end. An abrupt end is KILLED where a signal by which one kills is known, else FAILED."""
    if end.state == "abrupt" and end.signal in _KILLS:
        return "KILLED"
    return _STATUS.get(end.state, "FAILED")


def next_status(current: str, wanted: str, *, evidence: bool) -> str | None:
    """The status to set, or None to leave what stands.

    RUNNING becomes whatever is true. FINISHED becomes FAILED or KILLED on
    evidence. FAILED and KILLED never become FINISHED.
    """
    if current in ("RUNNING", "SCHEDULED"):
        return wanted
    if current == "FINISHED" and wanted != "FINISHED" and evidence:
        return wanted
    return None


def is_evidence(end: RunEnd) -> bool:
    """Whether an end speaks against a status FINISHED that somebody else has set.

    A failure and a kill do; an abrupt end only with an exit code or a signal,
    since the trainer may have ended its MLflow run and then left by ``os._exit``.
    """
    if end.state == "abrupt":
        return bool(end.exit_code) or end.signal is not None
    return end.state in ("failed", "killed")


def end_folders(end: RunEnd, attempt: int, rank: int) -> list[str]:
    """Where the artifacts of an end go; a bad end keeps its own place, which the next attempt does not overwrite."""
    if rank != 0:
        return [] if end.state == "finished" else [f"gradwatch/rank-{rank}"]
    return ["gradwatch"] if end.state == "finished" else ["gradwatch", f"gradwatch/attempt-{attempt}"]


def chunks(items: Iterable[Any], size: int) -> list[list[Any]]:
    """Consecutive lists of at most ``size``."""
    every = list(items)
    return [every[start : start + size] for start in range(0, len(every), size)]
