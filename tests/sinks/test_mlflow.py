"""What stands in MLflow: exactly the folds, the hyperparameters, the tags, the artifacts. On a real server."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gradwatch.catalog import FINDING
from gradwatch.collect.model import Finding, Validation
from gradwatch.sinks.mlflow import MlflowSink
from tests.services import MlflowServer
from tests.sinks.mlflow_parts import (
    LAST_STEPS,
    START,
    drained,
    end,
    expected_metrics,
    facts,
    layer_table,
    sink,
    stored_metrics,
    window,
)


def client(server: MlflowServer) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(server.url)


def artifact(server: MlflowServer, run_id: str, path: str, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    return json.loads(Path(client(server).download_artifacts(run_id, path, str(folder))).read_text())


def run_id_of(made: MlflowSink, run: str) -> str:
    run_id = made.run_id(run)
    assert run_id is not None
    return run_id


def test_the_database_holds_exactly_the_folds(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run, windows = facts("exact"), [window(number) for number in range(60)]
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_started(run)
        for each in windows:
            made.window(run, each)
        drained(made)
        run_id = run_id_of(made, "exact")
    assert stored_metrics(mlflow_server, run_id) == expected_metrics(windows)
    assert (made.errors, made.dropped) == (0, 0)


def test_windows_sent_twice_are_the_same_rows(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run, windows = facts("twice"), [window(number) for number in range(5)]
    for state in ("first", "second"):  # the second agent knows nothing of the first
        with sink(mlflow_server.url, tmp_path / state) as made:
            for each in windows + windows[2:]:
                made.window(run, each)
            drained(made)
            run_id = run_id_of(made, "twice")
    assert stored_metrics(mlflow_server, run_id) == expected_metrics(windows)


def test_a_database_without_a_server_holds_the_same(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    run, windows = facts("direct"), [window(number) for number in range(3)]
    with sink(f"sqlite:///{database}", tmp_path / "state") as made:
        for each in windows + windows:
            made.window(run, each)
        made.window(run, window(3))
        drained(made, 60)
        made.window(run, window(3))
        drained(made)
    run_id = run_id_of(made, "direct")
    assert stored_metrics(database, run_id) == expected_metrics([*windows, window(3)])
    assert (tmp_path / "mlartifacts" / run_id / "artifacts" / "gradwatch" / "hyperparameters.json").is_file()


def test_a_replayed_step_of_a_later_attempt_is_another_row(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    again = window(1, attempt=1, start=START + 500)
    with sink(mlflow_server.url, tmp_path) as made:
        made.window(facts("replay"), window(1))
        made.window(facts("replay", 1), again)
        drained(made)
    stored = stored_metrics(mlflow_server, run_id_of(made, "replay"))
    assert stored == sorted(expected_metrics([window(1)]) + expected_metrics([again]))


def test_several_optimizers_have_their_own_metrics(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run = facts("several", optimizers=("policy", "value"))
    with sink(mlflow_server.url, tmp_path) as made:
        made.window(run, window(0, optimizer="policy"))
        made.window(run, window(1, optimizer="value"))
        drained(made)
    stored = stored_metrics(mlflow_server, run_id_of(made, "several"))
    policy = expected_metrics([window(0)], "gradwatch/policy/")
    assert stored == policy + expected_metrics([window(1)], "gradwatch/value/")


def test_validations_gaps_and_slices(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run = facts("validated")
    with sink(mlflow_server.url, tmp_path) as made:
        made.validation(run, Validation(7, 0, START + 1, "", {"loss": 0.5, "auc": float("nan")}, {"loss": 0.25}))
        made.validation(run, Validation(7, 0, START + 1, "tenant/7", {"auc": 0.75}))
        drained(made)
    stored = {key: value for key, _, _, value in stored_metrics(mlflow_server, run_id_of(made, "validated"))}
    assert stored == {
        "gradwatch/validation/loss": 0.5,
        "gradwatch/generalization_gap/loss": 0.25,
        "gradwatch/validation/auc/tenant_7": 0.75,
        "gradwatch/nonfinite_values": 1.0,
    }


def test_parameters_keep_to_the_limits_and_conflicts_lose_nothing(
    mlflow_server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = "x" * 9000
    many = {f"config.value_{number}": number for number in range(250)}
    hyperparameters = {**many, "a b!": 1, "a b?": 2, "deep//../name": 3, "k" * 400: 4, "text": long, "lr": 0.5}
    theirs = client(mlflow_server)
    run_id = theirs.create_run(theirs.create_experiment("theirs-conflict")).info.run_id
    theirs.log_param(run_id, "gradwatch.lr", "0.1")
    run = facts("conflict", hyperparameters=hyperparameters, mlflow={"run_id": run_id})
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_started(run)
        drained(made)
    params = theirs.get_run(run_id).data.params
    assert params["gradwatch.lr"] == "0.1"
    assert {params[f"gradwatch.config.value_{number}"] for number in range(250)} == set(map(str, range(250)))
    assert {value for key, value in params.items() if key.startswith("gradwatch.a b_")} == {"1", "2"}
    assert len(params) == len(hyperparameters)
    assert len(params["gradwatch.text"]) == 6000
    assert params["gradwatch.text"].endswith("[cut; whole in gradwatch/hyperparameters.json]")
    assert artifact(mlflow_server, run_id, "gradwatch/hyperparameters.json", tmp_path / "a")["text"] == long
    assert theirs.get_run(run_id).data.tags["gradwatch.params_conflicting"] == "gradwatch.lr"
    assert "parameters logged before with another value stay: gradwatch.lr" in caplog.text
    assert (made.errors, made.dropped) == (0, 0)


def test_hyperparameters_learned_later_are_added(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_started(facts("later", hyperparameters={"lr": 1}))
        drained(made)
        made.run_started(facts("later", hyperparameters={"lr": 1, "accumulation": 4}))
        drained(made)
    params = client(mlflow_server).get_run(run_id_of(made, "later")).data.params
    assert params == {"gradwatch.lr": "1", "gradwatch.accumulation": "4"}


def test_tags_say_who_the_run_is_and_what_was_found(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run = facts("tagged", 2)
    code = FINDING["gradient-spike"]
    found = Finding(code.code, code.severity, "tagged", 5, START, "norm 80 after 1", {"norm": 80.0}, code.advice)
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_started(run)
        made.finding(run, found)
        made.heartbeat(run, "running", 41, START + 60.7)
        drained(made)
    run_id = run_id_of(made, "tagged")
    tags = client(mlflow_server).get_run(run_id).data.tags
    assert {key: value for key, value in tags.items() if key.startswith("gradwatch.")} == {
        "gradwatch.run": "tagged",
        "gradwatch.run_name": "name of tagged",
        "gradwatch.attempt": "2",
        "gradwatch.world_size": "2",
        "gradwatch.commit": "c0ffee",
        "gradwatch.model": "model-tagged",
        "gradwatch.tier": "experiment",
        "gradwatch.version": "0.1.0",
        "gradwatch.created": "true",
        "gradwatch.state": "running",
        "gradwatch.step": "41",
        "gradwatch.heartbeat": "1700000060",
        "gradwatch.finding.gradient-spike": "info at step 5: norm 80 after 1",
    }
    (entry,) = artifact(mlflow_server, run_id, "gradwatch/findings.json", tmp_path / "a")
    expected = {"code": "gradient-spike", "severity": "info", "run": "tagged", "step": 5, "advice": code.advice}
    assert expected.items() <= entry.items()
    assert entry["evidence"] == {"norm": 80.0}


def test_layers_and_last_steps_are_tables_that_mlflow_reads(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.url)  # `load_table` asks the environment
    run = facts("tables")
    with sink(mlflow_server.url, tmp_path) as made:
        made.layers(run, layer_table(0))
        made.layers(run, layer_table(64))
        made.run_ended(run, end(), {"steps": 100}, LAST_STEPS)
        drained(made)
    run_id = run_id_of(made, "tables")
    theirs = client(mlflow_server)
    experiment = theirs.get_run(run_id).info.experiment_id
    layers = theirs.load_table(experiment, "gradwatch/layers.json", run_ids=[run_id])
    last = theirs.load_table(experiment, "gradwatch/last_steps.json", run_ids=[run_id])
    assert list(layers.columns) == ["step", "attempt", "time", "layer", "grad_norm", "weight_norm", "update_ratio"]
    assert list(layers["step"]) == [0, 0, 0, 64, 64, 64]
    assert list(layers["grad_norm"]) == [0, 0.125, 0.25, 64, 64.125, 64.25]
    assert layers["update_ratio"].isna().all()
    assert list(last["step"]) == [98, 99]
    assert [str(value) for value in last["grad_norm"]] == ["1.5", "inf"]
    summary = artifact(mlflow_server, run_id, "summary.json", tmp_path / "a")
    assert summary["steps"] == 100
    assert summary["end"]["state"] == "finished"
    keys = {key for key, *_ in stored_metrics(mlflow_server, run_id)}
    assert keys == set(), "layers are no metrics"


def test_mlflow_is_imported_by_the_sinks_thread_only(tmp_path: Path) -> None:
    """In a fresh interpreter: a sink without a server, and one that nothing was handed to, import nothing."""
    import subprocess

    code = (
        "import sys, time\nfrom pathlib import Path\nfrom gradwatch.sinks.mlflow import MlflowSink\n"
        "for uri in (None, 'http://127.0.0.1:9'):\n"
        "    sink = MlflowSink(uri, state_dir=Path(sys.argv[1]))\n    sink.close(time.monotonic() + 1)\n"
        "import threading\nassert threading.active_count() == 1\n"
        "sys.exit('mlflow' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60, check=False).returncode == 0


def test_handing_over_never_waits_for_the_server(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """No call is made on the caller's thread: a tracking client that blocks for good does not stop it."""
    import threading

    started, release = threading.Event(), threading.Event()
    with sink(mlflow_server.url, tmp_path) as made:
        connect = made._courier._tracking._connect

        def stuck() -> Any:
            started.set()
            release.wait(60)
            return connect()

        made._courier._tracking._connect = stuck  # type: ignore[method-assign]
        run = facts("stuck")
        made.run_started(run)
        assert started.wait(10)
        for number in range(100):
            made.window(run, window(number))
        made.heartbeat(run, "running", 1, START)
        made.run_ended(run, end(), {}, LAST_STEPS)
        assert made.pending() >= 100
        release.set()
        drained(made)
    assert len(stored_metrics(mlflow_server, run_id_of(made, "stuck"))) == 600


def test_closing_delivers_what_waits(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run = facts("closed")
    with sink(mlflow_server.url, tmp_path) as made:
        for number in range(30):
            made.window(run, window(number))
        made.layers(run, layer_table(1))
        made.close(time.monotonic() + 30)
        assert made.pending() == 0
    run_id = run_id_of(made, "closed")
    assert stored_metrics(mlflow_server, run_id) == expected_metrics([window(number) for number in range(30)])
    assert artifact(mlflow_server, run_id, "gradwatch/layers.json", tmp_path / "a")["data"][0][0] == 1
