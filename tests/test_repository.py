"""What the repository promises of itself: its layout, its public names, light imports, one direction of imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gradwatch

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: Packages of the agent's side: they run in an image without torch.
AGENT_SIDE = ("agent", "bridge", "catalog", "cli", "collect", "detect", "journal", "sinks")
#: What a training process must not load for our sake.
HEAVY = ("mlflow", "prometheus_client", "rich", "starlette", "typer", "uvicorn")


def python(code: str) -> str:
    """Run code in a fresh interpreter; its standard output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_public_names_are_these() -> None:
    assert sorted(gradwatch.__all__) == ["Run", "__version__", "watch"]
    assert all(hasattr(gradwatch, name) for name in gradwatch.__all__)


@pytest.mark.parametrize("use", ["import gradwatch", "import gradwatch; gradwatch.watch"])
def test_importing_gradwatch_loads_nothing_heavy(use: str) -> None:
    code = f"import sys, torch; before = set(sys.modules)\n{use}\nprint(*sorted(set(sys.modules) - before))"
    loaded = {name.partition(".")[0] for name in python(code).split()}
    assert "gradwatch" in loaded
    assert not loaded & set(HEAVY)


def test_importing_gradwatch_alone_loads_neither_torch_nor_numpy() -> None:
    loaded = json.loads(python("import json, sys, gradwatch; print(json.dumps(sorted(sys.modules)))"))
    assert not {"torch", "numpy"} & set(loaded)


def test_the_agents_side_loads_where_torch_is_not_installed() -> None:
    modules = sorted(
        ".".join(path.relative_to(ROOT / "agent").with_suffix("").parts).removesuffix(".__init__")
        for name in AGENT_SIDE
        for path in [ROOT / "agent/gradwatch" / f"{name}.py", *(ROOT / "agent/gradwatch" / name).rglob("*.py")]
        if path.exists()
    )
    assert "gradwatch.journal.reader" in modules
    assert "gradwatch.cli.runs" in modules
    python(
        f"import importlib, sys; sys.modules['torch'] = None\nfor name in {modules!r}: importlib.import_module(name)"
    )


def test_imports_point_one_way() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"Contracts: \d+ kept, 0 broken", done.stdout)


def test_the_layout_is_that_of_the_architecture() -> None:
    [layout] = re.findall(r"^## Layout\n+```text\n(.*?)^```", (ROOT / "docs/architecture.md").read_text(), re.M | re.S)
    named = re.findall(r"^([\w./]+)", layout, flags=re.MULTILINE)
    assert len(named) > 15
    assert [name for name in named if not (ROOT / name).exists()] == []
    packages = {path.parent.name for path in (ROOT / "agent/gradwatch").glob("*/__init__.py")}
    assert {f"agent/gradwatch/{name}/" for name in packages} <= set(named)


def test_every_package_of_the_development_set_is_pinned() -> None:
    pinned = {
        _normal(line.partition("==")[0])
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    names = {
        _normal(re.split(r"[<>=!~ ]", requirement)[0])
        for requirement in [*PROJECT["project"]["dependencies"], *_requirements("dev")]
    }
    assert {"torch", "mlflow", "pytest", "lightning"} <= names
    assert names - pinned == set()


def _requirements(extra: str) -> list[str]:
    """An extra's requirements, those of the extras that it names among them."""
    found = []
    for requirement in PROJECT["project"]["optional-dependencies"][extra]:
        if named := re.fullmatch(r"gradwatch\[(.*)\]", requirement):
            found += [inner for name in named[1].split(",") for inner in _requirements(name)]
        else:
            found.append(requirement)
    return found


def test_one_torch_everywhere() -> None:
    [pinned] = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    [installed_first] = re.findall(r"^TORCH := torch==(\S+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert pinned == installed_first == "2.13.0"


@pytest.mark.parametrize("target", ["setup", "demo", "test", "verify", "bench", "generate"])
def test_make_knows_the_target(target: str) -> None:
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_verify_fails_where_a_check_does(tmp_path: Path) -> None:
    ci = tmp_path / ".ci"
    ci.mkdir()
    (ci / "verify").write_text((ROOT / ".ci/verify").read_text())
    (ci / "generators").write_text("# a comment\nfresh  true\n")
    (ci / "checks").write_text("good  true\n")
    assert subprocess.run(["bash", ci / "verify"], capture_output=True).returncode == 0
    (ci / "checks").write_text("good  true\nbad  ls nowhere\n")
    done = subprocess.run(["bash", ci / "verify"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "FAILED  bad: ls nowhere" in done.stdout
    assert "ok      good" in done.stdout
    assert "ok      fresh" in done.stdout


def test_the_licence_is_whole_and_the_changelog_is_kept() -> None:
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.xdist_group("together")
def test_tests_of_a_group_stay_on_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist 3.8 names the group behind a test's id, which pytest 9.2 no longer lets it."""
    if request.config.getoption("loadgroup", False):
        assert request.node.nodeid.endswith("@together")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
