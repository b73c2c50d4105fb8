"""``gradwatch register``: a run as a version of a model, with what the gates said of it."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Annotated

import typer

from gradwatch.cli import CommandError
from gradwatch.cli.audit import GithubOption, JsonOption, JunitOption, PolicyOption, conclude, evidence, read_policy
from gradwatch.cli.gate import DeclareOption
from gradwatch.cli.locate import DirectoryOption


def command(
    run: Annotated[
        str,
        typer.Argument(help="A run's name or id, an MLflow run id, or a journal directory.", show_default=False),
    ],
    model: Annotated[
        str, typer.Option("--model", help="The registered model; made where missing.", show_default=False)
    ],
    alias: Annotated[str, typer.Option("--alias", help="The alias of the version that serves.")] = "champion",
    promote: Annotated[bool, typer.Option("--promote", help="Move the alias here where every check passes.")] = False,
    source: Annotated[
        str,
        typer.Option(
            "--source", metavar="URI", help="Where the model lies; by default runs:/ID/model.", show_default=False
        ),
    ] = "",
    declare: DeclareOption = None,
    directory: DirectoryOption = None,
    policy: PolicyOption = None,
    json_output: JsonOption = False,
    junit: JunitOption = None,
    github: GithubOption = False,
) -> None:
    """Register a run as a version: tags with its metadata and the gates' results, and a section of the model card.

    The run is audited, and gated against the version that has the alias, if one has. The version is made
    either way, so that what failed is on record; the alias moves only with `--promote` and only where all
    passes, and the former champion is remembered as the model's tag `gradwatch.previous_version`. Exit code 1
    where a check fails.

    Examples:

        gradwatch register my-run --model churn
        gradwatch register my-run --model churn --declare weight_decay --promote
    """

    from gradwatch.tools.gates.audit import audit
    from gradwatch.tools.gates.evidence import EvidenceError, of_run, server
    from gradwatch.tools.gates.gate import gate
    from gradwatch.tools.gates.register import Judged, champion_of, register
    from gradwatch.tools.gates.register import promote as move

    demanded = read_policy(policy)
    found = evidence(run, directory)
    try:
        registry = server()
        behind = of_run(found.mlflow_run or found.run, registry).mlflow_run
        former = champion_of(registry, model, alias)
    except EvidenceError as error:
        raise CommandError(f"{error} (a version needs its run in MLflow)") from None
    against = f"models:/{model}/{former}" if former is not None else ""
    compared = gate(found, evidence(against), demanded, declare or ()) if against else None
    judged = Judged(audit(found, demanded), compared, against)
    try:
        found = replace(found, mlflow_run=behind)
        number = register(registry, found, model, source or f"runs:/{behind}/model", judged, former)
        if promote and judged.passed:
            move(registry, model, number, alias, former)
    except EvidenceError as error:
        raise CommandError(str(error)) from None
    said = f"registered models:/{model}/{number}"
    if promote:
        said += f"; {alias} is now {number}" if judged.passed else f"; {alias} stays where it is"
    print(said, file=sys.stderr if json_output else sys.stdout)
    conclude({run: [*judged.audit, *(compared or ())]}, "gradwatch register", json_output, junit, github)
