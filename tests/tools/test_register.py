"""``gradwatch register``: tags, model card, and the former champion, against a real MLflow server."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from gradwatch.tools.gates.checks import judged
from gradwatch.tools.gates.evidence import Evidence
from gradwatch.tools.gates.register import Judged, card
from tests.services import MlflowServer
from tests.tools.gated import Gated, call

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory, mlflow_server: MlflowServer) -> Gated:
    gated = Gated(tmp_path_factory.mktemp("gated") / "journals", mlflow_server.url)
    gated.journals.mkdir()
    gated.train({"register-first": {}, "register-decayed": {"decay": 0.02}})
    gated.upload()
    gated.train({"register-local": {}})
    return gated


def test_a_champion_is_followed_by_another_and_remembered(
    gated: Gated, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gated.mlflow)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.gradwatch.policy]\nmax_gap = 1000\nrequire = ["weight decay", "batch size", "data fingerprint"]\n'
    )
    client = MlflowClient(gated.mlflow, registry_uri=gated.mlflow)

    def register(run: str, *more: str) -> tuple[int, str, str]:
        return call(capsys, "register", run, "--dir", str(gated.journals), "--model", "registered", "--promote", *more)

    # The first version has nobody to be compared with.
    code, out, err = register("register-first")
    assert code == 0, out + err
    assert "champion is now 1" in out
    assert client.get_model_version_by_alias("registered", "champion").version == "1"
    first = client.get_model_version("registered", "1")
    assert first.run_id == gated.run_id("register-first")
    wanted = {
        "run": "register-first",
        "gate": "no champion",
        "audit": "passed",
        "optimizer": "AdamW",
        "weight_decay": "0.01",
        "group.default.1.weight_decay": "0.0",
        "max_norm": "100.0",
        "batch_size": "16",
        "clip_rate": "0",
        "config.data_fingerprint": "sha256:abc",
    }
    assert wanted.items() <= {k.removeprefix("gradwatch."): v for k, v in first.tags.items()}.items()
    assert "- Clip threshold: 100.0" in first.description
    assert "- Weight decay: default.0: 0.01, default.1: 0.0" in first.description
    assert "- Schedule: constant" in first.description

    # Another decay, not declared: on record, not promoted.
    code, out, _ = register("register-decayed")
    assert code == 1
    assert "champion stays where it is" in out
    assert client.get_model_version_by_alias("registered", "champion").version == "1"
    second = client.get_model_version("registered", "2").tags
    assert second["gradwatch.gate"] == "failed"
    assert second["gradwatch.gate_failed"] == "hyperparameter group.default.0.weight_decay"
    assert second["gradwatch.gate_against"] == "models:/registered/1"
    assert "gradwatch.previous_version" not in client.get_registered_model("registered").tags

    # Declared: promoted, and the former champion is remembered in both places.
    code, out, _ = register("register-decayed", "--declare", "weight_decay")
    assert code == 0, out
    assert client.get_model_version_by_alias("registered", "champion").version == "3"
    assert client.get_registered_model("registered").tags["gradwatch.previous_version"] == "1"
    assert client.get_model_version("registered", "3").tags["gradwatch.previous_champion"] == "1"


def test_a_run_that_mlflow_does_not_know_is_refused_in_words(
    gated: Gated, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gated.mlflow)
    code, _, err = call(capsys, "register", "register-local", "--dir", str(gated.journals), "--model", "other")
    assert code == 2
    assert "knows no run 'register-local'" in err
    assert "a version needs its run in MLflow" in err


def test_a_card_keeps_what_people_wrote_and_replaces_its_own_section() -> None:
    run = Evidence("run", "run-1", {"max_norm": "1.0"}, (), {}, {}, 0.023, 0, 1.0, ())
    once = card("# Churn\n\nWritten by hand.", run, Judged([judged("a", True, "")], None))
    assert once.startswith("# Churn\n\nWritten by hand.\n\n<!-- gradwatch -->")
    assert "- Observed clip rate: 2.3% of the steps" in once
    assert "- Audit: passed" in once
    twice = card(f"{once}\n\nAnd below.", run, Judged([judged("a", False, "")], None))
    assert twice.count("<!-- gradwatch -->") == 1
    assert "- Audit: failed" in twice
    assert twice.endswith("And below.")
