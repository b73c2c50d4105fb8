"""From a real MLflow server (sqlite and PostgreSQL) to metrics: retrains, heartbeats, versions, drift, ghosts."""

from __future__ import annotations

import pytest

from gradwatch.bridge import poll as poll_module
from gradwatch.bridge.exposition import history_page
from gradwatch.bridge.service import Bridge
from gradwatch.catalog import METRICS
from gradwatch.sinks.mlflow.facts import hyperparameters, missing_metadata
from tests.bridge.conftest import World, of_model, samples, settings

FULL = {
    "group.default.0.weight_decay": 0.01, "group.default.0.lr": 1e-3, "group.default.0.parameters": 900,
    "group.default.1.weight_decay": 0.0, "group.default.1.lr": 1e-3, "group.default.1.parameters": 10,
    "optimizer.default.class": "AdamW", "optimizer.default.eps": 1e-8, "scheduler.class": "CosineAnnealingLR",
    "config.batch_size": 64, "config.accumulation_steps": 1, "max_norm": 1.0, "precision.training": "float32",
    "seed": 7, "git.commit": "abc", "config.data_fingerprint": "sha256:1", "model.parameters.total": 910,
}  # fmt: skip


def polled(world: World, **more: object) -> Bridge:
    bridge = Bridge(settings(world.client.tracking_uri, poll_budget=60, **more))
    bridge.poll()
    assert bridge.ready, bridge.trouble
    return bridge


def test_retrains_by_model_and_outcome_the_last_five_and_the_last_duration(world: World) -> None:
    outcomes = [
        ("FINISHED", "finished"), ("FAILED", "failed"), ("FAILED", "abrupt"), ("KILLED", "killed"),
        ("FINISHED", "finished"), ("FINISHED", "finished"),
    ]  # fmt: skip
    for index, (status, state) in enumerate(outcomes):
        ago = 1000.0 - 100 * index
        world.add_run(f"r{index}", status=status, state=state, started=ago + 60 + index, ended=ago)
    world.add_run("still", status="RUNNING")
    world.add_run("too old", status="FAILED", state="failed", started=40 * 86400, ended=39 * 86400)
    world.add_run("other", status="FINISHED", ours=False, started=900, ended=100)
    bridge = polled(world)
    assert of_model(bridge, "retrains", world.model) == {
        ("finished",): 3, ("failed",): 1, ("killed",): 1, ("abrupt",): 1,
    }  # fmt: skip
    # The last five: failed, abrupt, killed, finished, finished.
    assert of_model(bridge, "retrains_recent_bad", world.model) == {(): 3}
    [seconds] = of_model(bridge, "retrain_duration_seconds", world.model).values()
    assert seconds == pytest.approx(65, abs=0.01)


def test_running_runs_tell_heartbeat_and_state_and_ghosts_are_counted(world: World) -> None:
    before = samples(polled(world))[("gradwatch_bridge_ghost_runs", frozenset())]
    world.add_run("alive", heartbeat=20, state="stalled")
    world.add_run("silent", heartbeat=700)
    world.add_run("never beat", heartbeat=None, started=700)
    world.add_run("just begun", heartbeat=None, started=30)
    world.add_run("foreign", ours=False, heartbeat=None, started=700)
    bridge = polled(world)
    beats = of_model(bridge, "run_heartbeat_timestamp_seconds", world.model)
    assert beats == {
        ("alive", "name of alive", "production"): int(world.now - 20),
        ("silent", "name of silent", "production"): int(world.now - 700),
    }
    states = of_model(bridge, "run_heartbeat_state", world.model)
    assert {run: state for (run, state), value in states.items() if value} == {"alive": "stalled", "silent": "running"}
    assert samples(bridge)[("gradwatch_bridge_ghost_runs", frozenset())] == before + 3


def test_an_end_is_seen_however_late_it_is_told_and_a_deletion_too(world: World) -> None:
    late = world.add_run("late")
    gone = world.add_run("gone", status="FINISHED", state="finished", ended=500)
    bridge = polled(world)
    assert of_model(bridge, "retrains", world.model)[("finished",)] == 1
    # Hours in the past: no search by time of the end, however far it reaches back, needs to find it.
    world.client.set_terminated(late, "FAILED", end_time=int((world.now - 7200) * 1000))
    world.client.delete_run(gone)
    bridge.poll()
    assert of_model(bridge, "retrains", world.model) == {
        ("finished",): 0, ("failed",): 1, ("killed",): 0, ("abrupt",): 0,
    }  # fmt: skip
    # A new attempt opens the run again: it is no ended retrain any more.
    world.client.update_run(late, status="RUNNING")
    bridge.poll()
    assert of_model(bridge, "retrains", world.model).get(("failed",), 0) == 0


def test_a_search_that_a_poll_cannot_finish_goes_on_in_the_next(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages of two and no time for a second one: the counts come once all was read, and are right."""
    monkeypatch.setattr(poll_module, "PAGE", 2)
    for index in range(7):
        sqlite_world.add_run(f"r{index}", status="FINISHED", state="finished", started=100 + index, ended=10 + index)
    bridge = Bridge(settings(sqlite_world.client.tracking_uri, poll_budget=60))
    turns = 0
    while not bridge.runs.runs.complete:
        bridge.runs.poll(lambda: False)
        turns += 1
        assert turns < 50
        bridge.exposition.show(history_page(bridge.runs.runs, {}, 0.0))
        if not bridge.runs.runs.complete:
            assert of_model(bridge, "retrains", sqlite_world.model) == {}
    assert turns > 1
    bridge.exposition.show(history_page(bridge.runs.runs, {}, 0.0))
    assert of_model(bridge, "retrains", sqlite_world.model)[("finished",)] == 7


def test_versions_by_alias_with_what_their_runs_recorded(world: World) -> None:
    metrics = {"validation/accuracy": 0.9, "validation/loss": 0.4, "validation/accuracy/tenant-7": 0.1}
    metrics |= {"generalization_gap/loss": 0.12}
    old = world.add_run("old", status="FINISHED", state="finished", params=FULL, metrics=metrics, ended=900)
    new = world.add_run(
        "new", status="FINISHED", state="finished", ended=500, started=700,
        params=FULL | {"group.default.0.weight_decay": 0.02}, metrics=metrics | {"validation/accuracy": 0.95},
    )  # fmt: skip
    bad = world.add_run("bad", status="FINISHED", ended=100, started=200, params={"config.batch_size": 32})
    world.client.create_registered_model(
        world.model, tags={"gradwatch.score_drop_budget": "0.02", "gradwatch.score_drop_budget.loss": "0.1"}
    )
    for run_id in (old, new):
        world.add_version(run_id, {"latency_p95_seconds": "0.012"})
    world.add_version(bad)
    world.client.set_registered_model_alias(world.model, "champion", "2")
    bridge = polled(world)
    assert of_model(bridge, "model_version_info", world.model) == {
        ("champion", "2", "new", "AdamW", "CosineAnnealingLR"): 1,
        ("previous", "1", "old", "AdamW", "CosineAnnealingLR"): 1,
    }
    recorded = of_model(bridge, "model_version_hyperparameter", world.model)
    names = ("weight_decay", "max_norm", "lr", "batch_size")
    # The group that holds most parameters gives the plain name its value.
    assert [recorded[("2", name)] for name in names] == [0.02, 1.0, 1e-3, 64]
    assert recorded[("1", "weight_decay")] == 0.01
    assert ("2", "model.parameters.total") not in recorded
    scores = of_model(bridge, "model_version_score", world.model)
    assert scores == {
        ("1", "accuracy"): 0.9, ("1", "loss"): 0.4, ("1", "latency_p95_seconds"): 0.012,
        ("2", "accuracy"): 0.95, ("2", "loss"): 0.4, ("2", "latency_p95_seconds"): 0.012,
    }  # fmt: skip
    assert of_model(bridge, "model_version_gap", world.model) == {("1", "loss"): 0.12, ("2", "loss"): 0.12}
    assert of_model(bridge, "score_drop_budget", world.model) == {("accuracy",): 0.02, ("loss",): 0.1}
    assert of_model(bridge, "metadata_complete", world.model) == {("1",): 1, ("2",): 1}
    # The newest run against the current version: |32 − 64| / 64, and what it does not say at all.
    drift = of_model(bridge, "hyperparameter_drift", world.model)
    assert drift[("batch_size",)] == 0.5
    assert drift[("weight_decay",)] == drift[("scheduler",)] == 1
    # Moving the alias, and a version without metadata, are seen at the next poll.
    world.client.set_registered_model_alias(world.model, "champion", "3")
    bridge.poll()
    assert {key[:2] for key in of_model(bridge, "model_version_info", world.model)} == {
        ("champion", "3"), ("previous", "2"),
    }  # fmt: skip
    assert of_model(bridge, "metadata_complete", world.model) == {("2",): 1, ("3",): 0}
    world.client.set_registered_model_alias(world.model, "previous", "1")
    bridge.poll()
    assert ("previous", "1") in {key[:2] for key in of_model(bridge, "model_version_info", world.model)}


@pytest.mark.filterwarnings("ignore:.*stages.*:FutureWarning")
def test_stages_are_read_where_there_is_no_alias_and_the_newest_without_either(sqlite_world: World) -> None:
    world = sqlite_world
    run_id = world.add_run("r", status="FINISHED", params={"group.default.0.lr": 0.1})
    world.client.create_registered_model(world.model)
    for _ in range(3):
        world.add_version(run_id)
    bridge = polled(world)
    assert {key[:2] for key in of_model(bridge, "model_version_info", world.model)} == {
        ("latest", "3"), ("previous", "2"),
    }  # fmt: skip
    world.client.transition_model_version_stage(world.model, "2", "Production")
    bridge.poll()
    assert {key[:2] for key in of_model(bridge, "model_version_info", world.model)} == {
        ("production", "2"), ("previous", "1"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("left_out", "what"),
    [
        ("weight_decay", "weight decay"), ("lr", "learning rate"), ("seed", "seed"), ("git.commit", "commit"),
        ("config.batch_size", "batch size"), ("max_norm", "clip threshold"), ("scheduler.class", "schedule"),
        ("config.data_fingerprint", "data fingerprint"), ("config.accumulation_steps", "accumulation"),
        ("precision.training", "precision"), ("optimizer.default.class", "optimizer"),
    ],
)  # fmt: skip
def test_metadata_is_complete_only_with_all_that_an_audit_needs(left_out: str, what: str) -> None:
    def missing(params: dict[str, object]) -> tuple[str, ...]:
        text = {key: str(value) for key, value in params.items()}
        numbers, words = hyperparameters(text)
        return missing_metadata(text, words | dict.fromkeys(numbers, ""), False)

    assert missing(FULL) == ()
    assert missing({key: value for key, value in FULL.items() if not key.endswith(left_out)}) == (what,)


def test_every_metric_of_the_bridge_is_exported(sqlite_world: World) -> None:
    world = sqlite_world
    run_id = world.add_run(
        "r", status="FINISHED", params=FULL, metrics={"validation/loss": 1.0, "generalization_gap/loss": 0.1}
    )
    world.add_run("alive")
    world.client.create_registered_model(world.model, tags={"gradwatch.score_drop_budget": "0.1"})
    world.add_version(run_id)
    exported = {name for name, _ in samples(polled(world))}
    assert {metric.exposed for metric in METRICS if metric.scope == "bridge"} <= exported


def test_before_mlflow_was_read_there_are_no_figures_and_the_bridge_is_not_ready() -> None:
    bridge = Bridge(settings("http://127.0.0.1:9"))
    assert not bridge.ready
    bridge.poll()
    assert "127.0.0.1" in bridge.trouble
    exported = {name for name, _ in samples(bridge)}
    assert "gradwatch_bridge_last_poll_timestamp_seconds" not in exported
    assert "gradwatch_retrains" not in exported
    assert "gradwatch_bridge_webhooks_total" in exported
