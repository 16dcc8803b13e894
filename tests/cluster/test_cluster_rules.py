"""The rules of tests/support/cluster_rules.py reject what a cluster would reject."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml

from tests.support.cluster_rules import (
    CRDS,
    PYTORCHJOB_CRD,
    TRAINJOB_CRD,
    crd_problems,
    pod_security_problems,
    pod_specs,
    pytorchjob_webhook_problems,
    trainingruntime_problems,
    trainjob_problems,
)

needs_crds = pytest.mark.skipif(not PYTORCHJOB_CRD.exists(), reason="needs the operators' CRDs")

POD = """
securityContext: {runAsNonRoot: true, runAsUser: 1000, seccompProfile: {type: RuntimeDefault}}
containers:
  - name: pytorch
    image: trainer:1
    securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
volumes:
  - {name: shm, emptyDir: {medium: Memory}}
"""
PYTORCHJOB = """
apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata: {name: run-1}
spec:
  nprocPerNode: "8"
  pytorchReplicaSpecs:
    Master: {replicas: 1, template: {spec: {containers: [{name: pytorch, image: "trainer:1"}]}}}
    Worker: {replicas: 1, template: {spec: {containers: [{name: pytorch, image: "trainer:1"}]}}}
"""
TRAINJOB = """
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata: {name: run-1}
spec:
  runtimeRef: {apiGroup: trainer.kubeflow.org, kind: TrainingRuntime, name: canvastune}
  trainer: {image: "trainer:1", numNodes: 1, numProcPerNode: 8, env: [{name: NCCL_DEBUG, value: WARN}]}
  runtimePatches:
    - manager: canvastune.io/launcher
      trainingRuntimeSpec: {template: {spec: {replicatedJobs: [
        {name: node, template: {spec: {template: {spec: {containers: [{name: node}]}}}}}]}}}
"""
RUNTIME = """
apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainingRuntime
metadata: {name: canvastune}
spec:
  mlPolicy: {numNodes: 1, torch: {}}
  template: {spec: {replicatedJobs: [
    {name: node, template: {metadata: {labels: {trainer.kubeflow.org/trainjob-ancestor-step: trainer}},
      spec: {template: {spec: {containers: [{name: node, image: "trainer:1"}]}}}}}]}}
"""


def changed(text: str, path: str, value: Any) -> dict[str, Any]:
    """Return the document with one value changed; None removes it."""
    document: dict[str, Any] = yaml.safe_load(text)
    *branches, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    node: Any = document
    for branch in branches:
        node = node[branch] if isinstance(branch, int) else node.setdefault(branch, {})
    if value is None:
        del node[last]
    else:
        node[last] = value
    return document


def test_good_documents_pass() -> None:
    assert pod_security_problems(yaml.safe_load(POD)) == []
    assert pytorchjob_webhook_problems(yaml.safe_load(PYTORCHJOB)) == []
    assert trainjob_problems(yaml.safe_load(TRAINJOB), yaml.safe_load(RUNTIME)) == []
    assert trainingruntime_problems(yaml.safe_load(RUNTIME)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("hostNetwork", True),
        ("hostPID", True),
        ("hostIPC", True),
        ("volumes/0", {"name": "root", "hostPath": {"path": "/"}}),
        ("securityContext/runAsUser", 0),
        ("securityContext/runAsNonRoot", False),
        ("securityContext/runAsNonRoot", None),
        ("securityContext/seccompProfile", None),
        ("securityContext/seccompProfile/type", "Unconfined"),
        ("securityContext/sysctls", [{"name": "kernel.msgmax", "value": "1"}]),
        ("securityContext/seLinuxOptions", {"type": "spc_t"}),
        ("securityContext/appArmorProfile", {"type": "Unconfined"}),
        ("securityContext/windowsOptions", {"hostProcess": True}),
        ("containers/0/securityContext/privileged", True),
        ("containers/0/securityContext/allowPrivilegeEscalation", None),
        ("containers/0/securityContext/capabilities", None),
        ("containers/0/securityContext/capabilities/add", ["IPC_LOCK"]),
        ("containers/0/securityContext/procMount", "Unmasked"),
        ("containers/0/securityContext/runAsUser", 0),
        ("containers/0/ports", [{"containerPort": 80, "hostPort": 80}]),
        ("containers/0/livenessProbe", {"httpGet": {"host": "10.0.0.1", "port": 80}}),
        ("initContainers", [{"name": "setup", "image": "busybox"}]),
    ],
)
def test_a_pod_that_restricted_rejects_is_found(path: str, value: Any) -> None:
    assert pod_security_problems(changed(POD, path, value)), f"{path} = {value} went through"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata/name", "1-run"),
        ("metadata/name", "Run"),
        ("metadata/name", "r" * 64),
        ("metadata/name", "r" * 60),
        ("spec/pytorchReplicaSpecs/Master/replicas", 2),
        ("spec/pytorchReplicaSpecs/Master/replicas", None),
        ("spec/pytorchReplicaSpecs/Worker/replicas", 0),
        (
            "spec/pytorchReplicaSpecs/Chief",
            {"template": {"spec": {"containers": [{"name": "pytorch", "image": "x"}]}}},
        ),
        ("spec/pytorchReplicaSpecs/Master/template/spec/containers/0/name", "trainer"),
        ("spec/pytorchReplicaSpecs/Master/template/spec/containers/0/image", ""),
        ("spec/pytorchReplicaSpecs", {}),
        ("spec/elasticPolicy", {"nProcPerNode": 8}),
        ("spec/runPolicy", {"managedBy": "me"}),
    ],
)
def test_a_pytorchjob_that_the_webhook_rejects_is_found(path: str, value: Any) -> None:
    assert pytorchjob_webhook_problems(changed(PYTORCHJOB, path, value)), (
        f"{path} = {value} went through"
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata/name", "9"),
        ("spec/runtimeRef/name", None),
        ("spec/runtimeRef/kind", "Runtime"),
        ("spec/trainer/numProcPerNode", "8"),
        ("spec/trainer/env", [{"name": "PET_NNODES", "value": "2"}]),
        ("spec/runtimePatches/0/manager", "launcher"),
        (
            "spec/runtimePatches/0/trainingRuntimeSpec/template/spec/replicatedJobs/0/name",
            "trainer",
        ),
        (
            "spec/runtimePatches/0/trainingRuntimeSpec/template/spec/replicatedJobs/0/template/spec/template/spec/containers/0/name",
            "x",
        ),
        (
            "spec/runtimePatches/0/trainingRuntimeSpec/template/spec/replicatedJobs/0/template/spec/template/spec/containers/0/env",
            [{"name": "A", "value": "b"}],
        ),
    ],
)
def test_a_trainjob_that_the_webhook_rejects_is_found(path: str, value: Any) -> None:
    assert trainjob_problems(changed(TRAINJOB, path, value), yaml.safe_load(RUNTIME)), (
        f"{path} = {value} went through"
    )


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec/template/spec/replicatedJobs/0/replicas", 2),
        ("spec/template/spec/replicatedJobs/0/template/metadata/labels", {}),
        (
            "spec/template/spec/replicatedJobs/0/template/spec/template/spec/containers/0/name",
            "trainer",
        ),
    ],
)
def test_a_runtime_that_the_webhook_rejects_is_found(path: str, value: Any) -> None:
    assert trainingruntime_problems(changed(RUNTIME, path, value)), f"{path} = {value} went through"


@needs_crds
@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("spec/nprocPerNode", 8, "spec.nprocPerNode"),
        ("spec/runPolicy", {"ttl": 5}, "spec.runPolicy"),
        (
            "spec/pytorchReplicaSpecs/Master/restartPolicy",
            1,
            "spec.pytorchReplicaSpecs.Master.restartPolicy",
        ),
        (
            "spec/pytorchReplicaSpecs/Master/template/spec/containers/0/imagePullPolice",
            "Always",
            "containers[0]",
        ),
        ("apiVersion", "kubeflow.org/v2", "apiVersion"),
        ("kind", "TFJob", "kind"),
    ],
)
def test_crd_finds_wrong_types_and_unknown_fields(path: str, value: Any, where: str) -> None:
    assert crd_problems(yaml.safe_load(PYTORCHJOB), PYTORCHJOB_CRD) == []
    problems = crd_problems(changed(PYTORCHJOB, path, value), PYTORCHJOB_CRD)
    assert any(where in problem for problem in problems), problems


@needs_crds
def test_crds_accept_what_the_operators_ship() -> None:
    runtime = yaml.safe_load((CRDS / "runtime_torch_distributed.v2.3.0.yaml").read_text())
    assert (
        crd_problems(runtime, CRDS / "trainer.kubeflow.org_clustertrainingruntimes.v2.3.0.yaml")
        == []
    )
    assert trainingruntime_problems(runtime) == []
    assert crd_problems(yaml.safe_load(TRAINJOB), TRAINJOB_CRD) == []
    gone = copy.deepcopy(yaml.safe_load(TRAINJOB))
    gone["spec"]["podTemplateOverrides"] = gone["spec"].pop("runtimePatches")
    assert crd_problems(gone, TRAINJOB_CRD), "a field that Trainer dropped in 2.2 went through"


def test_every_pod_template_of_a_manifest_is_found() -> None:
    assert [path for path, _ in pod_specs(yaml.safe_load(PYTORCHJOB))] == [
        "spec.pytorchReplicaSpecs.Worker.template.spec",
        "spec.pytorchReplicaSpecs.Master.template.spec",
    ]
    assert len(list(pod_specs(yaml.safe_load(RUNTIME)))) == 1
    assert [path for path, _ in pod_specs({"kind": "Pod", "spec": yaml.safe_load(POD)})] == ["spec"]
