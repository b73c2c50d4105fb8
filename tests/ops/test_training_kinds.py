"""JobSets, TrainJobs and training runtimes against the models that Kubeflow publishes of its API and of JobSet's.

Those drop a field that they do not know: what is not in an object any more after a turn through its model is told.
KubeRay publishes no schema in any registry: of the RayJob only the pods are looked at (`test_kustomize.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
from kubeflow_trainer_api import models
from pydantic import ValidationError

from tests.ops.cluster_support.rendering import K8S, kustomize

MODELS: dict[str, Any] = {
    "jobset.x-k8s.io/v1alpha2 JobSet": models.JobsetV1alpha2JobSet,
    "trainer.kubeflow.org/v1alpha1 ClusterTrainingRuntime": models.TrainerV1alpha1ClusterTrainingRuntime,
    "trainer.kubeflow.org/v1alpha1 TrainJob": models.TrainerV1alpha1TrainJob,
}


def ours() -> dict[str, dict[str, Any]]:
    """The object of each kind, of which the examples have one each."""
    built = [each for name in ("jobset", "kubeflow-trainer") for each in kustomize(K8S / "examples" / name)]
    return {f"{each['apiVersion']} {each['kind']}": each for each in built}


def dropped(before: Any, after: Any, where: str = "") -> Iterator[str]:
    """The topmost fields of ``before`` that ``after`` has not."""
    if isinstance(before, dict):
        for key, value in before.items():
            if not isinstance(after, dict) or key not in after:
                yield f"{where}/{key}"
            else:
                yield from dropped(value, after[key], f"{where}/{key}")
    elif isinstance(before, list):
        for number, value in enumerate(before):
            yield from dropped(value, after[number], f"{where}/{number}")


def unknown(kind: str, thing: dict[str, Any]) -> list[str]:
    """Fields that the kind does not have; raises ``ValidationError`` where a field is wrong or missing."""
    return list(dropped(thing, MODELS[kind].from_dict(copy.deepcopy(thing)).to_dict()))


def test_each_kind_is_as_its_project_publishes_it() -> None:
    objects = ours()
    assert set(objects) == set(MODELS)
    assert {kind: unknown(kind, thing) for kind, thing in objects.items()} == {kind: [] for kind in MODELS}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_field_that_the_kind_has_not_is_told_with_its_place(kind: str) -> None:
    thing = copy.deepcopy(ours()[kind])
    thing["spec"]["replicatedJobz"] = []
    thing["metadata"]["lables"] = {"a": "b"}
    assert sorted(unknown(kind, thing)) == ["/metadata/lables", "/spec/replicatedJobz"]


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_a_wrong_type_is_refused(kind: str) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "JobSet": {"replicatedJobs": [{"name": "workers", "replicas": "one", "template": {}}]},
        "ClusterTrainingRuntime": {"mlPolicy": {"numNodes": "two"}, "template": {}},
        "TrainJob": {"runtimeRef": {"name": "torch-gradwatch"}, "trainer": {"numNodes": "two"}},
    }
    with pytest.raises(ValidationError):
        unknown(kind, ours()[kind] | {"spec": wrong[kind.split()[1]]})
