"""Every object of prometheus-operator against the schemas of its kinds; a field that no schema has is a complaint.

The schemas are those of the npm package @kubernetes-models/prometheus-operator, which `make test` brings where npm is
(`tests/ops/operator_kinds`, versions locked there).
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.ops.cluster_support.rendering import case, cases, kustomizations, kustomize, render

HERE = Path(__file__).parent / "operator_kinds"
GROUP = "monitoring.coreos.com/v1"


def complaints(objects: list[dict[str, Any]]) -> list[list[str]]:
    """What is wrong with each object; skips or fails this test where the schemas are missing."""
    node = shutil.which("node")
    if node is None or not (HERE / "node_modules/@kubernetes-models").is_dir():
        message = "needs the schemas of prometheus-operator: apt-get install nodejs npm, then make checkers"
        if os.environ.get("GRADWATCH_REQUIRE_SERVICES") == "1":
            pytest.fail(f"{message}; GRADWATCH_REQUIRE_SERVICES=1 asks for it", pytrace=False)
        pytest.skip(message)
    done = subprocess.run(
        [node, "check.mjs"], cwd=HERE, input=json.dumps(objects), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = json.loads(done.stdout)
    assert len(found) == len(objects)
    return found


@pytest.fixture(scope="module")
def objects() -> list[dict[str, Any]]:
    rendered = [each for name in cases() for each in render(case(name))]
    built = [each for path in kustomizations() for each in kustomize(path)]
    return [each for each in (*rendered, *built) if each["apiVersion"].startswith("monitoring.coreos.com/")]


def of_kind(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return copy.deepcopy(next(each for each in objects if each["kind"] == kind))


def test_every_object_is_one_that_the_operator_takes(objects: list[dict[str, Any]]) -> None:
    assert {each["kind"] for each in objects} == {"PodMonitor", "ServiceMonitor", "PrometheusRule", "Prometheus"}
    assert {each["apiVersion"] for each in objects} == {GROUP}
    found = {
        f"{each['kind']} {each['metadata']['name']}": wrong
        for each, wrong in zip(objects, complaints(objects), strict=True)
        if wrong
    }
    assert found == {}


def test_wrong_types_values_and_unknown_fields_are_told_with_their_place(objects: list[dict[str, Any]]) -> None:
    pod, service = of_kind(objects, "PodMonitor"), of_kind(objects, "ServiceMonitor")
    rule, server = of_kind(objects, "PrometheusRule"), of_kind(objects, "Prometheus")
    pod["spec"]["sampleLimit"] = "20000"
    pod["spec"]["podMetricsEndpoints"][0]["intervall"] = "15s"
    service["spec"]["sampleLimt"] = service["spec"].pop("sampleLimit")
    service["metadata"]["lables"] = {"a": "b"}
    rule["spec"]["groups"][0]["rules"][0]["for"] = "soon"
    del server["spec"]
    other = {"apiVersion": GROUP, "kind": "PodMonitors", "spec": {}}
    told = complaints([pod, service, rule, server, other])
    words = [
        ["sampleLimit", "/spec/podMetricsEndpoints/0/intervall is no field"],
        ["/metadata/lables is no field", "/spec/sampleLimt is no field"],
        ["/spec/groups/0/rules/0/for"],
        ["spec"],
        ["no kind of prometheus-operator"],
    ]
    for each, wanted in zip(told, words, strict=True):
        assert len(each) == len(wanted), each
        assert all(any(word in text for text in each) for word in wanted), each
