"""What a gate demands: ``[tool.gradwatch.policy]`` of a ``pyproject.toml``, or a YAML file with the same keys.

A key that is not known, or a value of the wrong kind, is refused with the
file, the key and what may stand there: a misspelt limit must not pass as none.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from gradwatch.catalog import FINDING
from gradwatch.sinks.mlflow.facts import AUDITED

#: A limit for every metric (``*``), for one (``accuracy``), or for one on a cohort (``accuracy/tenant-7``).
Limits = Mapping[str, float]

_TABLE: Final = "tool.gradwatch.policy"


class PolicyError(Exception):
    """The policy cannot be used: the message names the file, the key and what to write."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits; each is a line of the audit or of the gate.

    Relative limits are fractions of the champion's value. ``declared`` are
    hyperparameters (and ``weight_norm``) that may differ from the champion's.
    """

    #: Metadata that must be recorded, names of :data:`~gradwatch.sinks.mlflow.facts.AUDITED`.
    require: tuple[str, ...] = tuple(AUDITED)
    #: Codes of findings that may be open.
    allow_findings: tuple[str, ...] = ()
    #: Highest generalization gap, relative to training.
    max_gap: Limits = field(default_factory=lambda: {"*": 0.1})
    #: Highest relative loss of a score against the champion.
    max_score_drop: Limits = field(default_factory=lambda: {"*": 0.01})
    #: Highest rise of the expected calibration error ``ece``, absolute.
    max_calibration_rise: float = 0.02
    #: Highest share of clipped steps.
    max_clip_rate: float = 0.1
    #: Steps that may have been taken with a gradient or loss that was not finite.
    max_nonfinite_steps: float = 0.0
    #: Relative rises of what an inference costs.
    max_size_rise: float = 0.1
    max_latency_rise: float = 0.1
    max_cost_rise: float = 0.1
    #: Relative change of the global weight norm beyond which it must be declared.
    max_weight_norm_change: float = 0.25
    declared: tuple[str, ...] = ()
    #: Scores of which less is better, beside those whose names say so (loss, error, ece ...).
    lower_is_better: tuple[str, ...] = ()


def limit(limits: Limits, metric: str, cohort: str) -> float:
    """The limit for a metric on a cohort: the most exact that is named; infinity where none is."""
    return limits.get(f"{metric}/{cohort}", limits.get(metric, limits.get("*", math.inf)))


def find(path: Path | None, directory: Path | None = None) -> Policy:
    """The policy of ``path``; without one, of the ``pyproject.toml`` here, else the defaults.

    Raises ``PolicyError``.
    """
    if path is None:
        path = (directory or Path.cwd()) / "pyproject.toml"
        if not path.exists():
            return Policy()
    return parse(_table(path), str(path))


def _table(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path}: the policy cannot be read: {error}") from None
    if path.suffix == ".toml":
        try:
            document = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PolicyError(f"{path}: this is not TOML: {error}") from None
        found: Any = document
        for part in _TABLE.split("."):
            found = found.get(part, {}) if isinstance(found, dict) else {}
        return found
    import yaml  # type: ignore[import-untyped]  # comes with mlflow-skinny

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise PolicyError(f"{path}: this is not YAML: {' '.join(str(error).split())}") from None


def parse(table: Any, where: str) -> Policy:
    """A policy from its keys. Raises ``PolicyError``."""
    if not isinstance(table, dict):
        raise PolicyError(f"{where}: a policy is a table of keys, not {type(table).__name__}")
    known = {f.name: f for f in fields(Policy)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
            raise PolicyError(f"{where}: no key {key!r} in a policy; {hint}")
        place = f"{where}: {key}"
        if key in ("max_gap", "max_score_drop"):
            values[key] = _limits(value, place)
        elif key.startswith("max_"):
            values[key] = _number(value, place)
        else:
            values[key] = _names(value, place)
    _known(values.get("require", ()), AUDITED, f"{where}: require")
    _known(values.get("allow_findings", ()), FINDING, f"{where}: allow_findings")
    return Policy(**values)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
        raise PolicyError(f"{where} must be a number of at least 0, not {value!r}")
    return float(value)


def _limits(value: Any, where: str) -> dict[str, float]:
    if not isinstance(value, dict):
        return {"*": _number(value, where)}
    return {str(name): _number(number, f"{where}.{name}") for name, number in value.items()}


def _names(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise PolicyError(f"{where} must be a list of names, not {value!r}")
    return tuple(value)


def _known(names: tuple[str, ...], known: Mapping[str, Any], where: str) -> None:
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise PolicyError(f"{where} names {name!r}, which is not known; {hint}")
