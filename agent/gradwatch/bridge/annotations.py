"""Alerts as annotations in Grafana, over its HTTP API: best effort, on a thread of its own.

An annotation is found again by a tag that names its alert, so that a second
telling, or one after a restart, changes it instead of adding another.
"""

from __future__ import annotations

import json
import logging
import threading
import urllib.parse
import urllib.request
from collections import Counter, deque
from typing import Any, Final

from gradwatch.bridge.alerts import Alert

_log = logging.getLogger("gradwatch.bridge")

#: Annotations that wait at most; the oldest fall out, counted as failed.
MAX_WAITING: Final = 1000
_REQUEST_SECONDS: Final = 10.0
_LABELS: Final = ("alertname", "severity", "model", "run")


class Annotations:
    """Writes an annotation for each alert given.

    Args:
        url: Grafana's address, like ``http://grafana:3000``.
        token: of a service account that may write annotations.
    """

    def __init__(self, url: str, token: str) -> None:
        self._url, self._token = url.rstrip("/"), token
        self._alerts: deque[Alert] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        #: Annotations by what became of them.
        self.counts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._run, name="gradwatch-grafana", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, seconds: float) -> None:
        """Write what waits, for at most so long."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(seconds)

    def put(self, alert: Alert) -> None:
        """Have an alert written; never waits."""
        with self._changed:
            if len(self._alerts) >= MAX_WAITING:
                self._alerts.popleft()
                self.counts["failed"] += 1
            self._alerts.append(alert)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._alerts or self._stopping)
                if not self._alerts:
                    return
                alert = self._alerts.popleft()
            try:
                self.write(alert)
                self.counts["written"] += 1
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.counts["failed"] += 1
                _log.warning("annotation-failed alert=%s error=%s", alert.name, error)

    def write(self, alert: Alert) -> None:
        """Add an annotation, or give the end to the one that is there. Raises ``OSError``, ``ValueError``."""
        mark = f"gradwatch.alert={alert.fingerprint}-{alert.starts}"
        query = urllib.parse.urlencode({"tags": mark, "type": "annotation", "limit": "1"})
        there = self._call("GET", f"/api/annotations?{query}")
        body: dict[str, Any] = {"time": alert.starts, "tags": self.tags(alert, mark), "text": text_of(alert)}
        if not alert.firing:
            body["timeEnd"] = alert.ends
        if not there:
            self._call("POST", "/api/annotations", body)
        elif not alert.firing:
            self._call("PATCH", f"/api/annotations/{int(there[0]['id'])}", body)

    @staticmethod
    def tags(alert: Alert, mark: str) -> list[str]:
        """``gradwatch``, by which dashboards find it; then what it is about; last its mark."""
        about = [alert.labels[name] for name in _LABELS if alert.labels.get(name)]
        return list(dict.fromkeys(["gradwatch", *about, mark]))

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=_REQUEST_SECONDS) as answer:
            return json.loads(answer.read(2**20) or b"null")


def text_of(alert: Alert) -> str:
    """What the annotation says: the alert's summary, else its name."""
    return f"{alert.name}: {alert.annotations['summary']}" if alert.annotations.get("summary") else alert.name
