"""The kustomizations by kubectl itself: all is valid and confined, with the rules and dashboards of the sources."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ops.cluster_support import schemas
from tests.ops.cluster_support.pod_security import violations
from tests.ops.cluster_support.rendering import K8S, ROOT, kustomizations, kustomize, pod_specs, render
from tests.services import program

EXAMPLES = sorted(path.parent.name for path in (K8S / "examples").glob("*/kustomization.yaml"))
BUILT = {str(path.relative_to(K8S)): kustomize(path) for path in kustomizations()}
EVERY = pytest.mark.parametrize("name", sorted(BUILT))
#: Kinds that only an operator's CRDs bring.
OPERATORS = ("monitoring.coreos.com", "jobset.x-k8s.io", "trainer.kubeflow.org", "ray.io")


def pods(name: str) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{each['kind']}{path}", spec) for each in BUILT[name] for path, spec in pod_specs(each)]


def of(name: str, kind: str) -> list[dict[str, Any]]:
    return [each for each in BUILT[name] if each["kind"] == kind]


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@EVERY
def test_every_object_is_valid_in_every_release_of_kubernetes(name: str) -> None:
    assert BUILT[name]
    assert max(Counter((e["kind"], e["metadata"]["name"]) for e in BUILT[name]).values()) == 1
    for release in schemas.RELEASES:
        for each in BUILT[name]:
            schemas.validate(each, release)
        for _, spec in pods(name):
            schemas.validate_pod(spec, release)


@EVERY
def test_every_pod_fits_the_level_restricted(name: str) -> None:
    assert pods(name)
    for where, spec in pods(name):
        assert violations(spec) == [], where


@EVERY
def test_only_who_asks_kubernetes_has_a_token(name: str) -> None:
    for where, spec in pods(name):
        asks = spec.get("serviceAccountName") == "prometheus"
        assert spec["automountServiceAccountToken"] is asks, where


@EVERY
def test_secrets_are_named_and_never_written(name: str) -> None:
    assert of(name, "Secret") == []


@EVERY
def test_every_image_has_a_tag_and_none_is_latest(name: str) -> None:
    for where, spec in pods(name):
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", container["image"]), where


@EVERY
def test_no_configmap_is_too_large(name: str) -> None:
    for each in of(name, "ConfigMap"):
        assert len(json.dumps(each).encode()) < 256 * 1024, each["metadata"]["name"]


@EVERY
def test_what_a_pod_mounts_is_there(name: str) -> None:
    maps = {each["metadata"]["name"] for each in of(name, "ConfigMap")}
    for where, spec in pods(name):
        volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
        for container in [*spec.get("initContainers", ()), *spec["containers"]]:
            assert {mount["name"] for mount in container.get("volumeMounts", ())} <= set(volumes), where
        for volume in volumes.values():
            sources = [volume, *volume.get("projected", {}).get("sources", ())]
            assert {source["configMap"]["name"] for source in sources if "configMap" in source} <= maps, where


def test_the_base_is_the_bridge_and_needs_no_operator() -> None:
    kinds = Counter(each["kind"] for each in BUILT["base"])
    assert kinds == {"ConfigMap": 1, "Deployment": 1, "Service": 1, "ServiceAccount": 1}


@pytest.mark.parametrize("name", ["base", "overlays/quickstart"])
def test_no_operator_is_needed(name: str) -> None:
    assert not [each for each in BUILT[name] if each["apiVersion"].startswith(OPERATORS)]


def test_the_quickstart_has_a_server_of_each_kind() -> None:
    deployed = {each["metadata"]["name"] for each in of("overlays/quickstart", "Deployment")}
    assert deployed == {"gradwatch-bridge", "prometheus", "alertmanager", "mlflow", "grafana"}


@pytest.mark.parametrize("name", ["overlays/prometheus-operator", "overlays/production"])
def test_rules_and_dashboards_are_the_sources_and_the_charts(name: str) -> None:
    chart = render({"prometheusRule": {"enabled": True}, "dashboards": {"enabled": True}})
    in_chart = {each["metadata"]["name"].removeprefix("rel-"): each for each in chart}
    in_chart = {key: value for key, value in in_chart.items() if value["kind"] in ("PrometheusRule", "ConfigMap")}
    boards = {
        each["metadata"]["name"]: each
        for each in of(name, "ConfigMap")
        if "grafana_dashboard" in each["metadata"].get("labels", {})
    }
    rules = {each["metadata"]["name"]: each for each in of(name, "PrometheusRule")}
    sources = {
        path.stem: path
        for path in (*(ROOT / "dashboards/generated").glob("*.json"), *(ROOT / "alerts/rules").glob("*.yaml"))
    }
    assert set(boards) | set(rules) == set(sources) == set(in_chart)
    for key, board in boards.items():
        [text] = board["data"].values()
        assert digest(text) == digest(sources[key].read_text()) == digest(*in_chart[key]["data"].values())
    for key, rule in rules.items():
        assert rule["spec"] == yaml.safe_load(sources[key].read_text()) == in_chart[key]["spec"]


def test_the_quickstarts_rules_are_the_sources_byte_for_byte() -> None:
    [rules] = [
        each
        for each in of("overlays/quickstart", "ConfigMap")
        if each["metadata"]["name"].startswith("gradwatch-rules")
    ]
    assert {k: digest(v) for k, v in rules["data"].items()} == {
        path.name: digest(path.read_text()) for path in (ROOT / "alerts/rules").glob("*.yaml")
    }


@pytest.mark.services
def test_prometheus_and_alertmanager_take_the_quickstarts_settings(tmp_path: Path) -> None:
    for tool, check, name in (("promtool", "check config", "prometheus"), ("amtool", "check-config", "alertmanager")):
        [found] = [e for e in of("overlays/quickstart", "ConfigMap") if e["metadata"]["name"].startswith(name)]
        [(file, text)] = found["data"].items()
        settings = yaml.safe_load(text.replace("/etc/prometheus/rules", str(ROOT / "alerts/rules")))
        for job in settings.get("scrape_configs", ()):
            # Debian's Prometheus is built without Kubernetes' service discovery: all but that is looked at.
            if job.pop("kubernetes_sd_configs", None):
                job["static_configs"] = [{"targets": ["127.0.0.1:9460"]}]
        (tmp_path / file).write_text(yaml.safe_dump(settings))
        done = subprocess.run(
            [program(tool), *check.split(), tmp_path / file], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_the_agent_beside_each_training_container(name: str) -> None:
    directory = f"examples/{name}"
    reference = yaml.safe_load((K8S / "components/sidecar/job.yaml").read_text())["spec"]["template"]["spec"][
        "initContainers"
    ][0]
    with_agent = [spec for _, spec in pods(directory) if spec.get("initContainers")]
    [spec] = with_agent
    [agent] = spec["initContainers"]
    assert agent == reference | {"image": "gradwatch/agent:0.1.0"}
    assert spec["terminationGracePeriodSeconds"] == 30 + 60
    assert spec["securityContext"]["fsGroup"] == 10001
    [trainer] = spec["containers"]
    env = {entry["name"]: entry for entry in trainer["env"]}
    assert env["GRADWATCH_DIR"]["value"] == "/journal"
    assert {"JOB_UID", "JOBSET_UID", "GRADWATCH_JOB_UID"} & set(env)
    assert {"name": "gradwatch-journal", "mountPath": "/journal"} in trainer["volumeMounts"]
    ranks = 1 if name == "job" else 4
    sizes = {volume["name"]: volume["emptyDir"] for volume in spec["volumes"]}
    assert sizes["gradwatch-journal"] == {"medium": "Memory", "sizeLimit": f"{ranks * 32 + 16}Mi"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_monitor_finds_the_examples_pods(name: str) -> None:
    text = json.dumps(BUILT[f"examples/{name}"])
    assert '"gradwatch/sidecar": "true"' in text
    assert f"k8s/examples/{name}" in (K8S / "examples" / name / "README.md").read_text()


def test_there_is_an_example_for_each_way_to_train() -> None:
    assert EXAMPLES == ["indexed-job", "job", "jobset", "kubeflow-trainer", "ray-train"]


def test_chart_and_kustomize_agree_on_the_sidecar() -> None:
    text = (ROOT / "helm/gradwatch/templates/_sidecar.tpl").read_text()
    component = (K8S / "components/sidecar/job.yaml").read_text()
    for word in (
        "restartPolicy: Always",
        "--drain",
        "readOnly: true",
        "medium: Memory",
        "gw-metrics",
        "/var/lib/gradwatch",
    ):
        assert word in text, word
        assert word in component, word
