"""The manifest: what a run is, written once by the trainer, trusted by nobody.

The writer fills a :class:`Manifest` and stores it as JSON; the reader gets one
back from :func:`parse`, in which every field has its type and a bounded size
whatever the file held.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from gradwatch.journal.errors import JournalError

FORMAT: Final = 1
MAX_BYTES: Final = 8 * 2**20
MAX_TENSORS: Final = 65_536
MAX_COLUMNS: Final = 4_096
MAX_ENTRIES: Final = 2_000
MAX_TEXT: Final = 1_000

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

    def to_json(self) -> bytes:
        """The manifest as a file's content. ``config`` and ``hyperparameters`` must be JSON-safe."""
        document = asdict(self)
        document["format"] = FORMAT
        document["steps"] = {"host": document.pop("host_columns"), "device": document.pop("device_columns")}
        document["samples"] = {"sections": document.pop("sections"), "buckets": document.pop("buckets")}
        for optimizer in document["optimizers"]:
            optimizer["class"] = optimizer.pop("class_name")
        return json.dumps(document, ensure_ascii=True, separators=(",", ":"), default=str).encode()


def parse(data: bytes, where: str) -> Manifest:
    """Read a manifest. Raises ``JournalError`` where it is none; bounds whatever it holds."""
    if len(data) > MAX_BYTES:
        raise JournalError(f"{where}: larger than {MAX_BYTES >> 20} MiB; not a manifest that gradwatch wrote")
    try:
        document = json.loads(data)
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
    manifest = Manifest(
        run=get.text("run"),
        model=get.text("model") or "unnamed",
        run_name=get.text("run_name"),
        tier=get.text("tier") or "experiment",
        attempt=get.integer("attempt"),
        rank=get.integer("rank"),
        local_rank=get.integer("local_rank"),
        world_size=max(1, get.integer("world_size")),
        host=get.text("host"),
        boot_id=get.text("boot_id"),
        pid=get.integer("pid"),
        start_time=get.number("start_time") or 0.0,
        parent=get.text("parent"),
        gradwatch=get.text("gradwatch"),
        optimizers=tuple(_optimizer(item) for item in get.items("optimizers", 256)),
        tensors=tuple(_tensor(item) for item in get.items("tensors", MAX_TENSORS + 1)),
        host_columns=tuple(clean_text(name) for name in steps.sequence("host", MAX_COLUMNS + 1)),
        device_columns=tuple(clean_text(name) for name in steps.sequence("device", MAX_COLUMNS + 1)),
        sections=tuple(_section(item) for item in samples.items("sections", 64)),
        buckets=samples.integer("buckets"),
        budgets=get.mapping("budgets"),
        max_norm=get.number("max_norm"),
        hyperparameters=scalars(get.mapping("hyperparameters")),
        config=get.mapping("config"),
        mlflow={
            key: (clean_text(value) if isinstance(value, str) else None)
            for key, value in list(get.mapping("mlflow").items())[:16]
        },
        unchecked=tuple(
            {clean_text(k): clean_text(v) for k, v in list(item.items())[:8]}
            for item in get.items("unchecked", 256)
        ),
    )
    if len(manifest.tensors) > MAX_TENSORS:
        raise JournalError(f"{where}: more than {MAX_TENSORS} tensors")
    if len(manifest.host_columns) + len(manifest.device_columns) > MAX_COLUMNS:
        raise JournalError(f"{where}: more than {MAX_COLUMNS} columns")
    return manifest


def clean_text(value: object, limit: int = MAX_TEXT) -> str:
    """Any value as text that is safe to keep: bounded, valid Unicode, without control characters."""
    text = value if isinstance(value, str) else str(value)
    text = text[:limit].encode("utf-8", "replace").decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def scalars(mapping: Mapping[Any, Any]) -> dict[str, Scalar]:
    """The scalar entries of a flat mapping, names and texts cleaned, at most ``MAX_ENTRIES``."""
    kept: dict[str, Scalar] = {}
    for key, value in list(mapping.items())[:MAX_ENTRIES]:
        if isinstance(value, str):
            kept[clean_text(key, 200)] = clean_text(value)
        elif value is None or isinstance(value, bool | float):
            kept[clean_text(key, 200)] = value
        elif isinstance(value, int):
            kept[clean_text(key, 200)] = (
                value if abs(value) < 2**63 else clean_text(float(min(value, 2**1023)))
            )
    return kept


class _Getter:
    """Typed access to an untrusted JSON object: what has the wrong type counts as absent."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._document = document

    def text(self, key: str) -> str:
        value = self._document.get(key)
        return clean_text(value) if isinstance(value, str) else ""

    def integer(self, key: str) -> int:
        value = self._document.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63:
            return value
        return 0

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
        tuple(get.items("groups", 1024)),
    )


def _tensor(item: dict[str, Any]) -> Tensor:
    get = _Getter(item)
    shape = tuple(size for size in get.sequence("shape", 32) if isinstance(size, int))
    return Tensor(
        name=get.text("name"),
        shape=shape,
        dtype=get.text("dtype"),
        numel=max(0, get.integer("numel")),
        optimizer=get.integer("optimizer"),
        group=get.integer("group"),
        layer=get.text("layer"),
        kind=get.text("kind") or "weight",
        placement=item.get("placement"),
    )


def _section(item: dict[str, Any]) -> Section:
    get = _Getter(item)
    return Section(get.text("name"), max(0, get.integer("offset")), max(0, get.integer("size")))
