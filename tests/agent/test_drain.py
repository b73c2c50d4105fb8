"""`--drain`: how long a sidecar that is told to stop stays, by an injected clock; with the waits of the manifests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from gradwatch.agent.service import Agent, Settings
from gradwatch.agent.store import Store
from gradwatch.testing import FakeClock, JournalBuilder, MemorySink

SIDECAR = Path(__file__).parents[2] / "k8s/components/sidecar/job.yaml"
#: What an agent that has seen the end may take until it has read it, beside its wait for a scrape.
READING = 4.0


class Leaving:
    """An agent that follows one run, has been scraped or not, and is then told to stop."""

    def __init__(self, tmp_path: Path, *, scraped: bool) -> None:
        spec = yaml.safe_load(SIDECAR.read_text())["spec"]["template"]["spec"]
        self.pod_grace = float(spec["terminationGracePeriodSeconds"])
        args = dict(arg.removeprefix("--").split("=") for arg in spec["initContainers"][0]["args"] if "=" in arg)
        self.linger, self.grace = float(args["linger"]), float(args["grace"])
        root = tmp_path / "journals"
        root.mkdir()
        self.clock, self.sink = FakeClock(), MemorySink()
        #: What happens once so many seconds have gone since it was told.
        self.later: list[tuple[float, Callable[[], object]]] = []
        self.began = 0.0
        self.agent = Agent(
            Settings(root, grace=self.grace, linger=self.linger, drain=True), Store(tmp_path / "state"), (self.sink,),
            monotonic=self.clock, wall=self.clock, pause=self._pause,
        )  # fmt: skip
        self.journal = JournalBuilder(root, run="run-1", clock=self.clock)
        for _ in range(30):
            self.journal.step(loss=1.0, grad_norm=2.0, clip_threshold=1.0)
        self.clock.advance(1)
        self.agent.tick()
        if scraped:
            self.agent.was_scraped(self.agent.ends_shown())

    def _pause(self, seconds: float) -> None:
        self.clock.advance(seconds)
        for event in list(self.later):
            if self.clock() - self.began >= event[0]:
                self.later.remove(event)
                event[1]()

    def scrape(self) -> None:
        self.agent.was_scraped(self.agent.ends_shown())

    def seconds(self) -> float:
        """For how long it stays."""
        self.began = self.clock()
        self.agent.stop()
        self.agent.run()
        self.agent.leave()
        assert self.sink.closed
        return self.clock() - self.began


def test_the_waits_of_the_manifests_fit_into_each_other(tmp_path: Path) -> None:
    leaving = Leaving(tmp_path, scraped=True)
    leaving.journal.end()
    assert leaving.linger <= 45 < leaving.grace - 5
    assert leaving.grace < 60
    assert leaving.pod_grace == 30 + 60


def test_where_nobody_scrapes_it_leaves_once_the_end_is_delivered(tmp_path: Path) -> None:
    leaving = Leaving(tmp_path, scraped=False)
    leaving.journal.end()
    assert leaving.seconds() < READING
    assert [end.state for end, _, _ in leaving.sink.ends] == ["finished"]


def test_it_leaves_with_the_scrape_that_shows_the_end(tmp_path: Path) -> None:
    leaving = Leaving(tmp_path, scraped=True)
    leaving.journal.end()
    leaving.later = [(15.0, leaving.scrape)]
    assert 15.0 <= leaving.seconds() < 16.0


def test_a_scrape_that_does_not_come_is_waited_for_45_seconds(tmp_path: Path) -> None:
    leaving = Leaving(tmp_path, scraped=True)
    leaving.journal.end()
    assert 45.0 <= leaving.seconds() < 45.0 + READING


def test_a_trainer_that_still_runs_is_followed_to_its_end(tmp_path: Path) -> None:
    leaving = Leaving(tmp_path, scraped=True)
    leaving.later = [(20.0, leaving.journal.end), (30.0, leaving.scrape)]
    assert 30.0 <= leaving.seconds() < 31.0
    assert [end.state for end, _, _ in leaving.sink.ends] == ["finished"]


@pytest.mark.parametrize("trouble", ["the trainer never ends", "the sink never delivers"])
def test_it_leaves_within_its_grace_period_whatever_happens(tmp_path: Path, trouble: str) -> None:
    leaving = Leaving(tmp_path, scraped=True)
    if trouble == "the sink never delivers":
        leaving.journal.end()
        leaving.sink.backlog = 1
    assert 49.0 <= leaving.seconds() <= leaving.grace
    if trouble == "the trainer never ends":
        assert leaving.sink.ends == []
        leaving.journal.end()
