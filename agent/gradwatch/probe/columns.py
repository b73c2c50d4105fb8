"""The columns of ``steps.ring``, as the probe writes them. ``docs/journal.md`` says what each means."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

HOST: Final = (
    "optimizer",
    "backwards",
    "duration",
    "samples",
    "probe_seconds",
    "flags",
    "clip_threshold",
    "value_threshold",
)
DEVICE: Final = ("loss", "grad_norm", "grad_norm_l2", "clip_coefficient", "nonfinite", "loss_scale", "found_inf")
#: Where some of them stand.
LOSS: Final = 0
GRAD_NORM: Final = 1
NONFINITE: Final = 4
FOUND_INF: Final = 6
#: A loss that was logged and is NaN, told from one that was not logged by its sign bit.
LOGGED_NAN: Final = math.copysign(math.nan, -1.0)

#: Bits of the column ``flags``.
SKIPPED: Final = 1
MEASURED: Final = 2
CLIPPED_BY_NORM: Final = 4
CLIPPED_BY_VALUE: Final = 8
LOGGED_CLIP: Final = 16
IN_CLOSURE: Final = 32
CLIPPED_IN_PARTS: Final = 64
UNSCALED_HERE: Final = 128

#: Parameter groups beyond this many are in the manifest but not in the rows.
MAX_GROUPS: Final = 64
#: Room for groups that are added while training.
SPARE_GROUPS: Final = 2


@dataclass(frozen=True, slots=True)
class StepColumns:
    """The columns of one run: fixed when it starts, since a ring's rows cannot grow.

    ``groups`` parameter groups have a column each for learning rate and weight
    decay; where a rate is a device tensor it travels with the device columns.
    """

    groups: int
    tensor_rates: bool

    @classmethod
    def of(cls, group_counts: list[int], tensor_rates: bool) -> StepColumns:
        return cls(min(MAX_GROUPS, max(group_counts, default=0) + SPARE_GROUPS), tensor_rates)

    @property
    def host(self) -> tuple[str, ...]:
        rates = tuple(f"lr_{i}" for i in range(self.groups))
        return HOST + rates + tuple(f"wd_{i}" for i in range(self.groups))

    @property
    def device(self) -> tuple[str, ...]:
        return DEVICE + (tuple(f"lr_tensor_{i}" for i in range(self.groups)) if self.tensor_rates else ())
