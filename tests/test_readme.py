"""The front page's code runs as it stands, and what it points to exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gradwatch.journal import JournalReader, find_attempts

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_of_the_front_page_runs_and_is_recorded(block: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", block],
        cwd=tmp_path,
        env={**os.environ, "GRADWATCH_DIR": str(tmp_path / "journals")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    [place] = find_attempts(tmp_path / "journals")
    polled = JournalReader(place.path).poll()
    assert len(polled.steps) == block.count("range(20)") * 20
    assert (polled.steps["clip_threshold"] == 1.0).all()
    assert (polled.steps["loss"] > 0).all()
    assert [event["kind"] for event in polled.events if event["kind"] in ("validation", "end")] == ["validation", "end"]


def test_there_is_code_and_it_takes_five_lines() -> None:
    [block] = BLOCKS
    assert re.findall(r"# (\d)$", block, flags=re.MULTILINE) == ["1", "2", "3", "4", "5"]
    ours = [line for line in block.splitlines() if "gradwatch" in line or "run." in line]
    assert len(ours) == 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs/index.md").read_text()
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md"]
    assert [name for name in pages if f"({name})" not in index] == []


def test_the_front_page_names_targets_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake (\w+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
