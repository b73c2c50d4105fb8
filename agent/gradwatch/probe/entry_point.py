"""A function of torch that is replaced for a while: found, stood in for, and put back exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import CellType, FunctionType, ModuleType
from typing import Any, Final

import torch

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class EntryPoint:
    """A public function of torch by its ``name``, the ``arguments`` it must take to be understood, and the
    ``places`` (module, attribute) that offer it, the one that defines it first."""

    name: str
    arguments: tuple[str, ...]
    places: tuple[tuple[ModuleType, str], ...]


#: Where torch defines the wrapper whose cell is used: its own here, or the general decorator.
_NO_GRAD: Final = ("torch.nn.utils.clip_grad", "torch.utils._contextlib")


class Site:
    """One entry point, replaced and put back. Each install makes a new stand-in: an old one that somebody
    still holds calls what stood there before it, tells nobody, and never meets itself."""

    def __init__(self, entry: EntryPoint, cell: CellType | None) -> None:
        self.entry, self.cell = entry, cell
        self.how = "attribute" if cell is None else "cell"
        self._stand_in: Function | None = None
        self._originals: list[Function] = []

    @classmethod
    def find(cls, entry: EntryPoint) -> Site | None:
        function = getattr(*entry.places[0], None)
        if not callable(function):
            return None
        cell = _func_cell(function)
        inner = function if cell is None else cell.cell_contents
        return cls(entry, cell) if _accepts(inner, entry.arguments) else None

    def install(self, stand_in: Callable[[Function], Function]) -> None:
        """Put what ``stand_in`` makes of the function in its place; without a cell, in the ``no_grad`` it relies on."""
        if self.cell is not None:
            self._originals = [self.cell.cell_contents]
            self._stand_in = self.cell.cell_contents = stand_in(self._originals[0])
            return
        self._originals = [getattr(module, name, None) for module, name in self.entry.places]  # type: ignore[misc]
        self._stand_in = torch.no_grad()(stand_in(self._originals[0]))
        for module, name in self.entry.places:
            if getattr(module, name, None) is self._originals[0]:
                setattr(module, name, self._stand_in)

    def restore(self) -> None:
        """Put back what was there, unless somebody else has put something on top since."""
        if self.cell is not None:
            if self.cell.cell_contents is self._stand_in:
                self.cell.cell_contents = self._originals[0]
            return
        for (module, name), original in zip(self.entry.places, self._originals):
            if getattr(module, name, None) is self._stand_in:
                setattr(module, name, original)


def wrapped(function: Any) -> Any:
    """What a ``no_grad`` wrapper runs at present; None where there is no such cell."""
    cell = _func_cell(function)
    return None if cell is None else cell.cell_contents


def _func_cell(function: Any) -> CellType | None:
    """The cell of a ``no_grad`` wrapper that holds the wrapped function; looks below other people's wrappers."""
    for _ in range(8):
        if not isinstance(function, FunctionType):
            return None
        if function.__closure__ and "func" in function.__code__.co_freevars:
            cell = function.__closure__[function.__code__.co_freevars.index("func")]
            if function.__globals__.get("__name__") in _NO_GRAD and isinstance(cell.cell_contents, FunctionType):
                return cell
        function = getattr(function, "__wrapped__", None)
    return None


def _accepts(function: Any, arguments: tuple[str, ...]) -> bool:
    while not isinstance(function, FunctionType) or function.__code__.co_varnames[:1] == ("args",):
        function = getattr(function, "__wrapped__", None)
        if function is None:
            return False
    code = function.__code__
    return code.co_varnames[: len(arguments)] == arguments
