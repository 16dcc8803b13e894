"""A job without pods: the launcher reports within a minute what forbids them, with the setting to
change, and ends a wait that cannot succeed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pytest
from inline_snapshot import snapshot

from components.jobs.pruned_fields import pruned_fields
from tests.fakes.fake_kubernetes import NOT_STORED
from tests.support.cluster_rules import PYTORCHJOB_CRD
from tests.support.cluster_stage import HOUR, Cluster, config_of, stage

PERMANENT = {  # what the API server or the operator says: reason, and words of message and hint
    "quota without the resource": (
        "is forbidden: failed quota: team-quota: must specify limits.cpu for: pytorch; "
        "requests.memory for: pytorch",
        "QuotaRefusesPods",
        "must specify limits.cpu for: pytorch",
        "Set cluster.resources.limits.cpu and cluster.resources.requests.memory (chart: "
        "training.resources.limits.cpu and training.resources.requests.memory)",
    ),
    "quota that is too small": (
        "is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, used: "
        "requests.nvidia.com/gpu=0, limited: requests.nvidia.com/gpu=4",
        "QuotaRefusesPods",
        "quota gpus never ",
        "raised",
    ),
    "limit range": (
        "is forbidden: [maximum cpu usage per Container is 16, but limit is 32, maximum memory "
        "usage per Container is 64Gi, but limit is 512Gi]",
        "LimitRangeRefusesPods",
        "maximum memory usage per Container is 64Gi",
        "LimitRange",
    ),
    "limit range with a default below the request": (
        'is invalid: spec.containers[0].resources.requests: Invalid value: "32": must be less than '
        "or equal to cpu limit of 2",
        "LimitRangeRefusesPods",
        "cpu limit of 2",
        "training.resources.limits.cpu",
    ),
    "pod security": (
        'is forbidden: violates PodSecurity "restricted:latest": restricted volume types (volume '
        '"data" uses restricted volume type "hostPath")',
        "PodSecurityRefusesPods",
        '"hostPath"',
        "cluster.extra_volumes",
    ),
    "OpenShift's constraint": (
        "is forbidden: unable to validate against any security context constraint: [provider "
        '"restricted-v2": .spec.securityContext.fsGroup: Invalid value: []int64{10001}: 10001 is '
        "not an allowed group]",
        "PodSecurityRefusesPods",
        "10001 is not an allowed group",
        "cluster.fs_group=null",
    ),
    "service account": (
        "is forbidden: error looking up service account team-a/trainer: serviceaccount "
        '"trainer" not found',
        "ObjectNotFound",
        '"trainer" not found',
        "cluster.service_account",
    ),
    "priority class": (
        "is forbidden: no PriorityClass with name high was found",
        "ObjectNotFound",
        "no PriorityClass with name high",
        "cluster.priority_class",
    ),
    "policy": (
        'is forbidden: admission webhook "validation.gatekeeper.sh" denied the request: '
        "[required-labels] missing label cost-center",
        "WebhookRefusesPods",
        "missing label cost-center",
        "its owner",
    ),
    "webhook that fails": (  # openkruise/kruise#1863, of a job without that kind of replicas
        'is forbidden: admission webhook "mpod.kb.io" denied the request: Internal error occurred: '
        'the spec replicas field ".spec.pytorchReplicaSpecs.Master.replicas" does not exist',
        "WebhookRefusesPods",
        '"mpod.kb.io" denied the request',
        "other cluster.backend",
    ),
    "anything else": (
        "is forbidden: the node pool is frozen",
        "PodsForbidden",
        "the node pool is frozen",
        "the message",
    ),
}
TEMPORARY = {
    "quota that others use": (
        "is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, used: "
        "requests.nvidia.com/gpu=8, limited: requests.nvidia.com/gpu=8",
        "quota gpus has ",
    ),
    "webhook that is down": (
        'failed calling webhook "pods.example.com": failed to call webhook: Post '
        '"https://policy.svc:443/": context deadline exceeded',
        'failed calling webhook "pods.example.com"',
    ),
}


def _elapsed(cluster: Cluster) -> float:
    return cluster.clock.now - cluster.clock.start


@pytest.mark.parametrize("case", PERMANENT)
def test_what_forbids_the_pods_is_said_with_the_setting_and_ends_the_wait(
    cluster: Cluster, case: str
) -> None:
    message, reason, words, hint = PERMANENT[case]
    for second in range(3, 400, 20):  # the operator tries again and again
        cluster.at(second, cluster.operator.refused, message)
    said = []
    cluster.at(60, lambda: said.append(cluster._capsys.readouterr().out))
    error = cluster.fails(config_of(cluster.backend, queue_hours=24))
    assert f"reason={reason}" in said[0], "not within a minute"
    assert said[0].count("WARNING") + cluster.output.count("WARNING") == 1, "said more than once"
    first, last = error.splitlines()
    assert words in first, error
    assert hint in last, error
    assert _elapsed(cluster) < 600, "waits for hours for what will not come"
    assert not cluster.jobs(), "the job still waits"


@pytest.mark.parametrize("case", TEMPORARY)
def test_what_others_can_end_is_said_and_waited_for(cluster: Cluster, case: str) -> None:
    message, words = TEMPORARY[case]
    cluster.at(3, cluster.operator.refused, message)
    cluster.goes_well(start=900)
    cluster.launch(config_of(cluster.backend, queue_hours=24))
    assert words in cluster.output
    assert "reason=JobRunning" in cluster.output


def test_two_pods_of_which_a_quota_admits_one_end_the_wait(pytorch: Cluster) -> None:
    pytorch.at(2, pytorch.operator.pending)
    pytorch.at(3, pytorch.operator.running)
    pytorch.at(4, lambda: pytorch.api.remove("pods", pytorch.operator._pod_names()[1]))
    pytorch.at(
        5,
        pytorch.operator.refused,
        "is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=8, used: "
        "requests.nvidia.com/gpu=8, limited: requests.nvidia.com/gpu=8",
    )
    error = pytorch.fails(config_of(nodes=2, queue_hours=24))
    assert re.search(r"requests\.nvidia\.com/gpu\b.* 2 pods\b", error)
    assert _elapsed(pytorch) < 600


def test_events_of_an_earlier_job_of_that_name_or_of_another_s_jobset_say_nothing(
    cluster: Cluster,
) -> None:
    message = PERMANENT["priority class"][0]

    def others() -> None:
        name = cluster.operator.job["metadata"]["name"]
        stranger = {"ownerReferences": [{"uid": "another"}]}
        cluster.api.put("jobsets", name, metadata=stranger)
        cluster.api.put("jobs", f"{name}-node-0", metadata=stranger)
        text = f'Error creating: pods "{name}-node-0-0-abcde" {message}'
        cluster.api.warn(f"{name}-node-0", "FailedCreate", text, "Job")
        cluster.api.warn(name, "FailedCreatePod", text, cluster.kind.kind, "uid-of-the-earlier")

    cluster.at(2, others)
    cluster.goes_well(start=400)
    cluster.launch(config_of(cluster.backend, queue_hours=24))
    assert "PriorityClass" not in cluster.output


def test_a_job_that_the_jobset_cannot_create_ends_the_wait(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The TrainJob itself then has no event, and there is no Job either."""
    for cluster in stage("trainjob", capsys, monkeypatch):

        def invalid(cluster: Cluster = cluster) -> None:
            job = cluster.operator.job["metadata"]
            owner = {"ownerReferences": [{"uid": job["uid"]}]}
            jobset = cluster.api.put("jobsets", job["name"], metadata=owner)
            text = (
                f'job "{job["name"]}-node-0" creation failed with error: Job.batch '
                f'"{job["name"]}-node-0" is invalid: spec.template.spec.containers[0].resources.'
                "limits[nvidia.com/gpu]: Required value: Limit must be set"
            )
            uid = jobset["metadata"]["uid"]
            cluster.api.warn(job["name"], "JobCreationFailed", text, "JobSet", uid)

        cluster.at(3, invalid)
        error = cluster.fails(config_of("trainjob", queue_hours=24))
        assert "limits[nvidia.com/gpu]: Required value" in error
        assert _elapsed(cluster) < 600


def test_an_event_without_a_uid_counts_by_kind_and_name(pytorch: Cluster) -> None:
    pytorch.at(2, pytorch.operator.created)
    pytorch.at(
        3,
        lambda: pytorch.api.warn(
            pytorch.operator.job["metadata"]["name"],
            "FailedCreatePod",
            f'Error creating: pods "x" {PERMANENT["quota without the resource"][0]}',
            "PyTorchJob",
        ),
    )
    assert "must specify limits.cpu" in pytorch.fails(config_of(queue_hours=24))


def test_an_operator_that_does_not_respond_is_named(cluster: Cluster) -> None:
    error = cluster.fails(config_of(cluster.backend))
    assert re.search(r"\boperator\b.* KIND\b", error)
    assert cluster.output.count("reason=OperatorSilent") == 1


def test_without_the_permission_the_job_s_own_events_are_still_read(
    cluster: Cluster, role: list[Mapping[str, Any]]
) -> None:
    between = ("jobsets", "jobs", "workloads")
    cluster.api.rules = [rule for rule in role if rule["resources"][0] not in between]
    cluster.at(3, cluster.operator.refused, PERMANENT["quota without the resource"][0])
    error = cluster.fails(config_of(cluster.backend, queue_hours=0.2))
    assert len(re.findall(r"^.*\bjobsets\.jobset\.x-k8s\.io\b", cluster.output, re.MULTILINE)) == 1
    assert ("must specify limits.cpu" in error) == (cluster.backend == "pytorchjob")


# --- in Kueue's queue -----------------------------------------------------------------------------


def test_the_launcher_says_what_it_waits_for_in_the_queue_and_since_when(cluster: Cluster) -> None:
    message = (
        "couldn't assign flavors to pod set node: insufficient unused quota for nvidia.com/gpu in "
        "flavor h100, 8 more needed"
    )
    cluster.at(2, cluster.operator.in_queue, message)
    cluster.at(500, lambda: cluster.api.remove("workloads", _workload(cluster)))
    cluster.goes_well(start=500)
    cluster.launch(config_of(cluster.backend, queue="team-a", queue_hours=24))
    (line,) = [line for line in cluster.output.splitlines() if "reason=WaitingInQueue" in line]
    assert re.search(r"LocalQueue team-a\b.* 2026-11-24T12:00:02Z: ", line)
    assert message in line


def _workload(cluster: Cluster) -> str:
    (workload,) = cluster.api.all("workloads")
    return str(workload["metadata"]["name"])


@pytest.mark.parametrize(
    ("message", "reason", "hint"),
    [
        ("LocalQueue team-a doesn't exist", "Inadmissible", "cluster.queue"),
        (
            "couldn't assign flavors to pod set node: insufficient quota for nvidia.com/gpu in "
            "flavor h100, previously considered podsets requests (0) + current podset request (16)"
            " > maximum capacity (8)",
            "Pending",
            "cluster.nodes",
        ),
        ("too much for the queue", "ExceedsMaxQuota", "cluster.nodes"),
        (
            "resources didn't satisfy LimitRange constraints: requests exceed the limits",
            "Inadmissible",
            "LimitRange",
        ),
    ],
)
def test_a_queue_that_never_admits_the_job_ends_the_wait(
    cluster: Cluster, message: str, reason: str, hint: str
) -> None:
    cluster.at(2, cluster.operator.in_queue, message, reason)
    error = cluster.fails(config_of(cluster.backend, queue="team-a", queue_hours=24))
    assert message in error
    assert hint in error
    assert _elapsed(cluster) < 600


def test_a_deactivated_workload_ends_the_wait(cluster: Cluster) -> None:
    cluster.at(2, cluster.operator.in_queue, "", active=False)
    error = cluster.fails(config_of(cluster.backend, queue="team-a", queue_hours=24))
    assert re.search(r"\bdeactivated\b.* LocalQueue team-a\b", error)


def test_an_admission_check_is_named(cluster: Cluster) -> None:
    check = {"name": "capacity", "state": "Pending", "message": "no capacity in the zone"}
    reserved = {"type": "QuotaReserved", "status": "True", "message": "Quota reserved"}
    cluster.at(2, cluster.operator.in_queue, "", conditions=[reserved], admissionChecks=[check])
    error = cluster.fails(config_of(cluster.backend, queue="team-a", queue_hours=0.1))
    assert re.search(r"admission check capacity\b.*: no capacity in the zone", error)


def test_a_job_that_kueue_does_not_manage_is_named(cluster: Cluster) -> None:
    cluster.at(2, cluster.operator.suspended)
    error = cluster.fails(config_of(cluster.backend, queue="team-a"))
    assert re.search(r"Kueue\b.* Workload\b", error)
    assert _elapsed(cluster) == pytest.approx(0.1 * HOUR, abs=40)


@pytest.mark.parametrize("reason", ["WorkloadPriorityClassNotFound", "PriorityClassNotFound"])
def test_a_priority_class_that_kueue_does_not_find_ends_the_wait(
    cluster: Cluster, reason: str
) -> None:
    cluster.at(2, cluster.operator.suspended)
    text = f'{reason.removesuffix("NotFound")} "high" not found'
    cluster.at(
        3,
        lambda: cluster.api.warn(
            cluster.operator.job["metadata"]["name"], reason, text, cluster.kind.kind
        ),
    )
    error = cluster.fails(
        config_of(cluster.backend, queue="team-a", priority_class="high", queue_hours=24)
    )
    assert f"{reason}: {text}" in error
    assert "training.priorityClassName" in error
    assert _elapsed(cluster) < 600


def test_without_a_workload_the_priority_class_is_named_too(cluster: Cluster) -> None:
    """Older versions of Kueue only log it."""
    cluster.at(2, cluster.operator.suspended)
    cluster.fails(config_of(cluster.backend, queue="team-a", priority_class="high"))
    assert "WorkloadPriorityClass high " in cluster.output


def test_a_job_that_is_admitted_and_stays_suspended_is_named(cluster: Cluster) -> None:
    admitted = {"type": "Admitted", "status": "True"}
    cluster.at(
        2,
        lambda: cluster.operator.in_queue(
            "", conditions=[{**admitted, "lastTransitionTime": cluster.clock.stamp()}]
        ),
    )
    denied = 'admission webhook "vjobset.kb.io" denied the request: field is immutable'
    cluster.at(  # kubeflow/trainer#3008
        9,
        lambda: cluster.api.warn(
            cluster.operator.job["metadata"]["name"], "UpdateFailed", denied, cluster.kind.kind
        ),
    )
    error = cluster.fails(config_of(cluster.backend, queue="team-a", queue_hours=0.1))
    assert f"(UpdateFailed: {denied})" in error
    assert cluster.output.count("reason=JobNotResumed") == 1
    assert "2026-11-24T12:00:02Z" in cluster.output


def test_a_job_that_kueue_evicted_says_why_it_is_in_the_queue_again(cluster: Cluster) -> None:
    """With waitForPodsReady."""
    message = "Exceeded the PodsReady timeout team-a/job"
    cluster.at(2, cluster.operator.in_queue, message)
    cluster.goes_well(start=400)
    cluster.at(399, lambda: cluster.api.remove("workloads", _workload(cluster)))
    cluster.launch(config_of(cluster.backend, queue="team-a", queue_hours=24))
    assert f": {message} (reason=WaitingInQueue)" in cluster.output


def test_a_job_that_runs_outside_of_its_queue_is_named(cluster: Cluster) -> None:
    cluster.goes_well()
    cluster.launch(config_of(cluster.backend, queue="team-a"))
    assert cluster.output.count("reason=QueueIgnored") == 1
    assert re.search(r"queue team-a\b.*reason=QueueIgnored", cluster.output)


def test_a_job_that_was_queued_is_not_said_to_be_outside_of_its_queue(cluster: Cluster) -> None:
    cluster.at(2, cluster.operator.in_queue, "insufficient unused quota")
    cluster.goes_well(start=120)
    cluster.launch(config_of(cluster.backend, queue="team-a"))
    assert "QueueIgnored" not in cluster.output


# --- what the API server did not store ------------------------------------------------------------


def test_fields_that_an_older_operator_prunes_are_a_refusal_that_names_them(
    cluster: Cluster,
) -> None:
    cluster.api.unknown = {
        "trainjobs": NOT_STORED["2.1.0"],
        "pytorchjobs": ("spec.nprocPerNode",),
    }
    error = cluster.fails()
    if cluster.backend == "trainjob":
        assert error == snapshot("""\
canvastune: error: KIND JOB: deleted by the launcher: the API server did not store spec.activeDeadlineSeconds, spec.runtimePatches: the installed KIND (trainer.kubeflow.org/v1alpha1) does not have these fields
  hint: Install Kubeflow Trainer 2.3 or newer, with its CRDs, or choose another cluster.backend.\
""")
    else:
        assert re.search(r"spec\.nprocPerNode: .*KIND \(kubeflow\.org/v1\)", error)
    assert _elapsed(cluster) < 60, "it waits for pods that it cannot find"
    assert not cluster.jobs()


@pytest.mark.parametrize("version", NOT_STORED)
def test_each_field_that_an_older_trainer_prunes_is_named_at_its_depth(
    version: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for cluster in stage("trainjob", capsys, monkeypatch):
        cluster.api.unknown = {"trainjobs": NOT_STORED[version]}
        error = cluster.fails()
        assert f"{', '.join(NOT_STORED[version])}: " in error
        assert "Kubeflow Trainer 2.3" in error
        assert not cluster.jobs()


@pytest.mark.skipif(not PYTORCHJOB_CRD.exists(), reason="needs the operators' CRDs")
def test_the_real_crds_store_everything_that_is_sent(cluster: Cluster) -> None:
    cluster.goes_well()
    cluster.launch(
        config_of(
            cluster.backend,
            cpu="8",
            memory="128Gi",
            queue="team-a",
            tolerations=[{"key": "a"}],
            node_selector={"a": "b"},
            pull_secrets=[],
        )
    )


def test_a_pruned_field_is_found_at_any_depth_and_defaults_are_none() -> None:
    sent = {"a": [{"name": "x", "deep": {"b": 1, "gone": [1]}}], "c": "500m", "empty": {}}
    stored = {
        "a": [{"name": "sidecar"}, {"name": "x", "deep": {"b": 1, "default": 2}}],
        "c": "0.5",
        "more": 1,
    }
    assert pruned_fields(sent, stored, "spec") == ["spec.a[0].deep.gone"]
    assert pruned_fields(sent, {"c": "1"}, "spec") == ["spec.a"]
    assert pruned_fields(sent, sent) == []
