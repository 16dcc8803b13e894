"""Containers that an operator or an admission webhook adds to the pods of a job."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support.cluster_stage import Cluster, config_of

PULL = 'Back-off pulling image "alpine:3.10": no route to host'


def _init(cluster: Cluster, state: dict[str, Any], **status: Any) -> None:
    """Let each pod wait for an init container."""
    cluster.operator.init_containers = ["init-pytorch"]
    one = {"name": "init-pytorch", "image": "alpine:3.10", "restartCount": 0, "state": state}
    own = {"waiting": {"reason": "PodInitializing"}}
    cluster.operator.pending(
        initContainerStatuses=[one],
        containerStatuses=[{"name": cluster.kind.container, "restartCount": 0, "state": own}],
        **status,
    )


@pytest.mark.parametrize(
    ("waiting", "reason", "words"),
    [
        ({"reason": "ImagePullBackOff", "message": PULL}, "ImagePullFailed", "alpine:3.10"),
        (
            {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting"},
            "ContainerFails",
            "kubectl logs POD -c init-pytorch",
        ),
        (
            {"reason": "CreateContainerConfigError", "message": "container has runAsNonRoot"},
            "ContainerConfigError",
            "container has runAsNonRoot",
        ),
    ],
)
def test_an_init_container_that_never_ends_is_named_and_ends_the_wait(
    cluster: Cluster, waiting: dict[str, str], reason: str, words: str
) -> None:
    cluster.at(2, _init, cluster, {"waiting": waiting})
    error = cluster.fails(config_of(cluster.backend, queue_hours=24))
    first, hint = error.splitlines()
    assert "init-pytorch" in first
    assert words in error
    assert "cluster.image" not in hint, "the run's own image is not the cause"
    assert f"reason={reason}" in cluster.output
    assert cluster.clock.now - cluster.clock.start < 600
    assert not cluster.jobs()


def test_a_failed_init_container_is_named_with_its_own_last_lines(cluster: Cluster) -> None:
    def ends() -> None:
        cluster.operator.failed()
        end = {"exitCode": 2, "reason": "Error", "finishedAt": cluster.clock.stamp()}
        for pod in cluster.api.all("pods"):
            name = pod["metadata"]["name"]
            one = {"name": "init-pytorch", "restartCount": 0, "state": {"terminated": end}}
            pod["status"] = {"phase": "Failed", "initContainerStatuses": [one]}
            cluster.api.log(f"{name}/init-pytorch", "nslookup: can't resolve the first pod")
            cluster.api.log(name, "a line of another container")

    cluster.at(2, _init, cluster, {"running": {}})
    cluster.at(9, ends)
    error = cluster.fails()
    assert re.search(r"\binit-pytorch\b.* 2\b", error)
    assert "can't resolve the first pod" in error
    assert "another container" not in error


def test_a_sidecar_hides_neither_the_log_nor_the_image_and_its_restarts_are_its_own(
    cluster: Cluster,
) -> None:
    cluster.operator.sidecars = ["istio-proxy"]
    cluster.goes_well()
    tags = cluster.launch()
    assert [line for line in cluster.output.splitlines() if line.startswith("step")] == [
        "step 1/800",
        "step 2/800",
    ]
    assert "sidecar" not in tags["canvastune.image"]
    assert "reason=PodRestarted" not in cluster.output


def test_a_sidecar_that_is_stopped_is_not_why_the_job_failed(cluster: Cluster) -> None:
    def ends() -> None:
        cluster.operator.failed(1)
        stopped = {"exitCode": 143, "reason": "Error", "finishedAt": "2026-01-01T00:00:00Z"}
        for pod in cluster.api.all("pods"):
            pod["status"]["containerStatuses"][0]["state"] = {"terminated": stopped}

    cluster.operator.sidecars = ["istio-proxy"]
    cluster.at(2, cluster.operator.pending)
    cluster.at(9, cluster.operator.running)
    cluster.at(20, ends)
    error = cluster.fails()
    assert re.search(r"\bcode 1\b", error.splitlines()[0])
