"""Puts what an example measured into its page: text and pictures between marks, everything else stays.

<!-- measured: rates -->
… replaced …
<!-- end -->
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs" / "examples"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; floats with four significant digits."""
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join('---' for _ in heads)} |"]
    lines += [f"| {' | '.join(_cell(value) for value in row)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def measured_on() -> str:
    """The day, and the kind of machine that the figures come from."""
    import torch

    cores = len(os.sched_getaffinity(0))
    return f"{time.strftime('%Y-%m-%d')}, {cores} cores of {platform.machine()}, torch {torch.__version__}"


def write(page: str, parts: Mapping[str, str]) -> None:
    """Replace the marked parts of ``docs/examples/<page>.md``. Raises ``ValueError`` where a mark is missing."""
    path = DOCS / f"{page}.md"
    text = path.read_text()
    for name, content in parts.items():
        pattern = re.compile(rf"(<!-- measured: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{path} has no part '<!-- measured: {name} -->'")
        text = pattern.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)
    path.write_text(text)
