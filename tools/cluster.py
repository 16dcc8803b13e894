"""Test the product on a real cluster: install the chart, run the pipeline, kill a training pod.

`make test-cluster` runs this. KUBECONFIG names the cluster, which needs Kubeflow Pipelines and the
training operator (docs/verification.md creates one with kind). What it creates there has a unique
name and is removed at the end, also on Ctrl-C.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any
from unittest import mock

import helm_python
import urllib3
import yaml
from kubernetes import client, config

from canvastune.config import RunConfig, parse_config
from canvastune.errors import UserError
from components.jobs.pod_spec import ROLE, RUN_ID, pod_parts
from pipelines import submit as submission
from pipelines.kfp_client import KubeflowClient, named
from tools.chart_table import CHART
from tools.image_builds import Refused
from tools.images import IMAGES, RECIPE, Report

OPERATOR = (
    "kubectl apply --server-side -k "
    '"github.com/kubeflow/training-operator.git/manifests/overlays/standalone?ref=v1.9.4"'
)
PIPELINES = (
    "kubectl apply -k "
    '"github.com/kubeflow/pipelines/manifests/kustomize/env/platform-agnostic?ref=2.17.0"'
)
FILL = """set -e
canvastune make-tiny-model /workspace/tiny
python -c "from pathlib import Path; from canvastune.tiny_model import write_problems
write_problems(Path('/workspace/rows.jsonl'), 'change', rows=40, seed=1)"
"""
READ = """
import json, pathlib, sys, mlflow
run, experiment = sys.argv[1:]
folder, client = pathlib.Path("/workspace/runs") / run, mlflow.MlflowClient()
experiment_id = client.get_experiment_by_name(experiment).experiment_id
found = client.search_runs([experiment_id], f"attributes.run_name = '{run}'")
events = [json.loads(line) for line in (folder / "train/metrics.jsonl").read_text().splitlines()]
left = {"report": (folder / "report/report.html").stat().st_size}
left["mlflow"] = [one.info.status for one in found]
left["resumed"] = [one["step"] for one in events if one.get("event") == "resumed"]
print(json.dumps(left | json.loads((folder / "summary.json").read_text())))
"""


@dataclass(frozen=True)
class Cluster:
    """The cluster, and the test's names in it."""

    core: client.CoreV1Api
    kubeflow: str  # namespace of Kubeflow Pipelines
    home: str  # namespace of the pipeline's pods: without profiles, the same one
    name: str  # unique: of the restricted namespace, releases, pipeline and experiment


def find_cluster(namespace: str | None) -> Cluster:
    """Return the cluster of KUBECONFIG.

    Raises: Refused, if it is unreachable or lacks an operator.
    """
    place, settings = os.environ.get("KUBECONFIG"), client.Configuration()
    if not place:
        raise Refused(
            "KUBECONFIG is not set, and there is no default: export KUBECONFIG=$HOME/.kube/config"
        )
    try:
        config.load_kube_config(place, client_configuration=settings)
        api = client.ApiClient(settings)
        core, crds = client.CoreV1Api(api), client.ApiextensionsV1Api(api)
        wanted = {
            "field_selector": "metadata.name=pytorchjobs.kubeflow.org",
            "_preload_content": False,
            "_request_timeout": 20,
        }
        jobs = json.loads(crds.list_custom_resource_definition(**wanted).data)["items"]
        services = core.list_service_for_all_namespaces(
            field_selector="metadata.name=ml-pipeline"
        ).items
    except (config.ConfigException, yaml.YAMLError) as error:
        raise Refused(
            f"KUBECONFIG={place}: {' '.join(str(error).split())}. See kubectl config get-contexts"
        ) from None
    except client.ApiException as error:
        raise Refused(
            f"{settings.host}: {error.status} {error.reason}. This needs a cluster "
            "administrator's permissions"
        ) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        raise Refused(
            f"{settings.host}: no API server responds ({reason}). Is the cluster of the current "
            "context up?"
        ) from None
    if not jobs:
        raise Refused(
            f"{settings.host}: no PyTorchJob (kubeflow.org/v1). Install the training operator:\n  "
            f"{OPERATOR}"
        )
    if not services:
        raise Refused(
            f"{settings.host}: no Kubeflow Pipelines (service ml-pipeline). Install it:\n  "
            f"{PIPELINES}"
        )
    places = [str(one.metadata.namespace) for one in services]
    kubeflow = namespace if namespace in places else places[0]
    return Cluster(core, kubeflow, namespace or kubeflow, f"canvastune-test-{secrets.token_hex(3)}")


def chart_values(cluster: Cluster, images: dict[str, str], access_mode: str) -> dict[str, Any]:
    """Return the values of a release that trains on the CPU of a small cluster."""
    profile = cluster.home != cluster.kubeflow
    pipeline = f"http://ml-pipeline.{cluster.kubeflow}.svc.cluster.local:8888"
    upload = (
        {"serviceAccount": "default-editor", "tokenAudience": "pipelines.kubeflow.org"}
        if profile
        else {}
    )
    server = {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}}
    pods = {
        "gpuResource": "",
        "cpu": "500m",
        "memory": "3Gi",
        "shm": "256Mi",
        "env": {"OMP_NUM_THREADS": "1"},
    }
    return {
        "images": {name: image_values(reference) for name, reference in images.items()},
        "mlflow": {"workers": 1, "resources": server, "persistence": {"size": "1Gi"}},
        "workspace": {"size": "2Gi", "accessMode": access_mode},
        "training": {
            "backend": "pytorchjob",
            **pods,
            "deadlineHours": 1,
            "queueHours": 0.5,
            "ttlHours": 1,
        },
        "permissions": {"serviceAccount": "default-editor" if profile else "pipeline-runner"},
        "pipeline": {"name": cluster.name, "host": pipeline, "upload": upload},
    }


def image_values(reference: str) -> dict[str, str]:
    """Return the chart's values for a reference such as
    `registry.example.com:5000/team/trainer:1.0@sha256:...`.
    """
    parts = re.fullmatch(
        r"(?:(?P<registry>[^/]*[.:][^/]*)/)?(?P<repository>[^:@]+)(?::(?P<tag>[^@]+))?(?:@(?P<digest>sha256:.+))?",
        reference,
    )
    if parts is None:
        raise Refused(f"{reference}: not an image reference")
    return {key: value for key, value in parts.groupdict().items() if value}


def access_mode(cluster: Cluster) -> str:
    """Return the workspace's: its pods run on several nodes, unless there is one or storage is
    local.
    """
    classes = client.StorageV1Api(cluster.core.api_client).list_storage_class().items
    local = any(one.provisioner == "rancher.io/local-path" for one in classes)
    return "ReadWriteOnce" if local or len(cluster.core.list_node().items) == 1 else "ReadWriteMany"


def job(cluster: Cluster, name: str, image: str, command: list[str]) -> dict[str, Any]:
    """Return a Job on the workspace, with a training pod's environment."""
    settings = {
        "claim": f"{cluster.name}-workspace",
        "gpu_resource": None,
        "cpu": "100m",
        "memory": "2Gi",
        "shm": "256Mi",
    }
    environment = {"MLFLOW_TRACKING_URI": f"http://{cluster.name}-mlflow:5000"}
    parts = pod_parts(
        recipe(cluster, name, 20, settings), {}, PurePath("/workspace"), environment, {}
    )
    container = {
        **parts.container,
        "name": "main",
        "image": image,
        "command": command,
        "env": parts.env,
        "resources": parts.resources,
    }
    pod = {
        **parts.pod,
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "containers": [container],
    }
    spec = {
        "backoffLimit": 0,
        "activeDeadlineSeconds": 900,
        "template": {"metadata": parts.metadata, "spec": pod},
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{cluster.name}-{name}"},
        "spec": spec,
    }


def run_job(cluster: Cluster, body: dict[str, Any]) -> str:
    """Run a Job where the pipeline runs, and return its log."""
    batch, name = client.BatchV1Api(cluster.core.api_client), body["metadata"]["name"]
    batch.create_namespaced_job(cluster.home, body)
    try:
        read = batch.read_namespaced_job_status
        ends = wait_until(
            f"job {name} ends",
            lambda: states(read(name, cluster.home).to_dict()) & {"Complete", "Failed"},
        )
        pods = cluster.core.list_namespaced_pod(
            cluster.home, label_selector=f"job-name={name}"
        ).items
        log = "".join(log_of(cluster, pod) for pod in pods)
        assert ends == {"Complete"}, f"{name} has failed:\n{log[-4000:]}"
        return log
    finally:
        batch.delete_namespaced_job(name, cluster.home, propagation_policy="Background")


def states(one: Any) -> set[str]:
    """Return the true conditions of an object."""
    return {
        condition["type"]
        for condition in one["status"]["conditions"] or ()
        if condition["status"] == "True"
    }


def log_of(cluster: Cluster, pod: Any) -> str:
    """Return a pod's log; "" if it has none yet."""
    with contextlib.suppress(client.ApiException):  # preloading would parse a line of JSON
        answer = cluster.core.read_namespaced_pod_log(
            pod.metadata.name, cluster.home, _preload_content=False
        )
        return str(answer.data.decode(errors="replace"))
    return ""


def wait_until(what: str, probe: Callable[[], Any], seconds: float = 900) -> Any:
    """Call a function until its result is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := probe()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s without success until {what}"
        time.sleep(1)
    return found


def helm_in(namespace: str) -> helm_python.Config:
    """Return real Helm, on the cluster of KUBECONFIG."""
    place = os.environ["KUBECONFIG"]
    return helm_python.Config(
        kubeconfig_path=None if os.pathsep in place else place, namespace=namespace
    )


def install(cluster: Cluster, namespace: str, values: dict[str, Any]) -> None:
    """Install the chart, and run its own tests once MLflow is ready."""
    apps, server = client.AppsV1Api(cluster.core.api_client), f"{cluster.name}-mlflow"
    with helm_in(namespace) as helm:
        helm.install(CHART, cluster.name, values, namespace=namespace, timeout=300)
        wait_until(
            "MLflow is ready",
            lambda: apps.read_namespaced_deployment_status(server, namespace).status.ready_replicas,
        )
        helm.test(cluster.name, timeout=300)


def recipe(
    cluster: Cluster, name: str, steps: int, where: dict[str, Any] | None = None
) -> RunConfig:
    """Return the tiny recipe of tools.images: two processes in one or two pods; the release says
    where.
    """
    tree = yaml.safe_load(RECIPE) | {
        "name": name,
        "tracking": {"experiment": cluster.name},
        "cluster": where or {},
    }
    tree["parallel"]["nproc_per_node"] //= tree["cluster"].get("nodes", 1)
    tree["train"] |= {"steps": steps, "validate_every": steps // 2}
    return parse_config(tree | {"hardware": {"accelerator": "cpu", "gpu_memory": 12}})


def pods_of(cluster: Cluster, run_id: str) -> list[Any]:
    """Return the training pods of a run."""
    return list(
        cluster.core.list_namespaced_pod(
            cluster.home, label_selector=f"{RUN_ID}={run_id},{ROLE}=train"
        ).items
    )


def check_run(cluster: Cluster, run_id: str, name: str, image: str, *, resumed: bool) -> None:
    """Check a run's two PyTorchJobs, its files on the claim, and its finished run in MLflow."""
    kind = ("kubeflow.org", "v1", cluster.home, "pytorchjobs")
    custom = client.CustomObjectsApi(cluster.core.api_client)
    jobs = custom.list_namespaced_custom_object(*kind, label_selector=f"{RUN_ID}={run_id}")["items"]
    assert sorted(one["metadata"]["labels"][ROLE] for one in jobs) == ["evaluate", "train"], [
        one["metadata"]["name"] for one in jobs
    ]
    for found in jobs:
        assert "Succeeded" in states(found), found["status"]
    log = run_job(
        cluster, job(cluster, f"read-{name}", image, ["python", "-c", READ, name, cluster.name])
    )
    left = json.loads(log.splitlines()[-1])
    assert left["report"] > 10_000, left
    assert (left["mlflow"], bool(left["resumed"])) == (["FINISHED"], resumed), left
    print(
        f"         training loss {left['train_loss_first']:.3f} -> {left['train_loss_last']:.3f}, "
        f"resumed at {left['resumed']}"
    )


def check_admitted(cluster: Cluster, run_id: str) -> None:
    """Check that the operator's training pods are admitted where PodSecurity restricted is
    enforced.
    """
    pods = pods_of(cluster, run_id)
    assert pods, "the job has no pods"
    for pod in pods:
        spec = cluster.core.api_client.sanitize_for_serialization(pod.spec) | {"nodeName": None}
        cluster.core.create_namespaced_pod(
            cluster.name, {"metadata": {"name": pod.metadata.name}, "spec": spec}, dry_run="All"
        )


def kill_one_pod(cluster: Cluster, run_id: str) -> None:
    """Delete the training pod after its first checkpoints, and wait for its replacement."""

    def trained_pods() -> list[Any]:
        logs = [
            (pod, re.findall(r"step +(\d+)/", log_of(cluster, pod)))
            for pod in pods_of(cluster, run_id)
        ]
        return [pod for pod, steps in logs if steps and int(steps[-1]) >= 30]

    victim = wait_until("training is at step 30", trained_pods)[0].metadata
    cluster.core.delete_namespaced_pod(victim.name, cluster.home, grace_period_seconds=1)
    wait_until(
        "another pod is created",
        lambda: [pod for pod in pods_of(cluster, run_id) if pod.metadata.uid != victim.uid],
    )


@contextlib.contextmanager
def kubeflow_address(host: str | None, namespace: str) -> Iterator[str]:
    """Yield Kubeflow's address: the given one, or that of a port-forward by kubectl."""
    if host:
        yield host.rstrip("/")
        return
    if shutil.which("kubectl") is None:
        raise Refused(
            "no kubectl for a port-forward to Kubeflow: install it, or pass Kubeflow's address "
            "with --host"
        )
    command = ["kubectl", "port-forward", "--namespace", namespace, "service/ml-pipeline-ui", ":80"]
    # A separate session: Ctrl-C must not end the port-forward before the cleanup.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as forward:
        try:
            assert forward.stdout is not None
            line = forward.stdout.readline()
            if (port := re.search(r"127\.0\.0\.1:(\d+) ->", line)) is None:
                raise Refused(
                    f"kubectl port-forward: {line.strip()}. Pass Kubeflow's address with --host"
                )
            threading.Thread(
                target=collections.deque, args=(forward.stdout, 0), daemon=True
            ).start()  # it prints a line per connection
            yield f"http://127.0.0.1:{port[1]}"
        finally:
            forward.terminate()


def check(
    cluster: Cluster,
    server: KubeflowClient,
    images: dict[str, str],
    report: Report,
    later: Callable[[str, Callable[[], Any]], Any],
) -> None:
    """Check every claim; `later` registers what to remove at the end, before it is created."""
    core, name, home, image = cluster.core, cluster.name, cluster.home, images["pipeline"]
    values = chart_values(cluster, images, access_mode(cluster))
    with report.claim(
        "the chart in a namespace that enforces PodSecurity restricted: MLflow runs, helm test "
        "passes"
    ):
        later(f"namespace {name}", lambda: core.delete_namespace(name))
        core.create_namespace(
            {
                "metadata": {
                    "name": name,
                    "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
                }
            }
        )
        install(
            cluster,
            name,
            values | {"permissions": {"create": False}, "pipeline": {"upload": {"enabled": False}}},
        )
    with report.claim(
        f"the chart where the pipeline runs, in {home}: its job uploads the pipeline, helm test "
        "passes"
    ):
        ours = f"app.kubernetes.io/instance={name}"
        later(
            f"claims {ours} in {home}",
            lambda: core.delete_collection_namespaced_persistent_volume_claim(
                home, label_selector=ours
            ),
        )
        # Helm keeps hooks: the chart's tests, and the upload job.
        later(
            f"test pods {ours} in {home}",
            lambda: core.delete_collection_namespaced_pod(home, label_selector=ours),
        )
        batch = client.BatchV1Api(core.api_client)
        background = {"label_selector": ours, "propagation_policy": "Background"}
        later(
            f"jobs {ours} in {home}",
            lambda: batch.delete_collection_namespaced_job(home, **background),
        )
        later(
            f"release {name} in {home}",
            lambda: helm_in(home).uninstall(name, ignore_not_found=True),
        )
        later(f"pipeline, experiment and runs {name} in Kubeflow", lambda: forget(server, name))
        install(cluster, home, values)
    with report.claim("a Job of the pipeline image fills the workspace with a tiny model and rows"):
        run_job(cluster, job(cluster, "fill", image, ["sh", "-c", FILL]))
    if report.failed:
        return
    with report.claim(
        "canvastune submit runs the tiny recipe: prepared, trained by two pods, merged, "
        "evaluated, reported"
    ):
        first = submission.submit(
            recipe(cluster, "first", 20, {"backend": "pytorchjob", "nodes": 2}),
            server,
            run_name="first",
            wait=True,
        ).rpartition("/")[2]
    if report.failed:  # there is no run to check
        return
    with report.claim(
        "one PyTorchJob for training and one for evaluation succeeded; report and summary exist; "
        "MLflow has the run"
    ):
        check_run(cluster, first, "first", image, resumed=False)
    with report.claim("the training pods pass the admission of PodSecurity restricted"):
        check_admitted(cluster, first)
    with report.claim(
        "a training pod is killed: the same job resumes from its checkpoint, and the run succeeds"
    ):
        killed = submission.submit(
            recipe(cluster, "killed", 600), server, run_name="killed"
        ).rpartition("/")[2]
        kill_one_pod(cluster, killed)
        run = server.create_kfp_client().wait_for_run_completion(killed, timeout=1800)
        assert run.state == "SUCCEEDED", run.state
        check_run(cluster, killed, "killed", image, resumed=True)


def forget(server: KubeflowClient, name: str) -> None:
    """Remove the pipeline, and the experiment with its runs."""
    kfp = server.create_kfp_client()
    if (pipeline := kfp.get_pipeline_id(name)) is not None:
        for version in kfp.list_pipeline_versions(pipeline).pipeline_versions or ():
            kfp.delete_pipeline_version(pipeline, version.pipeline_version_id)
        kfp.delete_pipeline(pipeline)
    listed = kfp.list_experiments(filter=named(name), namespace=server.namespace)
    for experiment in listed.experiments or ():
        for run in kfp.list_runs(experiment_id=experiment.experiment_id).runs or ():
            kfp.delete_run(run.run_id)
        kfp.delete_experiment(experiment.experiment_id)


def remove(what: str, undo: Callable[[], Any], keep: bool) -> None:
    """Remove one thing, or print that it is kept."""
    try:
        None if keep else undo()
        print(f"{'KEPT    ' if keep else 'removed '} {what}", flush=True)
    except Exception as error:  # remove the others anyway
        print(f"LEFT     {what}: {' '.join(str(error).split())[:300]}", flush=True)


def main() -> int:
    """Check every claim; return 1 if one failed or the cluster is unsuitable."""
    parser = argparse.ArgumentParser(prog="python -m tools.cluster", description=__doc__)
    parser.add_argument("--host", help="Kubeflow's address; default: a port-forward by kubectl")
    parser.add_argument(
        "--namespace",
        help="a Kubeflow profile; default: the namespace of pipelines without profiles",
    )
    parser.add_argument("--keep", action="store_true", help="remove nothing")
    for name, image in IMAGES.items():
        parser.add_argument(
            f"--{name}-image", default=image, metavar="IMAGE", help="default: %(default)s"
        )
    options, report = parser.parse_args(), Report()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        cluster = find_cluster(options.namespace)
        print(
            f"{cluster.name} on {cluster.core.api_client.configuration.host}; pipelines run in "
            f"{cluster.home}",
            flush=True,
        )
        with (
            kubeflow_address(options.host, cluster.kubeflow) as host,
            contextlib.ExitStack() as made,
        ):
            # upload no version to a team's pipeline
            made.enter_context(mock.patch.object(submission, "PIPELINE", cluster.name))
            server = KubeflowClient(
                host, cluster.home if cluster.home != cluster.kubeflow else None
            )
            server.create_kfp_client()
            images = {name: getattr(options, f"{name}_image") for name in IMAGES}
            check(
                cluster,
                server,
                images,
                report,
                lambda what, undo: made.callback(remove, what, undo, options.keep),
            )
    except (Refused, UserError) as error:
        print(f"REFUSED  {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
