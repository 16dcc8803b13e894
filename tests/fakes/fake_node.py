"""A node of a stand-in for a cluster: the containers of pods are their own commands, run as processes of this machine.

Mounts are folders, Services are ports of the loopback, what a container says is its pod's log. Nothing is isolated, but no container
is given a path that its pod does not mount, and its environment has nothing of this machine's.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
# The cluster's names, for every Python process in it: the address behind HOST:PORT, where the cluster has one.
_RESOLVER = """
import json, os, socket
real = socket.getaddrinfo
def resolve(host, port, *more, **named):
    with open(os.environ["CLUSTER_NAMES"]) as file:
        return real(*json.load(file).get(f"{host}:{port}", (host, port)), *more, **named)
socket.getaddrinfo = resolve
"""


class FakeNode:
    """The node.

    Args:
        folder: gets what the volumes hold.
        objects: every object of a kind in the cluster, by name.
        kubeconfig: of a service account, as the content of its file.

    Attributes:
        logs: by pod: time and line.
        names: HOST:PORT of the cluster's Services, and where they lead.
    """

    def __init__(self, folder: Path, objects: Callable[[str], dict[str, dict[str, Any]]], kubeconfig: Callable[[str], str]) -> None:
        self.folder, self._objects, self._kubeconfig = folder, objects, kubeconfig
        self.logs: dict[str, list[tuple[str, str]]] = {}
        self.names: dict[str, tuple[str, int]] = {}
        self._processes: list[tuple[str, subprocess.Popen[str]]] = []
        (folder / "python").mkdir(parents=True)
        (folder / "python" / "sitecustomize.py").write_text(_RESOLVER)
        self.name({})

    def name(self, more: Mapping[str, int]) -> None:
        """Let names HOST:PORT lead to ports of this machine."""
        self.names |= {name: ("127.0.0.1", port) for name, port in more.items()}
        partial = self.folder / "names.partial"
        partial.write_text(json.dumps(self.names))
        partial.rename(self.folder / "names.json")

    def claim(self, name: str) -> Path:
        """The folder of a claim's volume. Raises: KeyError, there is no such claim."""
        folder = self.folder / "claims" / self._objects("PersistentVolumeClaim")[name]["metadata"]["name"]
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def secret(self, name: str, key: str, optional: bool = False) -> str | None:
        """A secret's value; None: it is not there, and need not be. Raises: KeyError, it must be."""
        try:
            return base64.b64decode(self._objects("Secret")[name]["data"][key]).decode()
        except KeyError:
            if optional:
                return None
            raise

    def said(self, name: str) -> str:
        """A pod's log."""
        return "".join(f"{line}\n" for _, line in self.logs.get(name, ()))

    def say(self, name: str, line: str) -> None:
        """A line in a pod's log."""
        self.logs.setdefault(name, []).append((stamp(), line))

    def run(self, pod: Mapping[str, Any], own: Mapping[str, str], moved: Mapping[str, str]) -> int:
        """Run a pod's containers, one after the other; gives the exit code of the first that fails, or 0.

        Args:
            own: what its controller adds to the environment.
            moved: words of its command lines that must differ, since all pods share the loopback.
        """
        name, spec = pod["metadata"]["name"], pod["spec"]
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            try:
                labels = pod["metadata"].get("labels", {})
                environment, places = self._surroundings(spec, container, self.folder / "pods" / name, labels)
                words = [moved.get(word, word) for word in [*container["command"], *container.get("args", [])]]
                # Where a pod finds its account's token, its client looks without being told: on this machine it is told.
                words = [word.replace("load_incluster_config()", "load_kube_config()") for word in words]
                words = [placed(_expanded(word, environment), places) for word in words]
                unseen = [word for word in words if str(self.folder) in word and not any(place in word for place in places.values())]
                assert not unseen, f"this pod mounts {', '.join(places)}, and does not see {unseen}"
            except (AssertionError, KeyError) as refusal:
                self.say(name, f"the pod cannot start: {refusal!r}")
                return 128
            if code := self.execute(name, words, {**environment, **own}):
                return code
        return 0

    def execute(self, name: str, words: list[str], environment: Mapping[str, str], given: str = "") -> int:
        """Run a command, and keep what it says as a pod's log."""
        pipe = subprocess.PIPE
        with subprocess.Popen(words, env=environment, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
            self._processes.append((name, process))
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(given)
            process.stdin.close()
            for line in process.stdout:
                self.say(name, line.rstrip("\n"))
            return process.wait()

    def end(self, pods: str = "") -> None:
        """Kill the processes of the pods whose names begin so."""
        for name, process in list(self._processes):
            if name.startswith(pods) and process.poll() is None:
                own = psutil.Process(process.pid)
                for one in [*own.children(recursive=True), own]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()

    def environment(self, pod: str, account: str | None) -> dict[str, str]:
        """What every container has: its image's programs, the cluster's names, and the rights of an account, if of any."""
        home = self.folder / "pods" / pod
        home.mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}",
            "PYTHONPATH": str(self.folder / "python"),
            "CLUSTER_NAMES": str(self.folder / "names.json"),
            "NO_PROXY": "*",
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",  # two cores for all pods
            "OMP_WAIT_POLICY": "PASSIVE",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        if account:
            (home / "kubeconfig").write_text(self._kubeconfig(account))
            environment["KUBECONFIG"] = str(home / "kubeconfig")
        return environment

    def _surroundings(
        self, spec: Mapping[str, Any], container: Mapping[str, Any], scratch: Path, labels: Mapping[str, str]
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Environment of a container, and where its mounts are on this machine. Raises: KeyError, AssertionError, it cannot start so."""
        volumes, places = {volume["name"]: volume for volume in spec.get("volumes", ())}, dict[str, str]()
        for mount in container.get("volumeMounts", ()):
            volume, folder = volumes[mount["name"]], scratch / mount["name"]
            if "persistentVolumeClaim" in volume:
                folder = self.claim(volume["persistentVolumeClaim"]["claimName"])
            elif "configMap" in volume:
                folder.mkdir(parents=True, exist_ok=True)
                for file, text in self._objects("ConfigMap")[volume["configMap"]["name"]]["data"].items():
                    (folder / file).write_text(text)
            elif volume["emptyDir"].get("medium") == "Memory":
                folder = Path(mount["mountPath"])
            folder.mkdir(parents=True, exist_ok=True)
            places[mount["mountPath"]] = str(folder)
        account = spec.get("serviceAccountName")
        assert account is None or account in self._objects("ServiceAccount"), f"no service account {account}"
        environment = self.environment(scratch.name, account if spec.get("automountServiceAccountToken", True) else None)
        for variable in container.get("env", ()):
            source = variable.get("valueFrom", {})
            if "fieldRef" in source:
                value: str | None = labels[source["fieldRef"]["fieldPath"].removeprefix("metadata.labels['").removesuffix("']")]
            else:
                value = self.secret(**source["secretKeyRef"]) if source else _expanded(variable.get("value", ""), environment)
            if value is not None:
                environment[variable["name"]] = placed(value, places)
        return environment, places


def _expanded(word: str, environment: Mapping[str, str]) -> str:
    """A word of a command line with the variables that Kubernetes fills in."""
    return re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], word)


def placed(text: str, places: Mapping[str, str]) -> str:
    """A text with the paths in it that lie on a mount, as they are on this machine."""
    mounts = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
    return re.sub(rf"(?<![\w.-])(?:{mounts})(?![\w.-])", lambda found: places[found[0]], text) if mounts else text


def stamp() -> str:
    """Now, as a container's log has it."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S.%f}000Z"
