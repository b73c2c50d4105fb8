"""Closing ghosts: every guard by itself, against a real MLflow; live series by a real Prometheus."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from gradwatch.bridge.ghosts import NOTICE_SECONDS, REAP_SECONDS, Mode, Reachable, Reaper, live_series
from gradwatch.bridge.records import RunRecord, record_of
from gradwatch.sinks.mlflow.history import History
from tests.agent.processes import agent, writer, written
from tests.bridge.conftest import BridgeProcess, World
from tests.services import Prometheus, eventually

DAY = 86_400.0


@dataclass
class Clock:
    now: float

    def __call__(self) -> float:
        return self.now


class Scene:
    """A reaper over a world, with time and Prometheus in the test's hands."""

    def __init__(self, world: World, mode: Mode = "on") -> None:
        self.world, self.clock = world, Clock(world.now)
        self.live: set[str] = set()
        self.prometheus_is_down = False
        self.history = History(world.client.tracking_uri)
        self.reaper = Reaper(self.history, mode, self._ask, wall=self.clock)
        self.reachable = REAP_SECONDS

    def _ask(self, runs: Sequence[str]) -> set[str]:
        if self.prometheus_is_down:
            raise ValueError("down")
        return self.live & set(runs)

    def look(self) -> None:
        running = self.history.runs([self.world.experiment], "", "attributes.start_time DESC", 100, None).items
        self.reaper.look([record_of(run) for run in running], self.reachable)

    def announce_and_wait(self) -> None:
        self.look()
        self.clock.now += NOTICE_SECONDS

    def status(self, run_id: str) -> str:
        return str(self.world.client.get_run(run_id).info.status)


@pytest.fixture
def scene(world: World) -> Scene:
    return Scene(world)


def test_a_ghost_is_announced_then_closed_with_who_and_why(scene: Scene) -> None:
    run_id = scene.world.add_run("ghost", heartbeat=2 * DAY, started=3 * DAY)
    scene.look()
    scene.clock.now += NOTICE_SECONDS - 1
    scene.look()
    assert scene.status(run_id) == "RUNNING"
    scene.clock.now += 1
    scene.look()
    assert scene.status(run_id) == "FAILED"
    assert scene.reaper.reaped == 1
    run = scene.world.client.get_run(run_id)
    assert run.info.end_time == int(scene.world.now - 2 * DAY) * 1000
    assert "by gradwatch bridge on" in run.data.tags["gradwatch.reaped"]
    assert "no heartbeat since" in run.data.tags["gradwatch.reaped"]
    assert run.data.tags["gradwatch.state"] == "abrupt"


def test_a_young_heartbeat_none_of_ours_or_no_heartbeat_is_left_alone(scene: Scene) -> None:
    young = scene.world.add_run("young", heartbeat=DAY - 7200)
    foreign = scene.world.add_run("foreign", ours=False, heartbeat=None, started=9 * DAY)
    silent = scene.world.add_run("silent", heartbeat=None, started=9 * DAY)
    scene.announce_and_wait()
    scene.look()
    assert {scene.status(run_id) for run_id in (young, foreign, silent)} == {"RUNNING"}


@pytest.mark.parametrize("guard", ["off", "dry-run", "unreachable", "live", "prometheus down", "beats again"])
def test_each_guard_keeps_a_ghost_open(sqlite_world: World, guard: str) -> None:
    modes: dict[str, Mode] = {"off": "off", "dry-run": "dry-run"}
    scene = Scene(sqlite_world, modes.get(guard, "on"))
    run_id = sqlite_world.add_run("ghost", heartbeat=2 * DAY)
    scene.announce_and_wait()
    if guard == "unreachable":
        scene.reachable = REAP_SECONDS - 1
    scene.live = {"ghost"} if guard == "live" else set()
    scene.prometheus_is_down = guard == "prometheus down"
    if guard == "beats again":
        # After it was listed: what is read once more decides.
        listed = record_of(sqlite_world.client.get_run(run_id))
        sqlite_world.client.set_tag(run_id, "gradwatch.heartbeat", str(int(scene.clock.now)))
        scene.reaper.look([listed], scene.reachable)
    else:
        scene.look()
    assert scene.status(run_id) == "RUNNING"
    assert scene.reaper.reaped == 0
    assert "gradwatch.reaped" not in sqlite_world.tags(run_id)


def test_mlflow_counts_as_reachable_only_without_gaps() -> None:
    reachable = Reachable()
    assert reachable.seconds(0) == 0
    for now in range(0, 7201, 200):
        reachable.good(now)
    assert reachable.seconds(7200) == 7200
    assert reachable.seconds(7600) == 0
    reachable.good(7600)
    assert reachable.seconds(7600) == 0


@pytest.mark.parametrize(
    ("told", "status"),
    [("running", "RUNNING"), ("finished", "FINISHED"), ("failed", "FAILED"), ("killed", "KILLED")],
)
def test_a_returning_agent_opens_its_run_again_or_ends_it_truly(scene: Scene, told: str, status: str) -> None:
    run_id = scene.world.add_run("back", heartbeat=2 * DAY)
    scene.announce_and_wait()
    scene.look()
    scene.reaper.reopen([scene.world.experiment])
    assert scene.status(run_id) == "FAILED"
    scene.world.client.set_tag(run_id, "gradwatch.heartbeat", str(int(scene.clock.now)))
    scene.world.client.set_tag(run_id, "gradwatch.state", told)
    scene.reaper.reopen([scene.world.experiment])
    assert scene.status(run_id) == status
    assert scene.world.tags(run_id)["gradwatch.reaped"].startswith("opened again")
    scene.world.client.set_terminated(run_id, "FAILED")
    scene.reaper.reopen([scene.world.experiment])
    assert scene.status(run_id) == "FAILED"


@pytest.mark.parametrize("back_in_time", [True, False], ids=["while-it-trains", "when-it-has-ended"])
def test_the_run_of_a_real_agent_is_opened_again_when_it_returns(
    sqlite_world: World, tmp_path: Path, back_in_time: bool
) -> None:
    """Its node was cut off for two days: the agent was gone, the training was not."""
    scene, journals, world = Scene(sqlite_world), tmp_path / "journals", sqlite_world
    journals.mkdir()
    training = writer(journals, world.model, 40, 400.0, "wait")
    written(training)

    def runs() -> list[RunRecord]:
        ids = [each.experiment_id for each in world.client.search_experiments()]
        found = world.client.search_runs(ids, f"tags.`gradwatch.run` = '{world.model}'")
        return [record for each in found if (record := record_of(each)).heartbeat]

    def is_back() -> bool:
        scene.reaper.reopen([world.client.get_run(cut_off.run_id).info.experiment_id])
        return world.tags(cut_off.run_id)["gradwatch.reaped"].startswith("opened again")

    try:
        with agent(journals, "--mlflow", world.client.tracking_uri) as process:
            [cut_off] = eventually(runs, "its heartbeat stands in MLflow")
            process.kill()
        scene.clock.now += 2 * DAY
        for _ in range(2):
            scene.reaper.look(runs(), scene.reachable)
            scene.clock.now += NOTICE_SECONDS
        assert scene.reaper.reaped == 1
        assert scene.status(cut_off.run_id) == "FAILED"
        assert not is_back()
        with agent(journals, "--mlflow", world.client.tracking_uri):
            if back_in_time:
                eventually(is_back, "the bridge opens it again")
                assert scene.status(cut_off.run_id) == "RUNNING"
            assert training.stdin is not None
            training.stdin.close()
            assert training.wait(30) == 0
            if not back_in_time:
                eventually(lambda: world.tags(cut_off.run_id)["gradwatch.state"] == "finished", "its end is told")
                eventually(is_back, "the bridge ends it as it ended")
            eventually(lambda: scene.status(cut_off.run_id) == "FINISHED", "it is finished in MLflow")
    finally:
        training.kill()
        training.wait(10)


@pytest.mark.services
def test_live_series_come_from_a_prometheus_that_scrapes_the_bridge(tmp_path: Path, sqlite_world: World) -> None:
    metrics = tmp_path / "agent"
    metrics.mkdir()
    with BridgeProcess(tmp_path / "bridge", sqlite_world.client.tracking_uri) as bridge:
        eventually(bridge.is_ready, "the bridge has read MLflow", 60)
        with Prometheus(tmp_path / "blind", []) as blind, pytest.raises(ValueError, match="does not scrape"):
            live_series(blind.url)(["r"])
        rules = tmp_path / "rules.yml"
        rules.write_text(
            '{"groups": [{"name": "g", "interval": "250ms", "rules": [{"record": "gradwatch_run_state", '
            '"expr": "vector(1)", "labels": {"run": "li\\"ve", "state": "running"}}]}]}'
        )
        address = bridge.url.removeprefix("http://")
        with Prometheus(tmp_path / "prometheus", [address], rules=[rules]) as prometheus:
            mine = "gradwatch_bridge_last_poll_timestamp_seconds"
            eventually(lambda: prometheus.query(mine) and prometheus.query("gradwatch_run_state"), "both are scraped")
            assert live_series(prometheus.url)(['li"ve', "dead"]) == {'li"ve'}
    with pytest.raises(OSError):
        live_series(prometheus.url)(["r"])
