"""Ghosts: runs that stand at RUNNING and give no sign of life; counted, and closed only where asked for.

A run is closed (``--reap on``) only if all of this holds: it carries our
heartbeat, and that is older than 24 hours; MLflow was reachable in all that
time, so that the heartbeat could have been written; Prometheus, which must be
seen to scrape this very bridge, had no series of the run in the last hour; it
was announced an hour before and is a candidate still; and read once more, it
stands as it stood. ``dry-run`` announces and closes nothing.

A run that was closed and beats again is opened again, by the bridge for the
same attempt, by its agent for a new one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final, Literal

from gradwatch.bridge.alerts import written
from gradwatch.bridge.records import REAPED_HEARTBEAT_TAG, REAPED_TAG, RunRecord, has_ended, record_of
from gradwatch.catalog import BY_NAME
from gradwatch.sinks.mlflow.delivery import STATUS_BY
from gradwatch.sinks.mlflow.entities import PREFIX, tag_text
from gradwatch.sinks.mlflow.history import History

_log = logging.getLogger("gradwatch.bridge")

Mode = Literal["off", "dry-run", "on"]

#: Seconds without a sign of life after which a run counts as a ghost: ten missed heartbeats.
GHOST_SECONDS: Final = 600.0
#: Age of the heartbeat from which on a ghost may be closed.
REAP_SECONDS: Final = 24 * 3600.0
#: Seconds between the announcement and the closing.
NOTICE_SECONDS: Final = 3600.0
#: Longest gap between two good polls over which MLflow counts as reachable.
REACHABLE_GAP: Final = 300.0
#: Runs that are closed in one poll.
MAX_REAPED: Final = 20
_REQUEST_SECONDS: Final = 10.0

#: Of the given runs, those that have a live series; raises ``OSError`` or ``ValueError`` where that is not known.
Live = Callable[[Sequence[str]], set[str]]


def is_ghost(record: RunRecord, now: float) -> bool:
    """Whether a run at RUNNING has given no sign of life for ten minutes, or never gave one."""
    return record.status == "RUNNING" and now - record.seen_at > GHOST_SECONDS


class Reachable:
    """For how long MLflow has been reachable, by the polls that went well."""

    def __init__(self) -> None:
        self._since = math.inf
        self._last = -math.inf

    def good(self, now: float) -> None:
        if now - self._last > REACHABLE_GAP:
            self._since = now
        self._last = now

    def seconds(self, now: float) -> float:
        """0 where the last good poll is too long ago."""
        return now - self._since if now - self._last <= REACHABLE_GAP else 0.0


class Reaper:
    """Closes ghosts under the guards of this module, and opens again what beats again.

    Args:
        history: the server.
        mode: what to do with candidates.
        live: asks Prometheus; None allows no closing.
        reap_after: age of the heartbeat in seconds.
        notice: seconds between announcement and closing.
        wall: Unix time.
    """

    def __init__(
        self,
        history: History,
        mode: Mode,
        live: Live | None,
        reap_after: float = REAP_SECONDS,
        notice: float = NOTICE_SECONDS,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._history, self._mode, self._live = history, mode, live
        self._reap_after, self._notice = reap_after, notice
        self._wall = wall
        #: Candidates by MLflow's id: when they were announced, and the heartbeat that they had then.
        self.announced: dict[str, tuple[float, float]] = {}
        self.reaped = 0

    def candidates(self, running: Iterable[RunRecord], reachable: float) -> list[RunRecord]:
        """Runs that carry our heartbeat, an old one, while MLflow could have taken a new one all the time."""
        if self._mode == "off" or reachable < self._reap_after:
            return []
        oldest = self._wall() - self._reap_after
        return [r for r in running if r.status == "RUNNING" and r.is_ours and 0 < r.heartbeat < oldest]

    def look(self, running: Iterable[RunRecord], reachable: float) -> None:
        """Announce candidates, close those that were announced long enough ago. Raises ``TrackingError``."""
        now = self._wall()
        found = {record.run_id: record for record in self.candidates(running, reachable)}
        known = self.announced
        self.announced = {
            run_id: known[run_id] if known.get(run_id, (0, 0.0))[1] == record.heartbeat else (now, record.heartbeat)
            for run_id, record in found.items()
        }
        for run_id in self.announced.keys() - known.keys():
            _log.warning(
                "ghost run=%s mlflow_run=%s heartbeat=%s %s", found[run_id].run, run_id,
                written(int(found[run_id].heartbeat * 1000)),
                f"closed in {self._notice:.0f} s" if self._mode == "on" else "would be closed (dry run)",
            )  # fmt: skip
        due = [found[run_id] for run_id, (at, _) in self.announced.items() if now >= at + self._notice]
        if self._mode == "on" and due:
            self._close(due[:MAX_REAPED], now)

    def _close(self, due: Sequence[RunRecord], now: float) -> None:
        if self._live is None:
            return
        try:
            live = self._live([record.run for record in due])
        except (OSError, ValueError) as error:
            _log.warning("reap-skipped nobody is closed while Prometheus cannot be asked: %s", error)
            return
        for record in due:
            if record.run in live:
                _log.warning("reap-skipped run=%s has live series and no heartbeat", record.run)
                continue
            entity = self._history.run(record.run_id)
            again = record_of(entity) if entity is not None else None
            if again is None or again.status != "RUNNING" or again.heartbeat != record.heartbeat:
                continue
            self._history.set_tags(record.run_id, epitaph(record, now))
            self._history.set_terminated(record.run_id, "FAILED", record.heartbeat)
            self.reaped += 1
            _log.warning("reaped run=%s mlflow_run=%s", record.run, record.run_id)

    def reopen(self, experiments: Sequence[str]) -> None:
        """Open what the bridge has closed and what beats again; close it truly where its agent told an end since."""
        where = f"tags.`{REAPED_TAG}` LIKE 'closed%'"
        for entity in self._history.runs(experiments, where, "attributes.start_time DESC", 100, None).items:
            record = record_of(entity)
            if record.reaped_at is None or not _is_back(record, record.reaped_at):
                continue
            if record.status == "FAILED":
                self._history.set_running(record.run_id)
            if has_ended(record) and record.status != "RUNNING":
                status = {"finished": "FINISHED", "killed": "KILLED"}.get(record.state, "FAILED")
                self._history.set_terminated(record.run_id, status, record.heartbeat)
            told = f"opened again {written(int(self._wall() * 1000))}: it was alive; {entity.data.tags[REAPED_TAG]}"
            self._history.set_tags(record.run_id, {REAPED_TAG: tag_text(told), STATUS_BY: ""})
            _log.warning("reopened run=%s mlflow_run=%s", record.run, record.run_id)


def _is_back(record: RunRecord, heartbeat: float) -> bool:
    """Whether anybody but the bridge has touched a run since it was closed with this heartbeat."""
    return record.status == "RUNNING" or record.heartbeat > heartbeat or record.state != "abrupt"


def epitaph(record: RunRecord, now: float) -> dict[str, str]:
    """Tags that say who closed a run, when and why, and with what heartbeat, by which its return is known."""
    why = (
        f"closed {written(int(now * 1000))} by gradwatch bridge on {socket.gethostname()} (process {os.getpid()}): "
        f"no heartbeat since {written(int(record.heartbeat * 1000))}, MLflow reachable all the time, no live series"
    )
    return {
        REAPED_TAG: tag_text(why),
        REAPED_HEARTBEAT_TAG: str(int(record.heartbeat)),
        f"{PREFIX}state": "abrupt",
        f"{PREFIX}reason": tag_text(why),
        STATUS_BY: record.attempt or "0",
    }


# -- Prometheus


def live_series(prometheus: str) -> Live:
    """A question to a Prometheus: which of these runs had a series in the last hour?

    It must be seen to scrape this bridge, since one that scrapes nothing would
    find every run dead.
    """
    state, mine = BY_NAME["run_state"].exposed, BY_NAME["bridge_last_poll_timestamp_seconds"].exposed

    def live(runs: Sequence[str]) -> set[str]:
        if not _query(prometheus, f"last_over_time({mine}[10m])"):
            raise ValueError(f"{prometheus} does not scrape this bridge ({mine} is not there)")
        found: set[str] = set()
        for run in runs:
            for labels in _query(prometheus, f"last_over_time({state}{{run={json.dumps(run)}}}[1h])"):
                found.add(str(labels.get("run", "")))
        return found

    return live


def _query(prometheus: str, expression: str) -> list[Mapping[str, str]]:
    """Labels of the series of an instant query."""
    query = urllib.parse.urlencode({"query": expression})
    url = f"{prometheus.rstrip('/')}/api/v1/query"
    request = urllib.request.Request(url, query.encode(), {"Content-Type": "application/x-www-form-urlencoded"})
    with urllib.request.urlopen(request, timeout=_REQUEST_SECONDS) as answer:
        document = json.loads(answer.read(10 * 2**20))
    try:
        return [dict(series["metric"]) for series in document["data"]["result"]]
    except (KeyError, TypeError):
        raise ValueError(f"{prometheus} gave no answer to {expression}") from None
