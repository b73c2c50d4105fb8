"""Names, limits, tables, and what is kept on disk: without a server."""

from __future__ import annotations

import json
import math
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.sinks.mlflow import entities, outbox, tables
from gradwatch.sinks.mlflow.complaints import Complaints
from gradwatch.sinks.mlflow.courier import Pauses
from gradwatch.sinks.mlflow.outbox import Outbox, PendingEnd, Target
from gradwatch.sinks.mlflow.tracking import Kind, TrackingError, _kind, beside, scrub
from tests.sinks.mlflow_parts import START, end, facts, layer_table, window

# -- names and limits


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_every_name_is_one_that_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_metric, _validate_param

    _validate_param(entities.safe_key("gradwatch." + name), "1")
    _validate_metric(entities.safe_key("gradwatch/" + name), 1.0, 0, 0)


def test_long_names_that_differ_at_their_end_stay_two() -> None:
    first, second = entities.safe_key("a" * 300 + "1"), entities.safe_key("a" * 300 + "2")
    assert len(first) == len(second) == 250
    assert first != second


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=9000) | st.integers() | st.booleans(), max_size=30))
@settings(max_examples=100, deadline=None)
def test_no_parameter_takes_the_place_of_another(hyperparameters: dict[str, str | int | bool]) -> None:
    made = entities.parameters(hyperparameters)
    assert len(made) == len(hyperparameters)
    assert all(len(value) <= 6000 for value in made.values())


def test_parameters_are_bounded_in_number() -> None:
    assert len(entities.parameters({str(number): number for number in range(5000)})) == 1000


def test_non_finite_values_are_counted_and_never_logged() -> None:
    values = {"loss_mean": math.nan, "loss_max": math.inf, "grad_norm_mean": 2.0, "nonfinite_values": 3.0}
    rows = entities.window_rows(facts("r"), replace(window(0), values=values, nonfinite=4, skipped=1))
    made = dict(zip(rows.keys, rows.values, strict=True))
    assert made == {
        "gradwatch/grad_norm_mean": 2.0,
        "gradwatch/nonfinite_values": 5.0,
        "gradwatch/steps": 10.0,
        "gradwatch/nonfinite_steps": 4.0,
        "gradwatch/skipped_steps": 1.0,
    }


def test_rows_have_the_step_and_time_of_the_windows_end() -> None:
    rows = entities.window_rows(facts("r"), replace(window(0), last_step=123, end_time=1_700_000_000.1234))
    assert (rows.step, rows.timestamp) == (123, 1_700_000_000_123)
    odd = entities.window_rows(facts("r"), replace(window(0), end_time=math.nan))
    assert odd.timestamp == 0


def test_one_named_optimizer_needs_no_name_in_its_metrics() -> None:
    rows = entities.window_rows(facts("r", optimizers=("adam",)), window(0, optimizer="adam"))
    assert "gradwatch/loss_mean" in rows.keys


@pytest.mark.parametrize(
    ("current", "wanted", "evidence", "becomes"),
    [
        ("RUNNING", "FINISHED", False, "FINISHED"),
        ("RUNNING", "FAILED", True, "FAILED"),
        ("SCHEDULED", "KILLED", True, "KILLED"),
        ("FINISHED", "FAILED", True, "FAILED"),
        ("FINISHED", "FAILED", False, None),
        ("FINISHED", "FINISHED", True, None),
        ("FAILED", "FINISHED", True, None),
        ("KILLED", "FINISHED", False, None),
        ("FAILED", "KILLED", True, None),
    ],
)
def test_what_a_status_may_become(current: str, wanted: str, evidence: bool, becomes: str | None) -> None:
    assert entities.next_status(current, wanted, evidence=evidence) == becomes


def test_an_abrupt_end_is_evidence_only_with_a_code_or_a_signal() -> None:
    assert not entities.is_evidence(end("abrupt"))
    assert not entities.is_evidence(end("abrupt", exit_code=0))
    assert entities.is_evidence(end("abrupt", exit_code=137))
    assert entities.is_evidence(end("abrupt", signal=9))
    assert not entities.is_evidence(end("finished"))


# -- tables


def test_layers_are_thinned_but_for_the_first_and_the_newest() -> None:
    history = tables.LayerHistory(max_rows=30)
    for step in range(100):
        history.add(layer_table(step))
    rows = json.loads(history.render())["data"]
    steps = sorted({row[0] for row in rows})
    assert len(rows) <= 30
    assert (steps[0], steps[-1]) == (0, 99)
    assert all(sum(row[0] == step for row in rows) == 3 for step in steps), "samples stay whole"


def test_a_sample_of_layers_that_comes_again_is_replaced() -> None:
    history = tables.LayerHistory()
    for step in (0, 1, 0):
        history.add(layer_table(step))
    assert [row[0] for row in json.loads(history.render())["data"]] == [1, 1, 1, 0, 0, 0]


def test_layers_are_read_back() -> None:
    history = tables.LayerHistory()
    for step in range(5):
        history.add(layer_table(step))
    assert tables.LayerHistory.parse(history.render()).render() == history.render()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"columns": 3}', "[" * 100_000, '{"columns":[],"data":[]}'])
def test_what_is_no_table_is_an_empty_history(text: str) -> None:
    assert json.loads(tables.LayerHistory.parse(text).render())["data"] == []


def test_cells_are_what_json_can_say() -> None:
    made = tables.table({"a": [1, math.nan, math.inf, -math.inf], "b": ["x", None, True, b"y"]})
    assert json.loads(made) == {
        "columns": ["a", "b"],
        "data": [[1, "x"], [None, None], ["inf", True], ["-inf", "b'y'"]],
    }


# -- the mirror


def filled(directory: Path) -> Outbox:
    directory.mkdir(parents=True, exist_ok=True)
    box = Outbox(directory, Target("r", "m", attempt=2, run_id="abc", created=True))
    box.given, box.tags = {"gradwatch.lr": "1"}, {"gradwatch.run": "r"}
    box.end = PendingEnd(2, "FAILED", START, True, {"gradwatch.state": "failed"})
    for number in range(10):
        box.append(entities.window_rows(facts("r"), window(number)))
    box.save()
    return box


def test_what_waits_is_read_back_whole(tmp_path: Path) -> None:
    box = filled(outbox.directory_of(tmp_path, "r"))
    found = outbox.load(box.directory, 10**9)
    assert found is not None
    assert (found.target, found.rows, found.tags, found.end) == (box.target, box.rows, box.tags, box.end)
    assert found.params == box.given
    assert found.size == box.size


def test_a_torn_last_line_costs_only_itself(tmp_path: Path) -> None:
    box = filled(outbox.directory_of(tmp_path, "r"))
    path = box.directory / "rows.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    found = outbox.load(box.directory, 10**9)
    assert found is not None
    assert list(found.rows) == list(box.rows)[:-1]


def test_files_of_the_mirror_are_for_the_owner_only(tmp_path: Path) -> None:
    box = filled(outbox.directory_of(tmp_path, "r"))
    box.write_artifact("gradwatch/x.json", "{}")
    assert {path.stat().st_mode & 0o077 for path in box.directory.rglob("*.json*")} == {0}


def test_a_mirror_does_not_grow_beyond_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "MAX_MIRROR", 20_000)
    box = filled(outbox.directory_of(tmp_path, "r"))
    for number in range(1000):
        box.append(entities.window_rows(facts("r"), window(number)))
        box.take(1)
        box.under_way.clear()
        assert (box.directory / "rows.jsonl").stat().st_size <= 21_000


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b", "", "\n", "x" * 5000, "ü\udcff"])
def test_a_hostile_name_stays_in_the_state_directory(tmp_path: Path, name: str) -> None:
    directory = outbox.directory_of(tmp_path, name)
    assert directory.parent == tmp_path
    assert len(directory.name) < 100
    directory.mkdir()


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"target": {"run": 3}}', '{"target": {"x": 1}}'])
def test_a_broken_state_is_no_state(tmp_path: Path, text: str) -> None:
    directory = outbox.directory_of(tmp_path, "r")
    directory.mkdir()
    (directory / "run.json").write_text(text)
    assert outbox.load(directory, 1000) is None


def test_thinning_keeps_the_first_and_the_newer_half() -> None:
    rows = [entities.window_rows(facts("r"), window(number)) for number in range(10)]
    box = Outbox(Path("/nonexistent"), Target("r", "m"), rows=deque(rows))
    assert box.thin() == 2
    assert [row.step for row in box.rows] == [9, 29, 49, 59, 69, 79, 89, 99]
    while box.rows:
        assert box.thin() > 0
    assert box.size == 0


# -- failures


def test_pauses_double_and_are_jittered() -> None:
    pauses = Pauses(0.5, 30.0, 20.0)
    for failures, whole in ((1, 0.5), (2, 1.0), (5, 8.0), (50, 30.0), (5000, 30.0)):
        drawn = [pauses.after(failures, Kind.RETRY) for _ in range(200)]
        assert whole / 2 <= min(drawn) < max(drawn) <= whole
        assert len(set(drawn)) > 100
    assert pauses.after(1, Kind.DENIED) >= 10.0


def test_failures_are_said_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    now = [0.0]
    complaints = Complaints(logging.getLogger("gradwatch.test"), lambda: now[0])
    for second in range(180):
        now[0] = float(second)
        complaints.failed("refused", 7)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[1] == "mlflow: 60 failures, 7 items wait and are tried again; last: refused"
    assert complaints.errors == 180


def test_errors_are_told_apart() -> None:
    from mlflow.exceptions import MlflowException, RestException

    def rest(code: str) -> Kind:
        return _kind(RestException({"error_code": code, "message": "x"}))

    assert rest("RESOURCE_DOES_NOT_EXIST") is Kind.GONE
    assert rest("INVALID_PARAMETER_VALUE") is Kind.REJECTED
    assert rest("PERMISSION_DENIED") is Kind.DENIED
    assert rest("TEMPORARILY_UNAVAILABLE") is Kind.RETRY
    assert rest("INTERNAL_ERROR") is Kind.RETRY
    for status, kind in ((401, Kind.DENIED), (404, Kind.RETRY), (413, Kind.REJECTED), (429, Kind.RETRY)):
        text = f"API request to endpoint /x failed with error code {status} != 200. Response body: 'no'"
        assert _kind(MlflowException(text)) is kind
    assert _kind(ImportError("boto3")) is Kind.UNUSABLE
    assert _kind(OSError("disk")) is Kind.RETRY


def test_credentials_do_not_survive_scrubbing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "planted-token")
    text = scrub(ValueError("https://me:planted-word@host/api failed with Bearer planted-token\n" + "x" * 1000))
    assert "planted" not in text
    assert text.startswith("ValueError: https://***@host/api failed")
    assert len(text) == 300
    assert isinstance(TrackingError(Kind.RETRY, text), Exception)


def test_artifacts_of_a_sqlite_file_lie_beside_it() -> None:
    assert beside("sqlite:////data/run/mlflow.db") == "file:///data/run/mlartifacts"
    assert beside("http://server") is None


def test_an_end_survives_the_mirror() -> None:
    pending = PendingEnd(1, "FAILED", START, True, {"a": "b"})
    assert PendingEnd(**json.loads(json.dumps(asdict(pending)))) == pending
