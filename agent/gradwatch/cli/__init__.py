"""The command line: one module a command, imported only when that command is called.

A command is a line of :data:`COMMANDS` and a module ``gradwatch.cli.<name>`` that defines ``command``, a
function with typer's annotations whose docstring is the help text (Markdown, with an indented block below
``Examples:``), or, where it has commands of its own, ``app``, a ``typer.Typer``. It imports what is heavy
inside that function, says what the user did wrong by raising :class:`CommandError`, and says that a check
failed by ``raise typer.Exit(1)``.

Exit codes: 0 fine, 1 a check failed, 2 wrong usage, also a package that is not installed.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

WRONG_USAGE: Final = 2


class CommandError(Exception):
    """The command cannot do what was asked: the message says what is wrong, where, and what to do."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command, what it does in half a line, and the extra that brings the packages it needs."""

    name: str
    summary: str
    extra: str = "agent"


COMMANDS: Final[dict[str, tuple[Command, ...]]] = {
    "Watch": (
        Command("demo", "train a small LSTM for a minute with everything on", "demo"),
        Command("run", "run a training as its parent: signals, true exit code, agent beside it"),
        Command("agent", "tail journals; serve /metrics and a status page; upload to MLflow"),
        Command("bridge", "MLflow history as metrics; alerts into MLflow tags and Grafana; one for all runs"),
    ),
    "Look": (
        Command("runs", "the runs in a journal directory: state, step, loss, norm, clip rate"),
        Command("findings", "what was found wrong with a run, with evidence and advice"),
        Command("explain", "what a finding means, how it is decided, what to do about it"),
        Command("recommend", "a clip threshold and a weight decay for the next run, from this one"),
        Command("report", "one run as one HTML page: verdict, findings, curves, layers, last steps", "report"),
    ),
    "Gate": (
        Command("audit", "whether a run or version could be repeated from what was recorded; --all the inventory"),
        Command("gate", "whether a run may take the champion's place: scores, gap, clip rate, what differs"),
        Command("register", "a run as a version of a model, with its metadata and what the gates said of it"),
    ),
    "Act": (Command("silence", "quiet a model's alerts for a controlled retrain; list and expire silences"),),
}

_BY_NAME: Final = {command.name: command for group in COMMANDS.values() for command in group}
_HELP_FLAGS: Final = ("--help", "-h", "help")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of ``gradwatch``; ends with ``SystemExit``."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in _HELP_FLAGS:
        print(front_page())
        sys.exit(0 if arguments else WRONG_USAGE)
    if arguments[0] == "--version":
        from gradwatch import __version__

        print(f"gradwatch {__version__}")
        sys.exit(0)
    name, rest = arguments[0], arguments[1:]
    if name not in _BY_NAME:
        _fail(_unknown(name))
    _call(_BY_NAME[name], rest)


def front_page() -> str:
    """What ``gradwatch --help`` prints; it imports nothing, so it comes at once."""
    width = max(map(len, _BY_NAME))
    lines = ["gradwatch: the flight recorder and the pager for PyTorch training.", ""]
    lines += ["Usage: gradwatch COMMAND [OPTIONS]", "       gradwatch COMMAND --help", ""]
    for title, commands in COMMANDS.items():
        lines += [f"{title}:", *(f"  {c.name:<{width}}  {c.summary}" for c in commands), ""]
    lines += [
        "Examples:",
        "  gradwatch demo                       see everything at work, in a minute",
        "  gradwatch agent --dir /journals      serve what trainings record there",
        "  gradwatch runs /scratch/journals     what is running there, and how it does",
        "",
        "Exit codes: 0 fine, 1 a check failed, 2 wrong usage.",
    ]
    return "\n".join(lines)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, _BY_NAME, n=1)
    hint = f"did you mean 'gradwatch {near[0]}'?" if near else "'gradwatch --help' lists the commands"
    return f"gradwatch: no command {name!r}; {hint}"


def _call(command: Command, arguments: list[str]) -> NoReturn:
    try:
        import typer

        module = importlib.import_module(f"gradwatch.cli.{command.name}")
        app = getattr(module, "app", None)
        if app is None:
            app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
            app.command(context_settings={"help_option_names": ["--help", "-h"]})(module.command)
        app(arguments, prog_name=f"gradwatch {command.name}")
    except CommandError as error:
        _fail(f"gradwatch {command.name}: {error}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "gradwatch"):
            raise
        _fail(
            f"gradwatch {command.name} needs the package {package!r}, which is not installed here: "
            f"pip install 'gradwatch[{command.extra}]'"
        )
    except BrokenPipeError:
        # The reader of our output has left (`gradwatch runs | head`); nothing is wrong.
        sys.stderr.close()
        sys.exit(0)
    sys.exit(0)


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(WRONG_USAGE)
