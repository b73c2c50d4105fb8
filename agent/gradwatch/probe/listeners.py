"""Who is told of what happens in torch: several runs at once, read in the training loop without a lock.

Listeners are held weakly. What replaces a function of torch must not keep a
run alive, and with it a model, that nobody else remembers.
"""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar
from weakref import ref


class Fallible(Protocol):
    """A listener that hears of what it raised itself."""

    def on_failure(self, error: Exception) -> None: ...


L = TypeVar("L", bound=Fallible)


class Listeners(Generic[L]):
    """Counted by identity; ``now`` holds each once, and is replaced as a whole.

    The caller holds a lock around :meth:`add` and :meth:`remove`; who reads
    ``now`` needs none. One that is gone stays in ``now`` until the next change.
    """

    def __init__(self) -> None:
        self.now: tuple[ref[L], ...] = ()
        self._holds: list[ref[L]] = []

    def add(self, listener: L) -> None:
        self._holds.append(ref(listener))
        self._refresh()

    def remove(self, listener: L) -> None:
        """Give back one hold; one that is not there is ignored."""
        for index, held in enumerate(self._holds):
            if held() is listener:
                del self._holds[index]
                break
        self._refresh()

    def _refresh(self) -> None:
        self._holds = [held for held in self._holds if held() is not None]
        self.now = tuple({id(held): held for held in self._holds}.values())  # an object has one such reference


def failed(listener: Fallible, error: Exception) -> None:
    """Hand a listener what it raised; if that raises too, there is nobody left to tell, and the loop goes on."""
    try:
        listener.on_failure(error)
    except Exception:
        pass
