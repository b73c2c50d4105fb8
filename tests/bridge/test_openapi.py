"""The OpenAPI document is true: requests made up from it find no answer that it does not describe."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from starlette.testclient import TestClient

from gradwatch.bridge.openapi import WEBHOOK_PATH, document
from gradwatch.bridge.service import Bridge
from gradwatch.bridge.web import application
from tests.bridge.conftest import TOKEN
from tests.bridge.conftest import settings as bridge_settings
from tests.services import MlflowServer, eventually

api = schemathesis.openapi.from_dict(document())


@pytest.fixture(scope="module")
def served(mlflow_server: MlflowServer):  # type: ignore[no-untyped-def]
    bridge = Bridge(bridge_settings(mlflow_server.url, interval=3600))
    app = application(bridge)
    with TestClient(app):
        eventually(lambda: bridge.ready, "MLflow was read")
        api.app = app
        yield app


@api.parametrize()
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
def test_answers_are_as_described(case: schemathesis.Case, served: object) -> None:
    case.call_and_validate(headers={"Authorization": f"Bearer {TOKEN}"})


def test_the_document_lists_every_path_and_is_served() -> None:
    bridge = Bridge(bridge_settings("http://127.0.0.1:9"))
    app = application(bridge)
    assert {route.path for route in app.routes} == set(document()["paths"])  # type: ignore[attr-defined]
    # Without entering its life: nothing is started.
    assert TestClient(app).get("/openapi.json").json() == document()
    assert document()["paths"][WEBHOOK_PATH]["post"]["security"] == [{"token": []}]
