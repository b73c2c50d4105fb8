"""``gradwatch runs``: the numbers of the last step, the state that the journal tells, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gradwatch.cli import main

#: A training that clips every fourth step: gradient norms 3 and 0.5; the loss is the step.
TRAINING = """
import os, signal, sys, torch, gradwatch
weight = torch.nn.Parameter(torch.zeros(1))
model = torch.nn.Module(); model.weight = weight
optimizer = torch.optim.SGD([weight], lr=0.0)
run = gradwatch.watch(model, optimizer, model_name=sys.argv[1], run_name=sys.argv[2])
for step in range(20):
    norm = 0.5 if step % 4 else 3.0
    (weight * norm).sum().backward()
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    optimizer.step(); optimizer.zero_grad()
    run.log_train(loss=float(step))
end = sys.argv[3]
if end == "killed": os.kill(os.getpid(), signal.SIGKILL)
if end == "failed": raise RuntimeError("out of coffee")
if end == "waits": print("here", flush=True); sys.stdin.read()
run.finish()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs that ended in three ways."""
    journals = tmp_path_factory.mktemp("journals")
    for end in ("finished", "failed", "killed"):
        done = subprocess.run([*arguments(end)], env=surroundings(journals, end), capture_output=True, timeout=120)
        assert (done.returncode == 0) == (end == "finished")
    return journals


def arguments(end: str) -> list[str]:
    return [sys.executable, "-c", TRAINING, "churn", f"the-{end}-one", end]


def surroundings(journals: Path, end: str) -> dict[str, str]:
    return {**os.environ, "GRADWATCH_DIR": str(journals), "GRADWATCH_RUN": f"run-{end}"}


def as_json(capsys: pytest.CaptureFixture[str], root: Path) -> dict[str, dict[str, Any]]:
    with pytest.raises(SystemExit) as ended:
        main(["runs", str(root), "--json"])
    assert ended.value.code == 0
    return {line["run"]: line for line in json.loads(capsys.readouterr().out)}


def test_how_each_run_ended(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    states = {run: line["state"] for run, line in as_json(capsys, root).items()}
    assert states == {"run-finished": "finished", "run-failed": "failed", "run-killed": "abrupt"}


@pytest.mark.parametrize("end", ["finished", "failed", "killed"])
def test_numbers_are_those_of_the_last_step(root: Path, capsys: pytest.CaptureFixture[str], end: str) -> None:
    line = as_json(capsys, root)[f"run-{end}"]
    assert (line["step"], line["loss"], line["grad_norm"]) == (19, 19.0, pytest.approx(0.5))
    assert line["clip_rate"] == 0.25
    assert (line["name"], line["model"], line["attempt"]) == (f"the-{end}-one", "churn", 0)


def test_a_run_that_lives_is_running(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with subprocess.Popen(
        arguments("waits"), env=surroundings(tmp_path, "waits"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as training:
        assert training.stdout is not None
        assert training.stdout.readline() == b"here\n"
        assert as_json(capsys, tmp_path)["run-waits"]["state"] == "running"
        training.communicate(timeout=60)
    assert as_json(capsys, tmp_path)["run-waits"]["state"] == "finished"


def test_the_table_shows_the_same(root: Path) -> None:
    command = [sys.executable, "-m", "gradwatch", "runs", str(root)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    [line] = [line for line in output.splitlines() if "the-killed-one" in line]
    assert line.split()[:7] == ["the-killed-one", "churn", "abrupt", "20", "19", "0.5", "25.0"]


def test_an_unreadable_journal_is_said_and_hides_no_other(tmp_path: Path, root: Path) -> None:
    broken = tmp_path / "broken" / "rank-0" / "attempt-0"
    broken.mkdir(parents=True)
    (broken / "manifest.json").write_text("{")
    (tmp_path / "run-failed").symlink_to(root / "run-failed")  # a link is not followed
    command = [sys.executable, "-m", "gradwatch", "runs", str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "manifest.json: not valid JSON" in output
    assert "no runs in" in output


def test_a_directory_that_is_not_there_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["runs", str(tmp_path / "nowhere")])
    assert ended.value.code == 2
    assert "is no directory" in capsys.readouterr().err
