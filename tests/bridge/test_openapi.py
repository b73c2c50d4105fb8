"""The OpenAPI document is true: requests made up from it find no answer that it does not describe."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import negative_data_rejection
from starlette.testclient import TestClient

from gradwatch.bridge.openapi import WEBHOOK_PATH, document
from gradwatch.bridge.service import Bridge
from gradwatch.bridge.web import application
from tests.bridge.conftest import TOKEN, BridgeProcess
from tests.bridge.conftest import settings as bridge_settings
from tests.services import MlflowServer, eventually

#: Requests for each path and mode.
EXAMPLES = 40


@pytest.fixture(scope="module")
def served(mlflow_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BaseSchema]:
    with BridgeProcess(tmp_path_factory.mktemp("bridge"), mlflow_server.url) as bridge:
        eventually(bridge.is_ready, "MLflow was read", 60)
        yield schemathesis.openapi.from_url(f"{bridge.url}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", sorted(set(document()["paths"]) - {"/openapi.json"}))
def test_answers_are_as_described(served: BaseSchema, path: str, mode: GenerationMode) -> None:
    """As the document allows, and as it does not: every check that schemathesis has, at each path."""
    [operation] = [one for result in served.get_all_operations() if (one := result.ok()).path == path]

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        answer = case.call(headers={"Authorization": f"Bearer {TOKEN}"})
        # One bad alert among good ones is refused by itself, in words; only then may a bad post be answered with 200.
        some = answer.status_code == 200 and path == WEBHOOK_PATH and answer.json()["refused"] > 0
        case.validate_response(answer, excluded_checks=[negative_data_rejection] if some else None)

    try:
        check()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE, "nothing can be made up from the document"
        assert path != WEBHOOK_PATH, "a path without parameters has nothing to be wrong about; the webhook has"


def test_the_document_lists_every_path_and_is_served() -> None:
    bridge = Bridge(bridge_settings("http://127.0.0.1:9"))
    app = application(bridge)
    assert {route.path for route in app.routes} == set(document()["paths"])  # type: ignore[attr-defined]
    # Without entering its life: nothing is started.
    assert TestClient(app).get("/openapi.json").json() == document()
    assert document()["paths"][WEBHOOK_PATH]["post"]["security"] == [{"token": []}]
