"""``gradwatch findings``: what was found wrong with a run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from gradwatch.cli import CommandError
from gradwatch.cli.locate import DirectoryOption, Recorded, RunArgument, find
from gradwatch.collect.model import Finding
from gradwatch.detect.ledger import Ledger
from gradwatch.detect.replay import replay
from gradwatch.journal import JournalError

if TYPE_CHECKING:
    from rich.console import Console

_STYLES: Final = {"page": "bold red", "ticket": "yellow", "info": "cyan"}


def command(
    run: RunArgument,
    directory: DirectoryOption = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON: a list of objects.")] = False,
) -> None:
    """Print what was found wrong with a run: what, where, the evidence, and what to do.

    The same detectors that the agent runs look at the journal, whether an agent was there or not. What an
    agent found in steps that the journal has overwritten since is added.

    Examples:

        gradwatch findings quiet-heron-3f
        gradwatch findings /scratch/journals/my-run
        gradwatch findings my-run --dir /scratch/journals --json | jq '.[].code'
    """
    found = read_findings(find(run, directory))
    if json_output:
        print(json.dumps([as_json(finding) for finding in found], indent=2))
        return
    from rich.console import Console

    print_findings(found, Console(highlight=False))


def read_findings(run: Recorded) -> list[Finding]:
    """Everything that was found in the journals of ``run``, the earliest first."""
    directory = Path(os.path.commonpath([place.path for place in run.places]))
    try:
        found = replay(directory)
    except JournalError as error:
        raise CommandError(str(error)) from None
    asked = {(place.rank, place.attempt) for place in run.places}
    known = {_key(finding) for finding in found}
    found += [f for f in _of_the_agent(run) if (f.rank, f.attempt) in asked and _key(f) not in known]
    return sorted(found, key=lambda finding: (finding.attempt, finding.step, finding.time))


def _of_the_agent(run: Recorded) -> list[Finding]:
    """What an agent with its state in the usual place has kept of the run; nothing where that cannot be read."""
    path = run.root / ".agent" / "runs" / f"{run.run}.json"
    ledger = Ledger()
    try:
        ledger.restore(json.loads(path.read_text())["findings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    return ledger.all


def _key(finding: Finding) -> tuple[str, int, int, int]:
    return finding.code, finding.rank, finding.attempt, finding.step


def as_json(finding: Finding) -> dict[str, Any]:
    """A finding as JSON shows it."""
    return {
        "code": finding.code,
        "severity": finding.severity,
        "run": finding.run,
        "step": finding.step,
        "message": finding.message,
        "evidence": dict(finding.evidence),
        "advice": finding.advice,
        "time": finding.time,
        "rank": finding.rank,
        "attempt": finding.attempt,
        "active": finding.active,
    }


def print_findings(found: Sequence[Finding], console: Console) -> None:
    """Print findings for people: by code, the earliest first, each occurrence with its step."""
    from rich.padding import Padding
    from rich.text import Text

    def say(text: str, indent: int, style: str = "") -> None:
        console.print(Padding(Text(text, style=style), (0, 0, 0, indent)))

    if not found:
        say("Nothing was found wrong.", 0)
        return
    by_code: dict[str, list[Finding]] = {}
    for finding in found:
        by_code.setdefault(finding.code, []).append(finding)
    for code, group in by_code.items():
        say(f"{code} ({group[0].severity})", 0, _STYLES.get(group[0].severity, "bold"))
        for finding in group:
            say(_where(finding) + finding.message + ("" if finding.active else " Over by now."), 2)
            if finding.evidence:
                say(_evidence(finding.evidence), 4, "dim")
        say(f"What to do: {group[0].advice}", 2)
        say("", 0)


def _where(finding: Finding) -> str:
    """The step, rank and attempt, as far as they say something and the message does not."""
    parts = [f"attempt {finding.attempt}"] if finding.attempt else []
    parts += [f"rank {finding.rank}"] if finding.rank else []
    if finding.step >= 0 and f"step {finding.step}" not in finding.message:
        parts.append(f"step {finding.step}")
    return f"{', '.join(parts).capitalize()}: " if parts else ""


def _evidence(evidence: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in evidence.items())


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:79]}…"
