"""``gradwatch report``: one run as one page."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from gradwatch.cli import CommandError
from gradwatch.cli.findings import read_findings
from gradwatch.cli.locate import DirectoryOption, RunArgument, find
from gradwatch.journal import JournalError


def command(
    run: RunArgument,
    directory: DirectoryOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The file to write; by default report-RUN.html here.", show_default=False),
    ] = None,
    mlflow_run: Annotated[
        str,
        typer.Option(
            "--mlflow-run",
            metavar="ID",
            help="Put it on this MLflow run as gradwatch/report.html; the server is that of MLFLOW_TRACKING_URI.",
            show_default=False,
        ),
    ] = "",
    json_output: Annotated[bool, typer.Option("--json", help="Print the verdict as JSON and write no page.")] = False,
) -> None:
    """Write one self-contained HTML page about a run: the verdict first, then findings, curves, layers, the last steps.

    It opens offline, in light and dark, on paper and on a phone. The run may be under way: the page then
    tells of it as it stands.

    Examples:

        gradwatch report quiet-heron-3f
        gradwatch report /scratch/journals/my-run --out my-run.html
        gradwatch report my-run --mlflow-run 0c1f6e0a7d5b4f0e9a55d0f6f7f1f2aa
        gradwatch report my-run --json | jq -r '.verdict[].text'
    """
    from gradwatch.tools.report.record import read
    from gradwatch.tools.report.verdict import verdict

    recorded = find(run, directory)
    try:
        record = read(recorded.places)
    except JournalError as error:
        raise CommandError(str(error)) from None
    findings = read_findings(recorded)
    if json_output:
        said = [{"tone": sentence.tone, "text": sentence.text} for sentence in verdict(record, findings)]
        print(json.dumps({"run": record.facts.run, "verdict": said}, indent=2))
        return
    from gradwatch.tools.report.page import render

    page = render(record, findings)
    if mlflow_run:
        _upload(page, mlflow_run)
    if out is not None or not mlflow_run:
        path = out or Path(f"report-{recorded.run}.html")
        _write(path, page)
        print(f"wrote {path}")


def _write(path: Path, page: str) -> None:
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot write {path}: {error.strerror}; name another file with --out") from None


def _upload(page: str, run_id: str) -> None:
    from gradwatch.sinks.mlflow.tracking import Tracking, TrackingError

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise CommandError("--mlflow-run needs the address of the server in MLFLOW_TRACKING_URI")
    with tempfile.TemporaryDirectory(prefix="gradwatch-report-") as directory:
        path = Path(directory) / "report.html"
        _write(path, page)
        try:
            Tracking(uri).upload(run_id, path, "gradwatch")
        except TrackingError as error:
            raise CommandError(f"cannot put the report on MLflow run {run_id}: {error}") from None
    print(f"gradwatch/report.html is on MLflow run {run_id}")
