"""Made-up customers: 180 days of events each, and whether the customer then left.

Activity is heavy-tailed, as it is in life: most customers leave a dozen events, a few leave more than 300.
Who is about to leave grows quiet and writes to support; a share of the labels is noise, so that no model can
be perfect.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

DAYS: Final = 180
#: What a customer does: visit, purchase, return, support, share.
EVENT_TYPES: Final = 5
SUPPORT: Final = 3
#: Features of an event: log of days since the event before, share of the 180 days left, log amount (each scaled
#: to about ±0.5 around 0, which keeps gradients even), and its type (one-hot).
FEATURES: Final = 3 + EVENT_TYPES
MOST_EVENTS: Final = 400
_AMOUNT: Final = 2

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Customers:
    """``events[i]`` is a (count, FEATURES) array; ``left[i]`` is 1 where customer *i* left."""

    events: list[F32]
    left: F32

    def __len__(self) -> int:
        return len(self.events)

    def counts(self) -> npt.NDArray[np.int64]:
        return np.array([len(history) for history in self.events])

    def split(self, at: int) -> tuple[Customers, Customers]:
        """The first ``at`` customers, and the others."""
        return Customers(self.events[:at], self.left[:at]), Customers(self.events[at:], self.left[at:])


@dataclass(frozen=True, slots=True)
class Batch:
    """``events``: (batch, longest, FEATURES), padded with zeros; ``lengths`` and ``left``: (batch,)."""

    events: Tensor
    lengths: Tensor
    left: Tensor

    def corrupted(self) -> Batch:
        """The batch as a broken import job would deliver it: amounts in another currency and before their
        logarithm, and each label on its neighbour's row."""
        events = self.events.clone()
        events[..., _AMOUNT] = 30.0 * torch.expm1(8.0 * events[..., _AMOUNT])
        return Batch(events, self.lengths, self.left.roll(1))


def make_customers(count: int, seed: int) -> Customers:
    """Generate ``count`` customers; the same seed gives the same ones."""
    rng = np.random.default_rng(seed)
    activity = np.clip(3.0 + rng.lognormal(mean=2.4, sigma=1.1, size=count), 3, MOST_EVENTS).astype(int)
    leaves = rng.random(count) < 0.35
    events = [_history(rng, n, bool(leaving)) for n, leaving in zip(activity, leaves, strict=True)]
    noise = rng.random(count) < 0.12
    return Customers(events, (leaves ^ noise).astype(np.float32))


def _history(rng: np.random.Generator, count: int, leaving: bool) -> F32:
    # Who leaves fades out towards the end of the 180 days: their events crowd at the beginning.
    days = np.sort(DAYS * rng.beta(1.0, 1.4 if leaving else 1.0, size=count))
    weights = np.array([0.55, 0.22, 0.05, 0.06, 0.12])
    if leaving:
        weights[SUPPORT] += 0.30 * rng.random()
    kinds = rng.choice(EVENT_TYPES, size=count, p=weights / weights.sum())
    amounts = np.where(kinds == 1, rng.lognormal(3.0, 0.8, size=count), 0.0)
    history = np.zeros((count, FEATURES), np.float32)
    history[:, 0] = np.log1p(np.diff(days, prepend=0.0)) / 3.0 - 0.2
    history[:, 1] = (DAYS - days) / DAYS - 0.5
    history[:, _AMOUNT] = np.log1p(amounts) / 8.0
    history[np.arange(count), 3 + kinds] = 1.0
    return history


def collate(customers: Customers, rows: npt.NDArray[np.int64]) -> Batch:
    """Pad the histories of ``rows`` to the longest of them."""
    histories = [customers.events[row] for row in rows]
    lengths = np.array([len(history) for history in histories])
    events = np.zeros((len(rows), int(lengths.max()), FEATURES), np.float32)
    for index, history in enumerate(histories):
        events[index, : len(history)] = history
    return Batch(torch.from_numpy(events), torch.from_numpy(lengths), torch.from_numpy(customers.left[rows].copy()))


def batches(customers: Customers, size: int, seed: int) -> Iterator[Batch]:
    """Shuffled batches without end, a new order each epoch."""
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(customers))
        for start in range(0, len(order) - size + 1, size):
            yield collate(customers, order[start : start + size])
