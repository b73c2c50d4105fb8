"""``gradwatch findings``: what the detectors say of a journal, with what an agent has kept of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gradwatch.catalog import FINDING
from gradwatch.cli import main
from gradwatch.cli.findings import read_findings
from gradwatch.cli.locate import find
from gradwatch.detect.ledger import Ledger

#: Norms around 0.5, and one of 50 at step 130, which a clip bounds.
TRAINING = """
import torch, gradwatch
weight = torch.nn.Parameter(torch.ones(1))
model = torch.nn.Module(); model.weight = weight
optimizer = torch.optim.SGD([weight], lr=0.0)
with gradwatch.watch(model, optimizer, model_name="churn", run_name="the-one", max_norm=1.0) as run:
    for step in range(160):
        norm = 50.0 if step == 130 else 0.5 + 0.01 * (step % 7)
        (weight * norm).sum().backward()
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step(); optimizer.zero_grad()
        run.log_train(loss=1.0)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    journals = tmp_path_factory.mktemp("journals")
    environment = {**os.environ, "GRADWATCH_DIR": str(journals), "GRADWATCH_RUN": "run-1"}
    subprocess.run([sys.executable, "-c", TRAINING], env=environment, check=True, timeout=120)
    return journals


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A copy of the journals, for a test to add to."""
    return Path(shutil.copytree(trained, tmp_path / "journals"))


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(["findings", *arguments])
    output, errors = capsys.readouterr()
    return int(ended.value.code or 0), output, errors


def test_json_has_the_promised_keys_and_the_spike(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = call(capsys, "the-one", "--dir", str(root), "--json")
    assert code == 0
    found: list[dict[str, Any]] = json.loads(output)
    assert all({"code", "severity", "run", "step", "message", "evidence", "advice"} <= set(one) for one in found)
    [spike] = [one for one in found if one["code"] == "gradient-spike"]
    assert (spike["run"], spike["step"], spike["severity"]) == ("run-1", 130, "info")
    assert spike["evidence"]["grad_norm"] == pytest.approx(50.0)
    assert spike["advice"] == FINDING["gradient-spike"].advice


def test_text_says_what_where_and_what_to_do(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = call(capsys, str(root / "run-1"))
    text = " ".join(output.split())
    assert code == 0
    assert "gradient-spike (info)" in text
    assert "At step 130 the pre-clip gradient norm was 50" in text
    assert f"What to do: {FINDING['gradient-spike'].advice}" in text


def test_what_an_agent_kept_of_overwritten_steps_is_added_and_nothing_twice(root: Path) -> None:
    run = find("run-1", root)
    alone = read_findings(run)
    [spike] = [finding for finding in alone if finding.code == "gradient-spike"]
    ledger = Ledger()
    for finding in (replace(spike, step=7), spike, replace(spike, step=8, attempt=3)):
        ledger.findings.append(finding)
    kept = root / ".agent" / "runs" / "run-1.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"findings": ledger.to_state()}))
    # Attempt 3 is not among the journals that were asked for.
    assert sorted(f.step for f in read_findings(run)) == sorted([7, *(f.step for f in alone)])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"findings": {"detectors": 1}}', '{"findings": null}'])
def test_a_broken_state_of_an_agent_hides_nothing(root: Path, text: str) -> None:
    run = find("run-1", root)
    alone = read_findings(run)
    kept = root / ".agent" / "runs" / "run-1.json"
    kept.parent.mkdir(parents=True)
    kept.write_text(text)
    assert read_findings(run) == alone


def test_a_run_that_is_not_there_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = call(capsys, "nobody", "--dir", str(tmp_path))
    assert code == 2
    assert "no run 'nobody'" in errors
