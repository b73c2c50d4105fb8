"""What of a user's objects may be written down: plain JSON, bounded, and without secrets.

`jsonable` turns anything into plain JSON, `redact` takes the secrets out of it
by the names they stand under, and `clean` does both. None of them ever raises,
and none reads what a tensor holds: that would wait for its device.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import enum
import functools
import math
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any, Final
from uuid import UUID

import numpy as np
import torch

from gradwatch.probe.secrets import REDACTED, Likeness, is_special_token, likeness, looks_random, scrub

__all__ = ["REDACTED", "clean", "jsonable", "redact"]

MAX_DEPTH: Final = 8
MAX_ITEMS: Final = 500
MAX_NODES: Final = 5_000
MAX_TEXT: Final = 2_000

#: Plain JSON: None, bool, int, finite float, str, list, dict with str keys.
Json = Any


def clean(value: object, key: str = "") -> Json:
    """``value`` as plain JSON without secrets: what may be written to a journal."""
    return redact(jsonable(value), key)


# -- secrets by name


def redact(value: Any, key: str = "") -> Any:
    """``value`` with every secret replaced by ``"[redacted]"``.

    A secret is what stands under a secret name (``api_key``, ``dbPassword``,
    ``Authorization``; not ``key_dim``, ``max_tokens``, ``eos_token``), what has
    the unmistakable shape of one (``AKIA…``, a JSON web token, a PEM private
    key) and the userinfo of a URL, which keeps its host. Mappings and sequences
    are copied, as dicts and lists; other objects come back as they are. Never
    raises: what cannot be looked at is redacted.

    Args:
        value: anything; nested mappings, sequences and strings are looked into.
        key: the name that ``value`` stands under.
    """
    try:
        return _redact(value, likeness(key), MAX_DEPTH)
    except Exception:
        return REDACTED


def _redact(value: Any, like: Likeness, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if depth < 0:
        return REDACTED
    if isinstance(value, str):
        return _redact_text(value, like)
    if isinstance(value, bytes | bytearray):
        return REDACTED if like else value
    if like is Likeness.CERTAIN and not (isinstance(value, Mapping | list | tuple | set) and not value):
        return REDACTED
    if isinstance(value, Mapping):
        return _redact_mapping(value, like, depth)
    if isinstance(value, list | tuple | set | frozenset):
        return list(_redact_items(value, like, depth))
    return value


def _redact_text(text: str, like: Likeness) -> str:
    if like is Likeness.CERTAIN:
        return REDACTED if text else text
    if like is Likeness.PROBABLE and not is_special_token(text):
        return REDACTED
    return scrub(text)


def _redact_mapping(value: Mapping[Any, Any], like: Likeness, depth: int) -> dict[Any, Any]:
    # A list of environment variables, as Kubernetes writes it: {"name": "DB_PASSWORD", "value": "…"}.
    named = next((str(value[k]) for k in ("name", "key") if k in value and "value" in value), "")
    result: dict[Any, Any] = {}
    for key, item in value.items():
        name = scrub(key) if isinstance(key, str) else key
        if named and key in ("name", "key"):
            result[name] = _redact(item, Likeness.NONE, depth - 1)
            continue
        inner = likeness(str(key))
        if named and key == "value":
            inner = max(inner, likeness(named))
        if like is Likeness.PROBABLE and isinstance(item, str) and looks_random(item):
            inner = Likeness.CERTAIN
        result[name] = _redact(item, inner, depth - 1)
    return result


def _redact_items(items: Iterable[Any], like: Likeness, depth: int) -> Iterator[Any]:
    """Items of a sequence; behind ``--token`` comes its value, as in ``sys.argv``."""
    after = Likeness.NONE
    for item in items:
        if not isinstance(item, str):
            yield _redact(item, like, depth - 1)
            after = Likeness.NONE
        elif item.startswith("-") and "=" not in item:
            yield scrub(item)
            after = likeness(item)
        else:
            numeric = item.replace(".", "", 1).isdigit() and after is not Likeness.CERTAIN
            yield _redact_text(item, like if numeric else max(like, after))
            after = Likeness.NONE


# -- plain JSON


def jsonable(value: object) -> Json:
    """Anything as plain JSON, bounded in depth, count and length; never raises.

    Enums give their values, paths and dtypes their names, dataclasses,
    namespaces, named tuples, attrs and pydantic objects and any mapping a dict,
    non-finite floats their names. Arrays and tensors give their type and shape,
    functions and classes their names, unknown objects the name of their type:
    no ``repr`` of a stranger is called. Strings lose secrets of known shape
    before they are cut, so that no half of one is left.
    """
    return _Plain().convert(value, 0)


class _Plain:
    """One conversion: counts nodes, and knows the containers that it is in."""

    def __init__(self) -> None:
        self.nodes = 0
        self.open: set[int] = set()

    def convert(self, value: object, depth: int) -> Json:
        self.nodes += 1
        try:
            simple = _scalar(value)
            if simple is not _NOT_SIMPLE:
                return simple
            if id(value) in self.open:
                return "<cycle>"
            if depth >= MAX_DEPTH or self.nodes > MAX_NODES:
                return f"<{_name(type(value))}: too deep or too large>"
            self.open.add(id(value))
            try:
                return self._container(value, depth)
            finally:
                self.open.discard(id(value))
        except Exception:
            return f"<unreadable {_name(type(value))}>"

    def _container(self, value: object, depth: int) -> Json:
        if isinstance(value, Mapping):
            return self._mapping(((k, functools.partial(value.__getitem__, k)) for k in value), len(value), depth)
        if isinstance(value, functools.partial):
            call = {"call": value.func, "args": value.args, "kwargs": value.keywords}
            return self.convert({k: v for k, v in call.items() if v}, depth)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self.convert(dict(zip(value._fields, value, strict=False)), depth)
        if isinstance(value, list | tuple | AbstractSet | range):
            return self._sequence(value, depth)
        fields = _fields(value)
        if fields is not None:
            return self._mapping(((k, functools.partial(getattr, value, k)) for k in fields), len(fields), depth)
        return f"<{_name(type(value))}>"

    def _mapping(self, items: Iterable[tuple[object, functools.partial[Any]]], length: int, depth: int) -> Json:
        result: dict[str, Json] = {}
        for key, get in items:
            if len(result) >= MAX_ITEMS or self.nodes > MAX_NODES:
                result["<more>"] = length - len(result)
                break
            try:
                name = str(_scalar(key)) if _scalar(key) is not _NOT_SIMPLE else _name(type(key))
                result[name[:200]] = self.convert(get(), depth + 1)
            except Exception:  # OmegaConf raises on values that are missing or do not resolve
                self.nodes += 1
                result[_name(type(key)) if not isinstance(key, str) else key[:200]] = "<unreadable>"
        return result

    def _sequence(self, items: Any, depth: int) -> Json:
        result: list[Json] = []
        for item in items:
            if len(result) >= MAX_ITEMS or self.nodes > MAX_NODES:
                result.append(f"<{len(items) - len(result)} more>")
                break
            result.append(self.convert(item, depth + 1))
        return result


_NOT_SIMPLE: Final = object()
_AS_TEXT: Final = (PurePath, torch.device, UUID, Decimal, Fraction, complex, os.PathLike)


def _scalar(value: object) -> Any:
    """The JSON of what is no container, or `_NOT_SIMPLE`."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, enum.Enum):
        return _scalar(value.value) if not isinstance(value.value, enum.Enum) else value.name
    if isinstance(value, str):
        return _text(str.__str__(value))
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else f"<integer of {value.bit_length()} bits>"
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value).removeprefix("torch.")
    if isinstance(value, np.generic):
        item = value.item()
        return str(value)[:MAX_TEXT] if isinstance(item, np.generic) else _scalar(item)
    if isinstance(value, np.dtype):
        return str(value)
    if isinstance(value, np.ndarray):
        return f"<array {value.dtype}{list(value.shape)}>"
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, _AS_TEXT):
        return _text(os.fspath(value) if isinstance(value, os.PathLike) else str(value))
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, types.FunctionType | types.BuiltinFunctionType | types.MethodType):
        return f"{value.__module__}.{value.__qualname__}"
    return _NOT_SIMPLE


def _text(text: str | bytes) -> str:
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    text = scrub(text).encode("utf-8", "backslashreplace").decode()  # lone surrogates are no JSON
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _describe_tensor(tensor: torch.Tensor) -> str:
    return f"<tensor {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}>"


def _fields(value: object) -> list[str] | None:
    """Names of the public fields of an object that is a record, else None."""
    cls = type(value)
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    for declared in ("__attrs_attrs__", "model_fields"):
        names = getattr(cls, declared, None)
        if names is not None:
            return [getattr(name, "name", name) for name in names]
    configlike = cls.__name__.endswith(("Config", "Args", "Arguments", "Namespace", "Params", "Options"))
    if isinstance(value, argparse.Namespace | types.SimpleNamespace) or configlike:
        return [name for name in vars(value) if not name.startswith("_")]
    return None


def _name(cls: type) -> str:
    module = cls.__module__
    return cls.__qualname__ if module in ("builtins", "__main__") else f"{module}.{cls.__qualname__}"
