"""What importing gradwatch adds to a training script that has imported torch.

Fresh interpreters, torch alone and torch with gradwatch, take turns; reported
are medians of the time behind ``import torch``, and which modules came along.

    python benchmarks/bench_import.py [--times 9]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

SCRIPT = """
import json, sys, torch
from time import perf_counter
before = set(sys.modules)
began = perf_counter()
{statement}
seconds = perf_counter() - began
print(json.dumps([seconds, sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})]))
"""
CASES = {
    "nothing": "pass",
    "import gradwatch": "import gradwatch",
    "import gradwatch, first watch": "import gradwatch, gradwatch.probe.start",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=9, help="interpreters a case (default 9)")
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    modules: dict[str, list[str]] = {}
    for _ in range(options.times):
        for case, statement in CASES.items():
            command = [sys.executable, "-c", SCRIPT.format(statement=statement)]
            took, names = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
            seconds[case].append(took)
            modules[case] = names
    for case, times in seconds.items():
        print(f"{case:32} {1000 * statistics.median(times):7.1f} ms  (fastest {1000 * min(times):.1f} ms)")
    for unwanted in ("mlflow", "prometheus_client", "typer", "rich"):
        assert not any(unwanted in names for names in modules.values()), f"{unwanted} was imported"
    print("neither mlflow, prometheus_client, typer nor rich came along")


if __name__ == "__main__":
    main()
