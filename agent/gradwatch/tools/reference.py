"""The reference pages, from the catalogue: ``python -m gradwatch.tools.reference [--check]``.

``docs/metrics.md`` and ``docs/findings/index.md`` are generated whole. ``docs/findings/<code>.md`` is
generated down to the line :data:`END`; what people write below it stays.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from gradwatch.catalog import FINDINGS, METRICS, FindingCode, Metric, Scope

END: Final = "<!-- Written by hand from here on; above, `make generate` writes what the catalogue says. -->"
WHOLE: Final = "<!-- `make generate` writes this page from the catalogue. -->"

_SCOPES: Final[tuple[tuple[Scope, str, str], ...]] = (
    ("run", "Of a run", "Exported once a run, by the agent beside rank 0; labels `model` and `run` on each."),
    ("rank", "Of a rank", "Exported by each rank's agent; labels `model`, `run` and `rank` on each."),
    ("agent", "Of the agent itself", "Without labels beyond those listed."),
    ("bridge", "Of the bridge", "From MLflow's history, by the central bridge."),
)


def pages(docs: Path) -> dict[Path, str]:
    """What each page should hold, hand-written parts as they stand in ``docs``."""
    wanted = {docs / "metrics.md": metrics_page(), docs / "findings" / "index.md": findings_index()}
    for finding in FINDINGS:
        path = docs / "findings" / f"{finding.code}.md"
        wanted[path] = finding_page(finding, by_hand(path))
    return wanted


def metrics_page() -> str:
    parts = [
        "# Metrics",
        WHOLE,
        "Every series that gradwatch exports. Counters end in `_total`, units are base units, norms are "
        "pre-clip,\nunscaled and global. A counter whose labels come from a closed set starts at 0, so that "
        "`increase()` sees the\nfirst event. Rules should aggregate both sides of a join by `(model, run)`.",
    ]
    for scope, title, note in _SCOPES:
        parts += [f"## {title}", note, _table(metric for metric in METRICS if metric.scope == scope)]
    return "\n\n".join(parts) + "\n"


def _table(metrics: Iterable[Metric]) -> str:
    rows = ["| metric | type | unit | labels | meaning |", "| --- | --- | --- | --- | --- |"]
    return "\n".join(rows + [_row(metric) for metric in metrics])


def _row(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.exposed}` | {metric.type} | {metric.unit} | {labels} | {metric.help} |"


def findings_index() -> str:
    parts = [
        "# Findings",
        WHOLE,
        "What gradwatch can find wrong. A **contract** finding is exact and comes from the probe: what the code "
        "does\nis wrong, whatever the data. A **health** finding is statistical and comes from the agent: what "
        "the training\ndoes is unhealthy. `gradwatch explain CODE` says the same in a terminal.",
    ]
    for kind, title in (("contract", "Contract"), ("health", "Health")):
        rows = ["| code | severity | what it says |", "| --- | --- | --- |"]
        rows += [f"| [`{f.code}`]({f.code}.md) | {f.severity} | {f.title} |" for f in FINDINGS if f.kind == kind]
        parts += [f"## {title}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def finding_page(finding: FindingCode, below: str) -> str:
    """A finding's page: its head from the catalogue, ``below`` as it is."""
    head = [
        f"# `{finding.code}`",
        f"**{finding.title}.**",
        f"A {finding.kind} finding of severity {finding.severity}.",
        f"**What to do.** {finding.advice}",
        END,
    ]
    return "\n\n".join(head) + "\n" + below


def by_hand(path: Path) -> str:
    """What people wrote on a page: all below the line :data:`END`, "" where there is none."""
    if not path.exists():
        return ""
    return path.read_text().partition(END + "\n")[2]


def strangers(docs: Path) -> list[Path]:
    """Pages of findings that the catalogue does not know."""
    known = {f"{finding.code}.md" for finding in FINDINGS} | {"index.md"}
    return sorted(path for path in (docs / "findings").glob("*.md") if path.name not in known)


def main(arguments: list[str] | None = None) -> int:
    """Write the pages, or compare with ``--check``; the exit code is 1 where one differs."""
    parser = argparse.ArgumentParser(description="Generate the reference pages from the catalogue.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page differs")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="the documentation's directory")
    options = parser.parse_args(arguments)
    wrong = [f"{path}: no such finding in the catalogue" for path in strangers(options.docs)]
    for path, text in pages(options.docs).items():
        if path.exists() and path.read_text() == text:
            continue
        if options.check:
            wrong.append(f"{path}: not what the catalogue says; run `make generate`")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"wrote {path}")
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
