"""MLflow unreachable, slow, failing, refusing: nothing waits for it, nothing is lost, nothing stands twice.

A real MLflow server behind a proxy that breaks requests.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gradwatch.sinks.mlflow import MlflowSink
from tests.services import MlflowServer, eventually, free_port
from tests.sinks.mlflow_parts import (
    LAST_STEPS,
    START,
    FaultyProxy,
    drained,
    end,
    expected_metrics,
    facts,
    half,
    layer_table,
    sink,
    stored_metrics,
    window,
)

WINDOWS = [window(number) for number in range(40)]


@pytest.fixture
def proxy(mlflow_server: MlflowServer) -> Iterator[FaultyProxy]:
    with FaultyProxy(mlflow_server.url) as started:
        yield started


def whole_life(made: MlflowSink, name: str) -> None:
    """A run from its start to a bad end."""
    run = facts(name)
    made.run_started(run)
    for each in WINDOWS:
        made.window(run, each)
    made.layers(run, layer_table(0))
    made.heartbeat(run, "running", 1, START)
    made.run_ended(run, end("failed"), {"steps": 400}, LAST_STEPS)


def assert_whole(server: MlflowServer, run_id: str | None) -> None:
    """All of `whole_life` stands in MLflow, once."""
    from mlflow import MlflowClient

    assert run_id is not None
    theirs = MlflowClient(server.url)
    run = theirs.get_run(run_id)
    assert stored_metrics(server, run_id) == expected_metrics(WINDOWS)
    assert (run.info.status, run.data.tags["gradwatch.state"]) == ("FAILED", "failed")
    assert run.data.params == {"gradwatch.lr": "0.001", "gradwatch.git.commit": "c0ffee"}
    names = {entry.path for entry in theirs.list_artifacts(run_id, "gradwatch")}
    assert {"gradwatch/layers.json", "gradwatch/last_steps.json", "gradwatch/summary.json"} <= names
    assert len(theirs.search_runs([run.info.experiment_id])) == 1


def test_half_of_all_calls_fail(mlflow_server: MlflowServer, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.rule = half(500)
    with sink(proxy.url, tmp_path) as made:
        whole_life(made, "half")
        drained(made, 90)
    assert made.errors > 3
    assert made.dropped == 0
    assert_whole(mlflow_server, made.run_id("half"))


def test_answers_are_lost_after_the_work_is_done(
    mlflow_server: MlflowServer, proxy: FaultyProxy, tmp_path: Path
) -> None:
    """The server takes the batch, the client hears a failure and sends it again: the same rows."""
    import urllib.request

    lost: set[bytes] = set()

    def lose(method: str, path: str, body: bytes) -> int | None:
        if "log-batch" not in path or body in lost:
            return None
        lost.add(body)
        forwarded = urllib.request.Request(
            mlflow_server.url + path, body, {"Content-Type": "application/json"}, method=method
        )
        urllib.request.urlopen(forwarded, timeout=30).close()
        return 502

    proxy.rule = lose
    with sink(proxy.url, tmp_path) as made:
        whole_life(made, "lost")
        drained(made, 90)
    assert len(lost) >= 3
    assert_whole(mlflow_server, made.run_id("lost"))


def test_nobody_listens_and_then_somebody_does(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    port = free_port()
    with sink(f"http://127.0.0.1:{port}", tmp_path) as made:
        whole_life(made, "absent")
        eventually(lambda: made.errors >= 3, "it was tried")
        waiting = made.pending()
        assert waiting >= len(WINDOWS)
        made.close(time.monotonic())
    with sink(mlflow_server.url, tmp_path) as again:  # the next agent, when there is a server
        drained(again)
    assert_whole(mlflow_server, again.run_id("absent"))


def test_a_slow_server_is_not_a_failure(mlflow_server: MlflowServer, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxy.rule = lambda method, path, body: 5.0 if "log-batch" in path and b"metrics" in body else None
    run = facts("slow")
    with sink(proxy.url, tmp_path) as made:
        for each in WINDOWS:
            made.window(run, each)
        drained(made, 90)
    assert (made.errors, made.dropped) == (0, 0)
    assert len([call for call in proxy.calls("log-batch") if b"metrics" in call[2]]) <= 4, "many windows a call"
    assert stored_metrics(mlflow_server, str(made.run_id("slow"))) == expected_metrics(WINDOWS)


def test_one_bad_metric_costs_only_itself(mlflow_server: MlflowServer, proxy: FaultyProxy, tmp_path: Path) -> None:
    """A batch of 240 metrics is refused for one of them."""
    bad = WINDOWS[16]
    marker = json.dumps(bad.values["loss_mean"]).encode()
    proxy.rule = lambda method, path, body: 400 if "log-batch" in path and marker in body else None
    run = facts("bad")
    with sink(proxy.url, tmp_path) as made:
        for each in WINDOWS:
            made.window(run, each)
        drained(made, 90)
    assert made.dropped == 1
    lost = ("gradwatch/loss_mean", bad.last_step, round(bad.end_time * 1000), bad.values["loss_mean"])
    assert stored_metrics(mlflow_server, str(made.run_id("bad"))) == [
        row for row in expected_metrics(WINDOWS) if row != lost
    ]


def test_a_refused_key_is_given_up_and_the_others_are_not(
    mlflow_server: MlflowServer, proxy: FaultyProxy, tmp_path: Path
) -> None:
    """On a server that fails half its calls besides, so that the search for the key must make progress."""
    chance = half(500)

    def refuse(method: str, path: str, body: bytes) -> int | float | None:
        if "log-batch" in path and b"grad_norm_max" in body:
            return chance(method, path, body) or 400
        return chance(method, path, body)

    proxy.rule = refuse
    run = facts("key")
    with sink(proxy.url, tmp_path) as made:
        for each in WINDOWS:
            made.window(run, each)
            if each is WINDOWS[5]:
                drained(made, 90)
        drained(made, 90)
    assert made.dropped == len(WINDOWS)
    expected = [row for row in expected_metrics(WINDOWS) if row[0] != "gradwatch/grad_norm_max"]
    assert stored_metrics(mlflow_server, str(made.run_id("key"))) == expected
    refused = [call for call in proxy.calls("log-batch") if b"grad_norm_max" in call[2]]
    assert len(refused) < 120, "a key that was refused before is not tried for ever"


def test_a_refused_parameter_or_tag_costs_only_itself(
    mlflow_server: MlflowServer, proxy: FaultyProxy, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    proxy.rule = lambda method, path, body: 400 if "log-batch" in path and re.search(b"bad_|run_name", body) else None
    run = facts("params", hyperparameters={"bad_one": 1, **{f"good_{number}": number for number in range(20)}})
    with sink(proxy.url, tmp_path) as made:
        made.run_started(run)
        drained(made, 90)
    data = MlflowClient(mlflow_server.url).get_run(made.run_id("params")).data
    assert len(data.params) == 20
    assert data.tags["gradwatch.version"] == "0.1.0"
    assert made.dropped == 2


def test_a_server_that_takes_only_short_values_gets_them(
    mlflow_server: MlflowServer, proxy: FaultyProxy, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    proxy.rule = lambda method, path, body: 400 if "log-batch" in path and b"x" * 500 in body else None
    with sink(proxy.url, tmp_path) as made:
        made.run_started(facts("short", hyperparameters={"text": "x" * 900, "lr": 1}))
        drained(made, 90)
    params = MlflowClient(mlflow_server.url).get_run(made.run_id("short")).data.params
    assert (len(params["gradwatch.text"]), params["gradwatch.lr"]) == (500, "1")
    assert made.dropped == 0


@pytest.mark.parametrize("code", [401, 403])
def test_expired_credentials_are_said_once_a_minute_and_retried(
    mlflow_server: MlflowServer,
    proxy: FaultyProxy,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "planted-token-1234")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "planted-password")
    proxy.rule = lambda method, path, body: code
    name = f"denied-{code}"
    with sink(proxy.url, tmp_path, denied_pause=0.05) as made:
        whole_life(made, name)
        eventually(lambda: made.errors >= 6, "it was tried again")
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
        assert "items wait and are tried again" in caplog.text
        proxy.rule = lambda method, path, body: None
        drained(made, 60)
    assert_whole(mlflow_server, made.run_id(name))
    assert "planted" not in caplog.text


def test_credentials_in_the_address_are_never_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with sink(f"http://somebody:planted-secret@127.0.0.1:{free_port()}", tmp_path) as made:
        made.run_started(facts("secret"))
        eventually(lambda: made.errors >= 1, "it was tried")
        made.close(time.monotonic())
    assert "failures" in caplog.text
    assert "planted-secret" not in caplog.text
    state = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert "planted-secret" not in state


def test_a_failing_artifact_store_does_not_hold_up_the_end(
    mlflow_server: MlflowServer, proxy: FaultyProxy, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    proxy.rule = lambda method, path, body: 500 if "mlflow-artifacts" in path else None
    with sink(proxy.url, tmp_path) as made:
        whole_life(made, "store")
        theirs = MlflowClient(mlflow_server.url)
        run_id = eventually(lambda: made.run_id("store"), "the run is known")
        eventually(lambda: theirs.get_run(run_id).info.status == "FAILED", "the end is told")
        assert stored_metrics(mlflow_server, run_id) == expected_metrics(WINDOWS)
        assert made.pending() > 0, "the artifacts are still tried"
        proxy.rule = lambda method, path, body: None
        drained(made)
    assert_whole(mlflow_server, run_id)


def test_a_hanging_artifact_store_does_not_hold_up_the_end(
    mlflow_server: MlflowServer, proxy: FaultyProxy, tmp_path: Path
) -> None:
    from mlflow import MlflowClient

    proxy.rule = lambda method, path, body: 10.0 if "mlflow-artifacts" in path else None
    with sink(proxy.url, tmp_path) as made:
        whole_life(made, "hanging")
        theirs = MlflowClient(mlflow_server.url)
        run_id = eventually(lambda: made.run_id("hanging"), "the run is known")
        eventually(lambda: theirs.get_run(run_id).info.status == "FAILED", "the end is told")
        assert not proxy.calls("mlflow-artifacts"), "before the first artifact was taken"
        made.close(time.monotonic())


def test_a_request_without_an_answer_ends_in_time(tmp_path: Path) -> None:
    """What MLflow would do by itself is to wait 120 s, seven times."""
    import socket

    with socket.socket() as listener:  # takes connections, says nothing
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        environment = os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "7"}
        code = (
            "import sys, time\nfrom pathlib import Path\nfrom gradwatch.sinks.mlflow import MlflowSink\n"
            "from tests.sinks.mlflow_parts import facts\n"
            "sink = MlflowSink(sys.argv[1], state_dir=Path(sys.argv[2]), backoff=(0.01, 0.01))\n"
            "sink.run_started(facts('silent'))\n"
            "deadline = time.monotonic() + 60\n"
            "while sink.errors < 3 and time.monotonic() < deadline: time.sleep(0.05)\n"
            "sink.close(time.monotonic() + 0.1)\nprint(sink.errors)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, address, str(tmp_path)],
            env=environment,
            timeout=120,
            check=True,
            capture_output=True,
            text=True,
        )
    assert int(done.stdout) >= 3


def test_a_long_outage_thins_the_oldest_windows_and_counts_them(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run = facts("long")
    windows = [window(number) for number in range(2000)]
    size = 100 * 400
    with sink(f"http://127.0.0.1:{free_port()}", tmp_path, max_backlog_bytes=size) as made:
        made.run_started(run)
        for each in windows:
            made.window(run, each)
        made.run_ended(run, end("failed"), {}, LAST_STEPS)
        dropped = made.dropped
        assert sum(box.size for box in made._boxes.values()) <= size
        made.close(time.monotonic())
    with sink(mlflow_server.url, tmp_path, max_backlog_bytes=size) as again:
        drained(again)
    from mlflow import MlflowClient

    run_id = str(again.run_id("long"))
    steps = sorted({step for key, step, _, _ in stored_metrics(mlflow_server, run_id) if key == "gradwatch/loss_mean"})
    assert dropped + len(steps) == len(windows), "what is not there was counted"
    assert steps[-30:] == [each.last_step for each in windows[-30:]], "the newest are all there"
    assert steps[0] < windows[1000].last_step, "what is left reaches far back"
    kept = MlflowClient(mlflow_server.url).get_run(run_id)
    assert kept.data.params["gradwatch.lr"] == "0.001"
    assert kept.info.status == "FAILED"


@pytest.mark.parametrize("instant", [0, 1, 2])
def test_an_agent_that_is_killed_loses_nothing(
    mlflow_server: MlflowServer, proxy: FaultyProxy, tmp_path: Path, instant: int
) -> None:
    """Killed with SIGKILL before, amid, or after delivering; the next one delivers the rest."""
    calls = [0]

    def stop_at(method: str, path: str, body: bytes) -> int | None:
        calls[0] += "log-batch" in path
        return 503 if calls[0] > (0, 3, 1000)[instant] else None

    proxy.rule = stop_at
    name = f"killed-{instant}"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom gradwatch.sinks.mlflow import MlflowSink\n"
        "from tests.sinks.test_mlflow_outages import whole_life\n"
        "sink = MlflowSink(sys.argv[1], state_dir=Path(sys.argv[2]), backoff=(0.01, 0.1))\n"
        "whole_life(sink, sys.argv[3])\nprint('handed over', flush=True)\ntime.sleep(600)"
    )
    agent = subprocess.Popen([sys.executable, "-c", code, proxy.url, str(tmp_path), name], stdout=subprocess.PIPE)
    try:
        assert agent.stdout is not None
        assert agent.stdout.readline() == b"handed over\n"
        eventually(lambda: calls[0] >= (1, 5, 3)[instant], "it delivers", 60)
    finally:
        agent.send_signal(signal.SIGKILL)
        agent.wait()
        agent.stdout.close()
    with sink(mlflow_server.url, tmp_path) as made:
        drained(made)
    assert_whole(mlflow_server, made.run_id(name))


def test_a_full_disk_costs_the_mirror_not_the_delivery(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    run = facts("full")
    with sink(mlflow_server.url, tmp_path) as made:
        made.run_started(run)
        drained(made)
        directory = made._boxes["full"].directory
        for path in ("rows.jsonl", "run.json.tmp"):
            (directory / path).symlink_to("/dev/full")  # refused: O_NOFOLLOW, as ENOSPC would be
        for each in WINDOWS:
            made.window(run, each)
        drained(made)
    assert made.errors >= 1
    assert stored_metrics(mlflow_server, str(made.run_id("full"))) == expected_metrics(WINDOWS)


def test_without_mlflow_one_line_says_how_to_get_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sink("http://127.0.0.1:9", tmp_path) as made:
        monkeypatch.setitem(sys.modules, "mlflow", None)
        whole_life(made, "missing")
        drained(made)
        made.window(facts("missing"), WINDOWS[0])
        assert made.pending() == 0
    assert "pip install 'gradwatch[agent]'" in caplog.text
    assert made.dropped > len(WINDOWS)
