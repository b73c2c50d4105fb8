"""Whatever is clipped, in whichever way: the seam's results are torch's to the last bit, and its norms are true."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm

from gradwatch.probe import captured, seam
from gradwatch.probe.seam import ClipEvent, NormEvent, ValueClipEvent

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
SHAPES = [(), (1,), (3,), (0,), (2, 3), (70,), (4, 1, 5)]


class Seen:
    """A listener that copies what it is shown, while it is shown it."""

    def __init__(self) -> None:
        self.norms: list[NormEvent] = []
        self.clips: list[ClipEvent] = []
        self.at_norm: list[list[Tensor]] = []
        self.values: list[tuple[ValueClipEvent, object]] = []
        self.failures: list[Exception] = []

    def on_norm(self, event: NormEvent) -> None:
        self.norms.append(event)
        self.at_norm.append([t.detach().clone() for t in event.tensors])

    def on_clip(self, event: ClipEvent) -> None:
        self.clips.append(event)

    def before_value_clip(self, event: ValueClipEvent) -> object:
        return [g.clone() for g in event.grads]

    def on_value_clip(self, event: ValueClipEvent, token: object) -> None:
        self.values.append((event, token))

    def on_failure(self, error: Exception) -> None:
        self.failures.append(error)


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor's dtype, shape and bytes: NaN equals NaN, 0.0 is not -0.0."""
    raw = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    return raw.dtype, tuple(raw.shape), raw.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def observed(call: Callable[[], Any]) -> tuple[Any, Seen]:
    seen = Seen()
    seam.acquire(seen)
    try:
        return call(), seen
    finally:
        seam.release(seen)
        assert not seam.installed()


def parameters(spec: list[tuple[torch.dtype, tuple[int, ...], bool]], seed: int, size: float) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for dtype, shape, has_grad in spec:
        p = Parameter(torch.zeros(shape, dtype=dtype))
        if has_grad:
            wide = torch.complex128 if dtype.is_complex else torch.float64
            p.grad = (torch.randn(shape, dtype=wide, generator=generator) * size).to(dtype)
        made.append(p)
    return made


def l2_float64(tensor: Tensor, norm_type: float) -> float:
    flat = tensor.detach().reshape(-1).to(torch.complex128 if tensor.is_complex() else torch.float64).abs()
    if not flat.numel():
        return 0.0
    return float(flat.max() if norm_type == math.inf else (flat**norm_type).sum() ** (1 / norm_type))


spec = st.lists(st.tuples(st.sampled_from(DTYPES), st.sampled_from(SHAPES), st.booleans()), min_size=0, max_size=9)
alike_spec = st.builds(
    lambda dtype, rest: [(dtype, shape, has) for shape, has in rest],
    st.sampled_from(DTYPES),
    st.lists(st.tuples(st.sampled_from(SHAPES), st.booleans()), max_size=9),
)


@settings(max_examples=200, deadline=None)
@given(
    spec=spec | alike_spec,
    seed=st.integers(0, 2**16),
    size=st.sampled_from([1e-6, 1.0, 300.0]),
    max_norm=st.sampled_from([0.0, 1e-7, 1.0, 7, math.inf]),
    norm_type=st.sampled_from([2.0, 2, 1.0, 3.0, math.inf, "inf"]),
    foreach=st.sampled_from([None, True, False]),
    container=st.sampled_from([list, tuple, iter, lambda ps: (p for p in ps)]),
)
def test_clip_grad_norm_is_torchs_to_the_last_bit_and_its_norms_are_true(
    spec: Any, seed: int, size: float, max_norm: float, norm_type: Any, foreach: bool | None, container: Any
) -> None:
    bare = parameters(spec, seed, size)
    watched = copy.deepcopy(bare)
    for b, w in zip(bare, watched):
        w.grad = None if b.grad is None else b.grad.clone()
    originals = [p.grad for p in watched]

    def clip(ps: list[Parameter]) -> Tensor | str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return clip_grad_norm_(container(ps), max_norm, norm_type, foreach=foreach)
            except (RuntimeError, NotImplementedError) as error:
                return str(error)

    truth = clip(bare)
    result, seen = observed(lambda: clip(watched))

    assert all(a is b for a, b in zip(originals, [p.grad for p in watched]))
    for b, w in zip(bare, watched):
        assert (b.grad is None) == (w.grad is None)
        assert b.grad is None or bits(b.grad) == bits(w.grad)
    assert seen.failures == []
    if isinstance(truth, str):
        assert result == truth
        return
    assert bits(truth) == bits(result)

    p = float(norm_type)
    grads = [w.grad for w in watched if w.grad is not None]
    (norm,), (event,) = seen.norms, seen.clips
    assert event.norm is not None
    assert event.norm.total is norm.total is event.total_norm is result
    assert event.max_norm == max_norm
    assert norm.norm_type == p
    for given_, expected in (
        (event.parameters, watched),
        (event.grads, grads),
        (norm.tensors, grads),
        (event.norm.tensors, grads),
    ):
        assert len(given_) == len(expected)
        assert all(a is b for a, b in zip(given_, expected))
    if not grads:
        assert norm.norms is None
        return
    assert norm.norms is event.norm.norms is not None
    assert norm.norms.shape == (len(grads),)
    low = {torch.bfloat16: 1e-2, torch.float16: 2e-3}
    for got, before in zip(norm.norms.tolist(), seen.at_norm[0]):
        want = l2_float64(before, p)
        if before.dtype is torch.float16 and want > 60_000:
            continue  # torch's own norm of it overflows: that is what training used
        assert got == pytest.approx(want, rel=low.get(before.dtype, 1e-5), abs=1e-5 if before.dtype in low else 1e-12)


@settings(max_examples=100, deadline=None)
@given(
    spec=spec | alike_spec,
    seed=st.integers(0, 2**16),
    max_norm=st.sampled_from([1e-3, 1.0, math.inf]),
    norm_type=st.sampled_from([2.0, 1.0, math.inf]),
    foreach=st.sampled_from([None, False]),
    total_dtype=st.sampled_from([None, torch.float64, torch.int64]),
)
def test_the_two_halves_called_apart_are_torchs_to_the_last_bit(
    spec: Any, seed: int, max_norm: float, norm_type: float, foreach: bool | None, total_dtype: torch.dtype | None
) -> None:
    bare, watched = parameters(spec, seed, 2.0), parameters(spec, seed, 2.0)

    def clip(ps: list[Parameter]) -> Tensor | str:
        try:
            return halves(ps)
        except RuntimeError as error:  # the infinity norm of an empty tensor
            return str(error)

    def halves(ps: list[Parameter]) -> Tensor:
        total = get_total_norm((p.grad for p in ps if p.grad is not None), norm_type, foreach=foreach)
        if total_dtype is not None:
            total = total.to(total_dtype)
        clip_grads_with_norm_(iter(ps), max_norm, total, foreach=foreach)
        return total

    truth = clip(bare)
    result, seen = observed(lambda: clip(watched))
    assert seen.failures == []
    if isinstance(truth, str):
        assert result == truth
        return
    assert bits(truth) == bits(result)
    for b, w in zip(bare, watched):
        assert b.grad is None or bits(b.grad) == bits(w.grad)
    (norm,), (event,) = seen.norms, seen.clips
    assert event.total_norm is result
    if norm.total is result:
        assert event.norm is not None
        assert event.norm.norms is norm.norms
        assert all(a is b for a, b in zip(event.norm.tensors, event.grads, strict=True))
    else:
        assert event.norm is None


@settings(max_examples=60, deadline=None)
@given(
    spec=st.lists(
        st.tuples(st.sampled_from(DTYPES[:4]), st.sampled_from(SHAPES), st.booleans()), min_size=1, max_size=6
    ).filter(lambda spec: any(has_grad for _, _, has_grad in spec)),
    seed=st.integers(0, 2**16),
    value=st.sampled_from([0.0, 0.5, 1, 100.0]),
    foreach=st.sampled_from([None, True, False]),
)
def test_clip_by_value_is_torchs_and_is_seen_before_and_after(
    spec: Any, seed: int, value: float, foreach: bool | None
) -> None:
    bare, watched = parameters(spec, seed, 2.0), parameters(spec, seed, 2.0)
    before = [p.grad.clone() for p in bare if p.grad is not None]
    clip_grad_value_(bare, value, foreach=foreach)
    _, seen = observed(lambda: clip_grad_value_(iter(watched), value, foreach=foreach))
    for b, w in zip(bare, watched):
        assert b.grad is None or bits(b.grad) == bits(w.grad)
    ((event, token),) = seen.values
    assert event.clip_value == value
    assert [bits(t) for t in token] == [bits(t) for t in before]  # type: ignore[attr-defined]
    assert [bits(g) for g in event.grads] == [bits(p.grad) for p in bare if p.grad is not None]
    assert len(event.parameters) == len(watched)
    assert seen.norms == seen.clips == seen.failures == []


def plain(count: int = 3) -> list[Parameter]:
    return parameters([(torch.float32, (4,), True)] * count, 0, 5.0)


def test_non_finite_gradients_are_clipped_as_torch_does_and_raise_where_it_raises() -> None:
    for poison in (math.nan, math.inf, -math.inf):
        for spec in ([(torch.float32, (4,), True)] * 2, [(torch.float32, (4,), True), (torch.bfloat16, (2,), True)]):
            bare, watched = parameters(spec, 1, 1.0), parameters(spec, 1, 1.0)
            bare[0].grad[1] = watched[0].grad[1] = poison  # type: ignore[index]
            with pytest.raises(RuntimeError, match="non-finite") as expected:
                clip_grad_norm_(bare, 1.0, error_if_nonfinite=True)
            with pytest.raises(RuntimeError, match="non-finite") as got:
                observed(lambda: clip_grad_norm_(watched, 1.0, error_if_nonfinite=True))  # noqa: B023
            assert str(got.value) == str(expected.value)
            assert bits(watched[0].grad) == bits(bare[0].grad)  # type: ignore[arg-type]
            total = clip_grad_norm_(bare, 1.0)
            result, seen = observed(lambda: clip_grad_norm_(watched, 1.0))  # noqa: B023
            assert bits(result) == bits(total)
            assert [bits(p.grad) for p in watched] == [bits(p.grad) for p in bare]  # type: ignore[arg-type]
            assert math.isfinite(seen.norms[0].norms.tolist()[1])  # type: ignore[union-attr]
            assert not math.isfinite(seen.norms[0].norms.tolist()[0])  # type: ignore[union-attr]


def test_finite_gradients_pass_the_check_for_non_finite_ones() -> None:
    bare, watched = plain(), plain()
    total = clip_grad_norm_(bare, 1.0, error_if_nonfinite=True)
    result, seen = observed(lambda: clip_grad_norm_(watched, 1.0, error_if_nonfinite=True))
    assert bits(total) == bits(result)
    assert seen.norms[0].norms is not None
    assert seen.clips[0].norm is not None


def test_a_single_tensor_is_a_list_of_one() -> None:
    (bare,), (watched,) = plain(1), plain(1)
    total = clip_grad_norm_(bare, 1.0)
    result, seen = observed(lambda: clip_grad_norm_(watched, 1.0))
    assert bits(total) == bits(result)
    assert bits(bare.grad) == bits(watched.grad)  # type: ignore[arg-type]
    assert seen.clips[0].parameters[0] is watched


@settings(max_examples=300, deadline=None)
@given(
    st.floats(0, math.inf, width=32) | st.floats(0, 10, width=32),
    st.floats(0, math.inf) | st.floats(0, 10) | st.sampled_from([1e30, 1e31, 1e38]),
)
def test_the_coefficient_is_torchs_for_every_total_and_threshold(total: float, max_norm: float) -> None:
    bare, watched = plain(), plain()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clip_grads_with_norm_(bare, max_norm, torch.tensor(total))
        observed(lambda: clip_grads_with_norm_(watched, max_norm, torch.tensor(total)))
    assert [bits(p.grad) for p in watched] == [bits(p.grad) for p in bare]  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1e-7, 1e-6, 3e-6])
def test_the_small_number_that_keeps_the_division_finite_is_torchs(size: float) -> None:
    bare, watched = plain(), plain()
    for p in [*bare, *watched]:
        p.grad *= size  # type: ignore[operator]
    clip_grad_norm_(bare, 1e-7)
    observed(lambda: clip_grad_norm_(watched, 1e-7))
    assert [bits(p.grad) for p in watched] == [bits(p.grad) for p in bare]  # type: ignore[arg-type]
    zero = plain()
    for p in zero:
        p.grad *= 0.0  # type: ignore[operator]
    assert observed(lambda: clip_grad_norm_(zero, 1.0))[0] == 0.0
    assert all(not p.grad.any() for p in zero)  # type: ignore[union-attr]


def test_one_gradient_given_twice_has_its_norm_twice() -> None:
    a, b = plain(2)
    b.grad = b.grad.bfloat16().float()  # type: ignore[union-attr]
    low = Parameter(torch.zeros(2, dtype=torch.bfloat16))
    low.grad = torch.tensor([3.0, 4.0]).bfloat16()
    _, seen = observed(lambda: get_total_norm([low.grad, a.grad, low.grad, a.grad, b.grad]))  # type: ignore[list-item]
    norms = seen.norms[0].norms.tolist()  # type: ignore[union-attr]
    assert norms[0] == norms[2] == 5.0
    assert norms[1] == norms[3] == pytest.approx(float(a.grad.norm()))  # type: ignore[union-attr]
    assert norms[4] == pytest.approx(float(b.grad.norm()))  # type: ignore[union-attr]


def test_sparse_gradients_are_torchs_affair() -> None:
    def embedding() -> torch.nn.Embedding:
        torch.manual_seed(0)
        layer = torch.nn.Embedding(10, 3, sparse=True)
        layer(torch.tensor([1, 4, 4])).sum().backward()
        layer.weight.grad = layer.weight.grad.coalesce()  # type: ignore[union-attr]
        return layer

    def clip(layer: torch.nn.Embedding) -> Any:
        try:
            return bits(clip_grad_norm_(layer.parameters(), 1.0)), bits(layer.weight.grad)  # type: ignore[arg-type]
        except (RuntimeError, NotImplementedError) as error:
            return str(error).splitlines()[0]

    truth = clip(embedding())
    result, seen = observed(lambda: clip(embedding()))
    assert result == truth
    assert seen.failures == []


def test_wrong_arguments_are_refused_in_torchs_words() -> None:
    for call in (
        lambda: clip_grad_norm_(5, 1.0),  # type: ignore[arg-type]
        lambda: clip_grad_norm_(plain(), "wide"),  # type: ignore[arg-type]
        lambda: clip_grad_norm_(plain(), 1.0, "two"),  # type: ignore[arg-type]
        lambda: clip_grad_norm_(["no tensor"], 1.0),  # type: ignore[list-item]
        lambda: clip_grad_norm_(),  # type: ignore[call-arg]
        lambda: get_total_norm(None),  # type: ignore[arg-type]
        lambda: clip_grads_with_norm_(plain(), 1.0, 3.0),  # type: ignore[arg-type]
        lambda: clip_grad_value_(plain(), None),  # type: ignore[arg-type]
        lambda: clip_grad_value_([], 1.0),
    ):
        with pytest.raises(Exception) as expected:
            call()
        with pytest.raises(type(expected.value)) as got:
            observed(call)
        assert str(got.value).split(".<locals>.")[-1] == str(expected.value)


def test_an_empty_generator_is_warned_about_at_the_callers_line() -> None:
    def clip() -> None:
        clip_grad_norm_((p for p in ()), 1.0)

    caught = []
    for call in (clip, lambda: observed(clip)):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call()
        caught.append([(str(w.message), w.filename, w.lineno) for w in said])
    assert caught[0] == caught[1]
    assert len(caught[0]) == 1


def test_a_torch_that_computes_in_another_way_runs_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.utils import clip_grad

    inner = clip_grad._get_total_norm.__wrapped__
    assert captured.is_known(inner)

    def _get_total_norm(
        tensors: Any, norm_type: float = 2.0, error_if_nonfinite: bool = False, foreach: Any = None
    ) -> Tensor:
        norms = torch._foreach_norm(list(tensors), norm_type)
        return torch.linalg.vector_norm(torch.stack([n * 2 for n in norms]), norm_type)

    assert not captured.is_known(_get_total_norm)
    cell = clip_grad._get_total_norm.__closure__[0]
    monkeypatch.setattr(cell, "cell_contents", _get_total_norm)
    grads = [p.grad for p in plain() if p.grad is not None]
    truth = get_total_norm(grads)
    result, seen = observed(lambda: get_total_norm(grads))
    assert bits(result) == bits(truth)
    assert seen.norms[0].norms.tolist() == [2 * float(g.norm()) for g in grads]  # type: ignore[union-attr]
    # The whole clip, whose own code is known, must not pass the changed half by.
    assert bits(observed(lambda: clip_grad_norm_(plain(), 1.0))[0]) == bits(truth)


def test_a_half_that_is_replaced_while_a_run_is_active_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.utils import clip_grad

    def clip() -> Tensor:
        monkeypatch.setattr(clip_grad, "_get_total_norm", lambda *_: torch.tensor(123.0))
        return clip_grad_norm_(plain(), 1.0)

    result, seen = observed(clip)
    assert result == 123.0
    assert seen.norms == []
    assert seen.clips[0].norm is None
    monkeypatch.undo()


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    yield
    assert not seam.installed()
