"""A watched run from the inside: one object that the seam, the hooks and the public ``Run`` meet in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from time import perf_counter, time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gradwatch.journal import JournalWriter
from gradwatch.probe import columns as col
from gradwatch.probe import metadata, seam
from gradwatch.probe import scaler as scalers
from gradwatch.probe.aside import Aside
from gradwatch.probe.backward import BackwardWatch
from gradwatch.probe.contract import Contracts
from gradwatch.probe.forensics import Forensics
from gradwatch.probe.lane import Lane, Values, gather, on_host
from gradwatch.probe.norms import l2_norms
from gradwatch.probe.optimizer import OptimizerProbe
from gradwatch.probe.recorder import Recorder
from gradwatch.probe.sampling import Sample
from gradwatch.probe.sighting import clip_logged, clip_seen, needs_wide_norms
from gradwatch.probe.train_log import TrainLog

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

    from gradwatch.probe.seam import ClipEvent, NormEvent, ValueClipEvent


class Session:
    """Everything that a run holds while it is active.

    It is the seam's and the scaler's listener (they call ``on_*``), owns the
    optimizers' probes, and is the only one that writes events. Nothing here
    raises to a caller in the training loop.
    """

    def __init__(
        self,
        writer: JournalWriter,
        columns: col.StepColumns,
        optimizers: Mapping[str, Sequence[Optimizer]],
        positions: dict[int, int],
        aside: Aside,
        facts: Mapping[str, Any],
        lane: Lane | None = None,
    ) -> None:
        self.writer, self.columns, self.aside = writer, columns, aside
        self.lane = lane or Lane()
        self.recorder = Recorder(writer, columns, self.lane, perf_counter())
        self.histograms = any(s.name == "histogram" for s in writer.manifest.sections)
        self.train = TrainLog(self.recorder, self._losses_uncertain)
        self.contracts = Contracts(self, facts)
        self.recorder.landed = self.contracts.row_landed
        self.recorder.broken = Forensics(writer, self.event).note
        self.probes = [
            OptimizerProbe(self, name, index, members, positions, columns.tensor_rates)
            for index, (name, members) in enumerate(optimizers.items())
        ]
        self.backward = BackwardWatch(self.probes, self.contracts)
        self._scalers: dict[int, GradScaler] = {}
        #: Scalers between a ``scale`` and their ``update``, and those that work for models not watched here.
        self._scaled: set[int] = set()
        self._elsewhere: set[int] = set()
        self._scaler_of: dict[int, GradScaler] = {}
        #: Whether a compiler has traced a clip: what it compiled is not seen.
        self.traced = False
        self._traced_before = seam.traced()
        self._wide: tuple[object, list[Tensor]] | None = None
        self._value_clip: list[Tensor] = []
        self._new_schedulers: list[LRScheduler] = []
        #: Ends the run where its optimizer is watched anew; set when it has begun.
        self.ended_by_successor: Callable[[], None] = lambda: None
        self._accumulation = 0
        #: Optimizers whose gradients somebody changes by hand.
        self._touched: set[str] = set()

    # -- life

    def attach(self) -> None:
        for probe in self.probes:
            probe.attach()
        self.backward.attach()

    def detach(self) -> None:
        for probe in self.probes:
            probe.detach()
        self.backward.detach()

    def forget(self) -> None:
        """The run is over: hold nothing of the training, which the garbage collector would have to find."""
        for probe in self.probes:
            probe.forget()
        for known in (self._scalers, self._scaler_of):
            known.clear()
        self._new_schedulers = []
        self._value_clip, self._wide = [], None

    def probe_of(self, optimizer: Optimizer | None) -> OptimizerProbe | None:
        for probe in self.probes:
            if any(member is optimizer for member in probe.optimizers):
                return probe
        return None

    # -- what the seam reports

    def on_norm(self, event: NormEvent) -> None:
        """A norm is about to be used for a clip: keep float32 L2 norms where its own are of another kind."""
        if self.aside.off or not event.tensors or not needs_wide_norms(event):
            return
        began = perf_counter()
        self._wide = (event.total, l2_norms(event.tensors))
        self.recorder.spent += perf_counter() - began

    def on_clip(self, event: ClipEvent) -> None:
        """Gradients were clipped by norm: it belongs to every optimizer that holds one of the parameters."""
        if self.aside.off or not event.grads:
            return
        began = perf_counter()
        wide = None
        if self._wide is not None:
            if self._wide[0] is event.total_norm and len(self._wide[1]) == len(event.grads):
                wide = self._wide[1]
            self._wide = None
        for probe in self.probes:
            # The first parameter decides in nearly all cases, at the price of one look-up.
            columns = probe.holds.columns
            if event.parameters[0] in columns or any(p in columns for p in event.parameters):
                for optimizer in probe.optimizers:
                    probe.keep_up(optimizer)
                probe.saw(clip_seen(probe, event, wide, self.scale_in(probe)))
        self.recorder.spent += perf_counter() - began

    def on_refused(self, tensors: list[Tensor]) -> None:
        """A clip was refused, and torch raises: whether a step follows all the same is up to the loop."""
        if self.aside.off:
            return
        refused = {id(tensor) for tensor in tensors}
        for probe in self.probes:
            if any(p.grad is not None and id(p.grad) in refused for p in probe.holds.parameters):
                probe.refuse()

    def before_value_clip(self, event: ValueClipEvent) -> object | None:
        """A clip by value begins; at a sampled step, keep what the gradients were."""
        if self.aside.off:
            return None
        sampled = False
        for probe in self.probes:
            if probe.frozen or not any(p in probe.holds.columns for p in event.parameters):
                continue
            probe.attempted.value_threshold = float(event.clip_value)
            probe.attempted.flags |= col.CLIPPED_BY_VALUE
            if not probe.attempted.clips and probe.attempted.measured is None:
                # The gradient norm is that of the gradients before any clip.
                probe.measure(probe.optimizers[0], first=True)
            sampled |= probe.sampled
        if not sampled:
            return None
        return [p.grad.detach().clone() for p in event.parameters if p.grad is not None]

    def on_value_clip(self, event: ValueClipEvent, token: object | None) -> None:
        """Behind a clip by value: clamped fraction and cosine to the unclamped gradient, at a sampled step."""
        if not isinstance(token, list) or not token:
            return
        before = [t for t in token if isinstance(t, Tensor)]
        after = [p.grad.detach() for p in event.parameters if p.grad is not None]
        clamped = torch.stack([(b != a).sum() for b, a in zip(before, after)]).sum()
        products = [
            torch.stack([torch.sum(x.float() * y.float()) for x, y in zip(xs, ys)]).sum()
            for xs, ys in ((before, after), (before, before), (after, after))
        ]
        cosine = products[0] / (products[1] * products[2]).sqrt()
        self._value_clip = [clamped / sum(b.numel() for b in before), cosine]

    def on_failure(self, error: BaseException) -> None:
        self.aside.failed(error, "observing a clip or a scaler")

    def log_clip(self, total_norm: Tensor | float, max_norm: float, optimizer: str | None) -> None:
        """The loop reports a clip that an engine did, of the named optimizer's parameters or of all."""
        for probe in self.probes:
            if optimizer in (None, probe.name):
                probe.saw(clip_logged(probe, total_norm, max_norm))

    # -- what the scaler reports

    def on_scale(self, scaler: GradScaler) -> None:
        self._scalers[id(scaler)] = scaler
        self._scaled.add(id(scaler))

    def on_unscale(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        self._meet(scaler, optimizer)

    def before_step(self, scaler: GradScaler, optimizer: Optimizer, fused: bool) -> None:
        self._meet(scaler, optimizer)
        probe = self.probe_of(optimizer)
        if probe is not None:
            probe.attempted.scaler_steps = True

    def after_step(self, scaler: GradScaler, optimizer: Optimizer, skipped: bool | Tensor | None) -> None:
        """An unfused step that was skipped called no hook of the optimizer: its row is written here."""
        probe = self.probe_of(optimizer)
        if probe is None or self.aside.off or skipped is not True:
            return
        try:
            probe.skipped()
        except Exception as error:
            self.aside.failed(error, "recording a skipped step")

    def on_update(self, scaler: GradScaler) -> None:
        self._scaled.discard(id(scaler))

    def _meet(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        """A scaler works for an optimizer: ours, or one of a model that nobody watches here."""
        self._scalers[id(scaler)] = scaler
        probe = self.probe_of(optimizer)
        if probe is not None:
            self._scaler_of[probe.index] = scaler
        elif scaler not in self._scaler_of.values():
            self._elsewhere.add(id(scaler))

    @property
    def scaled(self) -> bool:
        """Whether a loss may have been scaled."""
        return bool(self._scalers)

    def scaler_of(self, probe: OptimizerProbe) -> GradScaler | None:
        """The scaler that steps this optimizer; before its first step, the only one that was seen."""
        if not self._scalers:
            return None
        known = self._scaler_of.get(probe.index)
        if known is not None:
            return known
        free = [scaler for key, scaler in self._scalers.items() if key not in self._elsewhere]
        return free[0] if len(free) == 1 and not self._scaler_of else None

    def loss_scale(self, probe: OptimizerProbe) -> Tensor | float | None:
        """The present scale of an optimizer's scaler, on its device; None where there is none."""
        scaler = self.scaler_of(probe)
        scale = None if scaler is None else scalers.loss_scale(scaler)
        return None if scale is None else scale.clone()  # `update` changes it in place

    def scale_in(self, probe: OptimizerProbe) -> Tensor | float | None:
        """The scale still in an optimizer's gradients: there was a ``scale`` and not yet an ``unscale_``."""
        scaler = self.scaler_of(probe)
        if scaler is None or id(scaler) not in self._scaled:
            return None
        scaled = any(scalers.is_unscaled(scaler, optimizer) is False for optimizer in probe.optimizers)
        return self.loss_scale(probe) if scaled else None

    # -- schedulers

    def on_scheduler(self, scheduler: LRScheduler) -> None:
        """A scheduler was made after the run began: described at the next sampled step, when it is whole."""
        if not any(known is scheduler for known in self._new_schedulers):
            self._new_schedulers.append(scheduler)

    def look_for_traces(self) -> bool:
        """Whether clips may be hidden in compiled code; said once in an event."""
        if not self.traced and seam.traced() != self._traced_before:
            self.traced = True
            reason = "torch.compile has traced a clip: the compiled code is not seen, norms of this run are unknown"
            self.event("metadata", values={"unchecked.clips": reason})
        return self.traced

    def measured_without_clip(self, probe: OptimizerProbe) -> None:
        """Norms were measured at a step: are gradients what the backward pass left? Said once where they are not."""
        if probe.name not in self._touched and not self.scaled and probe.touch.happened():
            self._touched.add(probe.name)
            reason = "gradients were changed by code that is not seen: norms are those that the step used"
            self.event("metadata", values={f"unchecked.norms.{probe.name}": reason})

    def _losses_uncertain(self) -> None:
        reason = "logged before the first step and with nothing to tell their step by: they may stand one step off"
        self.event("metadata", values={"unchecked.losses": reason})

    def learned(self, backwards: int) -> None:
        """Write what could not be known before the first step."""
        values: dict[str, Any] = {}
        if backwards not in (0, self._accumulation):
            self._accumulation = backwards
            values["accumulation.observed"] = backwards
        mine = [s for s in self._new_schedulers if self.probe_of(getattr(s, "optimizer", None)) is not None]
        if mine:
            values |= metadata.flatten({"scheduler": metadata.describe_schedulers(mine)})
        self._new_schedulers = []
        if values:
            self.event("metadata", values=values)

    # -- events

    def event(self, kind: str, **values: Any) -> None:
        """Append an event to the journal, stamped with time, row and step."""
        if self.aside.off and kind != "end":
            return
        head = {
            "kind": kind,
            "time": time(),
            "row": self.recorder.sequence,
            "step": self.recorder.step,
        }
        try:
            self.writer.events.write(head | values)
        except Exception as error:
            self.aside.failed(error, f"writing the event {kind!r}")

    def group_added(self, probe: OptimizerProbe) -> None:
        """A parameter group came while training: its numbers are in an event, its tensors in the global norm only."""
        groups = [group for optimizer in probe.optimizers for group in optimizer.param_groups]
        for index in range(len(probe.holds.groups), len(groups)):
            values = {k: v for k, v in groups[index].items() if isinstance(v, int | float | str | bool)}
            values["parameters"] = sum(p.numel() for p in groups[index]["params"])
            self.event("group", optimizer=probe.name, group=index, values=values)

    def write_sample(self, probe: OptimizerProbe, sample: Sample, found_inf: Tensor | None) -> None:
        """Bring a finished sample to the host and write its row; a skipped step has no update ratio."""
        parts = sample.finish(len(self.writer.manifest.tensors), probe.index, self._value_clip)
        self._value_clip = []
        if not parts:
            return
        row, step, now = self.recorder.sequence, probe.step, time()
        where = np.concatenate([np.asarray(columns, dtype=np.intp) for columns, _ in parts])
        tensors = [values for _, values in parts]
        if found_inf is not None:
            tensors.append(found_inf)
        clip = probe.last_clip
        total_at = sum(t.numel() for t in tensors)
        if clip is not None and isinstance(clip.total, Tensor):
            tensors.append(clip.total)
        weights = next(s for s in self.writer.manifest.sections if s.name == "weight_norm")

        def landed(values: Values) -> None:
            payload = self.writer.samples.payload
            payload[:] = np.nan
            payload[where] = values[: len(where)]
            payload[0] = probe.index
            if found_inf is not None and values[len(where)]:
                payload[2:4] = np.nan
                update = next(s for s in self.writer.manifest.sections if s.name == "update_norm")
                payload[update.offset : update.offset + update.size] = np.nan
            norms = payload[weights.offset : weights.offset + weights.size].copy()
            self.writer.samples.append(row, step, now)
            if clip is not None and len(values) > total_at and values[total_at] > clip.max_norm:
                self.contracts.sample_landed(probe, step, clip.max_norm, norms)

        vector = gather(tensors)
        if on_host(vector):
            landed(vector.numpy())
        else:
            self.lane.send(vector, landed)

    def validation(
        self, metrics: Mapping[str, Any], slice_: str, better_high: Mapping[str, bool], step: int | None
    ) -> None:
        """Write a validation event; values on a device join it when they have landed."""
        train = self.train.take_means()
        names = [("metrics", k, v) for k, v in metrics.items()] + [("train", k, v) for k, v in train.items()]
        event: dict[str, Any] = {
            "metrics": {},
            "train": {},
            "slice": slice_,
            "higher_is_better": dict(better_high),
            "step": self.recorder.step if step is None else step,
        }
        waiting: list[tuple[str, str]] = []
        tensors: list[Tensor] = []
        for part, name, value in names:
            if isinstance(value, Tensor) and not on_host(value):
                waiting.append((part, name))
                tensors.append(value.detach().float().mean())
            else:
                event[part][name] = float(value.detach().float().mean()) if isinstance(value, Tensor) else float(value)
        if not tensors:
            self.event("validation", **event)
            return

        def landed(values: Values) -> None:
            for (part, name), number in zip(waiting, values.tolist()):
                event[part][name] = number
            self.event("validation", **event)

        self.lane.send(gather(tensors), landed)
