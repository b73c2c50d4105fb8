"""``gradwatch audit``: whether a training could be repeated from what was recorded, and whether its code was right."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gradwatch.cli import CommandError
from gradwatch.cli.locate import DirectoryOption

if TYPE_CHECKING:
    from gradwatch.tools.gates.checks import Judgement
    from gradwatch.tools.gates.evidence import Evidence
    from gradwatch.tools.gates.policy import Policy

PolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        help="A pyproject.toml, or a YAML file with the same keys; by default the pyproject.toml here.",
        show_default=False,
    ),
]
JunitOption = Annotated[
    Path | None, typer.Option("--junit", metavar="FILE", help="Write JUnit XML, too.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON: a list of objects with their checks.")]
GithubOption = Annotated[
    bool, typer.Option("--github", help="Print annotations of GitHub Actions, too; on by itself inside one.")
]


def command(
    target: Annotated[
        str,
        typer.Argument(
            help="A run's name or id, an MLflow run id, a journal directory, or models:/NAME/VERSION.",
            show_default=False,
        ),
    ] = "",
    everything: Annotated[bool, typer.Option("--all", help="Every registered model: the inventory.")] = False,
    directory: DirectoryOption = None,
    policy: PolicyOption = None,
    json_output: JsonOption = False,
    junit: JunitOption = None,
    github: GithubOption = False,
) -> None:
    """Check that a training's metadata is complete and that no contract finding is open.

    Complete means: weight decay of every parameter group, learning rate, optimizer, schedule, batch size,
    accumulation, clip threshold, precision, seed, commit and data fingerprint; `require` of the policy says
    which. MLflow is the server of `MLFLOW_TRACKING_URI`. Exit code 1 where a check fails.

    Examples:

        gradwatch audit quiet-heron-3f
        gradwatch audit models:/churn/7 --junit audit.xml
        gradwatch audit --all --json
    """
    from gradwatch.sinks.mlflow.tracking import TrackingError
    from gradwatch.tools.gates.audit import audit, inventory
    from gradwatch.tools.gates.evidence import EvidenceError, server

    if everything == bool(target):
        raise CommandError("name a run or a version, or say --all, one of them")
    demanded = read_policy(policy)
    if everything:
        try:
            judgement = dict(inventory(server(), demanded))
        except EvidenceError as error:
            raise CommandError(str(error)) from None
        except TrackingError as error:
            raise CommandError(f"MLflow cannot be asked for its models: {error}") from None
        if not judgement and not json_output:
            print("No model is registered.")
    else:
        judgement = {target: audit(evidence(target, directory), demanded)}
    conclude(judgement, "gradwatch audit", json_output, junit, github)


def read_policy(path: Path | None) -> Policy:
    """The policy that is meant. Raises ``CommandError``."""
    from gradwatch.tools.gates.policy import PolicyError, find

    try:
        return find(path)
    except PolicyError as error:
        raise CommandError(str(error)) from None


def evidence(target: str, directory: Path | None = None) -> Evidence:
    """What is recorded of a target: a version, a journal, or else a run in MLflow. Raises ``CommandError``."""
    from gradwatch.cli.findings import read_findings
    from gradwatch.cli.locate import find
    from gradwatch.journal import JournalError
    from gradwatch.tools.gates.evidence import EvidenceError, is_version, of_journal, of_run, of_version, server
    from gradwatch.tools.report.record import read

    try:
        if is_version(target):
            return of_version(target, server())
        try:
            recorded = find(target, directory)
        except CommandError:
            if directory is not None or not os.environ.get("MLFLOW_TRACKING_URI"):
                raise
            return of_run(target, server())
        return of_journal(target, read(recorded.places), read_findings(recorded))
    except (EvidenceError, JournalError) as error:
        raise CommandError(str(error)) from None


def conclude(judgement: Judgement, suite: str, json_output: bool, junit: Path | None, github: bool) -> None:
    """Print and write what was found; ends with code 1 where a check failed."""
    import json

    from gradwatch.tools.gates import checks

    print(json.dumps(checks.as_json(judgement), indent=2) if json_output else checks.as_text(judgement))
    if junit is not None:
        try:
            junit.write_text(checks.as_junit(judgement, suite), encoding="utf-8")
        except OSError as error:
            raise CommandError(f"cannot write {junit}: {error.strerror}; name another file with --junit") from None
    if (github or os.environ.get("GITHUB_ACTIONS") == "true") and not json_output:
        print(checks.as_github(judgement))
    if not all(checks.passes(found) for found in judgement.values()):
        raise typer.Exit(1)
