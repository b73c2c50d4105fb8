"""The seam under what takes over torch's calls: compilers, fake and real dispatch modes, subclasses, DTensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.probe import seam
from gradwatch.probe.seam import ClipEvent, NormEvent, ValueClipEvent


class Log:
    def __init__(self) -> None:
        self.norms: list[NormEvent] = []
        self.clips: list[ClipEvent] = []
        self.failures: list[Exception] = []

    def on_norm(self, event: NormEvent) -> None:
        self.norms.append(event)

    def on_clip(self, event: ClipEvent) -> None:
        self.clips.append(event)

    def before_value_clip(self, event: ValueClipEvent) -> None: ...

    def on_value_clip(self, event: ValueClipEvent, token: object) -> None: ...

    def on_failure(self, error: Exception) -> None:
        self.failures.append(error)


@pytest.fixture
def log() -> Iterator[Log]:
    listener = Log()
    seam.acquire(listener)
    yield listener
    seam.release(listener)
    assert listener.failures == []
    assert not seam.installed()


def parameters(*dtypes: torch.dtype) -> list[Parameter]:
    made = []
    for index, dtype in enumerate(dtypes):
        p = Parameter(torch.zeros(4, dtype=dtype))
        p.grad = torch.arange(4.0, dtype=dtype) + index
        made.append(p)
    return made


def clip_everything(ps: list[Parameter]) -> Tensor:
    total = clip_grad_norm_(ps, 1.0)
    clip_grads_with_norm_(ps, 0.5, get_total_norm([p.grad for p in ps if p.grad is not None]))
    clip_grad_value_(ps, 0.1)
    return total


class Ops(TorchDispatchMode):
    """Notes every operator that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float64)])
def test_nothing_waits_for_the_device(dtypes: tuple[torch.dtype, ...], log: Log) -> None:
    """Fake tensors of an accelerator refuse to give up a value; the ops that would ask for one are listed too."""
    with FakeTensorMode(), Ops() as ops:
        ps = [Parameter(torch.zeros(4, dtype=dtype, device="cuda")) for dtype in dtypes]
        for p in ps:
            p.grad = torch.ones_like(p)
        ops.names.clear()
        clip_everything(ps)
        assert log.norms[0].norms is not None
        assert log.norms[0].norms.device.type == "cuda"
    blocking = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "item")
    assert [name for name in ops.names if any(b in name for b in blocking)] == []
    assert [name for name in ops.names if "_to_copy" in name and "cpu" in name] == []
    assert len(log.norms) == len(log.clips) == 2


def test_a_total_on_another_device_takes_torchs_way(log: Log) -> None:
    def refusal() -> tuple[type[Exception], str]:
        (p,) = parameters(torch.float32)
        with pytest.raises((RuntimeError, NotImplementedError)) as refused:
            clip_grads_with_norm_([p], 1.0, torch.ones((), device="meta"))
        return type(refused.value), str(refused.value)

    watched = refusal()
    seam.release(log)
    assert watched == refusal()
    seam.acquire(log)
    assert log.clips == []


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float32)])
def test_a_dispatch_mode_sees_no_operator_that_it_would_not_see_without_us(dtypes: tuple[torch.dtype, ...]) -> None:
    def operators() -> list[str]:
        ps = parameters(*dtypes)
        with Ops() as ops:
            clip_everything(ps)
        return ops.names

    bare = operators()
    listener = Log()
    seam.acquire(listener)
    watched = operators()
    seam.release(listener)
    assert listener.failures == []
    in_place = {"aten.reciprocal_.default": "aten.reciprocal.default", "aten.mul_.Tensor": "aten.mul.Tensor"}
    in_place |= {"aten.clamp_.default": "aten.clamp.default"}
    if len(set(dtypes)) == 1:
        assert [in_place.get(name, name) for name in watched] == [in_place.get(name, name) for name in bare]
    else:  # the norms are brought back into the order in which they were asked for
        extra = Counter(watched) - Counter(bare)
        assert set(extra) == {"aten.lift_fresh.default", "aten.index_select.default"}
        assert Counter(bare) - Counter(watched) == Counter()


def test_tensor_subclasses_take_torchs_way(log: Log) -> None:
    class Counted(Tensor):
        calls: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.calls.append(getattr(func, "__name__", ""))
            return super().__torch_function__(func, types, args, kwargs or {})

    def subclassed() -> list[Parameter]:
        ps = parameters(torch.float32, torch.float32)
        ps[1].grad = ps[1].grad.as_subclass(Counted)  # type: ignore[union-attr]
        return ps

    ps = subclassed()
    total = clip_grad_norm_(ps, 1.0)
    watched, Counted.calls = Counted.calls, []
    norm = log.norms[0]
    seam.release(log)
    bare = subclassed()
    expected = clip_grad_norm_(bare, 1.0)
    assert total.as_subclass(Tensor).equal(expected.as_subclass(Tensor))
    assert type(total) is type(expected)
    assert [p.grad.tolist() for p in ps] == [p.grad.tolist() for p in bare]  # type: ignore[union-attr]
    assert "vector_norm" in " ".join(watched)
    assert norm.norms is not None
    assert norm.norms.tolist() == pytest.approx([math.sqrt(14), math.sqrt(30)])
    seam.acquire(log)


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _fresh(self) -> Iterator[None]:
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    def test_a_compiled_clip_passes_through_without_graph_break_and_is_counted(self, log: Log) -> None:
        before = seam.traced()
        compiled = torch.compile(lambda ps: clip_grad_norm_(ps, 1.0), backend="eager", fullgraph=True)
        grads = []
        for run in (compiled, compiled, lambda ps: clip_grad_norm_(ps, 1.0)):
            ps = parameters(torch.float32, torch.float32)
            total = run(ps)
            grads.append([total.tolist()] + [p.grad.tolist() for p in ps])  # type: ignore[union-attr]
        assert grads[0] == grads[1] == grads[2]
        assert len(log.clips) == 1
        assert seam.traced() > before

    def test_tracing_is_counted_once_and_costs_no_recompile(self, log: Log) -> None:
        frames: list[object] = []

        def backend(graph: Any, inputs: Any) -> Any:
            frames.append(graph)
            return graph.forward

        compiled = torch.compile(lambda ps: clip_grad_norm_(ps, 1.0), backend=backend, fullgraph=True)
        for _ in range(4):
            compiled(parameters(torch.float32, torch.float32))
        traced = seam.traced()
        compiled(parameters(torch.float32, torch.float32))
        assert len(frames) == 1
        assert seam.traced() == traced

    def test_an_eager_clip_beside_a_compiled_step_is_seen(self, log: Log) -> None:
        layer = torch.nn.Linear(3, 1)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        step = torch.compile(optimizer.step, backend="eager")
        layer(torch.ones(2, 3)).sum().backward()
        clip_grad_norm_(layer.parameters(), 1.0)
        step()
        assert len(log.clips) == 1


def _shards(rank: int, world: int, store: str, results: Any) -> None:
    """One rank: clips DTensors (sharded, uneven, replicated) and plain gradients, bare and watched."""
    torch.set_num_threads(1)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        torch.manual_seed(0)
        full = [torch.randn(5, 2), torch.randn(4, 3), torch.randn(1, 2)]

        def made() -> list[Parameter]:
            ps = []
            for value, placement in zip(full, (Shard(0), Replicate(), Shard(0))):
                p = Parameter(distribute_tensor(torch.zeros_like(value), mesh, [placement]))
                p.grad = distribute_tensor(value.clone(), mesh, [placement])
                ps.append(p)
            return ps

        def clip(ps: list[Parameter]) -> tuple[Any, ...]:
            with CommDebugMode() as communication:
                total = clip_grad_norm_(ps, 0.5)
            assert isinstance(total, DTensor)
            collectives = {str(k): v for k, v in communication.get_comm_counts().items()}
            return total, [p.grad.to_local() for p in ps], collectives  # type: ignore[union-attr]

        total, grads, collectives = clip(made())
        log = Log()
        seam.acquire(log)
        ps = made()
        before = [p.grad.to_local().clone() for p in ps]  # type: ignore[union-attr]
        watched_total, watched_grads, watched_collectives = clip(ps)
        seam.release(log)
        (norm,), (event,) = log.norms, log.clips
        assert norm.norms is not None
        results[rank] = {
            "collectives": collectives,
            "same_collectives": collectives == watched_collectives,
            "same_total": torch.equal(total.full_tensor(), watched_total.full_tensor()),
            "same_type": type(total) is type(watched_total) and total.placements == watched_total.placements,
            "same_grads": all(torch.equal(a, b) for a, b in zip(grads, watched_grads)),
            "plain": type(norm.norms) is Tensor and event.norm is not None,
            "norms": norm.norms.tolist(),
            "local": [float(b.double().norm()) for b in before],
            "failures": [str(f) for f in log.failures],
        }
    finally:
        dist.destroy_process_group()


def test_dtensors_keep_torchs_result_and_collectives_and_give_the_norms_of_the_local_shards(tmp_path: Path) -> None:
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_shards, args=(2, str(tmp_path / "store"), results), nprocs=2)
        ranks = [dict(results[rank]) for rank in range(2)]
    for rank in ranks:
        assert rank["failures"] == []
        assert rank["same_total"]
        assert rank["same_type"]
        assert rank["same_grads"]
        assert rank["same_collectives"]
        assert sum(rank["collectives"].values()) > 0
        assert rank["plain"]
        assert rank["norms"] == pytest.approx(rank["local"], rel=1e-6)
    assert ranks[0]["norms"][1] == ranks[1]["norms"][1]  # replicated
    assert ranks[1]["norms"][2] == 0.0  # the second rank's shard is empty
