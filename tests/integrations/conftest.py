"""The fixtures of everything that watches a real training."""

from tests.watching import _alone, _seed, read, watch

__all__ = ["_alone", "_seed", "read", "watch"]
