# ruff: noqa: E501  (a table reads better with one row a line)
"""What every recording rule must say: one sentence, the series, and the samples that come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.ops.alert_support.world import Series, heartbeat, run, series, slo, versions

#: Samples by the labels that the case looks at.
Samples = Mapping[tuple[tuple[str, str], ...], float]


@dataclass(frozen=True)
class Recorded:
    record: str
    sentence: str
    world: Sequence[Series]
    samples: Samples
    at: str = "10m"


def of(value: float, **labels: str) -> Samples:
    return {tuple(sorted(labels.items())): value}


RUN = {"namespace": "ml", "model": "lstm", "run": "r1"}
MODEL = {"namespace": "ml", "model": "lstm", "slo": "freshness"}
LOSS, OPTIMIZER = {"metric": "loss"}, {"optimizer": "adamw"}
TWO_PODS = run() + run(pod="b")
TWO_NAMES = run(name="one") + run(pod="b", name="one", tier="production")
SCORES = versions({"accuracy": 0.8, "val_loss": 0.6}, {"accuracy": 1.0, "val_loss": 0.5})
ACCURACY, VALIDATION_LOSS = {"model": "lstm", "name": "accuracy"}, {"model": "lstm", "name": "val_loss"}
EVENTS = slo("0+9x300", "0+1x300")

RECORDED = [
    Recorded(
        "run:gradwatch_facts:one", "one a run, whichever pods tell it", TWO_PODS,
        of(1, **RUN, run_name="swift-fox", team="vision", tier="experiment"),
    ),
    Recorded("run:gradwatch_place:one", "where a run was seen last, also when it is gone",
             run(minutes=10, lasts="stale") + heartbeat("0+60x60"), of(1, **RUN, team="vision"), "40m"),
    Recorded("run:gradwatch_place:one", "nowhere, for a run that only MLflow knows", heartbeat("0+60x60"),
             of(1, model="lstm", run="r1")),
    Recorded("run:gradwatch_running:max", "1 while it runs", run(), of(1, **RUN)),
    Recorded("run:gradwatch_running:max", "0 once it ended", run(state="failed"), of(0, **RUN)),
    Recorded("run:gradwatch_production:max", "0 for an experiment", run(), of(0, **RUN)),
    Recorded("run:gradwatch_production:max", "1 where one pod says production", TWO_NAMES, of(1, **RUN)),
    Recorded("run:gradwatch_clip_rate_budget:max", "the run's own", run(clip_rate_budget=0.3), of(0.3, **RUN)),
    Recorded("run:gradwatch_clip_rate_budget:max", "the default", run(clip_rate_budget=""), of(0.1, **RUN)),
    Recorded("run:gradwatch_clip_rate:max", "clipped by all", run(recent_clipped_steps=250), of(0.25, **RUN, **OPTIMIZER)),
    Recorded("run:gradwatch_clip_rate:max", "nothing below 200 steps", run(recent_steps=199), {}),
    Recorded("run:gradwatch_clip_rate:max", "something from 200 steps", run(recent_steps=200), of(0, **RUN, **OPTIMIZER)),
    Recorded("run:gradwatch_generalization_gap:max", "the gap", run(generalization_gap=0.2), of(0.2, **RUN, **LOSS)),
    Recorded("run:gradwatch_generalization_gap_budget:max", "the run's own", run(generalization_gap_budget=0.3),
             of(0.3, **RUN, **LOSS)),
    Recorded("run:gradwatch_generalization_gap_budget:max", "the default",
             run(generalization_gap=0.2, generalization_gap_budget=""), of(0.1, **RUN, **LOSS)),
    Recorded("run:gradwatch_train_loss:max", "the training's", run(loss=2.5), of(2.5, **RUN)),
    Recorded("run:gradwatch_train_loss:min1d", "its best", run(loss="3x3 1x3 2x30"), of(1, **RUN)),
    Recorded("run:gradwatch_train_loss:max1d", "its worst", run(loss="3x3 1x3 2x30"), of(3, **RUN)),
    Recorded("model:gradwatch_production:max", "0 without a production alias", SCORES, of(0, model="lstm")),
    Recorded("model:gradwatch_production:max", "1 with one", versions({}, {}, alias="prod"), of(1, model="lstm")),
    Recorded("model:gradwatch_score_drop_budget:max", "the default for each score", SCORES,
             {**of(0.02, **ACCURACY), **of(0.02, **VALIDATION_LOSS)}),
    Recorded("model:gradwatch_score_drop_budget:max", "the model's own",
             [series("score_drop_budget", 0.2, **ACCURACY)], of(0.2, **ACCURACY)),
    Recorded("model:gradwatch_score_previous:max", "what the version before had", SCORES,
             {**of(1.0, **ACCURACY), **of(0.5, **VALIDATION_LOSS)}),
    Recorded("model:gradwatch_score_current:max", "what the current version has", SCORES,
             {**of(0.8, **ACCURACY), **of(0.6, **VALIDATION_LOSS)}),
    # (1.0 - 0.8) / 1.0 for a score, (0.6 - 0.5) / 0.5 for a loss: positive is worse.
    Recorded("model:gradwatch_score_drop:ratio", "positive where it is worse, whichever way is better", SCORES,
             {**of(0.2, **ACCURACY), **of(0.2, **VALIDATION_LOSS)}),
    *(Recorded(f"model:gradwatch_slo_bad:ratio_rate{span}", "the share of bad events", EVENTS, of(0.1, **MODEL), "60m")
      for span in ("5m", "30m", "1h", "2h", "6h", "1d", "3d")),
    # 10 events a minute; over a window that reaches back before the beginning, increase() guesses half a minute more.
    Recorded("model:gradwatch_slo_events:increase5m", "events of the window", EVENTS, of(50, **MODEL), "60m"),
    Recorded("model:gradwatch_slo_events:increase30m", "events of the window", EVENTS, of(300, **MODEL), "60m"),
    Recorded("model:gradwatch_slo_events:increase2h", "events of the window", EVENTS, of(1200, **MODEL), "150m"),
    Recorded("model:gradwatch_slo_events:increase6h", "events of the window",
             slo("0+9x400", "0+1x400", minutes=400), of(3600, **MODEL), "380m"),
    Recorded("model:gradwatch_slo_bad:count3d", "bad events, also those of before the first scrape",
             slo("3x20", "2x20"), of(2, **MODEL)),
    Recorded("model:gradwatch_slo_events:count3d", "all events over all runs",
             slo("3x20", "2x20") + slo("4x20", "0x20", run="r2"), of(9, **MODEL)),
]  # fmt: skip
