"""Sees ``torch.amp.GradScaler`` at work without being given it, and changes nothing of what it does.

While a run is active, ``scale``, ``unscale_``, ``step`` and ``update`` are
wrapped on the class, and on each subclass that has its own
(``ShardedGradScaler``, ``torch.cuda.amp.GradScaler``, a user's), also on those
that are defined later. The last listener out puts the methods back.

No value is read: an unfused step is skipped exactly if the optimizer's step was
not called, which its hooks tell; for a fused step the decision stays on the
device, as ``found_inf``. A disabled scaler does nothing and is not reported.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, Final, Protocol

from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from gradwatch.probe.listeners import Listeners, failed


class ScalerListener(Protocol):
    """Who is told what a scaler does. What it raises goes to its ``on_failure``, never to the training loop."""

    def on_scale(self, scaler: GradScaler) -> None:
        """A loss was multiplied by the scale: what flows backward from it is scaled."""

    def on_unscale(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        """The optimizer's gradients were divided by the scale, by the loop or by an unfused ``step``."""

    def before_step(self, scaler: GradScaler, optimizer: Optimizer, fused: bool) -> None:
        """``scaler.step(optimizer)`` begins; ``fused``: the optimizer unscales and skips by itself."""

    def after_step(self, scaler: GradScaler, optimizer: Optimizer, skipped: bool | Tensor | None) -> None:
        """``scaler.step(optimizer)`` returned. ``skipped``: known (unfused), a device tensor that is above zero
        where it was skipped (fused), or None where it cannot be told. Not called where the step raised."""

    def on_update(self, scaler: GradScaler) -> None:
        """The scale was updated, and the scaler forgot what it knew of its optimizers."""

    def on_failure(self, error: Exception) -> None:
        """One of the methods above raised ``error``."""


def loss_scale(scaler: GradScaler) -> Tensor | None:
    """The scaler's present scale, a 0-d float32 tensor on its device that ``update`` changes in place; None before
    the first ``scale``, and where the scaler is disabled. It multiplies the loss, and so the gradients."""
    return getattr(scaler, "_scale", None) if scaler.is_enabled() else None


def is_unscaled(scaler: GradScaler, optimizer: Optimizer) -> bool | None:
    """Whether the scale is out of this optimizer's gradients, by ``unscale_`` since the last ``update``.

    None behind a fused ``step``: the scaler no longer knows whether ``unscale_``
    ran before it, and the kernel by itself leaves the scale in.
    """
    state = getattr(scaler, "_per_optimizer_states", {}).get(id(optimizer))  # indexing would add an entry
    if state is None or state["stage"] is OptState.READY:
        return False
    return None if state["stage"] is OptState.STEPPED and _is_fused(optimizer) else True


_lock = threading.Lock()
_listeners: Listeners[ScalerListener] = Listeners()
#: Class, name, torch's method, and what stands for it.
_replaced: list[tuple[type[GradScaler], str, Callable[..., Any], Callable[..., Any]]] = []


def acquire(listener: ScalerListener) -> None:
    """Tell ``listener`` of every scaler's doings from now on; acquiring again needs another :func:`release`."""
    with _lock:
        if not _listeners.now:
            for cls in _family(GradScaler):
                _replace(cls)
            GradScaler.__init_subclass__ = classmethod(_subclass_defined)  # type: ignore[assignment]
        _listeners.add(listener)


def release(listener: ScalerListener) -> None:
    """Tell ``listener`` no more; the last one puts torch's methods back. One that is not there is ignored."""
    with _lock:
        _listeners.remove(listener)
        if _listeners.now or not _replaced:
            return
        for cls, name, original, wrapper in _replaced:
            if cls.__dict__.get(name) is wrapper:
                setattr(cls, name, original)
        _replaced.clear()
        del GradScaler.__init_subclass__


def installed() -> bool:
    """Whether the scaler's methods are wrapped at present."""
    return bool(_replaced)


# -- the wrappers


def _scale(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def scale(self: GradScaler, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_observed(self, "scale"):
            return original(self, outputs, *args, **kwargs)
        with _under_way(self, "scale"):
            scaled = original(self, outputs, *args, **kwargs)
        _tell("on_scale", self)
        return scaled

    return scale


def _unscale(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def unscale_(self: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if not _is_observed(self, "unscale_"):
            return original(self, optimizer, *args, **kwargs)
        with _under_way(self, "unscale_"):
            result = original(self, optimizer, *args, **kwargs)
        _tell("on_unscale", self, optimizer)
        return result

    return unscale_


def _step(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def step(self: GradScaler, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if not _is_observed(self, "step"):
            return original(self, optimizer, *args, **kwargs)
        fused = _is_fused(optimizer)
        _tell("before_step", self, optimizer, fused)
        with _under_way(self, "step"), _noting_the_step(optimizer) as called:
            result = original(self, optimizer, *args, **kwargs)
        skipped = _found_inf(self, optimizer) if fused else None if called is None else not called
        _tell("after_step", self, optimizer, skipped)
        return result

    return step


def _update(original: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(original)
    def update(self: GradScaler, *args: Any, **kwargs: Any) -> Any:
        if not _is_observed(self, "update"):
            return original(self, *args, **kwargs)
        with _under_way(self, "update"):
            result = original(self, *args, **kwargs)
        _tell("on_update", self)
        return result

    return update


def _tell(method: str, *what: Any) -> None:
    for held in _listeners.now:
        listener = held()
        if listener is None:
            continue
        try:
            getattr(listener, method)(*what)
        except Exception as error:
            failed(listener, error)


class _Calls(threading.local):
    """Methods that run in this thread: a subclass that calls ``super().step`` makes one step, not two."""

    def __init__(self) -> None:
        self.running: list[tuple[GradScaler, str]] = []


_calls = _Calls()


def _is_observed(scaler: GradScaler, method: str) -> bool:
    if not _listeners.now or not scaler._enabled:
        return False
    return not any(s is scaler and m == method for s, m in _calls.running)


@contextmanager
def _under_way(scaler: GradScaler, method: str) -> Iterator[None]:
    _calls.running.append((scaler, method))
    try:
        yield
    finally:
        _calls.running.pop()


# -- was it skipped?


def _is_fused(optimizer: Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


@contextmanager
def _noting_the_step(optimizer: Any) -> Iterator[list[bool] | None]:
    """A list that is no longer empty once the optimizer's step was called; None where hooks cannot tell.

    A hook of our own for the length of the call: the scaler decides by reading
    ``found_inf``, and reading it again would wait for the device.
    """
    for _ in range(4):  # a wrapper without hooks holds the real one
        hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
        if hooks is not None or not hasattr(optimizer, "optimizer"):
            break
        optimizer = optimizer.optimizer
    if hooks is None:
        yield None
        return
    called: list[bool] = []
    key = object()
    hooks[key] = lambda *_: called.append(True)
    try:
        yield called
    finally:
        hooks.pop(key, None)


def _found_inf(scaler: GradScaler, optimizer: Optimizer) -> Tensor | None:
    """The number of devices on which a fused step found a non-finite gradient: a tensor of its own, since
    ``update`` adds the optimizers' together in place."""
    state = scaler._per_optimizer_states.get(id(optimizer))
    found = list(state["found_inf_per_device"].values()) if state else []
    if not found:
        return None
    total: Tensor = sum(f.to(found[0].device, non_blocking=True) for f in found)  # type: ignore[assignment]
    return total


# -- where they are put

_WRAPPERS: Final = {"scale": _scale, "unscale_": _unscale, "step": _step, "update": _update}


def _family(cls: type[GradScaler]) -> Iterator[type[GradScaler]]:
    yield cls
    for subclass in cls.__subclasses__():
        yield from _family(subclass)


def _replace(cls: type[GradScaler]) -> None:
    for name, wrap in _WRAPPERS.items():
        original = cls.__dict__.get(name)
        if callable(original):
            wrapper = wrap(original)
            setattr(cls, name, wrapper)
            _replaced.append((cls, name, original, wrapper))


def _subclass_defined(cls: type[GradScaler], /, **arguments: Any) -> None:
    """Called by Python when a subclass is made while a run is active: FSDP's scaler is imported late."""
    super(GradScaler, cls).__init_subclass__(**arguments)
    with _lock:
        if _replaced:
            _replace(cls)
