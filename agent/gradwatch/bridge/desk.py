"""The desk where webhooks wait until they are written: one worker, all posts in turn.

Nothing is kept here over a restart, and nothing has to be: a post is answered
when its alerts are in MLflow, until then Alertmanager holds it and tells it
again. What arrives together is written together, so that a burst costs fewer
calls to MLflow, and a post of ten thousand alerts does not hold up the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final, Protocol

from gradwatch.bridge.alerts import Alert
from gradwatch.bridge.tagging import Result

_log = logging.getLogger("gradwatch.bridge")

#: Alerts of one post in one batch, so that a long post does not hold up the others.
SHARE: Final = 100
#: Alerts in one batch.
BATCH: Final = 500
#: Alerts that wait at most; beyond, posts are refused with 503 and told again later.
MAX_WAITING: Final = 50_000


class Applies(Protocol):
    def apply(self, alerts: Sequence[Alert]) -> list[Result]: ...


@dataclass(slots=True)
class Post:
    """A webhook that waits: alerts still to be written, and what became of the others."""

    alerts: deque[Alert]
    answer: Future[Counter[Result]]
    results: Counter[Result] = field(default_factory=Counter)


class Desk:
    """Takes alerts from any thread and has them written by one.

    Args:
        tagger: writes batches.
        on_outcome: called after each batch with whether MLflow took it.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        tagger: Applies,
        on_outcome: Callable[[bool], None] = lambda good: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tagger = tagger
        self._on_outcome = on_outcome
        self._clock = clock
        self._posts: deque[Post] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="gradwatch-desk", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Finish the batch under way and answer the rest with ``failed``; Alertmanager tells it again."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds)

    @property
    def waiting(self) -> int:
        with self._changed:
            return sum(len(post.alerts) for post in self._posts)

    def submit(self, alerts: Sequence[Alert]) -> Future[Counter[Result]] | None:
        """A promise of how many alerts came to which result; None where too many wait, or the desk closes."""
        post = Post(deque(alerts), Future())
        if not alerts:
            post.answer.set_result(Counter())
            return post.answer
        with self._changed:
            if self._stopping or sum(len(p.alerts) for p in self._posts) + len(alerts) > MAX_WAITING:
                return None
            self._posts.append(post)
            self._changed.notify_all()
        return post.answer

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._posts or self._stopping)
                if self._stopping:
                    self._fail_all()
                    return
                batch = self._take()
            results = self._apply([alert for _, alert in batch])
            with self._changed:
                for (post, _), result in zip(batch, results, strict=True):
                    post.results[result] += 1
                good = set(results) != {"failed"}
                if not good:
                    self._fail_all()
                for post in {id(p): p for p, _ in batch}.values():
                    if not post.alerts and not post.answer.done():
                        post.answer.set_result(post.results)
            self._on_outcome(good)

    def _take(self) -> list[tuple[Post, Alert]]:
        """A share of each waiting post, oldest first; posts that still have some go to the end."""
        batch: list[tuple[Post, Alert]] = []
        for _ in range(len(self._posts)):
            if len(batch) >= BATCH:
                break
            post = self._posts.popleft()
            batch += [(post, post.alerts.popleft()) for _ in range(min(SHARE, len(post.alerts)))]
            if post.alerts:
                self._posts.append(post)
        return batch

    def _apply(self, alerts: Sequence[Alert]) -> list[Result]:
        try:
            return self._tagger.apply(alerts)
        except Exception:
            _log.exception("desk-failed alerts=%d", len(alerts))
            return ["failed"] * len(alerts)

    def _fail_all(self) -> None:
        """MLflow is down: who waits learns it now, instead of after a time-out each."""
        while self._posts:
            post = self._posts.popleft()
            post.results["failed"] += len(post.alerts)
            post.alerts.clear()
            if not post.answer.done():
                post.answer.set_result(post.results)
