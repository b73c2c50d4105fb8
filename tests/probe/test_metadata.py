"""Hyperparameters are found without being asked for, and are the true ones."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from gradwatch.probe import metadata, provenance
from gradwatch.probe.metadata import collect, decay_of, flatten, layer_of, tensor_table
from gradwatch.probe.tensors import kind_of


class RMSNormOfMine(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(size))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.lstm = nn.LSTM(4, 4)
        self.norm = nn.LayerNorm(4)
        self.rms = RMSNormOfMine(4)
        self.conv = nn.Conv1d(4, 4, 3)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.temperature = nn.Parameter(torch.ones(()))


def two_groups(net: Net) -> torch.optim.AdamW:
    decayed = [p for n, p in net.named_parameters() if p.dim() > 1 and "embed" not in n]
    plain = [p for p in net.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "name": "decay"}, {"params": plain, "weight_decay": 0.0, "lr": 1e-4}]
    return torch.optim.AdamW(groups, lr=3e-4, betas=(0.9, 0.95), eps=1e-7, weight_decay=0.1)


def test_tensors_have_names_layers_kinds_and_places() -> None:
    net = Net()
    extra = nn.Parameter(torch.zeros(2))
    optimizer = two_groups(net)
    second = torch.optim.SGD([net.embed.weight, extra], lr=0.1)
    rows = tensor_table(net, {"main": optimizer, "embeddings": second})
    table = {
        row.tensor.name: (row.tensor.layer, row.tensor.kind, row.tensor.optimizer, row.tensor.group) for row in rows
    }
    assert table == {
        "temperature": ("root", "weight", 0, 1),
        "embed.weight": ("embed", "embedding", 1, 0),
        "lstm.weight_ih_l0": ("lstm", "weight", 0, 0),
        "lstm.weight_hh_l0": ("lstm", "weight", 0, 0),
        "lstm.bias_ih_l0": ("lstm", "bias", 0, 1),
        "lstm.bias_hh_l0": ("lstm", "bias", 0, 1),
        "norm.weight": ("norm", "norm", 0, 1),
        "norm.bias": ("norm", "norm", 0, 1),
        "rms.scale": ("rms", "norm", 0, 1),
        "conv.weight": ("conv", "weight", 0, 0),
        "conv.bias": ("conv", "bias", 0, 1),
        "optimizer.embeddings.1": ("optimizer.embeddings", "weight", 1, 0),
    }
    by_name = {row.tensor.name: row for row in rows}
    conv = by_name["conv.weight"].tensor
    assert (conv.shape, conv.dtype, conv.numel, conv.placement) == ((4, 4, 3), "float32", 48, None)
    assert by_name["conv.weight"].parameter is net.conv.weight
    assert by_name["optimizer.embeddings.1"].parameter is extra


def test_a_parameter_of_two_optimizers_is_the_first_ones() -> None:
    net = nn.Linear(2, 2)
    first, second = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2))
    assert [row.tensor.optimizer for row in tensor_table(net, {"a": first, "b": second})] == [0, 0]


def test_groups_count_on_through_the_parts_of_one_optimizer() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    parts = [torch.optim.SGD([p], lr=0.1 * (i + 1)) for i, p in enumerate(net.parameters())]
    rows = tensor_table(net, {"default": parts})
    assert [row.tensor.group for row in rows] == [0, 1, 2, 3]
    groups = collect(net, {"default": parts})["optimizers"][0]["groups"]
    assert [g["lr"] for g in groups] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_names_are_the_same_inside_wrappers() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    plain = [row.tensor.name for row in tensor_table(net, {"default": optimizer})]
    for wrapped in (torch.compile(net), nn.DataParallel(net)):
        assert [row.tensor.name for row in tensor_table(wrapped, {"default": optimizer})] == plain
    several = tensor_table([net, nn.Linear(1, 1)], {"default": optimizer})
    assert [row.tensor.name for row in several] == [f"0.{name}" for name in plain]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.0.weight", "encoder.0"),
        ("weight", "root"),
        ("head.parametrizations.weight.original0", "head"),
    ],
)
def test_a_layer_is_the_path_of_its_module(name: str, layer: str) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("block.ln_1.weight", (4,), "norm"),
        ("block.input_layernorm.weight", (4,), "norm"),
        ("x.gamma", (4,), "norm"),
        ("x.bias", (4,), "bias"),
        ("x.weight", (4,), "weight"),
        ("bn.proj", (4, 4), "weight"),
        ("relative_bias_table", (4, 4), "weight"),
    ],
)
def test_without_a_module_name_and_shape_tell_the_kind(name: str, shape: tuple[int, ...], kind: str) -> None:
    assert kind_of(name, torch.zeros(shape), None) == kind


def test_everything_that_reproduction_needs_is_collected() -> None:
    net = Net()
    net.conv.bias.requires_grad_(False)
    optimizer = two_groups(net)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000, eta_min=1e-6)
    config = {"batch_size": 64, "data": {"path": Path("/d"), "password": "hunter2"}, "db": "pg://u:hunter2@h/x"}
    torch.manual_seed(1234)
    facts = collect(net, {"default": optimizer}, scheduler=scheduler, config=config, max_norm=1.0)
    json.dumps(facts, allow_nan=False)
    assert "hunter2" not in json.dumps(facts)
    main = facts["optimizers"][0]
    assert (main["class"], main["decay"], main["linear"]) == ("AdamW", "decoupled", False)
    assert main["settings"]["betas"] == [0.9, 0.95]
    assert main["settings"]["eps"] == 1e-7
    decayed, plain = main["groups"]
    assert (decayed["name"], decayed["lr"], decayed["weight_decay"]) == ("decay", 3e-4, 0.1)
    assert (decayed["tensors"], decayed["parameters"]) == (3, 2 * 16 * 4 + 48)
    assert (decayed["biases"], decayed["norms"]) == (False, False)
    assert (plain["lr"], plain["weight_decay"], plain["biases"], plain["norms"]) == (1e-4, 0.0, True, True)
    assert plain["kinds"] == {"bias": 3, "norm": 3, "weight": 1}
    total = sum(p.numel() for p in {id(p): p for p in net.parameters()}.values())
    assert facts["model"]["parameters"] == {"total": total, "trainable": total - 4, "frozen": 4}
    assert facts["model"]["unoptimized"] == {"tensors": 1, "parameters": 44, "names": ["embed.weight"]}
    assert facts["scheduler"]["class"] == "CosineAnnealingLR"
    assert (facts["scheduler"]["T_max"], facts["scheduler"]["eta_min"]) == (1000, 1e-6)
    assert facts["precision"]["training"] == "float32"
    assert facts["seed"] == 1234
    assert facts["max_norm"] == 1.0
    assert facts["machine"]["torch"] == str(torch.__version__)
    assert facts["device"]["type"] == "cpu"
    assert facts["world_size"] == 1
    assert facts["config"] == {
        "batch_size": 64,
        "data": {"path": "/d", "password": "[redacted]"},
        "db": "pg://h/x",
    }


def test_flat_names_are_those_of_the_documents() -> None:
    net = Net()
    optimizer = two_groups(net)
    scheduler = lr_scheduler.StepLR(optimizer, step_size=5)
    flat = flatten(collect(net, {"default": optimizer}, scheduler=scheduler, config={"a": {"b": [1, 2]}, "none": None}))
    assert flat["optimizer.default.betas"] == "[0.9, 0.95]"
    assert flat["optimizer.default.class"] == "AdamW"
    assert flat["optimizer.default.decay"] == "decoupled"
    assert flat["group.default.0.weight_decay"] == 0.1
    assert flat["group.default.0.name"] == "decay"
    assert flat["group.default.1.lr"] == 1e-4
    assert flat["group.default.1.biases"] is True
    assert flat["scheduler.class"] == "StepLR"
    assert flat["scheduler.step_size"] == 5
    assert flat["config.a.b"] == "[1, 2]"
    assert flat["precision.training"] == "float32"
    assert flat["model.parameters.total"] > 0
    assert "config.none" not in flat
    assert all(isinstance(value, str | int | float | bool) for value in flat.values())


def test_thousands_of_groups_do_not_crowd_out_the_rest() -> None:
    net = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(1500)])
    parts = [torch.optim.SGD([p], lr=0.1) for p in net]
    facts = collect(net, {"default": parts}, config={"batch_size": 1})
    assert len(facts["optimizers"][0]["groups"]) == 1500
    flat = flatten(facts)
    assert flat["config.batch_size"] == 1
    assert len(flat) < 500


# -- weight decay, held against what optimizers do


OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, momentum=0.9),
    "Adam": torch.optim.Adam,
    "Adam decoupled": partial(torch.optim.Adam, decoupled_weight_decay=True),
    "AdamW": torch.optim.AdamW,
    "NAdam": torch.optim.NAdam,
    "NAdam decoupled": partial(torch.optim.NAdam, decoupled_weight_decay=True),
    "RAdam": torch.optim.RAdam,
    "RAdam decoupled": partial(torch.optim.RAdam, decoupled_weight_decay=True),
    "Adamax": torch.optim.Adamax,
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "RMSprop": torch.optim.RMSprop,
    "Muon": torch.optim.Muon,
}
RATE, DECAY = 0.05, 0.2


def _train(make: Any, weight_decay: float, by_hand: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    w = nn.Parameter(
        torch.randn(4, 4, generator=generator, dtype=torch.float64 if make is not torch.optim.Muon else None)
    )
    optimizer = make([w], lr=RATE, weight_decay=weight_decay)
    for _ in range(4):
        w.grad = torch.randn(4, 4, generator=generator).to(w.dtype)
        with torch.no_grad():
            w.mul_(1 - RATE * by_hand)
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_called_what_it_does(name: str) -> None:
    """Decoupled decay equals w <- w (1 - lr * decay) before a step without decay; coupled decay does not."""
    make = OPTIMIZERS[name]
    same = torch.allclose(_train(make, DECAY, 0.0), _train(make, 0.0, DECAY), rtol=1e-5)
    told = decay_of(make([nn.Parameter(torch.zeros(2, 2))], lr=RATE, weight_decay=DECAY))
    assert told == ("decoupled" if same else "coupled")


def test_adafactors_decay_falls_on_the_weights_alone() -> None:
    w = nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.Adafactor([w], lr=RATE, weight_decay=DECAY)
    w.grad = torch.zeros(4, 4)
    optimizer.step()
    assert torch.allclose(w, torch.full((4, 4), 1 - RATE * DECAY))
    assert decay_of(optimizer) == "decoupled"


def test_an_optimizer_that_is_not_known_is_unknown() -> None:
    parameter = nn.Parameter(torch.zeros(1))

    class Mine(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([parameter], {"lr": 0.1, "weight_decay": 0.1})

    class OwnStep(torch.optim.Adam):
        def step(self, closure: Any = None) -> Any:
            return None

    class Inherits(torch.optim.SGD):
        pass

    assert decay_of(Mine()) == "unknown"
    assert decay_of(OwnStep([parameter])) == "unknown"
    assert decay_of(Inherits([parameter], lr=0.1)) == "coupled"
    assert metadata.is_linear(Inherits([parameter], lr=0.1))
    assert not metadata.is_linear(torch.optim.Adam([parameter]))
    assert decay_of(torch.optim.LBFGS([parameter])) == "none"
    assert decay_of(torch.optim.SparseAdam([parameter])) == "none"


def test_rprop_has_no_decay() -> None:
    with pytest.raises(TypeError):
        torch.optim.Rprop([nn.Parameter(torch.zeros(1))], weight_decay=0.1)  # type: ignore[call-arg]
    assert decay_of(torch.optim.Rprop([nn.Parameter(torch.zeros(1))])) == "none"


# -- no synchronisation, and no failure


def test_a_learning_rate_on_a_device_is_not_read() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    parameter = nn.Parameter(torch.zeros(1))
    with FakeTensorMode():
        fake = torch.tensor(0.1)
    for rate, told in ((torch.tensor(0.1, device="meta"), "tensor"), (fake, "tensor"), (torch.tensor(0.5), 0.5)):
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        optimizer.param_groups[0]["lr"] = rate
        assert collect(nn.Linear(1, 1), {"default": optimizer})["optimizers"][0]["groups"][0]["lr"] == told


def test_schedulers_are_found_and_described() -> None:
    net = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert collect(net, {"default": optimizer})["scheduler"] is None
    warmup = lr_scheduler.LinearLR(optimizer, total_iters=10)
    cosine = lr_scheduler.CosineAnnealingLR(optimizer, T_max=90)
    both = lr_scheduler.SequentialLR(optimizer, [warmup, cosine], milestones=[10])
    found = collect(net, {"default": optimizer})["scheduler"]
    assert found["class"] == "SequentialLR"
    assert [part["class"] for part in found["schedulers"]] == ["LinearLR", "CosineAnnealingLR"]
    assert found["milestones"] == [10]
    assert found == collect(net, {"default": optimizer}, scheduler=both)["scheduler"]


def warmup_of_a_library(step: int, *, num_warmup_steps: int) -> float:
    return min(1.0, step / num_warmup_steps)


def test_a_lambda_and_a_wrapper_are_described() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    inner = lr_scheduler.LambdaLR(optimizer, partial(warmup_of_a_library, num_warmup_steps=7))

    class Accelerated:
        scheduler = inner

    told = collect(nn.Linear(1, 1), {"default": optimizer}, scheduler=Accelerated())["scheduler"]
    assert told["class"] == "LambdaLR"
    assert told["lr_lambdas"][0]["kwargs"] == {"num_warmup_steps": 7}
    assert told["lr_lambdas"][0]["call"].endswith("warmup_of_a_library")


def test_precision_says_dtypes_and_autocast() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1).bfloat16())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        told = collect(net, {"default": optimizer})["precision"]
    assert told["parameters"] == {"float32": 20, "bfloat16": 5}
    assert told["autocast"] == {"cpu": "bfloat16"}
    assert told["training"] == "float32+bfloat16 autocast bfloat16"


def test_what_cannot_be_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    for module, name in (
        (provenance, "git"),
        (provenance, "machine"),
        (metadata, "_precision"),
        (metadata, "_scheduler"),
    ):
        monkeypatch.setattr(module, name, broken)
    monkeypatch.setattr(metadata, "_optimizer", broken)
    net = nn.Linear(1, 1)
    facts = collect(net, {"default": torch.optim.SGD(net.parameters(), lr=0.1)})
    assert facts["optimizers"] == [
        {"name": "default", "class": "unknown", "decay": "unknown", "linear": False, "settings": {}, "groups": []}
    ]
    assert facts["git"] == {}
    flatten(facts)


def test_collecting_changes_nothing() -> None:
    net = Net()
    optimizer = two_groups(net)
    before, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    random = torch.get_rng_state()
    collect(net, {"default": optimizer})
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert state == optimizer.state_dict()
    assert torch.equal(random, torch.get_rng_state())


# -- sharded tensors


def test_a_sharded_tensor_says_where_it_lies(tmp_path: Path) -> None:
    code = """
import json, torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from gradwatch.probe.metadata import tensor_table, collect
mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
net = torch.nn.Linear(6, 8)
for name, placements in (("weight", [Replicate(), Shard(0)]), ("bias", [Replicate(), Replicate()])):
    net.register_parameter(name, torch.nn.Parameter(distribute_tensor(getattr(net, name).detach(), mesh, placements)))
o = torch.optim.SGD(net.parameters(), lr=0.1)
rows = tensor_table(net, {"default": o})
print(json.dumps([[r.tensor.shape, r.tensor.numel, r.tensor.placement] for r in rows]))
assert collect(net, {"default": o})["world_size"] == 4
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    weight, bias = json.loads(done.stdout)
    mesh = {"shape": [2, 2], "names": ["replicate", "shard"], "ranks": [0, 1, 2, 3]}
    assert weight == [
        [8, 6],
        48,
        {
            "kind": "dtensor",
            "placements": [{"type": "replicate"}, {"type": "shard", "dim": 0}],
            "mesh": mesh,
            "coordinate": [0, 1],
            "local_shape": [4, 6],
        },
    ]
    assert bias[2]["placements"] == [{"type": "replicate"}] * 2


# -- the commit


def _git(folder: Path, *arguments: str) -> str:
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    for who in ("AUTHOR", "COMMITTER"):
        env |= {f"GIT_{who}_NAME": "a", f"GIT_{who}_EMAIL": "a@b"}
    return subprocess.run(
        ["git", *arguments], cwd=folder, env=env, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    _git(folder, "init", "-q", "-b", "trunk")
    (folder / "train.py").write_text("pass\n")
    _git(folder, "add", ".")
    _git(folder, "commit", "-q", "-m", "one")
    return folder


def test_commit_branch_and_changes(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "GIT_SECONDS", 30)  # this machine may be busy
    commit = _git(repository, "rev-parse", "HEAD")
    inside = repository / "package"
    inside.mkdir()
    assert provenance.git(inside, {}) == {"commit": commit, "branch": "trunk", "dirty": False}
    (inside / "untracked.py").write_text("")
    assert provenance.git(inside, {})["dirty"] is False
    (repository / "train.py").write_text("changed\n")
    assert provenance.git(inside, {})["dirty"] is True
    _git(repository, "pack-refs", "--all")
    assert provenance.git(inside, {})["commit"] == commit
    _git(repository, "worktree", "add", "-q", "-b", "other", str(repository.parent / "tree"))
    assert provenance.git(repository.parent / "tree", {}) == {"commit": commit, "branch": "other", "dirty": False}
    _git(repository, "checkout", "-q", "--detach")
    assert provenance.git(repository, {})["commit"] == commit


def test_no_repository_and_broken_ones_are_no_failure(tmp_path: Path) -> None:
    none = {"commit": None, "branch": None, "dirty": None}
    commit = "a" * 40
    assert provenance.git(tmp_path, {}) == none
    assert provenance.git(tmp_path, {"GIT_COMMIT": commit})["commit"] == commit
    assert provenance.git(tmp_path, {"GIT_COMMIT": "not one"})["commit"] is None
    (tmp_path / ".git").mkdir()
    for head in (b"", b"\xff\xfe\x00", b"ref: ../../etc/passwd", b"ref: refs/heads/none", b"zz" * 5000):
        (tmp_path / ".git" / "HEAD").write_bytes(head)
        assert provenance.git(tmp_path, {})["commit"] is None


def test_a_git_that_hangs_is_left_behind(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin" / "git"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nexec sleep 60\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    began = time.monotonic()
    told = provenance.git(repository, {})
    assert time.monotonic() - began < 30
    assert told["dirty"] is None
    assert told["commit"] is not None
