"""`compose.yaml`: held against the compose specification and a linter; its parts are loaded into the real programs.

No Docker engine runs here: that the containers start together was not tried.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

from tests import services
from tests.ops.cluster_support.rendering import ROOT

FILE = ROOT / "compose.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PARTS = ROOT / "docker/compose"
#: Ports inside the network, of the services that others name.
PORTS = {
    "agent": 9460, "bridge": 9465, "mlflow": 5000, "prometheus": 9090, "alertmanager": 9093, "grafana": 3000,
}  # fmt: skip


def parsed(compose: dict[str, Any]) -> PyCompose:
    """The specification's own parser, which knows no YAML anchors: they are resolved here."""
    return PyCompose.from_json(json.dumps({key: value for key, value in compose.items() if not key.startswith("x-")}))


def test_it_is_a_compose_file() -> None:
    assert set(parsed(COMPOSE).service_names()) == set(SERVICES)
    with pytest.raises(ValueError, match="depnds_on"):
        parsed({**COMPOSE, "services": {"bridge": {"image": "bridge", "depnds_on": []}}})


def lint(file: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).parent / "compose-lint", "check", file]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=file.parent)


def test_the_linter_finds_nothing_grave(tmp_path: Path) -> None:
    """By its own threshold; what is below it are digests and CPU limits, which a laptop does without."""
    done = lint(FILE)
    assert done.returncode == 0, done.stdout
    bad = tmp_path / "compose.yaml"
    bad.write_text(FILE.read_text().replace("cap_drop: [ALL]", "privileged: true"))
    assert lint(bad).returncode != 0


def test_everything_is_named_by_version_and_built_from_a_file_that_is_there() -> None:
    for name, service in SERVICES.items():
        assert re.search(r":v?\d+\.\d+", service["image"]), name
        if service["image"].startswith("gradwatch/"):
            builders = [each for each in SERVICES.values() if each["image"] == service["image"] and "build" in each]
            [builder] = builders
            assert (ROOT / builder["build"]["context"] / builder["build"]["dockerfile"]).is_file()


def test_ports_are_on_loopback_only() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(published) == 5
    assert [port for port in published if not port.startswith("127.0.0.1:")] == []


def test_what_is_mounted_exists_and_volumes_and_secrets_are_declared() -> None:
    for name, service in SERVICES.items():
        for mount in service.get("volumes", ()):
            source, _, target = mount.partition(":")
            if source.startswith("."):
                assert (ROOT / source).exists(), (name, source)
                assert target.endswith(":ro"), (name, target)
            else:
                assert source in COMPOSE["volumes"], (name, source)
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        assert set(service.get("depends_on", ())) <= set(SERVICES)
    used = {mount.partition(":")[0] for service in SERVICES.values() for mount in service.get("volumes", ())}
    assert set(COMPOSE["volumes"]) <= used


def test_secrets_are_files_that_git_ignores_and_no_image_takes_in() -> None:
    for secret in COMPOSE["secrets"].values():
        ignored = subprocess.run(["git", "check-ignore", "-q", secret["file"]], cwd=ROOT)
        assert ignored.returncode == 0
        assert f"> {secret['file']}" in FILE.read_text(), "how to make it is not told"
    context = (ROOT / ".dockerignore").read_text().splitlines()
    assert context[0] == "*"
    assert not any(line.startswith("!docker") for line in context)
    assert "password" not in str([service.get("environment") for service in SERVICES.values()]).lower().replace(
        "/run/secrets/postgres-password", ""
    ).replace("postgres_password_file", "")


def test_every_address_is_a_service_and_its_port() -> None:
    texts = [str(SERVICES), *(path.read_text() for path in PARTS.rglob("*.yml"))]
    named = {found for text in texts for found in re.findall(r"(?:https?://|\")([a-z]+):(\d{4})\b", text)}
    named.discard(("localhost", "5000"))
    assert {name for name, _ in named} >= {"agent", "bridge", "mlflow", "prometheus", "alertmanager"}
    assert {(name, int(port)) for name, port in named} <= set(PORTS.items())
    for name in ("agent", "bridge"):
        [listen] = [word for word in SERVICES[name]["command"] if word.startswith("--listen=")]
        assert listen == f"--listen=0.0.0.0:{PORTS[name]}"


@pytest.mark.parametrize("name", ["agent", "bridge"])
def test_our_programs_know_every_option(name: str) -> None:
    command = [sys.executable, "-m", "gradwatch", name, *SERVICES[name]["command"], "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    wrong = subprocess.run([*command, "--no-such-option"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2


def test_mlflow_knows_every_option() -> None:
    [line] = SERVICES["mlflow"]["command"]
    told = subprocess.run(
        [sys.executable, "-m", "mlflow", "server", "--help"], capture_output=True, text=True, timeout=120
    ).stdout
    options = re.findall(r"(--[a-z-]+)=", line)
    assert len(options) >= 5
    assert [option for option in options if option not in told] == []


def test_the_demo_takes_its_options() -> None:
    options = [sys.executable, "-m", "gradwatch.demo.train", *SERVICES["demo"]["command"], "--help"]
    assert subprocess.run(options, capture_output=True, timeout=120).returncode == 0


@pytest.mark.services
def test_prometheus_and_alertmanager_take_their_parts(tmp_path: Path) -> None:
    prometheus = (PARTS / "prometheus.yml").read_text()
    for service, inside in (("prometheus", "/etc/prometheus/prometheus.yml"), ("prometheus", "/etc/prometheus/rules")):
        assert any(mount.split(":")[1] == inside for mount in SERVICES[service]["volumes"])
    (tmp_path / "prometheus.yml").write_text(prometheus.replace("/etc/prometheus/rules", str(ROOT / "alerts/rules")))
    alertmanager = (PARTS / "alertmanager.yml").read_text()
    (tmp_path / "token").write_text("t")
    (tmp_path / "alertmanager.yml").write_text(
        alertmanager.replace("/run/secrets/webhook-token", str(tmp_path / "token"))
    )
    for tool, check, part in (("promtool", "check config", "prometheus"), ("amtool", "check-config", "alertmanager")):
        command = [services.program(tool), *check.split(), tmp_path / f"{part}.yml"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ})
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.services
def test_both_run_with_them(tmp_path: Path) -> None:
    """Prometheus finds every rule and both targets; Alertmanager has the one receiver."""
    (tmp_path / "am").mkdir()
    (tmp_path / "p").mkdir()
    text = (PARTS / "alertmanager.yml").read_text()
    with services.Alertmanager(tmp_path / "am", text) as alertmanager:
        status = alertmanager.get_json("/api/v2/status")
        assert status is not None
        assert "http://bridge:9465/webhooks/alertmanager" in status["config"]["original"]
    prometheus = services.Prometheus(tmp_path / "p", [])
    config = (PARTS / "prometheus.yml").read_text().replace("/etc/prometheus/rules", str(ROOT / "alerts/rules"))
    (tmp_path / "p" / "prometheus.yml").write_text(config)
    with prometheus:
        groups = prometheus.get_json("/api/v1/rules")["data"]["groups"]  # type: ignore[index]
        files = {Path(group["file"]).name for group in groups}
        assert files == {path.name for path in (ROOT / "alerts/rules").glob("*.yaml")}
        services.eventually(
            lambda: len(prometheus.get_json("/api/v1/targets")["data"]["activeTargets"]) == 2,  # type: ignore[index]
            "both targets",
            60,
        )


def test_grafana_is_provisioned_with_what_the_dashboards_ask_for() -> None:
    [source] = yaml.safe_load((PARTS / "grafana/datasources.yml").read_text())["datasources"]
    [provider] = yaml.safe_load((PARTS / "grafana/dashboards.yml").read_text())["providers"]
    mounts = {mount.split(":")[1]: mount.split(":")[0] for mount in SERVICES["grafana"]["volumes"]}
    assert source["type"] == "prometheus"
    assert source["url"] == "http://prometheus:9090"
    assert source["isDefault"]
    assert mounts[provider["options"]["path"]] == "./dashboards/generated"
    assert len(list((ROOT / "dashboards/generated").glob("*.json"))) >= 3
    for part in ("datasources", "dashboards"):
        assert f"/etc/grafana/provisioning/{part}/gradwatch.yml" in mounts
