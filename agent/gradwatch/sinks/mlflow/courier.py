"""The two threads that carry outboxes to MLflow: one for the tracking store, one for artifacts.

A run that fails waits, longer from failure to failure; the others go on.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gradwatch.sinks.mlflow.complaints import Complaints
from gradwatch.sinks.mlflow.delivery import Delivery
from gradwatch.sinks.mlflow.outbox import Outbox
from gradwatch.sinks.mlflow.tracking import Kind, Tracking, TrackingError, scrub

#: Seconds that artifacts of an ended run are tried after its status was told.
ARTIFACT_PATIENCE: Final = 60.0
#: Longest pause after a failure while the sink closes, in seconds.
CLOSING_PAUSE: Final = 0.5
_FAR: Final = float("inf")


@dataclass(frozen=True, slots=True)
class Pauses:
    """Pauses after failures, in seconds: exponential from ``first`` to ``longest``, jittered over the upper half."""

    first: float
    longest: float
    denied: float

    def after(self, failures: int, kind: Kind) -> float:
        """The pause after so many failures in a row. Where somebody has to act, it is the slow one."""
        if kind in (Kind.DENIED, Kind.REJECTED):
            whole = self.denied
        else:
            whole = min(self.longest, self.first * 2.0 ** min(failures - 1, 30))
        return whole * random.uniform(0.5, 1.0)


class Courier:
    """Carries ``boxes`` until closed. ``lock`` guards the boxes and all that is in them."""

    def __init__(
        self,
        tracking: Tracking,
        complaints: Complaints,
        clock: Callable[[], float],
        pauses: Pauses,
        verify_after: tuple[float, ...],
    ) -> None:
        self.lock = threading.Condition()
        self.boxes: dict[str, Outbox] = {}
        #: Nothing can ever be delivered.
        self.off = False
        self.closing = False
        self._stopped = False
        self._tracking = tracking
        self._complaints = complaints
        self._clock = clock
        self._pauses = pauses
        self._delivery = Delivery(tracking, self.lock, clock, complaints, verify_after)
        self._threads: list[threading.Thread] = []

    def wake(self) -> None:
        """Something was queued. Called with the lock held."""
        if not self._threads and not self._stopped:
            loops = {"gradwatch-mlflow": self._track, "gradwatch-mlflow-artifacts": self._upload}
            self._threads = [threading.Thread(target=loop, name=name, daemon=True) for name, loop in loops.items()]
            for thread in self._threads:
                thread.start()
        self.lock.notify_all()

    def drain(self, deadline: float) -> None:
        """Deliver what waits until ``deadline`` (by the clock), then stop."""
        with self.lock:
            self.closing = True
            for box in self.boxes.values():
                box.due = 0.0
                box.artifacts = dict.fromkeys(box.artifacts, 0.0)
            self.lock.notify_all()
        for thread in self._threads:
            thread.join(max(0.0, deadline - self._clock()))
        with self.lock:
            self._stopped = True
            self.lock.notify_all()

    # -- the threads

    def _track(self) -> None:
        while (box := self._next(self._tracking_due)) is not None:
            try:
                self._delivery.deliver(box)
            except TrackingError as error:
                self._tracking_failed(box, error)
            except Exception as error:
                self._tracking_failed(box, TrackingError(Kind.RETRY, scrub(error)))
            else:
                box.failures, box.due = 0, 0.0
                self._complaints.delivered()
            self._settle(box)

    def _upload(self) -> None:
        while (box := self._next(self._artifact_due)) is not None:
            with self.lock:
                path = min(box.artifacts, key=lambda name: box.artifacts[name])
                del box.artifacts[path]
                box.uploading = path
            try:
                self._tracking.upload(str(box.target.run_id), box.artifact_file(path), path.rpartition("/")[0])
            except TrackingError as error:
                self._upload_failed(box, path, error)
            except Exception as error:
                self._upload_failed(box, path, TrackingError(Kind.RETRY, scrub(error)))
            else:
                box.artifact_failures = 0
                self._complaints.delivered()
            box.uploading = None
            self._settle(box)

    def _next(self, due: Callable[[Outbox], float]) -> Outbox | None:
        """The next outbox with something due, in turn; None when the sink closes and all is done or time is over."""
        with self.lock:
            while not self._stopped:
                now = self._clock()
                times = {run: due(box) for run, box in self.boxes.items()}
                ready = next((run for run, time in times.items() if time <= now), None)
                if ready is not None:
                    box = self.boxes.pop(ready)
                    self.boxes[ready] = box  # to the end: each in turn
                    return box
                if self.closing and not any(box.waiting() for box in self.boxes.values()):
                    self.lock.notify_all()
                    return None
                self.lock.wait(max(0.0, min(min(times.values(), default=_FAR) - now, 60.0)))
            return None

    def _tracking_due(self, box: Outbox) -> float:
        if box.target.gone or not box.to_track():
            return _FAR
        only_end = box.resolved and not (box.params or box.tags or box.rows or box.under_way)
        return max(box.due, self._delivery.end_due(box)) if only_end else box.due

    def _artifact_due(self, box: Outbox) -> float:
        if box.target.gone or not box.resolved:
            return _FAR
        return min(box.artifacts.values(), default=_FAR)

    def _settle(self, box: Outbox) -> None:
        """After a delivery: forget a run that has ended and is delivered; its mirror stays."""
        with self.lock:
            target = box.target
            if box.end is None and target.told >= target.attempt and box.told_at is None:
                box.told_at = self._clock()
            if box.told_at is not None and not box.waiting():
                self.boxes.pop(target.run, None)
            self.lock.notify_all()

    # -- failures

    def _tracking_failed(self, box: Outbox, error: TrackingError) -> None:
        with self.lock:
            if error.kind is Kind.UNUSABLE:
                self._give_up(str(error))
                return
            if error.kind is Kind.GONE:
                box.target.gone = True
                count = box.clear()
                box.save()
                self._complaints.say(f"{box.target.run}: {error}; nothing more is sent to it")
                self._complaints.dropped(count, "")
                return
            box.failures += 1
            box.due = self._clock() + self._pause(box.failures, error.kind)
            waiting = sum(other.waiting() for other in self.boxes.values())
        self._complaints.failed(str(error), waiting)

    def _upload_failed(self, box: Outbox, path: str, error: TrackingError) -> None:
        with self.lock:
            now = self._clock()
            late = box.told_at is not None and now > box.told_at + ARTIFACT_PATIENCE
            if late or error.kind in (Kind.REJECTED, Kind.UNUSABLE):
                self._complaints.dropped(1, f"artifact {path}: {error}")
                return
            if box.target.gone:
                return
            box.artifact_failures += 1
            again = now + self._pause(box.artifact_failures, error.kind)
            box.artifacts = {name: max(time, again) for name, time in {**box.artifacts, path: again}.items()}
            waiting = sum(other.waiting() for other in self.boxes.values())
        self._complaints.failed(f"artifact {path}: {error}", waiting)

    def _pause(self, failures: int, kind: Kind) -> float:
        pause = self._pauses.after(failures, kind)
        return min(pause, CLOSING_PAUSE) if self.closing else pause

    def _give_up(self, why: str) -> None:
        self.off = True
        self._complaints.say(f"{why}; nothing is sent to MLflow")
        self._complaints.dropped(sum(box.clear() for box in self.boxes.values()), "")
        self.boxes.clear()
