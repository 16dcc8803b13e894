"""Check without a cluster what one would reject.

Each function returns its problems as `path: problem`; [] is valid.

Custom resources are checked against the operators' CRDs and the rules of their admission webhooks,
pods against PodSecurity `restricted`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

CRDS = Path(__file__).parents[3] / "shared" / "crds"  # only some checkouts have the operators' CRDs
PYTORCHJOB_CRD = CRDS / "kubeflow.org_pytorchjobs.v1.9.4.yaml"
TRAINJOB_CRD = CRDS / "trainer.kubeflow.org_trainjobs.v2.3.0.yaml"
TRAININGRUNTIME_CRD = CRDS / "trainer.kubeflow.org_trainingruntimes.v2.3.0.yaml"

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
# Written out again: it checks what canvastune.config.cluster lets through.
_VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
_SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ping_group_range",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.tcp_wmem",
}
_SELINUX_TYPES = {"", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}
_HANDLERS = ("httpGet", "tcpSocket")
_INITIALIZERS = {
    "dataset-initializer": "dataset-initializer",
    "model-initializer": "model-initializer",
}
_ANCESTOR = "trainer.kubeflow.org/trainjob-ancestor-step"
_TRAINER_RESERVED = {
    "PET_NNODES",
    "PET_NPROC_PER_NODE",
    "PET_NODE_RANK",
    "PET_MASTER_ADDR",
    "PET_MASTER_PORT",
}


def pod_security_problems(pod_spec: dict[str, Any]) -> list[str]:
    """Return why PodSecurity `restricted` (Kubernetes 1.34) would reject a pod, given its `spec`."""
    return list(_pod_problems(pod_spec))


def crd_problems(document: dict[str, Any], crd_path: Path) -> list[str]:
    """Return where a custom resource violates its CRD, unknown fields included: they would be
    dropped.
    """
    group, _, version = document.get("apiVersion", "").partition("/")
    crd, validators, _ = _crd(crd_path)
    if (document.get("kind"), group) != (crd["names"]["kind"], crd["group"]):
        return [
            f"kind: found {document.get('kind')} of {group!r}, expected {crd['names']['kind']} of"
            f" {crd['group']!r}"
        ]
    if version not in validators:
        return [f"apiVersion: found {version!r}, the CRD serves {', '.join(validators)}"]
    errors = sorted(
        validators[version].iter_errors(document),
        key=lambda error: list(map(str, error.absolute_path)),
    )
    return [f"{_dotted(error.absolute_path)}: {error.message[:300]}" for error in errors]


def pruned(document: dict[str, Any], crd_path: Path) -> dict[str, Any]:
    """Return a custom resource as the API server stores it: without fields that its CRD lacks."""
    version = document["apiVersion"].rpartition("/")[2]
    schema = _crd(crd_path)[2][version]
    kept = {key: document[key] for key in ("apiVersion", "kind", "metadata")}
    return {**_pruned(document, schema), **kept}


def _pruned(value: Any, schema: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_pruned(element, schema.get("items") or {}) for element in value]
    if not isinstance(value, dict) or schema.get("x-kubernetes-preserve-unknown-fields"):
        return value
    known, others = schema.get("properties") or {}, schema.get("additionalProperties")
    return {
        key: _pruned(child, known.get(key) or (others if isinstance(others, dict) else {}))
        for key, child in value.items()
        if key in known or others
    }


def pytorchjob_webhook_problems(document: dict[str, Any]) -> list[str]:
    """Return why the training operator's webhook (v1.9) would reject a PyTorchJob or its names."""
    return list(_pytorchjob_problems(document))


def trainjob_problems(document: dict[str, Any], runtime: dict[str, Any] | None = None) -> list[str]:
    """Return why Trainer's admission webhook (v2.3) would reject a TrainJob.

    Args:
        runtime: the TrainingRuntime that the job names, if patches are to be held against it.
    """
    return list(_trainjob_problems(document, runtime))


def trainingruntime_problems(document: dict[str, Any]) -> list[str]:
    """Return why Trainer's admission webhook (v2.3) would reject a TrainingRuntime."""
    return list(_runtime_problems(document))


def pod_specs(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every pod template in a manifest, with its dotted path."""
    if document.get("kind") == "Pod":
        yield "spec", document["spec"]
        return
    todo: list[tuple[str, Any]] = [("spec", document.get("spec"))]
    while todo:
        path, node = todo.pop()
        if isinstance(node, list):
            todo += [(f"{path}[{i}]", child) for i, child in enumerate(node)]
        elif isinstance(node, dict):
            if isinstance(node.get("containers"), list):
                yield path, node
            else:
                todo += [(f"{path}.{key}", child) for key, child in node.items()]


def _pod_problems(spec: dict[str, Any]) -> Iterator[str]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield f"{key}: must not be true"
    for i, volume in enumerate(spec.get("volumes") or []):
        for kind in sorted(set(volume) - {"name"} - _VOLUMES):
            yield f"volumes[{i}]: {kind} is not an allowed kind of volume"
    pod = spec.get("securityContext") or {}
    yield from _shared_context_problems("securityContext", pod)
    for sysctl in pod.get("sysctls") or []:
        if sysctl["name"] not in _SYSCTLS:
            yield f"securityContext.sysctls: {sysctl['name']} is not a safe one"
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for i, container in enumerate(spec.get(kind) or []):
            yield from _container_problems(f"{kind}[{i}] ({container.get('name')})", container, pod)


def _container_problems(path: str, container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    context = container.get("securityContext") or {}
    yield from _shared_context_problems(f"{path}.securityContext", context)
    if context.get("privileged"):
        yield f"{path}.securityContext.privileged: must not be true"
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{path}.securityContext.allowPrivilegeEscalation: must be false"
    if context.get("runAsNonRoot", pod.get("runAsNonRoot")) is not True:
        yield f"{path}.securityContext.runAsNonRoot: must be true, here or for the pod"
    seccomp = (context.get("seccompProfile") or pod.get("seccompProfile") or {}).get("type")
    if seccomp not in ("RuntimeDefault", "Localhost"):
        yield (
            f"{path}.securityContext.seccompProfile.type: found {seccomp}, must be RuntimeDefault"
            " or Localhost, here or for the pod"
        )
    capabilities = context.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or []):
        yield f"{path}.securityContext.capabilities.drop: must include ALL"
    for capability in set(capabilities.get("add") or []) - {"NET_BIND_SERVICE"}:
        yield f"{path}.securityContext.capabilities.add: {capability} is not allowed"
    if context.get("procMount", "Default") != "Default":
        yield f"{path}.securityContext.procMount: must be Default"
    for port in container.get("ports") or []:
        if port.get("hostPort"):
            yield f"{path}.ports: hostPort {port['hostPort']} is not allowed"
    lifecycle = container.get("lifecycle") or {}
    probes = {
        key: container.get(key) or {} for key in ("startupProbe", "readinessProbe", "livenessProbe")
    }
    for key, probe in {
        **probes,
        **{f"lifecycle.{hook}": lifecycle.get(hook) or {} for hook in ("postStart", "preStop")},
    }.items():
        if any((probe.get(handler) or {}).get("host") for handler in _HANDLERS):
            yield f"{path}.{key}: must not name a host"


def _shared_context_problems(path: str, context: dict[str, Any]) -> Iterator[str]:
    """Yield violations of the rules for security contexts of pods and containers."""
    if context.get("runAsUser") == 0:
        yield f"{path}.runAsUser: must not be 0"
    if context.get("runAsNonRoot") is False:
        yield f"{path}.runAsNonRoot: must not be false"
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield f"{path}.windowsOptions.hostProcess: must not be true"
    selinux = context.get("seLinuxOptions") or {}
    if selinux.get("type", "") not in _SELINUX_TYPES or selinux.get("user") or selinux.get("role"):
        yield (
            f"{path}.seLinuxOptions: must not choose a user, a role or another type than a"
            " container's"
        )
    if (context.get("appArmorProfile") or {}).get("type") == "Unconfined":
        yield f"{path}.appArmorProfile.type: must not be Unconfined"
    if (context.get("seccompProfile") or {}).get("type") == "Unconfined":
        yield f"{path}.seccompProfile.type: must not be Unconfined"


def _pytorchjob_problems(job: dict[str, Any]) -> Iterator[str]:
    spec = job.get("spec") or {}
    replicas = spec.get("pytorchReplicaSpecs") or {}
    workers = (replicas.get("Worker") or {}).get("replicas", 1) if "Worker" in replicas else 0
    yield from _name_problems(job, f"-worker-{max(workers, 1) - 1}")
    managed_by = (spec.get("runPolicy") or {}).get("managedBy")
    if managed_by not in (None, "kubeflow.org/training-operator", "kueue.x-k8s.io/multikueue"):
        yield f"spec.runPolicy.managedBy: found {managed_by!r}"
    if "elasticPolicy" in spec:
        if "Worker" not in replicas:
            yield "spec.pytorchReplicaSpecs.Worker: must be there with an elasticPolicy"
        if "nProcPerNode" in spec["elasticPolicy"] and "nprocPerNode" in spec:
            yield "spec.elasticPolicy.nProcPerNode: must not be set with spec.nprocPerNode"
    if not replicas:
        yield "spec.pytorchReplicaSpecs: must be there"
    for role, replica in replicas.items():
        path = f"spec.pytorchReplicaSpecs.{role}"
        if role not in ("Master", "Worker"):
            yield f"{path}: is neither Master nor Worker"
        if role == "Master" and replica.get("replicas") != 1:
            yield f"{path}.replicas: found {replica.get('replicas')}, must be 1"
        if role == "Worker" and replica.get("replicas", 1) < 1:
            yield f"{path}.replicas: found {replica['replicas']}, must be at least 1"
        containers = replica.get("template", {}).get("spec", {}).get("containers") or []
        if not any(container.get("name") == "pytorch" for container in containers):
            yield f"{path}.template.spec.containers: none is named pytorch"
        for i, container in enumerate(containers):
            if not container.get("image"):
                yield f"{path}.template.spec.containers[{i}].image: must be there"


def _trainjob_problems(job: dict[str, Any], runtime: dict[str, Any] | None) -> Iterator[str]:
    spec = job.get("spec") or {}
    yield from _name_problems(job, "-node-0-0")
    if not (spec.get("runtimeRef") or {}).get("name"):
        yield "spec.runtimeRef.name: must be there"
    if spec.get("runtimeRef", {}).get("kind", "ClusterTrainingRuntime") not in (
        "TrainingRuntime",
        "ClusterTrainingRuntime",
    ):
        yield f"spec.runtimeRef.kind: found {spec['runtimeRef']['kind']!r}"
    trainer = spec.get("trainer") or {}
    for key in ("numNodes", "numProcPerNode"):
        if key in trainer and (not isinstance(trainer[key], int) or trainer[key] < 1):
            yield f"spec.trainer.{key}: found {trainer[key]!r}, must be an integer of at least 1"
    for name in sorted(
        {variable["name"] for variable in trainer.get("env") or []} & _TRAINER_RESERVED
    ):
        yield f"spec.trainer.env: {name} is reserved"
    managers = [patch.get("manager") for patch in spec.get("runtimePatches") or []]
    if len(set(managers)) != len(managers):
        yield "spec.runtimePatches: two have the same manager"
    known = _containers_of(runtime) if runtime is not None else None
    for i, patch in enumerate(spec.get("runtimePatches") or []):
        path = f"spec.runtimePatches[{i}]"
        if not re.fullmatch(
            r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[^\s/]+(/[^\s/]+)*", patch.get("manager") or ""
        ):
            yield f"{path}.manager: found {patch.get('manager')!r}, must be DOMAIN/PATH"
        for replicated in ((patch.get("trainingRuntimeSpec") or {}).get("template") or {}).get(
            "spec", {}
        ).get("replicatedJobs") or []:
            yield from _patch_problems(f"{path} ({replicated['name']})", replicated, known)


def _patch_problems(
    path: str, replicated: dict[str, Any], known: dict[str, set[str]] | None
) -> Iterator[str]:
    if known is not None and replicated["name"] not in known:
        yield f"{path}: the runtime has no such job"
    pod = replicated.get("template", {}).get("spec", {}).get("template", {}).get("spec", {})
    for container in [*(pod.get("initContainers") or []), *(pod.get("containers") or [])]:
        if known is not None and container["name"] not in known.get(replicated["name"], set()):
            yield f"{path}: the runtime has no container {container['name']}"
        if container.get("env") and container["name"] in {"node", *_INITIALIZERS}:
            yield f"{path}: container {container['name']} must not have env here"


def _runtime_problems(runtime: dict[str, Any]) -> Iterator[str]:
    expected = {"trainer": "node", **_INITIALIZERS}
    ancestors = []
    for i, replicated in enumerate(runtime["spec"]["template"]["spec"]["replicatedJobs"]):
        path = f"spec.template.spec.replicatedJobs[{i}]"
        template = replicated["template"]
        ancestor = (template.get("metadata", {}).get("labels") or {}).get(_ANCESTOR)
        ancestors.append(ancestor)
        pod = template["spec"]["template"]["spec"]
        if ancestor in expected:
            if replicated.get("replicas", 1) != 1:
                yield f"{path}.replicas: must be 1"
            if expected[ancestor] not in {container["name"] for container in pod["containers"]}:
                yield f"{path}: no container is named {expected[ancestor]}"
        if pod.get("priorityClassName") and ancestor != "trainer":
            yield f"{path}: only the job of the trainer may have a priority class"
    if "trainer" not in ancestors:
        yield (
            f"spec.template.spec.replicatedJobs: none is labeled {_ANCESTOR}: trainer, so a"
            " TrainJob's trainer would be ignored"
        )


def _containers_of(runtime: dict[str, Any]) -> dict[str, set[str]]:
    return {
        replicated["name"]: {
            container["name"]
            for kind in ("initContainers", "containers")
            for container in replicated["template"]["spec"]["template"]["spec"].get(kind) or []
        }
        for replicated in runtime["spec"]["template"]["spec"]["replicatedJobs"]
    }


def _name_problems(document: dict[str, Any], suffix: str) -> Iterator[str]:
    name = document.get("metadata", {}).get("name", "")
    if not _DNS_1035.fullmatch(name):
        yield (
            f"metadata.name: {name!r} is not a DNS-1035 label: a letter, then a-z, 0-9 and '-', at"
            " most 63"
        )
    elif len(name + suffix) > 63:
        yield (
            f"metadata.name: {name!r} leaves no room for {suffix!r} in the name of a pod's host, at"
            " most 63"
        )


@functools.cache
def _crd(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return a CRD's spec, and for each served version a strict validator and its schema."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml reads 1 MB in a second
    spec = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)["spec"]
    served = [version for version in spec["versions"] if version["served"]]
    schemas = {version["name"]: version["schema"]["openAPIV3Schema"] for version in served}
    strict = {name: jsonschema.Draft7Validator(_closed(schema)) for name, schema in schemas.items()}
    return spec, strict, schemas


def _closed(schema: Any) -> Any:
    """Return the schema with `additionalProperties: false` where the API server drops unknown
    fields.
    """
    if isinstance(schema, list):
        return [_closed(child) for child in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {
        key: (
            {name: _closed(child) for name, child in value.items()}
            if key == "properties"
            else _closed(value)
        )
        for key, value in schema.items()
    }
    if (
        "properties" in schema
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        closed["additionalProperties"] = False
    return closed


def _dotted(path: Any) -> str:
    return (
        "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
        or "(top)"
    )
