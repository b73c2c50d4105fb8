"""The audit: whether a training could be repeated from what was recorded, and whether its code was right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from gradwatch.catalog import FINDING
from gradwatch.tools.gates.checks import Check, judged, skipped
from gradwatch.tools.gates.evidence import Evidence, EvidenceError, Registry, evidence_of_version
from gradwatch.tools.gates.policy import Policy

_CONFIG: Final = "pass it to watch: config={%s}"
#: How what is missing comes to be recorded.
_ADVICE: Final = {
    "schedule": _CONFIG % '"schedule": "constant"' + ", or scheduler=",
    "batch size": _CONFIG % '"batch_size": 64',
    "accumulation": _CONFIG % '"accumulation_steps": 1',
    "clip threshold": "pass max_norm= to watch; for none, take it out of the policy's `require`",
    "seed": "call torch.manual_seed before watch",
    "commit": "train inside a git checkout",
    "data fingerprint": _CONFIG % '"data_fingerprint": digest' + ", or log the data set as an input of the MLflow run",
}
_ELSE: Final = "train with gradwatch.watch, which records it"


def audit(evidence: Evidence, policy: Policy) -> list[Check]:
    """A check for each piece of metadata that the policy requires, one for the groups, one for open findings."""
    missing = set(evidence.missing)
    checks = [
        judged(what, what not in missing, "is missing" if what in missing else "is recorded", _ADVICE.get(what, _ELSE))
        for what in policy.require
    ]
    if "weight decay" in policy.require:
        checks.append(_groups(evidence))
    return [*checks, _contract(evidence, policy)]


def _groups(evidence: Evidence) -> Check:
    """Each parameter group has its own decay: that of the largest says nothing of the others."""
    name = "weight decay of each group"
    groups = {".".join(key.split(".")[1:3]) for key in evidence.params if key.startswith("group.")}
    without = sorted(group for group in groups if f"group.{group}.weight_decay" not in evidence.params)
    if not groups:
        return judged(name, False, "no parameter group is recorded", _ELSE)
    told = ", ".join(f"{group} {evidence.params.get(f'group.{group}.weight_decay', '?')}" for group in sorted(groups))
    return judged(name, not without, f"missing for {', '.join(without)}" if without else told, _ELSE)


def _contract(evidence: Evidence, policy: Policy) -> Check:
    found = [f for f in evidence.findings if f.is_contract and f.code not in policy.allow_findings]
    message = "; ".join(f"{f.code}: {f.message}" for f in found) or "none is open"
    advice = " ".join(dict.fromkeys(FINDING[f.code].advice for f in found))
    return judged("contract findings", not found, message, advice)


def inventory(registry: Registry, policy: Policy) -> Iterator[tuple[str, list[Check]]]:
    """Every registered model's newest versions, each audited; one whose run is gone fails. Raises ``TrackingError``."""
    token: str | None = None
    while True:
        page = registry.models(100, token)
        for model in page.items:
            if not _standing(model):
                yield f"models:/{model.name}", [skipped("versions", "there is none")]
            for number in sorted(_standing(model), key=int, reverse=True):
                target = f"models:/{model.name}/{number}"
                try:
                    checks = audit(evidence_of_version(registry.version(model.name, number), registry), policy)
                except EvidenceError as error:
                    checks = [Check("the run behind it", "failed", str(error))]
                yield target, checks
        token = page.token
        if token is None:
            return


def _standing(model: object) -> set[str]:
    """Numbers of the versions that serve or may soon: those with an alias, and the newest of each stage."""
    aliased = {str(number) for number in (getattr(model, "aliases", None) or {}).values()}
    return aliased | {str(v.version) for v in getattr(model, "latest_versions", None) or ()}
