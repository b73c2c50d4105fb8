"""``watch`` and ``Run``: what a training loop sees of gradwatch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.probe.arguments import Settings, check, models_of, named_optimizers
from gradwatch.probe.aside import Aside
from gradwatch.probe.calibration import expected_calibration_error

if TYPE_CHECKING:
    from gradwatch.probe.ends import End
    from gradwatch.probe.session import Session


def watch(
    model: torch.nn.Module | Sequence[torch.nn.Module],
    optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Any],
    *,
    model_name: str | None = None,
    max_norm: float | None = None,
    config: Mapping[str, Any] | None = None,
    scheduler: Any = None,
    run_name: str | None = None,
    tier: str = "experiment",
    clip_rate_budget: float = 0.1,
    generalization_gap_budget: float | Mapping[str, float] | None = None,
    budgets: Mapping[str, float] | None = None,
    initial_step: int | None = None,
    histograms: bool = True,
    root: str | Path | None = None,
) -> Run:
    """Watch a training: record every step of ``optimizer`` from now on.

    Args:
        model: the module (or modules) being trained; gives tensors their names.
        optimizer: one optimizer, a list, or a mapping of names; a name is the
            label ``optimizer`` of its series (``default`` for a single one). A
            list as a mapping's value is one optimizer in parts, such as one for
            each parameter stepped in backward.
        model_name: the label ``model``; by default the model's class in kebab case.
        max_norm: the clip threshold that the loop means to use, if any: declared,
            so that a clip that never happens is a finding. Clips are seen anyway.
        config: hyperparameters that gradwatch cannot see, nested as you like
            (``batch_size``, ``dataset``, ...). What looks like a secret is redacted.
        scheduler: the learning rate scheduler, for the record.
        run_name: a name for people; by default one is made up.
        tier: ``experiment`` or ``production``; only production runs may page.
        clip_rate_budget: share of recent steps that may be clipped, 0 to 1.
        generalization_gap_budget: relative gap tolerated, for every metric or by name; 0.1 where none is given,
            and what exceeds that alone is information, no ticket: every second healthy run has such a gap.
        budgets: what the run tolerates before a health finding is raised, by its code, such as
            ``{"overfitting": 0.1}``; the page of each finding (docs/findings) says what the number is.
        initial_step: number of the next step, for a resumed training; by default
            what the optimizer's restored state says, else 0.
        histograms: record weight histograms with the samples.
        root: where journals are written; by default ``GRADWATCH_DIR`` or a local directory.

    Returns:
        The run. Nothing that it does raises into training, waits, starts a
        thread, or synchronises a device.

    Raises:
        TypeError, ValueError: for wrong arguments, at once and in plain words.

    Several runs may be active in one process. ``GRADWATCH_DISABLE=1`` makes the
    run inert.
    """
    settings = check(
        Settings(
            models=models_of(model),
            optimizers=named_optimizers(optimizer),
            model_name=model_name,
            max_norm=max_norm,
            config=config or {},
            scheduler=scheduler,
            run_name=run_name,
            tier=tier,
            clip_rate_budget=clip_rate_budget,
            generalization_gap_budget=generalization_gap_budget,
            budgets=budgets or {},
            initial_step=initial_step,
            histograms=histograms,
            root=None if root is None else Path(root),
        )
    )
    if os.environ.get("GRADWATCH_DISABLE", "").lower() not in ("", "0", "false", "no"):
        return Run(None, None, settings.optimizers)
    from gradwatch.probe import start

    aside = Aside(settings.name)
    try:
        return start.begin(settings, aside)
    except Exception as error:
        aside.failed(error, "starting")
        return Run(None, aside, settings.optimizers)


class Run:
    """A watched run: log what gradwatch cannot see, and finish.

    A context manager: an exception that leaves the block ends the run as
    failed, with its type as the reason. Without ``with``, uncaught exceptions
    and ``sys.exit`` are noticed as well. A run that is never finished lives as
    long as it or its optimizer is held somewhere; it ends when the garbage
    collector takes both, or with the process.

    Attributes:
        id: the run's identity, the label ``run``; "" for an inert run.
        name: its name for people.
        directory: this attempt's journal, None for an inert run.
    """

    def __init__(
        self, session: Session | None, aside: Aside | None, optimizers: Mapping[str, Sequence[Optimizer]]
    ) -> None:
        self._session = session
        # Weakly: a run that is over, and kept for its name, must not keep a model.
        self._optimizers = {name: [ref(part) for part in parts] for name, parts in optimizers.items()}
        self._aside = aside
        manifest = session.writer.manifest if session is not None else None
        self.id: str = manifest.run if manifest is not None else ""
        self.name: str = manifest.run_name if manifest is not None else ""
        self.directory: Path | None = session.writer.directory if session is not None else None
        self._agent: Any = None
        self._ends: Any = None

    @property
    def active(self) -> bool:
        """Whether steps are being recorded."""
        return self._session is not None and not self._session.aside.off

    @property
    def failures(self) -> int:
        """How often the probe failed and stepped aside; 0 in a healthy run."""
        return 0 if self._aside is None else self._aside.failures

    @property
    def last_failure(self) -> str:
        """The last failure in words, "" if there was none."""
        return "" if self._aside is None else self._aside.last

    def log_train(
        self,
        loss: Tensor | float | None = None,
        *,
        samples: int | None = None,
        **metrics: Tensor | float,
    ) -> None:
        """Log the training loss of a step (mean over the batch), and whatever else is measured in training.

        A device tensor is kept as one and never synchronised. A loss belongs to
        the step that it was computed for, whether it is logged before or behind
        ``optimizer.step()``; several of one step count with their mean. Where
        autograd does not tell (gradients set by hand), a loop that logs before
        its first step logs ahead of every step. ``samples`` is how many samples the step
        consumed; other metrics are averaged until the next validation, which
        they are compared with.
        """
        session = self._live()
        if session is None:
            return
        try:
            if samples is not None:
                session.train.samples(samples)
            if loss is not None:
                session.train.loss(loss)
            for name, value in metrics.items():
                session.train.metric(name, value)
        except Exception as error:
            session.aside.refused(error, "log_train")

    def log_validation(
        self,
        *,
        slice: str = "",
        step: int | None = None,
        higher_is_better: Mapping[str, bool] | None = None,
        probabilities: Tensor | None = None,
        targets: Tensor | None = None,
        **metrics: Tensor | float,
    ) -> None:
        """Log a validation: ``run.log_validation(loss=val_loss, accuracy=acc)``.

        The generalization gap compares each metric with its training mean since
        the last validation, ``(validation − training) / |training|`` for what
        should be low (loss, error, perplexity, ...) and the negative for scores.
        ``slice`` names a cohort; ``higher_is_better`` overrides what a metric's
        name suggests. ``probabilities`` and ``targets`` of a classification,
        shapes (samples, classes) and (samples,), add the metric ``ece``, their
        expected calibration error, computed on their device.
        """
        session = self._live()
        if session is None:
            return
        try:
            better = {name: bool(value) for name, value in (higher_is_better or {}).items()}
            if probabilities is not None and targets is not None:
                metrics = {**metrics, **_calibration(session, probabilities, targets)}
            session.validation(metrics, str(slice), better, step)
        except Exception as error:
            session.aside.refused(error, "log_validation")

    def log_clip(self, total_norm: Tensor | float, max_norm: float, *, optimizer: str | None = None) -> None:
        """Report a clip that an engine did by itself (FSDP1, DeepSpeed), behind it and before the step.

        ``total_norm`` is the pre-clip global norm that it used.
        """
        session = self._live()
        if session is None:
            return
        try:
            session.log_clip(total_norm, float(max_norm), optimizer)
        except Exception as error:
            session.aside.refused(error, "log_clip")

    def log_slo(self, slo: str, *, good: int = 0, bad: int = 0) -> None:
        """Count events of a service level, such as requests within their latency, for error budgets."""
        session = self._live()
        if session is None:
            return
        try:
            session.event("slo", slo=str(slo), good=int(good), bad=int(bad))
        except Exception as error:
            session.aside.refused(error, "log_slo")

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0, *, optimizer: str | None = None) -> Tensor:
        """Clip the gradients of the watched parameters: ``torch.nn.utils.clip_grad_norm_`` over all of them.

        Returns the pre-clip total norm. With several optimizers, ``optimizer``
        names the one whose parameters are meant. In an inert run it clips the
        same, since training must not depend on being watched.
        """
        if optimizer is not None and optimizer not in self._optimizers:
            raise ValueError(f"optimizer: no {optimizer!r} here; this run watches {', '.join(self._optimizers)}")
        chosen = self._optimizers.values() if optimizer is None else [self._optimizers[optimizer]]
        there = [part for parts in chosen for held in parts if (part := held()) is not None]
        parameters = [p for part in there for group in part.param_groups for p in group["params"]]
        return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint should hold so that a resumed run continues its count of steps."""
        session = self._session
        steps = {} if session is None else {probe.name: probe.step for probe in session.probes}
        return {"run": self.id, "steps": steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting steps where a checkpoint left off."""
        session = self._live()
        if session is None:
            return
        try:
            for probe in session.probes:
                step = state["steps"].get(probe.name)
                if isinstance(step, int) and step >= 0:
                    probe.start_at(step)
        except Exception as error:
            session.aside.refused(error, "load_state_dict")

    def finish(self, state: str = "finished", reason: str = "") -> None:
        """End the run: write what is under way, let go of hooks and seam. Calling it again does nothing."""
        self._end(state=state, reason=reason or state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
            return
        from gradwatch.probe.ends import end_of

        self._ended(end_of(error))

    def _ended(self, end: End) -> None:
        """The process noticed its end by itself (``probe.ends``)."""
        self._end(
            state=end.state,
            reason=end.reason,
            type=end.type,
            message=end.message,
            exit_code=end.exit_code,
            signal=end.signal,
        )

    def _end(self, **end: Any) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        from gradwatch.probe import start

        try:
            start.finish(self, session, end)
        except Exception as error:
            session.aside.failed(error, "finishing")

    def _live(self) -> Session | None:
        session = self._session
        return None if session is None or session.aside.off else session

    def __del__(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            from gradwatch.probe import unfinished

            unfinished.end(self, session)

    def __repr__(self) -> str:
        return f"<gradwatch.Run {self.id or 'inert'}>"


def _calibration(session: Session, probabilities: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The metric ``ece``; nothing where the two do not fit, which must not lose the metrics beside them."""
    try:
        return {"ece": expected_calibration_error(probabilities, targets)}
    except Exception as error:
        session.aside.refused(error, "log_validation")
        return {}


__all__ = ["Run", "watch"]
