"""The report: its numbers against the rows that were written, and its page in a real browser."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from gradwatch.cli import main
from gradwatch.cli.findings import read_findings
from gradwatch.cli.locate import find
from gradwatch.journal import JournalError
from gradwatch.testing import FakeClock, JournalBuilder
from gradwatch.tools.report.drawing import POINTS
from gradwatch.tools.report.figures import figures
from gradwatch.tools.report.layers import COLUMNS
from gradwatch.tools.report.page import render
from gradwatch.tools.report.record import Record, read
from gradwatch.tools.report.verdict import verdict
from tests.tools.browser import browser

HOSTILE = '</script><script>document.title="hit"</script><img src=x onerror=alert(1)>'
STEPS = 3_000
TENSORS = ("embed.weight", "block.0.weight", HOSTILE)


def norms(count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).lognormal(sigma=0.4, size=count)


def write(root: Path, *, steps: int = STEPS, **more: Any) -> list[float]:
    """A run of which the loss falls, validation rises, one step in ten is clipped, and one is not finite."""
    values = norms(steps).tolist()
    threshold = float(np.percentile(values, 85))
    options: dict[str, Any] = {"model": HOSTILE, "tensors": TENSORS, "hyperparameters": {"lr": 0.1, "note": HOSTILE}}
    with JournalBuilder(root, **{**options, **more}) as journal:
        for step, norm in enumerate(values):
            broken = step == 1_234
            journal.step(
                grad_norm=math.inf if broken else norm,
                loss=2.0 - step / steps,
                clip_threshold=threshold,
                lr=0.1 * (1 - step / steps),
            )
            if step % 100 == 0:
                journal.sample([3.0, 2.0, 1.0 + step], [3e-3, 2e-3, 1e-3])
            if step % 500 == 499:
                journal.validation(loss=1.0 + step / steps, slice="")
    return values


@pytest.fixture
def record(tmp_path: Path) -> Record:
    write(tmp_path)
    return read(find(str(tmp_path)).places)


def said(record: Record, root: Path) -> list[tuple[str, str]]:
    return [(s.tone, s.text) for s in verdict(record, read_findings(find(str(root))))]


# -- the record and the verdict


def test_the_record_holds_what_was_written(tmp_path: Path) -> None:
    written = np.array(write(tmp_path))
    record = read(find(str(tmp_path)).places)
    steps = record.main
    assert len(steps) == STEPS
    whole = np.arange(STEPS) != 1_234
    np.testing.assert_array_equal(steps.step, np.arange(STEPS))
    np.testing.assert_allclose(steps.norm[whole], written[whole])
    assert np.isnan(steps.norm[1_234])
    np.testing.assert_array_equal(np.flatnonzero(steps.nonfinite), [1_234])
    np.testing.assert_allclose(steps.rates["0"], 0.1 * (1 - np.arange(STEPS) / STEPS))
    np.testing.assert_array_equal(record.tensors.sample_step, np.arange(0, STEPS, 100))
    np.testing.assert_allclose(record.tensors.update_ratio[:, 0], 1e-3, rtol=1e-6)
    np.testing.assert_allclose(
        record.tensors.grad_norm[whole[-len(record.tensors.grad_norm) :]][:, 0],
        written[-len(record.tensors.grad_norm) :][whole[-len(record.tensors.grad_norm) :]] / math.sqrt(3),
        rtol=1e-6,
    )


def test_the_verdict_says_how_it_ended_and_what_was_wrong_with_true_numbers(tmp_path: Path, record: Record) -> None:
    written = norms(STEPS)
    threshold = np.percentile(written, 85)
    clipped = (np.delete(written, 1_234) > threshold).sum() / STEPS
    sentences = said(record, tmp_path)
    assert sentences[0] == ("good", "The run finished after 3,000 steps.")
    text = "\n".join(f"{tone}: {sentence}" for tone, sentence in sentences)
    assert "nonfinite-gradient" in text
    assert f"warn: {clipped:.1%} of the steps were clipped at {threshold:.4g} (budget 10%)" in text
    assert "bad: 1 steps were taken with a gradient or loss that was not finite." in text
    assert "The training loss went from 1.95 to 0.05" not in text
    first, last = np.median(2 - np.arange(300) / STEPS), np.median(2 - np.arange(2_700, 3_000) / STEPS)
    assert f"went from {first:.4g} to {last:.4g}" in text
    [gap] = [v.gaps["loss"] for v in record.validations][-1:]
    assert f"{gap:.1%} worse on validation" in text


def test_an_end_without_a_word_and_a_restart_are_told(tmp_path: Path) -> None:
    first = JournalBuilder(tmp_path)
    for _ in range(200):
        first.step(loss=1.0)
    first.vanish()
    second = JournalBuilder(tmp_path, attempt=1, first_step=150, clock=FakeClock(1_700_001_000.0))
    for step in range(150, 300):
        second.step(loss=1.0, flags=256 if step < 200 else 0)
    second.vanish()
    record = read(find(str(tmp_path)).places)
    sentences = said(record, tmp_path)
    assert sentences[0][0] == "bad"
    assert "ended as abrupt after 300 steps" in sentences[0][1]
    assert ("warn", "The run was started again 1 time; 50 steps were trained twice.") in sentences
    assert record.restarts == [150]
    [loss] = [f.figure for f in figures(record, []) if f.name == "loss"]
    assert [shape["x0"] for shape in loss.to_dict()["layout"]["shapes"]] == [150]


def test_a_healthy_run_reads_as_one(tmp_path: Path) -> None:
    with JournalBuilder(tmp_path) as journal:
        for step, norm in enumerate(norms(300)):
            journal.step(grad_norm=float(norm), loss=1.0 - step / 300)
    record = read(find(str(tmp_path)).places)
    sentences = said(record, tmp_path)
    assert sentences[:2] == [("good", "The run finished after 300 steps."), ("good", "Nothing was found wrong.")]
    assert ("plain", "Nothing clipped the gradients.") in sentences


def test_a_run_without_a_step_has_a_report(tmp_path: Path) -> None:
    JournalBuilder(tmp_path).end()
    record = read(find(str(tmp_path)).places)
    assert said(record, tmp_path)[0] == ("good", "The run finished before its first step.")
    assert "Hyperparameters" in render(record, []) or record.facts.hyperparameters == {}


def test_each_optimizer_has_its_own_norm(tmp_path: Path) -> None:
    with JournalBuilder(tmp_path, optimizers=("policy", "value")) as journal:
        for norm in norms(100):
            journal.step(optimizer=0, grad_norm=float(norm))
            journal.step(optimizer=1, grad_norm=10 * float(norm))
    drawn = {f.name: f for f in figures(read(find(str(tmp_path)).places), [])}
    assert drawn["norm-policy"].title == "Gradient norm of policy"
    median = {name: drawn[f"norm-{name}"].figure.data[2].y for name in ("policy", "value")}
    np.testing.assert_allclose(np.array(median["value"], float), 10 * np.array(median["policy"], float), rtol=1e-4)


def test_figures_stay_small_whatever_the_run(tmp_path: Path) -> None:
    write(tmp_path, steps=20_000, tensors=[f"layer{i}.weight" for i in range(3)], capacity=16 * 2**20)
    for figure in figures(read(find(str(tmp_path)).places), []):
        for trace in figure.figure.to_dict()["data"]:
            assert len(trace["x"]) <= (COLUMNS if trace["type"] == "heatmap" else POINTS)


def test_a_curve_is_the_mean_of_its_pieces(tmp_path: Path) -> None:
    with JournalBuilder(tmp_path, capacity=16 * 2**20) as journal:
        for step in range(8_000):
            journal.step(loss=float(step))
    [loss] = [f for f in figures(read(find(str(tmp_path)).places), []) if f.name == "loss"]
    mean = next(trace for trace in loss.figure.data if trace.name == "training")
    np.testing.assert_allclose(mean.y, np.arange(8_000).reshape(800, 10).mean(axis=1), rtol=1e-4)
    np.testing.assert_array_equal(mean.x, np.arange(9, 8_000, 10))


def test_changed_hyperparameters_of_attempts_come_first(tmp_path: Path) -> None:
    JournalBuilder(tmp_path, hyperparameters={"a": 1, "weight_decay": 0.1}).end()
    JournalBuilder(tmp_path, attempt=1, hyperparameters={"a": 1, "weight_decay": 0.0}).end()
    page = render(read(find(str(tmp_path)).places), [])
    assert "<tr class=changed><td>weight_decay</td><td>0.1</td><td>0</td></tr><tr><td>a</td>" in page


# -- the command


def test_the_command_writes_the_page_or_says_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "journals")
    with pytest.raises(SystemExit) as ended:
        main(["report", "run-1", "--dir", str(tmp_path / "journals"), "--out", str(tmp_path / "r.html")])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'r.html'}\n"
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    with pytest.raises(SystemExit):
        main(["report", "run-1", "--dir", str(tmp_path / "journals"), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["verdict"][0] == {"tone": "good", "text": "The run finished after 3,000 steps."}


def test_a_page_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    JournalBuilder(tmp_path / "journals").end()
    with pytest.raises(SystemExit) as ended:
        main(["report", "run-1", "--dir", str(tmp_path / "journals"), "--out", str(tmp_path / "no" / "r.html")])
    assert ended.value.code == 2
    assert "cannot write" in capsys.readouterr().err


def test_a_damaged_rank_does_not_cost_the_report(tmp_path: Path) -> None:
    for rank in (0, 1):
        with JournalBuilder(tmp_path, rank=rank, world_size=2) as journal:
            for _ in range(30):
                journal.step(loss=1.0)
    (journal.directory / "manifest.json").write_text("{")
    assert said(read(find(str(tmp_path)).places), tmp_path)[0] == ("good", "The run finished after 30 steps.")


def test_nothing_to_report_on_is_an_error() -> None:
    with pytest.raises(JournalError):
        read([])


# -- the page


class Outside(HTMLParser):
    """Collects what a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [str(value) for name, value in attrs if name in ("src", "srcset", "data")]
        if tag == "link":
            self.loads.append(tag)


def test_the_page_loads_nothing(tmp_path: Path, record: Record) -> None:
    page = Outside()
    page.feed(render(record, read_findings(find(str(tmp_path)))))
    assert page.loads == []


@pytest.fixture
def opened(tmp_path: Path, record: Record) -> Iterator[webdriver.Chrome]:
    page = tmp_path / "report.html"
    page.write_text(render(record, read_findings(find(str(tmp_path)))))
    with browser(tmp_path / "profile") as driver:
        driver.get(page.as_uri())
        count = len(driver.find_elements(By.CLASS_NAME, "figure"))
        drawn = "return document.querySelectorAll('.figure .main-svg').length >= arguments[0]"
        WebDriverWait(driver, 60).until(lambda d: count and d.execute_script(drawn, count))
        yield driver


@pytest.mark.services
@pytest.mark.xdist_group("browser")
def test_a_reader_clicks_through_it(opened: webdriver.Chrome) -> None:
    assert opened.title == "run-1 · gradwatch", "nothing that came from the run was run"
    severe = [entry for entry in opened.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []
    verdict_ = [item.text for item in opened.find_elements(By.CSS_SELECTOR, ".verdict li")]
    assert verdict_[0] == "The run finished after 3,000 steps."

    for link in opened.find_elements(By.CSS_SELECTOR, "nav a"):
        link.click()
        anchor = str(link.get_attribute("href")).rpartition("#")[2]
        top = opened.execute_script("return document.getElementById(arguments[0]).getBoundingClientRect().top", anchor)
        bottom = opened.execute_script("return innerHeight + scrollY >= document.body.scrollHeight - 2")
        assert abs(top) < 60 or bottom, anchor

    finding = opened.find_element(By.TAG_NAME, "details")
    opened.execute_script("arguments[0].scrollIntoView({block: 'center'})", finding)
    assert "What to do:" in finding.text, "a serious finding stands open"
    finding.find_element(By.TAG_NAME, "summary").click()
    assert "What to do:" not in finding.text

    names = opened.execute_script("return [...document.querySelectorAll('.figure')].map(f => f.id)")
    assert {"figure-loss", "figure-gap", "figure-norm-default", "figure-layer-grad", "figure-weights"} <= set(names)
    rows = opened.execute_script("return document.getElementById('figure-layer-grad').data[0].y")
    assert set(rows) == set(TENSORS)


@pytest.mark.services
@pytest.mark.xdist_group("browser")
def test_it_is_readable_in_the_dark_on_paper_and_on_a_phone(opened: webdriver.Chrome) -> None:
    def media(**features: str) -> None:
        told = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": told})

    def colour() -> str:
        axis = "return document.getElementById('figure-loss').layout.font.color"
        return str(opened.execute_script(axis)).strip()

    light = colour()
    media(prefers_color_scheme="dark")
    WebDriverWait(opened, 30).until(lambda _: colour() != light)
    dark = opened.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(20, 22, 26)"
    assert contrast(opened) > 7

    phone = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    wide = "return Math.max(...[...document.querySelectorAll('.figure .main-svg')].map(s => s.clientWidth))"
    WebDriverWait(opened, 30).until(lambda d: d.execute_script(wide) <= 390)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= 390

    media(prefers_color_scheme="light")
    printed = opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})
    assert base64.b64decode(printed["data"]).startswith(b"%PDF")


def contrast(driver: webdriver.Chrome) -> float:
    """WCAG's contrast ratio of the text to its background."""
    script = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    levels = []
    for colour in driver.execute_script(script):
        channels = [int(part) / 255 for part in colour.strip("rgb()").split(",")]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        levels.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(levels) + 0.05) / (min(levels) + 0.05)
