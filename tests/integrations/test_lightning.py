"""Lightning's own Trainer on a tiny training: true norms, true steps, its validations, and no false finding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradwatch
from gradwatch.integrations.lightning import GradwatchCallback
from gradwatch.journal import Events, JournalReader, find_attempts
from tests.integrations.truth import codes, end, norm, validations

Read = Callable[[gradwatch.Run], Events]


def loader(count: int = 48, batch: int = 8) -> DataLoader[Any]:
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x[:, :1] * 3 - x[:, 1:2]), batch_size=batch)


class Net(pl.LightningModule):
    """Automatic optimization; writes down what its steps really were."""

    def __init__(self, lr: float = 1e-2, optimizer: str = "sgd") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.norms: list[float] = []
        self.losses: list[float] = []
        self.val_losses: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(self.layers(batch[0]).float(), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.loss(batch)
        self.log("val_loss", loss, batch_size=len(batch[0]))
        self.log("val_bias", 0.25 + dataloader_idx)
        self.val_losses.append(loss.item())

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.norms.append(norm(p for g in optimizer.param_groups for p in g["params"]))

    def configure_optimizers(self) -> Any:
        if self.hparams["optimizer"] == "sgd":
            return torch.optim.SGD(self.parameters(), lr=self.hparams["lr"])
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


class Manual(Net):
    """Two optimizers, stepped by hand, each clipped by Lightning's `clip_gradients`."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.each: list[list[float]] = [[], []]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for index, optimizer in enumerate(self.optimizers()):
            self.each[index].append(norm(p for g in optimizer.param_groups for p in g["params"]))
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layers[0].parameters(), 1e-2), torch.optim.Adam(self.layers[2].parameters(), 1e-2)


def trainer(tmp_path: Path, *callbacks: Any, **arguments: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    defaults = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "enable_checkpointing": False}
    return pl.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), **{**defaults, **quiet, **arguments})


@pytest.fixture(autouse=True)
def _quiet() -> None:
    warnings.filterwarnings("ignore", module="lightning")


@pytest.fixture
def callback(tmp_path: Path) -> GradwatchCallback:
    return GradwatchCallback(root=tmp_path / "runs")


def run_of(callback: GradwatchCallback) -> gradwatch.Run:
    assert callback.run is not None
    return callback.run


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_automatic_optimization(
    tmp_path: Path, callback: GradwatchCallback, read: Read, clip: float | None, accumulate: int
) -> None:
    net = Net()
    fit = trainer(tmp_path, callback, gradient_clip_val=clip, accumulate_grad_batches=accumulate)
    fit.fit(net, loader(), loader(16))
    steps = 12 // accumulate
    events = read(run_of(callback))
    assert codes(events) == []
    assert len(net.norms) == len(events.steps) == steps
    np.testing.assert_array_equal(events.steps.step, range(steps))
    np.testing.assert_allclose(events.steps["grad_norm"], net.norms, rtol=1e-5)
    np.testing.assert_allclose(events.steps["loss"], np.reshape(net.losses, (steps, accumulate)).mean(1), rtol=1e-5)
    np.testing.assert_array_equal(events.steps["backwards"], accumulate)
    if clip is not None:
        np.testing.assert_array_equal(events.steps["clip_threshold"], clip)
        expected = np.minimum(1, clip / (np.array(net.norms) + 1e-6))
        np.testing.assert_allclose(events.steps["clip_coefficient"], expected, rtol=1e-5)
    # Two batches of the sanity check come first, and are no validation.
    means = np.reshape(net.val_losses[2:], (2, 2)).mean(1)
    seen = validations(events)
    assert [v["slice"] for v in seen] == ["", ""]
    np.testing.assert_allclose([v["loss"] for v in seen], means, rtol=1e-5)
    assert seen[0].keys() == {"slice", "loss", "bias"}
    assert end(events)[0] == "finished"


def test_what_the_trainer_knows_is_in_the_manifest(tmp_path: Path, callback: GradwatchCallback) -> None:
    trainer(tmp_path, callback, gradient_clip_val=0.5, accumulate_grad_batches=2, max_epochs=1).fit(Net(), loader())
    directory = run_of(callback).directory
    assert directory is not None
    manifest = JournalReader(directory).manifest
    assert (manifest.model, manifest.max_norm) == ("Net", 0.5)
    assert manifest.config["batch_size"] == 16
    assert manifest.config["hparams"] == {"lr": 1e-2, "optimizer": "sgd"}
    assert next(t.name for t in manifest.tensors) == "layers.0.weight"


def test_clip_by_value(tmp_path: Path, callback: GradwatchCallback, read: Read) -> None:
    net = Net()
    trainer(tmp_path, callback, gradient_clip_val=0.01, gradient_clip_algorithm="value").fit(net, loader())
    events = read(run_of(callback))
    assert codes(events) == []
    np.testing.assert_array_equal(events.steps["value_threshold"], 0.01)
    np.testing.assert_allclose(events.steps["grad_norm"], net.norms, rtol=1e-5)


def test_a_clip_of_ones_own_in_configure_gradient_clipping(
    tmp_path: Path, callback: GradwatchCallback, read: Read
) -> None:
    class Own(Net):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.25)

    net = Own()
    trainer(tmp_path, callback).fit(net, loader())
    events = read(run_of(callback))
    assert codes(events) == []
    np.testing.assert_array_equal(events.steps["clip_threshold"], 0.25)
    np.testing.assert_allclose(events.steps["grad_norm"], net.norms, rtol=1e-5)


def test_a_declared_threshold_that_the_trainer_does_not_clip_at_is_found(tmp_path: Path, read: Read) -> None:
    callback = GradwatchCallback(root=tmp_path / "runs", max_norm=1.0)
    trainer(tmp_path, callback, max_epochs=5).fit(Net(), loader())
    assert set(codes(read(run_of(callback)))) == {"clip-missing"}


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_precision(tmp_path: Path, callback: GradwatchCallback, read: Read, precision: Any) -> None:
    net = Net()
    trainer(tmp_path, callback, precision=precision, gradient_clip_val=0.5).fit(net, loader())
    events = read(run_of(callback))
    assert codes(events) == []
    np.testing.assert_allclose(events.steps["grad_norm"], net.norms, rtol=1e-5)


def test_sixteen_bit_with_a_scaler(tmp_path: Path, callback: GradwatchCallback, read: Read) -> None:
    # `precision="16-mixed"` means bfloat16 on a CPU; the plugin with a scaler of its own does not.
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)  # so high that the first steps overflow
    net = Net()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer(tmp_path, callback, plugins=[plugin], gradient_clip_val=0.5, max_epochs=4).fit(net, loader())
    events = read(run_of(callback))
    assert codes(events) == []
    skipped = np.array([int(flags) & 1 for flags in events.steps["flags"]], dtype=bool)
    true = np.array(net.norms)
    assert len(true) == len(events.steps) == 24
    assert 0 < skipped.sum() < 20
    np.testing.assert_array_equal(skipped, ~np.isfinite(true))
    np.testing.assert_allclose(events.steps["grad_norm"][~skipped], true[~skipped], rtol=1e-5)
    assert events.steps.step[-1] == (~skipped).sum() - 1
    assert np.nanmax(events.steps["loss_scale"]) == 2.0**24


def test_manual_optimization_with_two_optimizers(tmp_path: Path, callback: GradwatchCallback, read: Read) -> None:
    net = Manual()
    trainer(tmp_path, callback).fit(net, loader())
    events = read(run_of(callback))
    assert codes(events) == []
    for index in (0, 1):
        mine = events.steps["optimizer"] == index
        np.testing.assert_allclose(events.steps["grad_norm"][mine], net.each[index], rtol=1e-5)
        np.testing.assert_array_equal(events.steps.step[mine], range(12))
    np.testing.assert_allclose(events.steps["loss"][events.steps["optimizer"] == 1], net.losses, rtol=1e-5)


def test_several_validation_loaders_are_slices(tmp_path: Path, callback: GradwatchCallback, read: Read) -> None:
    trainer(tmp_path, callback, max_epochs=1).fit(Net(), loader(), [loader(16), loader(16)])
    seen = validations(read(run_of(callback)))
    assert [(v["slice"], v["bias"]) for v in seen] == [("dataloader_0", 0.25), ("dataloader_1", 1.25)]


def test_validate_behind_fit_in_a_run_left_open(tmp_path: Path, read: Read) -> None:
    callback = GradwatchCallback(root=tmp_path / "runs", finish=False)
    net, fit = Net(), trainer(tmp_path, callback, max_epochs=1)
    fit.fit(net, loader())
    net.val_losses.clear()
    fit.validate(net, loader(16), verbose=False)
    assert run_of(callback).active
    events = read(run_of(callback))
    [seen] = validations(events)
    assert seen["loss"] == pytest.approx(np.mean(net.val_losses), rel=1e-5)
    assert end(events)[0] == "finished"


def test_validate_without_a_fit_starts_no_run(tmp_path: Path, callback: GradwatchCallback) -> None:
    trainer(tmp_path, callback).validate(Net(), loader(16), verbose=False)
    assert callback.run is None


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_resume_goes_on_counting(tmp_path: Path, read: Read, optimizer: str) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="half", every_n_epochs=1)
    first = GradwatchCallback(root=tmp_path / "runs")
    net = Net(optimizer=optimizer)
    trainer(tmp_path, first, keep, max_epochs=2, enable_checkpointing=True).fit(net, loader())
    assert len(read(run_of(first)).steps) == 12
    second = GradwatchCallback(root=tmp_path / "runs")
    net = Net(optimizer=optimizer)
    trainer(tmp_path, second, max_epochs=3).fit(net, loader(), ckpt_path=keep.best_model_path, weights_only=False)
    events = read(run_of(second))
    np.testing.assert_array_equal(events.steps.step, range(12, 18))
    np.testing.assert_allclose(events.steps["grad_norm"], net.norms, rtol=1e-5)


def test_resume_of_two_optimizers_by_the_callbacks_own_state(tmp_path: Path, read: Read) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="half")
    first = GradwatchCallback(root=tmp_path / "runs")
    trainer(tmp_path, first, keep, max_epochs=1, enable_checkpointing=True).fit(Manual(), loader())
    second = GradwatchCallback(root=tmp_path / "runs")
    path = keep.best_model_path
    trainer(tmp_path, second, max_epochs=2).fit(Manual(), loader(), ckpt_path=path, weights_only=False)
    events = read(run_of(second))
    for index in (0, 1):
        np.testing.assert_array_equal(events.steps.step[events.steps["optimizer"] == index], range(6, 12))


@pytest.mark.parametrize(("error", "state"), [(ValueError, "failed"), (KeyboardInterrupt, "killed")])
def test_an_exception_ends_the_run(
    tmp_path: Path, callback: GradwatchCallback, read: Read, error: type[BaseException], state: str
) -> None:
    class Breaks(Net):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                raise error("no more data")

    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        trainer(tmp_path, callback).fit(Breaks(), loader())
    events = read(run_of(callback))
    assert len(events.steps) == 4
    assert end(events)[0] == state
    assert error.__name__ in end(events)[1]


def test_a_second_fit_is_a_second_run(tmp_path: Path, callback: GradwatchCallback, read: Read) -> None:
    trainer(tmp_path, callback, max_epochs=1).fit(Net(), loader())
    first = run_of(callback)
    trainer(tmp_path, callback, max_epochs=1).fit(Net(), loader())
    assert run_of(callback).id != first.id
    for run in (first, run_of(callback)):
        np.testing.assert_array_equal(read(run).steps.step, range(6))


@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_two_processes(tmp_path: Path, launcher: str) -> None:
    root = tmp_path / "journals"
    environment = {**os.environ, "GRADWATCH_DIR": str(root), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment["PYTHONPATH"] = os.pathsep.join(["agent", "."])
    start = [] if launcher == "lightning" else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *start, __file__, str(tmp_path)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    journals = [JournalReader(place.path) for place in find_attempts(root)]
    assert sorted(j.manifest.rank for j in journals) == [0, 1]
    assert len({j.manifest.run for j in journals}) == 1, "the ranks are of one run"
    for journal in journals:
        events = journal.poll()
        assert codes(events) == []
        assert end(events)[0] == "finished"
        assert (journal.manifest.world_size, journal.manifest.config["batch_size"]) == (2, 16)
        true = json.loads((tmp_path / f"rank{journal.manifest.rank}.json").read_text())
        assert len(true) == len(events.steps) == 6
        np.testing.assert_allclose(events.steps["grad_norm"], true, rtol=1e-5)
        journal.close()


def _one_rank(tmp_path: Path) -> None:
    """What each process of `test_two_processes` runs."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = Net()
    fit = trainer(tmp_path, GradwatchCallback(), devices=2, strategy="ddp", gradient_clip_val=0.5)
    fit.fit(net, loader())
    (tmp_path / f"rank{fit.global_rank}.json").write_text(json.dumps(net.norms))
    # Lightning leaves the process group open: its threads then race with the interpreter's end, which aborts.
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    _one_rank(Path(sys.argv[1]))
