"""Grafana's provisioning files, of the laptop's compose and of the kind cluster: closed schemas, and what they lead to.

Grafana reads them without a schema and passes over keys that it does not know. The schemas here are of the fields that
its documentation names and that we use ("Provision Grafana", 12.1), and of no others.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.ops.cluster_support.rendering import K8S, ROOT

PLACES = {"compose": ROOT / "docker/compose/grafana", "quickstart": K8S / "overlays/quickstart/files"}
EVERY = pytest.mark.parametrize("place", sorted(PLACES))

_TEXT, _FLAG = {"type": "string", "minLength": 1}, {"type": "boolean"}


def _closed(required: str, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object", "additionalProperties": False, "required": required.split(), "properties": properties,
    }  # fmt: skip


def _file(name: str, item: dict[str, Any]) -> dict[str, Any]:
    several = {"type": "array", "minItems": 1, "items": item}
    return _closed(f"apiVersion {name}", apiVersion={"const": 1}, **{name: several})


SCHEMAS = {
    "datasources": _file(
        "datasources",
        _closed(
            "name type access url",
            name=_TEXT,
            uid={"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,40}$"},
            type={"const": "prometheus"},
            access={"enum": ["proxy", "direct"]},
            url={"type": "string", "pattern": "^https?://[a-z-]+:[0-9]+$"},
            isDefault=_FLAG,
            editable=_FLAG,
            jsonData=_closed(
                "", timeInterval={"type": "string", "pattern": "^[0-9]+[smh]$"}, httpMethod={"enum": ["GET", "POST"]}
            ),
        ),
    ),
    "dashboards": _file(
        "providers",
        _closed(
            "name type options",
            name=_TEXT,
            folder=_TEXT,
            type={"const": "file"},
            disableDeletion=_FLAG,
            allowUiUpdates=_FLAG,
            updateIntervalSeconds={"type": "integer", "minimum": 10},
            options=_closed("path", path={"type": "string", "pattern": "^/"}),
        ),
    ),
}


def load(place: str, part: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((PLACES[place] / f"{part}.yml").read_text())
    return read


@EVERY
@pytest.mark.parametrize("part", sorted(SCHEMAS))
def test_each_file_has_fields_that_grafana_knows(place: str, part: str) -> None:
    document = load(place, part)
    jsonschema.validate(document, SCHEMAS[part])
    [(name, items)] = [(key, value) for key, value in document.items() if isinstance(value, list)]
    wrong = copy.deepcopy(document)
    wrong[name] = [{**items[0], "isdefault": True}]
    with pytest.raises(jsonschema.ValidationError, match="isdefault"):
        jsonschema.validate(wrong, SCHEMAS[part])


@EVERY
def test_the_dashboards_find_their_source(place: str) -> None:
    """Each has a variable of the kind of source that is provisioned, and there is a default one to begin with."""
    [source] = load(place, "datasources")["datasources"]
    assert source["isDefault"]
    boards = [json.loads(path.read_text()) for path in Path(ROOT / "dashboards/generated").glob("*.json")]
    assert len(boards) == 3
    for board in boards:
        kinds = {each["query"] for each in board["templating"]["list"] if each["type"] == "datasource"}
        assert kinds == {source["type"]}
