"""``gradwatch demo``: everything at work, in a minute."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from gradwatch.catalog import END_STATES
from gradwatch.cli import CommandError

if TYPE_CHECKING:
    from rich.console import Console

    from gradwatch.demo.processes import Process
    from gradwatch.demo.view import Curve, Numbers

DIRECTORY: Final = Path("gradwatch-demo")
#: Seconds between two looks at ``/metrics``.
GLANCE: Final = 0.25
#: Seconds for the first row of the training, and for the agent to deliver the rest once training is over.
START_SECONDS: Final = 120.0
DRAIN_SECONDS: Final = 60.0


def command(
    steps: Annotated[int, typer.Option(help="Optimizer steps to train.", min=8)] = 1200,
    headless: Annotated[bool, typer.Option("--headless", help="Print lines instead of a live view.")] = False,
    port: Annotated[
        int, typer.Option(help="Port of /metrics; a taken one gives the next free one.", min=1, max=65_535)
    ] = 9460,
    keep_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Serve /metrics and the status page on, until Ctrl-C.")
    ] = False,
) -> None:
    """Train a small LSTM for about a minute, with everything on.

    It predicts from 180 days of made-up events which customers leave. Four of its batches are corrupt, at
    known steps. The training runs in one process, the agent in another; this terminal shows what the agent
    serves at /metrics. MLflow's runs go to a sqlite file below ./gradwatch-demo/, the journal lies beside it.

    Examples:

        gradwatch demo
        gradwatch demo --keep-serving
        gradwatch demo --headless --steps 200 --port 9500
    """
    import mlflow  # noqa: F401  (ask for the extra now, not when the agent is up)
    import torch  # noqa: F401
    from rich.console import Console

    from gradwatch.demo.processes import free_port

    console = Console(highlight=False)
    chosen = free_port(port)
    if chosen is None:
        raise CommandError(f"port {port} and the ports above it are taken; choose another with --port")
    if chosen != port:
        console.print(f"port {port} is taken; using {chosen}")
    Demo(console, steps, chosen, headless=headless, keep_serving=keep_serving).play()


class Demo:
    """One performance: the training, the agent beside it, the view in front of them, and what was found."""

    def __init__(self, console: Console, steps: int, port: int, *, headless: bool, keep_serving: bool) -> None:
        self.console = console
        self.steps = steps
        self.url = f"http://127.0.0.1:{port}"
        self.listen = f"127.0.0.1:{port}"
        self.headless = headless
        self.keep_serving = keep_serving
        self.home = DIRECTORY.absolute()
        self.journals = self.home / "journals"
        self.run = f"demo-{time.strftime('%Y%m%d-%H%M%S')}"
        self.store = f"sqlite:///{self.home / 'mlflow.db'}"

    def play(self) -> None:
        """Run it all; the processes are gone afterwards, whatever happened. Exit code 1 where one failed."""
        from gradwatch.demo.processes import Process

        self.journals.mkdir(parents=True, exist_ok=True)
        agent = None
        training = Process(
            "gradwatch.demo.train",
            ["--steps", str(self.steps)],
            self.home / "train.log",
            {"GRADWATCH_DIR": str(self.journals), "GRADWATCH_RUN": self.run},
        )
        try:
            # An agent with --until-done leaves when all that it knows has ended, and the journals of former
            # demos have: it starts when this run is there to be seen.
            self._say(f"training {self.steps} steps; log: {_shown(training.log)}")
            self._await_journal(training)
            agent = Process(
                "gradwatch",
                ["agent", "--dir", str(self.journals), "--listen", self.listen, "--mlflow", self.store]
                + ([] if self.keep_serving else ["--until-done"]),
                self.home / "agent.log",
                directory=self.home,
            )
            numbers = self._watch(training, agent)
            self._require_success(training, agent)
            self._tell(numbers)
            if self.keep_serving:
                self._say(f"\nserving {self.url}/ until Ctrl-C")
                agent.handle.wait()
        except KeyboardInterrupt:
            self._say("\nstopped")
        finally:
            training.stop()
            if agent is not None:
                agent.stop()

    # -- while it trains

    @property
    def _journal(self) -> Path:
        return self.journals / self.run / "rank-0" / "attempt-0"

    def _await_journal(self, training: Process) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not (self._journal / "manifest.json").exists():
            if not training.running or time.monotonic() > deadline:
                self._say(f"the training did not start; its log ends with:\n{training.last_words()}", "red")
                raise typer.Exit(1)
            time.sleep(GLANCE / 5)

    def _watch(self, training: Process, agent: Process) -> Numbers:
        """Show the run until it has ended and the agent has said so; return the last numbers."""
        from gradwatch.demo.view import Curve, Numbers, scrape

        curve = Curve(self._journal, self.steps)
        numbers = Numbers()
        deadline = None
        try:
            with self._display(curve) as show:
                while True:
                    numbers = scrape(f"{self.url}/metrics", self.run) or numbers
                    curve.update()
                    show(numbers)
                    if numbers.state in END_STATES or not agent.running:
                        return numbers
                    if not training.running:
                        deadline = deadline or time.monotonic() + DRAIN_SECONDS
                        if time.monotonic() > deadline:
                            return numbers
                    time.sleep(GLANCE)
        finally:
            curve.close()

    def _display(self, curve: Curve) -> Display:
        return Display(self.console, curve, self.steps, f"{self.url}/metrics", live=not self.headless)

    # -- when it is over

    def _require_success(self, training: Process, agent: Process) -> None:
        """Wait for both processes; end with exit code 1 and their last words where one of them failed."""
        failed = training.wait(DRAIN_SECONDS) != 0
        if failed:
            self._say(f"the training failed; its log ends with:\n{training.last_words()}", "red")
        code = agent.wait(0 if self.keep_serving else DRAIN_SECONDS)
        if code != (None if self.keep_serving else 0):
            how = "did not come to its end" if code is None else f"left with exit code {code}"
            self._say(f"the agent {how}; its log ends with:\n{agent.last_words()}", "red")
            failed = True
        if failed:
            raise typer.Exit(1)

    def _tell(self, numbers: Numbers) -> None:
        from gradwatch.cli.findings import print_findings, read_findings
        from gradwatch.cli.locate import find
        from gradwatch.demo.train import corrupt_steps
        from gradwatch.demo.view import line

        planted = ", ".join(str(step) for step in corrupt_steps(self.steps))
        self._say(f"\n{numbers.state}  {line(numbers, self.steps)}", "bold")
        self._say(f"Corrupt batches were planted at steps {planted}.\n")
        print_findings(read_findings(find(str(self._journal))), self.console)
        gradwatch, journals = _program("gradwatch"), _shown(self.journals)
        self._say("Look further", "bold")
        for what, how in (
            (
                "MLflow's pages",
                f"{_program('mlflow')} ui --backend-store-uri sqlite:///{_shown(self.home / 'mlflow.db')}",
            ),
            ("the status page", f"{gradwatch} agent --dir {journals}"),
            ("what ran", f"{gradwatch} runs {journals}"),
            ("what was found", f"{gradwatch} findings {journals}/{self.run}"),
            ("what it means", f"{gradwatch} explain gradient-spike"),
        ):
            self._say(f"  {what:<16} {how}")

    def _say(self, text: str, style: str = "") -> None:
        """Print a text as it is: neither markup nor line breaks of the terminal's making."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)


class Display:
    """A live panel, or, without a terminal, a line for every tenth of the run."""

    def __init__(self, console: Console, curve: Curve, steps: int, where: str, *, live: bool) -> None:
        from rich.live import Live

        self._console = console
        self._curve = curve
        self._steps = steps
        self._where = where
        self._tenth = -1
        self._live = Live(console=console, auto_refresh=False) if live and console.is_terminal else None

    def __enter__(self) -> Callable[[Numbers], None]:
        if self._live is not None:
            self._live.start()
        return self._show

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _show(self, numbers: Numbers) -> None:
        from gradwatch.demo import view

        if self._live is not None:
            panel = view.render(numbers, self._curve, self._steps, self._where)
            self._live.update(panel, refresh=True)
            return
        if numbers.steps:
            tenth = int(10 * numbers.steps / self._steps)
            if tenth > self._tenth:
                self._tenth = tenth
                self._console.print(view.line(numbers, self._steps), soft_wrap=True)


def _shown(path: Path) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path)


def _program(name: str) -> str:
    """How to call a program of this environment from here: its name where that finds it, else its path."""
    own = Path(sys.executable).parent / name
    found = shutil.which(name)
    if found is not None and (not own.exists() or Path(found).resolve() == own.resolve()):
        return name
    return os.path.relpath(own) if own.exists() else name
