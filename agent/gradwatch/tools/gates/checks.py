"""What a gate says: one line a check, for people, programs, and the annotations of a CI system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal
from xml.etree import ElementTree

#: Checks of one target that people are shown: one screen, what failed first.
_SCREEN: Final = 24

Result = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was checked, how it came out, why, and what to do where it failed."""

    name: str
    result: Result
    message: str
    advice: str = ""


def judged(name: str, ok: bool, message: str, advice: str = "") -> Check:
    """A check that could be made."""
    return Check(name, "passed" if ok else "failed", message, "" if ok else advice)


def skipped(name: str, message: str) -> Check:
    """A check for which nothing is recorded, and which does not need to be."""
    return Check(name, "skipped", message)


def passes(checks: Sequence[Check]) -> bool:
    return all(check.result != "failed" for check in checks)


#: What was judged, by its name as the user wrote it.
Judgement = Mapping[str, Sequence[Check]]


def as_json(judgement: Judgement) -> list[dict[str, Any]]:
    return [
        {"target": target, "passed": passes(checks), "checks": [asdict(check) for check in checks]}
        for target, checks in judgement.items()
    ]


def as_text(judgement: Judgement) -> str:
    """For people: what failed first, with what to do about it; the rest in a line each."""
    lines = []
    order = {"failed": 0, "passed": 1, "skipped": 2}
    marks = {"failed": "FAIL", "passed": "ok  ", "skipped": "-   "}
    for target, checks in judgement.items():
        failed = sum(check.result == "failed" for check in checks)
        lines.append(f"{target}: {f'{failed} of {len(checks)} checks failed' if failed else 'passed'}")
        advised: set[str] = set()
        for check in sorted(checks, key=lambda check: order[check.result])[:_SCREEN]:
            lines.append(f"  {marks[check.result]} {check.name}: {check.message}")
            if check.advice and check.advice not in advised:
                lines.append(f"       {check.advice}")
                advised.add(check.advice)
        if len(checks) > _SCREEN:
            lines.append(f"  ... and {len(checks) - _SCREEN} more; --json lists all")
    return "\n".join(lines)


def as_junit(judgement: Judgement, suite: str) -> str:
    """JUnit XML: a suite a target, a case a check."""
    root = ElementTree.Element("testsuites", name=suite)
    for target, checks in judgement.items():
        count = {r: str(sum(c.result == r for c in checks)) for r in ("failed", "skipped")}
        element = ElementTree.SubElement(
            root, "testsuite", name=f"{suite} {target}", tests=str(len(checks)),
            failures=count["failed"], skipped=count["skipped"], errors="0",
        )  # fmt: skip
        for check in checks:
            case = ElementTree.SubElement(element, "testcase", classname=target, name=check.name)
            if check.result == "failed":
                ElementTree.SubElement(case, "failure", message=check.message).text = check.advice
            elif check.result == "skipped":
                ElementTree.SubElement(case, "skipped", message=check.message)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True)


def as_github(judgement: Judgement) -> str:
    """Workflow commands of GitHub Actions: an error for each check that failed, a notice where all passed."""
    lines = []
    for target, checks in judgement.items():
        bad = [check for check in checks if check.result == "failed"]
        for check in bad:
            title = _property(f"gradwatch: {check.name}")
            lines.append(f"::error title={title}::{_data(f'{target}: {check.message} {check.advice}'.strip())}")
        if not bad:
            lines.append(f"::notice title=gradwatch::{_data(f'{target}: passed, {len(checks)} checks')}")
    return "\n".join(lines)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
