"""One watched optimizer: hooks around its step, and what they hand to the recorder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.probe import blind
from gradwatch.probe import columns as col
from gradwatch.probe.attempted import Attempted, Clip, Measured
from gradwatch.probe.holdings import Holdings, steps_taken
from gradwatch.probe.lane import on_host
from gradwatch.probe.norms import l2_norms, stack
from gradwatch.probe.recorder import Row, logged
from gradwatch.probe.sampler import Sampler
from gradwatch.probe.sampling import is_sampled
from gradwatch.probe.touch import Touch

if TYPE_CHECKING:
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
        self.holds = Holdings(name, optimizers, positions, session.writer.manifest.tensors, session.columns.groups)
        self.step = 0
        self.attempted = Attempted()
        self._tensor_rates = tensor_rates
        #: The host columns of its next row.
        self._host = self._blank_row()
        self._sampler = Sampler(self)
        self._stepped: set[int] = set()
        #: Steps taken since the run began here.
        self.taken = 0
        #: Whether the step under way is one of those at which more is measured.
        self.sampled = is_sampled(0)
        self._started = False
        #: Whether more evaluations of a closure follow than the one that is the step's gradient.
        self.frozen = False
        self._handles: list[Any] = []
        self._key = blind.key_of(self)
        #: Whether its step was compiled, and is not seen.
        self.blind = False
        #: The parameter whose backward passes are counted.
        self.watched: Tensor | None = None
        self.touch = Touch()
        #: Whether it may be one that takes no part, so that none is seen: the hook tries others then.
        self.searching = True
        #: The bounding clip of the last step, for the checks of a sample.
        self.last_clip: Clip | None = None

    def attach(self) -> None:
        for optimizer in self.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before))
            self._handles.append(optimizer.register_step_post_hook(self._after))

    def detach(self) -> None:
        self.give_up()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.attempted = Attempted()
        self._sampler.take()

    def forget(self) -> None:
        """Let go of the optimizer and its parameters: whoever is done with them gets their memory back at once."""
        self.optimizers.clear()
        self.holds.forget()
        self.watched = self.last_clip = None
        self.touch.note(None)

    def keep_up(self, optimizer: Optimizer) -> None:
        """Take in groups that were added, or that ``load_state_dict`` put in the place of others."""
        if self.holds.changed(optimizer):
            self.session.group_added(self)
            self.holds.refresh()
            self.session.contracts.regrouped(self)
            self._host = self._blank_row()

    def _blank_row(self) -> list[float]:
        return [self.index, *[math.nan] * (len(self.session.columns.host) - 1)]

    # -- clips

    def saw(self, clip: Clip) -> None:
        """A clip of this optimizer's parameters belongs to the attempted step under way."""
        if self.frozen:
            return
        clips = self.attempted.clips
        if len(clips) >= 1024:  # clips for ever and never a step: only the newest can matter
            del clips[:512]
        clips.append(clip)

    def refuse(self) -> None:
        """Torch refused to clip, and raised: keep the norms until it is seen whether the loop steps all the same."""
        if self.frozen:
            return
        self.give_up()
        former, flags = self.attempted.measured, self.attempted.flags
        self.measure(self.optimizers[0], first=True)
        attempted = self.attempted
        attempted.refused, attempted.measured, attempted.flags = attempted.measured, former, flags
        if attempted.refused is not None:
            attempted.refused.scale = self.session.scale_in(self)
        self.session.train.hold_back()

    def give_up(self) -> None:
        """No step came behind a clip that was refused: the attempt is recorded as one that was skipped."""
        attempted = self.attempted
        if attempted.refused is None or self.session.aside.off:
            return
        try:
            attempted.measured, attempted.refused = attempted.refused, None
            attempted.clips.clear()
            attempted.flags |= col.MEASURED
            self._write(col.SKIPPED, None, given_up=True)
        except Exception as error:
            self.session.aside.failed(error, "recording an attempt that was given up")

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
        self.keep_up(optimizer)
        attempted = self.attempted
        clips = attempted.clips
        if clips and clips[0].scale is not None and not attempted.scaler_steps and clips[0].touched:
            for clip in clips:  # no scaler takes the scale out of these gradients: the loop had done it by itself
                clip.scale = None
        # A clip of every parameter measured every parameter; anything less is completed here.
        if not (
            clips and clips[-1].whole and clips[-1].norms is not None and clips[-1].backwards == attempted.backwards
        ) and (attempted.measured is None and (clips or not self.session.look_for_traces())):
            self.measure(optimizer)
        session = self.session
        session.contracts.before_step(self)
        if self.sampled and len(self._stepped) == 0:
            if attempted.measured is not None and not clips:
                session.measured_without_clip(self)
            self._sampler.begin()

    def start_at(self, step: int) -> None:
        """Number the next step ``step``: a resumed training goes on counting."""
        self.step, self._started = step, True

    def _start(self, optimizer: Optimizer) -> None:
        self._started = True
        if self.step == 0:
            self.step = steps_taken(optimizer)

    def measure(self, optimizer: Optimizer, first: bool = False) -> None:
        """Take the norms of the gradients that ``optimizer`` is about to use; ``first``: before every clip."""
        parameters = self.holds.parameters
        if len(self.optimizers) > 1:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
        with_grad = [p for p in parameters if p.grad is not None]
        if not with_grad:
            return
        columns, _ = self.holds.columns.of(with_grad)
        norms = stack(l2_norms([p.grad for p in with_grad if p.grad is not None]))
        scale = getattr(optimizer, "grad_scale", None)
        measured = Measured(columns, norms, scale, first)
        if len(self.optimizers) > 1:
            self.attempted.parts.append(measured)
        else:
            self.attempted.measured = measured
        self.attempted.flags |= col.MEASURED if not self.attempted.clips else 0

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
        if len(self.optimizers) > 1:
            self.attempted.join_parts()
        backwards = self.attempted.backwards
        self._write(0, found_inf)
        session = self.session
        if self.sampled:
            sample = self._sampler.take()
            if sample is not None:
                session.write_sample(self, sample, found_inf)
            if self.index == 0:
                session.learned(backwards)
        session.contracts.after_step(self)
        self.step += 1
        self.taken += 1
        self.sampled = is_sampled(self.taken)

    def skipped(self) -> None:
        """A GradScaler decided to skip this attempted step: a row, but no step."""
        self._sampler.take()
        if self.attempted.measured is None and not self.attempted.clips:
            self.measure(self.optimizers[0])
        self.attempted.join_parts()
        self._write(col.SKIPPED, None)

    def _write(self, flags: int, found_inf: Tensor | None, given_up: bool = False) -> None:
        session = self.session
        attempted, train = self.attempted, session.train
        if not self._started:  # an attempt without a step calls no hook
            self._start(self.optimizers[0])
        self.frozen = False
        if attempted.backwards == 0 and self.sampled:
            session.backward.unseen(self)
        clips = attempted.clips
        self.last_clip = clips[-1] if clips and clips[-1].max_norm < math.inf else None
        host = self._host
        host[1] = attempted.backwards
        loss, host[3] = train.take(given_up)
        host[5] = attempted.flags | flags
        host[6] = math.nan
        host[7] = attempted.value_threshold
        plain = self.holds.read_groups(host)
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
        scale, rates = session.loss_scale(self), self.holds.tensor_rates() if self._tensor_rates else []
        row = Row(self.index, self.step, attempted, clips, loss, scale, found_inf, rates)
        session.recorder.write(row, host)
