"""Names for people: two words that stand for a run wherever its id is known."""

from __future__ import annotations

import hashlib
from typing import Final

_ADJECTIVES: Final = """
    amber brave brisk calm clear cosmic crisp daring eager fair fleet frosty gentle golden grand happy
    humble jolly keen kind lively lucid lunar merry mellow noble pale plain polar proud quick quiet
    rapid ruby rustic sage sharp shy silent silver sleek solar solid spry steady still stout sunny swift
    tidy vivid warm wise witty
"""
_NOUNS: Final = """
    acorn aspen badger beacon birch brook cedar comet coral crane creek delta dune eagle ember falcon
    fern finch fjord fox glade grove harbor hawk heron island ivy juniper lark lynx maple meadow mesa
    moss oak orbit osprey otter owl peak pebble pine plover raven reef ridge river robin sparrow spruce
    stone summit thistle tide willow wren
"""


def run_name(run: str) -> str:
    """Two words for a run, the same wherever its id is known, like ``quiet-heron-3f``."""
    adjectives, nouns = _ADJECTIVES.split(), _NOUNS.split()
    digest = hashlib.sha256(run.encode()).digest()
    adjective = adjectives[int.from_bytes(digest[:4], "big") % len(adjectives)]
    noun = nouns[int.from_bytes(digest[4:8], "big") % len(nouns)]
    return f"{adjective}-{noun}-{digest[8]:02x}"
