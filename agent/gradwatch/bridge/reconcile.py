"""Making up for webhooks that were missed: what Alertmanager holds now, against what stands in MLflow.

After MLflow was away (and every few minutes, since a post may also be lost on
its way) the alerts that Alertmanager lists are written like those of a webhook.
A tag that stands at firing while Alertmanager does not list its alert any more
is resolved, but only once it has been missing for a while: an Alertmanager that
was just started knows nothing until Prometheus tells it again.

An alert that fired and was resolved while MLflow was away is in neither: tags
are best effort, and what was found reaches MLflow from the agent.
"""

from __future__ import annotations

import json
import logging
import time
import urllib.request
from collections.abc import Callable, Iterable
from typing import Final

from gradwatch.bridge.alerts import TAG_PREFIX, Alert, Life, parse_alerts, read_tag
from gradwatch.bridge.records import RunRecord

_log = logging.getLogger("gradwatch.bridge")

_REQUEST_SECONDS: Final = 15.0
_MAX_BYTES: Final = 64 * 2**20
#: Seconds for which an alert must have been missing before it counts as resolved.
MISSING_SECONDS: Final = 300.0


def active_alerts(alertmanager: str) -> list[Alert]:
    """What Alertmanager holds: active, silenced and inhibited alerts. Raises ``OSError``, ``ValueError``."""
    url = f"{alertmanager.rstrip('/')}/api/v2/alerts?active=true&silenced=true&inhibited=true&unprocessed=true"
    with urllib.request.urlopen(url, timeout=_REQUEST_SECONDS) as answer:
        body = answer.read(_MAX_BYTES + 1)
    if len(body) > _MAX_BYTES:
        raise ValueError(f"{alertmanager} lists more than {_MAX_BYTES >> 20} MiB of alerts")
    listed = json.loads(body)
    if not isinstance(listed, list):
        raise ValueError(f"{alertmanager} answered with no list of alerts")
    alerts, refused = parse_alerts(listed)
    if refused:
        _log.warning("reconcile-refused count=%d first=%s", len(refused), refused[0])
    return alerts


class Reconciler:
    """Compares what is active with what tags say. ``wall`` is Unix time."""

    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._wall = wall
        self._missing: dict[tuple[str, str, int], float] = {}

    def outdated(self, runs: Iterable[RunRecord], active: Iterable[Alert]) -> list[Alert]:
        """For each tag that stands at firing and whose alert has been gone for a while, the alert as resolved now."""
        now = self._wall()
        held = {alert.fingerprint for alert in active}
        missing: dict[tuple[str, str, int], float] = {}
        gone: list[Alert] = []
        for record in runs:
            for tag, text in record.firing.items():
                for life in read_tag(text).values():
                    if not life.firing or life.fingerprint in held:
                        continue
                    key = record.run_id, life.fingerprint, life.starts
                    missing[key] = self._missing.get(key, now)
                    if now >= missing[key] + MISSING_SECONDS:
                        name, labels = tag.removeprefix(TAG_PREFIX), {"run": record.run, "model": record.model}
                        gone.append(_over(name, life, labels, int(now * 1000)))
        self._missing = missing
        return gone


def _over(name: str, life: Life, labels: dict[str, str], now: int) -> Alert:
    """An alert that is over, as far as anybody knows now."""
    return Alert(name, life.fingerprint, False, life.starts, max(now, life.starts), labels, {}, inferred=True)
