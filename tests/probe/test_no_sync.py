"""The training thread never waits for a device: shown twice, without one.

A stand-in accelerator (torch's own Python backend for ``privateuseone``) is
watched in two ways. Under ``FakeTensorMode``, a dispatch mode sees every
operation and flags those that would make the host wait. With a tensor subclass
that holds real values, copies to the host land late: read too early they are
NaN, after their event they are the truth. The probe swallows what it raises,
so both tests also ask that nothing was swallowed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import gradwatch
from gradwatch.journal import Events
from gradwatch.probe import lane

Watch = Callable[..., gradwatch.Run]
Read = Callable[[gradwatch.Run], Events]


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """The first of an accelerator's devices; behind this module, what asks for one finds none any more."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if torch._C._get_privateuse1_backend_name() != "accel":
        _setup_privateuseone_for_python_backend("accel")
    backend: Any = torch.accel  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "is_available", lambda: True)
        yield torch.device("accel:0")
    backend.is_available = lambda: False


class NoWaiting(TorchDispatchMode):
    """Flags operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        kwargs = kwargs or {}
        name = func.name()
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.device.type == "accel" for t in tensors):
            if any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "aten::equal", "unique")):
                self.waits.append(name)
            to = kwargs.get("device")
            if "_to_copy" in name and to is not None and torch.device(to).type == "cpu":
                self.waits.append(f"{name} to the host")
            if "aten::copy_" in name and args[0].device.type == "cpu":
                blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
                if blocking:
                    self.waits.append(f"blocking {name} to the host")
        return func(*args, **kwargs)


class NeverReady:
    def record(self) -> None: ...

    def query(self) -> bool:
        return False


def train(model: nn.Module, optimizer: torch.optim.Optimizer, run: gradwatch.Run | None, x: Tensor, steps: int) -> None:
    for step in range(steps):
        # Gradients are put there by hand: the autograd engine counts its devices once, maybe long before this test.
        with torch.no_grad():
            loss = (model(x) ** 2).mean()
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        if step % 2 == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, foreach=False)
        optimizer.step()
        optimizer.zero_grad()
        if run is not None:
            run.log_train(loss=loss, samples=4, accuracy=loss)
            if step % 5 == 4:
                run.log_validation(loss=loss)
                here, there = torch.rand(4, 2), torch.rand(4, 2, device=x.device)
                run.log_validation(probabilities=there, targets=here[:, 0])
                run.log_validation(probabilities=here, targets=there[:, 0])


def test_no_operation_of_the_probe_waits(watch: Watch, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "_pinned", lambda size: torch.empty(size))
    monkeypatch.setattr(lane, "_event", lambda device: NeverReady())
    monkeypatch.setattr("gradwatch.probe.start.DRAIN_SECONDS", 0.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = nn.Sequential(nn.Linear(4, 8, device=device), nn.Tanh(), nn.Linear(8, 1, device=device))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
        x = torch.empty(4, 4, device=device)
        bare, observed = NoWaiting(), NoWaiting()
        with bare:
            train(model, optimizer, None, x, 20)
        run = watch(model, optimizer, max_norm=0.5)
        with observed:
            train(model, optimizer, run, x, 20)
        assert observed.seen > bare.seen, "the probe measured nothing: the test would prove nothing"
        assert observed.waits == bare.waits == []
        run.finish()
        assert run.last_failure == ""


def test_the_flag_is_raised_by_an_operation_that_waits(device: torch.device) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        value = torch.empty(3, device=device)
        mode = NoWaiting()
        with mode:
            torch.empty(3).copy_(value)
            value.to("cpu")
        assert len(mode.waits) == 2


class Device:
    """Copies under way to the host: each lands when the event behind it has been asked often enough."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.queue: list[tuple[Tensor, Tensor]] = []

    def event(self, _: torch.device) -> LateEvent:
        return LateEvent(self)


class LateEvent:
    def __init__(self, device: Device) -> None:
        self._device = device
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._asked = 0

    def record(self) -> None:
        self._copies, self._device.queue = self._device.queue, []

    def query(self) -> bool:
        self._asked += 1
        if self._asked < self._device.patience:
            return False
        for target, value in self._copies:
            target.copy_(value)
        self._copies = []
        return True


_current: list[Device] = []


class OnDevice(torch.Tensor):
    """A tensor that says it lives on the accelerator and holds its values in ``inner``."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type[OnDevice], inner: Tensor, requires_grad: bool = False) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="accel:0", requires_grad=requires_grad
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.name()
        if "_local_scalar_dense" in name:
            raise AssertionError("the host waited for a value of the device")
        if "aten::copy_" in name and not isinstance(args[0], OnDevice):
            assert kwargs.get("non_blocking") or (len(args) > 2 and args[2]), "a blocking copy to the host"
            assert bool(args[0].isnan().all()), "what is read too early must be seen"
            _current[0].queue.append((args[0], args[1].inner.clone()))
            return args[0]
        to = kwargs.get("device")
        if to is not None:
            assert torch.device(to).type != "cpu", f"{name} to the host"
            kwargs["device"] = "cpu"
        args, kwargs = pytree.tree_map_only(OnDevice, lambda t: t.inner, (args, kwargs))
        result = func(*args, **kwargs)
        return pytree.tree_map_only(Tensor, OnDevice, result)


@pytest.mark.parametrize("patience", [1, 3, 7])
def test_values_are_read_when_they_have_landed_and_are_the_truth(
    watch: Watch, read: Read, device: torch.device, monkeypatch: pytest.MonkeyPatch, patience: int
) -> None:
    machine = Device(patience)
    _current[:] = [machine]
    monkeypatch.setattr(lane, "_pinned", lambda size: torch.full((size,), math.nan))
    monkeypatch.setattr(lane, "_event", machine.event)
    parameters = [nn.Parameter(OnDevice(torch.randn(4, 3))), nn.Parameter(OnDevice(torch.randn(3)))]
    optimizer = torch.optim.SGD(parameters, lr=0.1, foreach=False)
    run = watch(nn.ParameterList(parameters), optimizer)
    losses, norms, each = [], [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for step in range(20):
            grads = [torch.randn(4, 3), torch.randn(3)]
            for p, g in zip(parameters, grads):
                p.grad = OnDevice(g.clone())
            each.append([float(g.norm()) for g in grads])
            norms.append(math.hypot(*each[-1]))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=False)
            optimizer.step()
            losses.append(float(step) / 3)
            run.log_train(loss=OnDevice(torch.tensor(losses[-1])))
            if step == 9:
                run.log_validation(loss=OnDevice(torch.tensor(0.125)))
    events = read(run)
    np.testing.assert_allclose(events.steps["loss"], losses, rtol=1e-6)
    np.testing.assert_allclose(events.steps["grad_norm"], norms, rtol=1e-6)
    np.testing.assert_allclose(events.steps["clip_coefficient"], [1 / (n + 1e-6) for n in norms], rtol=1e-6)
    np.testing.assert_allclose(events.tensors.values, each, rtol=1e-6)
    assert [e["metrics"] for e in events.events if e["kind"] == "validation"] == [{"loss": 0.125}]
    sample = events.samples
    assert sample.step.tolist() == [0, 1, 2, 4, 8, 16]
    assert np.isfinite(sample.values[:, 1:4]).all()
