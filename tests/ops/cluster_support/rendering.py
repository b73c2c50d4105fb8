"""What Helm and kustomize make of our sources, as objects."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from helm_python import Chart

ROOT = Path(__file__).parents[3]
CHART = ROOT / "helm/gradwatch"
K8S = ROOT / "k8s"

Object = dict[str, Any]


def render(values: Mapping[str, Any] | None = None, chart: Path = CHART) -> list[Object]:
    """The objects of a chart, by Helm's own engine; no cluster is asked."""
    texts = render_texts(values, chart)
    return [
        each for path, text in texts.items() if not path.endswith(".txt") for each in yaml.safe_load_all(text) if each
    ]


def render_texts(values: Mapping[str, Any] | None = None, chart: Path = CHART) -> dict[str, str]:
    with Chart.load(chart) as loaded:
        return loaded.render(dict(values or {}), name="rel", namespace="mlops")


def case(name: str) -> dict[str, Any]:
    """The values of `ci/<name>-values.yaml`."""
    return yaml.safe_load((CHART / f"ci/{name}-values.yaml").read_text()) or {}


def cases() -> list[str]:
    return sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").glob("*-values.yaml"))


def kustomize(directory: Path) -> list[Object]:
    """The objects of a kustomization, by kubectl's own kustomize."""
    kubectl = Path(sys.executable).parent / "kubectl"
    done = subprocess.run([kubectl, "kustomize", directory], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def kustomizations() -> list[Path]:
    """What a user applies: the base, every overlay, every example."""
    return [
        K8S / "base",
        *sorted(p.parent for k in ("overlays", "examples") for p in (K8S / k).glob("*/kustomization.yaml")),
    ]


def names(objects: list[Object]) -> set[tuple[str, str]]:
    return {(each["kind"], each["metadata"]["name"]) for each in objects}


def pod_specs(node: Any, path: str = "") -> Iterator[tuple[str, Object]]:
    """Every pod's spec within an object, however deep: a Job's, a JobSet's, a Ray cluster's."""
    if isinstance(node, dict):
        if isinstance(node.get("containers"), list):
            yield path, node
        for key, value in node.items():
            yield from pod_specs(value, f"{path}/{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from pod_specs(value, f"{path}/{number}")
