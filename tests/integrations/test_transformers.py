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
        #: Copies of the parameters with the gradients of the last step.
        self.last: list[torch.Tensor] = []

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.norms.append(norm(self.model.parameters()))
        self.last = [p.detach().clone() for p in self.model.parameters()]
        for kept, parameter in zip(self.last, self.model.parameters()):
            kept.grad = None if parameter.grad is None else parameter.grad.clone()
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
    assert run.directory is not None
    reader = JournalReader(run.directory)
    reader.close()
    config = reader.manifest.config
    assert config["batch_size"] == 8
    assert config["training_arguments"]["max_grad_norm"] == 0.5
    assert "adam_beta1" not in config["training_arguments"], "what is at its default is not said"
    assert reader.manifest.max_norm == 0.5
    assert reader.manifest.model == "BertForSequenceClassification"
    # The Trainer logs the mean loss of two steps behind the second.
    told = [log["loss"] for log in training.state.log_history if "loss" in log]
    np.testing.assert_allclose(events.steps["loss"][1::2], told, rtol=1e-5)
    assert np.isnan(events.steps["loss"][::2]).all()
    evaluated = [log["eval_loss"] for log in training.state.log_history if "eval_loss" in log]
    assert validations(events) == [{"slice": "", "loss": pytest.approx(value)} for value in evaluated]


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


@pytest.mark.parametrize("arguments", [{"max_grad_norm": 0.0}, {"bf16": True}, {"weight_decay": 0.01}])
def test_without_a_clip_in_bfloat16_and_with_decay(
    tmp_path: Path, callback: GradwatchCallback, read: Read, arguments: dict[str, Any]
) -> None:
    training = trainer(tmp_path, callback, save_strategy="no", **arguments)
    training.train()
    events = read(run_of(callback))
    # Trainer takes biases and normalisation scales out of the decay by itself, so that nothing is found.
    assert codes(events) == []
    np.testing.assert_allclose(events.steps["grad_norm"], training.norms, rtol=1e-5)
    unclipped = arguments.get("max_grad_norm") == 0.0
    np.testing.assert_array_equal(events.steps["clip_threshold"], np.nan if unclipped else 0.5)
    # Each tensor's norm stands in its own column, though the groups of the decay order them otherwise.
    true = [float(p.grad.double().norm()) for p in training.last]
    np.testing.assert_allclose(events.tensors.values[-1], true, rtol=1e-5)


def test_evaluation_sets_are_slices(tmp_path: Path, callback: GradwatchCallback, read: Read) -> None:
    training = trainer(tmp_path, callback, eval_strategy="steps", eval_steps=6, save_strategy="no")
    training.eval_dataset = {"tenant_7": Data(), "rest": Data()}
    training.train()
    seen = validations(read(run_of(callback)))
    assert [(sorted(v), v["slice"]) for v in seen] == [(["loss", "slice"], "tenant_7"), (["loss", "slice"], "rest")]


def test_a_training_that_raised_is_ended_by_the_next(tmp_path: Path, callback: GradwatchCallback, read: Read) -> None:
    class Breaks(Truth):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            if self.state.global_step == 3:
                raise ValueError("no more data")
            return super().training_step(*args, **kwargs)

    args = trainer(tmp_path, callback, save_strategy="no").args
    with pytest.raises(ValueError, match="no more data"):
        Breaks(model=model(), args=args, train_dataset=Data(), callbacks=[callback]).train()
    first = run_of(callback)
    trainer(tmp_path, callback, save_strategy="no").train()
    assert run_of(callback).id != first.id
    assert end(read(first))[0] == "failed"
    assert len(read(first).steps) == 3
    assert end(read(run_of(callback)))[0] == "finished"


def test_beside_mlflows_callback_in_the_same_run(
    tmp_path: Path, callback: GradwatchCallback, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    mlflow.set_tracking_uri(uri)
    try:
        trainer(tmp_path, callback, report_to=["mlflow"], save_strategy="no").train()
        run = run_of(callback)
        read(run)
        assert run.directory is not None
        reader = JournalReader(run.directory)
        reader.close()
        [theirs] = mlflow.MlflowClient(uri).search_runs(["0"])
        assert reader.manifest.mlflow["run_id"] == theirs.info.run_id
        assert reader.manifest.mlflow["tracking_uri"] == uri
        assert theirs.data.params["max_steps"] == "6"
    finally:
        if mlflow.active_run() is not None:
            mlflow.end_run()
        mlflow.set_tracking_uri(None)  # type: ignore[arg-type]
