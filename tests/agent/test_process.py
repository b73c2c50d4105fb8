"""The agent as a process: beside a writer, killed and started again, on a read-only journal, scraped by Prometheus."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.agent.processes import AgentProcess, agent, environment, writer, written
from tests.services import Prometheus, eventually, fetch

#: The states of a run whose process was killed.
GONE = {(f"state:{state}", "r1") for state in ("killed", "abrupt")}


def run_agent(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gradwatch", "agent", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment())


@pytest.mark.services
def test_prometheus_agrees_with_the_loop_on_the_clip_rate(tmp_path: Path) -> None:
    journals = tmp_path / "journals"
    journals.mkdir()
    with (
        agent(journals) as process,
        Prometheus(tmp_path / "prometheus", [process.url.removeprefix("http://")], interval="1s") as server,
    ):
        training = writer(journals, "r1", 400, 60.0, "finish")
        wrote = written(training)
        assert training.wait(30) == 0
        eventually(
            lambda: server.query('gradwatch_steps_total == 400 and on(run) gradwatch_run_state{state="finished"} == 1'),
            "the last step in Prometheus",
        )
        [(labels, steps)] = server.query('gradwatch_steps_total{run="r1"}')
        [(_, clipped)] = server.query('gradwatch_clipped_steps_total{run="r1"}')
        assert labels["optimizer"] == "default"
        assert (steps, clipped) == (400.0, float(wrote["clipped"]))
        # The rate between two scrapes is that of the steps between them.
        samples = server.get_json("/api/v1/query", query='{__name__=~"gradwatch_(clipped_)?steps_total",run="r1"}[1m]')
        series = {s["metric"]["__name__"]: s["values"] for s in samples["data"]["result"]}
        increase = {name: float(v[-1][1]) - float(v[0][1]) for name, v in series.items()}
        expected = increase["gradwatch_clipped_steps_total"] / increase["gradwatch_steps_total"]
        [(_, rate)] = server.query(
            "sum by (model, run) (rate(gradwatch_clipped_steps_total[1m]))"
            " / sum by (model, run) (rate(gradwatch_steps_total[1m]))"
        )
        assert rate == pytest.approx(expected, rel=1e-6)
        assert rate == pytest.approx(wrote["clipped"] / 400, abs=0.05)


def test_an_agent_killed_again_and_again_counts_every_step_once(tmp_path: Path) -> None:
    journals = tmp_path / "journals"
    journals.mkdir()
    training = writer(journals, "r1", 1_500, 300.0, "wait")
    rng = random.Random(0)
    seen = 0.0
    for _ in range(6):
        process = AgentProcess(journals)
        deadline = time.monotonic() + rng.uniform(0.0, 1.2)
        while time.monotonic() < deadline:
            now = process.metrics().get(("steps_total", "r1"), 0.0)
            assert now >= seen, "a counter went back"
            seen = now
            time.sleep(0.02)
        process.kill()
    wrote = written(training)
    with agent(journals) as process:
        eventually(lambda: process.metrics().get(("steps_total", "r1")) == 1_500, "every step")
        values = process.metrics()
        assert values["clipped_steps_total", "r1"] == wrote["clipped"]
        assert values["samples_total", "r1"] == 1_500 * 32
        assert values["grad_norm_distribution_count", "r1"] == 1_500
        assert values["grad_norm_distribution_sum", "r1"] == pytest.approx(wrote["norms"], rel=1e-9)
        assert ("state:running", "r1") in values
        training.kill()
        training.wait(10)
        # Killed where the kernel tells, abrupt where it does not.
        eventually(lambda: GONE & process.metrics().keys(), "the end that nobody told")
        assert process.stop() == 0


def test_a_second_attempt_goes_on_counting(tmp_path: Path) -> None:
    journals = tmp_path / "journals"
    journals.mkdir()
    with agent(journals) as process:
        first = writer(journals, "r1", 100, 1_000.0, "wait")
        one = written(first)
        eventually(lambda: process.metrics().get(("steps_total", "r1")) == 100, "the first attempt")
        first.kill()
        first.wait(10)
        eventually(lambda: GONE & process.metrics().keys(), "its end")
        second = writer(journals, "r1", 60, 1_000.0, "finish", 1, 80)
        assert second.wait(30) == 0
        eventually(lambda: ("state:finished", "r1") in process.metrics(), "the second attempt")
        values = process.metrics()
        assert values["steps_total", "r1"] == 140
        assert values["replayed_steps_total", "r1"] == 20
        assert values["run_attempt", "r1"] == 1
        assert one["steps"] == 100


def test_a_second_agent_says_so_and_leaves(tmp_path: Path) -> None:
    journals = tmp_path / "journals"
    journals.mkdir()
    with agent(journals) as process:
        second = run_agent("--dir", str(journals), "--listen", "127.0.0.1:0")
        assert second.returncode == 1
        assert "another agent follows" in second.stderr
        assert str(process.handle.pid) in second.stderr
        assert fetch(f"{process.url}/healthz") == "ok\n"
        assert process.stop() == 0
    assert not (journals / ".agent" / "agent.json").exists()


def test_a_read_only_journal_needs_a_state_of_its_own(tmp_path: Path) -> None:
    journals, state = tmp_path / "journals", tmp_path / "state"
    journals.mkdir()
    assert writer(journals, "r1", 50, 1_000.0, "finish").wait(30) == 0
    before = {path: path.stat().st_mtime_ns for path in journals.rglob("*")}
    with agent(journals, state=state) as process:
        eventually(lambda: process.metrics().get(("steps_total", "r1")) == 50, "the run")
        assert process.stop() == 0
    assert {path: path.stat().st_mtime_ns for path in journals.rglob("*")} == before
    assert oct(state.stat().st_mode & 0o777) == "0o700"
    assert {oct(path.stat().st_mode & 0o777) for path in state.rglob("*") if path.is_file()} == {"0o600"}


def test_until_done_waits_for_a_run_and_leaves_soon_after_the_last(tmp_path: Path) -> None:
    journals = tmp_path / "journals"
    journals.mkdir()
    with agent(journals, "--until-done") as process:
        assert writer(journals, "r1", 50, 500.0, "finish").wait(30) == 0
        assert process.handle.wait(20) == 0
    log = process.log.read_text()
    assert "end run=r1 attempt=0 state=finished step=49" in log
    assert len(log.splitlines()) < 20, "a line an event, never a line a step"


def test_until_done_waits_for_the_scrape_of_who_scrapes(tmp_path: Path) -> None:
    journals = tmp_path / "journals"
    journals.mkdir()
    with agent(journals, "--until-done", "--linger", "30") as process:
        process.metrics()
        training = writer(journals, "r1", 50, 500.0, "finish")
        assert training.wait(30) == 0

        def drained() -> bool:
            return "r1" in json.loads((journals / ".agent" / "agent.json").read_text())["drained"]

        eventually(drained, "the end is delivered")
        with pytest.raises(subprocess.TimeoutExpired):
            process.handle.wait(3)
        assert ("state:finished", "r1") in process.metrics()
        assert process.handle.wait(10) == 0


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--dir", "{tmp}/nowhere"], "is no directory"),
        (["--dir", "{tmp}", "--listen", "localhost"], "host:port"),
        (["--dir", "{tmp}", "--listen", "127.0.0.1:99999"], "host:port"),
        (["--dir", "{tmp}", "--tls-cert", "x.pem"], "both --tls-cert and --tls-key"),
        (["--dir", "{tmp}", "--token-file", "{tmp}/none"], "--token-file"),
        (["--dir", "{tmp}", "--state", "/proc/self/nowhere"], "cannot keep state"),
    ],
)
def test_wrong_usage_is_told_in_words(tmp_path: Path, options: list[str], what: str) -> None:
    done = run_agent(*(option.format(tmp=tmp_path) for option in options))
    assert done.returncode == 2
    assert what in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_a_clear_error(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    with agent(first) as process:
        done = run_agent("--dir", str(second), "--listen", process.url.removeprefix("http://"))
    assert done.returncode == 2
    assert "cannot listen on" in done.stderr
    assert "--listen" in done.stderr


def test_a_bearer_token_is_asked_for(tmp_path: Path) -> None:
    journals, token = tmp_path / "journals", tmp_path / "token"
    journals.mkdir()
    token.write_text("s3cret\n")
    with agent(journals, "--token-file", str(token)) as process:
        assert fetch(f"{process.url}/healthz") == "ok\n"
        assert fetch(f"{process.url}/metrics") is None
        assert fetch(f"{process.url}/metrics", headers={"Authorization": "Bearer wrong"}) is None
        answer = fetch(f"{process.url}/metrics", headers={"Authorization": "Bearer s3cret"})
        assert answer is not None
        assert "gradwatch_agent_runs 0.0" in answer
        assert "s3cret" not in process.log.read_text()
