"""What waits for MLflow, of one run: bounded in memory, mirrored on disk.

The mirror lies in the agent's state directory and is written before the call
that handed the fact over returns, so that an agent that is killed delivers the
rest when it is started again. Nothing here takes a lock or knows MLflow; the
sink's lock guards an outbox.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from gradwatch.sinks.mlflow.entities import Metric, Rows
from gradwatch.sinks.mlflow.tables import LayerHistory

#: A mirror of rows larger than this is written anew with what still waits.
MAX_MIRROR: Final = 32 * 2**20
_MAX_STATE: Final = 8 * 2**20


@dataclass(slots=True)
class PendingEnd:
    """An end that is not told yet."""

    attempt: int
    #: MLflow's status, the time, and whether it speaks against FINISHED.
    status: str
    time: float
    evidence: bool
    tags: dict[str, str]
    #: Monotonic time at which all else was delivered, and how often the status was looked at since.
    since: float | None = None
    looks: int = 0


@dataclass(slots=True)
class Target:
    """Which MLflow run this is; kept on disk."""

    run: str
    model: str
    run_name: str = ""
    attempt: int = 0
    rank: int = 0
    start_time: float = 0.0
    #: The run that the trainer named, and whether it was active there (then the trainer ends it).
    hint: str | None = None
    owned: bool = False
    #: The run that is used, and whether this sink created it.
    run_id: str | None = None
    created: bool = False
    #: It was deleted in MLflow: nothing is sent any more.
    gone: bool = False
    #: The last attempt whose end was told; -1 for none.
    told: int = -1


@dataclass(slots=True)
class Outbox:
    """Everything that waits for one run's MLflow run."""

    directory: Path
    target: Target
    #: Parameters as last given, and those still to send.
    given: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    rows: deque[Rows] = field(default_factory=deque)
    #: Bytes of ``rows``, which may be thinned.
    size: int = 0
    #: Metrics under way: parts still to be tried, and how many rows they stand for.
    parts: list[list[Metric]] = field(default_factory=list)
    under_way: list[Rows] = field(default_factory=list)
    #: Keys that the server refused, and how often.
    refused: dict[str, int] = field(default_factory=dict)
    end: PendingEnd | None = None
    #: Artifacts to upload: path -> monotonic time from which on.
    artifacts: dict[str, float] = field(default_factory=dict)
    artifact_failures: int = 0
    #: The artifact under way.
    uploading: str | None = None
    #: Why the mirror could not be written, for whoever says it.
    disk_error: str = ""
    #: Monotonic time at which the end was told; artifacts are given up some time later.
    told_at: float | None = None
    #: What ``findings.json`` and ``layers.json`` hold; read from the mirror when first needed.
    findings: list[dict[str, Any]] | None = None
    layers: LayerHistory | None = None
    #: Monotonic time at which the layers were last written to the mirror, and whether there are new ones since.
    layers_written: float = -math.inf
    layers_changed: bool = False
    #: Whether the MLflow run was looked up since the target was last changed.
    resolved: bool = False
    failures: int = 0
    due: float = 0.0

    def to_track(self) -> bool:
        """Whether anything but artifacts waits."""
        return bool(self.params or self.tags or self.rows or self.under_way or self.end or not self.resolved)

    def waiting(self) -> int:
        """Items not yet delivered."""
        ones = bool(self.params) + bool(self.tags) + (self.end is not None) + (self.uploading is not None)
        return len(self.rows) + len(self.under_way) + len(self.artifacts) + ones

    def take(self, metrics: int) -> None:
        """Take the next rows of at most so many metrics (but at least one row) under way."""
        while self.rows and (not self.under_way or metrics >= len(self.rows[0].keys)):
            rows = self.rows.popleft()
            self.size -= rows.size
            metrics -= len(rows.keys)
            self.under_way.append(rows)

    def arrived(self) -> None:
        """What was under way is there."""
        self.under_way.clear()
        if not self.rows:
            self.mirror_rows()

    def thin(self) -> int:
        """Drop every second of the older half of the rows; how many fell out.

        The first stays, so that what is left reaches back as far, the thinner the older.
        """
        before = list(self.rows)
        middle = (len(before) + 1) // 2
        self.rows = deque(before[:middle:2] + before[middle:] if middle > 1 else before[1:])
        self.size = sum(rows.size for rows in self.rows)
        self.mirror_rows()
        return len(before) - len(self.rows)

    def clear(self) -> int:
        """Let go of all that waits; how many items that was."""
        count = self.waiting()
        for part in (self.params, self.tags, self.rows, self.parts, self.under_way, self.artifacts):
            part.clear()
        self.end, self.size = None, 0
        self.mirror_rows()
        return count

    # -- the mirror

    def make_directory(self) -> None:
        with self._on_disk():
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def append(self, rows: Rows) -> None:
        self.rows.append(rows)
        self.size += rows.size
        large = False
        with self._on_disk(), open(self.directory / "rows.jsonl", "a", encoding="utf-8", opener=_private) as file:
            file.write(_line(rows))
            large = file.tell() > MAX_MIRROR
        if large:
            self.mirror_rows()

    def mirror_rows(self) -> None:
        """Write what waits anew; called when the mirror holds what does not wait any more."""
        path = self.directory / "rows.jsonl"
        with self._on_disk():
            if self.rows or self.under_way:
                replace_file(path, "".join(map(_line, (*self.under_way, *self.rows))))
            else:
                path.unlink(missing_ok=True)

    def save(self) -> None:
        """Mirror all but rows and artifacts."""
        end = None if self.end is None else {**asdict(self.end), "since": None, "looks": 0}
        state = {"target": asdict(self.target), "params": self.given, "tags": self.tags, "end": end}
        with self._on_disk():
            replace_file(self.directory / "run.json", json.dumps(state))

    @contextmanager
    def _on_disk(self) -> Iterator[None]:
        """A full or read-only disk costs the mirror, not the delivery."""
        try:
            yield
        except OSError as error:
            self.disk_error = f"{type(error).__name__}: {error.strerror}"

    def write_artifact(self, path: str, text: str) -> None:
        file = self.artifact_file(path)
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(file, text)

    def read_artifact(self, path: str) -> str:
        """What the mirror holds of an artifact; "" for nothing."""
        try:
            return self.artifact_file(path).read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""

    def artifact_file(self, path: str) -> Path:
        return self.directory / "artifacts" / path


def directory_of(state: Path, run: str) -> Path:
    """A run's directory below ``state``: its name made safe, and a digest that keeps two runs apart."""
    name = re.sub(r"[^\w\-]", "_", run, flags=re.ASCII)[:60]
    return state / f"{name}-{hashlib.sha256(run.encode('utf-8', 'replace')).hexdigest()[:12]}"


def load(directory: Path, limit: int) -> Outbox | None:
    """An outbox from its mirror with rows of at most ``limit`` bytes, or None where there is none that can be read."""
    try:
        state = _read_json(directory / "run.json")
        target = Target(**state["target"])
        if not isinstance(target.run, str) or directory.name != directory_of(directory.parent, target.run).name:
            return None
        box = Outbox(directory, target, given=dict(state["params"]), params=dict(state["params"]))
        box.tags = dict(state["tags"])
        box.end = PendingEnd(**state["end"]) if state["end"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if target.gone:
        box.params, box.tags, box.end = {}, {}, None
        return box
    for rows in _read_rows(directory / "rows.jsonl"):
        box.rows.append(rows)
        box.size += rows.size
        while box.size > limit and box.rows:
            box.size -= box.rows.popleft().size
    folder = directory / "artifacts"
    if target.told < target.attempt or box.end is not None:
        box.artifacts = {str(file.relative_to(folder)): 0.0 for file in folder.rglob("*.json") if file.is_file()}
    return box


def replace_file(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", opener=_private) as file:
        file.write(text)
    temporary.replace(path)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _read_json(path: Path) -> Any:
    if path.stat().st_size > _MAX_STATE:
        raise ValueError(f"{path}: too large")
    return json.loads(path.read_text(encoding="utf-8"))


def _line(rows: Rows) -> str:
    return json.dumps([rows.timestamp, rows.step, rows.keys, rows.values]) + "\n"


def _read_rows(path: Path) -> Iterator[Rows]:
    """Whole lines; a torn last one was not handed over."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            yield from _parse_rows(file)
    except OSError:
        return


def _parse_rows(lines: Iterable[str]) -> Iterator[Rows]:
    for line in lines:
        try:
            timestamp, step, keys, values = json.loads(line)
            if len(keys) == len(values):
                yield Rows(tuple(map(str, keys)), tuple(map(float, values)), int(timestamp), int(step))
        except (ValueError, TypeError, OverflowError):
            continue
