"""``gradwatch recommend``: a clip threshold and a weight decay for the next run, from this one."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from gradwatch.cli import CommandError
from gradwatch.cli.findings import read_findings
from gradwatch.cli.locate import DirectoryOption, RunArgument, find
from gradwatch.journal import JournalError


def command(
    run: RunArgument,
    directory: DirectoryOption = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON: an object.")] = False,
) -> None:
    """Recommend a clip threshold and a weight decay from what a run recorded, with the reasons.

    The threshold is the p99 of the pre-clip norms of good steps: warmup, the first tenth, and what findings
    touch are set aside. Where a constant would be wrong it says so, and what to do instead. Only the steps that the
    journal still holds count; the output says which.

    Examples:

        gradwatch recommend quiet-heron-3f
        gradwatch recommend /scratch/journals/my-run
        gradwatch recommend my-run --json | jq '.clip[].max_norm'
    """
    from gradwatch.tools.recommend.advice import as_text, recommend
    from gradwatch.tools.report.record import read

    recorded = find(run, directory)
    try:
        record = read(recorded.places)
    except JournalError as error:
        raise CommandError(str(error)) from None
    advice = recommend(record, read_findings(recorded))
    print(json.dumps(asdict(advice), indent=2) if json_output else as_text(advice))
