"""The servers that tests stand on: they start, answer, and are gone afterwards; what is missing is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.services import Alertmanager, MlflowServer, Prometheus, eventually, fetch, program


def test_prometheus_scrapes_and_is_gone_afterwards(tmp_path: Path) -> None:
    with Prometheus(tmp_path / "seen", []) as seen:
        address = seen.url.removeprefix("http://")
        with Prometheus(tmp_path / "seeing", [address]) as seeing:
            [(labels, value)] = eventually(lambda: [s for s in seeing.query("up") if s[1] == 1.0], "the target is up")
            assert (labels["instance"], value) == (address, 1.0)
    assert fetch(seen.url + "/-/ready") is None
    assert fetch(seeing.url + "/-/ready") is None


def test_an_alert_of_prometheus_reaches_alertmanager(tmp_path: Path) -> None:
    config = {"route": {"receiver": "nobody"}, "receivers": [{"name": "nobody"}]}
    rules = tmp_path / "rules.yml"
    rules.write_text(
        '{"groups": [{"name": "g", "interval": "250ms", "rules": [{"alert": "Always", "expr": "vector(1)"}]}]}'
    )
    with (
        Alertmanager(tmp_path / "alertmanager", config) as alertmanager,
        Prometheus(tmp_path / "prometheus", [], rules=[rules], alertmanager=alertmanager.url),
    ):
        [alert] = eventually(alertmanager.alerts, "the alert has arrived")
        assert alert["labels"]["alertname"] == "Always"


def test_mlflow_server_answers(mlflow_server: MlflowServer) -> None:
    answer = mlflow_server.get_json("/api/2.0/mlflow/experiments/get-by-name", experiment_name="Default")
    assert answer["experiment"]["name"] == "Default"


@pytest.mark.parametrize(("required", "outcome"), [("", "Skipped"), ("1", "Failed")])
def test_a_missing_program_skips_or_fails_with_the_way_to_get_it(
    monkeypatch: pytest.MonkeyPatch, required: str, outcome: str
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setenv("GRADWATCH_REQUIRE_SERVICES", required)
    with pytest.raises(BaseException, match="needs amtool: apt-get install prometheus-alertmanager") as caught:
        program("amtool")
    assert type(caught.value).__name__ == outcome
