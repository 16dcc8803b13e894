"""The Helm chart, rendered by real Helm: a cluster accepts it, and it follows its values."""

from __future__ import annotations

import copy
import functools
import json
import re
import sys
from pathlib import PurePath
from typing import Any, Literal

import helm_python
import kubernetes_validate
import pytest

from canvastune import __version__
from canvastune.config import parse_config
from canvastune.config.cluster import ClusterConfig
from pipelines.steps import parse_steps
from tests.support.cluster_rules import (
    PYTORCHJOB_CRD,
    TRAININGRUNTIME_CRD,
    TRAINJOB_CRD,
    crd_problems,
    pod_security_problems,
    pod_specs,
    pytorchjob_webhook_problems,
    trainingruntime_problems,
    trainjob_problems,
)
from tests.support.rendered_chart import (
    ALL,
    CI,
    SERVERS,
    ci_values,
    cluster,
    every_ci_file,
    every_server,
    installed,
    named,
    of_kind,
    render,
    server,
    texts,
)
from tools.chart_table import CHART

KUBERNETES = kubernetes_validate.utils.all_versions()
# kinds of operators, which Kubernetes has no schema of
OURS = {
    "trainer.kubeflow.org/v1alpha1",
    "monitoring.coreos.com/v1",
    "networking.istio.io/v1beta1",
    "security.istio.io/v1beta1",
}
kubernetes_validate.utils.schema_contents = functools.cache(
    kubernetes_validate.utils.schema_contents
)  # it would read 1 MB per object


@every_ci_file
def test_helm_lint_passes(ci: str) -> None:
    report = helm_python.lint(CHART, ci_values(ci), strict=True, namespace="team-a")
    assert (
        report["errors"] + [message for message in report["messages"] if message["severity"] > 1]
        == []
    )


@every_ci_file
@pytest.mark.parametrize("version", [KUBERNETES[0], KUBERNETES[-1]])
def test_kubernetes_knows_every_field(ci: str, version: str) -> None:
    for document in installed(ci):
        if document["apiVersion"] not in OURS:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                pytest.fail(
                    f"{document['kind']} {document['metadata']['name']}, Kubernetes {version}: "
                    f"{list(error.path)}: {error.message}"
                )


@every_ci_file
def test_no_container_needs_to_write_outside_its_volumes(ci: str) -> None:
    for document in installed(ci):
        for _, pod in pod_specs(document):
            for container in [*pod.get("initContainers", []), *pod["containers"]]:
                assert container["securityContext"]["readOnlyRootFilesystem"] is True, container[
                    "name"
                ]
                mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
                assert mounted <= {volume["name"] for volume in pod.get("volumes", [])}, container[
                    "name"
                ]


def test_tmp_of_the_charts_own_pods_has_the_size_that_the_values_give() -> None:
    for values, limit in ((ALL, {"sizeLimit": "20Gi"}), (ALL | {"tmpSizeLimit": ""}, {})):
        folders = {
            document["metadata"]["name"]: volume["emptyDir"]
            for document in render(values)
            if document["kind"] in ("Deployment", "Job")
            for _, pod in pod_specs(document)
            for volume in pod.get("volumes", [])
            if volume["name"] == "tmp"
        }
        assert len(folders) == 4, folders.keys()
        assert list(folders.values()) == [limit] * 4


@every_ci_file
def test_only_pods_that_call_the_api_server_get_a_token(ci: str) -> None:
    with_token = []
    for document in installed(ci):
        if document["kind"] == "ServiceAccount":
            assert document["automountServiceAccountToken"] is False
        with_token += [
            document["metadata"]["name"]
            for _, pod in pod_specs(document)
            if pod.get("automountServiceAccountToken") is not False
        ]
    before_upgrades = {"oidc": {"canvastune-mlflow-snapshot"}}
    assert set(with_token) == {"canvastune-test-permissions", *before_upgrades.get(ci, ())}


@every_ci_file
def test_nothing_is_random_and_no_secret_is_created(ci: str) -> None:
    first, again = (
        texts(ci_values(ci)),
        texts(ci_values(ci), revision=7, is_install=False, is_upgrade=True),
    )
    assert first == again, "an upgrade with the same values would change something"
    assert not of_kind(installed(ci), "Secret")


@every_ci_file
def test_nothing_is_cluster_wide_or_in_another_namespace(ci: str) -> None:
    for document in installed(ci):
        assert not document["kind"].startswith("Cluster"), document["kind"]
        assert document["metadata"].get("namespace", "team-a") == "team-a"


@every_server
def test_every_port_has_a_protocol(ci: str) -> None:
    def ports(node: Any) -> list[dict[str, Any]]:
        if isinstance(node, dict):
            own = [port for key in ("ports",) for port in node.get(key) or []]
            return own + [port for child in node.values() for port in ports(child)]
        return [port for child in node for port in ports(child)] if isinstance(node, list) else []

    found = [port for document in installed(ci) for port in ports(document)]
    assert found
    assert all(port.get("protocol") in ("TCP", "UDP") for port in found), found


@every_ci_file
def test_what_the_pods_refer_to_exists_or_is_named_in_the_values(ci: str) -> None:
    documents, values = installed(ci), json.dumps(ci_values(ci))
    made = {(document["kind"], document["metadata"]["name"]) for document in documents}
    for document in documents:
        for path, pod in pod_specs(document):
            wanted = [("ServiceAccount", pod["serviceAccountName"])]
            for volume in pod.get("volumes", []):
                if "persistentVolumeClaim" in volume:
                    wanted.append(
                        ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
                    )
                if "configMap" in volume:
                    wanted.append(("ConfigMap", volume["configMap"]["name"]))
            for kind, name in wanted:
                known = (kind, name) in made or f'"{name}"' in values or name == "pipeline-runner"
                assert known, f"{document['kind']} {path} needs {kind} {name}, which does not exist"


def test_release_names_do_not_break_object_names() -> None:
    for release in ("a", "team-a-canvastune", "v1.canvas", "r" * 53):
        for document in render(ci_values("trainjob-kueue"), name=release):
            name = document["metadata"]["name"]
            assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name), name


# Permissions


def test_the_role_is_exactly_what_the_launcher_needs() -> None:
    documents = render({})
    jobs = ["create", "get", "list", "watch", "patch", "delete"]
    assert [
        (rule["apiGroups"], rule["resources"], rule["verbs"])
        for rule in of_kind(documents, "Role")[0]["rules"]
    ] == [
        (["kubeflow.org"], ["pytorchjobs"], jobs),
        (["trainer.kubeflow.org"], ["trainjobs"], jobs),
        (["trainer.kubeflow.org"], ["trainingruntimes"], ["get", "list"]),
        ([""], ["pods", "pods/log"], ["get", "list", "watch"]),
        ([""], ["events"], ["list"]),
        (["jobset.x-k8s.io"], ["jobsets"], ["list"]),
        (["batch"], ["jobs"], ["list"]),
        (["kueue.x-k8s.io"], ["workloads"], ["list"]),
        (["argoproj.io"], ["workflows"], ["get"]),
    ]
    binding = of_kind(documents, "RoleBinding")[0]
    assert binding["subjects"] == [
        {"kind": "ServiceAccount", "name": "pipeline-runner", "namespace": "team-a"}
    ]
    assert binding["roleRef"]["name"] == of_kind(documents, "Role")[0]["metadata"]["name"]


def test_permissions_can_be_bound_to_another_account_or_left_out() -> None:
    other = render({"permissions": {"serviceAccount": "default-editor"}})
    assert of_kind(other, "RoleBinding")[0]["subjects"][0]["name"] == "default-editor"
    none = render({"permissions": {"create": False}})
    assert of_kind(none, "Role") + of_kind(none, "RoleBinding") == []


@pytest.mark.parametrize("lost", [None, "pods/log"])
def test_helm_test_finds_a_missing_permission(
    lost: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run the test pod's script against the chart's role."""
    from kubernetes import client, config

    rules = [
        (rule["apiGroups"][0], resource, rule["verbs"])
        for rule in of_kind(render({}), "Role")[0]["rules"]
        for resource in rule["resources"]
    ]

    def judged(
        _: Any, review: client.V1SelfSubjectAccessReview
    ) -> client.V1SelfSubjectAccessReview:
        asked = review.spec.resource_attributes
        assert asked.namespace == "team-a"
        resource = "/".join(filter(None, (asked.resource, asked.subresource)))
        allowed = any(
            (group, known) == (asked.group, resource) and asked.verb in verbs
            for group, known, verbs in rules
            if known != lost
        )
        review.status = client.V1SubjectAccessReviewStatus(allowed=allowed)
        return review

    monkeypatch.setattr(config, "load_incluster_config", lambda: None)
    monkeypatch.setattr(client.AuthorizationV1Api, "create_self_subject_access_review", judged)
    container = named(installed("trainjob-kueue"), "Pod", "canvastune-test-permissions")["spec"][
        "containers"
    ][0]
    monkeypatch.setattr(sys, "argv", ["-c", *container["args"]])
    with pytest.raises(SystemExit) as ended:
        exec(container["command"][-1], {})
    if lost:
        assert re.search(rf"\bget {re.escape(lost)} .*\bteam-a$", str(ended.value.code))
    else:
        assert ended.value.code == 0


# Storage and upgrades


@pytest.mark.parametrize("after", CI)
@pytest.mark.parametrize("before", ["default", "airgapped"])
def test_no_upgrade_deletes_or_renames_a_claim(before: str, after: str) -> None:
    def claims(ci: str) -> dict[str, dict[str, Any]]:
        return {
            claim["metadata"]["name"]: claim
            for claim in of_kind(installed(ci), "PersistentVolumeClaim")
        }

    old, new = claims(before), claims(after)
    assert set(old) == {"canvastune-mlflow", "canvastune-workspace"}
    assert set(new) <= set(old), "the data would stay behind under another name"
    for name, claim in {**old, **new}.items():
        assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep", (
            f"{name} goes with the release"
        )


def test_selectors_do_not_change_between_versions_or_values() -> None:
    selectors = [
        of_kind(installed(ci), "Deployment")[0]["spec"]["selector"]["matchLabels"] for ci in SERVERS
    ]
    assert all(selector == selectors[0] for selector in selectors), (
        "Kubernetes refuses such an upgrade"
    )
    assert set(selectors[0]) == {
        f"app.kubernetes.io/{key}" for key in ("name", "instance", "component")
    }


def test_existing_claims_are_used_and_none_is_created() -> None:
    documents = render(
        {
            "mlflow": {"persistence": {"existingClaim": "old-mlflow"}},
            "workspace": {"existingClaim": "lustre"},
        }
    )
    assert not of_kind(documents, "PersistentVolumeClaim")
    volumes = [
        volume["persistentVolumeClaim"]["claimName"]
        for volume in server(documents)["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    assert volumes == ["old-mlflow"]
    assert cluster(documents)["claim"] == "lustre"


# Images


def test_images_have_the_chart_s_version_by_default() -> None:
    assert server(render({}))["containers"][0]["image"] == f"canvastune/mlflow:{__version__}"
    assert helm_python.Chart.load(CHART).metadata["appVersion"] == __version__


def test_a_mirror_and_digests_replace_every_image() -> None:
    documents = installed("airgapped")
    pods = [pod for document in documents for _, pod in pod_specs(document)]
    images = {
        container["image"]
        for pod in pods
        for container in [*pod.get("initContainers", []), *pod["containers"]]
    }
    mirror = "registry.internal.example:5000/mirror"
    assert images == {
        f"{mirror}/canvastune/mlflow@sha256:{'1' * 64}",
        f"{mirror}/ml/canvastune-pipeline@sha256:{'2' * 64}",
    }
    assert (
        cluster(documents)["image"]
        == f"gpu-registry.internal.example/canvastune/trainer@sha256:{'3' * 64}"
    )
    assert all(pod["imagePullSecrets"] == [{"name": "registry-credentials"}] for pod in pods)
    assert cluster(documents)["pull_secrets"] == ["registry-credentials"]
    assert all(
        "runAsUser" not in pod["securityContext"] and "fsGroup" not in pod["securityContext"]
        for pod in pods
    )


# Training


@every_ci_file
def test_training_defaults_are_a_valid_section_of_a_recipe(ci: str) -> None:
    given = cluster(installed(ci))
    assert (
        ClusterConfig.model_validate_json(json.dumps(given)).mount_path
        == ClusterConfig().mount_path
    ), "the steps mount it there"
    assert set(given) == set(ClusterConfig.model_fields), "a key of the section is left to chance"
    steps = named(installed(ci), "ConfigMap", "canvastune-training")["data"]["steps.json"]
    assert parse_steps(steps).resources.limits.keys() == {"cpu", "memory"}


@every_ci_file
def test_jobs_with_the_training_defaults_are_accepted(ci: str) -> None:
    from components.jobs.backends import JobContext, manifest

    documents = installed(ci)
    config = parse_config(
        {"name": "run", "data": {"source": "openai/gsm8k"}, "cluster": cluster(documents)}
    )
    job = manifest(
        config, JobContext("id", PurePath("/workspace/runs/run/train"), ("canvastune.train",))
    )
    if job["kind"] == "TrainJob":
        assert trainjob_problems(job, of_kind(documents, "TrainingRuntime")[0]) == []
    else:
        assert pytorchjob_webhook_problems(job) == []
    assert [problem for _, pod in pod_specs(job) for problem in pod_security_problems(pod)] == []
    crd = TRAINJOB_CRD if job["kind"] == "TrainJob" else PYTORCHJOB_CRD
    if crd.exists():
        assert crd_problems(job, crd) == []


def test_training_finds_mlflow_unless_the_values_name_another() -> None:
    assert cluster(render({}))["env"] == {
        "MLFLOW_TRACKING_URI": "http://canvastune-mlflow.team-a.svc.cluster.local:5000"
    }
    elsewhere = {"training": {"env": {"MLFLOW_TRACKING_URI": "https://mlflow.example.com"}}}
    assert cluster(render(elsewhere))["env"]["MLFLOW_TRACKING_URI"] == "https://mlflow.example.com"


def test_trainjob_comes_with_a_runtime_that_trainer_accepts() -> None:
    documents = installed("trainjob-kueue")
    runtime = of_kind(documents, "TrainingRuntime")[0]
    assert cluster(documents)["runtime"] == runtime["metadata"]["name"]
    assert cluster(documents)["queue"] == "team-a"
    assert trainingruntime_problems(runtime) == []
    if TRAININGRUNTIME_CRD.exists():
        assert crd_problems(runtime, TRAININGRUNTIME_CRD) == []


def test_what_a_trainjob_cannot_set_is_in_its_runtime() -> None:
    training = {
        "backend": "trainjob",
        "scheduler": "gang",
        "priorityClassName": "low",
        "restarts": 7,
    }
    documents = render({"training": training})
    spec = of_kind(documents, "TrainingRuntime")[0]["spec"]["template"]["spec"]
    pod = spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert (
        pod["schedulerName"],
        pod["priorityClassName"],
        spec["failurePolicy"]["maxRestarts"],
    ) == ("gang", "low", 7)
    assert (cluster(documents)["scheduler"], cluster(documents)["priority_class"]) == (None, None)


@pytest.mark.parametrize("backend", ["pytorchjob", "trainjob"])
def test_the_policy_of_training_selects_its_pods_and_lets_in_no_other(backend: str) -> None:
    from components.jobs.backends import JobContext, manifest

    documents = render({**ci_values("airgapped"), "training": {"backend": backend}})
    policy = named(documents, "NetworkPolicy", "canvastune-training")["spec"]
    (selected,) = policy["podSelector"]["matchExpressions"]
    assert selected["operator"] == "Exists"
    config = parse_config({"name": "a", "data": {"source": "b"}, "cluster": cluster(documents)})
    roles: tuple[Literal["train", "evaluate"], ...] = ("train", "evaluate")
    for role in roles:
        job = manifest(config, JobContext("id", PurePath("/workspace/runs/a"), ("m",), role=role))
        found = _pod_labels(job)
        assert found
        assert all(selected["key"] in labels for labels in found), f"pods of {role} are left out"
    others = [labels for each in documents for labels in _pod_labels(each)]
    assert others
    assert not any(selected["key"] in labels for labels in others), "a pod of the chart"
    own = {"podSelector": policy["podSelector"]}
    assert policy["ingress"] == [{"from": [own]}]
    assert policy["egress"][0] == {"to": [own]}, "its processes do not reach one another"
    ports = {each["port"] for rule in policy["egress"][1:] for each in rule["ports"]}
    assert ports == {53, 5000}
    assert policy["policyTypes"] == ["Ingress", "Egress"]


def _pod_labels(node: Any) -> list[dict[str, str]]:
    """Return the labels of every pod template in an object that has some."""
    if isinstance(node, list):
        return [found for child in node for found in _pod_labels(child)]
    if not isinstance(node, dict):
        return []
    template = node.get("template")
    labels = template.get("metadata", {}).get("labels") if isinstance(template, dict) else None
    return ([labels] if labels else []) + [
        found for child in node.values() for found in _pod_labels(child)
    ]


def test_with_a_queue_the_priority_is_kueue_s() -> None:
    documents = installed("trainjob-kueue")
    template = of_kind(documents, "TrainingRuntime")[0]["spec"]["template"]["spec"][
        "replicatedJobs"
    ][0]["template"]
    assert "priorityClassName" not in template["spec"]["template"]["spec"]
    assert cluster(documents)["priority_class"] == "batch-low"


@pytest.mark.skipif(not TRAININGRUNTIME_CRD.exists(), reason="needs the operators' CRDs")
def test_a_field_that_the_api_server_would_drop_is_found() -> None:
    runtime = copy.deepcopy(of_kind(installed("trainjob-kueue"), "TrainingRuntime")[0])
    runtime["spec"]["mlPolicy"]["torch"]["numProcPerNode"] = 8  # removed in Trainer 2.3
    assert any(
        "numProcPerNode" in problem for problem in crd_problems(runtime, TRAININGRUNTIME_CRD)
    )


def test_an_existing_runtime_is_named_and_none_is_created() -> None:
    documents = render({"training": {"backend": "trainjob", "runtime": "ours"}})
    assert not of_kind(documents, "TrainingRuntime")
    assert cluster(documents)["runtime"] == "ours"
    assert not of_kind(render({}), "TrainingRuntime"), (
        "a kind that clusters without Trainer 2 do not know"
    )


# The pipeline


def test_pipeline_is_uploaded_after_every_install_and_upgrade() -> None:
    job = of_kind(render({}), "Job")[0]
    assert job["metadata"]["annotations"] == {
        "helm.sh/hook": "post-install,post-upgrade",
        "helm.sh/hook-delete-policy": "before-hook-creation",
        "argocd.argoproj.io/hook": "Sync",
        "argocd.argoproj.io/hook-delete-policy": "BeforeHookCreation",
    }
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert [*container["command"], *container["args"]] == [
        *("canvastune", "upload", "--host=http://ml-pipeline.kubeflow.svc.cluster.local:8888"),
        *("--cluster-file=/etc/canvastune/cluster.json", "--steps-file=/etc/canvastune/steps.json"),
        "--pipeline-name=canvastune-finetune",
        f"--pipeline-image=canvastune/pipeline:{__version__}",
    ]
    assert job["spec"]["activeDeadlineSeconds"] < 300, "Helm gives up first, and does not say why"
    assert not of_kind(render({"pipeline": {"upload": {"enabled": False}}}), "Job")


@pytest.mark.parametrize("ci", ["default", "ingress-tls-auth"])
def test_the_command_line_accepts_the_upload_job_s_arguments(ci: str) -> None:
    from pipelines.parser import build_parser

    container = of_kind(installed(ci), "Job")[0]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["canvastune", "upload"]
    assert (
        str(build_parser().parse_args(["upload", *container["args"]]).cluster_file)
        == "/etc/canvastune/cluster.json"
    )


def test_multi_user_kubeflow_gets_a_token_for_its_own_audience() -> None:
    pod = of_kind(installed("ingress-tls-auth"), "Job")[0]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == "default-editor"
    tokens = [
        volume["projected"]["sources"][0]["serviceAccountToken"]
        for volume in pod["volumes"]
        if "projected" in volume
    ]
    assert [token["audience"] for token in tokens] == ["pipelines.kubeflow.org"]
    assert "--namespace=team-a" in pod["containers"][0]["args"]
    assert "KF_PIPELINES_SA_TOKEN_PATH" in {
        variable["name"] for variable in pod["containers"][0]["env"]
    }


def test_extra_objects_are_installed_with_their_expressions_filled_in() -> None:
    documents = installed("trainjob-kueue")
    assert named(documents, "ConfigMap", "team-notes")["data"] == {"contact": "team-a"}
    assert named(documents, "ConfigMap", "canvastune-address")["data"]["mlflow"].startswith(
        "http://canvastune-mlflow.team-a"
    )


@every_ci_file
def test_notes_show_three_commands_that_fit_the_values(ci: str) -> None:
    notes = texts(ci_values(ci))["canvastune/templates/NOTES.txt"]
    assert "helm test canvastune -n team-a" in notes
    assert "canvastune submit " in notes
    addresses = {
        "ingress-tls-auth": "https://mlflow.example.com",
        "oidc": "https://mlflow.example.com",
        "company": "http://tools.example.com/mlflow",
        "external-mlflow": "https://mlflow.example.com",
    }
    forwarded = "kubectl port-forward -n team-a service/canvastune-mlflow"
    assert addresses.get(ci, forwarded) in notes
