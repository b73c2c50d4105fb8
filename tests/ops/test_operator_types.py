"""Objects of prometheus-operator against the types that npm's `@kubernetes-models/prometheus-operator` publishes.

Those let unknown fields pass; they are caught by the closed schemas of `cluster_support/schemas.py`.
"""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests import services
from tests.ops.cluster_support import rendering, schemas

pytestmark = [pytest.mark.services, pytest.mark.xdist_group("operator")]

GROUP = "monitoring.coreos.com/v1"


@pytest.fixture(scope="module")
def types(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the types installed and the script that asks them."""
    npm = services.program("npm")
    directory = tmp_path_factory.mktemp("operator")
    for part in (Path(rendering.__file__).parent / "operator").iterdir():
        shutil.copy(part, directory)
    command = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts"]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return directory


def faults(types: Path, objects: list[dict[str, Any]]) -> list[str]:
    done = subprocess.run(
        [services.program("node"), "validate.mjs"],
        cwd=types, input=json.dumps(objects), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def ours() -> list[dict[str, Any]]:
    """Every object of the operator that the chart or a kustomization makes."""
    objects = [each for name in rendering.cases() for each in rendering.render(rendering.case(name))]
    objects += [each for path in rendering.kustomizations() for each in rendering.kustomize(path)]
    return [each for each in objects if each["apiVersion"] == GROUP]


def test_every_object_is_of_its_published_type(types: Path) -> None:
    objects = ours()
    assert {each["kind"] for each in objects} == {"PodMonitor", "ServiceMonitor", "PrometheusRule", "Prometheus"}
    assert faults(types, objects) == []


def changed(kind: str, change: dict[str, Any]) -> dict[str, Any]:
    thing = copy.deepcopy(next(each for each in ours() if each["kind"] == kind))
    thing["spec"] |= change
    return thing


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("PodMonitor", {"sampleLimit": "many"}),
        ("PodMonitor", {"podMetricsEndpoints": [{"interval": "soon"}]}),
        ("ServiceMonitor", {"selector": "gradwatch"}),
        ("ServiceMonitor", {"endpoints": None}),
        ("PrometheusRule", {"groups": [{"name": "x", "rules": [{"expr": "1", "for": "five minutes"}]}]}),
        ("PrometheusRule", {"groups": [{"rules": []}]}),
    ],
)
def test_a_wrong_one_is_refused(types: Path, kind: str, change: dict[str, Any]) -> None:
    [fault] = faults(types, [changed(kind, change)])
    assert fault.startswith(kind)


def test_an_unknown_field_passes_there_and_not_here(types: Path) -> None:
    thing = changed("PodMonitor", {"sampleLimits": 1})
    assert faults(types, [thing]) == []
    with pytest.raises(jsonschema.ValidationError, match="sampleLimits"):
        schemas.validate(thing, schemas.RELEASES[-1])
