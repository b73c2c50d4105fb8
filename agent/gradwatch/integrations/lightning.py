"""Lightning: watches ``Trainer.fit``, its optimizers, and its validations."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, Final

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Callback
from torch import Tensor

import gradwatch

_PREFIXES: Final = ("validation_", "validation/", "valid_", "valid/", "val_", "val/")
#: Facts of the trainer that reproduction needs.
_FACTS: Final = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val",
                 "gradient_clip_algorithm", "num_nodes", "num_devices", "world_size")  # fmt: skip


class GradwatchCallback(Callback):
    """``Trainer(callbacks=[GradwatchCallback()])``: one run for each ``fit``, on every rank.

    Optimizers, scheduler, clip threshold and batch size come from the trainer;
    ``watch_arguments`` go to ``gradwatch.watch`` (``model_name``, ``tier``,
    ``config``, ``max_norm``, ...) and win. Clips are seen where Lightning makes
    them. The training loss is the mean over the micro-batches of a step; what a
    validation logs is logged as one, ``val_loss`` as ``loss``. A checkpoint
    carries the count of steps.

    Args:
        finish: end the run with ``fit``. False leaves it open for what follows,
            such as ``trainer.validate`` or another ``fit``; then call ``callback.run.finish()``.

    Attributes:
        run: the present run, or the last one; None before the first ``fit``.
    """

    def __init__(self, *, finish: bool = True, **watch_arguments: Any) -> None:
        self.run: gradwatch.Run | None = None
        self._finish, self._arguments = finish, watch_arguments
        #: What the next checkpoint holds when the run is over, and what the last one read brought.
        self._state: dict[str, Any] = {}
        self._restored: dict[str, Any] = {}
        self._before: Mapping[str, Any] = {}
        self._losses: list[Tensor] = []
        self._samples = self._global_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Optimizers exist and are restored, the sanity check is over: watch them."""
        if not trainer.optimizers or (self.run is not None and self.run.active):
            return
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if trainer.world_size > 1 and isinstance(environment, LightningEnvironment):
            # Lightning's rank 0 starts the other ranks; that they have it in common names the run.
            starter = os.getpid() if trainer.local_rank == 0 else os.getppid()
            os.environ.setdefault("GRADWATCH_LAUNCHER_PID", str(starter))
        by_value = str(trainer.gradient_clip_algorithm or "norm").endswith("value")
        optimizers = trainer.optimizers
        arguments: dict[str, Any] = {
            "model_name": type(pl_module).__name__,
            "max_norm": None if by_value else trainer.gradient_clip_val or None,
            "scheduler": [c.scheduler for c in trainer.lr_scheduler_configs] or None,
            # Of several optimizers, Lightning counts the steps together.
            "initial_step": trainer.global_step if len(optimizers) == 1 else None,
        }
        arguments |= self._arguments
        arguments["config"] = {**_facts(trainer, pl_module), **self._arguments.get("config", {})}
        self.run = gradwatch.watch(pl_module, optimizers, **arguments)
        if self._restored:
            self.run.load_state_dict(self._restored)
            self._restored = {}
        self._global_step = trainer.global_step
        self._losses, self._samples = [], 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep a micro-batch's loss until its step is taken."""
        if self.run is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            # Automatic optimization divides what `training_step` returned by the accumulation.
            self._losses.append(loss.detach() * (trainer.accumulate_grad_batches if _automatic(pl_module) else 1))
        self._samples += _batch_size(batch)
        if trainer.global_step == self._global_step:
            return
        self._global_step = trainer.global_step
        mean = torch.stack([loss.float().mean() for loss in self._losses]).mean() if self._losses else None
        self.run.log_train(loss=mean, samples=self._samples or None)
        self._losses, self._samples = [], 0

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Remember what was logged before: the trainer keeps training's and validation's metrics in one mapping."""
        self._before = dict(trainer.callback_metrics)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log what this validation logged; dataloaders beyond one are slices."""
        if self.run is None or trainer.sanity_checking:
            return
        slices: dict[str, dict[str, Any]] = {}
        for key, value in trainer.callback_metrics.items():
            if value is not self._before.get(key) and not key.endswith(("_step", "_epoch")):
                name, _, index = key.partition("/dataloader_idx_")
                prefix = next((p for p in _PREFIXES if name.startswith(p)), "")
                slices.setdefault(index and f"dataloader_{index}", {})[name.removeprefix(prefix)] = value
        for slice_, metrics in slices.items():
            self.run.log_validation(slice=slice_, **metrics)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The fit is over, and its last checkpoint written."""
        if self.run is not None and self._finish:
            self._state = self.run.state_dict()
            self.run.finish()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """The fit ended by ``exception``, an interrupt among them."""
        if self.run is not None:
            self.run.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        """Into Lightning's checkpoint: the steps of each optimizer."""
        return self.run.state_dict() if self.run is not None and self.run.active else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From Lightning's checkpoint; it comes before ``on_train_start``."""
        self._restored = dict(state_dict)


def _automatic(pl_module: pl.LightningModule) -> bool:
    return bool(pl_module.automatic_optimization)


def _facts(trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
    facts = {name: getattr(trainer, name, None) for name in _FACTS}
    sizes = getattr(trainer.train_dataloader, "batch_size", None)
    if isinstance(sizes, int):
        facts["batch_size"] = sizes * trainer.accumulate_grad_batches * trainer.world_size
    return {**facts, "hparams": dict(pl_module.hparams)}


def _batch_size(batch: Any) -> int:
    """Length of the first tensor in a batch, however nested."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts: Iterable[Any] = batch if isinstance(batch, list | tuple) else ()
    if isinstance(batch, Mapping):
        parts = batch.values()
    return next((size for part in parts if (size := _batch_size(part))), 0)
