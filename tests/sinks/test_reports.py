"""The report of an ended run on its MLflow run: a real agent, a real MLflow store, and what goes wrong."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from gradwatch.collect.model import RunEnd, RunFacts
from gradwatch.sinks import reports
from gradwatch.sinks.reports import Reports
from gradwatch.testing import JournalBuilder
from tests.services import eventually


def write(root: Path, run: str = "run-1") -> JournalBuilder:
    journal = JournalBuilder(root, run=run)
    for _ in range(50):
        journal.step(loss=1.0)
    return journal


def facts(journal: JournalBuilder) -> RunFacts:
    return RunFacts(journal.manifest.run, 0, journal.manifest, {}, 1_700_000_000.0)


END = RunEnd("finished", "", 1_700_000_100.0, 49)


def test_the_report_is_on_the_mlflow_run_when_the_agent_has_left(tmp_path: Path) -> None:
    root = tmp_path / "journals"
    write(root).end()
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = [sys.executable, "-m", "gradwatch", "agent", "--dir", str(root), "--listen", "127.0.0.1:0"]
    left = subprocess.run(
        [*command, "--until-done", "--mlflow", database, "--grace", "100"], capture_output=True, text=True, timeout=150
    )
    assert left.returncode == 0, left.stderr
    assert "report run=run-1" in left.stderr
    client = MlflowClient(database)
    [run] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert "gradwatch/report.html" in [item.path for item in client.list_artifacts(run.info.run_id, "gradwatch")]
    page = Path(client.download_artifacts(run.info.run_id, "gradwatch/report.html", str(tmp_path)))
    assert "The run finished after 50 steps." in page.read_text()


def test_a_store_that_is_not_there_costs_a_line_and_a_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = write(tmp_path / "journals")
    journal.end()
    sink = Reports(tmp_path / "journals", f"file://{tmp_path / 'none'}", lambda run: "0" * 32)
    sink.run_ended(facts(journal), END, {}, {})
    eventually(lambda: sink.errors, "the report to fail", 60)
    assert sink.pending() == 0
    assert "report-failed run=run-1" in caplog.text
    sink.close(time.monotonic() + 10)


def test_a_run_that_mlflow_does_not_know_is_not_waited_for_at_the_end(tmp_path: Path) -> None:
    journal = write(tmp_path / "journals")
    journal.end()
    sink = Reports(tmp_path / "journals", "sqlite://", lambda run: None)
    sink.run_ended(facts(journal), END, {}, {})
    sink.close(time.monotonic() + 30)
    assert sink.errors == 1


def test_a_report_that_hangs_is_ended_with_its_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = write(tmp_path / "journals")
    journal.end()
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 100\n")
    program.chmod(0o700)
    monkeypatch.setattr(reports.sys, "executable", str(program))
    sink = Reports(tmp_path / "journals", "sqlite://", lambda run: "0" * 32)
    sink.run_ended(facts(journal), END, {}, {})
    process = eventually(lambda: sink._process, "the report to begin")
    sink.close(time.monotonic())
    assert eventually(lambda: process.poll() is not None, "the report to be gone")


def test_the_address_of_the_store_is_no_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = write(tmp_path / "journals")
    journal.end()
    seen = tmp_path / "seen"
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "$MLFLOW_TRACKING_URI" > {seen}\n')
    program.chmod(0o700)
    monkeypatch.setattr(reports.sys, "executable", str(program))
    sink = Reports(tmp_path / "journals", "http://me:secret@mlflow", lambda run: "0" * 32)
    sink.run_ended(facts(journal), END, {}, {})
    sink.close(time.monotonic() + 30)
    *arguments, uri = seen.read_text().split()
    assert uri == "http://me:secret@mlflow"
    assert arguments == ["-m", "gradwatch", "report", str(tmp_path / "journals" / "run-1"), "--mlflow-run", "0" * 32]


def test_only_rank_0_is_reported_on(tmp_path: Path) -> None:
    journal = JournalBuilder(tmp_path / "journals", rank=1, world_size=2)
    journal.end()
    sink = Reports(tmp_path / "journals", "sqlite://", lambda run: "0" * 32)
    sink.run_ended(facts(journal), END, {}, {})
    assert sink._thread is None
    sink.close(time.monotonic() + 1)
