"""The second opinion of these tests: norms of gradients as a flat float64 vector has them."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gradwatch.journal import Events


def norm(parameters: Iterable[torch.Tensor]) -> float:
    """The L2 norm of all gradients together."""
    return float(torch.cat([p.grad.double().flatten() for p in parameters if p.grad is not None]).norm())


def codes(events: Events) -> list[str]:
    """Codes of the findings in a journal."""
    return [e["code"] for e in events.events if e["kind"] == "finding"]


def validations(events: Events) -> list[dict[str, object]]:
    """Slice and metrics of each validation in a journal."""
    return [{"slice": e["slice"], **e["metrics"]} for e in events.events if e["kind"] == "validation"]


def end(events: Events) -> tuple[str, str]:
    """State and reason of a run's end."""
    [event] = [e for e in events.events if e["kind"] == "end"]
    return event["state"], event["reason"]
