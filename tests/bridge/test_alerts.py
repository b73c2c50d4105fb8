"""Alerts as pure facts: what is read, what is refused in words, and that no order of posts changes the end."""

from __future__ import annotations

import json
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.bridge.alerts import (
    MAX_LIVES,
    Life,
    WebhookError,
    is_firing,
    parse_alerts,
    parse_post,
    read_tag,
    write_tag,
    written,
)
from gradwatch.bridge.tagging import merged
from tests.bridge.conftest import alert, post

NOON = 1_769_860_800_000  # 2026-01-31T12:00:00Z, by `date -d ... +%s`


def test_a_post_is_read() -> None:
    [told], refused = parse_post(post(alert("run-1", severity="page")))
    assert (told.name, told.firing, told.starts, told.ends) == ("GradwatchClipRateHigh", True, NOON, 0)
    assert told.labels["severity"] == "page"
    assert refused == []


def test_webhook_and_api_write_times_differently_and_mean_one_alert() -> None:
    """The webhook tells nanoseconds, ``/api/v2/alerts`` milliseconds, in UTC or with an offset."""
    [exact], _ = parse_alerts([alert("r", starts="2026-01-31T12:00:00.999999999Z")])
    [coarse], _ = parse_alerts([alert("r", starts="2026-01-31T12:00:00.999Z") | {"status": {"state": "active"}}])
    [offset], _ = parse_alerts([alert("r", starts="2026-01-31T13:00:00.999+01:00")])
    assert exact.key == coarse.key == offset.key == ("00000000000000aa", NOON + 999)
    assert coarse.firing


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "not a JSON object"),
        ({"alerts": []}, "version None"),
        ({"version": "3", "alerts": []}, "version '3'"),
        ({"version": "4", "alerts": "all"}, "not a list"),
    ],
)
def test_what_is_no_post_is_refused_in_words(document: object, words: str) -> None:
    with pytest.raises(WebhookError, match=words):
        parse_post(document)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": {}}, "alertname"),
        ({"labels": {"alertname": "A", "x": 1}}, "object of strings"),
        ({"labels": {"alertname": "A"} | {f"l{i}": "" for i in range(64)}}, "more than 64"),
        ({"fingerprint": "../../etc/passwd"}, "fingerprint"),
        ({"fingerprint": None}, "fingerprint"),
        ({"status": "pending"}, "status 'pending'"),
        ({"startsAt": "yesterday"}, "startsAt"),
        ({"startsAt": "2026-01-31T12:00:00"}, "no time zone"),
        ({"startsAt": None}, "startsAt"),
    ],
)
def test_a_bad_alert_is_refused_in_words_and_the_others_are_taken(change: dict[str, Any], words: str) -> None:
    alerts, refused = parse_alerts([alert("good"), {**alert("bad"), **change}, "nonsense"])
    assert [told.labels["run"] for told in alerts] == ["good"]
    assert words in refused[0]
    assert refused[0].startswith("alerts[1]:")
    assert refused[1] == "alerts[2]: not a JSON object"


def test_an_artifact_is_named_by_fingerprint_and_start_and_is_the_same_bytes_for_the_same_alert() -> None:
    [first], _ = parse_alerts([alert("r", starts="2026-01-31T12:00:00.5Z")])
    [second], _ = parse_alerts([alert("r", starts="2026-01-31T12:00:00.500Z")])
    assert first.artifact == "alerts/00000000000000aa-20260131T120000.500Z.json"
    assert first.document() == second.document()
    told = json.loads(first.document())
    assert (told["status"], told["startsAt"], told["endsAt"]) == ("firing", "2026-01-31T12:00:00.500Z", None)
    assert told["labels"]["run"] == "r"


def test_a_tag_tells_state_times_and_steps() -> None:
    told, _ = parse_alerts([alert("r"), alert("r", firing=False)])
    key = told[0].tag
    firing = merged({key: {}}, [told[0]], 1200)[key]
    assert firing == "firing since 2026-01-31T12:00:00.000Z, step 1200 [00000000000000aa]"
    resolved = merged({key: read_tag(firing)}, [told[1]], 1500)[key]
    assert (
        resolved
        == "resolved 2026-01-31T12:00:00.000Z to 2026-01-31T12:05:00.000Z, step 1200 to step 1500 [00000000000000aa]"
    )
    assert is_firing(firing)
    assert not is_firing(resolved)


def test_of_several_series_one_that_fires_makes_the_tag_fire() -> None:
    told, _ = parse_alerts([alert("r", fingerprint="aa", firing=False), alert("r", fingerprint="bb")])
    for order in permutations(told):
        text = merged({told[0].tag: {}}, order, -1)[told[0].tag]
        assert text.startswith("firing since")
        assert set(read_tag(text)) == {"aa", "bb"}


_TOLD = st.builds(
    alert,
    st.just("r"),
    fingerprint=st.sampled_from(["aa", "bb", "cc"]),
    firing=st.booleans(),
    starts=st.sampled_from(["2026-01-31T12:00:00Z", "2026-01-31T12:02:00.25Z", "2026-01-31T12:04:00Z"]),
)


@given(st.lists(_TOLD, min_size=1, max_size=8), st.randoms(use_true_random=False), st.integers(1, 4))
def test_whatever_the_order_and_however_often_told_the_tag_ends_the_same(told: Any, random: Any, parts: int) -> None:
    """Also through text: each part is merged into what the last one wrote, as over restarts."""
    alerts, _ = parse_alerts(told)
    key = alerts[0].tag
    expected = merged({key: {}}, alerts, -1)[key]
    shuffled = [*alerts, *random.sample(alerts, len(alerts) // 2)]
    random.shuffle(shuffled)
    text = ""
    for part in range(parts):
        text = merged({key: read_tag(text)}, shuffled[part::parts], -1).get(key, text)
    assert text == expected
    newest = {a.fingerprint: max(b.starts for b in alerts if b.fingerprint == a.fingerprint) for a in alerts}
    for fingerprint, life in read_tag(text).items():
        ended = any(not a.firing and a.key == (fingerprint, newest[fingerprint]) for a in alerts)
        assert (life.starts, life.firing) == (newest[fingerprint], not ended)


@given(
    st.builds(
        Life, st.from_regex(r"[0-9a-f]{16}", fullmatch=True), st.booleans(), st.integers(1, 2**41),
        st.integers(1, 2**41), st.integers(-1, 10**9), st.integers(-1, 10**9),
    )
)  # fmt: skip
def test_a_tag_can_be_read_again(life: Life) -> None:
    life = Life(life.fingerprint, True, life.starts, 0, life.step, -1) if life.firing else life
    assert read_tag(write_tag({life.fingerprint: life})) == {life.fingerprint: life}


def test_a_tag_is_bounded_and_drops_what_is_over_first() -> None:
    lives = {f"{i:02}": Life(f"{i:02}", i % 2 == 0, NOON + i, NOON + i) for i in range(14)}
    kept = read_tag(write_tag(lives))
    assert len(kept) == MAX_LIVES
    assert {name for name, life in kept.items() if life.firing} == {f"{i:02}" for i in range(0, 14, 2)}


def test_a_tag_that_somebody_else_wrote_is_no_state() -> None:
    assert read_tag("") == read_tag("muted by Ann") == {}
    assert written(NOON + 7) == "2026-01-31T12:00:00.007Z"
