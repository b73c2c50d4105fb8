"""``calibration-worse``, from the probabilities that a loop logs to the finding."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.detect.calibration import CalibrationWorse
from gradwatch.journal import JournalReader
from gradwatch.probe.calibration import expected_calibration_error
from gradwatch.testing import JournalBuilder
from tests.detect.support import codes, only, same_however_cut

CODE = "calibration-worse"


def by_hand(probabilities: list[list[float]], targets: list[int], bins: int = 15) -> float:
    """The same, sample by sample in float64."""
    buckets: dict[int, list[tuple[float, bool]]] = {}
    for row, target in zip(probabilities, targets):
        confidence = max(row)
        bucket = min(bins - 1, max(0, math.ceil(confidence * bins) - 1))
        buckets.setdefault(bucket, []).append((confidence, row.index(confidence) == target))
    total = 0.0
    for pairs in buckets.values():
        accuracy = sum(right for _, right in pairs) / len(pairs)
        total += len(pairs) / len(targets) * abs(accuracy - sum(c for c, _ in pairs) / len(pairs))
    return total


@pytest.mark.parametrize("classes", [2, 10])
def test_the_error_is_that_of_its_definition(classes: int) -> None:
    generator = torch.Generator().manual_seed(classes)
    probabilities = (3 * torch.randn(500, classes, generator=generator)).softmax(-1)
    targets = torch.randint(0, classes, (500,), generator=generator)
    told = expected_calibration_error(probabilities, targets)
    assert float(told) == pytest.approx(by_hand(probabilities.tolist(), targets.tolist()), abs=1e-6)
    if classes == 2:
        assert float(expected_calibration_error(probabilities[:, 1], targets)) == pytest.approx(float(told), abs=1e-6)


def test_shapes_that_do_not_fit_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"got \(4, 2\) and \(3,\)"):
        expected_calibration_error(torch.full((4, 2), 0.5), torch.zeros(3))
    assert math.isnan(float(expected_calibration_error(torch.empty(0, 2), torch.empty(0))))


def test_a_run_logs_it_beside_its_metrics_and_keeps_those_where_it_cannot(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, root=tmp_path) as run:
        model(torch.randn(4, 2)).sum().backward()
        optimizer.step()
        run.log_validation(loss=0.5, probabilities=torch.tensor([[0.9, 0.1], [0.6, 0.4]]), targets=torch.tensor([0, 1]))
        with pytest.warns(RuntimeWarning, match="log_validation"):
            run.log_validation(loss=0.25, probabilities=torch.rand(3, 2), targets=torch.zeros(5))
        directory = run.directory
    assert directory is not None
    reader = JournalReader(directory)
    told = [event["metrics"] for event in reader.poll().events if event["kind"] == "validation"]
    reader.close()
    assert told[0] == {"loss": 0.5, "ece": pytest.approx(0.5 * abs(1 - 0.9) + 0.5 * abs(0 - 0.6))}
    assert told[1] == {"loss": 0.25}


def drifting(journal: JournalBuilder) -> None:
    for value in [0.2, 0.1, 0.05, 0.04, 0.04, 0.05, 0.09, 0.13, 0.15, 0.16, 0.17, 0.05, 0.04, 0.04]:
        for _ in range(5):
            journal.step()
        journal.validation(ece=value, accuracy=0.9)


def test_a_calibration_that_gets_worse_is_information_until_it_is_back(tmp_path: Path) -> None:
    one = only(same_however_cut(tmp_path, drifting, CalibrationWorse), CODE)
    assert (one.severity, one.active) == ("info", False)
    assert one.evidence["best"] == pytest.approx(0.04)
    medians = [float(np.median([0.05, 0.09, 0.13])), 0.13, 0.15, 0.16]
    above = [median for median in medians if median - 0.04 > 0.05]
    assert one.evidence["ece"] == pytest.approx(above[2])


def test_noise_within_five_points_is_none(tmp_path: Path) -> None:
    def noisy(journal: JournalBuilder) -> None:
        for value in np.random.default_rng(0).uniform(0.02, 0.06, size=40).tolist():
            journal.step()
            journal.validation(ece=value)

    assert codes(same_however_cut(tmp_path, noisy, CalibrationWorse)) == []
