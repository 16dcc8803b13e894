"""Rendered jobs pass the operators' CRDs and webhooks and PodSecurity restricted, and follow the
config.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from inline_snapshot import snapshot

from canvastune.config import RunConfig, load_config, parse_config
from canvastune.errors import UserError, format_error
from components.jobs.backends import SPEC_HASH, JobContext, manifest
from components.jobs.pod_spec import RUN_ID, STEP_ONLY
from tests.support import cluster_rules, cluster_stage

CONTEXT = dataclasses.replace(
    cluster_stage.CONTEXT,
    run_id="6c9d5e1e-7a0e-4a3e-9f4e-0a3b7a1f9c11",
    mlflow=("--mlflow-run", "abc"),
    environment={"MLFLOW_TRACKING_URI": "http://mlflow:5000"},
    owner={"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "flow", "uid": "u"},
)
TASK: dict[str, Any] = {  # the fields of dsl.TaskConfig, with the claim that the pipeline mounts
    "resources": {"limits": {"memory": "700Gi"}, "requests": {"cpu": "90"}},
    "tolerations": [{"key": "team", "operator": "Equal", "value": "a", "effect": "NoSchedule"}],
    "node_selector": {"zone": "b"},
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}]
            }
        }
    },
    "env": [
        {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}},
        {"name": "NCCL_DEBUG", "value": "INFO"},
    ],
    "volumes": [
        {"name": "claim-a", "persistentVolumeClaim": {"claimName": "claim-a"}},
        {"name": "data", "secret": {"secretName": "ca"}},
    ],
    "volume_mounts": [
        {"name": "claim-a", "mountPath": "/workspace"},
        {"name": "data", "mountPath": "/etc/ca"},
    ],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "image": {
        "image": "registry.example/team/trainer@sha256:" + "0" * 64,
        "pull_secrets": ["registry"],
    },
    "resources": {"cpu": 32, "memory": "512Gi", "shm": "32Gi"},
    "cpu only": {"gpu_resource": None},
    "other gpu": {"gpu_resource": "amd.com/gpu"},
    "placed": {
        "node_selector": {"nvidia.com/gpu.product": "H100"},
        "tolerations": [{"key": "a"}, {"key": "b", "operator": "Equal", "value": "c"}],
    },
    "kueue": {"queue": "team-a", "priority_class": "high"},
    "account": {"service_account": "trainer"},
    "rdma": {
        "rdma_resource": "rdma/hca_shared_devices_a",
        "rdma_count": 8,
        "env": {"NCCL_IB_HCA": "mlx5"},
    },
    "secrets": {"secret_env": {"HF_TOKEN": {"secret": "hf", "key": "token"}}},
    "credentials": {"credentials": "team"},
    "no group": {"fs_group": None},
    "folder": {"sub_path": "team/a"},
    "limits": {"cpu": 32, "resources": {"limits": {"cpu": 32, "memory": "512Gi"}}},
    "company": {
        "ca_bundle": {"config_map": "company-ca", "key": "ca.crt"},
        "affinity": TASK["affinity"],
        "extra_volumes": [
            {"name": "scratch", "emptyDir": {"sizeLimit": "1Ti"}},
            {"name": "lake", "persistentVolumeClaim": {"claimName": "lake", "readOnly": True}},
        ],
        "extra_volume_mounts": [
            {"name": "scratch", "mountPath": "/scratch"},
            {"name": "lake", "mountPath": "/lake", "readOnly": True},
        ],
    },
    "ends": {"deadline_hours": 1.5, "ttl_hours": None, "restarts": 0},
}
BOTH = pytest.mark.parametrize("backend", ["pytorchjob", "trainjob"])


def config_of(backend: str, nodes: int = 1, gpus: int = 8, **cluster: Any) -> RunConfig:
    section = {"backend": backend, "nodes": nodes, "claim": "claim-a", **cluster}
    return parse_config(
        {
            "name": "gsm8k_lora",
            "data": {"source": "x"},
            "parallel": {"nproc_per_node": gpus},
            "cluster": section,
        }
    )


def pods_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pods that an operator creates for a job; a TrainJob's with the fields of its
    trainer.
    """
    if job["kind"] == "PyTorchJob":
        return [
            replica["template"]["spec"] for replica in job["spec"]["pytorchReplicaSpecs"].values()
        ]
    (replicated,) = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"][
        "replicatedJobs"
    ]
    pod, trainer = replicated["template"]["spec"]["template"]["spec"], job["spec"]["trainer"]
    own = {
        "image": trainer["image"],
        "command": trainer["command"],
        "env": trainer["env"],
        "resources": trainer["resourcesPerNode"],
    }
    return [{**pod, "containers": [{**pod["containers"][0], **own}]}]


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = pods_of(job)[0]["containers"]
    return container


def problems_of(job: dict[str, Any]) -> list[str]:
    problems = [
        problem for pod in pods_of(job) for problem in cluster_rules.pod_security_problems(pod)
    ]
    crd = (
        cluster_rules.PYTORCHJOB_CRD if job["kind"] == "PyTorchJob" else cluster_rules.TRAINJOB_CRD
    )
    if crd.exists():  # only some checkouts have the operators' CRDs
        problems += cluster_rules.crd_problems(job, crd)
    webhook = (
        cluster_rules.pytorchjob_webhook_problems
        if job["kind"] == "PyTorchJob"
        else cluster_rules.trainjob_problems
    )
    return problems + webhook(job)


@BOTH
@pytest.mark.parametrize(("nodes", "gpus"), [(1, 8), (2, 8), (1, 4)])
def test_a_job_of_any_size_is_accepted(backend: str, nodes: int, gpus: int) -> None:
    job = manifest(config_of(backend, nodes, gpus), CONTEXT)
    assert problems_of(job) == []
    assert container_of(job)["resources"]["limits"]["nvidia.com/gpu"] == str(gpus)
    spec = job["spec"]
    if backend == "pytorchjob":
        assert spec["nprocPerNode"] == str(gpus)
        replicas = {
            name: replica["replicas"] for name, replica in spec["pytorchReplicaSpecs"].items()
        }
        assert replicas == {"Worker": nodes}, (
            "with a Master, the operator adds a container that runs as root"
        )
        given = {entry["name"]: entry for entry in container_of(job)["env"]}
        assert given["PET_MASTER_ADDR"]["value"] == "$(CANVASTUNE_JOB)-worker-0"
        assert given["PET_NODE_RANK"]["valueFrom"] == {
            "fieldRef": {"fieldPath": "metadata.labels['training.kubeflow.org/replica-index']"}
        }
    else:
        assert (spec["trainer"]["numNodes"], spec["trainer"]["numProcPerNode"]) == (nodes, gpus)


@BOTH
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("task", [{}, TASK], ids=["", "task"])
def test_every_option_is_accepted(backend: str, option: str, task: dict[str, Any]) -> None:
    if task and (folder := OPTIONS[option].get("sub_path")):  # the task mounts the same
        mount = {**TASK["volume_mounts"][0], "subPath": folder}
        task = {**TASK, "volume_mounts": [mount, TASK["volume_mounts"][1]]}
    assert problems_of(manifest(config_of(backend, 2, **OPTIONS[option]), CONTEXT, task)) == []


def test_scheduler_and_priority_of_a_pytorchjob_are_the_pods() -> None:
    job = manifest(config_of("pytorchjob", scheduler="volcano", priority_class="high"), CONTEXT)
    assert problems_of(job) == []
    assert (pods_of(job)[0]["schedulerName"], pods_of(job)[0]["priorityClassName"]) == (
        "volcano",
        "high",
    )


@BOTH
def test_a_queue_and_its_priority_are_labels(backend: str) -> None:
    job = manifest(config_of(backend, queue="team-a", priority_class="high"), CONTEXT)
    labels = job["metadata"]["labels"]
    assert (labels["kueue.x-k8s.io/queue-name"], labels["kueue.x-k8s.io/priority-class"]) == (
        "team-a",
        "high",
    )
    assert labels[RUN_ID] == CONTEXT.run_id
    assert "priorityClassName" not in pods_of(job)[0]


@BOTH
def test_the_pods_run_the_command_that_a_user_would(backend: str) -> None:
    command = " ".join(container_of(manifest(config_of(backend), CONTEXT))["command"])
    assert (
        command
        == "python -m torch.distributed.run --shutdown-timeout=60 --tee=3 -m canvastune.train -c"
        " /workspace/runs/a/train/recipe.yaml --output /workspace/runs/a/train --mlflow-run abc"
    )


@BOTH
def test_what_is_set_on_the_task_reaches_the_pods(backend: str) -> None:
    job = manifest(config_of(backend, claim=None, cpu="32", memory="512Gi"), CONTEXT, TASK)
    pod, container = pods_of(job)[0], container_of(job)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8", "memory": "700Gi"}
    assert container["resources"]["requests"] == {
        "cpu": "90",
        "nvidia.com/gpu": "8",
        "memory": "512Gi",
    }
    assert pod["nodeSelector"] == {"zone": "b"}
    assert pod["affinity"] == TASK["affinity"]
    assert TASK["tolerations"][0] in pod["tolerations"]
    env = {entry["name"]: entry for entry in container["env"]}
    assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "hf"
    assert env["NCCL_DEBUG"]["value"] == "INFO"
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    claims = {
        volume["name"]: volume.get("persistentVolumeClaim", {}).get("claimName")
        for volume in pod["volumes"]
    }
    assert claims[mounts["/workspace"]] == "claim-a"
    assert "/etc/ca" in mounts


@BOTH
def test_what_has_only_a_limit_requests_it(backend: str) -> None:
    """Kueue would count the default of a LimitRange instead (kubernetes-sigs/kueue#15020)."""
    limits = {"cpu": "32", "ephemeral-storage": "100Gi"}
    config = config_of(backend, cpu=None, memory="512Gi", resources={"limits": limits})
    resources = container_of(manifest(config, CONTEXT))["resources"]
    assert resources["requests"] == resources["limits"]
    assert limits.items() < resources["limits"].items()


@BOTH
def test_limits_volumes_and_the_company_s_certificates_reach_the_pods(backend: str) -> None:
    job = manifest(config_of(backend, **OPTIONS["company"], **OPTIONS["limits"]), CONTEXT)
    pod, container = pods_of(job)[0], container_of(job)
    assert container["resources"]["limits"]["cpu"] == "32"
    assert pod["affinity"] == TASK["affinity"]
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "GIT_SSL_CAINFO"):
        assert env[name] == "/etc/canvastune-ca/ca.crt"
    paths = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[paths["/etc/canvastune-ca"]]["configMap"] == {"name": "company-ca"}
    assert volumes[paths["/lake"]]["persistentVolumeClaim"]["claimName"] == "lake"


@BOTH
def test_what_the_steps_have_stays_off_the_training_pods(backend: str) -> None:
    mark = {"env": ["HTTPS_PROXY"], "mounts": ["/etc/canvastune-ca"]}
    task = {
        "env": [
            {"name": "HTTPS_PROXY", "value": "http://proxy"},
            {"name": STEP_ONLY, "value": json.dumps(mark)},
            {"name": "OTHER", "value": "1"},
        ],
        "volumes": [{"name": "ca", "configMap": {"name": "ca"}}, TASK["volumes"][0]],
        "volume_mounts": [
            {"name": "ca", "mountPath": "/etc/canvastune-ca"},
            TASK["volume_mounts"][0],
        ],
        "node_selector": {"pool": "cpu"},
        "resources": {"limits": {"cpu": "1"}},
        "tolerations": [{"key": "steps"}],
    }
    job = manifest(config_of(backend, claim=None), CONTEXT, task)
    names = {entry["name"] for entry in container_of(job)["env"]}
    assert not names & {"HTTPS_PROXY", STEP_ONLY}
    assert "OTHER" in names
    pod = pods_of(job)[0]
    assert {volume["name"] for volume in pod["volumes"]} == {"shm", "tmp", "workspace"}
    assert "nodeSelector" not in pod
    assert "cpu" not in container_of(job)["resources"]["limits"]
    assert {"key": "steps"} not in pod["tolerations"]


@BOTH
def test_a_name_or_a_path_that_is_taken_is_refused(backend: str) -> None:
    volumes = [{"name": "tmp", "emptyDir": {}}]
    with pytest.raises(UserError, match=r"cluster\.extra_volumes: tmp\b"):
        manifest(config_of(backend, extra_volumes=volumes), CONTEXT)


@BOTH
def test_a_task_without_settings_changes_nothing(backend: str) -> None:
    assert manifest(config_of(backend), CONTEXT, dict.fromkeys(TASK)) == manifest(
        config_of(backend), CONTEXT
    )


@BOTH
def test_shared_memory_grace_and_sidecar_are_what_training_needs(backend: str) -> None:
    job = manifest(config_of(backend, shm="32Gi"), CONTEXT)
    pod = pods_of(job)[0]
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "32Gi"}} in pod["volumes"]
    assert pod["terminationGracePeriodSeconds"] > 60, "killed before the state is saved"
    assert json.dumps(job).count('"sidecar.istio.io/inject": "false"') >= 2
    for autoscaler in ("autoscaler.kubernetes.io/safe-to-evict", "karpenter.sh/do-not-disrupt"):
        assert autoscaler in json.dumps(job), "the node of a running job is removed"
    assert job["metadata"]["ownerReferences"] == [CONTEXT.owner]


@BOTH
def test_a_secrets_value_is_never_in_a_manifest(backend: str) -> None:
    env = container_of(
        manifest(
            config_of(backend, secret_env={"HF_TOKEN": {"secret": "hf", "key": "token"}}), CONTEXT
        )
    )["env"]
    assert {
        "name": "HF_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}},
    } in env


@BOTH
def test_credentials_are_optional_and_yield_to_a_secret_that_the_config_names(backend: str) -> None:
    passed = {
        "name": "HF_TOKEN",
        "valueFrom": {
            "secretKeyRef": {"name": "canvastune-credentials", "key": "HF_TOKEN", "optional": True}
        },
    }

    def token(**cluster: Any) -> str:
        env = container_of(manifest(config_of(backend, **cluster), CONTEXT, {"env": [passed]}))[
            "env"
        ]
        (found,) = [
            entry["valueFrom"]["secretKeyRef"]["name"]
            for entry in env
            if entry["name"] == "HF_TOKEN"
        ]
        return str(found)

    assert token() == "canvastune-credentials"
    assert token(credentials="team") == "team"
    assert (
        token(credentials="team", secret_env={"HF_TOKEN": {"secret": "own", "key": "token"}})
        == "own"
    )


@BOTH
def test_a_name_depends_on_the_run_and_on_the_spec(backend: str) -> None:
    def name(config: RunConfig, **context: Any) -> str:
        job = manifest(config, JobContext(**{**CONTEXT.__dict__, **context}))
        assert job["metadata"]["name"].endswith(job["metadata"]["annotations"][SPEC_HASH][:8])
        return job["metadata"]["name"]

    first = name(config_of(backend))
    assert first == name(config_of(backend), mlflow=(), environment={}), (
        "MLflow being down makes another job"
    )
    assert (
        len({first, name(config_of(backend), run_id="other"), name(config_of(backend, cpu="4"))})
        == 3
    )
    long = config_of(backend).model_copy(update={"name": "a" * 50})
    assert len(name(long)) <= 48
    assert len(name(long, role="evaluate")) <= 48
    assert name(config_of(backend), role="evaluate").startswith("evaluate-gsm8k-lora-")


def test_contradictions_are_refused() -> None:
    def refusal(config: RunConfig, task: dict[str, Any] | None = None) -> str:
        with pytest.raises(UserError) as error:
            manifest(config, CONTEXT, task)
        return format_error(error.value)

    assert refusal(config_of("pytorchjob", claim=None)) == snapshot("""\
canvastune: error: the training pods would not see /workspace/runs/a/train: they mount no volume
  hint: Mount the workspace's claim in the train step, or set cluster.claim and cluster.mount_path.\
""")
    assert refusal(config_of("pytorchjob", claim="other"), TASK) == snapshot("""\
canvastune: error: cluster.claim: found other, but the train step mounts claim-a at /workspace
  hint: Use the same claim in both places, or remove cluster.claim.\
""")
    assert "cluster.sub_path: found a, " in refusal(config_of("pytorchjob", sub_path="a"), TASK)
    assert refusal(
        config_of("pytorchjob"), {"resources": {"limits": {"nvidia.com/gpu": "4"}}}
    ) == snapshot(
        """\
canvastune: error: parallel.nproc_per_node: found 8, but the train step requests 4 nvidia.com/gpu
  hint: Use the same number in both places.\
"""
    )


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"nodes": 2}, r"cluster\.nodes: .*cluster\.backend .*pytorchjob or trainjob"),
        ({"backend": "kubernetes"}, "cluster.backend"),
        ({"nodes": 0}, "cluster.nodes"),
        ({"claim": "My_Claim"}, r"cluster\.claim: .*'My_Claim'.* name\b"),
        ({"cpu": "lots"}, r"cluster\.cpu: .*'lots'.* quantity\b"),
        ({"memory": "32Gi"}, r"cluster\.shm \(64Gi\) .*cluster\.memory \(32Gi\)"),
        ({"image": "Foo bar"}, r"cluster\.image: .*'Foo bar'.* image\b"),
        ({"env": {"HF_TOKEN": "x"}}, r"cluster\.env: HF_TOKEN .*\bsecret\b.*cluster\.secret_env"),
        ({"env": {"PET_NNODES": "2"}}, r"cluster\.env: PET_NNODES .*\boperator\b"),
        ({"env": {"A": "1"}, "secret_env": {"A": {"secret": "s", "key": "k"}}}, "both set A"),
        ({"secret_env": {"A": {"secret": "s"}}}, r"'cluster\.secret_env\.A\.key'.* missing\b"),
        ({"node_selector": {"a": "b c"}}, r"cluster\.node_selector.*'b c'.* label\b"),
        ({"mount_path": "workspace"}, r"cluster\.mount_path: .*'workspace'.* absolute\b"),
        ({"deadline_hours": 0}, r"cluster\.deadline_hours: .* 0\b.* 0\b"),
        (
            {"cpu": 32, "resources": {"limits": {"cpu": 2}}},
            r"limits\.cpu \(2\) .*\(32\)",
        ),
        (
            {"resources": {"limits": {"nvidia.com/gpu": 8}}},
            r"nvidia\.com/gpu .*parallel\.nproc_per_node",
        ),
        (
            {"resources": {"limits": {"memory": "32Gi"}}},
            r"cluster\.shm \(64Gi\) .*cluster\.memory \(32Gi\)",
        ),
        ({"extra_volumes": [{"name": "a", "hostPath": {"path": "/"}}]}, "PodSecurity restricted"),
        (
            {"extra_volume_mounts": [{"name": "a", "mountPath": "/a"}]},
            r"extra_volume_mounts\[0\]: .*\bextra_volumes\b.* a and /a\b",
        ),
        ({"ca_bundle": {}}, r"ca_bundle: .*\bconfig_map or secret\b"),
        ({"affinity": {"nodeSelector": {}}}, "expected nodeAffinity, podAffinity"),
        ({"restarts": -1}, "cluster.restarts"),
        ({"backend": "trainjob", "runtime": None}, "cluster.runtime: found null.*TrainingRuntime"),
        ({"nods": 1}, r"'cluster\.nods'.*'cluster\.nodes'"),
    ],
)
def test_a_section_that_cannot_be_is_refused_with_its_reason(
    section: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError) as error:
        parse_config({"name": "a", "data": {"source": "x"}, "cluster": section})
    assert re.search(words, f"{error.value}: {error.value.hint}")


def test_a_section_can_be_set_from_the_command_line() -> None:
    recipe = Path(__file__).parents[2] / "pipelines/recipes/gsm8k_lora.yaml"
    config = load_config(
        recipe,
        [
            "cluster.backend=pytorchjob",
            "cluster.nodes=2",
            "cluster.cpu=32",
            "cluster.env={NCCL_DEBUG: INFO}",
        ],
    )
    assert (config.cluster.cpu, config.world_size) == ("32", 16)
