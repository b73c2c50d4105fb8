"""From the device to the host without waiting: values are copied behind the loop's back and read later.

On a CPU every value is there already. On an accelerator a copy into pinned
memory is queued with an event behind it, and looked at again at the next step:
the training thread never waits for the device. What has not landed when the
process dies is lost with the device, the host's part of the row is not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Values = npt.NDArray[np.float32]
#: Copies in flight; when the device is further behind, values of a step are dropped and counted.
DEPTH: Final = 64
#: Bytes of pinned memory that copies in flight may hold.
PINNED_BYTES: Final = 32 * 2**20
#: What stands in a buffer until its copy lands: a NaN with bits that no arithmetic makes.
ABSENT: Final = 0x7FC0_6B77


class DeviceEvent(Protocol):
    """What the lane needs of ``torch.Event``."""

    def record(self) -> None: ...
    def query(self) -> bool: ...


def on_host(tensor: Tensor) -> bool:
    """Whether a tensor's values can be read without waiting for a device."""
    return tensor.is_cpu


class Lane:
    """Moves one-dimensional float32 device tensors to the host, in order, without synchronising.

    ``pinned`` gives a host buffer of a size, ``event`` a device event: both
    can be replaced in tests, since a machine without an accelerator has none.
    """

    def __init__(
        self,
        pinned: Callable[[int], Tensor] | None = None,
        event: Callable[[torch.device], DeviceEvent] | None = None,
    ) -> None:
        self._pinned = pinned or _pinned
        self._event = event or _event
        self._flight: deque[tuple[DeviceEvent, Tensor, Callable[[Values], None]]] = deque()
        self._free: dict[int, list[Tensor]] = {}
        self._bytes = 0
        self.dropped = 0

    def send(self, values: Tensor, landed: Callable[[Values], None]) -> None:
        """Queue a copy; ``landed`` is called from a later :meth:`poll` with the values on the host."""
        size = values.numel()
        buffers = self._free.get(size)
        if buffers:
            buffer = buffers.pop()
        elif len(self._flight) >= DEPTH or self._bytes + 4 * size > PINNED_BYTES:
            self.dropped += 1
            return
        else:
            buffer = self._pinned(size)
            self._bytes += 4 * size
        buffer.view(torch.int32).fill_(ABSENT)
        buffer.copy_(values, non_blocking=True)
        event = self._event(values.device)
        event.record()
        self._flight.append((event, buffer, landed))

    def poll(self) -> None:
        """Hand over what has landed. Asks the device, never waits for it."""
        flight = self._flight
        while flight and flight[0][0].query():
            _, buffer, landed = flight.popleft()
            landed(buffer.numpy().copy())
            self._free.setdefault(buffer.numel(), []).append(buffer)

    def salvage(self) -> None:
        """The device is lost and its events answer no more: hand over the copies that had arrived whole before."""
        while self._flight:
            _, buffer, landed = self._flight.popleft()
            if not bool((buffer.view(torch.int32) == ABSENT).any()):
                landed(buffer.numpy().copy())

    @property
    def in_flight(self) -> int:
        return len(self._flight)


def gather(tensors: list[Tensor]) -> Tensor:
    """Device tensors of any shape and dtype as one float32 vector on the first one's device."""
    device = tensors[0].device
    flat = [t.detach().reshape(-1).to(device=device, dtype=torch.float32, non_blocking=True) for t in tensors]
    return torch.cat(flat)


def _pinned(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, pin_memory=True)


def _event(device: torch.device) -> DeviceEvent:
    event: Any = torch.Event(device)
    return event  # type: ignore[no-any-return]
