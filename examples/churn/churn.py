"""An incident: a churn model whose mask forgets the users with very long histories.

    python examples/churn/churn.py               three arms, reduced size, some four minutes
    python examples/churn/churn.py sgd           one of them
    python examples/churn/churn.py --published   180 days and 256 units in place of 60 and 64; hours
    python examples/churn/churn.py --write       and put tables and plots into docs/examples/churn.md

A two-layer LSTM reads a user's events day by day and says each day whether the
user is about to leave. Batches are padded to their longest history, labels of
padding hold -100, and a mask hides them; but the mask is made for histories of a
fixed width. Three users in five thousand have longer ones. In their batches
everything beyond the width counts, for everybody.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

import gradwatch
from gradwatch.detect.replay import replay

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pages

EVENTS, BATCH, HELD_OUT, LONG = 24, 64, 800, 3
#: What a label of padding holds.
PADDING = -100.0


@dataclass(frozen=True)
class Size:
    """How large the incident is."""

    days: int = 60
    hidden: int = 64
    users: int = 5_000
    epochs: int = 5
    #: Of AdamW.
    rate: float = 1e-3


PUBLISHED = Size(days=180, hidden=256, rate=3e-4)


@dataclass
class Users:
    """Event histories, and for each day whether the user is about to leave."""

    events: list[np.ndarray]
    leaving: list[np.ndarray]

    @classmethod
    def make(cls, count: int, shortest: int, longest: int, seed: int) -> Users:
        """Users whose engagement walks at random, for some of them downwards; events tell of it, with noise."""
        random = np.random.default_rng(seed)
        made = cls([], [])
        for days in random.integers(shortest, longest + 1, count):
            trend = random.choice([0.0, -0.05, 0.02], p=[0.60, 0.25, 0.15])
            engagement = random.normal() * 0.7 + np.cumsum(random.normal(trend, 0.15, days + 7))
            week = np.convolve(engagement, np.ones(7) / 7, "valid")[:days]
            noisy = np.round((engagement[:days] + 3) * 3 + random.normal(0, 2.0, days))
            made.events.append(np.clip(noisy, 1, EVENTS - 1).astype(np.int64))
            made.leaving.append((week < -0.5).astype(np.float32))
        return made

    def batch(self, chosen: Sequence[int], width: int, broken: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Events, labels and mask, padded to the longest history; ``broken``: the mask is made for ``width`` days."""
        longest = max(len(self.events[i]) for i in chosen)
        events = torch.zeros(len(chosen), longest, dtype=torch.long)
        labels = torch.full((len(chosen), longest), PADDING)
        mask = torch.ones(len(chosen), longest)
        for row, user in enumerate(chosen):
            days = len(self.events[user])
            events[row, :days] = torch.from_numpy(self.events[user])
            labels[row, :days] = torch.from_numpy(self.leaving[user])
            mask[row, days : width if broken else longest] = 0.0
        return events, labels, mask


class Churn(nn.Module):
    """Embedding, two layers of LSTM, a logit a day; ``summed``: the logit of a day is the sum of all up to it."""

    def __init__(self, hidden: int, summed: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(EVENTS, 16)
        self.lstm = nn.LSTM(16, hidden, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(hidden, 1)
        self.summed = summed

    def forward(self, events: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.embedding(events))[0]).squeeze(-1)
        return logits.cumsum(1) if self.summed else logits


def loss_of(logits: Tensor, labels: Tensor, mask: Tensor, width: int, by_hand: bool) -> Tensor:
    """Cross entropy, summed and divided by a fixed length; by hand it takes the log of a rounded probability."""
    if by_hand:
        p = torch.sigmoid(logits)
        each = -(labels * torch.log(p) + (1 - labels) * torch.log(1 - p))
    else:
        each = nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return (each * mask).sum() / (BATCH * width)


@dataclass(frozen=True)
class Setting:
    """One training."""

    name: str
    arm: str
    clip: float = math.inf
    broken: bool = True


def arm(name: str) -> list[Setting]:
    """An arm's four trainings: with the bug and without, unclipped and clipped."""
    return [
        Setting(f"{'mask broken' if broken else 'mask right'}, {f'clip {clip:g}' if clip < math.inf else 'no clip'}",
                name, clip, broken)
        for broken in (True, False)
        for clip in (math.inf, 1.0)
    ]  # fmt: skip


ARMS = {
    "sgd": "SGD with momentum, cross entropy by hand",
    "adamw": "AdamW, torch's cross entropy",
    "log": "AdamW, summed logits, cross entropy by hand",
}


@dataclass
class Outcome:
    """What came of one training."""

    setting: Setting
    norms: list[float] = field(default_factory=list)
    #: Share of batches that hold a long history.
    affected: float = 0.0
    area: float = math.nan
    #: Epoch, counted from 1, of the first gradient that is not finite.
    broke: int | None = None
    found: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def row(self) -> tuple[object, ...]:
        norms = np.array([norm for norm in self.norms if math.isfinite(norm)])
        clipped = np.mean(np.array(self.norms) > self.setting.clip)
        return (
            self.setting.name,
            f"{np.median(norms):.2g}",
            f"{np.quantile(norms, 0.99):.3g}",
            f"{clipped:.1%}" if self.setting.clip < math.inf else "–",
            f"epoch {self.broke}" if self.broke else "never",
            "–" if math.isnan(self.area) else f"{self.area:.3f}",
            ", ".join(self.found) or "–",
        )


HEADS = ("training", "median norm", "p99", "clipped", "NaN", "AUC held out", "gradwatch found")


def area_under_curve(scores: np.ndarray, labels: np.ndarray) -> float:
    ranks = np.empty(len(scores))
    ranks[np.argsort(scores)] = np.arange(1, len(scores) + 1)
    positive = labels > 0
    pairs = positive.sum() * (~positive).sum()
    return float((ranks[positive].sum() - positive.sum() * (positive.sum() + 1) / 2) / pairs)


def train(setting: Setting, size: Size, journals: Path, progress: Progress | None = None, seed: int = 0) -> Outcome:
    """An ordinary loop, with four lines of gradwatch in it."""
    torch.manual_seed(seed)
    users = Users.make(HELD_OUT + size.users - LONG, size.days // 3, size.days, seed=1)
    long = Users.make(LONG, 2 * size.days, 2 * size.days, seed=2)
    users.events += long.events
    users.leaving += long.leaving
    model = Churn(size.hidden, summed=setting.arm == "log")
    if setting.arm == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, weight_decay=0.0)
    by_hand = setting.arm != "adamw"
    outcome = Outcome(setting)
    held_out = users.batch(range(HELD_OUT), size.days, False)
    run = gradwatch.watch(  # 1
        model, optimizer, model_name="churn", run_name=f"{setting.arm}, {setting.name}", root=journals,
        max_norm=setting.clip if setting.clip < math.inf else None, config={"batch_size": BATCH, "seed": seed},
    )  # fmt: skip
    order = torch.Generator().manual_seed(seed)
    batches = size.users // BATCH
    task = (
        None if progress is None else progress.add_task(f"{setting.arm}, {setting.name}", total=size.epochs * batches)
    )
    began = perf_counter()
    for epoch in range(1, size.epochs + 1):
        model.train()
        shuffled = (torch.randperm(size.users, generator=order) + HELD_OUT).tolist()
        for first in range(0, batches * BATCH, BATCH):
            events, labels, mask = users.batch(shuffled[first : first + BATCH], size.days, setting.broken)
            loss = loss_of(model(events), labels, mask, size.days, by_hand)
            optimizer.zero_grad()
            loss.backward()
            norm = float(nn.utils.clip_grad_norm_(model.parameters(), setting.clip))
            optimizer.step()
            run.log_train(loss=loss, samples=BATCH)  # 2
            outcome.norms.append(norm)
            outcome.affected += (events.shape[1] > size.days) / (size.epochs * batches)
            if not math.isfinite(norm) and outcome.broke is None:
                outcome.broke = epoch
            if progress is not None and task is not None:
                progress.advance(task)
        model.eval()
        with torch.no_grad():
            logits = model(held_out[0])
            real = held_out[2] > 0
            scores, truth = logits[real].numpy(), held_out[1][real].numpy()
            outcome.area = area_under_curve(scores, truth) if np.isfinite(scores).all() else math.nan
            entropy = float(loss_of(logits, held_out[1], held_out[2], size.days, False)) * BATCH / HELD_OUT
        run.log_validation(loss=entropy, auc=outcome.area if math.isfinite(outcome.area) else 0.0)  # 3
    run.finish()  # 4
    outcome.seconds = perf_counter() - began
    assert run.directory is not None
    found = replay(run.directory.parents[1])
    outcome.found = sorted({finding.code for finding in found if finding.severity != "info"})
    return outcome


def threshold(outcomes: Sequence[Outcome]) -> str:
    """What a clip threshold from the steps before the incident would have been."""
    clean = next(outcome for outcome in outcomes if not outcome.setting.broken and outcome.setting.clip == math.inf)
    if clean.broke:
        return "No threshold can be taken from this arm: it breaks without the bug too."
    settled = np.array(clean.norms[len(clean.norms) // 10 :])
    highest = np.quantile(settled, 0.99)
    return (
        f"The 99th percentile of the norms with the right mask, the first tenth left out, is {highest:.2g}; "
        f"{outcomes[0].affected:.1%} of the batches hold a long history."
    )


def plot(name: str, outcomes: Sequence[Outcome]) -> str:
    """The norm of every step as an SVG beside the page; the Markdown that shows it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "gradwatch"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 3.2))
    for index, outcome in enumerate(outcomes):
        if outcome.setting.broken or outcome.setting.clip == math.inf:
            axes.plot(outcome.norms, color=f"C{index}", linewidth=0.8, label=outcome.setting.name)
    axes.set(xlabel="step", ylabel="gradient norm, pre-clip", yscale="log")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path = pages.DOCS / "churn" / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return f"![Gradient norm of every step](churn/{name}.svg)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of: {', '.join(ARMS)}; by default all")
    parser.add_argument(
        "--published", action="store_true", help="the published size; AdamW's arm unless you name others"
    )
    parser.add_argument("--epochs", type=int, help="in the place of five")
    parser.add_argument("--journals", type=Path, help="keep the journals there; by default they go")
    parser.add_argument("--write", action="store_true", help="into docs/examples/churn.md")
    chosen = parser.parse_args()
    wrong = set(chosen.arms) - set(ARMS)
    if wrong:
        parser.error(f"no arm {', '.join(sorted(wrong))}; there are {', '.join(ARMS)}")
    torch.set_num_threads(1)
    size = PUBLISHED if chosen.published else Size()
    if chosen.epochs:
        size = Size(size.days, size.hidden, size.users, chosen.epochs, size.rate)
    suffix = "-published" if chosen.published else ""
    parts = {f"machine{suffix}": f"Measured {pages.measured_on()}."}
    with tempfile.TemporaryDirectory(prefix="gradwatch-churn-") as directory:
        for name in chosen.arms or (["adamw"] if chosen.published else ARMS):
            settings = arm(name)[:2] if chosen.published else arm(name)
            with Progress() as progress:
                outcomes = [train(each, size, chosen.journals or Path(directory), progress) for each in settings]
            told = pages.table(HEADS, [outcome.row() for outcome in outcomes])
            if not chosen.published:
                told += "\n\n" + threshold(outcomes)
            print(f"\n{ARMS[name]}\n{told}", flush=True)
            parts[name + suffix] = told + ("\n\n" + plot(name + suffix, outcomes) if chosen.write else "")
    if chosen.write:
        pages.write("churn", parts)


if __name__ == "__main__":
    main()
