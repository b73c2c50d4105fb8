"""Artifact tables, as ``mlflow.load_table`` and the MLflow page read them: JSON with ``columns`` and ``data``.

NaN, which means "not known", is null; infinities, which JSON has no number for,
are the texts ``"inf"`` and ``"-inf"``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from gradwatch.collect.model import Finding, LayerTable

LAYER_COLUMNS: Final = ("step", "attempt", "time", "layer", "grad_norm", "weight_norm", "update_ratio")
#: Rows of ``gradwatch/layers.json``: about 2 MB.
MAX_LAYER_ROWS: Final = 20_000


def cell(value: Any) -> Any:
    """A value as a cell of a table."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)[:1000]
    if math.isnan(number):
        return None
    return number if math.isfinite(number) else str(number)


def table(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns of equal length (the shortest counts) as a table."""
    rows = zip(*columns.values(), strict=False)
    return _dump(list(columns), [[cell(value) for value in row] for row in rows])


def plain(value: Any) -> Any:
    """Any value as JSON takes it, non-finite numbers as in a table."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return cell(value)


def document(value: Any) -> str:
    """A JSON document for people to read."""
    return json.dumps(plain(value), indent=2, allow_nan=False)


class LayerHistory:
    """Samples of the layers: the newest always, older ones thinned where there are too many rows.

    Thinning drops every second sample but the first and the newest, so that
    what stays covers the whole run evenly.
    """

    def __init__(self, max_rows: int = MAX_LAYER_ROWS) -> None:
        self._max_rows = max_rows
        self._samples: list[list[list[Any]]] = []

    def add(self, sample: LayerTable) -> None:
        """Add a sample; one of the same attempt and step is replaced."""
        head = [sample.step, sample.attempt, cell(sample.time)]
        columns = (sample.names, sample.grad_norm, sample.weight_norm, sample.update_ratio)
        rows = [[*head, *map(cell, row)] for row in zip(*columns, strict=False)][: self._max_rows]
        if not rows:
            return
        self._samples = [old for old in self._samples if old[0][:2] != head[:2]]
        self._samples.append(rows)
        self._thin()

    def _thin(self) -> None:
        while len(self._samples) > 1 and sum(map(len, self._samples)) > self._max_rows:
            newest = self._samples.pop()
            self._samples = self._samples[::2] if len(self._samples) > 1 else []
            self._samples.append(newest)

    def render(self) -> str:
        return _dump(list(LAYER_COLUMNS), [row for sample in self._samples for row in sample])

    @classmethod
    def parse(cls, text: str, max_rows: int = MAX_LAYER_ROWS) -> LayerHistory:
        """What ``render`` gave; empty where it is something else."""
        history = cls(max_rows)
        try:
            found = json.loads(text)
            rows = found["data"] if tuple(found["columns"]) == LAYER_COLUMNS else []
            for row in rows[:max_rows]:
                if history._samples and history._samples[-1][0][:2] == row[:2]:
                    history._samples[-1].append(row)
                else:
                    history._samples.append([row])
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            return cls(max_rows)
        return history


# -- findings


def add_finding(findings: list[dict[str, Any]], finding: Finding, limit: int) -> None:
    """Add a finding, or replace what was said of it before; beyond ``limit`` the oldest of the newer half goes."""
    entry = plain(asdict(finding))
    same = ("code", "attempt", "rank", "step")
    for index, old in enumerate(findings):
        if all(old.get(name) == entry[name] for name in same):
            findings[index] = entry
            return
    findings.append(entry)
    if len(findings) > limit:
        del findings[limit // 2]


def parse_findings(text: str) -> list[dict[str, Any]]:
    """What ``document`` gave for findings; empty where it is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _dump(columns: list[str], data: list[list[Any]]) -> str:
    return json.dumps({"columns": columns, "data": data}, separators=(",", ":"), allow_nan=False)
