"""The demo's own parts: customers, corrupt batches, the score."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradwatch.demo.data import DAYS, MOST_EVENTS, SUPPORT, batches, collate, make_customers
from gradwatch.demo.model import ChurnLSTM, area_under_curve, predict
from gradwatch.demo.train import corrupt_steps


def test_event_counts_have_a_heavy_tail_with_a_few_above_300() -> None:
    counts = make_customers(6_000, seed=0).counts()
    assert np.median(counts) < 20
    assert 3 <= int((counts > 300).sum()) <= 60
    assert counts.max() <= MOST_EVENTS
    # Heavier than exponential: the top percent holds far more than it would there (4.6 times the mean, at least).
    assert np.sort(counts)[-60:].mean() > 5.6 * counts.mean()


def test_the_same_seed_gives_the_same_customers() -> None:
    first, second, other = make_customers(50, 1), make_customers(50, 1), make_customers(50, 2)
    assert all(np.array_equal(a, b) for a, b in zip(first.events, second.events, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first.events, other.events, strict=True))


def test_events_lie_within_the_180_days_and_in_order() -> None:
    customers = make_customers(200, 0)
    for history in customers.events:
        left = (history[:, 1] + 0.5) * DAYS
        assert (np.diff(left) <= 1e-4).all()
        assert left.max() <= DAYS + 1e-4
        assert left.min() >= -1e-4
        # The gaps are those of the days: log1p(gap) / 3 - 0.2, the first from day 0.
        days = np.concatenate([[0.0], DAYS - left])
        assert np.allclose(history[:, 0], np.log1p(np.clip(np.diff(days), 0, None)) / 3.0 - 0.2, atol=1e-4)
        assert (history[:, 3:].sum(1) == 1).all()


def test_who_leaves_writes_more_to_support_and_grows_quiet() -> None:
    customers = make_customers(4_000, 0)
    gone = customers.left > 0.5
    support = np.array([history[:, 3 + SUPPORT].mean() for history in customers.events])
    last_seen = np.array([history[-1, 1] for history in customers.events])
    assert support[gone].mean() > 1.3 * support[~gone].mean()
    assert last_seen[gone].mean() > 1.2 * last_seen[~gone].mean()


def test_padding_does_not_change_a_prediction() -> None:
    customers = make_customers(40, 3)
    torch.manual_seed(0)
    model = ChurnLSTM()
    order = np.argsort(customers.counts())
    alone = collate(customers, order[:1])
    padded = collate(customers, np.array([order[0], order[-1]]))
    assert padded.events.shape[1] > alone.events.shape[1]
    torch.testing.assert_close(
        predict(model, padded.events, padded.lengths)[0], predict(model, alone.events, alone.lengths)[0]
    )
    assert model.training


def test_a_corrupt_batch_has_a_gradient_that_stands_out() -> None:
    customers = make_customers(500, 0)
    torch.manual_seed(0)
    model = ChurnLSTM()
    batch = next(batches(customers, 64, 0))
    norms = []
    for candidate in (batch, batch.corrupted()):
        model.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            model(candidate.events, candidate.lengths), candidate.left
        )
        loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)))
    assert norms[1] > 10 * norms[0]
    assert norms[1] > 5.0


def test_an_epoch_holds_every_customer_once() -> None:
    customers = make_customers(64, 0)
    stream = batches(customers, 16, 0)
    epoch = [int(length) for _ in range(4) for length in next(stream).lengths]
    assert sorted(epoch) == sorted(customers.counts().tolist())


def test_four_corrupt_batches_at_known_steps() -> None:
    assert corrupt_steps(1200) == [480, 660, 840, 1020]
    assert len(set(corrupt_steps(8))) == 4


@pytest.mark.parametrize("seed", range(5))
def test_area_under_curve_is_the_share_of_pairs_in_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = (rng.random(60) < 0.4).astype(float)
    scores = np.round(rng.normal(size=60) + labels, 1)  # rounded: with ties
    better = scores[labels == 1][:, None] - scores[labels == 0][None, :]
    assert (better == 0).any()
    assert area_under_curve(scores, labels) == pytest.approx(((better > 0) + 0.5 * (better == 0)).mean(), abs=1e-12)


def test_area_under_curve_of_one_class_is_not_a_number() -> None:
    assert np.isnan(area_under_curve(np.array([0.1, 0.2]), np.array([1.0, 1.0])))
