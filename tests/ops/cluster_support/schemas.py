"""Objects against their schemas: Kubernetes' own of each release, and of prometheus-operator what we use."""

from __future__ import annotations

from typing import Any

import jsonschema
import kubernetes_validate

RELEASES = [f"1.{minor}" for minor in range(29, 38)]

_TEXT, _FLAG, _COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer"}
_TEXTS = {"type": "object", "additionalProperties": _TEXT}
_DURATION = {
    "type": "string",
    "pattern": r"^(0|(([0-9]+)y)?(([0-9]+)w)?(([0-9]+)d)?(([0-9]+)h)?(([0-9]+)m)?(([0-9]+)s)?)$",
}


def _closed(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


def _list(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


_ENDPOINT = _closed(("port", "path", "interval"), port=_TEXT, path=_TEXT, interval=_DURATION, honorLabels=_FLAG)
_RULE = {
    **_closed(
        ("expr",), alert=_TEXT, record=_TEXT, expr=_TEXT, labels=_TEXTS, annotations=_TEXTS,
        keep_firing_for=_DURATION, **{"for": _DURATION},
    ),
    "oneOf": [{"required": ["alert"]}, {"required": ["record"]}],
}  # fmt: skip
_MONITOR = {
    "selector": _closed(("matchLabels",), matchLabels=_TEXTS),
    "namespaceSelector": _closed(any=_FLAG, matchNames=_list(_TEXT)),
    "sampleLimit": _COUNT,
}
#: The specs of monitoring.coreos.com/v1, of which our objects use these fields and no others.
OPERATOR = {
    "PodMonitor": _closed(
        ("selector", "podMetricsEndpoints", "sampleLimit"), **_MONITOR, podMetricsEndpoints=_list(_ENDPOINT),
        podTargetLabels=_list(_TEXT),
    ),
    "ServiceMonitor": _closed(("selector", "endpoints", "sampleLimit"), **_MONITOR, endpoints=_list(_ENDPOINT)),
    "PrometheusRule": _closed(
        ("groups",),
        groups=_list(_closed(("name", "rules"), name=_TEXT, interval=_DURATION, limit=_COUNT, rules=_list(_RULE))),
    ),
}  # fmt: skip


def validate(thing: dict[str, Any], release: str) -> None:
    """Raise where an object is none that this release of Kubernetes takes, unknown fields included.

    Kinds of other projects have no schema here, but for those of prometheus-operator; their metadata is looked at, and
    the pods in them are by who calls.
    """
    group = thing["apiVersion"].partition("/")[0]
    if thing["apiVersion"] == "monitoring.coreos.com/v1":
        if thing["kind"] in OPERATOR:
            jsonschema.validate(thing["spec"], OPERATOR[thing["kind"]])
    elif group.endswith((".x-k8s.io", ".kubeflow.org", "ray.io")) or group == "jobset.x-k8s.io":
        assert thing["spec"]
        assert thing["metadata"]["name"]
    else:
        kubernetes_validate.validate(thing, release, strict=True)


def validate_pod(spec: dict[str, Any], release: str) -> None:
    """The same for a pod's spec out of a kind of another project."""
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}
    kubernetes_validate.validate(pod, release, strict=True)
