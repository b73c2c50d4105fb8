"""The desk: posts are written in turn and together, and an outage answers all of them at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import pytest

from gradwatch.bridge import desk as desk_module
from gradwatch.bridge.alerts import Alert, parse_alerts
from gradwatch.bridge.desk import BATCH, SHARE, Desk
from gradwatch.bridge.tagging import Result
from tests.bridge.conftest import alert


def told(run: str, count: int) -> list[Alert]:
    alerts, _ = parse_alerts([alert(run, fingerprint=f"{number:x}") for number in range(count)])
    return alerts


class Tagger:
    """Keeps batches; waits at a gate before each, and fails for the runs that it was told to."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Semaphore(0)
        self.failing: set[str] = set()
        self.breaks = False

    def apply(self, alerts: Sequence[Alert]) -> list[Result]:
        assert self.gate.acquire(timeout=20)
        self.batches.append([one.labels["run"] for one in alerts])
        if self.breaks:
            raise RuntimeError("a bug")
        return ["failed" if one.labels["run"] in self.failing else "applied" for one in alerts]


@pytest.fixture
def tagger() -> Tagger:
    return Tagger()


@pytest.fixture
def desk(tagger: Tagger) -> Iterator[Desk]:
    desk = Desk(tagger)
    desk.start()
    yield desk
    for _ in range(100):
        tagger.gate.release()
    desk.stop(10)


def test_a_long_post_does_not_hold_up_the_others(desk: Desk, tagger: Tagger) -> None:
    long = desk.submit(told("long", 5 * SHARE))
    shorts = [desk.submit(told(f"short {number}", 1)) for number in range(3)]
    assert long is not None
    for _ in range(2):
        tagger.gate.release()
    for short in shorts:
        assert short is not None
        assert short.result(10) == {"applied": 1}
    assert not long.done()
    for _ in range(10):
        tagger.gate.release()
    assert long.result(10) == {"applied": 5 * SHARE}
    # What had come by then was written together.
    assert max(len(set(batch)) for batch in tagger.batches[:2]) > 1
    assert max(map(len, tagger.batches)) <= BATCH


def test_an_outage_answers_everybody_at_once_and_the_desk_goes_on(desk: Desk, tagger: Tagger) -> None:
    tagger.failing = {"first", "second"}
    posts = [desk.submit(told(run, SHARE + 1)) for run in ("first", "second")]
    tagger.gate.release()
    for post in posts:
        assert post is not None
        assert post.result(10) == {"failed": SHARE + 1}
    assert len(tagger.batches) == 1
    tagger.failing = set()
    for _ in range(4):
        tagger.gate.release()
    later = desk.submit(told("later", 1))
    assert later is not None
    assert later.result(10) == {"applied": 1}


def test_one_target_that_fails_does_not_fail_the_others(desk: Desk, tagger: Tagger) -> None:
    desk.submit(told("opens the gate", 1))
    tagger.failing = {"bad"}
    bad, good = desk.submit(told("bad", 1)), desk.submit(told("good", 1))
    for _ in range(3):
        tagger.gate.release()
    assert bad is not None
    assert good is not None
    assert (bad.result(10), good.result(10)) == ({"failed": 1}, {"applied": 1})


def test_a_bug_is_a_failure_that_is_told_and_not_a_desk_that_is_dead(desk: Desk, tagger: Tagger) -> None:
    tagger.breaks = True
    post = desk.submit(told("r", 2))
    tagger.gate.release()
    assert post is not None
    assert post.result(10) == {"failed": 2}
    tagger.breaks = False
    tagger.gate.release()
    post = desk.submit(told("r", 2))
    assert post is not None
    assert post.result(10) == {"applied": 2}


def test_what_waits_is_bounded_and_a_closing_desk_takes_nothing(
    desk: Desk, tagger: Tagger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk_module, "MAX_WAITING", 10)
    assert desk.submit(told("r", 11)) is None
    post = desk.submit(told("r", 10))
    assert post is not None
    tagger.gate.release()
    assert post.result(10) == {"applied": 10}
    desk.stop(10)
    assert desk.submit(told("r", 1)) is None
    assert desk.waiting == 0
