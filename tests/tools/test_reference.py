"""The reference pages are what the catalogue says, and what people wrote on them stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from gradwatch.catalog import FINDINGS, METRICS
from gradwatch.tools import reference


def generate(docs: Path, *arguments: str) -> int:
    return reference.main(["--docs", str(docs), *arguments])


def test_every_metric_and_finding_has_its_line_and_page(tmp_path: Path) -> None:
    assert generate(tmp_path) == 0
    metrics = (tmp_path / "metrics.md").read_text()
    for metric in METRICS:
        assert f"| `{metric.exposed}` | {metric.type} |" in metrics
    index = (tmp_path / "findings/index.md").read_text()
    for finding in FINDINGS:
        assert f"]({finding.code}.md) | {finding.severity} |" in index
        assert finding.advice in (tmp_path / "findings" / f"{finding.code}.md").read_text()


def test_what_is_written_by_hand_stays_and_does_not_count_as_a_difference(tmp_path: Path) -> None:
    generate(tmp_path)
    page = tmp_path / "findings/clip-missing.md"
    page.write_text(page.read_text() + "\n## How it is decided\n\nBy hand.\n")
    assert generate(tmp_path, "--check") == 0
    generate(tmp_path)
    assert page.read_text().endswith("## How it is decided\n\nBy hand.\n")


@pytest.mark.parametrize("page", ["metrics.md", "findings/index.md", "findings/clip-missing.md"])
def test_check_fails_where_a_page_differs_and_changes_nothing(tmp_path: Path, page: str) -> None:
    generate(tmp_path)
    path = tmp_path / page
    text = path.read_text().replace("clip", "klip").replace("grad_norm", "gard_norm")
    path.write_text(text)
    assert generate(tmp_path, "--check") == 1
    assert path.read_text() == text


def test_a_page_that_the_catalogue_does_not_know_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate(tmp_path)
    (tmp_path / "findings/of-old.md").write_text("# `of-old`\n")
    assert generate(tmp_path, "--check") == 1
    assert "of-old.md: no such finding" in capsys.readouterr().err
