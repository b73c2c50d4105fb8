"""An online contextual bandit: one sample, one update, rewards that are sometimes broken.

    python examples/bandit/bandit.py            every experiment, some fifteen minutes on two cores
    python examples/bandit/bandit.py heads      one of them
    python examples/bandit/bandit.py --write    and put tables and plots into docs/examples/bandit.md

A visitor comes, the model chooses one of four offers, the visitor takes it or
not, and the model learns from that at once. Each setting is played with several
seeds; what gradwatch found stands in the last column.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from rich.progress import track
from torch import Tensor, nn

import gradwatch
from gradwatch.detect.replay import replay

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import pages

FEATURES, OFFERS, HIDDEN = 8, 4, 32
#: Updates that are looked at together.
BLOCK = 100
EXPLORE = 0.1
#: What a broken reward says in the place of 0 or 1.
OUTLIER = 50.0


@dataclass(frozen=True)
class Setting:
    """One way to learn."""

    name: str
    #: `sigmoid`: the output is a probability. `linear`: it is whatever the last layer says.
    head: str = "sigmoid"
    rate: float = 0.1
    #: Clip the gradient of the output to [-1, 1] at its source, and the whole gradient's norm to 1.
    clip: bool = True
    #: Share of rewards that are broken.
    outliers: float = 0.0
    #: Angle in radians by which preferences turn with each visitor.
    drift: float = 0.0
    decay: float = 0.0
    #: Fifty updates of warmup, then a cosine to a tenth at the end; else a constant rate.
    schedule: bool = False
    updates: int = 10_000
    seed: int = 0


class World:
    """Visitors and what they like: the chance that one takes an offer is a sigmoid of their features."""

    def __init__(self, setting: Setting) -> None:
        self.generator = torch.Generator().manual_seed(setting.seed)
        self.drift = setting.drift
        self.taste = self.normal(OFFERS, FEATURES)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def chance(self, share: float) -> bool:
        return bool(torch.rand((), generator=self.generator) < share)

    def visitor(self) -> tuple[Tensor, Tensor]:
        """Features of the next visitor, and the chances of the offers."""
        if self.drift:
            self.taste = self.taste * math.cos(self.drift) + self.normal(OFFERS, FEATURES) * math.sin(self.drift)
        features = self.normal(FEATURES)
        return features, torch.sigmoid(self.taste @ features)


@dataclass
class Outcome:
    """What came of one game."""

    setting: Setting
    #: Expected reward of the choices without exploration, as a share of the best possible; a mean for each block.
    optimality: list[float] = field(default_factory=list)
    #: The same of choosing at random.
    random: float = 0.0
    #: Mean squared error of predicted chances for visitors never seen, at the end.
    error: float = math.nan
    largest: float = 0.0
    nonfinite: bool = False
    #: Share of updates in which the clip at the source acted.
    fired: float = 0.0
    found: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def late(self) -> float:
        """Optimality over the last fifth."""
        return statistics.fmean(self.optimality[-max(1, len(self.optimality) // 5) :])

    @property
    def failed(self) -> bool:
        """Diverged or saturated: at the end it chooses hardly better than at random."""
        return self.nonfinite or self.late < self.random + 0.1

    def samples_to(self, share: float) -> float:
        """Updates until ten blocks in a row average ``share`` of the best; infinity where they never do."""
        for end in range(10, len(self.optimality) + 1):
            if statistics.fmean(self.optimality[end - 10 : end]) >= share:
                return float(end * BLOCK)
        return math.inf


def play(setting: Setting, journals: Path | None) -> Outcome:
    """An ordinary online loop, with three lines of gradwatch in it; without ``journals`` it is not watched."""
    torch.set_num_threads(1)
    torch.manual_seed(setting.seed)
    world, outcome = World(setting), Outcome(setting)
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OFFERS))
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=setting.rate)
    squash: Callable[[Tensor], Tensor] = torch.sigmoid if setting.head == "sigmoid" else lambda z: z
    run = None
    if journals is not None:
        run = gradwatch.watch(  # 1
            model, optimizer, model_name="bandit", run_name=setting.name, root=journals,
            max_norm=1.0 if setting.clip else None,
            config={"batch_size": 1, "decay_before_update": setting.decay, "seed": setting.seed},
        )  # fmt: skip
    chosen, best, random, fired = 0.0, 0.0, 0.0, 0
    began = perf_counter()
    for update in range(setting.updates):
        features, chances = world.visitor()
        scores = model(features)
        greedy = int(scores.argmax())
        offer = int(torch.randint(OFFERS, (), generator=world.generator)) if world.chance(EXPLORE) else greedy
        reward = float(world.chance(float(chances[offer])))
        if setting.outliers and world.chance(setting.outliers):
            reward = OUTLIER

        prediction = squash(scores[offer])
        loss = (prediction - reward) ** 2
        optimizer.zero_grad()
        [source] = torch.autograd.grad(loss, scores, retain_graph=True)
        if setting.clip:
            fired += bool(source.abs().max() > 1.0)
            source = source.clamp(-1.0, 1.0)
        scores.backward(source)
        norm = float(nn.utils.clip_grad_norm_(parameters, 1.0 if setting.clip else math.inf))
        if setting.schedule:
            factor = min(1.0, (update + 1) / 50) * (0.1 + 0.45 * (1 + math.cos(math.pi * update / setting.updates)))
            optimizer.param_groups[0]["lr"] = setting.rate * factor
        if setting.decay:
            with torch.no_grad():
                for parameter in parameters:
                    parameter.mul_(1 - optimizer.param_groups[0]["lr"] * setting.decay)
        optimizer.step()
        if run is not None:
            run.log_train(loss=loss, samples=1)  # 2

        outcome.nonfinite |= not math.isfinite(norm)
        outcome.largest = max(outcome.largest, norm if math.isfinite(norm) else math.inf)
        chosen, best, random = (
            chosen + float(chances[greedy]),
            best + float(chances.max()),
            random + float(chances.mean()),
        )
        if (update + 1) % BLOCK == 0:
            outcome.optimality.append(chosen / best)
            outcome.random += random / best * BLOCK / setting.updates
            chosen = best = random = 0.0
    outcome.seconds = perf_counter() - began
    outcome.fired = fired / setting.updates
    with torch.no_grad():
        visitors = [world.visitor() for _ in range(500)]
        predicted = squash(model(torch.stack([features for features, _ in visitors])))
        outcome.error = float((predicted - torch.stack([chances for _, chances in visitors])).square().mean())
    if run is not None:
        run.finish()  # 3
        assert run.directory is not None
        found = replay(run.directory.parents[1])
        outcome.found = sorted({finding.code for finding in found if finding.severity != "info"})
    return outcome


# -- the experiments


def heads(updates: int) -> list[Setting]:
    """Two heads and two rates, with and without broken rewards and clip."""
    return [
        Setting(f"{head}, rate {rate:g}, {what}, {'clipped' if clip else 'unclipped'}", head, rate, clip, outliers,
                updates=updates)
        for head in ("sigmoid", "linear")
        for rate in (0.01, 0.1)
        for what, outliers in (("clean", 0.0), ("1 % broken", 0.01))
        for clip in (False, True)
    ]  # fmt: skip


def schedules(updates: int) -> list[Setting]:
    """Constant against warmup and cosine, at two rates, for tastes that stay and tastes that drift."""
    return [
        Setting(f"rate {rate:g}, {taste}, {'schedule' if schedule else 'constant'}", "sigmoid", rate, drift=drift,
                schedule=schedule, updates=updates)
        for rate in (0.1, 1.0)
        for taste, drift in (("stationary", 0.0), ("drifting", 0.01))
        for schedule in (False, True)
    ]  # fmt: skip


def decay(updates: int) -> list[Setting]:
    """Decay of 1e-4 in front of the update, at a rate of 1e-3 and at one a hundred times larger."""
    return [
        Setting(f"rate {rate:g}, decay {value:g}", "sigmoid", rate, decay=value, updates=updates)
        for rate in (1e-3, 0.1)
        for value in (0.0, 1e-4)
    ]


def published(updates: int) -> list[Setting]:
    """All of it together against none of it, with 1 % of broken rewards, past 10,000 updates."""
    plain = Setting("nothing", "sigmoid", 0.1, False, 0.01, updates=updates * 6 // 5)
    everything = replace(plain, name="both clips, decay, schedule", clip=True, decay=1e-4, schedule=True)
    return [plain, replace(plain, name="both clips", clip=True), everything]


EXPERIMENTS: dict[str, Callable[[int], list[Setting]]] = {
    "heads": heads, "schedules": schedules, "decay": decay, "published": published,
}  # fmt: skip
HEADS = (
    "setting",
    "failed",
    "optimality",
    "error held out",
    "largest norm",
    "clipped at the source",
    "gradwatch found",
)


def interval(values: Sequence[float]) -> str:
    """Mean and the half-width of its 95 % interval, by Student's t."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return "–" if not all(map(math.isfinite, values)) else f"{values[0]:.3f}"
    factor = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}.get(len(values), 2.0)
    return f"{statistics.fmean(values):.3f} ± {factor * statistics.stdev(values) / math.sqrt(len(values)):.3f}"


def row(outcomes: Sequence[Outcome]) -> tuple[object, ...]:
    """One setting, all its seeds."""
    found = Counter(code for outcome in outcomes for code in outcome.found)
    return (
        outcomes[0].setting.name,
        f"{sum(outcome.failed for outcome in outcomes)} of {len(outcomes)}",
        interval([outcome.late for outcome in outcomes]),
        interval([outcome.error for outcome in outcomes]),
        f"{statistics.median(outcome.largest for outcome in outcomes):.2g}",
        f"{statistics.fmean(outcome.fired for outcome in outcomes):.1%}" if outcomes[0].setting.clip else "–",
        ", ".join(f"{code} ({count})" for code, count in found.most_common()) or "–",
    )


def games(settings: Iterable[Setting], seeds: int, journals: Path, what: str) -> dict[str, list[Outcome]]:
    """Play every setting with every seed, on all cores; outcomes by the setting's name."""
    wanted = [replace(setting, seed=seed) for setting in settings for seed in range(seeds)]
    outcomes: dict[str, list[Outcome]] = {}
    with ProcessPoolExecutor() as pool:
        done = pool.map(partial(play, journals=journals), wanted)
        for outcome in track(done, what, total=len(wanted)):
            outcomes.setdefault(outcome.setting.name, []).append(outcome)
    return outcomes


def cost(updates: int, pairs: int) -> str:
    """What watching adds to a game: pairs of games, watched and not, one after the other in this process."""
    setting = Setting("cost", updates=updates)
    shares = []
    with tempfile.TemporaryDirectory(prefix="gradwatch-bandit-") as directory:
        play(replace(setting, updates=200), Path(directory))  # the first run imports what others find there
        for _ in range(pairs):
            bare, watched = play(setting, None).seconds, play(setting, Path(directory)).seconds
            shares.append(watched / bare - 1)
    low, middle, high = statistics.quantiles(shares, n=4)
    speed = updates / bare
    return (
        f"A loop of {speed:,.0f} updates a second takes {middle:+.1%} longer with gradwatch "
        f"(quartiles of {pairs} pairs: {low:+.1%}, {high:+.1%})."
    )


def extra(name: str, outcomes: dict[str, list[Outcome]]) -> str:
    """Samples to 90 % of the best, and whether the last updates are worse than those before."""
    if name != "published":
        return ""
    rows = []
    for setting, played in outcomes.items():
        samples = [outcome.samples_to(0.9) for outcome in played]
        fifth = len(played[0].optimality) // 6
        change = [
            statistics.fmean(o.optimality[-fifth:]) - statistics.fmean(o.optimality[-2 * fifth : -fifth])
            for o in played
        ]
        reached = [count for count in samples if math.isfinite(count)]
        rows.append((
            setting, f"{len(reached)} of {len(played)}",
            f"{statistics.median(reached):,.0f}" if reached else "never", interval(change),
        ))  # fmt: skip
    heads_ = (
        "setting",
        "reach 90 % of the best",
        "updates until then (median)",
        "optimality, last sixth against the one before",
    )
    return "\n\n" + pages.table(heads_, rows)


def plot(name: str, outcomes: dict[str, list[Outcome]]) -> str:
    """Optimality over updates, a band from the worst seed to the best; the Markdown that shows it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "gradwatch"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 3.6))
    shown = {k: v for k, v in outcomes.items() if name != "heads" or "rate 0.1, 1 %" in k}
    for index, (setting, played) in enumerate(shown.items()):
        smooth = [
            [statistics.fmean(o.optimality[max(0, i - 4) : i + 1]) for i in range(len(o.optimality))] for o in played
        ]
        updates = [BLOCK * (i + 1) for i in range(len(smooth[0]))]
        columns = list(zip(*smooth, strict=True))
        axes.plot(updates, [statistics.median(c) for c in columns], color=f"C{index}", label=setting)
        axes.fill_between(updates, [min(c) for c in columns], [max(c) for c in columns], color=f"C{index}", alpha=0.15)
    axes.set(xlabel="update", ylabel="share of the best reward", ylim=(0.5, 1.0))
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path = pages.DOCS / "bandit" / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return f"![Share of the best reward, median and range of the seeds](bandit/{name}.svg)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*EXPERIMENTS, "cost"]
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"of: {', '.join(known)}; by default all")
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--journals", type=Path, help="keep the journals there; by default they go")
    parser.add_argument("--write", action="store_true", help="into docs/examples/bandit.md")
    chosen = parser.parse_args()
    wrong = set(chosen.experiments) - set(known)
    if wrong:
        parser.error(f"no experiment {', '.join(sorted(wrong))}; there are {', '.join(known)}")
    parts = {"machine": f"Measured {pages.measured_on()}, {chosen.seeds} seeds of {chosen.updates:,} updates."}
    with tempfile.TemporaryDirectory(prefix="gradwatch-bandit-") as directory:
        for name in chosen.experiments or known:
            if name == "cost":
                parts[name] = cost(chosen.updates // 4, 12)
                print(parts[name])
                continue
            outcomes = games(EXPERIMENTS[name](chosen.updates), chosen.seeds, chosen.journals or Path(directory), name)
            parts[name] = pages.table(HEADS, [row(played) for played in outcomes.values()]) + extra(name, outcomes)
            print(parts[name], flush=True)
            if chosen.write:
                parts[name] += "\n\n" + plot(name, outcomes)
    if chosen.write:
        pages.write("bandit", parts)


if __name__ == "__main__":
    main()
