"""The exposition: to the byte, complete against the catalogue, and refusing what is not in it."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from gradwatch.catalog import BY_NAME, FINDINGS, METRICS, RUN_STATES
from gradwatch.collect.run import RunTail
from gradwatch.detect.ledger import Ledger
from gradwatch.journal.manifest import Optimizer, Tensor
from gradwatch.sinks.prometheus import Exposition, Page, SinkCounts, Snapshot
from gradwatch.testing import FakeClock, JournalBuilder
from tests.journals import follow, read_on
from tests.services import program

GOLDEN = Path(__file__).with_name("exposition.txt")


def full_run(root: Path) -> tuple[RunTail, Ledger, list[JournalBuilder]]:
    """A small run with something of everything."""
    clock = FakeClock(1_700_000_000.0)
    groups = ({"name": "decayed", "lr": 0.5}, {"name": "", "lr": 0.5})
    tensors = [
        Tensor("encoder.weight", (4, 2), "float32", 8, 0, 0, "encoder"),
        Tensor("head.weight", (2, 2), "float32", 4, 0, 1, "head"),
    ]
    builders = [
        JournalBuilder(
            root,
            run="run-7",
            model="churn-lstm",
            run_name="quiet-heron",
            tier="production",
            rank=rank,
            world_size=2,
            host="node-1",
            gradwatch="0.1.0",
            optimizers=(Optimizer("default", "SGD", True, groups),),
            tensors=tensors,
            hyperparameters={"config.batch_size": 64, "git.commit": "abc123", "group.default.0.betas": 0.9},
            mlflow={"run_id": "m1", "tracking_uri": "http://mlflow"},
            clock=clock,
            seconds_a_step=0.0,
        )
        for rank in range(2)
    ]
    for i in range(4):
        for builder in builders:
            builder.step(
                loss=1.0 / 2**i,
                grad_norm=[0.5, 2.0, 1.0, 4.0][i],
                clip_threshold=1.0,
                lr=[0.5, 0.25],
                weight_decay=[0.125, 0.0],
                samples=64,
                duration=0.25,
                probe_seconds=0.0009765625,
                loss_scale=1024.0,
                tensors=[0.375, 0.5],
            )
    builders[0].sample([3.0, 4.0], [0.75, 1.0])
    builders[0].validation(loss=0.75, auc=0.5, train={"loss": 0.5, "auc": 1.0})
    builders[0].validation(loss=1.0, slice='tenant "7"\n')
    builders[0].event("slo", slo="latency", good=9, bad=1)
    builders[0].event("finding", code="clip-missing", severity="ticket", message="no clip", first_step=0)
    run = follow(root, "run-7", clock)
    ledger = Ledger()
    for seen in read_on(run, clock):
        ledger.observe(seen)
    return run, ledger, builders


def expose(run: RunTail, ledger: Ledger) -> str:
    exposition = Exposition(lambda: Snapshot([(run, ledger)], [SinkCounts("mlflow", 1, 2, 3)]))
    return exposition.render()[0].decode()


def test_to_the_byte(tmp_path: Path) -> None:
    """After a wanted change, look at the difference and write the file anew with what is asserted here."""
    run, ledger, _ = full_run(tmp_path)
    text = expose(run, ledger)
    wanted = GOLDEN.read_text() if GOLDEN.exists() else ""
    if text != wanted:
        (tmp_path / "exposition.txt").write_text(text)
    assert text == wanted, f"written to {tmp_path / 'exposition.txt'}"


def test_every_metric_of_a_run_a_rank_and_the_agent_is_there(tmp_path: Path) -> None:
    run, ledger, _ = full_run(tmp_path)
    names = {
        sample.name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum")
        for family in text_string_to_metric_families(expose(run, ledger))
        for sample in family.samples
    }
    # The two ranks of this run hold whole gradients; see tests/recipes/test_distributed.py for shards.
    assert names == {m.exposed for m in METRICS if m.scope != "bridge"} - {"gradwatch_rank_grad_norm_squares"}


def test_labels_are_those_of_the_catalogue(tmp_path: Path) -> None:
    run, ledger, _ = full_run(tmp_path)
    by_exposed = {m.exposed: m for m in METRICS}
    for family in text_string_to_metric_families(expose(run, ledger)):
        for sample in family.samples:
            name = sample.name
            metric = by_exposed.get(name) or by_exposed[name.rpartition("_")[0]]
            assert set(sample.labels) - {"le"} == set(metric.all_labels), name


def test_promtool_has_nothing_to_say(tmp_path: Path) -> None:
    run, ledger, _ = full_run(tmp_path)
    done = subprocess.run(
        [program("promtool"), "check", "metrics"], input=expose(run, ledger), capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_openmetrics_where_it_is_asked_for(tmp_path: Path) -> None:
    run, ledger, _ = full_run(tmp_path)
    exposition = Exposition(lambda: Snapshot([(run, ledger)]))
    text, kind = exposition.render("application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")
    families = {family.name: family for family in parse_openmetrics(text.decode())}
    assert families["gradwatch_steps"].type == "counter"
    assert families["gradwatch_run"].type == "info"
    plain, kind = exposition.render("text/plain")
    assert kind.startswith("text/plain")
    assert b"# EOF" not in plain


def test_what_the_catalogue_does_not_have_is_refused() -> None:
    page = Page()
    with pytest.raises(KeyError, match="not in the catalogue"):
        page.put("gpu_temperature", ["m", "r"], 1.0)
    with pytest.raises(ValueError, match="labels"):
        page.put("steps", ["m", "r"], 1.0)


def test_closed_sets_begin_at_zero(tmp_path: Path) -> None:
    with JournalBuilder(tmp_path, optimizers=("a", "b")) as journal:
        journal.event("metadata", values={})
        run = follow(tmp_path)
        read_on(run)
        text = expose(run, Ledger())
    base = 'model="model"'
    for state in RUN_STATES:
        value = 1.0 if state == "starting" else 0.0
        assert f'gradwatch_run_state{{{base},run="run-1",state="{state}"}} {value}' in text
    for known in FINDINGS:
        labels = f'code="{known.code}",{base},run="run-1",severity="{known.severity}"'
        assert f"gradwatch_findings_total{{{labels}}} 0.0" in text
        assert f"gradwatch_finding_active{{{labels}}} 0.0" in text
    for optimizer in ("a", "b"):
        for name in ("steps", "clipped_steps", "nonfinite_steps", "skipped_steps", "replayed_steps"):
            assert f'{BY_NAME[name].exposed}{{{base},optimizer="{optimizer}",run="run-1"}} 0.0' in text
    assert f'gradwatch_validations_total{{{base},run="run-1"}} 0.0' in text
    assert "gradwatch_grad_norm{" not in text
    assert "gradwatch_step{" not in text


def test_a_rank_beyond_the_first_adds_few_series(tmp_path: Path) -> None:
    run, ledger, _ = full_run(tmp_path)
    lines = [line for line in expose(run, ledger).splitlines() if 'rank="1"' in line]
    assert 5 <= len(lines) <= 25


def test_a_broken_gradient_is_shown_as_it_is_and_an_unknown_one_not_at_all(tmp_path: Path) -> None:
    with JournalBuilder(tmp_path) as journal:
        journal.step(grad_norm=math.inf)
        run = follow(tmp_path)
    read_on(run)
    assert 'gradwatch_grad_norm{model="model",optimizer="default",run="run-1"} +Inf' in expose(run, Ledger())


def test_names_that_become_one_label_are_one_series(tmp_path: Path) -> None:
    long = "x" * 150
    with JournalBuilder(tmp_path, hyperparameters={f"{long}a": 1, f"{long}b": 2}) as journal:
        journal.step()
    run = follow(tmp_path)
    read_on(run)
    lines = [line for line in expose(run, Ledger()).splitlines() if line.startswith("gradwatch_hyperparameter{")]
    assert len(lines) == 1


def test_effective_rates_only_where_the_step_is_linear(tmp_path: Path) -> None:
    run, ledger, _ = full_run(tmp_path)
    labels = 'group="decayed",model="churn-lstm",optimizer="default",run="run-7"'
    coefficient = 1.0 / (4.0 + 1e-6)
    text = expose(run, ledger)
    [line] = [x for x in text.splitlines() if x.startswith(f"gradwatch_effective_learning_rate{{{labels}}}")]
    assert float(line.rpartition(" ")[2]) == pytest.approx(0.5 * coefficient, rel=1e-9)
    with JournalBuilder(tmp_path / "b", optimizers=(Optimizer("default", "AdamW", False, ({"lr": 1},)),)) as journal:
        journal.step()
    other = follow(tmp_path / "b")
    read_on(other)
    assert "effective_learning_rate" not in expose(other, Ledger())
