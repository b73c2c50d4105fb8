"""The documentation builds as a site, strictly, and the site asks nobody else for anything."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.xdist_group("site")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return directory


def test_every_page_is_there_and_in_the_index(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()
    text = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    nav = str(text["nav"])
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"'{page.name}'" not in nav] == []


def test_it_opens_offline(site: Path) -> None:
    """No script, style, font or picture comes from another host."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=[\"']?(https?://[^\"'> ]+)", text)
        loaded += re.findall(
            r"<link[^>]*rel=[\"']?(?:stylesheet|preconnect|icon)[^>]*href=[\"']?(https?://[^\"'> ]+)", text
        )
        assert loaded == [], page.name


def test_links_out_of_the_docs_lead_to_the_repository(site: Path) -> None:
    text = (site / "alerts.html").read_text()
    assert "/blob/main/alerts/runbooks/clip-rate.md" in text
    assert 'href="../alerts' not in text
    assert "/tree/main/dashboards/generated" in (site / "dashboards.html").read_text()


def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("[nowhere](nowhere.md)\n")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    config |= {"nav": ["index.md"], "hooks": [], "not_in_nav": ""}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert "nowhere.md" in done.stderr
