"""The chart through Helm's own engine: what it renders, refuses and documents."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from helm_python.chart import lint
from helm_python.errors import HelmError

from k8s import generate
from tests.ops.cluster_support import schemas
from tests.ops.cluster_support.pod_security import violations
from tests.ops.cluster_support.rendering import CHART, ROOT, case, cases, names, pod_specs, render, render_texts

BRIDGE = {
    ("Deployment", "rel-gradwatch-bridge"),
    ("Service", "rel-gradwatch-bridge"),
    ("ServiceAccount", "rel-gradwatch-bridge"),
}
RULES = {("PrometheusRule", f"rel-{path.stem}") for path in (ROOT / "alerts/rules").glob("*.yaml")}
BOARDS = {("ConfigMap", f"rel-{path.stem}") for path in (ROOT / "dashboards/generated").glob("*.json")}
PARENT = """\
apiVersion: batch/v1
kind: Job
metadata: {name: train}
spec:
  template:
    metadata:
      labels:
        {{- include "gradwatch.sidecar.labels" . | nindent 8 }}
    spec:
      restartPolicy: Never
      terminationGracePeriodSeconds: {{ include "gradwatch.sidecar.gracePeriod" (dict "trainer" 120) }}
      securityContext:
        {{- include "gradwatch.sidecar.podSecurityContext" . | nindent 8 }}
      initContainers:
        {{- include "gradwatch.sidecar.container" . | nindent 8 }}
      containers:
        - name: trainer
          image: trainer:1
          env:
            {{- include "gradwatch.sidecar.trainerEnv" . | nindent 12 }}
          volumeMounts:
            {{- include "gradwatch.sidecar.trainerMounts" . | nindent 12 }}
      volumes:
        {{- include "gradwatch.sidecar.volumes" (dict "root" . "ranks" 8) | nindent 8 }}
"""


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    [found] = [each for each in objects if each["kind"] == kind]
    return found


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


DEFAULTS: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
#: Every mapping of the values with keys of ours; any resource may be asked for.
MAPPINGS = sorted(
    where
    for where in {name.rpartition(".")[0] for name in leaves(DEFAULTS)}
    if not where.endswith((".requests", ".limits"))
)


@pytest.mark.parametrize("name", cases())
def test_lint_has_nothing_to_say(name: str) -> None:
    report = lint(CHART, case(name), strict=True, quiet=False)
    assert report["total_charts_linted"] == 1
    assert (report["messages"], report["errors"]) == ([], [])


@pytest.mark.parametrize("name", cases())
def test_what_is_rendered_is_valid_in_every_release_of_kubernetes(name: str) -> None:
    objects = render(case(name))
    assert objects
    for release in schemas.RELEASES:
        for each in objects:
            schemas.validate(each, release)


@pytest.mark.parametrize("name", cases())
def test_every_pod_fits_the_level_restricted(name: str) -> None:
    for each in render(case(name)):
        for path, spec in pod_specs(each):
            assert violations(spec) == [], path
            assert spec["automountServiceAccountToken"] is False


def test_the_defaults_render_the_bridge_and_no_kind_of_an_operator() -> None:
    assert names(render()) == BRIDGE


@pytest.mark.parametrize(
    ("toggle", "added"),
    [
        ("podMonitor", {("PodMonitor", "rel-gradwatch-agents")}),
        ("serviceMonitor", {("ServiceMonitor", "rel-gradwatch-bridge")}),
        ("prometheusRule", RULES),
        ("dashboards", BOARDS),
        ("networkPolicy", {("NetworkPolicy", "rel-gradwatch-bridge")}),
    ],
)
def test_a_toggle_adds_exactly_its_objects(toggle: str, added: set[tuple[str, str]]) -> None:
    assert added
    before, after = render(), render({toggle: {"enabled": True}})
    assert names(after) == BRIDGE | added
    assert [each for each in after if (each["kind"], each["metadata"]["name"]) not in added] == before


def test_without_the_bridge_nothing_of_it_is_left() -> None:
    everything = {name: {"enabled": True} for name in ("serviceMonitor", "networkPolicy")}
    assert render(everything | {"bridge": {"enabled": False}}) == []


def test_without_an_own_service_account_the_named_one_is_used() -> None:
    objects = render({"serviceAccount": {"create": False, "name": "theirs"}})
    assert names(objects) == {each for each in BRIDGE if each[0] != "ServiceAccount"}
    assert one(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "theirs"


@pytest.mark.parametrize("name", sorted(leaves(DEFAULTS)))
def test_a_value_of_a_wrong_type_is_refused_by_its_name(name: str) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    for part in name.split("."):
        schema = schema.get("properties", {}).get(part) or schema["additionalProperties"]
    with pytest.raises(HelmError) as refused:
        render(nested(name, True if schema.get("type") != "boolean" else "certainly"))
    assert "/".join(name.split(".")) in str(refused.value) or name in str(refused.value)


@pytest.mark.parametrize("where", MAPPINGS)
def test_an_unknown_key_is_refused_by_its_name(where: str) -> None:
    with pytest.raises(HelmError, match="enabledd"):
        render(nested(f"{where}.enabledd".lstrip("."), "x"))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"bridge": {"reap": "on"}}, "prometheusUrl"),
        ({"bridge": {"grafana": {"url": "http://grafana"}}}, "existingSecret"),
        ({"bridge": {"reap": "perhaps"}}, "reap"),
        ({"sidecar": {"lingerSeconds": 46}}, "lingerSeconds"),
        ({"bridge": {"image": {"digest": "sha256:short"}}}, "digest"),
    ],
)
def test_values_that_cannot_work_are_refused_in_words(values: dict[str, Any], told: str) -> None:
    with pytest.raises(HelmError, match=told):
        render(values)


def test_the_full_case_turns_every_value_of_the_bridges_side() -> None:
    given = set(leaves(case("full")))
    untouched = {
        name for name in leaves(DEFAULTS)
        if not name.startswith("sidecar.") and not any(name == g or g.startswith(f"{name}.") for g in given)
    }  # fmt: skip
    # Named otherwise elsewhere, or exclusive with what is given.
    assert untouched == {
        "fullnameOverride",
        "bridge.enabled",
        "bridge.image.tag",
        "serviceAccount.create",
        "podMonitor.labels",
        "serviceMonitor.labels",
        "prometheusRule.labels",
    }


def test_the_bridges_settings_reach_its_command() -> None:
    container = one(render(case("full")), "Deployment")["spec"]["template"]["spec"]["containers"][0]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert env == {
        "POD_IP": None, "TMPDIR": "/tmp", "MLFLOW_TRACKING_URI": "https://mlflow.example.com",
        "GRADWATCH_BRIDGE_INTERVAL": "60", "GRADWATCH_BRIDGE_LOOK_BACK": "90", "GRADWATCH_BRIDGE_ALIASES": "live",
        "GRADWATCH_BRIDGE_ALERTMANAGER": "http://alertmanager:9093", "GRADWATCH_BRIDGE_GRACE": "40",
        "GRADWATCH_BRIDGE_PROMETHEUS": "http://prometheus:9090", "GRADWATCH_BRIDGE_GRAFANA": "http://grafana:3000",
        "GRADWATCH_BRIDGE_REAP": "on",
    }  # fmt: skip
    assert container["image"].startswith("registry.example.com/ml/bridge@sha256:")
    assert container["envFrom"] == [{"secretRef": {"name": "mlflow-credentials"}}]


def test_every_setting_is_one_that_the_bridge_and_the_agent_have() -> None:
    known = {name: (ROOT / f"agent/gradwatch/cli/{name}.py").read_text() for name in ("bridge", "agent")}
    options = re.findall(r"- (--[a-z-]+)", (CHART / "templates/deployment.yaml").read_text())
    variables = re.findall(r"GRADWATCH_BRIDGE_(\w+)", (CHART / "templates/deployment.yaml").read_text())
    assert len(options) >= 3
    assert len(variables) >= 8
    for option in [*options, *("--" + name.lower().replace("_", "-") for name in variables)]:
        assert f'"{option}"' in known["bridge"], option
    for option in re.findall(r"- --([a-z-]+)", (CHART / "templates/_sidecar.tpl").read_text()):
        assert f"    {option}: Annotated" in known["agent"] or f'"--{option}"' in known["agent"], option


def test_no_secret_is_written_and_none_is_rendered() -> None:
    for name in cases():
        assert "Secret" not in {each["kind"] for each in render(case(name))}


def test_a_change_of_settings_rolls_the_pod_and_selectors_have_no_version() -> None:
    def checksum(values: dict[str, Any]) -> str:
        template = one(render(values), "Deployment")["spec"]["template"]
        return str(template["metadata"]["annotations"]["checksum/settings"])

    assert checksum({}) != checksum({"bridge": {"intervalSeconds": 31}})
    assert checksum({}) == checksum({"service": {"port": 80}})
    selector = one(render(), "Deployment")["spec"]["selector"]["matchLabels"]
    assert set(selector) == {f"app.kubernetes.io/{part}" for part in ("name", "instance", "component")}


@pytest.mark.parametrize("name", cases())
def test_every_object_has_the_recommended_labels(name: str) -> None:
    for each in render(case(name)):
        labels = each["metadata"]["labels"]
        wanted = {f"app.kubernetes.io/{part}" for part in ("name", "instance", "version", "part-of", "managed-by")}
        assert wanted | {"helm.sh/chart"} <= set(labels)
        assert each["metadata"]["namespace"] == "mlops"


def test_the_chart_asks_for_native_sidecars() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == ">=1.29.0-0"
    from gradwatch import __version__

    assert chart["appVersion"] == __version__


def test_the_notes_tell_the_next_command() -> None:
    without = render_texts()["gradwatch/templates/NOTES.txt"]
    assert "create secret generic gradwatch-bridge" in without
    assert "port-forward service/rel-gradwatch-bridge 9465" in without
    with_token = render_texts(case("full"))["gradwatch/templates/NOTES.txt"]
    assert "create secret" not in with_token
    assert "http://rel-gw-bridge.mlops.svc:80/webhooks/alertmanager" in with_token


def test_rules_and_dashboards_are_those_of_the_sources_byte_for_byte() -> None:
    objects = render(case("operator"))
    for path in (ROOT / "dashboards/generated").glob("*.json"):
        [found] = [each for each in objects if each["metadata"]["name"] == f"rel-{path.stem}"]
        assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
        assert found["metadata"]["annotations"] == {"grafana_folder": "gradwatch"}
        assert {k: digest(v) for k, v in found["data"].items()} == {path.name: digest(path.read_text())}
        # What `kubectl apply` keeps as an annotation has the same limit as all annotations together.
        assert len(json.dumps(found).encode()) < 256 * 1024
    for path in (ROOT / "alerts/rules").glob("*.yaml"):
        [found] = [each for each in objects if each["metadata"]["name"] == f"rel-{path.stem}"]
        assert found["spec"] == yaml.safe_load(path.read_text())
        assert digest((CHART / "files/rules" / path.name).read_text()) == digest(path.read_text())


def test_generated_files_are_up_to_date() -> None:
    assert generate.main(["--check"]) == 0


def test_a_value_without_a_comment_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a\.c has no comment"):
        list(generate.value_rows("a:\n  # Said.\n  b: 1\n  c: 2\n"))


def test_schema_and_values_name_the_same_keys() -> None:
    def of_schema(node: dict[str, Any], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for key, value in node["properties"].items():
            found |= of_schema(value, f"{prefix}{key}.") if value.get("properties") else {f"{prefix}{key}"}
        return found

    schema = json.loads((CHART / "values.schema.json").read_text())
    assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
    wanted = {re.sub(r"(resources\.(requests|limits))\..*", r"\1", name) for name in leaves(DEFAULTS)}
    assert of_schema(schema) - {"global"} - {f"{p}.resources.claims" for p in ("bridge", "sidecar")} == wanted


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """A user's chart that depends on ours."""
    chart = tmp_path / "training"
    (chart / "templates").mkdir(parents=True)
    shutil.copytree(CHART, chart / "charts/gradwatch")
    dependency = {"name": "gradwatch", "version": "0.1.0", "repository": "file://../gradwatch"}
    said = {
        "apiVersion": "v2",
        "name": "training",
        "version": "9.9.9",
        "appVersion": "9.9.9",
        "dependencies": [dependency],
    }
    (chart / "Chart.yaml").write_text(yaml.safe_dump(said))
    (chart / "values.yaml").write_text("gradwatch:\n  bridge: {enabled: false}\n")
    (chart / "templates/job.yaml").write_text(PARENT)
    return chart


def test_a_users_chart_adds_the_sidecar_to_its_job(parent: Path) -> None:
    [job] = render(
        {"gradwatch": {"sidecar": {"ringMiB": 64, "port": 9999, "mlflow": {"existingSecret": "creds"}}}}, parent
    )
    for release in schemas.RELEASES:
        schemas.validate(job, release)
    template = job["spec"]["template"]
    assert template["metadata"]["labels"] == {"gradwatch/sidecar": "true"}
    spec = template["spec"]
    assert spec["terminationGracePeriodSeconds"] == 120 + 60
    assert spec["securityContext"]["fsGroup"] == 10001
    [agent] = spec["initContainers"]
    assert agent["restartPolicy"] == "Always"
    assert agent["image"] == "gradwatch/agent:0.1.0"
    assert "--listen=$(POD_IP):9999" in agent["args"]
    assert not {"startupProbe", "livenessProbe", "readinessProbe"} & set(agent)
    assert violations(spec, only="gradwatch-agent") == []
    journal, state = spec["volumes"]
    assert journal["emptyDir"] == {"medium": "Memory", "sizeLimit": f"{8 * 64 + 16}Mi"}
    assert "medium" not in state["emptyDir"]
    mounts = {mount["name"]: mount for mount in agent["volumeMounts"]}
    assert mounts["gradwatch-journal"]["readOnly"] is True
    assert mounts["gradwatch-state"].get("readOnly") is None
    [trainer] = spec["containers"]
    assert trainer["volumeMounts"] == [{"name": "gradwatch-journal", "mountPath": "/journal"}]
    assert {entry["name"] for entry in trainer["env"]} == {
        "GRADWATCH_DIR",
        "GRADWATCH_JOURNAL_MB",
        "JOB_UID",
        "JOBSET_UID",
        "JOBSET_RESTART_ATTEMPT",
        "NODE_NAME",
    }
    linger, grace = (int(arg.partition("=")[2]) for arg in agent["args"] if arg.startswith(("--linger", "--grace")))
    assert linger <= 45 < grace < 60


def test_the_users_chart_finds_its_pods_by_our_monitor(parent: Path) -> None:
    objects = render({"gradwatch": {"podMonitor": {"enabled": True}}}, parent)
    job, monitor = one(objects, "Job"), one(objects, "PodMonitor")
    labels = job["spec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()
    [port] = job["spec"]["template"]["spec"]["initContainers"][0]["ports"]
    assert monitor["spec"]["podMetricsEndpoints"][0]["port"] == port["name"]
