"""Learning rate schedulers made after ``watch``: seen as they are made, by a wrapper while a run is active."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Final, Protocol

from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from gradwatch.probe.listeners import Listeners, failed


class SchedulerListener(Protocol):
    """Told of every scheduler that is made."""

    def on_scheduler(self, scheduler: LRScheduler) -> None:
        """``scheduler`` was made; its own constructor may not have returned yet. It may come more than once."""

    def on_failure(self, error: Exception) -> None:
        """The method above raised ``error``."""


#: The classes whose constructors see every scheduler: the base, and those that do not call it.
_CLASSES: Final[tuple[type[Any], ...]] = (
    lr_scheduler.LRScheduler,
    lr_scheduler.SequentialLR,
    lr_scheduler.ChainedScheduler,
    lr_scheduler.ReduceLROnPlateau,
)
_lock = threading.Lock()
_listeners: Listeners[SchedulerListener] = Listeners()
_originals: dict[type[Any], Callable[..., None]] = {}


def acquire(listener: SchedulerListener) -> None:
    """Tell ``listener`` of schedulers from now on; refcounted over runs."""
    with _lock:
        _listeners.add(listener)
        if not _originals:
            for cls in _CLASSES:
                _originals[cls] = cls.__init__
                cls.__init__ = _observed(cls.__init__)


def release(listener: SchedulerListener) -> None:
    """Stop telling ``listener``; the last one out restores torch, but for what somebody has wrapped since."""
    with _lock:
        _listeners.remove(listener)
        if not _listeners.now:
            for cls, original in _originals.items():
                if getattr(cls.__init__, "__wrapped__", None) is original:
                    cls.__init__ = original
            _originals.clear()


def _observed(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: LRScheduler, optimizer: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, optimizer, *args, **kwargs)
        for held in _listeners.now:
            listener = held()
            if listener is None:
                continue
            try:
                listener.on_scheduler(self)
            except Exception as error:
                failed(listener, error)

    return __init__
