"""Every block of code in README and docs: Python runs as it stands, commands are ones that their programs take."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from tests import services

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^([ ]*)```(\w*)\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)
#: Programs of others that cannot be asked here what they take, and why.
NOT_HERE = {
    "docker": "no Docker engine",
    "kubectl": "no cluster",
    "helm": "no cluster",
    "pip": "no package index of ours",
}
#: Harmless ones of others, run as they stand.
RUN = {"promtool", "amtool", "openssl", "mkdir"}


def blocks(*languages: str) -> list[pytest.param]:  # type: ignore[valid-type]
    found = []
    for page in PAGES:
        for number, (indent, language, text) in enumerate(FENCE.findall(page.read_text())):
            if language in languages:
                name = f"{page.relative_to(ROOT)}:{number}"
                found.append(pytest.param(textwrap.dedent(text) if indent else text, id=name))
    return found


def commands() -> list[pytest.param]:  # type: ignore[valid-type]
    found = []
    for block in blocks("sh"):
        joined = block.values[0].replace("\\\n", " ")
        lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
        found += [pytest.param(line, id=f"{block.id}:{line[:40]}") for line in lines]
    return found


def test_every_block_says_what_it_is() -> None:
    known = {"python", "sh", "yaml", "text", "mermaid"}
    strange = [
        (page.name, language or "(none)")
        for page in PAGES
        for _, language, _ in FENCE.findall(page.read_text())
        if language not in known
    ]
    assert strange == []
    assert len(blocks("python")) >= 10
    assert len(commands()) >= 15


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs_as_it_stands(code: str, tmp_path: Path) -> None:
    environment = {
        **os.environ, "GRADWATCH_DIR": str(tmp_path / "journals"), "OMP_NUM_THREADS": "1", "HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "agent"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stderr
    if "gradwatch.watch" in code or "GradwatchCallback" in code:
        [manifest] = (tmp_path / "journals").rglob("manifest.json")
        assert (manifest.parent / "steps.ring").stat().st_size > 0
        assert '"finished"' in (manifest.parent / "events.jsonl").read_text()


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_is_yaml(text: str) -> None:
    assert yaml.safe_load(text)


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one_that_its_program_takes(line: str, tmp_path: Path) -> None:
    line = re.sub(r"\s+#.*$", "", line)
    line = re.sub(r"\$\(openssl[^)]*\)", "token", line)
    words = [word for word in shlex.split(line) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    program, arguments = words[0], words[1:]
    if program == "gradwatch":
        command = [sys.executable, "-m", "gradwatch", *arguments, "--help"]
    elif program == "make":
        command = ["make", "-n", *arguments]
    elif program == "python":
        assert (ROOT / arguments[0]).exists()
        command = [sys.executable, *arguments, "--help"]
    elif program in RUN:
        command = ["bash", "-c", line]
        services.program(program)
    elif program in NOT_HERE:
        pytest.skip(f"not run: {NOT_HERE[program]}")
    else:
        assert (ROOT / program).exists(), f"nobody knows {program}"
        command = ["bash", "-n", str(ROOT / program)]
    where = tmp_path if program in ("openssl", "mkdir") else ROOT
    if program == "openssl":
        (tmp_path / "docker/compose/secrets").mkdir(parents=True)
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", sorted((ROOT / "docs/findings").glob("*.md")), ids=lambda page: page.stem)
def test_lines_of_code_in_a_finding_are_python(page: Path) -> None:
    """They show right and wrong in a line or two each, and are no whole programs."""
    indented = re.findall(r"(?:^    .*\n)+", page.read_text(), flags=re.MULTILINE)
    for block in indented:
        ast.parse(textwrap.dedent(block))
