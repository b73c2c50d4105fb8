"""``nonfinite-weight``: exact, from samples, on every rank."""

from __future__ import annotations

import math
from pathlib import Path

import torch

import gradwatch
from gradwatch.detect.nonfinite_weight import NonfiniteWeight
from gradwatch.detect.replay import replay
from gradwatch.testing import JournalBuilder
from tests.detect.support import codes, only, same_however_cut

CODE = "nonfinite-weight"


def lost(journal: JournalBuilder) -> None:
    """Clean, then broken by the gradient of step 7, told by the samples behind it, then restored."""
    for step in range(60):
        broken = 7 <= step < 40
        journal.step(grad_norm=math.nan if broken else 1.0, nonfinite=int(broken), grad_norm_l2=1.0)
        if step % 5 == 0:
            journal.sample([1.0, math.inf] if 7 < step < 40 else [1.0, 2.0], [0.1, 0.1])


def test_first_tensor_step_and_rank_and_a_page_in_a_row(tmp_path: Path) -> None:
    found = same_however_cut(tmp_path, lost, NonfiniteWeight)
    assert codes(found) == [(CODE, "ticket", 10), (CODE, "page", 15)]
    assert [f.active for f in found] == [False, False]
    assert found[0].evidence == {
        "step": 10,
        "rank": 0,
        "tensors": 1,
        "first_tensors": ["layer2.weight"],
        "last_finite_step": 5,
        "first_broken_gradient_step": 7,
    }


def test_a_broken_gradient_that_left_the_weights_whole_is_not_named(tmp_path: Path) -> None:
    def skipped_then_lost(journal: JournalBuilder) -> None:
        for step in range(30):
            journal.step(grad_norm=math.nan if step in (3, 12) else 1.0, nonfinite=int(step in (3, 12)))
            if step in (5, 20):
                journal.sample([1.0, math.inf if step == 20 else 1.0], [0.1, 0.1])

    [one] = same_however_cut(tmp_path, skipped_then_lost, NonfiniteWeight)
    assert one.evidence["first_broken_gradient_step"] == 12


def test_tensors_that_take_turns_in_samples_are_no_finding(tmp_path: Path) -> None:
    def turns(journal: JournalBuilder) -> None:
        for step in range(10):
            journal.step()
            journal.sample([1.0, math.nan] if step % 2 else [math.nan, math.nan], [0.1, math.nan])

    assert same_however_cut(tmp_path, turns, NonfiniteWeight) == []


def test_every_rank_is_watched_by_itself(tmp_path: Path) -> None:
    builders = [JournalBuilder(tmp_path, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(3):
        for rank, builder in enumerate(builders):
            builder.step()
            builder.sample([math.inf if rank else 1.0, 1.0], [0.1, 0.1])
    for builder in builders:
        builder.end()
    found = [f for f in replay(tmp_path) if f.code == CODE]
    assert [(f.severity, f.rank, f.step) for f in found] == [("ticket", 1, 0), ("page", 1, 1)]
    assert "on rank 1" in found[0].message


def test_a_training_whose_weights_turn_to_nan(tmp_path: Path) -> None:
    torch.manual_seed(0)
    last = torch.nn.Linear(8, 1)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, root=tmp_path) as run:
        for step in range(12):
            optimizer.zero_grad()
            loss = model(torch.randn(16, 4)).square().mean()
            loss.backward()
            if step == 5:
                assert last.weight.grad is not None
                last.weight.grad[0, 0] = math.nan
            optimizer.step()
            run.log_train(loss=loss)
    one = only(replay(tmp_path), CODE)
    assert (one.severity, one.step) == ("ticket", 8)
    assert one.evidence["last_finite_step"] == 4
    assert one.evidence["first_broken_gradient_step"] == 5
    assert "2.weight" in one.evidence["first_tensors"]


def test_a_sample_waits_for_the_rows_before_it(tmp_path: Path) -> None:
    """A replay reads all samples with the first 4,096 rows; what happened in later rows is said all the same."""
    with JournalBuilder(tmp_path) as journal:
        for step in range(4_700):
            broken = step in (4_300, 4_500)
            journal.step(grad_norm=math.nan if broken else 1.0, nonfinite=int(broken))
            if step % 200 == 0:
                journal.sample([1.0, math.inf if step == 4_600 else 1.0], [0.1, 0.1])
    one = only(replay(tmp_path), CODE)
    assert (one.step, one.evidence["last_finite_step"], one.evidence["first_broken_gradient_step"]) == (
        4_600,
        4_400,
        4_500,
    )
