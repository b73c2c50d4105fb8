"""Which MLflow run is used, and that its status tells the truth. On a real server."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from gradwatch.collect.model import RunEnd
from gradwatch.sinks.mlflow import MlflowSink
from tests.services import MlflowServer, eventually
from tests.sinks.mlflow_parts import LAST_STEPS, START, drained, end, facts, sink, window


def client(server: MlflowServer) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(server.url)


def trainers_run(server: MlflowServer, name: str) -> str:
    """A run that the trainer opened; it stands at RUNNING."""
    theirs = client(server)
    return str(theirs.create_run(theirs.create_experiment(f"trainer-{name}")).info.run_id)


def status(server: MlflowServer, run_id: str) -> str:
    return str(client(server).get_run(run_id).info.status)


def tell_end(server: MlflowServer, state: Path, name: str, how: RunEnd, **target: Any) -> MlflowSink:
    """Windows and an end, delivered."""
    run = facts(name, **target)
    with sink(server.url, state) as made:
        made.run_started(run)
        made.window(run, window(0))
        made.run_ended(run, how, {"steps": 10}, LAST_STEPS)
        drained(made)
    return made


# -- which run


def test_a_new_run_stands_in_an_experiment_named_after_the_model(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_started(facts("new"))
        drained(made)
    run = client(mlflow_server).get_run(made.run_id("new"))
    assert client(mlflow_server).get_experiment(run.info.experiment_id).name == "model-new"
    assert (run.info.run_name, run.info.status) == ("name of new", "RUNNING")
    assert run.info.start_time == START * 1000


def test_the_trainers_run_is_used(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run_id = trainers_run(mlflow_server, "used")
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_started(facts("used", mlflow={"run_id": run_id}))
        drained(made)
    assert made.run_id("used") == run_id
    assert client(mlflow_server).get_experiment_by_name("model-used") is None


def test_a_run_that_became_active_later_takes_over(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_started(facts("late"))
        made.window(facts("late"), window(0))
        drained(made)
        ours, theirs = made.run_id("late"), trainers_run(mlflow_server, "late")
        assert ours is not None
        run = facts("late", mlflow={"run_id": theirs})
        made.run_started(run)
        made.window(run, window(1))
        drained(made)
    assert made.run_id("late") == theirs
    run_of_theirs = client(mlflow_server).get_run(theirs)
    assert run_of_theirs.data.params["gradwatch.lr"] == "0.001"
    assert run_of_theirs.data.metrics["gradwatch/loss_mean"] == window(1).values["loss_mean"]
    left = client(mlflow_server).get_run(ours)
    assert (left.info.status, left.data.tags["gradwatch.continued_in"]) == ("FINISHED", theirs)


def test_the_environments_run_is_used_unless_it_is_another_runs(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = trainers_run(mlflow_server, "environment")
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_started(facts("first"))
        drained(made)
        made.run_started(facts("second"))
        drained(made)
    assert made.run_id("first") == run_id
    assert made.run_id("second") not in (None, run_id)


def test_an_agent_that_lost_its_state_finds_the_run_by_its_tag(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    name = "it's lost"
    for number, state in enumerate(("first", "second")):
        with sink(mlflow_server.url, tmp_path / state) as made:
            made.run_started(facts(name, number))
            drained(made)
            found = made.run_id(name)
        if number == 0:
            first = found
    assert found == first
    assert client(mlflow_server).get_run(found).data.tags["gradwatch.attempt"] == "1"


def test_a_run_is_made_once_though_the_answer_got_lost(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    from gradwatch.sinks.mlflow.tracking import Kind, TrackingError

    with sink(mlflow_server.url, tmp_path) as made:
        tracking = made._courier._tracking
        create = tracking.create_run

        def lose_the_answer(*arguments: Any) -> Any:
            tracking.create_run = create  # type: ignore[method-assign]
            create(*arguments)
            raise TrackingError(Kind.RETRY, "timeout")

        tracking.create_run = lose_the_answer  # type: ignore[method-assign]
        made.run_started(facts("once"))
        drained(made)
    theirs = client(mlflow_server)
    assert len(theirs.search_runs([theirs.get_experiment_by_name("model-once").experiment_id])) == 1


def test_a_deleted_experiment_is_not_used(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    theirs = client(mlflow_server)
    theirs.delete_experiment(theirs.create_experiment("model-undone"))
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_started(facts("undone"))
        drained(made)
    run = theirs.get_run(made.run_id("undone"))
    assert theirs.get_experiment(run.info.experiment_id).name == "model-undone (gradwatch)"


def test_a_run_deleted_in_mlflow_is_said_once_and_left_alone(
    mlflow_server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = facts("deleted")
    with sink(mlflow_server.url, tmp_path) as made:
        made.window(run, window(0))
        drained(made)
        run_id = made.run_id("deleted")
        client(mlflow_server).delete_run(run_id)
        for number in range(1, 4):
            made.window(run, window(number))
            drained(made)
        made.heartbeat(run, "running", 1, START)
        made.run_ended(run, end("failed"), {}, LAST_STEPS)
        assert made.pending() == 0
    with sink(mlflow_server.url, tmp_path) as made:  # an agent started again knows it
        made.window(run, window(5))
        assert made.pending() == 0
    assert caplog.text.count("was deleted") == 1
    assert made.errors == 0
    assert "gradwatch.state" not in client(mlflow_server).get_run(run_id).data.tags


def test_another_rank_leaves_only_its_crash(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run_id = trainers_run(mlflow_server, "ranks")
    run = facts("ranks", mlflow={"run_id": run_id}, rank=3)
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_started(run)
        made.window(run, window(0))
        made.heartbeat(run, "running", 1, START)
        made.run_ended(run, end("failed"), {"steps": 1}, LAST_STEPS)
        drained(made)
    left = client(mlflow_server).get_run(run_id)
    assert (left.info.status, left.data.metrics, left.data.params) == ("RUNNING", {}, {})
    names = [entry.path for entry in client(mlflow_server).list_artifacts(run_id, "gradwatch/rank-3")]
    assert names == ["gradwatch/rank-3/last_steps.json", "gradwatch/rank-3/summary.json"]
    assert [entry.path for entry in client(mlflow_server).list_artifacts(run_id, "gradwatch")] == ["gradwatch/rank-3"]


# -- the end


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (end("finished"), "FINISHED"),
        (end("failed", "ValueError: bad batch", type="ValueError", message="bad batch"), "FAILED"),
        (end("killed", "SIGTERM", signal=15), "KILLED"),
        (end("abrupt", "gone without a word"), "FAILED"),
        (end("abrupt", "SIGKILL", signal=9), "KILLED"),
        (end("abrupt", "segmentation fault", signal=11), "FAILED"),
    ],
)
def test_an_end_is_told(mlflow_server: MlflowServer, tmp_path: Path, how: RunEnd, expected: str) -> None:
    name = f"end-{how.state}-{how.signal}"
    made = tell_end(mlflow_server, tmp_path, name, how)
    run = client(mlflow_server).get_run(made.run_id(name))
    assert (run.info.status, run.info.end_time) == (expected, how.time * 1000)
    assert run.data.tags["gradwatch.state"] == how.state
    assert run.data.tags["gradwatch.reason"] == how.reason
    assert run.data.tags["gradwatch.step"] == "99"
    assert run.data.metrics["gradwatch/loss_mean"] == window(0).values["loss_mean"]
    kept = [entry.path for entry in client(mlflow_server).list_artifacts(run.info.run_id, "gradwatch/attempt-0")]
    assert bool(kept) == (how.state != "finished"), "a bad end keeps its last steps for good"


def test_finished_becomes_failed_on_evidence(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    """MLflow's own exit hook says FINISHED of a training that an exception ended."""
    run_id = trainers_run(mlflow_server, "hook")
    client(mlflow_server).set_terminated(run_id, "FINISHED")
    tell_end(mlflow_server, tmp_path, "hook", end("failed"), mlflow={"run_id": run_id, "experiment": "1"})
    assert status(mlflow_server, run_id) == "FAILED"


def test_finished_stays_where_an_abrupt_end_proves_nothing(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run_id = trainers_run(mlflow_server, "left")
    client(mlflow_server).set_terminated(run_id, "FINISHED")
    tell_end(mlflow_server, tmp_path, "left", end("abrupt"), mlflow={"run_id": run_id, "experiment": "1"})
    assert status(mlflow_server, run_id) == "FINISHED"


@pytest.mark.parametrize("before", ["FAILED", "KILLED"])
def test_a_bad_status_never_becomes_a_good_one(mlflow_server: MlflowServer, tmp_path: Path, before: str) -> None:
    run_id = trainers_run(mlflow_server, f"bad-{before}")
    client(mlflow_server).set_terminated(run_id, before)
    tell_end(mlflow_server, tmp_path, f"bad-{before}", end("finished"), mlflow={"run_id": run_id, "experiment": "1"})
    assert status(mlflow_server, run_id) == before


def test_an_exit_hook_that_comes_late_does_not_hide_a_failure(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run_id = trainers_run(mlflow_server, "late-hook")
    run = facts("late-hook", mlflow={"run_id": run_id, "experiment": "1"})
    with sink(mlflow_server.url, tmp_path, verify_after=(0.1, 2.0)) as made:
        made.run_ended(run, end("failed"), {}, LAST_STEPS)
        eventually(lambda: status(mlflow_server, run_id) == "FAILED", "the failure is told")
        client(mlflow_server).set_terminated(run_id, "FINISHED")
        drained(made)
    assert status(mlflow_server, run_id) == "FAILED"


def test_a_trainer_ends_its_own_run(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run_id = trainers_run(mlflow_server, "own")
    run = facts("own", mlflow={"run_id": run_id, "experiment": "1"})
    with sink(mlflow_server.url, tmp_path, verify_after=(0.1, 60.0)) as made:
        made.run_ended(run, end("finished"), {}, LAST_STEPS)
        box = made._boxes["own"]
        eventually(lambda: box.end is None or box.end.looks == 2, "the status was looked at twice")
        run_now = client(mlflow_server).get_run(run_id)
        assert (run_now.data.tags["gradwatch.state"], run_now.info.status) == ("finished", "RUNNING")
        made.close(time.monotonic())  # the trainer would take its time


def test_a_run_that_its_trainer_forgot_is_ended(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run_id = trainers_run(mlflow_server, "forgot")
    tell_end(mlflow_server, tmp_path, "forgot", end("finished"), mlflow={"run_id": run_id, "experiment": "1"})
    assert status(mlflow_server, run_id) == "FINISHED"


def test_a_new_attempt_runs_again_and_ends_by_itself(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    made = tell_end(mlflow_server, tmp_path, "again", end("abrupt", "SIGKILL", signal=9))
    run_id = made.run_id("again")
    assert run_id is not None
    run = facts("again", 1)
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_started(run)
        made.heartbeat(run, "running", 100, START + 100)
        drained(made)
        resumed = client(mlflow_server).get_run(run_id)
        assert resumed.info.status == "RUNNING"
        assert resumed.data.tags["gradwatch.attempt"] == "1"
        assert (resumed.data.tags["gradwatch.reason"], resumed.data.tags["gradwatch.signal"]) == ("", "")
        made.run_ended(run, end("finished"), {}, LAST_STEPS)
        drained(made)
    assert status(mlflow_server, run_id) == "FINISHED"
    assert [entry.path for entry in client(mlflow_server).list_artifacts(run_id, "gradwatch/attempt-0")]


def test_a_run_that_somebody_else_failed_stays_so_when_resumed(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_started(facts("judged"))
        drained(made)
        run_id = made.run_id("judged")
        assert run_id is not None
        client(mlflow_server).set_terminated(run_id, "KILLED")
        made.run_started(facts("judged", 1))
        drained(made)
    assert status(mlflow_server, run_id) == "KILLED"


def test_a_heartbeat_after_the_end_does_not_undo_it(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run = facts("after")
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_ended(run, end("failed"), {}, LAST_STEPS)
        made.heartbeat(run, "running", 5, START)
        drained(made)
        made.heartbeat(run, "running", 5, START)
        drained(made)
    assert client(mlflow_server).get_run(made.run_id("after")).data.tags["gradwatch.state"] == "failed"
