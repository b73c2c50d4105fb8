"""Optimizer steps that a compiler traces: they run without our hooks later, which is said while it traces.

``torch.compile(optimizer.step)`` runs hooks once, symbolically, and what it
compiles holds none of ours. Nothing is measured there, and nothing guessed.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from gradwatch.probe.optimizer import OptimizerProbe

_REASON: Final = "optimizer.step was compiled: its steps run without hooks, so that there are no rows of them"

_probes: WeakValueDictionary[str, OptimizerProbe] = WeakValueDictionary()
_numbers = count()


def key_of(probe: OptimizerProbe) -> str:
    """A name by which :func:`traced` finds the probe: a compiler hands constants only to what it does not trace."""
    key = f"{next(_numbers)}"
    _probes[key] = probe
    return key


def traced(key: str) -> None:
    """A compiler traces a step of this probe's optimizer: say so once, in an event."""
    probe = _probes.get(key)
    if probe is None or probe.blind:
        return
    probe.blind = True
    try:
        probe.session.event("metadata", values={f"unchecked.steps.{probe.name}": _REASON})
    except Exception as error:
        probe.session.aside.failed(error, "noting a compiled step")


# Called while tracing, its result (None) put into the graph: no guard, no graph break.
traced._dynamo_marked_constant = True  # type: ignore[attr-defined]
