"""The hosts that MLflow answers to in the manifests: who asks it there, the kubelet's probe, and nobody else."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from tests.ops.cluster_support.rendering import K8S, ROOT, kustomize, pod_specs
from tests.services import MlflowServer


def allowed_hosts() -> dict[str, str]:
    """The option, by the place that has it."""
    found = {"compose": str(yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["mlflow"]["command"])}
    for name in ("quickstart", "production"):
        [spec] = [
            spec
            for each in kustomize(K8S / "overlays" / name)
            for _, spec in pod_specs(each)
            if each["kind"] == "Deployment" and each["metadata"]["name"] == "mlflow"
        ]
        found[name] = " ".join(spec["containers"][0]["args"])
    return {name: text.partition("--allowed-hosts=")[2].split("'")[0].split()[0] for name, text in found.items()}


class Guarded(MlflowServer):
    """An MLflow that answers to these hosts only."""

    def __init__(self, directory: Path, hosts: str) -> None:
        super().__init__(directory)
        self._hosts = hosts

    def arguments(self, port: int) -> Sequence[str]:
        return [*super().arguments(port), f"--allowed-hosts={self._hosts}"]

    def status(self, host: str, path: str, body: object = None) -> int:
        """The status of an answer to a request that names this host."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Host": host, "Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


def test_all_manifests_name_their_hosts() -> None:
    hosts = {name: set(text.split(",")) for name, text in allowed_hosts().items()}
    assert all(names >= {"mlflow:5000", "localhost:5000", "127.0.0.1:5000"} for names in hosts.values())
    assert hosts["quickstart"] == hosts["production"] == hosts["compose"] | {"mlflow.gradwatch.svc:5000"}


def test_the_probe_and_who_asks_by_name_are_answered_and_nobody_else(tmp_path: Path) -> None:
    search = "/api/2.0/mlflow/experiments/search"
    with Guarded(tmp_path / "mlflow", allowed_hosts()["quickstart"]) as mlflow:
        # The kubelet asks at the pod's IP.
        assert mlflow.status("10.1.2.3:5000", "/health") == 200
        for host in ("mlflow:5000", "mlflow.gradwatch.svc:5000", "localhost:5000"):
            assert mlflow.status(host, search, {"max_results": 1}) == 200, host
        # A page in somebody's browser that has its own name point here.
        assert mlflow.status("rebound.example.com", search, {"max_results": 1}) == 403


@pytest.mark.parametrize("name", ["quickstart", "production"])
def test_our_own_parts_ask_by_a_name_that_is_answered(name: str) -> None:
    hosts = set(allowed_hosts()[name].split(","))
    objects = kustomize(K8S / "overlays" / name)
    [settings] = [
        each["data"]
        for each in objects
        if each["kind"] == "ConfigMap" and each["metadata"]["name"].startswith("gradwatch-bridge")
    ]
    assert settings["MLFLOW_TRACKING_URI"].removeprefix("http://") in hosts
