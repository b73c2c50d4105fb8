"""One run over all its ranks in one directory: what the agent polls, shows and keeps on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from gradwatch.collect.combine import GlobalNorms, shares
from gradwatch.collect.fold import RunFold, Told
from gradwatch.collect.life import Motion, sigterm_stack, true_end, untold_end
from gradwatch.collect.model import RunEnd, RunFacts
from gradwatch.collect.rows import F64, Rows
from gradwatch.collect.tail import Polled, RankTail
from gradwatch.journal import JournalReader, PayloadRows
from gradwatch.journal.layout import Place
from gradwatch.journal.manifest import Manifest

#: Version of the state that an agent keeps of a run; another one's is not read.
STATE_VERSION: Final = 1
#: Rows of the table that is kept of a run's last steps.
LAST_STEPS: Final = 1_000


@dataclass(slots=True)
class RankView:
    """The present values of one rank; None where not known."""

    step: int | None = None
    grad_norm: float | None = None
    grad_norm_local: float | None = None
    #: What it adds to the square of the global norm; None where every rank holds the whole of it.
    grad_norm_squares: float | None = None
    step_duration: float | None = None
    last_time: float | None = None
    probe_seconds: float = 0.0

    def take(self, counted: Rows, newest: Rows | None) -> None:
        """Take in rows that count now; ``newest`` may be a row whose device values are still under way."""
        rows = counted.take(counted.plausible)
        spent = rows["probe_seconds"]
        self.probe_seconds += float(spent[np.isfinite(spent) & (spent >= 0)].sum())
        if len(rows):
            self.grad_norm = _known(rows["grad_norm"], rows.broken)
            self.grad_norm_local = _known(rows["grad_norm_l2"], rows.broken)
        last = newest.take(newest.plausible) if newest is not None else rows
        last = last if len(last) else rows
        if len(last):
            self.step, self.last_time = int(last.step[-1]), float(last.time[-1])
            self.step_duration = _known(last["duration"], np.zeros(len(last), np.bool_))


@dataclass(slots=True)
class Observation:
    """What one poll of one rank tells detectors and sinks."""

    rank: int
    attempt: int
    #: The run's facts; None while rank 0 of this run was not seen.
    facts: RunFacts | None
    #: Rows that are final now, in order.
    rows: Rows
    events: list[dict[str, Any]]
    #: Row -> names of tensors that were not finite.
    broken: Mapping[int, list[str]]
    #: The rank's own manifest, and its samples, which may come before the rows of their steps.
    manifest: Manifest
    samples: PayloadRows
    told: Told = field(default_factory=Told)
    begun: bool = False
    closed: bool = False


class RunTail:
    """Follows all ranks of a run. Rank 0 speaks for the run; where it is not here, only rank series exist."""

    def __init__(
        self,
        run: str,
        *,
        monotonic: Callable[[], float],
        wall: Callable[[], float],
        boot_id: str = "",
    ) -> None:
        self.run = run
        self.fold = RunFold(run)
        self.ranks: dict[int, RankTail] = {}
        self.views: dict[int, RankView] = {}
        #: How the present attempt ended; None while it lives.
        self.end: RunEnd | None = None
        #: The last steps of the attempt that ended, as a table.
        self.last_steps: dict[str, list[float]] = {}
        #: Whether polls can bring more at once.
        self.more = False
        self._monotonic, self._boot_id = monotonic, boot_id
        self._motion = Motion(monotonic, wall)
        self._norms: GlobalNorms | None = None
        self._norms_attempt = -1
        #: By rank: the attempt whose manifest was looked at, and the weight of each of its tensors.
        self._shares: dict[int, tuple[int, F64 | None]] = {}

    # -- what is there

    def offer(self, place: Place) -> bool:
        """An attempt of a rank was found; whether it is new here."""
        tail = self.ranks.get(place.rank)
        if tail is None:
            tail = self.ranks[place.rank] = RankTail(place.rank, self._monotonic)
            self.views[place.rank] = RankView()
        return tail.offer(place.attempt, place.path)

    @property
    def lead(self) -> RankTail:
        """The rank that tells how the run lives: rank 0, or the first one here."""
        return self.ranks[min(self.ranks)]

    @property
    def over(self) -> bool:
        """Whether everything that is here has been read, and nobody writes."""
        return all(tail.finished for tail in self.ranks.values())

    @property
    def ended(self) -> bool:
        """Whether the run has ended, as far as it is here."""
        return self.end is not None and self.over

    @property
    def state(self) -> str:
        """One of the catalogue's ``RUN_STATES``."""
        if self.end is not None:
            return self.end.state
        return self._motion.state(self.fold.stepped if 0 in self.ranks else True, self.fold.pace)

    @property
    def last_step(self) -> int:
        """The highest number among the optimizers' last steps; -1 before the first."""
        return max((fold.step for fold in self.fold.optimizers.values()), default=-1)

    @property
    def troubles(self) -> Sequence[str]:
        """What cannot be read here, in words."""
        return [tail.trouble for tail in self.ranks.values() if tail.trouble]

    # -- reading

    def poll(self) -> list[Observation]:
        """Read every rank once, rank 0 first: it says who the run is, and nothing of the others is read before."""
        self.more = False
        seen = []
        for rank in sorted(self.ranks):
            polled = self.ranks[rank].poll()
            if polled is not None:
                seen.append(self._observe(rank, polled))
            elif rank == 0 and self.fold.facts is None and not self.ranks[0].trouble:
                break
        return seen

    def _observe(self, rank: int, polled: Polled) -> Observation:
        tail = self.ranks[rank]
        self.more |= polled.more
        assert tail.manifest is not None
        if polled.begun is not None:
            self._begin(rank, polled.attempt, polled.begun)
        progress = polled.progress
        self.views[rank].take(progress.counted, tail.line.newest)
        if self._norms is not None and polled.attempt == self._norms_attempt:
            self._norms.add(rank, polled.tensors)
        if len(polled.tensors) and (tail.sharded or tail.manifest.world_size == 1):
            self.views[rank].grad_norm_squares = self._squares(rank, polled)
        told = Told()
        if rank == 0:
            told = self.fold.take(progress, polled.tensors, polled.samples, polled.events)
            told.facts_changed |= polled.begun is not None
            if polled.closed:
                rest = self.fold.end_attempt()
                told.windows += rest.windows
                told.validations += rest.validations
        if tail is self.lead:
            self._note_motion(rank, polled)
            if polled.closed:
                self._close(tail)
        return Observation(
            rank=rank,
            attempt=polled.attempt,
            facts=self.fold.facts,
            rows=progress.final,
            events=polled.events,
            broken=tail.broken,
            manifest=tail.manifest,
            samples=polled.samples,
            told=told,
            begun=polled.begun is not None,
            closed=polled.closed,
        )

    def _squares(self, rank: int, polled: Polled) -> float | None:
        """What the newest row of a rank's shards adds to the square of the global norm."""
        attempt, share = self._shares.get(rank, (-1, None))
        if attempt != polled.attempt:
            manifest = self.ranks[rank].manifest
            share = None if manifest is None else shares(manifest)
            self._shares[rank] = polled.attempt, share
        newest = polled.tensors.values[-1].astype(np.float64)
        if share is None or len(share) != len(newest):
            return None
        return float(np.where(np.isnan(newest), 0.0, newest**2) @ share)

    def _note_motion(self, rank: int, polled: Polled) -> None:
        """When the run last gave a sign of life: what is read late must not look as if it were new."""
        times = [event["time"] for event in polled.events if isinstance(event.get("time"), int | float)]
        if polled.begun is not None:
            times.append(polled.begun.start_time)
        if len(polled.progress.counted):
            times.append(self.views[rank].last_time or 0.0)
        if times:
            self._motion.moved_at(max(times))

    def _begin(self, rank: int, attempt: int, manifest: Manifest) -> None:
        tail = self.ranks[rank]
        if tail is self.lead:
            self.end, self.last_steps = None, {}
        if rank == 0:
            self.fold.begin_attempt(attempt, manifest)
        self._join(rank, attempt, manifest)

    def _join(self, rank: int, attempt: int, manifest: Manifest) -> None:
        """Where ranks hold shards: take part in the global norm of this attempt."""
        if not self.ranks[rank].sharded or manifest.world_size < 2 or attempt < self._norms_attempt:
            return
        if self._norms is None or attempt > self._norms_attempt:
            self._norms, self._norms_attempt = GlobalNorms(manifest.world_size), attempt
        self._norms.join(rank, manifest)
        if 0 in self.ranks:
            self.ranks[0].line.global_norm = None if self._norms.hopeless else self._norms.norm

    def _close(self, tail: RankTail) -> None:
        view = self.views[tail.rank]
        assert tail.manifest is not None
        time, step = view.last_time or tail.manifest.start_time, -1 if view.step is None else view.step
        untold = untold_end(tail.manifest, self._boot_id, time, step)
        stack = sigterm_stack(tail.path) if tail.end is None and tail.path is not None else ""
        self.end = true_end(tail.end, tail.word, stack, tail.manifest, untold)

    def last_rows(self) -> dict[str, list[float]]:
        """The last steps of the lead rank's present attempt, column by column; empty where its journal is gone."""
        tail = self.lead
        path = tail.path
        if path is None:
            return {}
        try:
            reader = JournalReader(path)
        except Exception:
            return {}
        try:
            rows = reader.last_steps(LAST_STEPS)
        finally:
            reader.close()
        table = {"step": rows.step.astype(float).tolist(), "time": rows.time.tolist()}
        return table | {name: rows[name].tolist() for name in rows.columns}

    def release(self) -> None:
        for tail in self.ranks.values():
            tail.release()

    # -- between two lives of the agent

    def to_state(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "fold": self.fold.to_state() if self.fold.facts is not None else None,
            "ranks": {str(rank): tail.to_state() for rank, tail in self.ranks.items()},
            "views": {
                str(rank): {name: getattr(view, name) for name in RankView.__dataclass_fields__}
                for rank, view in self.views.items()
            },
            "end": None if self.end is None else {k: getattr(self.end, k) for k in RunEnd.__dataclass_fields__},
            "norms": None if self._norms is None else [self._norms_attempt, self._norms.to_state()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a former agent stood; call it when the places are offered. Raises where it cannot."""
        if state["version"] != STATE_VERSION:
            raise ValueError(f"state of version {state['version']}, this agent keeps version {STATE_VERSION}")
        manifests = {}
        for text, inner in state["ranks"].items():
            tail = self.ranks.get(int(text))
            if tail is None:
                raise ValueError(f"rank {text} is gone")
            tail.restore(inner)
            if tail.attempt >= 0:
                manifests[tail.rank] = tail.read_manifest()
        for text, fields in state["views"].items():
            self.views[int(text)] = RankView(**fields)
        if state["fold"] is not None:
            self.fold = RunFold.from_state(self.run, state["fold"], self.ranks[0].attempt, manifests[0])
            self._motion.moved_at(self.fold.last_time or manifests[0].start_time)
        self.end = None if state["end"] is None else RunEnd(**state["end"])
        for rank, manifest in manifests.items():
            self._join(rank, self.ranks[rank].attempt, manifest)
        if state["norms"] is not None and self._norms is not None and state["norms"][0] == self._norms_attempt:
            self._norms.restore(state["norms"][1])


def _known(column: np.ndarray[Any, np.dtype[np.float64]], broken: np.ndarray[Any, np.dtype[np.bool_]]) -> float | None:
    """The last value of a column; NaN means "not known", unless the gradient was broken."""
    value = float(column[-1])
    return None if np.isnan(value) and not broken[-1] else value
