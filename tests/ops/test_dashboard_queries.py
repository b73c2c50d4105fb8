"""Every query of every dashboard, variables substituted, on a real Prometheus full of history.

The history is generated from the catalogue and made into blocks by promtool:
a live run of four ranks in a namespace that was restarted once, an ended run
of another decay, and, in a second Prometheus, a run on a laptop without
namespace. That a query is fast enough is for ``benchmarks/dashboards.py``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ops.dashboard_support.history import History, PastRun, blocks
from tests.ops.dashboard_support.panels import ROOT, Target, load, request, substituted, targets
from tests.services import Prometheus, program

pytestmark = [pytest.mark.services, pytest.mark.xdist_group("queries")]

EVERY, HOUR = 60.0, 3600.0
END = time.time() // EVERY * EVERY
START = END - 4 * HOUR
LIVE = PastRun("churn", "5f2a91c07e", "nightly-42", START, END, ranks=4, restart=END - HOUR)
FINISHED = PastRun(
    "churn", "1b7e0c3d55", "nightly-41", START, END - 2 * HOUR, state="finished", ranks=2, weight_decay=0.1
)
LAPTOP = PastRun("toy", "aa11bb22cc", "try-1", START, END, namespace=None)

#: What has no data though all is well: nothing may be wrong in it, and it must be listed here.
OF_LIVE_ONLY = {"oncall:Which runs need me:D"}
#: Points at most, so that an annotation marks a moment.
MOMENT = 2


def _served(directory: Path, *runs: PastRun) -> Iterator[Prometheus]:
    models = sorted({run.model for run in runs})
    directory.mkdir()
    blocks(History(runs, START, END, EVERY, models), directory, program("promtool"))
    with Prometheus(directory, []) as server:
        yield server


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    yield from _served(tmp_path_factory.mktemp("prometheus") / "cluster", LIVE, FINISHED)


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    yield from _served(tmp_path_factory.mktemp("prometheus") / "laptop", LAPTOP)


def answer(server: Prometheus, target: Target, start: float = START, end: float = END, **chosen: str) -> list[Any]:
    path, parameters = request(target, start, end, EVERY, **chosen)
    told = server.get_json(path, **parameters)
    assert told is not None, f"Prometheus refused {parameters['query']}"
    assert told.get("warnings", []) == []
    return list(told["data"]["result"])


def numbers(series: dict[str, Any]) -> list[float]:
    return [float(value) for _, value in (series.get("values") or [series["value"]])]


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.id)
def test_a_live_run_gives_data(cluster: Prometheus, target: Target) -> None:
    series = answer(cluster, target, run=LIVE.run)
    assert series
    assert any(value == value for each in series for value in numbers(each)), "nothing but NaN"


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.id)
def test_all_runs_together_give_data(cluster: Prometheus, target: Target) -> None:
    assert answer(cluster, target)


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.id)
def test_a_laptop_without_namespace_gives_data(laptop: Prometheus, target: Target) -> None:
    restarts = target.panel == "Restarts"
    assert bool(answer(laptop, target, run=LAPTOP.run)) is not restarts


def _of_runs(target: Target) -> bool:
    """Graphs and range-wide tables of the chosen run: what an ended run must still fill."""
    return 'run=~"$run"' in target.expression and not (target.kind == "annotation" or target.id in OF_LIVE_ONLY)


@pytest.mark.parametrize("target", [each for each in targets() if _of_runs(each)], ids=lambda target: target.id)
def test_a_finished_run_gives_data(cluster: Prometheus, target: Target) -> None:
    """Two hours after its end: graphs over the range, and tables that reach back into it."""
    now_only = target.instant and "[$__r" not in target.expression
    series = answer(cluster, target, run=FINISHED.run)
    assert bool(series) is not now_only


# -- what single queries say


def _target(name: str) -> Target:
    return next(each for each in targets() if each.id == name)


def one(server: Prometheus, name: str, **chosen: str) -> list[tuple[dict[str, str], list[float]]]:
    found = answer(server, _target(name), START, END, **chosen)
    return [(each["metric"], numbers(each)) for each in found]


def test_the_table_shows_ended_runs_with_their_last_state_and_no_step_age(cluster: Prometheus) -> None:
    states = {labels["run"]: labels["state"] for labels, _ in one(cluster, "oncall:Which runs need me:B")}
    assert states == {LIVE.run: "running", FINISHED.run: "finished"}
    facts = {labels["run"]: labels for labels, _ in one(cluster, "oncall:Which runs need me:A")}
    assert (facts[LIVE.run]["run_name"], facts[LIVE.run]["tier"]) == ("nightly-42", "production")
    assert facts[LIVE.run]["team"] == "ranking"
    ages = {labels["run"]: values for labels, values in one(cluster, "oncall:Which runs need me:D")}
    assert ages == {LIVE.run: [0.0]}


def test_a_run_that_vanished_keeps_its_state_and_its_age_grows(cluster: Prometheus) -> None:
    """A node that dies says nothing: its run stands at running, with an old last step."""
    at = END + 2 * HOUR
    states = answer(cluster, _target("oncall:Which runs need me:B"), START, at)
    assert {each["metric"]["run"]: each["metric"]["state"] for each in states}[LIVE.run] == "running"
    ages = answer(cluster, _target("oncall:Which runs need me:D"), START, at)
    assert {each["metric"]["run"]: float(each["value"][1]) for each in ages}[LIVE.run] == 2 * HOUR


def test_ranks_make_one_line_a_run(cluster: Prometheus) -> None:
    lines = one(cluster, "oncall:Pre-clip gradient norm and threshold:A", run=LIVE.run)
    assert len(lines) == 1
    assert lines[0][0]["run_name"] == "nightly-42"
    assert lines[0][0]["mlflow_run_id"] == f"ml{LIVE.run}"


def test_ranks_stand_side_by_side(cluster: Prometheus) -> None:
    lines = one(cluster, "debug:Step time by rank:A", run=LIVE.run)
    assert sorted(labels["rank"] for labels, _ in lines) == ["0", "1", "2", "3"]
    chosen = one(cluster, "debug:Step time by rank:A", run=LIVE.run, rank="2")
    assert [labels["rank"] for labels, _ in chosen] == ["2"]


def test_two_runs_are_compared_with_their_decay(cluster: Prometheus) -> None:
    both = f"({LIVE.run}|{FINISHED.run})"
    table = one(cluster, "debug:Hyperparameters of the chosen runs, side by side:A", run=both)
    decay = {
        labels["title"]: values[0] for labels, values in table if labels["hyperparameter"].startswith("weight_decay")
    }
    assert decay == {"nightly-42 · 5f2a91c0": 0.01, "nightly-41 · 1b7e0c3d": 0.1}


def test_the_same_five_layers_stay_on_top_over_the_whole_graph(cluster: Prometheus) -> None:
    lines = one(cluster, "debug:Top 5 layers: gradient norm:A", run=LIVE.run)
    assert len(lines) == 5
    assert len({len(values) for _, values in lines}) == 1


def test_a_restart_is_one_mark_at_its_time(cluster: Prometheus) -> None:
    marks = answer(cluster, _target("debug:Restarts:A"), run=LIVE.run)
    assert len(marks) == 1
    times = [float(when) for when, _ in marks[0]["values"]]
    assert len(times) <= MOMENT
    assert abs(times[0] - LIVE.restart) <= 2 * EVERY


def test_a_chosen_run_keeps_alerts_about_its_model(cluster: Prometheus) -> None:
    alerts = one(cluster, "oncall:Alerts:A", run=LIVE.run)
    assert [labels["alertname"] for labels, _ in alerts] == ["GradwatchClipRateHigh"]
    assert one(cluster, "oncall:Alerts:A", run=FINISHED.run) == []


def test_goodput_and_budget_are_what_the_history_says(cluster: Prometheus) -> None:
    """Always progressing, 0.1 % of steps replayed; 0.1 % of events bad against a budget of 1 %."""
    (_, (goodput,)) = one(cluster, "fleet:Goodput:A")[0]
    assert goodput == pytest.approx(1 / 1.001, rel=1e-3)
    (_, (left,)) = one(cluster, "fleet:Least error budget left:A")[0]
    assert left == pytest.approx(1 - (0.001 / 1.001) / 0.01, rel=1e-2)


def test_no_rules_is_no_data_and_rules_without_alerts_are_zero(cluster: Prometheus, tmp_path: Path) -> None:
    target = _target("oncall:Firing alerts:A")
    assert [numbers(each) for each in answer(cluster, target, model="churn")] == [[1.0]]
    assert [numbers(each) for each in answer(cluster, target, model="another")] == [[0.0]]
    with Prometheus(tmp_path / "bare", []) as server:
        assert answer(server, target) == []


def test_the_run_variable_finds_ended_runs_by_name_and_the_neediest_first(cluster: Prometheus) -> None:
    for uid in ("gradwatch-fleet", "gradwatch-oncall", "gradwatch-debug"):
        variable = next(each for each in load()[uid]["templating"]["list"] if each["name"] == "run")
        inner = re.fullmatch(r"query_result\((.*)\)", variable["query"])
        assert inner is not None
        query = substituted(inner[1], {"namespace": ".*", "model": ".*", "__range": f"{END - START:.0f}s"})
        found = cluster.query(query, END)
        # As Grafana writes an answer before it takes it apart by the pattern.
        texts = ["{" + ",".join(f'{key}="{value}"' for key, value in labels.items()) + "} 1 1" for labels, _ in found]
        pattern = variable["regex"].strip("/").replace("(?<", "(?P<")
        options = [(m["text"], m["value"]) for text in texts if (m := re.search(pattern, text))]
        assert set(options) == {("nightly-42 · 5f2a91c0", LIVE.run), ("nightly-41 · 1b7e0c3d", FINISHED.run)}
        if uid != "gradwatch-fleet":
            assert options[0][1] == LIVE.run


def test_the_benchmark_asks_every_query_and_all_have_data() -> None:
    """The same at a small size; how long it takes here is no matter."""
    small = ["--runs", "3", "--ranks", "2", "--hours", "2", "--every", "60", "--repeat", "1", "--limit", "60"]
    program("promtool")
    told = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "dashboards.py"), *small],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    asked = len(targets()) + 3
    for chosen in ("one run", "two runs"):
        assert re.search(rf"^{chosen} chosen: {asked} queries, .* 0 without data$", told.stdout, re.M), told.stdout


@pytest.mark.parametrize("name", ["namespace", "model", "rank", "layer", "job", "instance"])
def test_other_variables_have_values(cluster: Prometheus, name: str) -> None:
    variable = next(each for each in load()["gradwatch-debug"]["templating"]["list"] if each["name"] == name)
    inner = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
    assert inner is not None
    selector = substituted(inner[1], {"namespace": ".*", "model": ".*", "run": LIVE.run})
    values = cluster.get_json(
        f"/api/v1/label/{inner[2]}/values", **{"match[]": selector, "start": str(START), "end": str(END)}
    )
    assert values["data"]
