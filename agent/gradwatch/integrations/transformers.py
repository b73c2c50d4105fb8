"""Transformers: watches ``Trainer.train``, and takes its evaluations for validations."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import gradwatch

#: What an evaluation measures of itself, not of the model.
_OF_THE_EVALUATION: Final = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch")


class GradwatchCallback(TrainerCallback):
    """``Trainer(callbacks=[GradwatchCallback()])``: one run for each ``train()``, on every rank.

    Model, optimizer, scheduler, ``max_grad_norm``, batch size and every training
    argument that is not at its default come from the trainer; ``watch_arguments``
    go to ``gradwatch.watch`` and win. The clip is Accelerate's, which is seen.
    Trainer shows a callback no loss of a step: the training loss is the mean
    that it logs each ``logging_steps``. Evaluations are validations, ``eval_loss``
    as ``loss``, and of several evaluation sets each is a slice.

    Attributes:
        run: the present run, or the last one; None before the first ``train()``.
    """

    def __init__(self, **watch_arguments: Any) -> None:
        self.run: gradwatch.Run | None = None
        self._arguments = watch_arguments

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """The optimizer exists and is restored: watch it. On resume ``state`` says how many steps were taken."""
        if self.run is not None:
            self.run.finish("failed", "train() did not come to its end")
        model = trainer["model"]
        arguments: dict[str, Any] = {
            "model_name": type(model).__name__,
            "max_norm": args.max_grad_norm or None,
            "scheduler": trainer.get("lr_scheduler"),
            "initial_step": state.global_step,
        }
        arguments |= self._arguments
        arguments["config"] = {**_facts(args), **self._arguments.get("config", {})}
        self.run = gradwatch.watch(model, trainer["optimizer"], **arguments)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **trainer: Any,
    ) -> None:
        """The mean training loss since the last log, behind its step."""
        loss = (logs or {}).get("loss")
        if self.run is not None and isinstance(loss, Tensor | float | int):
            self.run.log_train(loss=loss)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **trainer: Any,
    ) -> None:
        """An evaluation is over, in training or by ``trainer.evaluate()`` while the run lasts."""
        # Every evaluation times itself, under the prefix that all its metrics have: eval_ or eval_NAME_.
        prefix = next((k.removesuffix("runtime") for k in metrics or {} if k.endswith("_runtime")), "eval_")
        values: dict[str, Any] = {
            key.removeprefix(prefix): value
            for key, value in (metrics or {}).items()
            if key.removeprefix(prefix) not in _OF_THE_EVALUATION and isinstance(value, Tensor | float | int)
        }
        if self.run is not None and values:
            self.run.log_validation(slice=prefix.removeprefix("eval_").rstrip("_"), **values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **trainer: Any
    ) -> None:
        """The training came to its end; one that raised ends with the process, or with the next ``train()``."""
        if self.run is not None:
            self.run.finish()


def _facts(args: TrainingArguments) -> dict[str, Any]:
    """Batch size of a step, over all ranks; and the arguments that are not at their defaults."""
    changed = {
        field.name: value
        for field in dataclasses.fields(args)
        if (value := getattr(args, field.name, None)) != field.default and isinstance(value, bool | int | float | str)
    }
    size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {"batch_size": size, "training_arguments": changed}
