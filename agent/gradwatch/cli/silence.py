"""``gradwatch silence``: quiet for a controlled retrain, through Alertmanager's v2 API."""

from __future__ import annotations

import getpass
import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from gradwatch.cli import CommandError

_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_LONGEST: Final = 7 * 86_400
_TIMEOUT: Final = 10.0
_ALERTS: Final = "Gradwatch.+"
_WATCHDOG: Final = "GradwatchWatchdog"


def command(
    model: Annotated[str, typer.Option("--model", metavar="M", help="The model whose alerts are silenced.")] = "",
    for_: Annotated[str, typer.Option("--for", metavar="DURATION", help="How long: 90s, 30m, 2h, 1h30m, 1d.")] = "",
    reason: Annotated[str, typer.Option("--reason", metavar="R", help="Why; whoever is on call reads it.")] = "",
    run: Annotated[str, typer.Option("--run", metavar="ID", help="Only alerts of this run of the model.")] = "",
    listing: Annotated[bool, typer.Option("--list", help="List the silences of gradwatch that hold.")] = False,
    expire: Annotated[str, typer.Option("--expire", metavar="ID", help="End a silence now.")] = "",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    alertmanager: Annotated[
        str, typer.Option("--alertmanager", metavar="URL", help="Alertmanager.", envvar="ALERTMANAGER_URL")
    ] = "http://127.0.0.1:9093",
) -> None:
    """Silence a model's alerts for a controlled retrain; list and expire silences.

    Only alerts of gradwatch about that model are silenced, never those about gradwatch itself, and a week at
    most. What was silenced is told again when the silence is over, if it still fires.

    Examples:

        gradwatch silence --model lstm --for 2h --reason "retrain with the former decay"
        gradwatch silence --list
        gradwatch silence --expire 5e1f0c3a-8f0e-4f57-9d0b-1d0c0b8f6f11
    """
    if sum(map(bool, (model, listing, expire))) != 1:
        raise CommandError("one of --model, --list and --expire is needed, and only one")
    if not alertmanager.startswith(("http://", "https://")):
        raise CommandError(f"--alertmanager {alertmanager}: write it with http:// or https://")
    api = f"{alertmanager.rstrip('/')}/api/v2"
    if listing:
        found = silences(api)
        print(json.dumps(found, indent=2) if json_output else table(found))
    elif expire:
        _ask(f"{api}/silence/{_identifier(expire)}", method="DELETE")
        print(json.dumps({"id": expire, "state": "expired"}) if json_output else f"expired {expire}")
    else:
        made = silence(model, seconds(for_), reason, run, time.time(), getpass.getuser)
        answer = _ask(f"{api}/silences", made)
        told = {"id": str(answer["silenceID"]), "ends": made["endsAt"]}
        print(json.dumps(told) if json_output else f"silenced {model} until {told['ends']}: {told['id']}")


def seconds(duration: str) -> int:
    """A duration like ``1h30m`` in seconds."""
    if not duration:
        raise CommandError("--for is needed: 30m, 2h, 1d")
    if not re.fullmatch(r"(\d+[smhd])+", duration):
        raise CommandError(f"--for {duration}: write it like 90s, 30m, 2h, 1h30m or 1d")
    total = sum(int(number) * _SECONDS[unit] for number, unit in re.findall(r"(\d+)([smhd])", duration))
    if not 0 < total <= _LONGEST:
        raise CommandError(f"--for {duration}: more than nothing, and 7d at most; what is silent longer is forgotten")
    return total


def silence(model: str, lasts: int, reason: str, run: str, now: float, user: Any) -> dict[str, Any]:
    """The body of a silence as Alertmanager's v2 API takes it."""
    if not reason.strip():
        raise CommandError("--reason is needed: whoever is on call must see why it is quiet")
    matchers = [
        {"name": "alertname", "value": _ALERTS, "isRegex": True, "isEqual": True},
        {"name": "alertname", "value": _WATCHDOG, "isRegex": False, "isEqual": False},
        {"name": "model", "value": model, "isRegex": False, "isEqual": True},
    ]
    if run:
        matchers.append({"name": "run", "value": run, "isRegex": False, "isEqual": True})
    try:
        author = str(user())
    except (OSError, KeyError):  # a container's user may have no name
        author = "gradwatch"
    return {
        "matchers": matchers,
        "startsAt": _written(now),
        "endsAt": _written(now + lasts),
        "createdBy": author,
        "comment": reason,
    }


def silences(api: str) -> list[dict[str, str]]:
    """Silences that this command made and that hold or will: id, model, run, end, author, reason."""
    found = []
    for each in _ask(f"{api}/silences"):
        matchers: Mapping[str, str] = {m["name"]: m["value"] for m in each["matchers"] if m.get("isEqual", True)}
        if each["status"]["state"] == "expired" or matchers.get("alertname") != _ALERTS:
            continue
        found.append(
            {
                "id": each["id"],
                "model": matchers.get("model", ""),
                "run": matchers.get("run", ""),
                "state": each["status"]["state"],
                "ends": each["endsAt"],
                "by": each["createdBy"],
                "reason": each["comment"],
            }
        )
    return sorted(found, key=lambda one: (one["ends"], one["id"]))


def table(found: Sequence[Mapping[str, str]]) -> str:
    if not found:
        return "no silence of gradwatch holds"
    return "\n".join(
        f"{one['id']}  {one['model']}{' run ' + one['run'] if one['run'] else ''}  until {one['ends']}  "
        f"by {one['by']}: {one['reason']}"
        for one in found
    )


def _identifier(text: str) -> str:
    if not re.fullmatch(r"[0-9a-fA-F-]{36}", text):
        raise CommandError(f"--expire {text}: no id of a silence; 'gradwatch silence --list' shows them")
    return text


def _written(moment: float) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _ask(url: str, body: Mapping[str, Any] | None = None, method: str | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            text = answer.read().decode()
            return json.loads(text) if text.strip() else None
    except urllib.error.HTTPError as error:
        if error.code == 404 and method == "DELETE":
            raise CommandError("no silence has this id; 'gradwatch silence --list' shows those that hold") from None
        said = error.read(500).decode(errors="replace").strip()
        raise CommandError(f"{url} answered {error.code}: {said}") from None
    except (urllib.error.URLError, OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        raise CommandError(f"no Alertmanager at {url}: {why}; give --alertmanager, or set ALERTMANAGER_URL") from None
