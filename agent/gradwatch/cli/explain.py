"""``gradwatch explain``: what a finding means."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict
from typing import Annotated

import typer

from gradwatch.catalog import FINDING, FINDINGS
from gradwatch.cli import CommandError


def command(
    code: Annotated[
        str,
        typer.Argument(help="A finding's code, as 'findings' and the alerts show it.", show_default=False),
    ] = "",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a finding means and what to do about it; without a code, list them all.

    A contract finding is exact: what the code does is wrong, whatever the data. A health finding is
    statistical: what the training does is unhealthy.

    Examples:

        gradwatch explain clip-scaled-gradients
        gradwatch explain --json
    """
    if not code:
        if json_output:
            print(json.dumps([asdict(finding) for finding in FINDINGS], indent=2))
            return
        width = max(len(finding.code) for finding in FINDINGS)
        for finding in FINDINGS:
            print(f"{finding.code:<{width}}  {finding.kind:<8}  {finding.severity:<6}  {finding.title}")
        return
    known = FINDING.get(code)
    if known is None:
        near = difflib.get_close_matches(code, FINDING, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "'gradwatch explain' lists the codes"
        raise CommandError(f"no finding has the code {code!r}; {hint}")
    if json_output:
        print(json.dumps(asdict(known), indent=2))
        return
    print(f"{known.title}.\n")
    print(f"Code      {known.code}\nKind      {known.kind}\nSeverity  {known.severity}\n")
    print(f"What to do: {known.advice}\n")
    print(f"More: docs/findings/{known.code}.md")
