"""How long every query of every dashboard takes on a real Prometheus full of history.

    python benchmarks/dashboards.py --runs 200 --ranks 8 --hours 6 --every 120

fills a Prometheus by ``promtool tsdb create-blocks-from openmetrics`` with runs
that all train over the whole history, then asks each panel's query as Grafana
would: with every variable at All, but for the run, where the dashboards choose
one (whatever says which run to choose sees all of them anyway). Says the median
and the largest time over all queries, each the best of ``--repeat`` tries,
since other work on the machine can only add to it, and exits 1 where one is over ``--limit``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.ops.dashboard_support.history import History, PastRun, blocks  # noqa: E402
from tests.ops.dashboard_support.panels import Target, load, request, targets  # noqa: E402
from tests.services import Prometheus  # noqa: E402


def fleet(runs: int, ranks: int, hours: float, every: float, models: int = 20) -> History:
    end = time.time() // every * every
    start = end - hours * 3600
    past = [
        PastRun(f"model-{i % models}", f"run{i:04d}", f"nightly-{i}", start, end, ranks=ranks, restart=end - 3600)
        for i in range(runs)
    ]
    return History(past, start, end, every, [f"model-{i}" for i in range(models)])


def everything() -> list[Target]:
    """The queries of panels and annotations, and that of the variable that finds runs by name."""
    asked = targets()
    for uid, dashboard in load().items():
        query = next(each["query"] for each in dashboard["templating"]["list"] if each["name"] == "run")
        inner = query.removeprefix("query_result(")[:-1]
        asked.append(Target(uid, "variable run", "variable", "A", inner, True, 60.0))
    return asked


def ask(url: str, path: str, parameters: dict[str, str]) -> tuple[float, int]:
    """Seconds until the whole answer was here, and how many series it had."""
    began = time.perf_counter()
    body = urllib.parse.urlencode(parameters).encode()
    with urllib.request.urlopen(urllib.request.Request(url + path, body), timeout=120) as answer:
        text = answer.read()
    return time.perf_counter() - began, len(json.loads(text)["data"]["result"])


def measure(url: str, target: Target, history: History, repeat: int, **chosen: str) -> tuple[float, int]:
    span = 7 * 86400 if target.dashboard == "gradwatch-fleet" else 6 * 3600
    path, parameters = request(target, history.end - span, history.end, history.every, **chosen)
    tries = [ask(url, path, parameters) for _ in range(repeat)]
    return min(seconds for seconds, _ in tries), tries[-1][1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--hours", type=float, default=6)
    parser.add_argument("--every", type=float, default=60, help="seconds between two scrapes")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--limit", type=float, default=0.2, help="seconds that a query may take")
    parser.add_argument("--directory", type=Path, help="keep the blocks here, and use them again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        return run(options, options.directory or Path(scratch))


def run(options: argparse.Namespace, directory: Path) -> int:
    history = fleet(options.runs, options.ranks, options.hours, options.every)
    if not (directory / "data").exists():
        began = time.perf_counter()
        blocks(history, directory)
        (directory / "end").write_text(str(history.end))
        print(f"backfilled in {time.perf_counter() - began:.0f} s")
    end = float((directory / "end").read_text())
    history = History(history.runs, end - options.hours * 3600, end, options.every, history.models)
    slow = 0
    with Prometheus(directory, []) as server:
        metas = [json.loads(path.read_text())["stats"] for path in (directory / "data").glob("*/meta.json")]
        series, samples = max(meta["numSeries"] for meta in metas), sum(meta["numSamples"] for meta in metas)
        print(f"{options.runs} runs × {options.ranks} ranks, {options.hours:g} h, a scrape each {options.every:g} s: "
              f"{series} series, {samples / 1e6:.1f} million samples")  # fmt: skip
        pair = "|".join(past.run for past in history.runs[:2])
        for what, run in (("one run chosen", history.runs[0].run), ("two runs chosen", f"({pair})")):
            figures = [(*measure(server.url, each, history, options.repeat, run=run), each) for each in everything()]
            times = [seconds for seconds, _, _ in figures]
            without = sum(not series for _, series, _ in figures)
            print(f"{what}: {len(times)} queries, median {statistics.median(times) * 1e3:.1f} ms, "
                  f"largest {max(times) * 1e3:.1f} ms, {without} without data")  # fmt: skip
            for seconds, series, each in sorted(figures, key=lambda figure: -figure[0])[:12]:
                print(f"  {seconds * 1e3:7.1f} ms  {series:5d} series  {each.id}")
            slow += sum(seconds > options.limit for seconds in times)
    print(f"{slow} over {options.limit * 1e3:.0f} ms")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
