"""What checkov finds in every manifest, against a list of what is meant so, with the reason.

checkov brings some ninety packages, several of which fight with ours over versions: `make test` gives it an environment
of its own, `.venv-checkov`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
import yaml

from tests.ops.cluster_support.rendering import K8S, ROOT, case, cases, kustomizations, kustomize, render

#: Check: (which resources, by a part of their names; why it is meant so).
ALLOWED = {
    "CKV2_K8S_6": (".churn.", ".alertmanager.", ".grafana.", ".mlflow.", ".prometheus.", ".gradwatch-", "rel-"),
    "CKV_K8S_11": ("",),
    "CKV_K8S_15": ("",),
    "CKV_K8S_21": (".default.",),
    "CKV_K8S_22": (".churn",),
    "CKV_K8S_35": ("gradwatch-bridge", ".mlflow", "rel-"),
    "CKV_K8S_38": ("Deployment.gradwatch.prometheus",),
    "CKV_K8S_40": ("Deployment.gradwatch.grafana",),
    "CKV_K8S_43": ("",),
}
REASONS = {
    "CKV2_K8S_6": "network policies are a toggle of the chart and a component; quickstart and examples have none",
    "CKV_K8S_11": "a CPU limit throttles in bursts and delays what is measured; memory is limited, CPU is requested",
    "CKV_K8S_15": "images are named by version, so the node's copy is the same; a pull needs the registry",
    "CKV_K8S_21": "the base names no namespace; overlays and users do",
    "CKV_K8S_22": "the examples' trainer is the user's, who knows where it writes",
    "CKV_K8S_35": "MLflow reads its credentials from the environment only; the chart mounts the tokens that are ours",
    "CKV_K8S_38": "the quickstart's Prometheus looks for pods, and may do nothing else",
    "CKV_K8S_40": "Grafana's image is made for user 472",
    "CKV_K8S_43": "digests are the user's, who builds the images; the chart takes them",
}


def program() -> Path:
    """checkov, or the end of this test with a line that says how to get it."""
    own = ROOT / ".venv-checkov/bin/checkov"
    if own.exists():
        return own
    message = "needs checkov: make checkers"
    if os.environ.get("GRADWATCH_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{message}; GRADWATCH_REQUIRE_SERVICES=1 asks for it", pytrace=False)
    pytest.skip(message)


def test_checkov_finds_only_what_is_meant_so(tmp_path: Path) -> None:
    checkov = program()
    for name in cases():
        (tmp_path / f"chart-{name}.yaml").write_text(yaml.safe_dump_all(render(case(name))))
    for path in kustomizations():
        name = str(path.relative_to(K8S)).replace("/", "-")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(kustomize(path)))
    command = [
        str(checkov),
        "--framework",
        "kubernetes",
        "--skip-download",
        "--quiet",
        "--compact",
        "-o",
        "json",
        "-d",
        str(tmp_path),
    ]
    environment = {**os.environ, "LOG_LEVEL": "ERROR"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env=environment)
    report = json.loads(done.stdout)
    assert report["summary"]["passed"] > 500
    assert report["summary"]["parsing_errors"] == 0
    found = defaultdict(list)
    for failed in report["results"]["failed_checks"]:
        if not any(part in failed["resource"] for part in ALLOWED.get(failed["check_id"], ())):
            found[f"{failed['check_id']} {failed['check_name']}"].append(failed["resource"])
    assert not found
    # A line of the list that nothing needs any more goes.
    assert {failed["check_id"] for failed in report["results"]["failed_checks"]} == set(ALLOWED)


def test_every_exception_has_a_reason() -> None:
    assert set(REASONS) == set(ALLOWED)
