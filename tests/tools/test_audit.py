"""``gradwatch audit``: each piece of metadata and each source, red and green."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from mlflow import MlflowClient

from gradwatch.sinks.mlflow.facts import AUDITED
from gradwatch.tools.gates.audit import audit
from gradwatch.tools.gates.checks import as_github, judged
from gradwatch.tools.gates.evidence import Evidence, Open
from gradwatch.tools.gates.policy import Policy, PolicyError, find
from tests.services import MlflowServer, free_port
from tests.tools.gated import Gated, call, failed, verdicts

pytestmark = pytest.mark.timeout(300)

#: A parameter under which each piece may stand.
RECORDED = {
    "weight decay": "group.default.0.weight_decay",
    "learning rate": "group.default.0.lr",
    "optimizer": "optimizer.default.class",
    "schedule": "config.schedule",
    "batch size": "config.batch_size",
    "accumulation": "config.accumulation_steps",
    "clip threshold": "max_norm",
    "precision": "precision.training",
    "seed": "seed",
    "commit": "git.commit",
    "data fingerprint": "config.data_fingerprint",
}


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory, mlflow_server: MlflowServer) -> Gated:
    """Two runs: one with everything, one that clips a part and does not say its batch size."""
    gated = Gated(tmp_path_factory.mktemp("gated") / "journals", mlflow_server.url)
    gated.journals.mkdir()
    gated.train({"audit-whole": {}, "audit-partial": {"partial": True, "config": {"batch_size": None}}})
    gated.upload()
    return gated


@pytest.fixture
def tracked(gated: Gated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gated:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gated.mlflow)
    monkeypatch.chdir(tmp_path)
    return gated


def evidence(params: dict[str, str], findings: tuple[Open, ...] = ()) -> Evidence:
    from gradwatch.sinks.mlflow.facts import hyperparameters, missing_metadata

    numbers, words = hyperparameters(params)
    missing = missing_metadata(params, words | dict.fromkeys(numbers, ""), datasets=False)
    return Evidence("run", "run", params, findings, {}, {}, None, None, None, missing)


@pytest.mark.parametrize("what", AUDITED)
def test_each_piece_is_asked_for(what: str) -> None:
    params = dict.fromkeys(RECORDED.values(), "1")
    assert all(check.result == "passed" for check in audit(evidence(params), Policy()))
    del params[RECORDED[what]]
    bad = [check for check in audit(evidence(params), Policy()) if check.result == "failed"]
    assert what in [check.name for check in bad]
    assert all(check.advice for check in bad)
    others = tuple(name for name in AUDITED if name not in (what, "weight decay"))
    assert all(check.result == "passed" for check in audit(evidence(params), Policy(require=others)))


def test_a_group_without_decay_is_named() -> None:
    params = dict.fromkeys(RECORDED.values(), "1") | {"group.default.1.lr": "0.1"}
    (bad,) = [check for check in audit(evidence(params), Policy()) if check.result == "failed"]
    assert (bad.name, bad.message) == ("weight decay of each group", "missing for default.1")


def test_only_contract_findings_count_and_a_policy_may_allow_one() -> None:
    params = dict.fromkeys(RECORDED.values(), "1")
    health, contract = Open("loss-spike", "ticket", "jumped"), Open("clip-partial", "ticket", "a part")
    assert all(c.result == "passed" for c in audit(evidence(params, (health,)), Policy()))
    (bad,) = [c for c in audit(evidence(params, (health, contract)), Policy()) if c.result == "failed"]
    assert bad.name == "contract findings"
    assert "clip-partial: a part" in bad.message
    assert bad.advice
    allowed = Policy(allow_findings=("clip-partial",))
    assert all(c.result == "passed" for c in audit(evidence(params, (health, contract)), allowed))


@pytest.mark.parametrize("source", ["journal", "mlflow"])
def test_a_real_run_in_both_sources(tracked: Gated, capsys: pytest.CaptureFixture[str], source: str) -> None:
    def ask(run: str) -> tuple[int, dict[str, str]]:
        where = ["--dir", str(tracked.journals)] if source == "journal" else []
        code, results, _ = verdicts(capsys, "audit", run, *where)
        return code, results

    code, results = ask("audit-whole")
    # Tests may run outside a checkout.
    assert set(failed(results)) <= {"commit"}
    assert code == bool(failed(results))
    code, results = ask("audit-partial")
    assert code == 1
    assert set(failed(results)) - {"commit"} == {"batch size", "contract findings"}


def test_outputs_for_people_junit_and_github(
    tracked: Gated, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    junit = tmp_path / "audit.xml"
    journals = ["--dir", str(tracked.journals)]
    code, out, _ = call(capsys, "audit", "audit-partial", *journals, "--junit", str(junit), "--github")
    assert code == 1
    assert "FAIL batch size: is missing" in out
    assert '"batch_size": 64' in out
    assert "::error title=gradwatch%3A batch size::audit-partial: is missing" in out
    root = ElementTree.parse(junit).getroot()
    failures = {case.get("name") for case in root.iter("testcase") if case.find("failure") is not None}
    assert {"batch size", "contract findings"} <= failures
    (suite,) = root.iter("testsuite")
    assert suite.get("failures") == str(len(failures))


def test_github_takes_no_command_from_a_message() -> None:
    text = as_github({"run": [judged("a,b:c", False, "50 %\n::set-env::x")]})
    assert text == "::error title=gradwatch%3A a%2Cb%3Ac::run: 50 %25%0A::set-env::x"


def test_versions_and_the_inventory(tracked: Gated, capsys: pytest.CaptureFixture[str]) -> None:
    client = MlflowClient(tracked.mlflow, registry_uri=tracked.mlflow)
    ids = [tracked.run_id("audit-whole"), tracked.run_id("audit-partial")]
    for name, run_id in zip(("audited", "audited-partial"), ids, strict=True):
        client.create_registered_model(name)
        client.create_model_version(name, f"runs:/{run_id}/model", run_id=run_id)
        client.set_registered_model_alias(name, "champion", "1")
    client.create_registered_model("audited-empty")
    client.create_registered_model("audited-orphan")
    client.create_model_version("audited-orphan", "s3://somewhere/model")
    for target in ("models:/audited-partial/1", "models:/audited-partial@champion"):
        code, results, _ = verdicts(capsys, "audit", target)
        assert code == 1
        assert "batch size" in failed(results)
    code, out, _ = call(capsys, "audit", "--all", "--json")
    entries = {entry["target"]: entry for entry in json.loads(out) if "audited" in entry["target"]}
    assert code == 1
    bad = {t: {c["name"] for c in e["checks"] if c["result"] == "failed"} - {"commit"} for t, e in entries.items()}
    assert bad == {
        "models:/audited/1": set(),
        "models:/audited-partial/1": {"batch size", "contract findings"},
        "models:/audited-empty": set(),
        "models:/audited-orphan/1": {"the run behind it"},
    }


def test_what_is_not_there_is_said_in_words(
    tracked: Gated, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for target, words in {
        "nobody": "knows no run 'nobody'",
        "models:/nobody/1": "models:/nobody/1 cannot be read",
        "models:/nobody": "is written models:/NAME/3",
    }.items():
        code, _, err = call(capsys, "audit", target)
        assert (code, words in err) == (2, True), err
    assert call(capsys, "audit")[0] == 2
    assert call(capsys, "audit", "x", "--all")[0] == 2
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    code, _, err = call(capsys, "audit", "--all")
    assert code == 2
    assert "MLflow cannot be asked" in err
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    code, _, err = call(capsys, "audit", "models:/audited/1")
    assert code == 2
    assert "MLFLOW_TRACKING_URI" in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_clip_rat: 0.1", "did you mean 'max_clip_rate'"),
        ("max_clip_rate: often", "max_clip_rate must be a number"),
        ("max_gap: {loss: -1}", "max_gap.loss must be a number"),
        ("declared: lr", "declared must be a list of names"),
        ("require: [sed]", "did you mean 'seed'"),
        ("allow_findings: [clip-partia]", "did you mean 'clip-partial'"),
        ("- 1", "a table of keys"),
        ("a: [", "this is not YAML"),
    ],
)
def test_a_malformed_policy_is_refused_with_file_and_key(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=r"policy\.yaml") as raised:
        find(path)
    assert words in str(raised.value)


def test_the_policy_is_read_from_pyproject_and_yaml_alike(tmp_path: Path) -> None:
    assert find(None, tmp_path) == Policy()
    (tmp_path / "policy.yaml").write_text("require: [seed]\nmax_gap: {'*': 0.2, loss: 0.3}\n")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.gradwatch.policy]\nrequire = ["seed"]\nmax_gap = {"*" = 0.2, loss = 0.3}\n'
    )
    wanted = Policy(require=("seed",), max_gap={"*": 0.2, "loss": 0.3})
    assert find(None, tmp_path) == find(tmp_path / "policy.yaml") == wanted
    (tmp_path / "pyproject.toml").write_text("[tool\n")
    with pytest.raises(PolicyError, match="not TOML"):
        find(None, tmp_path)
