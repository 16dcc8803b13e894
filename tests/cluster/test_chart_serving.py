"""What the chart renders to serve a tuned model."""

from __future__ import annotations

from typing import Any

import kubernetes_validate

from tests.support.cluster_rules import (
    pod_security_problems,
    pod_specs,
)
from tests.support.rendered_chart import (
    installed,
    named,
    of_kind,
    render,
)

KUBERNETES = kubernetes_validate.utils.all_versions()


def test_nothing_is_served_by_default() -> None:
    names = [document["metadata"]["name"] for document in installed("default")]
    assert not [name for name in names if "serving" in name]


def served(**values: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the objects, and the pod of the server."""
    documents = render({"serving": {"enabled": True, "model": "runs/a/model", **values}})
    pods = [
        pod
        for document in documents
        if document["metadata"]["name"] == "canvastune-serving"
        for _, pod in pod_specs(document)
    ]
    assert len(pods) == 1
    return documents, pods[0]


def test_the_model_is_served_read_only_from_the_workspace_with_its_gpus() -> None:
    documents, pod = served(gpus=4, name="mine", extraArgs=["--max-model-len=8192"])
    (container,) = pod["containers"]
    assert container["command"] == ["vllm", "serve", "/workspace/runs/a/model"]
    assert container["args"] == [
        *("--host=0.0.0.0", "--port=8000", "--served-model-name=mine"),
        *("--tensor-parallel-size=4", "--max-model-len=8192"),
    ]
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["nvidia.com/gpu"] == 4
        assert {"cpu", "memory"} <= set(container["resources"][kind])
    volume = next(each for each in pod["volumes"] if each["name"] == "workspace")
    assert volume["persistentVolumeClaim"] == {
        "claimName": "canvastune-workspace",
        "readOnly": True,
    }
    mount = next(each for each in container["volumeMounts"] if each["name"] == "workspace")
    assert mount["readOnly"] is True
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod[
        "tolerations"
    ]
    deployment = named(documents, "Deployment", "canvastune-serving")["spec"]
    service = named(documents, "Service", "canvastune-serving")["spec"]
    assert service["selector"] == deployment["selector"]["matchLabels"]
    assert service["ports"][0]["targetPort"] == container["ports"][0]["name"] == "http"
    policy = named(documents, "NetworkPolicy", "canvastune-serving")["spec"]
    assert policy["podSelector"]["matchLabels"] == service["selector"]


def test_a_server_has_the_time_to_load_that_the_values_give() -> None:
    documents, pod = served(startMinutes=45)
    probe = pod["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 45 * 60
    deadline = named(documents, "Deployment", "canvastune-serving")["spec"]
    assert deadline["progressDeadlineSeconds"] > 45 * 60, "the rollout fails before the server"
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert pod["containers"][0][kind]["httpGet"] == {"path": "/health", "port": "http"}


def test_a_key_for_users_is_read_from_a_secret() -> None:
    def key(pod: dict[str, Any]) -> list[Any]:
        return [
            each["valueFrom"]["secretKeyRef"]
            for each in pod["containers"][0]["env"]
            if each["name"] == "VLLM_API_KEY"
        ]

    assert key(served()[1]) == []
    secret = {"name": "team-key", "key": "token"}
    assert key(served(apiKey={"existingSecret": secret})[1]) == [secret]


def test_the_server_takes_an_existing_account_and_more_volumes() -> None:
    volume, mount = {"name": "ca", "configMap": {"name": "company-ca"}}, "/etc/company-ca"
    documents, pod = served(
        serviceAccount="gpu-users",
        extraVolumes=[volume],
        extraVolumeMounts=[{"name": "ca", "mountPath": mount}],
    )
    assert pod["serviceAccountName"] == "gpu-users"
    accounts = [one["metadata"]["name"] for one in of_kind(documents, "ServiceAccount")]
    assert "canvastune-serving" not in accounts
    assert volume in pod["volumes"]
    assert mount in [one["mountPath"] for one in pod["containers"][0]["volumeMounts"]]


def test_kserve_gets_the_same_pod_instead_of_a_deployment_and_a_service() -> None:
    documents, pod = served(kserve=True, replicas=2)
    service = named(documents, "InferenceService", "canvastune-serving")
    assert service["apiVersion"] == "serving.kserve.io/v1beta1"
    assert service["metadata"]["annotations"]["serving.kserve.io/deploymentMode"] == "RawDeployment"
    predictor = service["spec"]["predictor"]
    assert (predictor["minReplicas"], predictor["maxReplicas"]) == (2, 2)
    names = [(document["kind"], document["metadata"]["name"]) for document in documents]
    assert not {("Deployment", "canvastune-serving"), ("Service", "canvastune-serving")} & {*names}
    plain = served(replicas=2)[1]
    container, other = pod["containers"][0], plain["containers"][0]
    assert container["name"] == "kserve-container"  # by which KServe finds it
    assert {**container, "name": ""} == {**other, "name": ""}
    # The rest of a predictor is a pod's spec and these fields.
    own = {"minReplicas", "maxReplicas", "labels", "deploymentStrategy"}
    spec = {key: value for key, value in predictor.items() if key not in own}
    assert {**spec, "containers": []} == {**plain, "containers": []}
    assert pod_security_problems(spec) == []
    kubernetes_validate.validate(
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec},
        KUBERNETES[-1],
        strict=True,
    )
