"""The OpenAPI document of the bridge's HTTP, served at ``/openapi.json``."""

from __future__ import annotations

from typing import Any, Final

from gradwatch import __version__
from gradwatch.bridge.alerts import MAX_PAIRS

WEBHOOK_PATH: Final = "/webhooks/alertmanager"

_TEXT: Final = {"text/plain": {"schema": {"type": "string"}}}
_ERROR: Final = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
_PAIRS: Final = {"type": "object", "additionalProperties": {"type": "string"}, "maxProperties": MAX_PAIRS}
_COUNT: Final = {"type": "integer", "minimum": 0}


def document() -> dict[str, Any]:
    """The document, version 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "gradwatch bridge",
            "version": __version__,
            "description": "Turns MLflow's history into Prometheus metrics, and alerts into MLflow tags.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            WEBHOOK_PATH: {"post": _webhook()},
            "/healthz": {"get": _probe("health", "Whether the bridge's loop is alive.", "The poll hangs.")},
            "/readyz": {"get": _probe("readiness", "Whether MLflow can be read.", "MLflow cannot be read, and why.")},
            "/metrics": {"get": _metrics()},
            "/openapi.json": {"get": _description()},
        },
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Webhook": _post(), "Alert": _alert(), "Written": _written(), "Error": _error()},
        },
    }


def _webhook() -> dict[str, Any]:
    refusals = {
        "400": "The body is no webhook of version 4, or none of its alerts can be taken; the answer says why.",
        "401": "The bearer token is missing or wrong.",
        "403": "The bridge was started without a token for webhooks.",
        "408": "The body did not arrive in time.",
        "413": "The body is too long.",
        "503": "MLflow cannot be written to, or too many alerts wait: tell it again.",
    }
    return {
        "operationId": "takeAlerts",
        "summary": "Alertmanager's webhook, version 4",
        "description": "Answered when the alerts stand in MLflow. Telling the same again changes nothing. An alert "
        "that cannot be taken is listed in `reasons`; the others of its post are written.",
        "security": [{"token": []}],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Webhook"}}},
        },
        "responses": {
            "200": {
                "description": "Every alert is written, or will not be by telling it again.",
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Written"}}},
            },
            **{status: {"description": text, "content": _ERROR} for status, text in refusals.items()},
        },
    }


def _probe(name: str, summary: str, bad: str) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "It is.", "content": _TEXT},
            "503": {"description": bad, "content": _TEXT},
        },
    }


def _metrics() -> dict[str, Any]:
    kinds = ("text/plain", "application/openmetrics-text")
    content = {kind: {"schema": {"type": "string"}} for kind in kinds}
    summary = "Metrics as Prometheus reads them; OpenMetrics where the Accept header asks for it."
    return {
        "operationId": "metrics",
        "summary": summary,
        "responses": {"200": {"description": "The exposition.", "content": content}},
    }


def _description() -> dict[str, Any]:
    content = {"application/json": {"schema": {"type": "object"}}}
    return {
        "operationId": "openapi",
        "summary": "This document.",
        "responses": {"200": {"description": "OpenAPI 3.1.", "content": content}},
    }


def _post() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["version", "alerts"],
        "properties": {
            "version": {"const": "4"},
            "alerts": {"type": "array", "items": {"$ref": "#/components/schemas/Alert"}},
        },
    }


def _alert() -> dict[str, Any]:
    moment = {"type": "string", "format": "date-time", "examples": ["2026-01-31T12:00:00Z"]}
    return {
        "type": "object",
        "required": ["status", "labels", "startsAt", "endsAt", "fingerprint"],
        "properties": {
            "status": {"enum": ["firing", "resolved"]},
            "labels": {
                **_PAIRS,
                "description": "`run` names the run by gradwatch's id; without it, `model` (and `version`) a version.",
                "required": ["alertname"],
                "properties": {"alertname": {"type": "string", "minLength": 1}},
            },
            "annotations": _PAIRS,
            "startsAt": moment,
            "endsAt": moment,
            "generatorURL": {"type": "string"},
            "fingerprint": {"type": "string", "pattern": "^[0-9A-Za-z_-]{1,64}$"},
        },
    }


def _written() -> dict[str, Any]:
    counts = {
        "applied": "Alerts that changed what stands in MLflow.",
        "unchanged": "Alerts that were known.",
        "unknown": "Alerts about runs or models that are not in MLflow.",
        "refused": "Alerts that cannot be taken, or that MLflow refused.",
    }
    return {
        "type": "object",
        "required": [*counts, "reasons"],
        "properties": {
            **{name: {**_COUNT, "description": text} for name, text in counts.items()},
            "reasons": {"type": "array", "items": {"type": "string"}, "maxItems": 10},
        },
    }


def _error() -> dict[str, Any]:
    return {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
