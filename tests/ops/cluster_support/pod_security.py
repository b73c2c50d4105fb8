"""The Pod Security level `restricted`, of what a pod's spec says (kubernetes.io, Pod Security Standards, v1.37)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

#: `volumes[*]` may be of these kinds only.
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_SECCOMP = {"RuntimeDefault", "Localhost"}
_SYSCTLS = {
    "kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range", "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time", "net.ipv4.tcp_fin_timeout", "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes", "net.ipv4.tcp_rmem", "net.ipv4.tcp_wmem",
}  # fmt: skip


def violations(spec: dict[str, Any], only: str | None = None) -> list[str]:
    """What `restricted` would refuse; with ``only``, of that container, its pod's settings aside."""
    pod = spec.get("securityContext") or {}
    containers = [c for kind in ("initContainers", "containers", "ephemeralContainers") for c in spec.get(kind) or ()]
    found = [] if only else list(_of_pod(spec, pod))
    for container in containers:
        if only is None or container["name"] == only:
            found += [f"{container['name']}: {what}" for what in _of_container(container, {} if only else pod)]
    return found


def _of_pod(spec: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield field
    for volume in spec.get("volumes") or ():
        kinds = set(volume) - {"name"}
        if not kinds <= _VOLUMES:
            yield f"volume {volume['name']} is a {', '.join(sorted(kinds - _VOLUMES))}"
    for sysctl in pod.get("sysctls") or ():
        if sysctl["name"] not in _SYSCTLS:
            yield f"sysctl {sysctl['name']}"
    if pod.get("runAsUser") == 0:
        yield "runAsUser 0"


def _of_container(container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    own = container.get("securityContext") or {}
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if own.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield "runAsNonRoot is not true"
    if own.get("runAsUser", pod.get("runAsUser")) == 0:
        yield "runAsUser 0"
    if (own.get("seccompProfile") or pod.get("seccompProfile") or {}).get("type") not in _SECCOMP:
        yield "no seccompProfile"
    capabilities = own.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or ()):
        yield "capabilities are not dropped"
    if set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}:
        yield "capabilities are added"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if any(port.get("hostPort") for port in container.get("ports") or ()):
        yield "hostPort"
