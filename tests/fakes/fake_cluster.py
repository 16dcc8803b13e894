"""A cluster of one node for the whole product: what is installed, uploaded and submitted runs
(`fake_node`).

One object store (`fake_api_server`) for Helm and for the pipeline's steps; the Role that Helm put
there is enforced. Kubeflow
(`fake_kubeflow`) runs the graph of the version that was uploaded to it, by its own local runner.
Nothing that fails is started again.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from canvastune.errors import UserError
from tests.fakes.fake_api_server import FakeApiServer, Refused
from tests.fakes.fake_kubeflow import FakeKubeflow
from tests.fakes.fake_node import FakeNode, placed, stamp
from tests.support import cluster_rules

STEPS_ACCOUNT = "pipeline-runner"  # Kubeflow Pipelines makes it
_BEGIN: dict[str, dict[str, Any]] = {
    "Pod": {"phase": "Pending"},
    "Job": {"active": 1},
    "Deployment": {"replicas": 0},
    "PyTorchJob": {},
}
_REPORT = "@"  # starts a line that reports the state of a task, or of the run
_STATES = {None: "RUNNING", "SUCCESS": "SUCCEEDED", "FAILURE": "FAILED"}


class FakeCluster(FakeApiServer):
    """The cluster, with Kubeflow and nothing else in its namespace; a context manager.

    Attributes:
        kubeflow: Kubeflow Pipelines, in the cluster as the Services ml-pipeline and ml-pipeline-ui.
        node: has claims, and the logs of pods and (by their ids) of runs.
        running: whether runs that are created are also run.
        overlapping: by PyTorchJob, the pods of others that had not ended when its own started.
    """

    def __init__(self, folder: Path, namespace: str) -> None:
        super().__init__(namespace)
        self.kubeflow, self.running = FakeKubeflow(), True
        self.overlapping: dict[str, list[str]] = {}
        self.node = FakeNode(folder, self.all, self._kubeconfig_of)
        self._pool, self._work = ThreadPoolExecutor(32), list[Future[None]]()

    def __enter__(self) -> FakeCluster:
        super().__enter__()
        self.kubeflow.__enter__()
        self.kubeflow.started = self._run
        self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})
        self.put(
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": STEPS_ACCOUNT}}
        )
        for name, port in (("ml-pipeline", 8888), ("ml-pipeline-ui", 80)):
            self.put(
                {
                    "apiVersion": "v1",
                    "kind": "Service",
                    "metadata": {"name": name},
                    "spec": {"ports": [{"port": port}]},
                }
            )
            self._serve(name, port, urllib.parse.urlsplit(self.kubeflow.host).port or 0)
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.kubeflow.__exit__(*error)
        self.node.end()
        self._pool.shutdown()
        if error[0] is None:
            for work in self._work:
                work.result()

    def address(self, service: str, port: int) -> str:
        """Return this machine's HOST:PORT behind a Service's port.

        Raises: KeyError, if there is none.
        """
        host, number = self.node.names[f"{service}:{port}"]
        return f"{host}:{number}"

    def _kubeconfig_of(self, account: str) -> str:
        config = json.loads(self.kubeconfig)
        config["users"] = [{"name": account, "user": {"token": account}}]
        config["contexts"][0]["context"]["user"] = account
        return json.dumps(config)

    # --- the API server

    def answer(
        self, method: str, url: str, content_type: str, data: bytes, account: str = ""
    ) -> tuple[int, Any]:
        """Respond as an API server with roles, and with logs of pods."""
        address = urllib.parse.urlsplit(url)
        parts = address.path.strip("/").split("/")
        if parts[-1] == "selfsubjectaccessreviews":
            asked = json.loads(data)
            wanted = asked["spec"]["resourceAttributes"]
            what = "/".join(filter(None, (wanted["resource"], wanted.get("subresource"))))
            allowed = self._may(
                account, wanted["verb"], wanted.get("group", ""), what, wanted["namespace"]
            )
            return 201, asked | {"status": {"allowed": allowed}}
        if account and parts != ["version"]:  # which every account may read
            group, namespace, rest = "" if parts[0] == "api" else parts[1], "", parts[-1:]
            if "namespaces" in parts:
                namespace, *rest = parts[parts.index("namespaces") + 1 :]
            verb = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}.get(method) or (
                "get" if len(rest) > 1 else "list"
            )
            what = "/".join((rest[0], *rest[2:]))
            if not self._may(account, verb, group, what, namespace):
                words = (
                    f'{rest[0]} is forbidden: User "{account}" cannot {verb} resource "{what}" in'
                    f' API group "{group}"'
                )
                raise Refused(403, "Forbidden", f'{words} in the namespace "{namespace}"')
        if parts[-1] == "log" and parts[-2] in self.node.logs:
            return 200, self._log(parts[-2], dict(urllib.parse.parse_qsl(address.query)))
        return super().answer(method, url, content_type, data)

    def _may(self, account: str, verb: str, group: str, resource: str, namespace: str) -> bool:
        """Return whether a service account's roles allow a call."""
        who = {"kind": "ServiceAccount", "name": account, "namespace": self.namespace}
        roles = [
            binding["roleRef"]["name"]
            for binding in self.all("RoleBinding").values()
            if who in binding["subjects"]
        ]
        rules = [rule for role in roles for rule in self.all("Role")[role]["rules"]]
        allowed = any(
            group in rule["apiGroups"] and resource in rule["resources"] and verb in rule["verbs"]
            for rule in rules
        )
        return allowed and namespace == self.namespace

    def _log(self, pod: str, query: Mapping[str, str]) -> str:
        if query.get("previous") == "true":
            raise Refused(
                400, "BadRequest", f'previous terminated container in pod "{pod}" not found'
            )
        lines = [
            (when, words)
            for when, words in self.node.logs[pod]
            if when[:19] >= query.get("sinceTime", "")[:19]
        ]
        lines = lines[-int(query["tailLines"]) :] if "tailLines" in query else lines
        return "".join(
            f"{when} {words}\n" if query.get("timestamps") == "true" else f"{words}\n"
            for when, words in lines
        )

    def _change(
        self, verb: str, target: Any, body: dict[str, Any], content_type: str, manager: str
    ) -> tuple[int, Any]:
        if target.namespace not in ("", self.namespace):
            raise Refused(404, "NotFound", f'namespaces "{target.namespace}" not found')
        if verb == "create" and target.kind == "PyTorchJob":
            crd = cluster_rules.PYTORCHJOB_CRD
            problems = cluster_rules.pytorchjob_webhook_problems(body) + (
                cluster_rules.crd_problems(body, crd) if crd.exists() else []
            )
            if problems:
                raise Refused(422, "Invalid", "; ".join(problems))
        code, made = super()._change(verb, target, body, content_type, manager)
        controllers: dict[str, Callable[..., Any]] = {
            "Pod": self._contain,
            "Job": self._job,
            "Deployment": self._deployment,
            "PyTorchJob": self._pytorchjob,
        }
        if code == 201 and target.kind in controllers:
            self._begin(controllers[target.kind], made)
        elif verb == "delete" and target.kind in controllers:
            self.node.end(target.name)
        return code, made

    def _controlled(self, one: Mapping[str, Any]) -> dict[str, Any]:
        first = _BEGIN.get(one["kind"])
        return super()._controlled(one) if first is None else {"status": one.get("status") or first}

    # --- controllers

    def _begin(self, task: Callable[..., Any], *arguments: Any) -> None:
        self._work.append(self._pool.submit(task, *arguments))

    def _now(self, one: Mapping[str, Any], **status: Any) -> None:
        """Change the status of an object, if it still exists."""
        with self.changed:
            found = self.all(one["kind"]).get(one["metadata"]["name"])
            if found is not None:
                self.put(found | {"status": {**found["status"], **status}})

    def _contain(
        self,
        pod: dict[str, Any],
        own: Mapping[str, str] | None = None,
        moved: Mapping[str, str] | None = None,
    ) -> int:
        """Run a pod; arguments and exit code are those of the node."""
        container = {"name": pod["spec"]["containers"][-1]["name"], "restartCount": 0}
        self._now(pod, phase="Running", containerStatuses=[container | {"state": {"running": {}}}])
        code = self.node.run(pod, own or {}, moved or {})
        end = {"exitCode": code, "reason": "Error" if code else "Completed", "finishedAt": stamp()}
        self._now(
            pod,
            phase="Failed" if code else "Succeeded",
            containerStatuses=[container | {"state": {"terminated": end}}],
        )
        return code

    def _made_pod(
        self,
        name: str,
        owner: Mapping[str, Any],
        template: Mapping[str, Any],
        labels: Mapping[str, str],
    ) -> dict[str, Any]:
        """Create a controller's pod."""
        reference = {key: owner[key] for key in ("apiVersion", "kind")} | {
            key: owner["metadata"][key] for key in ("name", "uid")
        }
        metadata = {
            "name": name,
            "labels": {**template["metadata"].get("labels", {}), **labels},
            "ownerReferences": [reference],
        }
        self.put(
            {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
        )
        return self.all("Pod")[name]

    def _job(self, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        code = self._contain(
            self._made_pod(f"{name}-0", job, job["spec"]["template"], {"job-name": name})
        )
        end = (
            {"type": "Failed", "message": "Job has reached the specified backoff limit"}
            if code
            else {"type": "Complete"}
        )
        self._now(
            job,
            active=0,
            failed=int(code != 0),
            succeeded=int(code == 0),
            conditions=[end | {"status": "True"}],
        )

    def _deployment(self, deployment: dict[str, Any]) -> None:
        """Start its pod, and let it serve once its startup probe succeeds."""
        template = deployment["spec"]["template"]
        pod = self._made_pod(f"{deployment['metadata']['name']}-0", deployment, template, {})
        (server,) = template["spec"]["containers"]
        moved = {port["containerPort"]: _free_port() for port in server["ports"]}
        self._begin(
            self._ready,
            deployment,
            server,
            {port["name"]: moved[port["containerPort"]] for port in server["ports"]},
        )
        words = {f"--port={port}": f"--port={to}" for port, to in moved.items()} | {
            "--host=0.0.0.0": "--host=127.0.0.1"
        }
        self._contain(pod, {}, words)

    def _ready(
        self, deployment: dict[str, Any], server: Mapping[str, Any], ports: Mapping[str, int]
    ) -> None:
        probe = server["startupProbe"]["httpGet"]
        while not self._closed:
            try:
                urllib.request.urlopen(
                    f"http://127.0.0.1:{ports[probe['port']]}{probe['path']}", timeout=5
                ).close()
            except OSError:
                time.sleep(0.1)
            else:
                break
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        for name, service in self.all("Service").items():
            if (
                service["spec"].get("selector")
                and service["spec"]["selector"].items() <= labels.items()
            ):
                for port in service["spec"]["ports"]:
                    self._serve(name, port["port"], ports[port["targetPort"]])
        counts = dict.fromkeys(
            ("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), 1
        )
        self._now(deployment, **counts, conditions=[{"type": "Available", "status": "True"}])

    def _serve(self, name: str, port: int, to: int) -> None:
        """Set a Service's address, under each of its names."""
        home = f"{name}.{self.namespace}"
        self.node.name(
            {
                f"{one}:{port}": to
                for one in (name, home, f"{home}.svc", f"{home}.svc.cluster.local")
            }
        )

    def _pytorchjob(self, job: dict[str, Any]) -> None:
        """Run a job without a Master as the training operator 1.9 does; its pods connect over
        loopback.
        """
        name, spec, conditions = job["metadata"]["name"], job["spec"], list[dict[str, str]]()

        def become(state: str) -> None:
            conditions[:] = [
                one | {"status": "False"} if one["type"] == "Running" else one for one in conditions
            ]
            conditions.append(
                {
                    "type": state,
                    "status": "True",
                    "reason": f"PyTorchJob{state}",
                    "message": f"PyTorchJob {name} is {state}.",
                }
            )
            self._now(job, conditions=conditions)

        become("Created")
        self.overlapping[name] = [
            pod
            for pod, one in self.all("Pod").items()
            if any(o["kind"] == "PyTorchJob" for o in one["metadata"].get("ownerReferences", ()))
            and one["status"]["phase"] in ("Pending", "Running")
        ]
        (worker,) = spec["pytorchReplicaSpecs"].values()
        own = {
            "PYTHONUNBUFFERED": "1",
            "PET_NNODES": str(worker["replicas"]),
            "PET_NPROC_PER_NODE": spec["nprocPerNode"],
        }
        own |= {"PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": str(_free_port())}
        pods = []
        for index in range(worker["replicas"]):
            labels = {"job-name": name, "replica-type": "worker", "replica-index": str(index)}
            labels = {f"training.kubeflow.org/{key}": value for key, value in labels.items()}
            pods.append(
                (self._made_pod(f"{name}-worker-{index}", job, worker["template"], labels), own)
            )
        become("Running")
        codes = list(self._pool.map(lambda one: self._contain(*one), pods))
        become("Failed" if any(codes) else "Succeeded")

    # --- Kubeflow Pipelines

    def _run(self, run: dict[str, Any]) -> None:
        if self.running:
            self.kubeflow.watched[run["run_id"]] = lambda: self._state(run["run_id"])
            self._begin(self._run_to_completion, run)

    def _state(self, run_id: str) -> dict[str, Any]:
        """Return a run's state from the lines of its graph."""
        reports = re.findall(rf"^{_REPORT}([\w-]+) (.+)$", self.node.said(run_id), re.MULTILINE)
        states = dict(reports)  # the last state of each task, and of the run
        error, run = {"message": states.pop("why", "")}, states.pop("run", "RUNNING")
        tasks = [
            {"display_name": name, "state": state, "error": error} for name, state in states.items()
        ]
        return {"state": run, "run_details": {"task_details": tasks}, "error": error}

    def _run_to_completion(self, run: dict[str, Any]) -> None:
        state = "FAILED"
        try:
            state = "FAILED" if self._run_graph(run) else "SUCCEEDED"
        except (KeyError, ValueError) as error:  # no such claim, version or secret
            self.node.say(run["run_id"], f"{_REPORT}why {error!r}")
        self.node.say(run["run_id"], f"{_REPORT}run {state}")

    def _run_graph(self, run: dict[str, Any]) -> int:
        """Run the uploaded graph with its defaults in a process, with steps as children; return its
        code.
        """
        run_id, place = run["run_id"], run["pipeline_version_reference"]["pipeline_version_id"]
        (version,) = [one for one in self.kubeflow.versions if one["pipeline_version_id"] == place]
        spec, platform = (
            version["pipeline_spec"]["pipeline_spec"],
            version["pipeline_spec"]["platform_spec"],
        )
        parameters = {
            key: one.get("defaultValue")
            for key, one in spec["root"]["inputDefinitions"]["parameters"].items()
        }
        parameters |= run["runtime_config"]["parameters"]
        executors = list(
            platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values()
        )
        mounts = {mount["mountPath"] for executor in executors for mount in executor["pvcMount"]}
        places = dict.fromkeys(mounts, str(self.node.claim(parameters["volume_claim"])))

        flow = {
            "apiVersion": "argoproj.io/v1alpha1",
            "kind": "Workflow",
            "metadata": {"name": run_id},
            "status": {"phase": "Running"},
        }
        self.put(flow)
        pod = self._made_pod(
            f"{run_id}-step", self.all("Workflow")[run_id], {"metadata": {}, "spec": {}}, {}
        )
        environment = self.node.environment(run_id, STEPS_ACCOUNT) | {
            "KFP_POD_NAME": pod["metadata"]["name"]
        }
        for secret in executors[0].get("secretAsEnv", ()):
            for entry in secret["keyToEnv"]:
                value = self.node.secret(
                    parameters["credentials"], entry["secretKey"], secret.get("optional", False)
                )
                environment |= {} if value is None else {entry["envVar"]: value}
        arguments = {key: placed(value, places) for key, value in parameters.items()}
        given = {
            "pipeline": yaml.safe_dump_all([spec, platform]),
            "arguments": arguments,
            "artifacts": str(self.node.folder / "artifacts"),
        }
        return self.node.execute(
            run_id,
            [sys.executable, "-m", "tests.fakes.fake_cluster"],
            environment,
            json.dumps(given),
        )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def addresses_outside(artifacts: Path) -> list[str]:
    """Return artifact URIs outside of the store: Kubeflow's launcher fails a step that reads one."""
    outputs = [
        json.loads(file.read_text()).get("artifacts", {})
        for file in artifacts.rglob("executor_output.json")
    ]
    addresses = [
        one["uri"] for made in outputs for group in made.values() for one in group["artifacts"]
    ]
    assert addresses, f"no artifact in {artifacts}"
    return [address for address in addresses if not Path(address).is_relative_to(artifacts)]


def _report(record: logging.LogRecord) -> bool:
    """Print what Kubeflow's local runner logs of its tasks."""
    message = re.sub("\x1b\\[[0-9]+m", "", record.getMessage())
    found = re.match(
        r"(?:Executing task|Task) '?([\w-]+)'?(?: finished with status (\w+)|$)", message
    )
    if found and sys.__stdout__ is not None:
        sys.__stdout__.write(f"{_REPORT}{found[1]} {_STATES[found[2]]}\n")
    return True


def main() -> int:
    """Run the graph of standard input, and print the states of its tasks."""
    from kfp.components import load_component_from_text

    from pipelines.local_runner import run_locally

    given = json.load(sys.stdin)
    logging.getLogger().addFilter(_report)
    try:
        run_locally(
            load_component_from_text(given["pipeline"]),
            given["arguments"],
            Path(given["artifacts"]),
        )
        assert not (outside := addresses_outside(Path(given["artifacts"]))), (
            f"Kubeflow's launcher takes no such address: {outside}"
        )
    except UserError as error:
        print(f"{_REPORT}why {' '.join(str(error).split()).partition(' failed: ')[2]}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
