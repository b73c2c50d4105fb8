"""Runs the watchers of curves: one look at each block of each optimizer, with a past that they share."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from gradwatch.catalog import Severity
from gradwatch.collect.model import Finding
from gradwatch.collect.rows import Rows
from gradwatch.collect.run import Observation
from gradwatch.detect.curve import BLOCK, Block, Blocks
from gradwatch.detect.detector import found, optimizer_of
from gradwatch.detect.past import Milestones, Past
from gradwatch.journal.manifest import Optimizer

_log = logging.getLogger("gradwatch.agent")


@dataclass(frozen=True, slots=True)
class Moment:
    """One block of one optimizer, and what is known of its past, the block included."""

    seen: Observation
    index: int
    block: Block
    past: Past

    @property
    def optimizer(self) -> Optimizer:
        return optimizer_of(self.seen, self.index)

    def found(
        self,
        code: str,
        message: str,
        evidence: Mapping[str, Any],
        *,
        severity: Severity | None = None,
        advice: str = "",
        active: bool = True,
    ) -> list[Finding]:
        """A finding at the last step of the block."""
        step = self.block.step
        told = {"step": step, "optimizer": self.index, **evidence}
        return [
            found(
                code,
                self.seen,
                step=step,
                time=self.block.time,
                message=message,
                evidence=told,
                severity=severity,
                advice=advice,
                active=active,
            )
        ]


class Watcher(Protocol):
    """Watches one curve of one optimizer."""

    code: str

    def judge(self, now: Moment) -> list[Finding]:
        """One more block; it is already in ``now.past``."""

    def begin(self) -> None:
        """A new attempt begins."""

    def to_state(self) -> Any:
        """Its memory, JSON-safe."""

    def restore(self, state: Any) -> None:
        """Take up the memory of a former life."""


class Curves:
    """The watchers over the curves of rank 0, for each optimizer of the run by itself."""

    def __init__(self, watchers: tuple[Callable[[], Watcher], ...]) -> None:
        self._make: Final = watchers
        self.codes = tuple(make().code for make in watchers)
        self._milestones = Milestones()
        self._tracks: dict[int, _Track] = {}

    def observe(self, seen: Observation) -> list[Finding]:
        if seen.facts is None or seen.rank != 0:
            return []
        if seen.begun:
            for track in self._tracks.values():
                track.begin()
        alone = len(seen.facts.manifest.optimizers) < 2
        for table in seen.told.tables if alone else ():
            self._milestones.sample(table)
        for validation in seen.told.validations:
            self._milestones.validate(validation)
        rows = seen.rows.take(seen.rows.plausible & seen.rows.taken)
        findings: list[Finding] = []
        for index in np.unique(rows.optimizer).tolist() if len(rows) else []:
            if index not in self._tracks:
                self._tracks[index] = _Track(self._watchers(), Past(alone, milestones=self._milestones))
            findings += self._tracks[index].observe(seen, index, rows.take(rows.optimizer == index))
        if len(rows):
            self._milestones.forget(float(rows.time[max(0, len(rows) - BLOCK * len(self._tracks))]))
        return sorted(findings, key=lambda finding: finding.step)

    def _watchers(self) -> list[Watcher]:
        return [make() for make in self._make]

    def to_state(self) -> dict[str, Any]:
        tracks = {str(index): track.to_state() for index, track in self._tracks.items()}
        return {"milestones": self._milestones.to_state(), "tracks": tracks}

    def restore(self, state: dict[str, Any]) -> None:
        self._milestones.restore(state["milestones"])
        self._tracks = {}
        for index, inner in state["tracks"].items():
            track = _Track(self._watchers(), Past.from_state(inner["past"], self._milestones))
            track.restore(inner)
            self._tracks[int(index)] = track


class _Track:
    """One optimizer: its blocks, its past, its watchers."""

    def __init__(self, watchers: list[Watcher], past: Past) -> None:
        self.past = past
        self._watchers = watchers
        self._blocks = Blocks()

    def begin(self) -> None:
        self._blocks = Blocks()
        self.past.begin()
        for watcher in self._watchers:
            watcher.begin()

    def observe(self, seen: Observation, index: int, rows: Rows) -> list[Finding]:
        self.past.see_first(int(rows.step[0]), float(rows["loss"][0]))
        findings: list[Finding] = []
        for block in self._blocks.add(rows):
            self.past.add(block)
            now = Moment(seen, index, block, self.past)
            for watcher in list(self._watchers):
                try:
                    news = watcher.judge(now)
                except Exception:
                    # As in the ledger: a watcher that fails on somebody's odd journal must not take the others along.
                    _log.exception("detector-failed run=%s detector=%s", seen.facts and seen.facts.run, watcher.code)
                    self._watchers.remove(watcher)
                    continue
                findings += news
                for finding in news:
                    (self.past.troubles.add if finding.active else self.past.troubles.discard)(finding.code)
        return findings

    def to_state(self) -> dict[str, Any]:
        return {
            "past": self.past.to_state(),
            "blocks": self._blocks.to_state(),
            "watchers": {watcher.code: watcher.to_state() for watcher in self._watchers},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._blocks = Blocks.from_state(state["blocks"])
        for watcher in self._watchers:
            if watcher.code in state["watchers"]:
                watcher.restore(state["watchers"][watcher.code])
