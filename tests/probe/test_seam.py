"""The seam's life: who is seen, who hears of it, and that torch is put back exactly."""

from __future__ import annotations

import gc
import importlib
import itertools
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter, utils
from torch.nn.utils import clip_grad, clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

from gradwatch.probe import seam
from gradwatch.probe.seam import ClipEvent, NormEvent, ValueClipEvent

FUNCTIONS = ("clip_grad_norm_", "_get_total_norm", "_clip_grads_with_norm_", "clip_grad_value_")


class Log:
    """A listener that notes what it hears, and can be made to fail."""

    def __init__(self, fails: BaseException | None = None) -> None:
        self.heard: list[Any] = []
        self.failures: list[Exception] = []
        self.fails = fails

    def _hear(self, event: Any) -> None:
        self.heard.append(event)
        assert not torch.is_grad_enabled()
        if self.fails is not None:
            raise self.fails

    def on_norm(self, event: NormEvent) -> None:
        self._hear(event)

    def on_clip(self, event: ClipEvent) -> None:
        self._hear(event)

    def before_value_clip(self, event: ValueClipEvent) -> None:
        self._hear(event)

    def on_value_clip(self, event: ValueClipEvent, token: object) -> None:
        self._hear(event)

    def on_failure(self, error: Exception) -> None:
        self.failures.append(error)

    @property
    def clips(self) -> list[ClipEvent]:
        return [e for e in self.heard if isinstance(e, ClipEvent)]


def state_of_torch() -> list[Any]:
    cells = [getattr(clip_grad, name).__closure__[0].cell_contents for name in FUNCTIONS]
    names = ("clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_", "clip_grad_value_")
    return cells + [getattr(clip_grad, n) for n in FUNCTIONS] + [getattr(utils, n) for n in names]


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = state_of_torch()
    yield
    monkeypatch.undo()
    assert not seam.installed()
    assert all(a is b for a, b in zip(before, state_of_torch(), strict=True))


@pytest.fixture
def log() -> Iterator[Log]:
    listener = Log()
    seam.acquire(listener)
    yield listener
    seam.release(listener)


def parameters(*dtypes: torch.dtype, size: float = 5.0) -> list[Parameter]:
    made = []
    for index, dtype in enumerate(dtypes or (torch.float32,) * 3):
        p = Parameter(torch.zeros(4, dtype=dtype))
        p.grad = torch.full((4,), size + index, dtype=dtype)
        made.append(p)
    return made


def test_every_style_of_caller_is_seen(log: Log) -> None:
    ps = parameters()
    before = importlib.import_module("torch.nn.utils.clip_grad")
    for call in (
        lambda: torch.nn.utils.clip_grad_norm_(ps, 1.0),
        lambda: clip_grad_norm_(ps, 1.0),
        lambda: before.clip_grad_norm_(ps, max_norm=1.0),
        lambda: clip_grads_with_norm_(ps, 1.0, get_total_norm([p.grad for p in ps if p.grad is not None])),
        lambda: torch.nn.utils.clip_grads_with_norm_(
            ps, 1.0, torch.nn.utils.get_total_norm(p.grad for p in ps if p.grad is not None)
        ),
        lambda: torch.nn.utils.clip_grad_norm(ps, 1.0),
    ):
        log.heard.clear()
        call()
        norm, clip = log.heard
        assert isinstance(norm, NormEvent)
        assert isinstance(clip, ClipEvent)
        assert clip.norm is not None
        assert clip.norm.total is norm.total is clip.total_norm
    log.heard.clear()
    clip_grad_value_(ps, 0.1)
    torch.nn.utils.clip_grad_value_(ps, clip_value=0.1)
    assert [e.clip_value for e in log.heard] == [0.1] * 4
    assert log.heard[0] is log.heard[1]
    assert log.failures == []


def test_the_manifest_is_told_how_each_entry_point_is_seen_whether_or_not_it_is_installed() -> None:
    names = ("clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_", "clip_grad_value_")
    assert seam.coverage() == dict.fromkeys(names, "cell")
    log = Log()
    seam.acquire(log)
    assert seam.coverage() == dict.fromkeys(names, "cell")
    seam.release(log)


def test_runs_may_end_in_any_order_and_each_hears_what_happened_in_its_time() -> None:
    for first, second in itertools.permutations((0, 1)):
        logs = [Log(), Log()]
        for log in logs:
            seam.acquire(log)
        clip_grad_norm_(parameters(), 1.0)
        seam.release(logs[first])
        clip_grad_norm_(parameters(), 1.0)
        assert seam.installed()
        seam.release(logs[second])
        assert not seam.installed()
        clip_grad_norm_(parameters(), 1.0)
        assert len(logs[first].clips) == 1
        assert len(logs[second].clips) == 2


def test_a_listener_held_twice_hears_once_and_must_let_go_twice() -> None:
    log = Log()
    seam.acquire(log)
    seam.acquire(log)
    clip_grad_norm_(parameters(), 1.0)
    assert len(log.clips) == 1
    seam.release(log)
    clip_grad_norm_(parameters(), 1.0)
    assert len(log.clips) == 2
    seam.release(log)
    seam.release(log)  # once too often does no harm
    seam.release(Log())
    assert not seam.installed()


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16)])
def test_what_a_listener_raises_goes_to_itself_alone(dtypes: tuple[torch.dtype, ...], log: Log) -> None:
    broken = Log(fails=ValueError("mine"))
    seam.acquire(broken)
    try:
        total = clip_grad_norm_(parameters(*dtypes), 1.0)
        clip_grad_value_(parameters(), 1.0)
    finally:
        seam.release(broken)
    assert total == clip_grad_norm_(parameters(*dtypes), 1.0)
    # Norm and clip; before the clip by value, and not after it, since it has no token to be given back.
    assert [str(e) for e in broken.failures] == ["mine"] * 3
    assert len(log.clips) == 2
    assert log.failures == []


def test_a_listener_that_cannot_even_hear_of_its_failure_changes_nothing() -> None:
    class Hopeless(Log):
        def on_failure(self, error: Exception) -> None:
            raise error

    hopeless = Hopeless(fails=ValueError("mine"))
    seam.acquire(hopeless)
    ps = parameters()
    clip_grad_norm_(ps, 1.0)
    seam.release(hopeless)
    assert len(hopeless.heard) == 2
    assert float(torch.cat([p.grad for p in ps if p.grad is not None]).norm()) == pytest.approx(1.0)


def test_the_users_interrupt_goes_through(log: Log) -> None:
    impatient = Log(fails=KeyboardInterrupt())
    seam.acquire(impatient)
    with pytest.raises(KeyboardInterrupt):
        clip_grad_norm_(parameters(), 1.0)
    seam.release(impatient)
    assert impatient.failures == []


def test_an_exception_in_torch_leaves_the_seam_working(log: Log) -> None:
    with pytest.raises(TypeError):
        get_total_norm(3)  # type: ignore[arg-type]
    ps = parameters(torch.float32, torch.bfloat16)
    ps[0].grad[0] = float("nan")  # type: ignore[index]
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_(ps, 1.0, error_if_nonfinite=True)
    assert log.clips == []
    clip_grad_norm_(parameters(), 1.0)
    assert len(log.clips) == 1


def test_a_listener_may_clip_and_measure_itself() -> None:
    class Curious(Log):
        after: Tensor | None = None

        def on_clip(self, event: ClipEvent) -> None:
            super().on_clip(event)
            self.after = get_total_norm(event.grads)

    curious = Curious()
    seam.acquire(curious)
    clip_grad_norm_(parameters(), 2.0)
    seam.release(curious)
    assert curious.after == pytest.approx(2.0, rel=1e-5)
    assert [type(e) for e in curious.heard] == [NormEvent, ClipEvent, NormEvent]
    assert curious.failures == []


def test_a_clip_by_a_total_of_another_origin_has_no_norm(log: Log) -> None:
    ps = parameters()
    grads = [p.grad for p in ps if p.grad is not None]
    total = get_total_norm(grads)
    clip_grads_with_norm_(ps, 1.0, total.clone())
    other = get_total_norm(grads[:1])
    clip_grads_with_norm_(ps, 1.0, total)  # no longer the newest
    clip_grads_with_norm_(ps[:1], 1.0, other)
    clip_grads_with_norm_(ps[1:], 1.0, other)  # one total for several groups
    assert [c.norm is not None for c in log.clips] == [False, False, True, True]


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16)])
def test_no_gradient_outlives_its_step(dtypes: tuple[torch.dtype, ...]) -> None:
    class Deaf(Log):
        def _hear(self, event: Any) -> None: ...

    deaf = Deaf()
    seam.acquire(deaf)
    ps = parameters(*dtypes)
    grads = [weakref.ref(p.grad) for p in ps]
    gc.collect()
    gc.disable()
    try:
        total = get_total_norm(p.grad for p in ps if p.grad is not None)
        clip_grad_norm_(ps, 1.0)
        kept = get_total_norm(p.grad for p in ps if p.grad is not None)
        for p in ps:
            p.grad = None
        assert [g() for g in grads] == [None, None]
        assert total > kept
    finally:
        gc.enable()
        seam.release(deaf)


def test_threads_that_clip_at_once_do_not_see_each_others_norms(log: Log) -> None:
    sizes = [1.0, 10.0, 100.0]
    results: dict[float, set[float]] = {size: set() for size in sizes}
    start = threading.Barrier(len(sizes) + 1)
    errors: list[BaseException] = []

    def train(size: float) -> None:
        try:
            start.wait(10)
            for _ in range(60):
                for dtypes in ((torch.float32,) * 2, (torch.float64, torch.float32)):
                    ps = parameters(*dtypes, size=size)
                    total = get_total_norm([p.grad for p in ps if p.grad is not None])
                    clip_grads_with_norm_(ps, 1.0, total)
                    results[size].add(round(float(clip_grad_norm_(parameters(*dtypes, size=size), 1.0)), 2))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    start.wait(10)
    comers = [Log() for _ in range(50)]
    for comer in comers:  # runs begin and end meanwhile
        seam.acquire(comer)
        seam.release(comer)
    for thread in threads:
        thread.join(60)
    assert errors == []
    assert results == {size: {round(2 * (size**2 + (size + 1) ** 2) ** 0.5, 2)} for size in sizes}
    assert len(log.clips) == 60 * 2 * 2 * len(sizes)
    for clip in log.clips:
        assert clip.norm is not None
        assert all(a is b for a, b in zip(clip.norm.tensors, clip.grads, strict=True))
        assert clip.norm.norms is not None
        assert float(clip.norm.norms.double().norm()) == pytest.approx(float(clip.total_norm), rel=1e-5)
    assert log.failures == [f for comer in comers for f in comer.failures] == []


def test_with_nobody_listening_in_a_thread_that_is_mid_call_torch_goes_on() -> None:
    """A run that ends inside a clip: who holds the stand-in still gets torch's result."""
    log = Log()
    seam.acquire(log)
    stand_in = clip_grad.clip_grad_norm_.__closure__[0].cell_contents
    seam.release(log)
    seam.acquire(log)
    assert clip_grad.clip_grad_norm_.__closure__[0].cell_contents is not stand_in
    seam.release(log)
    ps = parameters()
    assert stand_in(ps, 1.0) == parameters_norm(parameters())


def parameters_norm(ps: list[Parameter]) -> Tensor:
    return get_total_norm([p.grad for p in ps if p.grad is not None])


class TestOthersWhoPatchTorch:
    def test_a_wrapper_on_the_attribute_is_looked_below(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import functools

        inner = clip_grad.clip_grad_norm_
        calls = []

        @functools.wraps(inner)
        def theirs(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return inner(*args, **kwargs)

        monkeypatch.setattr(clip_grad, "clip_grad_norm_", theirs)
        monkeypatch.setattr(utils, "clip_grad_norm_", theirs)
        assert seam.coverage()["clip_grad_norm_"] == "cell"
        log = Log()
        seam.acquire(log)
        torch.nn.utils.clip_grad_norm_(parameters(), 1.0)
        inner(parameters(), 1.0)
        seam.release(log)
        assert len(log.clips) == 2
        assert calls == [1]
        assert torch.nn.utils.clip_grad_norm_ is theirs

    @pytest.mark.parametrize("name", ["clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_", "clip_grad_value_"])
    def test_a_function_without_cell_is_replaced_as_attribute(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        private = name if name in vars(clip_grad) else f"_{name}"
        wrapped = getattr(clip_grad, private)

        def plain(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                return wrapped.__wrapped__(*args, **kwargs)

        plain.__wrapped__ = wrapped.__wrapped__  # type: ignore[attr-defined]
        monkeypatch.setattr(clip_grad, private, plain)
        monkeypatch.setattr(utils, name, plain)
        assert seam.coverage()[name] == "attribute"
        truth = [p.grad for p in self._clip(parameters(torch.float32, torch.float64))]
        log = Log()
        seam.acquire(log)
        assert seam.coverage()[name] == "attribute"
        assert getattr(utils, name) is not plain
        clipped = [p.grad for p in self._clip(parameters(torch.float32, torch.float64))]
        utils.clip_grad_value_(parameters(), 0.5)
        seam.release(log)
        assert all(torch.equal(a, b) for a, b in zip(truth, clipped, strict=True))
        assert [type(e) for e in log.heard] == [NormEvent, ClipEvent] * 2 + [ValueClipEvent] * 2
        assert all(c.norm is not None for c in log.clips)
        assert getattr(utils, name) is plain
        assert getattr(clip_grad, private) is plain
        assert log.failures == []

    @staticmethod
    def _clip(ps: list[Parameter]) -> list[Parameter]:
        utils.clip_grad_norm_(ps, 10.0)
        utils.clip_grads_with_norm_(ps, 1.0, utils.get_total_norm([p.grad for p in ps if p.grad is not None]))
        return ps

    def test_a_torch_with_other_arguments_is_left_alone_and_said_to_be_unseen(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def clip_grad_norm_(parameters: Any, how: Any) -> Any: ...

        monkeypatch.setattr(clip_grad, "clip_grad_norm_", clip_grad_norm_)
        monkeypatch.delattr(clip_grad, "_get_total_norm")
        assert seam.coverage()["clip_grad_norm_"] == "none"
        assert seam.coverage()["get_total_norm"] == "none"
        log = Log()
        seam.acquire(log)
        assert clip_grad.clip_grad_norm_ is clip_grad_norm_
        seam.release(log)

    def test_one_who_came_later_is_not_torn_out_and_the_next_run_still_sees_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cell = clip_grad.clip_grad_value_.__closure__[0]
        torchs = cell.cell_contents
        log = Log()
        seam.acquire(log)
        ours = cell.cell_contents

        def theirs(parameters: Any, clip_value: float, foreach: bool | None = None) -> Any:
            return ours(parameters, clip_value, foreach)

        cell.cell_contents = theirs
        seam.release(log)
        assert cell.cell_contents is theirs
        seam.acquire(log)
        ps = parameters()
        clip_grad_value_(ps, 0.5)
        assert ps[0].grad.tolist() == [0.5] * 4  # type: ignore[union-attr]
        seam.release(log)
        cell.cell_contents = torchs
        assert len(log.heard) == 2


def test_a_keyword_of_a_later_torch_is_handed_on(monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    cell = clip_grad._get_total_norm.__closure__[0]
    seam.release(log)
    torchs = cell.cell_contents

    def _get_total_norm(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: Any = None, scale: float = 1.0
    ) -> Tensor:
        return torchs(tensors, norm_type, error_if_nonfinite, foreach) * scale  # type: ignore[no-any-return]

    cell.cell_contents = _get_total_norm
    seam.acquire(log)
    try:
        grads = [p.grad for p in parameters() if p.grad is not None]
        assert get_total_norm(grads, scale=3.0) == 3 * get_total_norm(grads)  # type: ignore[call-arg]
    finally:
        seam.release(log)
        cell.cell_contents = torchs
        seam.acquire(log)
    assert log.failures == []
