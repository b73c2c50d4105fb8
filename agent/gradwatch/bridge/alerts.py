"""Alertmanager's alerts as the bridge takes them, and what a tag says of them. Pure functions.

An alert is one (fingerprint, startsAt): a series that went over a line once.
Its life is firing, then resolved, and posts of it come late, twice or out of
order. A tag holds the newest life of each fingerprint of one alert name, so
that whatever order posts come in, the same text stands there in the end:
a newer start wins, and of one start, resolved wins.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from gradwatch.journal.manifest import clean_text
from gradwatch.sinks.mlflow.entities import PREFIX, safe_key

TAG_PREFIX: Final = f"{PREFIX}alert."
#: Lives that one tag tells; beyond, the oldest resolved ones go.
MAX_LIVES: Final = 8
#: Labels, annotations and text of one alert that are kept.
MAX_PAIRS: Final = 64
MAX_TEXT: Final = 2000

_FINGERPRINT: Final = re.compile(r"[0-9A-Za-z_-]{1,64}", re.ASCII)
#: Go writes nanoseconds; more than microseconds is more than Python reads.
_FRACTION: Final = re.compile(r"(\.\d{1,6})\d*")
_EPOCH: Final = datetime.fromtimestamp(0, UTC)
_BETWEEN: Final = " | "
_LIFE: Final = re.compile(
    r"(?P<status>firing since|resolved) (?P<starts>\S+?)(?: to (?P<ends>\S+?))?"
    r"(?:, step (?P<step>\d+))?(?: to step (?P<end_step>\d+))? \[(?P<fingerprint>[0-9A-Za-z_-]{1,64})\]",
    re.ASCII,
)


class WebhookError(ValueError):
    """A post, or an alert in it, that cannot be taken; the message says why."""


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert as it was told. Times are Unix milliseconds; ``ends`` is 0 while it fires."""

    name: str
    fingerprint: str
    firing: bool
    starts: int
    ends: int
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    url: str = ""
    #: Nobody told it, the bridge concluded that it is over: tagged, and no artifact is written over what was told.
    inferred: bool = False

    @property
    def key(self) -> tuple[str, int]:
        return self.fingerprint, self.starts

    @property
    def tag(self) -> str:
        """``gradwatch.alert.<name>``, as a key that every server takes."""
        return safe_key(TAG_PREFIX + self.name)

    @property
    def artifact(self) -> str:
        """``alerts/<fingerprint>-<startsAt>.json``; the time without colons, which some stores refuse."""
        return f"alerts/{self.fingerprint}-{written(self.starts).replace('-', '').replace(':', '')}.json"

    def document(self) -> str:
        """The artifact: the same bytes for the same alert, so that writing it again changes nothing."""
        whole = {
            "alertname": self.name,
            "status": "firing" if self.firing else "resolved",
            "fingerprint": self.fingerprint,
            "startsAt": written(self.starts),
            "endsAt": None if self.firing else written(self.ends),
            "labels": dict(self.labels),
            "annotations": dict(self.annotations),
            "generatorURL": self.url,
        }
        return json.dumps(whole, indent=2, sort_keys=True)


# -- reading


def parse_post(document: object) -> tuple[list[Alert], list[str]]:
    """The alerts of a webhook of version 4, and why others in it were refused.

    Raises:
        WebhookError: the post as a whole is none.
    """
    if not isinstance(document, Mapping):
        raise WebhookError("the body is not a JSON object")
    if document.get("version") != "4":
        raise WebhookError(f"webhook version {_shown(document.get('version'))}; this bridge reads version '4'")
    listed = document.get("alerts")
    if not isinstance(listed, Sequence) or isinstance(listed, str):
        raise WebhookError("'alerts' is not a list")
    return parse_alerts(listed)


def parse_alerts(listed: Iterable[object]) -> tuple[list[Alert], list[str]]:
    """Alerts as the webhook and ``/api/v2/alerts`` list them, and why others were refused."""
    alerts, refused = [], []
    for index, item in enumerate(listed):
        try:
            alerts.append(_parse(item))
        except WebhookError as error:
            refused.append(f"alerts[{index}]: {error}")
    return alerts, refused


def _parse(item: object) -> Alert:
    if not isinstance(item, Mapping):
        raise WebhookError("not a JSON object")
    labels = _pairs(item, "labels")
    name = labels.get("alertname", "")
    if not name:
        raise WebhookError("no label 'alertname'")
    fingerprint = item.get("fingerprint")
    if not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(fingerprint):
        raise WebhookError(f"fingerprint {_shown(fingerprint)}: expected up to 64 letters and digits")
    status = item.get("status")
    if isinstance(status, Mapping):  # /api/v2/alerts lists what is active, silenced or inhibited
        status = "firing"
    if status not in ("firing", "resolved"):
        raise WebhookError(f"status {_shown(status)}: expected 'firing' or 'resolved'")
    starts = _time(item, "startsAt")
    # While it fires, the end is the time at which Prometheus would let it go, or none.
    ends = max(_time(item, "endsAt"), starts)
    url = item.get("generatorURL", "")
    if not isinstance(url, str):
        raise WebhookError("'generatorURL' is not a string")
    firing = status == "firing"
    about = labels, _pairs(item, "annotations"), clean_text(url, MAX_TEXT)
    return Alert(name, fingerprint, firing, starts, 0 if firing else ends, *about)


def _pairs(item: Mapping[str, Any], name: str) -> dict[str, str]:
    pairs = item.get(name, {})
    if not isinstance(pairs, Mapping) or not all(isinstance(value, str) for value in pairs.values()):
        raise WebhookError(f"'{name}' is not an object of strings")
    if len(pairs) > MAX_PAIRS:
        raise WebhookError(f"more than {MAX_PAIRS} {name}")
    return {clean_text(key, MAX_TEXT): clean_text(value, MAX_TEXT) for key, value in pairs.items()}


def _time(item: Mapping[str, Any], name: str) -> int:
    """A time in Unix milliseconds: the webhook writes nanoseconds, the API milliseconds, and both mean one alert."""
    value = item.get(name)
    if not isinstance(value, str) or len(value) > 50:
        raise WebhookError(f"{name} {_shown(value)}: expected a time like 2026-01-31T12:00:00Z")
    try:
        when = datetime.fromisoformat(_FRACTION.sub(r"\1", value))
        if when.tzinfo is None:
            raise WebhookError(f"{name} {_shown(value)} has no time zone")
        # Go's zero time, year 1, is no time: as 1970.
        return max(0, (when - _EPOCH) // timedelta(milliseconds=1))
    except (ValueError, OverflowError) as error:
        if isinstance(error, WebhookError):
            raise
        raise WebhookError(f"{name} {_shown(value)}: expected a time like 2026-01-31T12:00:00Z") from None


def written(milliseconds: int) -> str:
    """A time as people and files read it: ``2026-01-31T12:00:00.000Z``."""
    moment = datetime.fromtimestamp(milliseconds / 1000, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{milliseconds % 1000:03d}Z"


def _shown(value: object) -> str:
    return clean_text(repr(value), 60)


# -- tags


@dataclass(frozen=True, slots=True)
class Life:
    """What a tag tells of one fingerprint: its newest life, and the run's step at both ends where known."""

    fingerprint: str
    firing: bool
    starts: int
    ends: int = 0
    step: int = -1
    end_step: int = -1

    def told_by(self, alert: Alert, step: int) -> Life:
        """This life after an alert of the same fingerprint; itself where that says nothing new."""
        if alert.starts < self.starts:
            return self
        if alert.starts > self.starts:
            return life_of(alert, step)
        if self.firing and not alert.firing:
            return replace(self, firing=False, ends=alert.ends, end_step=step)
        return self

    def __str__(self) -> str:
        text = f"firing since {written(self.starts)}" if self.firing else f"resolved {written(self.starts)}"
        text += f" to {written(self.ends)}" if not self.firing else ""
        text += f", step {self.step}" if self.step >= 0 else ""
        text += f" to step {self.end_step}" if self.end_step >= 0 else ""
        return f"{text} [{self.fingerprint}]"


def life_of(alert: Alert, step: int) -> Life:
    """A life of which this is the first word."""
    if alert.firing:
        return Life(alert.fingerprint, True, alert.starts, step=step)
    return Life(alert.fingerprint, False, alert.starts, alert.ends, end_step=step)


def read_tag(text: str) -> dict[str, Life]:
    """The lives that a tag tells, by fingerprint; what cannot be read is left out."""
    lives = {}
    for part in text.split(_BETWEEN):
        match = _LIFE.fullmatch(part.strip())
        if match is None:
            continue
        try:
            starts = _time(match.groupdict(), "starts")
            ends = _time(match.groupdict(), "ends") if match["ends"] else 0
        except WebhookError:
            continue
        steps = [int(match[name]) if match[name] else -1 for name in ("step", "end_step")]
        lives[match["fingerprint"]] = Life(match["fingerprint"], match["status"] != "resolved", starts, ends, *steps)
    return lives


def write_tag(lives: Mapping[str, Life]) -> str:
    """A tag's text: what fires first, then the newest; so its first word is the alert's state."""
    ordered = sorted(lives.values(), key=lambda life: (not life.firing, -life.starts, life.fingerprint))
    return _BETWEEN.join(map(str, ordered[:MAX_LIVES]))


def is_firing(text: str) -> bool:
    return text.startswith("firing")
