"""The manifest: what a run is, written once by the trainer, trusted by nobody.

The writer fills a :class:`Manifest` and stores it as JSON; the reader gets one
back from :func:`parse`, in which every field has its type and a bounded size
whatever the file held.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from gradwatch.journal.errors import JournalError
from gradwatch.journal.ring import MAX_COLUMNS as MAX_WIDTH

FORMAT: Final = 1
MAX_BYTES: Final = 16 * 2**20
#: Commas and opening brackets of a manifest: what they bound is the memory that parsing takes.
MAX_COMMAS: Final = 1_500_000
MAX_CONTAINERS: Final = 500_000
MAX_TENSORS: Final = 65_536
MAX_COLUMNS: Final = 4_096
MAX_ENTRIES: Final = 2_000
MAX_TEXT: Final = 1_000
MAX_DEPTH: Final = 12
MAX_NODES: Final = 100_000
MAX_RANKS: Final = 1_000_000
MAX_BUCKETS: Final = 256

Scalar = float | int | str | bool | None


@dataclass(frozen=True, slots=True)
class Tensor:
    """One parameter tensor whose norms are recorded, in the order of the rings' columns."""

    name: str
    shape: tuple[int, ...] = ()
    dtype: str = ""
    numel: int = 0
    optimizer: int = 0
    group: int = 0
    layer: str = ""
    kind: str = "weight"
    #: None for a plain (replicated) tensor, else the mesh and placements of a sharded one.
    placement: Any = None


@dataclass(frozen=True, slots=True)
class Optimizer:
    """An optimizer of the run: its name (the label ``optimizer``), class and groups."""

    name: str
    class_name: str = ""
    #: Whether its step is linear in the gradient (SGD family): only then an effective rate means something.
    linear: bool = False
    groups: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """A run of columns in a row of ``samples.ring``."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """See the table in ``docs/journal.md``."""

    run: str
    model: str
    run_name: str = ""
    tier: str = "experiment"
    attempt: int = 0
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    host: str = ""
    boot_id: str = ""
    pid: int = 0
    start_time: float = 0.0
    parent: str = ""
    gradwatch: str = ""
    optimizers: tuple[Optimizer, ...] = ()
    tensors: tuple[Tensor, ...] = ()
    host_columns: tuple[str, ...] = ()
    device_columns: tuple[str, ...] = ()
    sections: tuple[Section, ...] = ()
    buckets: int = 0
    budgets: Mapping[str, Any] = field(default_factory=dict)
    max_norm: float | None = None
    hyperparameters: Mapping[str, Scalar] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    mlflow: Mapping[str, str | None] = field(default_factory=dict)
    unchecked: tuple[Mapping[str, str], ...] = ()
    #: Collectives that the rank had joined when it was watched: rows of ranks whose counts differ do not line up.
    collectives: int = 0

    def to_json(self) -> bytes:
        """The manifest as a file's content. ``config`` and ``hyperparameters`` must be JSON-safe."""
        document = {f.name: getattr(self, f.name) for f in fields(self)}
        document["format"] = FORMAT
        document["steps"] = {"host": document.pop("host_columns"), "device": document.pop("device_columns")}
        sections = [asdict(section) for section in document.pop("sections")]
        document["samples"] = {"sections": sections, "buckets": document.pop("buckets")}
        document["tensors"] = [_without_defaults(tensor) for tensor in self.tensors]
        document["optimizers"] = [
            {"name": o.name, "class": o.class_name, "linear": o.linear, "groups": o.groups} for o in self.optimizers
        ]
        return json.dumps(document, ensure_ascii=True, separators=(",", ":"), default=_json_safe).encode()


def _json_safe(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else str(value)


def _without_defaults(tensor: Tensor) -> dict[str, Any]:
    """A tensor's entry; with tens of thousands of them, what goes without saying would be most of the file."""
    return {
        f.name: value for f in fields(tensor) if (value := getattr(tensor, f.name)) != f.default or f.name == "name"
    }


def parse(data: bytes, where: str) -> Manifest:
    """Read a manifest. Raises ``JournalError`` where it is none; bounds whatever it holds."""
    if len(data) > MAX_BYTES:
        raise JournalError(f"{where}: larger than {MAX_BYTES >> 20} MiB; not a manifest that gradwatch wrote")
    if data.count(b",") > MAX_COMMAS or data.count(b"[") + data.count(b"{") > MAX_CONTAINERS:
        raise JournalError(
            f"{where}: more entries than {MAX_TENSORS} tensors have; not a manifest that gradwatch wrote"
        )
    try:
        document = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise JournalError(f"{where}: not valid JSON ({type(error).__name__}); delete the attempt") from None
    if not isinstance(document, dict):
        raise JournalError(f"{where}: not a JSON object; delete the attempt")
    version = document.get("format")
    if version != FORMAT:
        raise JournalError(
            f"{where}: journal format {str(version)[:40]}, this gradwatch reads format {FORMAT}; "
            "use an agent of the trainer's version"
        )
    get = _Getter(document)
    steps, samples = _Getter(get.mapping("steps")), _Getter(get.mapping("samples"))
    optimizers = tuple(_optimizer(item) for item in get.items("optimizers", 256))
    manifest = Manifest(
        run=get.text("run"),
        model=get.text("model") or "unnamed",
        run_name=get.text("run_name"),
        tier=get.text("tier") or "experiment",
        attempt=get.count("attempt", MAX_RANKS),
        rank=get.count("rank", MAX_RANKS),
        local_rank=get.count("local_rank", MAX_RANKS),
        world_size=max(1, get.count("world_size", MAX_RANKS)),
        host=get.text("host"),
        boot_id=get.text("boot_id"),
        pid=get.count("pid", 2**31),
        start_time=get.number("start_time") or 0.0,
        parent=get.text("parent"),
        gradwatch=get.text("gradwatch"),
        optimizers=optimizers,
        tensors=tuple(_tensor(item, optimizers) for item in get.items("tensors", MAX_TENSORS + 1)),
        host_columns=tuple(clean_text(name) for name in steps.sequence("host", MAX_COLUMNS + 1)),
        device_columns=tuple(clean_text(name) for name in steps.sequence("device", MAX_COLUMNS + 1)),
        sections=tuple(_section(item) for item in samples.items("sections", 64)),
        buckets=samples.count("buckets", MAX_BUCKETS),
        budgets=plain(get.mapping("budgets"), MAX_ENTRIES),
        max_norm=get.number("max_norm"),
        hyperparameters=scalars(get.mapping("hyperparameters")),
        config=plain(get.mapping("config")),
        mlflow={
            clean_text(key, 200): (clean_text(value) if isinstance(value, str) else None)
            for key, value in list(get.mapping("mlflow").items())[:16]
        },
        unchecked=tuple(
            {clean_text(k, 200): clean_text(v) for k, v in list(item.items())[:8]}
            for item in get.items("unchecked", 256)
        ),
        collectives=get.count("collectives", 2**53),
    )
    if len(manifest.tensors) > MAX_TENSORS:
        raise JournalError(f"{where}: more than {MAX_TENSORS} tensors")
    if len(manifest.host_columns) + len(manifest.device_columns) > MAX_COLUMNS:
        raise JournalError(f"{where}: more than {MAX_COLUMNS} columns")
    return manifest


def clean_text(value: object, limit: int = MAX_TEXT) -> str:
    """Any value as text that is safe to keep: bounded, valid Unicode, on one line, without control characters.

    It is not escaped: who puts it into HTML, a label or a log escapes it there.
    """
    text = (value if isinstance(value, str) else _as_text(value))[:limit]
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c in "\t\n\r" else "\ufffd" for c in text)


def _as_text(value: object) -> str:
    try:
        return str(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        return "?"


def plain(value: Any, limit: int = MAX_NODES) -> Any:
    """A JSON value without surprises: texts cleaned, numbers of 64 bits, bounded in depth and in ``limit`` values.

    What is beyond the bounds is left out. NaN and infinity stay: whether they
    mean something is for who reads the value to say.
    """
    left = limit

    def copy(value: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if value is None or isinstance(value, bool | int | float):
            return _number(value)
        if depth < MAX_DEPTH and isinstance(value, dict):
            return {clean_text(k, 200): copy(v, depth + 1) for k, v in value.items() if left > 0}
        if depth < MAX_DEPTH and isinstance(value, list):
            return [copy(v, depth + 1) for v in value if left > 0]
        return "(too deep)" if isinstance(value, dict | list) else clean_text(value)

    return copy(value, 0)


def _number(value: Any) -> Any:
    """A number or None as it is; an integer beyond 64 bits as the nearest float."""
    if isinstance(value, int) and abs(value) >= 2**63:
        return float(value) if abs(value) < 2**1023 else (math.inf if value > 0 else -math.inf)
    return value


def scalars(mapping: Mapping[Any, Any]) -> dict[str, Scalar]:
    """The scalar entries of a flat mapping, names and texts cleaned, at most ``MAX_ENTRIES``."""
    kept: dict[str, Scalar] = {}
    for key, value in list(mapping.items())[:MAX_ENTRIES]:
        if isinstance(value, str):
            kept[clean_text(key, 200)] = clean_text(value)
        elif value is None or isinstance(value, bool | float | int):
            kept[clean_text(key, 200)] = _number(value)
    return kept


class _Getter:
    """Typed access to an untrusted JSON object: what has the wrong type counts as absent."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def text(self, key: str) -> str:
        value = self._document.get(key)
        return clean_text(value) if isinstance(value, str) else ""

    def count(self, key: str, limit: int) -> int:
        """An integer from 0 to ``limit``; anything else counts as 0."""
        value = self._document.get(key)
        return value if type(value) is int and 0 <= value <= limit else 0

    def number(self, key: str) -> float | None:
        value = self._document.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        try:
            number = float(value)
        except OverflowError:
            return None
        return number if math.isfinite(number) else None

    def mapping(self, key: str) -> dict[str, Any]:
        value = self._document.get(key)
        return value if isinstance(value, dict) else {}

    def sequence(self, key: str, limit: int) -> list[Any]:
        value = self._document.get(key)
        return value[:limit] if isinstance(value, list) else []

    def items(self, key: str, limit: int) -> list[dict[str, Any]]:
        return [item if isinstance(item, dict) else {} for item in self.sequence(key, limit)]


def _optimizer(item: dict[str, Any]) -> Optimizer:
    get = _Getter(item)
    return Optimizer(
        get.text("name") or "default",
        get.text("class"),
        item.get("linear") is True,
        tuple(plain(group, 200) for group in get.items("groups", 1024)),
    )


def _tensor(item: dict[str, Any], optimizers: Sequence[Optimizer]) -> Tensor:
    get = _Getter(item)
    optimizer = get.count("optimizer", max(0, len(optimizers) - 1))
    groups = len(optimizers[optimizer].groups) if optimizers else 0
    return Tensor(
        name=get.text("name"),
        shape=tuple(size for size in get.sequence("shape", 32) if type(size) is int and 0 <= size < 2**63),
        dtype=get.text("dtype"),
        numel=get.count("numel", 2**62),
        optimizer=optimizer,
        group=get.count("group", max(0, groups - 1)),
        layer=get.text("layer"),
        kind=get.text("kind") or "weight",
        placement=plain(item.get("placement"), 200),
    )


def _section(item: dict[str, Any]) -> Section:
    get = _Getter(item)
    return Section(get.text("name"), get.count("offset", MAX_WIDTH), get.count("size", MAX_WIDTH))
