"""One watched optimizer: hooks around its step, and what they hand to the recorder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.probe import blind
from gradwatch.probe import columns as col
from gradwatch.probe.attempted import Attempted, Clip, Measured
from gradwatch.probe.lane import on_host
from gradwatch.probe.norms import LOW_PRECISION, Columns, is_sharded, l2_norms, stack
from gradwatch.probe.recorder import Row, logged
from gradwatch.probe.sampling import Sample, is_sampled

if TYPE_CHECKING:
    from gradwatch.probe.seam import ClipEvent, NormEvent
    from gradwatch.probe.session import Session


class OptimizerProbe:
    """Watches one optimizer, or several that are stepped one after the other in backward as one.

    Order of a step: clips (any number), the pre-hook (measures where nothing
    clipped, copies weights at a sampled step), ``step`` itself, the post-hook
    (writes the row). With a closure, gradients exist only inside it: the
    pre-hook wraps the closure and measures when it returns.
    """

    def __init__(
        self,
        session: Session,
        name: str,
        index: int,
        optimizers: Sequence[Optimizer],
        positions: dict[int, int],
        tensor_rates: bool,
    ) -> None:
        self.session, self.name, self.index = session, name, index
        self.optimizers = list(optimizers)
        self.step = 0
        self.attempted = Attempted()
        self._positions = positions
        self._tensor_rates = tensor_rates
        self._groups = session.columns.groups
        self._sample: Sample | None = None
        self._sample_first = 0
        self._sampling_off = False
        self._stepped: set[int] = set()
        #: Steps taken since the run began here, and backward passes before the last one.
        self.taken = 0
        self._backwards = 0
        self._started = False
        #: Whether more evaluations of a closure follow than the one that is the step's gradient.
        self.frozen = False
        self._handles: list[Any] = []
        self._key = blind.key_of(self)
        #: Whether its step was compiled, and is not seen.
        self.blind = False
        #: The parameter whose backward passes are counted.
        self.watched: Tensor | None = None
        #: Whether it may be one that takes no part, so that none is seen: the hook tries others then.
        self.searching = True
        #: The bounding clip of the last step, for the checks of a sample.
        self.last_clip: Clip | None = None
        self.refresh()

    # -- what belongs to it

    def refresh(self) -> None:
        """Take in parameters and groups as they are now; called again when a group was added."""
        self.parameters: list[Tensor] = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        self.columns = Columns(self.parameters, [self._positions.get(id(p), -1) for p in self.parameters])
        self.groups: list[dict[str, Any]] = [g for o in self.optimizers for g in o.param_groups]
        self._lists = {id(o): (o.param_groups, len(o.param_groups)) for o in self.optimizers}
        self._host: list[float] = [math.nan] * len(self.session.columns.host)
        self._host[0] = self.index
        first = len(col.HOST)
        #: Groups that have columns, and where their rate and decay stand in a row.
        self._slots = [
            (group, group["params"], first + i, first + self._groups + i)
            for i, group in enumerate(self.groups[: self._groups])
        ]

    def attach(self) -> None:
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.attempted = Attempted()
        self._sample = None

    def named(self) -> Iterator[tuple[str, Tensor, int]]:
        """Its parameters with their names and columns; −1 for one that has no column."""
        names = self.session.writer.manifest.tensors
        for index, parameter in enumerate(self.parameters):
            column = int(self.columns.all[index])
            yield names[column].name if column >= 0 else f"{self.name}.{index}", parameter, column

    def gradients_of(self, clip: Clip) -> list[Tensor]:
        """The present gradients of the parameters that a clip covered."""
        covered = set(clip.columns.tolist())
        return [p.grad for _, p, column in self.named() if column in covered and p.grad is not None]

    def decay_of_columns(self, count: int) -> npt.NDArray[np.float64]:
        """Weight decay of each of the run's tensors, 0 for those of other optimizers."""
        decays = np.zeros(count)
        for group in self.groups:
            for parameter in group["params"]:
                column = self._positions.get(id(parameter), -1)
                if column >= 0:
                    decays[column] = group.get("weight_decay") or 0.0
        return decays

    # -- clips, as the seam reports them

    def saw_clip(self, event: ClipEvent, wide: list[Tensor] | None, scale: Tensor | float | None) -> None:
        """A clip by norm that touched some of this optimizer's parameters; ``wide`` are its norms in float32."""
        for optimizer in self.optimizers:
            self._keep_up(optimizer)
        parameters, grads = event.parameters, event.grads
        if len(grads) != len(parameters):
            parameters = [p for p in parameters if p.grad is not None]
        columns, whole = self.columns.of(parameters)
        if not whole:
            covered = {id(p) for p in parameters}
            whole = all(p.grad is None or id(p) in covered for p in self.parameters)
        norm = event.norm
        norms: Tensor | None = None
        total_is_l2 = False
        if wide is not None:
            norms = stack(wide)
        elif norm is not None and norm.norm_type == 2.0 and len(norm.tensors) == len(grads):
            norms, total_is_l2 = norm.norms, norm.norms is not None
        norm_type = 2.0 if norm is None else norm.norm_type
        total = event.total_norm
        if is_sharded(total):
            total = torch.full((), math.nan)  # the global norm is known to the agent, which sees all ranks
        max_norm = event.max_norm
        clip = Clip(columns, whole, norms, total, max_norm, norm_type, total_is_l2, self.attempted.backwards, scale)
        clip.watched = whole or any(p is self.watched for p in parameters)
        clip.plain = (
            whole
            and len(columns) == len(self.parameters)
            and norms is not None
            and norm_type == 2.0
            and scale is None
            and max_norm < math.inf
            and isinstance(total, Tensor)
            and on_host(total)
            and on_host(norms)
        )
        self._keep_clip(clip)

    def log_clip(self, total_norm: Tensor | float, max_norm: float) -> None:
        """A clip reported by the loop: of all parameters, and done already."""
        clip = Clip(
            self.columns.all,
            True,
            None,
            total_norm,
            float(max_norm),
            2.0,
            False,
            self.attempted.backwards,
            logged=True,
        )
        self._keep_clip(clip)

    def _keep_clip(self, clip: Clip) -> None:
        if self.frozen:
            return
        clips = self.attempted.clips
        if len(clips) >= 1024:  # clips for ever and never a step: only the newest can matter
            del clips[:512]
        clips.append(clip)

    # -- around the step

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session = self.session
        if torch.compiler.is_compiling():
            blind.traced(self._key)
            return None
        if session.aside.off:
            return None
        began = perf_counter()
        try:
            closure = args[1] if len(args) > 1 else kwargs.get("closure")
            if callable(closure):
                return self._with_closure(closure, args, kwargs)
            self.ready(optimizer)
        except Exception as error:
            session.aside.failed(error, "measuring before the optimizer step")
        finally:
            session.recorder.spent += perf_counter() - began
        return None

    def _with_closure(self, closure: Callable[[], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        measured = False

        def observed() -> Any:
            nonlocal measured
            loss = closure()
            if not measured:  # LBFGS calls it many times; the first one is the gradient at the present weights
                measured = True
                try:
                    self.attempted.flags |= col.IN_CLOSURE
                    for optimizer in self.optimizers:
                        self.ready(optimizer)
                    self.frozen = True
                except Exception as error:
                    self.session.aside.failed(error, "measuring inside the closure")
            return loss

        if len(args) > 1:
            return (args[0], observed, *args[2:]), kwargs
        return args, {**kwargs, "closure": observed}

    def ready(self, optimizer: Optimizer) -> None:
        """Gradients are as the optimizer will use them: measure what no clip measured, copy at a sampled step."""
        if not self._started:
            self._start(optimizer)
        self._keep_up(optimizer)
        attempted = self.attempted
        clips = attempted.clips
        # A clip of every parameter measured every parameter; anything less is completed here.
        if not (
            clips and clips[-1].whole and clips[-1].norms is not None and clips[-1].backwards == attempted.backwards
        ) and (attempted.measured is None and (clips or not self.session.look_for_traces())):
            self.measure(optimizer)
        session = self.session
        session.contracts.before_step(self)
        if is_sampled(self.taken) and not self._sampling_off and len(self._stepped) == 0:
            self._begin_sample()

    def _keep_up(self, optimizer: Optimizer) -> None:
        """Take in groups that were added, or that ``load_state_dict`` put in the place of others."""
        groups, count = self._lists.get(id(optimizer), (None, 0))
        if optimizer.param_groups is not groups or len(groups) != count:
            self.session.group_added(self)
            self.refresh()

    def start_at(self, step: int) -> None:
        """Number the next step ``step``: a resumed training goes on counting."""
        self.step, self._started = step, True

    def _start(self, optimizer: Optimizer) -> None:
        self._started = True
        if self.step == 0:
            self.step = steps_taken(optimizer)

    def measure(self, optimizer: Optimizer, first: bool = False) -> None:
        """Take the norms of the gradients that ``optimizer`` is about to use; ``first``: before every clip."""
        parameters = self.parameters
        if len(self.optimizers) > 1:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with_grad = [p for p in parameters if p.grad is not None]
        if not with_grad:
            return
        columns, _ = self.columns.of(with_grad)
        norms = stack(l2_norms([p.grad for p in with_grad if p.grad is not None]))
        scale = getattr(optimizer, "grad_scale", None)
        measured = Measured(columns, norms, scale, first)
        if len(self.optimizers) > 1:
            self.attempted.parts.append(measured)
        else:
            self.attempted.measured = measured
        self.attempted.flags |= col.MEASURED if not self.attempted.clips else 0

    def _begin_sample(self) -> None:
        try:
            state = self.optimizers[0].state if len(self.optimizers) == 1 else _joint_state(self.optimizers)
            known = [(p, self._positions[id(p)]) for p in self.parameters if id(p) in self._positions]
            self._sample = Sample(
                [p for p, _ in known],
                [position for _, position in known],
                state,
                self._sample_first,
                self.session.histograms,
            )
            self._sample_first = self._sample.next_first
        except torch.OutOfMemoryError:
            self._sample = None
            self._sampling_off = True
            self.session.aside.say("out of memory while copying weights: samples are off for this run")

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        session = self.session
        if torch.compiler.is_compiling() or session.aside.off:
            return
        began = perf_counter()
        try:
            if len(self.optimizers) > 1:
                self._stepped.add(id(optimizer))
                if len(self._stepped) < len(self.optimizers):
                    return
                self._stepped.clear()
            self.stepped(getattr(optimizer, "found_inf", None))
        except Exception as error:
            session.aside.failed(error, "recording the optimizer step")
        finally:
            session.recorder.spent += perf_counter() - began

    def stepped(self, found_inf: Tensor | None = None) -> None:
        """The step is done: write its row, finish its sample.

        A fused optimizer under a GradScaler skips inside its kernel; ``found_inf`` says so, on the host at
        once, on a device with the row's other values (the step's number then counts attempts).
        """
        if found_inf is not None and on_host(found_inf) and found_inf.item():
            self.skipped()
            return
        self.attempted.join_parts()
        self._write(0, found_inf)
        session = self.session
        sample, self._sample = self._sample, None
        if sample is not None:
            session.write_sample(self, sample, found_inf)
        session.contracts.after_step(self)
        self.step += 1
        if is_sampled(self.taken) and self.index == 0:
            session.learned(self._backwards)
        self.taken += 1

    def skipped(self) -> None:
        """A GradScaler decided to skip this attempted step: a row, but no step."""
        self._sample = None
        if self.attempted.measured is None and not self.attempted.clips:
            self.measure(self.optimizers[0])
        self.attempted.join_parts()
        self._write(col.SKIPPED, None)

    def _write(self, flags: int, found_inf: Tensor | None) -> None:
        session = self.session
        attempted, train = self.attempted, session.train
        self._backwards = attempted.backwards
        self.frozen = False
        if attempted.backwards == 0 and is_sampled(self.taken):
            session.backward.unseen(self)
        clips = attempted.clips
        self.last_clip = clips[-1] if clips and clips[-1].max_norm < math.inf else None
        host = self._host
        host[1] = attempted.backwards
        host[3] = train.take_samples()
        host[5] = attempted.flags | flags
        host[6] = math.nan
        host[7] = attempted.value_threshold
        plain = self._read_groups(host)
        loss = train.take_loss()
        if (
            plain
            and session.scaler_of(self) is None
            and loss.__class__ is not Tensor
            and session.recorder.write_plain(self.step, host, attempted, logged(loss))  # type: ignore[arg-type]
        ):
            attempted.clear()
            return
        self.attempted = Attempted()
        clips = attempted.effective_clips()
        scale, rates = session.loss_scale(self), self._tensor_rates_now()
        row = Row(self.index, self.step, attempted, clips, loss, scale, found_inf, rates)
        session.recorder.write(row, host)

    def _read_groups(self, host: list[float]) -> bool:
        """Put rates and decays into their columns; False where a rate is on a device and travels with its values."""
        plain = True
        for group, params, rate_at, decay_at in self._slots:
            if group["params"] is not params:
                self._lists = {}  # others were put in their place: taken in before the next step
            rate, decay = group.get("lr"), group.get("weight_decay")
            if rate.__class__ is not float:
                if isinstance(rate, Tensor) and rate.device.type != "cpu":
                    rate, plain = math.nan, False
                else:
                    rate = _number(rate)
            host[rate_at] = rate
            host[decay_at] = decay if decay.__class__ is float else _number(decay)
        return plain

    def _tensor_rates_now(self) -> list[Tensor | float]:
        """Learning rates on a device, as copies that the next step of a scheduler does not change."""
        if not self._tensor_rates:
            return []
        rates = [group["lr"] for group in self.groups[: self._groups]]
        return [r.clone() if isinstance(r, Tensor) and r.device.type != "cpu" else math.nan for r in rates]


def _number(value: object) -> float:
    """A setting of a group as a column holds it; NaN where it has none or none that is a number."""
    try:
        return math.nan if value is None else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def needs_wide_norms(event: NormEvent) -> bool:
    """Whether a clip's own norms will not do: another norm type, a coarse dtype, shards, or none captured."""
    norms = event.norms
    return (
        event.norm_type != 2.0
        or norms is None
        or norms.dtype in LOW_PRECISION
        or (bool(event.tensors) and (is_sharded(event.tensors[0]) or event.tensors[0].dtype in LOW_PRECISION))
        or (event.mixed and any(tensor.dtype in LOW_PRECISION for tensor in event.tensors))
    )


def steps_taken(optimizer: Optimizer) -> int:
    """How many steps a restored optimizer has taken, where its state says so on the host, else 0.

    Adam and its kin keep ``step`` in their state; a checkpoint brings it back,
    which is how a resumed run continues its numbering without being told.
    """
    for state in optimizer.state.values():
        step = state.get("step") if isinstance(state, dict) else None
        if isinstance(step, Tensor) and step.device.type == "cpu" and step.numel() == 1:
            return int(step.item())
        if isinstance(step, int | float):
            return int(step)
    return 0


def _joint_state(optimizers: Sequence[Optimizer]) -> dict[Any, Any]:
    return {parameter: state for optimizer in optimizers for parameter, state in optimizer.state.items()}
