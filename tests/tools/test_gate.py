"""``gradwatch gate``: each line of the policy, red and green, and both sources of evidence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from gradwatch.cli.audit import evidence
from gradwatch.tools.gates.checks import as_text, judged
from gradwatch.tools.gates.evidence import Evidence, Open
from gradwatch.tools.gates.gate import gate
from gradwatch.tools.gates.policy import Policy
from tests.services import MlflowServer
from tests.tools.gated import Gated, call, failed, verdicts

pytestmark = pytest.mark.timeout(300)

CHAMPION = Evidence(
    target="models:/m/1",
    run="old",
    params={
        "group.default.0.weight_decay": "0.01",
        "group.default.0.parameters": "10",
        "config.data_fingerprint": "a",
        "git.commit": "1",
        "seed": "1",
        "precision.training": "float32",
        "max_norm": "1.0",
    },
    findings=(),
    scores={("accuracy", ""): 0.9, ("accuracy", "t7"): 0.8, ("loss", ""): 1.0, ("ece", ""): 0.02},
    gaps={("loss", ""): 0.05, ("loss", "t7"): 0.05},
    clip_rate=0.05,
    nonfinite_steps=0,
    weight_norm=10.0,
    missing=(),
    state="finished",
    costs={"model_size_bytes": 100.0, "latency_p95_seconds": 0.1, "cost_per_inference": 1.0},
)
PARAMS = CHAMPION.params


def red(changes: dict[str, Any], policy: Policy | None = None, *declared: str) -> list[str]:
    checks = gate(replace(CHAMPION, **changes), CHAMPION, policy or Policy(), declared)
    bad = [check for check in checks if check.result == "failed"]
    assert all(check.advice for check in bad)
    return [check.name for check in bad]


def scores(**changed: float | None) -> dict[str, Any]:
    told = {("accuracy", "t7") if k == "t7" else (k, ""): v for k, v in changed.items()}
    return {"scores": {k: v for k, v in {**CHAMPION.scores, **told}.items() if v is not None}}


#: What changed, the one check that fails, and a policy under which it passes.
LINES: list[tuple[dict[str, Any], str, Policy | None]] = [
    ({"state": "failed"}, "end", None),
    (
        {"findings": (Open("overfitting", "ticket", "rises"),)},
        "open findings",
        Policy(allow_findings=("overfitting",)),
    ),
    ({"gaps": {("loss", ""): 0.11}}, "generalization gap of loss", Policy(max_gap={"loss": 0.2})),
    ({"gaps": {("loss", "t7"): 0.11}}, "generalization gap of loss on t7", Policy(max_gap={"loss/t7": 0.2})),
    (scores(accuracy=0.88), "score accuracy", Policy(max_score_drop={"accuracy": 0.03})),
    (scores(t7=0.78), "score accuracy on t7", Policy(max_score_drop={"*": 0.0, "accuracy/t7": 0.03})),
    (scores(t7=None), "score accuracy on t7", None),
    (scores(loss=1.1), "score loss", Policy(max_score_drop={"*": 0.11})),
    (scores(ece=0.05), "calibration ece", Policy(max_calibration_rise=0.04)),
    (scores(ece=None), "calibration ece", None),
    ({"clip_rate": 0.2}, "clip rate", Policy(max_clip_rate=0.3)),
    ({"nonfinite_steps": 1}, "non-finite steps", Policy(max_nonfinite_steps=1)),
    ({"nonfinite_steps": None}, "non-finite steps", None),
    ({"costs": {**CHAMPION.costs, "model_size_bytes": 120.0}}, "model_size_bytes", Policy(max_size_rise=0.3)),
    ({"costs": {**CHAMPION.costs, "latency_p95_seconds": 0.12}}, "latency_p95_seconds", Policy(max_latency_rise=0.3)),
    ({"costs": {**CHAMPION.costs, "cost_per_inference": 1.2}}, "cost_per_inference", Policy(max_cost_rise=0.3)),
    ({"weight_norm": 13.0}, "weight_norm", Policy(max_weight_norm_change=0.4)),
    ({"weight_norm": 7.0}, "weight_norm", Policy(declared=("weight_norm",))),
    (
        {"params": {**PARAMS, "group.default.0.weight_decay": "1.0"}},
        "hyperparameter group.default.0.weight_decay",
        Policy(declared=("weight_decay",)),
    ),
    (
        {"params": {**PARAMS, "precision.training": "bfloat16"}},
        "hyperparameter precision.training",
        Policy(declared=("precision",)),
    ),
]


def test_the_champion_passes_its_own_gate() -> None:
    assert red({}) == []


@pytest.mark.parametrize(("changes", "check", "lenient"), LINES, ids=[f"{i}-{line[1]}" for i, line in enumerate(LINES)])
def test_each_line_fails_alone_and_passes_where_the_policy_lets_it(
    changes: dict[str, Any], check: str, lenient: Policy | None
) -> None:
    assert red(changes) == [check]
    if lenient is not None:
        assert red(changes, lenient) == []


def test_what_is_better_or_unknown_does_not_fail() -> None:
    better = {**scores(accuracy=0.99, loss=0.1, ece=0.0), "costs": {"model_size_bytes": 1.0}, "clip_rate": None}
    assert red({**better, "weight_norm": None}) == []
    assert red({"findings": (Open("clip-never", "info", "far above"),)}) == []


def test_data_machine_and_seed_are_no_hyperparameters() -> None:
    others = {"config.data_fingerprint": "b", "git.commit": "2", "seed": "2", "group.default.0.parameters": "20"}
    assert red({"params": {**PARAMS, **others}}) == []


def test_a_declaration_names_a_parameter_by_its_end_or_a_family_by_its_beginning_and_no_other() -> None:
    changes = {"params": {**PARAMS, "group.default.0.weight_decay": "1.0", "scheduler.class": "StepLR"}}
    both = ["hyperparameter group.default.0.weight_decay", "hyperparameter scheduler.class"]
    assert red(changes) == both
    assert red(changes, None, "weight_decay") == both[1:]
    assert red(changes, None, "scheduler", "group.default.0.weight_decay") == []
    assert red(changes, None, "decay", "sched") == both


def test_a_name_that_says_nothing_is_a_score_unless_the_policy_says_otherwise() -> None:
    old = replace(CHAMPION, scores={("churned", ""): 1.0})
    new = replace(CHAMPION, scores={("churned", ""): 2.0})

    def bad(policy: Policy) -> list[str]:
        return [check.name for check in gate(new, old, policy) if check.result == "failed"]

    assert bad(Policy()) == []
    assert bad(Policy(lower_is_better=("churned",))) == ["score churned"]


def test_it_fits_on_one_screen() -> None:
    checks = [judged(f"ok {i}", True, "fine") for i in range(200)] + [judged("bad", False, "why", "do")]
    lines = as_text({"run": checks}).splitlines()
    assert len(lines) <= 30
    assert lines[:3] == ["run: 1 of 201 checks failed", "  FAIL bad: why", "       do"]


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory, mlflow_server: MlflowServer) -> Gated:
    """A champion, the same again, and one with a larger decay that is worse for a tenant."""
    gated = Gated(tmp_path_factory.mktemp("gated") / "journals", mlflow_server.url)
    gated.journals.mkdir()
    worse = {"decay": 0.5, "cohort": 0.7, "max_norm": 0.001, "nan": True}
    gated.train({"gate-champion": {"costs": {"model_size_bytes": 1000}}, "gate-same": {}, "gate-worse": worse})
    gated.upload()
    client = MlflowClient(gated.mlflow, registry_uri=gated.mlflow)
    client.create_registered_model("gated")
    run_id = gated.run_id("gate-champion")
    client.create_model_version("gated", f"runs:/{run_id}/model", run_id=run_id)
    client.set_registered_model_alias("gated", "champion", "1")
    return gated


@pytest.mark.parametrize("source", ["journal", "mlflow"])
def test_real_runs_from_both_sources(
    gated: Gated, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gated.mlflow)
    monkeypatch.chdir(tmp_path)

    def ask(run: str, *more: str) -> tuple[int, dict[str, str]]:
        where = ["--dir", str(gated.journals)] if source == "journal" else []
        code, results, _ = verdicts(capsys, "gate", run, "--against", "models:/gated@champion", *where, *more)
        return code, results

    (tmp_path / "policy.yaml").write_text("max_gap: 1000\n")  # 40 steps on 16 rows say nothing of a gap
    code, results = ask("gate-same", "--policy", "policy.yaml")
    assert (code, failed(results)) == (0, [])
    assert results["model_size_bytes"] == "skipped"
    code, results = ask("gate-worse", "--policy", "policy.yaml")
    assert code == 1
    assert {
        "open findings", "score accuracy on tenant-7", "clip rate", "non-finite steps",
        "hyperparameter group.default.0.weight_decay", "hyperparameter max_norm",
    } <= set(failed(results))  # fmt: skip
    assert results["score accuracy"] == "passed"
    _, results = ask("gate-worse", "--policy", "policy.yaml", "--declare", "weight_decay")
    assert results["hyperparameter group.default.0.weight_decay"] == "passed"
    assert results["hyperparameter max_norm"] == "failed"


@pytest.mark.parametrize("run", ["gate-same", "gate-worse"])
def test_the_journal_and_mlflow_tell_the_same(gated: Gated, monkeypatch: pytest.MonkeyPatch, run: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gated.mlflow)
    local, remote = evidence(run, gated.journals), evidence(gated.run_id(run))
    assert dict(local.params) == dict(remote.params)
    assert local.scores == pytest.approx(remote.scores)
    assert local.gaps == pytest.approx(remote.gaps)
    assert local.clip_rate == pytest.approx(remote.clip_rate)
    assert local.nonfinite_steps == remote.nonfinite_steps == (1 if run == "gate-worse" else 0)
    assert {f.code for f in local.findings} == {f.code for f in remote.findings}
    assert local.weight_norm == pytest.approx(remote.weight_norm, nan_ok=True)
    assert (local.run, local.state, local.missing) == (remote.run, remote.state, remote.missing)


def test_a_champion_that_is_not_there_is_said_in_words(
    gated: Gated, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gated.mlflow)
    code, _, err = call(capsys, "gate", "gate-same", "--against", "models:/gated@nobody")
    assert code == 2
    assert "models:/gated@nobody cannot be read" in err
