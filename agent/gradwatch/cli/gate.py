"""``gradwatch gate``: whether a run may take the champion's place."""

from __future__ import annotations

from typing import Annotated

import typer

from gradwatch.cli.audit import GithubOption, JsonOption, JunitOption, PolicyOption, conclude, evidence, read_policy
from gradwatch.cli.locate import DirectoryOption

DeclareOption = Annotated[
    list[str] | None,
    typer.Option(
        "--declare",
        metavar="NAME",
        help="A hyperparameter, or weight_norm, that is meant to differ; may be said several times.",
        show_default=False,
    ),
]


def command(
    run: Annotated[
        str,
        typer.Argument(
            help="A run's name or id, an MLflow run id, a journal directory, or models:/NAME/VERSION.",
            show_default=False,
        ),
    ],
    against: Annotated[
        str,
        typer.Option("--against", help="The version to compare with, as models:/NAME@champion.", show_default=False),
    ],
    declare: DeclareOption = None,
    directory: DirectoryOption = None,
    policy: PolicyOption = None,
    json_output: JsonOption = False,
    junit: JunitOption = None,
    github: GithubOption = False,
) -> None:
    """Compare a run with the version that serves: may it take its place?

    Within the policy must be: gap, scores and calibration on all data and on each cohort, clip rate, non-finite
    steps, open findings; size, latency and cost where both have them. Weight norm and hyperparameters that
    differ must be declared. Exit code 1 where a check fails.

    Examples:

        gradwatch gate my-run --against models:/churn@champion
        gradwatch gate my-run --against models:/churn@champion --declare weight_decay
        gradwatch gate models:/churn/8 --against models:/churn/7 --policy gates.yaml --junit gate.xml
    """
    from gradwatch.tools.gates.gate import gate

    demanded = read_policy(policy)
    checks = gate(evidence(run, directory), evidence(against), demanded, declare or ())
    conclude({run: checks}, "gradwatch gate", json_output, junit, github)
