"""Any model, any groups, any placement of the clip: rows equal a float64 reference, findings are the right ones.

Models here are bags of tensors whose loss is linear in them, so that their
gradients are drawn at will: shapes, dtypes and magnitudes mix, some tensors are
frozen, some get no gradient. The reference knows nothing of the probe: it looks
at the gradients at the points of the loop where the clip is placed, in float64.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gradwatch
from gradwatch.journal import Events, JournalReader

BOUNDED = settings(
    max_examples=60,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking would outlast the suite: a case is small as drawn
    derandomize=True,  # the same cases on every machine; a longer search is a matter of a larger number here
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
CLIP_EPSILON = 1e-6
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
    "adam": lambda groups: torch.optim.Adam(groups, lr=1e-3),
    "adam-plain": lambda groups: torch.optim.Adam(groups, lr=1e-3, foreach=False),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-3),
}


@dataclass(frozen=True)
class Part:
    """One tensor of a model: what it is, and what becomes of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    magnitude: float
    #: trained, frozen, or unused (it needs a gradient and gets none).
    role: str
    optimizer: int
    group: int


@dataclass(frozen=True)
class Case:
    """A training: its tensors, its optimizers, how it accumulates and clears."""

    parts: tuple[Part, ...]
    optimizers: tuple[str, str]
    micro_batches: int
    set_to_none: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...], several: bool = True, micro_batches: int = 1) -> Case:
    one_dtype = draw(st.sampled_from([None, *dtypes]))
    parts = draw(
        st.lists(
            st.builds(
                Part,
                shape=st.lists(st.integers(1, 5), min_size=0, max_size=3).map(tuple),
                dtype=st.just(one_dtype) if one_dtype else st.sampled_from(dtypes),
                magnitude=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
                role=st.sampled_from(["trained", "trained", "trained", "frozen", "unused"]),
                optimizer=st.integers(0, 1 if several else 0),
                group=st.integers(0, 2),
            ),
            min_size=1,
            max_size=7,
        )
    )
    # Each optimizer that there is has something to train.
    first = Part((3,), one_dtype or dtypes[0], 1.0, "trained", 0, 0)
    second = [Part((2, 2), one_dtype or dtypes[0], 1.0, "trained", 1, 0)] if any(p.optimizer for p in parts) else []
    return Case(
        (first, *second, *parts),
        (draw(st.sampled_from(sorted(OPTIMIZERS))), draw(st.sampled_from(sorted(OPTIMIZERS)))),
        draw(st.integers(micro_batches, 3)),
        draw(st.booleans()),
        draw(st.integers(0, 2**16)),
    )


class Bag(nn.Module):
    """Parameters without a network around them."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        for index, part in enumerate(case.parts):
            weight = nn.Parameter(torch.ones(part.shape, dtype=part.dtype), requires_grad=part.role != "frozen")
            self.register_parameter(f"w{index}", weight)


@dataclass
class Training:
    """A case at work. ``clip(self, micro_batch)`` runs behind each backward pass, ``late`` behind the step."""

    case: Case
    clip: Callable[[Training, int], None]
    late: Callable[[Training], None] = lambda training: None
    #: Norms of each tensor's gradient before any clip, a row for each step; NaN where there is none.
    norms: list[list[float]] = field(default_factory=list)
    #: Names of the tensors' columns in the journal.
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = Bag(self.case)
        self.parameters = list(self.model.parameters())
        self.optimizers: list[torch.optim.Optimizer] = []
        for index in sorted({part.optimizer for part in self.case.parts}):
            groups: dict[int, list[Tensor]] = {}
            for part, parameter in zip(self.case.parts, self.parameters):
                if part.optimizer == index:
                    groups.setdefault(part.group, []).append(parameter)
            made = [{"params": params, "lr": 1e-3 * (1 + number)} for number, params in groups.items()]
            self.optimizers.append(OPTIMIZERS[self.case.optimizers[index]](made))

    def run(self, steps: int) -> Training:
        generator = torch.Generator().manual_seed(self.case.seed)
        for _ in range(steps):
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=self.case.set_to_none)
            for micro_batch in range(self.case.micro_batches):
                loss = torch.zeros((), dtype=torch.float64)
                for part, parameter in zip(self.case.parts, self.parameters):
                    if part.role != "unused":
                        slope = torch.randn(part.shape, generator=generator, dtype=torch.float64) * part.magnitude
                        loss = loss + (slope * parameter).sum()
                loss.backward()
                if micro_batch == self.case.micro_batches - 1:
                    self.norms.append([norm_of(p.grad) for p in self.parameters])
                self.clip(self, micro_batch)
            for optimizer in self.optimizers:
                optimizer.step()
            self.late(self)
        return self

    def is_last(self, micro_batch: int) -> bool:
        return micro_batch == self.case.micro_batches - 1


def norm_of(grad: Tensor | None) -> float:
    return math.nan if grad is None else float(np.linalg.norm(grad.double().numpy().ravel()))


def watched(training: Training, steps: int, max_norm: float | None = None) -> Events:
    """Run a training under watch; its journal. The same training unwatched must come to the same weights."""
    with tempfile.TemporaryDirectory() as root, mock.patch.dict(os.environ, {"GRADWATCH_JOURNAL_MB": "1"}):
        names = {f"o{i}": optimizer for i, optimizer in enumerate(training.optimizers)}
        run = gradwatch.watch(training.model, names, max_norm=max_norm, config={"batch_size": 1}, root=Path(root))
        training.run(steps)
        run.finish()
        assert run.last_failure == ""
        assert run.directory is not None
        reader = JournalReader(run.directory)
        training.names = [tensor.name for tensor in reader.manifest.tensors]
        events = reader.poll(10_000)
        reader.close()
    twin = Training(training.case, training.clip, training.late).run(steps)
    for mine, theirs in zip(training.parameters, twin.parameters):
        assert torch.equal(mine, theirs) or torch.equal(mine.isnan(), theirs.isnan())
    return events


def codes(events: Events) -> set[str]:
    return {e["code"] for e in events.events if e["kind"] == "finding"}


def rows(training: Training, events: Events) -> Iterator[tuple[int, list[int], np.ndarray]]:
    """For each optimizer: its rows, the tensors that it holds, and their reference norms."""
    true = np.array(training.norms)
    for index in sorted({part.optimizer for part in training.case.parts}):
        held = [i for i, part in enumerate(training.case.parts) if part.optimizer == index]
        yield index, held, true[:, held]


def check_norms(training: Training, events: Events, first: int = 0) -> None:
    """Every tensor's norm and every optimizer's global norm, at each step from ``first``, against the reference."""
    for index, held, true in rows(training, events):
        mine = (events.steps["optimizer"] == index) & (events.steps.step >= first)
        true = true[first:]
        expected = np.sqrt(np.nansum(true**2, axis=1))
        np.testing.assert_allclose(events.steps["grad_norm_l2"][mine], expected, rtol=2e-5, atol=1e-12)
        columns = [i for i in held if training.case.parts[i].role != "frozen"]
        assert columns
        tensors = events.tensors.values[np.flatnonzero(mine)]
        at = [training.names.index(f"w{i}") for i in columns]
        kept = [held.index(i) for i in columns]
        np.testing.assert_allclose(tensors[:, at], true[:, kept], rtol=2e-5, atol=1e-12)


def clip_all(max_norm: float, norm_type: float = 2.0) -> Callable[[Training, int], None]:
    def clip(training: Training, micro_batch: int) -> None:
        if training.is_last(micro_batch):
            nn.utils.clip_grad_norm_(training.parameters, max_norm, norm_type)

    return clip


def clip_each_optimizer(max_norm: float) -> Callable[[Training, int], None]:
    def clip(training: Training, micro_batch: int) -> None:
        if training.is_last(micro_batch):
            for optimizer in training.optimizers:
                nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], max_norm)

    return clip


def clip_each_tensor(max_norm: float) -> Callable[[Training, int], None]:
    def clip(training: Training, micro_batch: int) -> None:
        if training.is_last(micro_batch):
            for parameter in training.parameters:
                nn.utils.clip_grad_norm_(parameter, max_norm)

    return clip


def clip_each_module(max_norm: float) -> Callable[[Training, int], None]:
    """Three tensors at a time, as they stand together in a module, whoever optimizes them."""

    def clip(training: Training, micro_batch: int) -> None:
        if training.is_last(micro_batch):
            for first in range(0, len(training.parameters), 3):
                nn.utils.clip_grad_norm_(training.parameters[first : first + 3], max_norm)

    return clip


def clip_value(threshold: float) -> Callable[[Training, int], None]:
    def clip(training: Training, micro_batch: int) -> None:
        if training.is_last(micro_batch):
            nn.utils.clip_grad_value_(training.parameters, threshold)

    return clip


def in_order(*clips: Callable[[Training, int], None]) -> Callable[[Training, int], None]:
    def clip(training: Training, micro_batch: int) -> None:
        for one in clips:
            one(training, micro_batch)

    return clip


def no_clip(training: Training, micro_batch: int) -> None:
    pass


PLACED_RIGHT = {
    "none": no_clip,
    "measured": clip_all(math.inf),
    "whole": clip_all(0.7),
    "above every norm": clip_all(1e9),
    "by optimizer": clip_each_optimizer(0.7),
    "by tensor": clip_each_tensor(0.3),
    "by module": clip_each_module(0.3),
    "twice": in_order(clip_all(2.0), clip_all(0.5)),
    "measured first": in_order(clip_all(math.inf), clip_all(0.7)),
    "by value": clip_value(0.05),
    "by value, then by norm": in_order(clip_value(0.05), clip_all(0.1)),
    "L1": clip_all(0.7, 1.0),
    "L3": clip_all(0.7, 3.0),
    "largest element": clip_all(0.05, math.inf),
}


@pytest.mark.parametrize("placement", sorted(PLACED_RIGHT))
@settings(BOUNDED, max_examples=25)
@given(case=cases(DTYPES))
def test_norms_are_true_and_nothing_is_found_where_the_clip_is_right(placement: str, case: Case) -> None:
    training = Training(case, PLACED_RIGHT[placement])
    events = watched(training, steps=4)
    assert codes(events) == set()
    check_norms(training, events)


@BOUNDED
@given(case=cases((torch.float32, torch.float64), several=False), max_norm=st.floats(1e-3, 1e3))
def test_threshold_and_coefficient_of_a_whole_clip(case: Case, max_norm: float) -> None:
    training = Training(case, clip_all(max_norm))
    events = watched(training, steps=3, max_norm=max_norm)
    assert codes(events) == set()
    total = np.sqrt(np.nansum(np.array(training.norms) ** 2, axis=1))
    np.testing.assert_allclose(events.steps["grad_norm"], total, rtol=2e-5)
    np.testing.assert_allclose(events.steps["clip_threshold"], max_norm)
    expected = np.minimum(1.0, max_norm / (total + CLIP_EPSILON))
    np.testing.assert_allclose(events.steps["clip_coefficient"], expected, rtol=2e-5)


@BOUNDED
@given(case=cases((torch.float32, torch.float64), several=False), first=st.floats(0.01, 10), then=st.floats(0.01, 10))
def test_two_clips_multiply(case: Case, first: float, then: float) -> None:
    training = Training(case, in_order(clip_all(first), clip_all(then)))
    events = watched(training, steps=3)
    assert codes(events) == set()
    total = np.sqrt(np.nansum(np.array(training.norms) ** 2, axis=1))
    once = np.minimum(1.0, first / (total + CLIP_EPSILON))
    twice = once * np.minimum(1.0, then / (total * once + CLIP_EPSILON))
    np.testing.assert_allclose(events.steps["clip_coefficient"], twice, rtol=1e-4)
    np.testing.assert_allclose(events.steps["clip_threshold"], min(first, then))
    np.testing.assert_allclose(events.steps["grad_norm_l2"], total, rtol=2e-5)


@BOUNDED
@given(case=cases((torch.float16,), several=False), magnitude=st.sampled_from([1.0, 300.0, 2e4]))
def test_half_precision_norms_are_true_and_an_overflow_is_found(case: Case, magnitude: float) -> None:
    # Each tensor as large as fp16 holds: torch's norm of them is inf, ours is not.
    large = Part((5, 5, 4), torch.float16, magnitude, "trained", 0, 0)
    case = Case((large, *case.parts), case.optimizers, 1, case.set_to_none, case.seed)
    used: list[float] = []

    def clip(training: Training, micro_batch: int) -> None:
        used.append(float(nn.utils.clip_grad_norm_(training.parameters, 0.7)))

    training = Training(case, clip)
    events = watched(training, steps=4)
    check_norms(training, events)
    true = np.sqrt(np.nansum(np.array(training.norms) ** 2, axis=1))
    assume(np.isfinite(true).all())  # a gradient that is itself too large has no true norm
    off = np.abs(np.array(used[: len(true)]) / true - 1)
    assume(not ((off > 0.015) & (off < 0.025)).any())
    assert codes(events) == ({"clip-norm-overflow"} if (off > 0.02).any() else set())


# -- the same models, and the clip where it does not belong


def each_micro_batch(training: Training, micro_batch: int) -> None:
    nn.utils.clip_grad_norm_(training.parameters, 1e-4)


def before_the_last_backward(training: Training, micro_batch: int) -> None:
    if micro_batch == training.case.micro_batches - 2:
        nn.utils.clip_grad_norm_(training.parameters, 1e-4)


def leaving_out_the_first(training: Training, micro_batch: int) -> None:
    if training.is_last(micro_batch):
        nn.utils.clip_grad_norm_(training.parameters[1:], 1e-4)


def put_back(training: Training, micro_batch: int) -> None:
    if training.is_last(micro_batch):
        before = [None if p.grad is None else p.grad.clone() for p in training.parameters]
        nn.utils.clip_grad_norm_(training.parameters, 1e-4)
        for parameter, grad in zip(training.parameters, before):
            parameter.grad = grad


PLACED_WRONG = {
    "clip-each-microbatch": each_micro_batch,
    "clip-before-backward": before_the_last_backward,
    "clip-partial": leaving_out_the_first,
    "clip-ineffective": put_back,
}


@pytest.mark.parametrize("code", sorted(PLACED_WRONG))
@settings(BOUNDED, max_examples=25)
@given(case=cases(DTYPES, several=False, micro_batches=2))
def test_a_clip_in_the_wrong_place_has_its_code_and_no_other(code: str, case: Case) -> None:
    # The one parameter on which backward passes are counted moves on at each sample: 0, 1, 2, 4, 8, 16.
    unused = sum(part.role == "unused" for part in case.parts)
    assume(unused <= 3)
    rest = Part((2, 3), case.parts[0].dtype, 1.0, "trained", 0, 0)
    case = Case((*case.parts, rest), case.optimizers, case.micro_batches, case.set_to_none, case.seed)
    events = watched(Training(case, PLACED_WRONG[code]), steps=10)
    assert codes(events) == {code}


@settings(BOUNDED, max_examples=25)
@given(case=cases(DTYPES, several=False))
def test_a_clip_behind_the_step_has_its_code_and_no_other(case: Case) -> None:
    def late(training: Training) -> None:
        nn.utils.clip_grad_norm_(training.parameters, 1e-4)

    rest = Part((2, 3), case.parts[0].dtype, 1.0, "trained", 0, 0)
    case = Case((*case.parts, rest), case.optimizers, case.micro_batches, case.set_to_none, case.seed)
    training = Training(case, no_clip, late)
    # Of up to seven tensors that get no gradient one is tried at each sample, the last at step 64. Until backward
    # passes are seen, a clip behind the former step is taken for one of this step.
    events = watched(training, steps=70, max_norm=1e-4)
    assert codes(events) == {"clip-after-step"}
    check_norms(training, events, first=int(np.flatnonzero(events.steps["backwards"])[0]))


@settings(BOUNDED, max_examples=15)
@given(case=cases(DTYPES, several=False))
def test_a_declared_clip_that_never_comes_is_found(case: Case) -> None:
    events = watched(Training(case, clip_all(math.inf)), steps=21, max_norm=1.0)
    assert codes(events) == {"clip-missing"}
