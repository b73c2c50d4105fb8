"""Transformers' own Trainer on a tiny model made from a configuration: true norms, its evaluations, no finding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import gradwatch
from gradwatch.integrations.transformers import GradwatchCallback
from gradwatch.journal import Events, JournalReader
from tests.integrations.truth import codes, end, norm, validations

Read = Callable[[gradwatch.Run], Events]


class Data(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {
            "input_ids": torch.randint(0, 30, (8,), generator=generator),
            "labels": torch.tensor(index % 2),
        }


def model() -> BertForSequenceClassification:
    torch.manual_seed(0)
    size: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForSequenceClassification(BertConfig(vocab_size=30, intermediate_size=16, **size))


class Truth(Trainer):
    """Writes down the norm of the gradients as they are before its own clip."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.norms: list[float] = []

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.norms.append(norm(self.model.parameters()))
        return loss


def trainer(tmp_path: Path, callback: GradwatchCallback, **arguments: Any) -> Truth:
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "logging_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "max_grad_norm": 0.5,
        **arguments,
    }
    return Truth(
        model=model(),
        args=TrainingArguments(**settings),
        train_dataset=Data(),
        eval_dataset=Data(),
        callbacks=[callback],
    )


def run_of(callback: GradwatchCallback) -> gradwatch.Run:
    assert callback.run is not None
    return callback.run


@pytest.fixture
def callback(tmp_path: Path) -> GradwatchCallback:
    return GradwatchCallback(root=tmp_path / "journals")


def test_norms_threshold_evaluations_and_hyperparameters(
    tmp_path: Path, callback: GradwatchCallback, read: Read
) -> None:
    training = trainer(tmp_path, callback, eval_strategy="steps", eval_steps=3, save_strategy="no")
    training.train()
    run = run_of(callback)
    events = read(run)
    np.testing.assert_allclose(events.steps["grad_norm"], training.norms, rtol=1e-5)
    np.testing.assert_array_equal(events.steps["clip_threshold"], 0.5)
    assert codes(events) == []
    assert end(events) == ("finished", "finished")
    assert len(validations(events)) == 2
    assert all("loss" in validation for validation in validations(events))
    assert run.directory is not None
    reader = JournalReader(run.directory)
    reader.close()
    config = reader.manifest.config
    assert "batch_size" in str(config)
    assert reader.manifest.max_norm == 0.5


def test_accumulation_is_one_step(tmp_path: Path, callback: GradwatchCallback, read: Read) -> None:
    training = trainer(tmp_path, callback, gradient_accumulation_steps=2, max_steps=3, save_strategy="no")
    training.train()
    events = read(run_of(callback))
    # The second micro-batch's norm is that of the sum, which is what is clipped.
    np.testing.assert_allclose(events.steps["grad_norm"], training.norms[1::2], rtol=1e-5)
    np.testing.assert_array_equal(events.steps["backwards"], 2)
    assert codes(events) == []


def test_a_resumed_training_goes_on_counting(tmp_path: Path, callback: GradwatchCallback, read: Read) -> None:
    trainer(tmp_path, callback, max_steps=4, save_steps=4, save_strategy="steps").train()
    first = run_of(callback)
    again = GradwatchCallback(root=tmp_path / "journals")
    training = trainer(tmp_path, again, max_steps=6, save_strategy="no")
    training.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert read(first).steps.step.tolist() == [0, 1, 2, 3]
    assert read(run_of(again)).steps.step.tolist() == [4, 5]
