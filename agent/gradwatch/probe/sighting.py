"""A clip as one optimizer sees it: which of its parameters, their norms before it, the total that it used."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gradwatch.probe.attempted import Clip
from gradwatch.probe.lane import on_host
from gradwatch.probe.norms import LOW_PRECISION, is_sharded, stack

if TYPE_CHECKING:
    from gradwatch.probe.optimizer import OptimizerProbe
    from gradwatch.probe.seam import ClipEvent, NormEvent


def needs_wide_norms(event: NormEvent) -> bool:
    """Whether a clip's own norms will not do: another norm type, a coarse dtype, shards, or none captured."""
    norms = event.norms
    return (
        event.norm_type != 2.0
        or norms is None
        or norms.dtype in LOW_PRECISION
        or (bool(event.tensors) and (is_sharded(event.tensors[0]) or event.tensors[0].dtype in LOW_PRECISION))
        or (event.mixed and any(tensor.dtype in LOW_PRECISION for tensor in event.tensors))
    )


def clip_seen(probe: OptimizerProbe, event: ClipEvent, wide: list[Tensor] | None, scale: Tensor | float | None) -> Clip:
    """A clip by norm that touched some of the optimizer's parameters; ``wide`` are its norms in float32."""
    holds = probe.holds
    parameters, grads = event.parameters, event.grads
    if len(grads) != len(parameters):
        parameters = [p for p in parameters if p.grad is not None]
    columns, whole = holds.columns.of(parameters)
    if not whole:
        covered = {id(p) for p in parameters}
        whole = all(p.grad is None or id(p) in covered for p in holds.parameters)
    norm = event.norm
    norms: Tensor | None = None
    total_is_l2 = False
    if wide is not None:
        norms = stack(wide)
    elif norm is not None and norm.norm_type == 2.0 and len(norm.tensors) == len(grads):
        norms, total_is_l2 = norm.norms, norm.norms is not None and not event.own_total
    norm_type = 2.0 if norm is None else norm.norm_type
    total = event.total_norm
    if is_sharded(total):
        total = torch.full((), math.nan)  # the global norm is known to the agent, which sees all ranks
    max_norm = event.max_norm
    clip = Clip(columns, whole, norms, total, max_norm, norm_type, total_is_l2, probe.attempted.backwards, scale)
    clip.watched = whole or any(p is probe.watched for p in parameters)
    clip.own_total = event.own_total
    if scale is not None:
        clip.touched = probe.touch.happened(seen=int(clip.watched))  # the clip has run already, and was a change
    clip.plain = (
        whole
        and len(columns) == len(holds.parameters)
        and norms is not None
        and norm_type == 2.0
        and scale is None
        and not event.own_total
        and max_norm < math.inf
        and isinstance(total, Tensor)
        and on_host(total)
        and on_host(norms)
    )
    return clip


def clip_logged(probe: OptimizerProbe, total_norm: Tensor | float, max_norm: float) -> Clip:
    """A clip reported by the loop: of all parameters, and done already."""
    backwards = probe.attempted.backwards
    return Clip(probe.holds.columns.all, True, None, total_norm, max_norm, 2.0, False, backwards, logged=True)
