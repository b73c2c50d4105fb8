"""The command line as a whole: one table, one file a command, help that teaches, exit codes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gradwatch import cli
from gradwatch.catalog import FINDINGS

MODULES = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__"}
COMMANDS = {command.name for group in cli.COMMANDS.values() for command in group}


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``gradwatch ARGUMENTS``."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    output, errors = capsys.readouterr()
    return int(ended.value.code or 0), output, errors


def test_every_command_has_its_module_and_every_module_of_a_command_its_line() -> None:
    defining = {name for name in MODULES if re.search(r"^(def command\(|app = )", _source(name), flags=re.MULTILINE)}
    assert defining == COMMANDS


def _source(name: str) -> str:
    return (Path(cli.__file__).parent / f"{name}.py").read_text()


def test_the_front_page_lists_every_command_and_imports_nothing() -> None:
    code = "import sys; from gradwatch.cli import front_page; print(front_page()); assert 'typer' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_teaches_by_example(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, output, _ = call(capsys, name, "--help")
    assert code == 0
    assert f"Usage: gradwatch {name}" in output
    assert "Examples:" in output
    assert output.count(f"gradwatch {name}") >= 2


def test_module_and_program_are_the_same() -> None:
    done = subprocess.run([sys.executable, "-m", "gradwatch", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("gradwatch 0.")


def test_without_a_command_the_front_page_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = call(capsys)
    assert code == 2
    assert "Usage: gradwatch COMMAND" in output


def test_a_misspelt_command_is_answered_with_the_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "findngs") == (2, "", "gradwatch: no command 'findngs'; did you mean 'gradwatch findings'?\n")


def test_a_missing_package_is_answered_with_the_pip_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    code, _, errors = call(capsys, "demo")
    assert code == 2
    assert errors == (
        "gradwatch demo needs the package 'mlflow', which is not installed here: pip install 'gradwatch[demo]'\n"
    )


def test_explain_says_what_and_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = call(capsys, "explain", "clip-after-step")
    assert code == 0
    assert "Gradients were clipped after the optimizer step" in output
    assert "Move the clip in front of optimizer.step()" in output


def test_explain_lists_every_code(capsys: pytest.CaptureFixture[str]) -> None:
    _, output, _ = call(capsys, "explain")
    assert [line.split()[0] for line in output.splitlines()] == [finding.code for finding in FINDINGS]
    _, output, _ = call(capsys, "explain", "--json")
    assert [finding["code"] for finding in json.loads(output)] == [finding.code for finding in FINDINGS]


def test_explain_of_an_unknown_code_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = call(capsys, "explain", "clip-afterstep")
    assert (code, "did you mean 'clip-after-step'?" in errors) == (2, True)
