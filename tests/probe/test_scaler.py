"""The GradScaler at work: every call heard in order, every skip told, not a bit changed."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter
from torch.optim import SGD, Adam, Optimizer

from gradwatch.probe import scaler as seen
from gradwatch.probe.scaler import is_unscaled, loss_scale

METHODS = ("scale", "unscale_", "step", "update")


class Log:
    """Notes what it hears, and what the scaler looked like just then."""

    def __init__(self, fails: bool = False) -> None:
        self.heard: list[tuple[Any, ...]] = []
        self.failures: list[Exception] = []
        self.fails = fails

    def _hear(self, *what: Any) -> None:
        self.heard.append(what)
        if self.fails:
            raise ValueError("mine")

    def on_scale(self, scaler: GradScaler) -> None:
        self._hear("scale", scaler)

    def on_unscale(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        self._hear("unscale", scaler, optimizer)

    def before_step(self, scaler: GradScaler, optimizer: Optimizer, fused: bool) -> None:
        self._hear("before", scaler, optimizer, fused)

    def after_step(self, scaler: GradScaler, optimizer: Optimizer, skipped: bool | Tensor | None) -> None:
        self._hear("after", scaler, optimizer, skipped)

    def on_update(self, scaler: GradScaler) -> None:
        self._hear("update", scaler)

    def on_failure(self, error: Exception) -> None:
        self.failures.append(error)

    @property
    def names(self) -> list[str]:
        return [what[0] for what in self.heard]

    @property
    def skips(self) -> list[Any]:
        return [what[3] for what in self.heard if what[0] == "after"]


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    def state() -> list[Any]:
        return [GradScaler.__dict__[m] for m in METHODS] + ["__init_subclass__" in GradScaler.__dict__]

    before = state()
    yield
    assert not seen.installed()
    assert all(a is b for a, b in zip(before, state(), strict=True))


@pytest.fixture
def log() -> Iterator[Log]:
    listener = Log()
    seen.acquire(listener)
    yield listener
    seen.release(listener)
    assert listener.failures == []


def parameter() -> Parameter:
    return Parameter(torch.tensor([1.0, -2.0, 3.0]))


def backward(scaler: GradScaler, p: Tensor, bad: bool = False) -> None:
    scaler.scale((p * (float("inf") if bad else 2.0)).sum()).backward()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_is_heard_in_order_and_its_skip_is_told(fused: bool, log: Log) -> None:
    p = parameter()
    optimizer = SGD([p], 0.1, fused=fused)
    scaler = GradScaler("cpu", init_scale=4.0)
    for bad in (False, True, False):
        weights = p.detach().clone()
        optimizer.zero_grad()
        backward(scaler, p, bad)
        scaler.step(optimizer)
        assert torch.equal(weights, p) == bad
        scaler.update()
    inner = [] if fused else ["unscale"]
    assert log.names == ["scale", "before", *inner, "after", "update"] * 3
    assert all(what[1] is scaler for what in log.heard)
    assert all(what[2] is optimizer for what in log.heard if len(what) > 2)
    assert [what[3] for what in log.heard if what[0] == "before"] == [fused] * 3
    if fused:
        assert all(isinstance(s, Tensor) for s in log.skips)
        assert [float(s) for s in log.skips] == [0.0, 1.0, 0.0]
    else:
        assert log.skips == [False, True, False]
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("fused", [False, True])
def test_unscaling_by_hand_is_heard_once_and_the_scale_is_known_to_be_out(fused: bool, log: Log) -> None:
    p = parameter()
    optimizer = SGD([p], 0.1, fused=fused)
    scaler = GradScaler("cpu", init_scale=8.0)
    assert loss_scale(scaler) is None
    assert is_unscaled(scaler, optimizer) is False
    backward(scaler, p)
    scale = loss_scale(scaler)
    assert isinstance(scale, Tensor)
    assert scale is scaler._scale
    assert scale == 8.0
    assert is_unscaled(scaler, optimizer) is False
    assert id(optimizer) not in scaler._per_optimizer_states  # asking leaves no trace
    assert p.grad is not None
    assert p.grad.tolist() == [16.0] * 3
    scaler.unscale_(optimizer)
    assert is_unscaled(scaler, optimizer) is True
    assert p.grad.tolist() == [2.0] * 3
    scaler.step(optimizer)
    assert is_unscaled(scaler, optimizer) is (None if fused else True)
    scaler.update()
    assert is_unscaled(scaler, optimizer) is False
    assert log.names == ["scale", "unscale", "before", "after", "update"]


def test_several_losses_optimizers_and_scalers_are_told_apart(log: Log) -> None:
    ps = [parameter() for _ in range(3)]
    plain, fused, other = SGD([ps[0]], 0.1), SGD([ps[1]], 0.1, fused=True), Adam([ps[2]], 0.1)
    first, second = GradScaler("cpu", init_scale=4.0), GradScaler("cpu", init_scale=16.0)
    losses = first.scale([ps[0].sum() * float("inf"), (ps[1].sum(),)])
    assert isinstance(losses, list)
    losses[0].backward()
    losses[1][0].backward()
    backward(second, ps[2])
    first.step(plain)
    first.step(fused)
    second.step(other)
    first.update()
    second.update()
    steps = [(what[1], what[2], what[3]) for what in log.heard if what[0] == "after"]
    assert [(s is first, o) for s, o, _ in steps] == [(True, plain), (True, fused), (False, other)]
    assert steps[0][2] is True
    # Not the scaler's own tensor: update adds the first optimizer's infinity to what it holds.
    assert float(steps[1][2]) == 0.0
    assert steps[2][2] is False
    assert log.names.count("update") == log.names.count("scale") == 2
    assert first.get_scale() == 2.0
    assert second.get_scale() == 16.0


def _train(seed: int, bad: list[bool], fused: bool, unscale: bool, kind: type[Optimizer], interval: int) -> Any:
    torch.manual_seed(seed)
    layers = torch.nn.ModuleList([torch.nn.Linear(4, 3), torch.nn.Linear(4, 2)])
    optimizers = [kind(layer.parameters(), lr=0.1, fused=fused and i == 0) for i, layer in enumerate(layers)]  # type: ignore[call-arg]
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=interval)
    results: list[Any] = []
    for is_bad in bad:
        x = torch.randn(5, 4)
        for layer, optimizer in zip(layers, optimizers):
            optimizer.zero_grad()
            loss = layer(x).square().mean()
            scaler.scale(loss * (float("nan") if is_bad else 1.0)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            results.append(scaler.step(optimizer))
        scaler.update()
        results.append(scaler.get_scale())
    state = [p.detach().numpy().tobytes() for p in layers.parameters()]
    return results, state, [o.state_dict()["state"] and str(o.state_dict()) for o in optimizers], scaler.state_dict()


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    bad=st.lists(st.booleans(), min_size=1, max_size=6),
    fused=st.booleans(),
    unscale=st.booleans(),
    kind=st.sampled_from([SGD, Adam]),
    interval=st.integers(1, 3),
)
def test_weights_states_and_scales_are_torchs_to_the_last_bit(
    seed: int, bad: list[bool], fused: bool, unscale: bool, kind: type[Optimizer], interval: int
) -> None:
    bare = _train(seed, bad, fused, unscale, kind, interval)
    log = Log()
    seen.acquire(log)
    try:
        watched = _train(seed, bad, fused, unscale, kind, interval)
    finally:
        seen.release(log)
    assert watched == bare
    assert log.failures == []
    assert [bool(s) for s in log.skips] == [b for b in bad for _ in range(2)]


def test_a_disabled_scaler_is_not_reported(log: Log) -> None:
    p = parameter()
    optimizer = SGD([p], 0.1)
    scaler = GradScaler("cpu", enabled=False)
    backward(scaler, p)
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert log.heard == []
    assert loss_scale(scaler) is None
    assert is_unscaled(scaler, optimizer) is False
    assert p.tolist() == pytest.approx([0.8, -2.2, 2.8])


def test_torchs_own_complaints_come_through_and_leave_nothing_behind(log: Log) -> None:
    p = parameter()
    optimizer = SGD([p], 0.1)
    scaler = GradScaler("cpu", init_scale=4.0)
    with pytest.raises(AssertionError, match="_scale is None"):
        scaler.step(optimizer)
    backward(scaler, p)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)

    def breaks(*_: Any) -> None:
        raise OSError("disk")

    handle = optimizer.register_step_pre_hook(breaks)
    with pytest.raises(OSError, match="disk"):
        scaler.step(optimizer)
    handle.remove()
    assert list(optimizer._optimizer_step_pre_hooks.values()) == []
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.step(optimizer)
    scaler.update()
    # Steps that raised began and never ended.
    assert log.names == ["before", "scale", "unscale", "before", "before", "after", "before", "update"]
    assert log.skips == [False]


def test_what_a_listener_raises_goes_to_itself_alone(log: Log) -> None:
    broken = Log(fails=True)
    seen.acquire(broken)
    p = parameter()
    optimizer = SGD([p], 0.1)
    scaler = GradScaler("cpu", init_scale=4.0)
    backward(scaler, p)
    scaler.step(optimizer)
    scaler.update()
    seen.release(broken)
    assert p.tolist() == pytest.approx([0.8, -2.2, 2.8])
    assert [str(f) for f in broken.failures] == ["mine"] * 5
    assert log.names == broken.names == ["scale", "before", "unscale", "after", "update"]


def test_runs_may_end_in_any_order() -> None:
    for first, second in itertools.permutations((0, 1)):
        logs = [Log(), Log()]
        for each in logs:
            seen.acquire(each)
        scaler = GradScaler("cpu")
        scaler.scale(torch.ones(1))
        seen.release(logs[first])
        scaler.scale(torch.ones(1))
        seen.release(logs[second])
        seen.release(logs[second])
        assert not seen.installed()
        scaler.scale(torch.ones(1))
        assert [len(each.heard) for each in (logs[first], logs[second])] == [1, 2]


def test_subclasses_are_heard_once_whenever_they_are_defined_and_are_put_back() -> None:
    class Early(GradScaler):
        def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> float | None:
            return super().step(optimizer, *args, **kwargs)

    log = Log()
    originals = dict(vars(Early))
    seen.acquire(log)

    class Late(Early):
        def update(self, new_scale: float | Tensor | None = None) -> None:
            super().update(new_scale)

    late_update = vars(Late)["update"]
    for kind in (Early, Late):
        p = parameter()
        optimizer = SGD([p], 0.1)
        scaler = kind("cpu", init_scale=4.0)
        backward(scaler, p)
        scaler.step(optimizer)
        scaler.update()
    assert log.names == ["scale", "before", "unscale", "after", "update"] * 2
    seen.release(log)
    assert vars(Early)["step"] is originals["step"]
    assert vars(Late)["update"] is not late_update
    assert vars(Late)["update"] is late_update.__wrapped__
    assert log.failures == []


def test_wrapped_optimizers_are_looked_into_and_foreign_ones_are_not_guessed_at(log: Log) -> None:
    class Wrapper:
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer
            self.param_groups = optimizer.param_groups

        def step(self) -> None:
            self.optimizer.step()

    class Foreign:
        def __init__(self, p: Tensor) -> None:
            self.param_groups = [{"params": [p]}]

        def step(self) -> None: ...

    scaler = GradScaler("cpu", init_scale=4.0)
    for bad in (False, True):
        p, q = parameter(), parameter()
        backward(scaler, p, bad)
        backward(scaler, q, bad)
        scaler.step(Wrapper(SGD([p], 0.1)))  # type: ignore[arg-type]
        scaler.step(Foreign(q))  # type: ignore[arg-type]
        scaler.update()
    assert log.skips == [False, None, True, None]


def test_a_watched_scaler_keeps_its_signatures_and_pickles(log: Log) -> None:
    import inspect

    assert list(inspect.signature(GradScaler.step).parameters) == ["self", "optimizer", "args", "kwargs"]
    assert GradScaler.update.__doc__
    scaler = GradScaler("cpu", init_scale=4.0)
    scaler.scale(outputs=torch.ones(1))
    again = pickle.loads(pickle.dumps(scaler))
    again.load_state_dict(scaler.state_dict())
    assert again.get_scale() == copy.deepcopy(scaler).get_scale() == 4.0
    assert log.names == ["scale"]


def test_a_scale_inside_a_compiled_function_runs_eagerly_as_torch_has_it_and_is_heard(log: Log) -> None:
    graphs: list[object] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def count() -> int:
        scaler = GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(1))
        torch.compiler.reset()
        graphs.clear()
        compiled = torch.compile(lambda x: scaler.scale(x * 2) + 1, backend=backend)
        for _ in range(3):
            assert compiled(torch.ones(1)).tolist() == [9.0]
        torch.compiler.reset()
        return len(graphs)

    watched = count()
    assert log.names == ["scale"] * 4
    seen.release(log)
    assert count() == watched == 2  # torch breaks the graph at its scaler, and no break is added
    seen.acquire(log)


def test_a_scaler_at_work_inside_anothers_step_is_heard(log: Log) -> None:
    p, q = parameter(), parameter()
    outer, inner = SGD([p], 0.1), SGD([q], 0.1)
    first, second = GradScaler("cpu", init_scale=4.0), GradScaler("cpu", init_scale=4.0)
    backward(first, p)
    backward(second, q, bad=True)
    outer.register_step_post_hook(lambda *_: second.step(inner))
    first.step(outer)
    assert [(what[2], what[3]) for what in log.heard if what[0] == "after"] == [(inner, True), (outer, False)]


def test_a_fused_step_reads_no_value(log: Log) -> None:
    """A meta tensor has none to give, and raises where one is asked for."""

    class Fused(SGD):
        _step_supports_amp_scaling = True

        def step(self, closure: Any = None) -> None: ...  # type: ignore[override]

    p = Parameter(torch.ones(3, device="meta"))
    optimizer = Fused([p], 0.1)
    scaler = GradScaler("cpu")
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert log.names == ["scale", "before", "after", "update"]
    assert log.skips[0].device.type == "meta"
    scale = loss_scale(scaler)
    assert scale is not None
    assert scale.device.type == "meta"


@pytest.mark.parametrize("fused", [False, True])
def test_no_operator_runs_that_would_not_run_without_us_but_for_the_sum_of_found_inf(fused: bool) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    def run() -> list[str]:
        names.clear()
        p = parameter()
        optimizer = SGD([p], 0.1, fused=fused)
        scaler = GradScaler("cpu", init_scale=4.0)
        with Ops():
            backward(scaler, p)
            scaler.step(optimizer)
            scaler.update()
        return list(names)

    names: list[str] = []
    bare = run()
    log = Log()
    seen.acquire(log)
    watched = run()
    seen.release(log)
    assert ("aten._local_scalar_dense.default" in bare) is not fused  # torch reads it, and nobody else
    extra = list(watched)
    for name in bare:
        extra.remove(name)
    assert extra == (["aten.add.Tensor"] if fused else [])


def test_the_sharded_scaler_is_heard_though_it_is_imported_after_the_run_began() -> None:
    program = """
import sys, torch, torch.distributed as dist, tempfile
from gradwatch.probe import scaler as seen
heard = []
class Log:
    def __getattr__(self, name):
        return lambda *what: heard.append((name, what[-1] if name == "after_step" else None))
log = Log()
seen.acquire(log)
assert "torch.distributed.fsdp.sharded_grad_scaler" not in sys.modules
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
p = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([p], 0.1)
scaler = ShardedGradScaler("cpu", init_scale=4.0)
for factor in (1.0, float("inf")):
    scaler.scale((p * factor).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
dist.destroy_process_group()
assert [n for n, _ in heard] == ["on_scale", "before_step", "on_unscale", "after_step", "on_update"] * 2, heard
assert [s for n, s in heard if n == "after_step"] == [False, True], heard
assert scaler.get_scale() == 2.0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
