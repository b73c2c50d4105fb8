"""The clip seam: sees every gradient clip where it happens, and changes no bit of its result.

``torch.nn.utils.clip_grad_norm_`` computes a norm per tensor, combines them and
drops them. The seam keeps them. It puts its own function into the ``func`` cell
of the ``no_grad`` wrapper around each entry point of ``torch.nn.utils``, so that
whoever imported a name by value is seen too; where there is no such cell,
module attributes are replaced instead. One seam serves all runs of a process:
the first listener installs it, the last one out restores torch exactly. Listeners
are held weakly; one that is gone without a word is taken out at the next change.

All norms are **pre-clip**, of the gradients as they stand (scaled, if a loss
scale is in them), and stay on their device: nothing here waits for it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from types import FunctionType, GeneratorType
from typing import Any, Final, Protocol
from weakref import ref

import torch
from torch import Tensor
from torch.nn import utils
from torch.nn.utils import clip_grad

from gradwatch.probe.captured import alike, captured_norm, clip_alike_, is_known, norm_alike
from gradwatch.probe.entry_point import EntryPoint, Function, Site, wrapped
from gradwatch.probe.listeners import Listeners, failed

_Tensors = Tensor | Iterable[Tensor]


@dataclass(slots=True)
class NormEvent:
    """A global norm was computed: ``total = (Σ normsᵢᵖ)^(1/p)`` with p = ``norm_type``.

    ``norms``: a vector, one entry for each of ``tensors`` in their order, on the
    device of ``total``; of a DTensor, the norm of this rank's shard. None where
    torch's code gave no sight of them. ``tensors`` are the gradients themselves,
    unclipped while ``on_norm`` runs. ``mixed``: they may differ in dtype, which
    ``norms`` no longer tells.
    """

    tensors: list[Tensor]
    norms: Tensor | None
    total: Tensor
    norm_type: float
    mixed: bool = False


@dataclass(slots=True)
class ClipEvent:
    """Gradients were scaled in place by ``min(1, max_norm / (total_norm + 1e-6))``.

    ``grads`` are the gradients of ``parameters`` that are not None, in order.
    ``norm`` is the computation that ``total_norm`` came from (told by identity),
    None where it came from elsewhere. ``own_total``: the caller put a number of
    its own in the place of the computed one, or changed that in place.
    """

    parameters: list[Tensor]
    grads: list[Tensor]
    max_norm: float
    total_norm: Tensor
    norm: NormEvent | None
    own_total: bool = False


@dataclass(slots=True)
class ValueClipEvent:
    """Gradients are clamped, element by element, to ``[-clip_value, clip_value]``."""

    parameters: list[Tensor]
    grads: list[Tensor]
    clip_value: float


class Listener(Protocol):
    """Who is told about clips. What it raises goes to its own ``on_failure``, never to the training loop."""

    def on_norm(self, event: NormEvent) -> None:
        """A norm was computed; no gradient is clipped yet."""

    def on_clip(self, event: ClipEvent) -> None:
        """A clip by norm has run."""

    def on_refused(self, tensors: list[Tensor]) -> None:
        """The total norm of these gradients was not finite, and torch raised as it was asked to: nothing is clipped."""

    def before_value_clip(self, event: ValueClipEvent) -> object | None:
        """A clip by value is about to run; what is returned comes back in :meth:`on_value_clip`."""

    def on_value_clip(self, event: ValueClipEvent, token: object | None) -> None:
        """A clip by value has run."""

    def on_failure(self, error: Exception) -> None:
        """One of the methods above raised ``error``."""


# -- who listens

_lock = threading.Lock()
_listeners: Listeners[Listener] = Listeners()
_sites: list[Site] = []
_traced = 0


def acquire(listener: Listener) -> None:
    """Tell ``listener`` of every clip from now on; acquiring again needs another :func:`release`."""
    global _listeners
    with _lock:
        if not _listeners.now:
            # A stand-in of earlier, which somebody may still hold, stays with listeners that are gone.
            _listeners = Listeners()
            _sites.extend(site for entry in _STAND_INS if (site := Site.find(entry)) is not None)
            for site in _sites:
                site.install(partial(_STAND_INS[site.entry], heard_by=_listeners))
        _listeners.add(listener)


def release(listener: Listener) -> None:
    """Tell ``listener`` no more; the last one restores torch. One that is not registered is ignored."""
    with _lock:
        _listeners.remove(listener)
        if not _listeners.now:
            for site in _sites:
                site.restore()
            _sites.clear()


def installed() -> bool:
    """Whether torch's functions are replaced at present."""
    return bool(_sites)


def coverage() -> dict[str, str]:
    """How each entry point of torch is seen, or would be: by its ``cell``, by ``attribute``, or ``none``."""
    with _lock:
        sites = {site.entry.name: site.how for site in _sites}
    if not sites:
        sites = {entry.name: site.how for entry in _STAND_INS if (site := Site.find(entry)) is not None}
    return {entry.name: sites.get(entry.name, "none") for entry in _STAND_INS}


def traced() -> int:
    """How many calls were traced by a compiler since the process started: what runs compiled is not seen."""
    return _traced


# -- what stands in for torch's functions; each is called in the `no_grad` of the wrapper around it


def _clip_grad_norm(original: Function, heard_by: Listeners[Listener]) -> Function:
    names = original.__globals__ if isinstance(original, FunctionType) else {}
    norm_of, clip_by = names.get("_get_total_norm"), names.get("_clip_grads_with_norm_")
    # The short way does the work of all three, so all three must be torch's.
    fast = all(is_known(f) for f in (original, wrapped(norm_of), wrapped(clip_by)))

    def clip_grad_norm_(
        parameters: _Tensors,
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        **future: Any,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            _trace()
            return original(parameters, max_norm, norm_type, error_if_nonfinite, foreach, **future)  # type: ignore[no-any-return]
        listeners = heard_by.now
        if (
            not (listeners and fast)
            or future
            or error_if_nonfinite
            or foreach is False
            or names["_get_total_norm"] is not norm_of
            or names["_clip_grads_with_norm_"] is not clip_by
        ):
            return original(parameters, max_norm, norm_type, error_if_nonfinite, foreach, **future)  # type: ignore[no-any-return]
        params = _listed(parameters)
        if not params and isinstance(parameters, GeneratorType):
            # Said here, since torch counts the frames up to the caller.
            warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3)
        grads = [g for p in params if (g := p.grad) is not None]
        if not alike(grads):
            return original(params, max_norm, norm_type, error_if_nonfinite, foreach)  # type: ignore[no-any-return]
        norm_type = float(norm_type)
        norms, total = norm_alike(grads, norm_type)
        norm = NormEvent(grads, norms, total, norm_type)
        _tell_norm(listeners, norm)
        max_norm = float(max_norm)
        clip_alike_(grads, max_norm, total)
        _tell_clip(listeners, ClipEvent(params, grads, max_norm, total, norm))
        return total

    return clip_grad_norm_


def _total_norm(original: Function, heard_by: Listeners[Listener]) -> Function:
    fast = is_known(original)

    def _get_total_norm(
        tensors: _Tensors,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
        **future: Any,
    ) -> Tensor:
        if torch.compiler.is_compiling():
            _trace()
            return original(tensors, norm_type, error_if_nonfinite, foreach, **future)  # type: ignore[no-any-return]
        listeners = heard_by.now
        if not listeners:
            return original(tensors, norm_type, error_if_nonfinite, foreach, **future)  # type: ignore[no-any-return]
        given = _listed(tensors)
        norms: Tensor | None
        same = alike(given)
        if fast and same and not (future or error_if_nonfinite or foreach is False):
            norm_type = float(norm_type)
            norms, total = norm_alike(given, norm_type)
        else:
            try:
                norms, total = captured_norm(original, given, norm_type, error_if_nonfinite, foreach, **future)
            except RuntimeError as error:
                if error_if_nonfinite and "non-finite" in str(error):
                    _tell_refused(listeners, given)
                raise
        norm = NormEvent(given, norms, total, float(norm_type), not same)
        _last.remember(norm)
        _tell_norm(listeners, norm)
        return total

    return _get_total_norm


def _clip_with_norm(original: Function, heard_by: Listeners[Listener]) -> Function:
    fast = is_known(original)

    def _clip_grads_with_norm_(
        parameters: _Tensors,
        max_norm: float,
        total_norm: Tensor,
        foreach: bool | None = None,
        **future: Any,
    ) -> None:
        if torch.compiler.is_compiling():
            _trace()
            original(parameters, max_norm, total_norm, foreach, **future)
            return
        listeners = heard_by.now
        if not listeners:
            original(parameters, max_norm, total_norm, foreach, **future)
            return
        params = _listed(parameters)
        grads = [g for p in params if (g := p.grad) is not None]
        max_norm = float(max_norm)
        if fast and not future and foreach is not False and alike(grads, total_norm):
            clip_alike_(grads, max_norm, total_norm)
        else:
            original(params, max_norm, total_norm, foreach, **future)
        norm, own_total = _last.recall(total_norm)
        _tell_clip(listeners, ClipEvent(params, grads, max_norm, total_norm, norm, own_total))

    return _clip_grads_with_norm_


def _clip_value(original: Function, heard_by: Listeners[Listener]) -> Function:
    def clip_grad_value_(parameters: _Tensors, clip_value: float, foreach: bool | None = None, **future: Any) -> None:
        if torch.compiler.is_compiling():
            _trace()
            original(parameters, clip_value, foreach, **future)
            return
        listeners = heard_by.now
        if not listeners:
            original(parameters, clip_value, foreach, **future)
            return
        params = _listed(parameters)
        clip_value = float(clip_value)
        event = ValueClipEvent(params, [g for p in params if (g := p.grad) is not None], clip_value)
        tokens: list[tuple[Listener, object | None]] = []
        for held in listeners:
            listener = held()
            if listener is None:
                continue
            try:
                tokens.append((listener, listener.before_value_clip(event)))
            except Exception as error:
                failed(listener, error)
        original(params, clip_value, foreach, **future)
        for listener, token in tokens:
            try:
                listener.on_value_clip(event, token)
            except Exception as error:
                failed(listener, error)

    return clip_grad_value_


def _listed(tensors: _Tensors) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _tell_norm(listeners: tuple[ref[Listener], ...], event: NormEvent) -> None:
    for held in listeners:
        listener = held()
        if listener is None:
            continue
        try:
            listener.on_norm(event)
        except Exception as error:
            failed(listener, error)


def _tell_clip(listeners: tuple[ref[Listener], ...], event: ClipEvent) -> None:
    for held in listeners:
        listener = held()
        if listener is None:
            continue
        try:
            listener.on_clip(event)
        except Exception as error:
            failed(listener, error)


def _tell_refused(listeners: tuple[ref[Listener], ...], tensors: list[Tensor]) -> None:
    for held in listeners:
        listener = held()
        if listener is None:
            continue
        try:
            listener.on_refused(tensors)
        except Exception as error:
            failed(listener, error)


def _trace() -> None:
    global _traced
    _traced += 1


# A compiler calls it once while it traces, and puts its result (None) into the graph: no guard, no graph break.
_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Last(threading.local):
    """The thread's newest norm, for the clip that is handed its total.

    Gradients are held weakly: a norm that no clip follows must not keep a
    model's gradients alive into the next backward pass.
    """

    _seen: tuple[Tensor, int, list[ref[Tensor]], Tensor | None, float, bool] | None = None

    def remember(self, norm: NormEvent) -> None:
        refs = [ref(t) for t in norm.tensors]
        self._seen = (norm.total, _version(norm.total), refs, norm.norms, norm.norm_type, norm.mixed)

    def recall(self, total: Tensor) -> tuple[NormEvent | None, bool]:
        """The computation of ``total``, and whether its value is another one than was computed."""
        if self._seen is None or self._seen[0] is not total:
            return None, True
        _, version, refs, norms, norm_type, mixed = self._seen
        tensors = [t for r in refs if (t := r()) is not None]
        norm = NormEvent(tensors, norms, total, norm_type, mixed) if len(tensors) == len(refs) else None
        return norm, _version(total) != version


def _version(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 of one that does not count."""
    return 0 if tensor.is_inference() else tensor._version


_last = _Last()


# -- where they stand

_STAND_INS: Final = {
    EntryPoint(
        "clip_grad_norm_",
        ("parameters", "max_norm", "norm_type", "error_if_nonfinite", "foreach"),
        ((clip_grad, "clip_grad_norm_"), (utils, "clip_grad_norm_")),
    ): _clip_grad_norm,
    EntryPoint(
        "get_total_norm",
        ("tensors", "norm_type", "error_if_nonfinite", "foreach"),
        ((clip_grad, "_get_total_norm"), (utils, "get_total_norm")),
    ): _total_norm,
    EntryPoint(
        "clip_grads_with_norm_",
        ("parameters", "max_norm", "total_norm", "foreach"),
        ((clip_grad, "_clip_grads_with_norm_"), (utils, "clip_grads_with_norm_")),
    ): _clip_with_norm,
    EntryPoint(
        "clip_grad_value_",
        ("parameters", "clip_value", "foreach"),
        ((clip_grad, "clip_grad_value_"), (utils, "clip_grad_value_")),
    ): _clip_value,
}
