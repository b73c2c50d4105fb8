"""The OpenAPI document is true: requests made up from it find no answer that it does not describe."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.schemas import BaseSchema
from starlette.testclient import TestClient

from gradwatch.bridge.openapi import WEBHOOK_PATH, document
from gradwatch.bridge.service import Bridge
from gradwatch.bridge.web import application
from tests.bridge.conftest import TOKEN, BridgeProcess
from tests.bridge.conftest import settings as bridge_settings
from tests.services import MlflowServer, eventually

api = schemathesis.pytest.from_fixture("served")


@pytest.fixture(scope="module")
def served(mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseSchema]:
    with BridgeProcess(tmp_path_factory.mktemp("bridge"), mlflow_server.url) as bridge:
        eventually(bridge.is_ready, "MLflow was read", 60)
        yield schemathesis.openapi.from_url(f"{bridge.url}/openapi.json")


@api.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_answers_are_as_described(case: schemathesis.Case) -> None:
    case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"})


def test_the_document_lists_every_path_and_is_served() -> None:
    bridge = Bridge(bridge_settings("http://127.0.0.1:9"))
    app = application(bridge)
    assert {route.path for route in app.routes} == set(document()["paths"])  # type: ignore[attr-defined]
    # Without entering its life: nothing is started.
    assert TestClient(app).get("/openapi.json").json() == document()
    assert document()["paths"][WEBHOOK_PATH]["post"]["security"] == [{"token": []}]
