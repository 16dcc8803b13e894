"""A fake node: the commands of a pod's containers run as processes of this machine.

Mounts are folders, Services are loopback ports, a container's output is its pod's log. Nothing is
isolated, but a container gets only paths that its pod mounts, and nothing of this machine's
environment.
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

from tests.support import warm

ROOT = Path(__file__).parents[2]
# The cluster's names, for every Python process in it: the address behind HOST:PORT, where the
# cluster has one.
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
        folder: holds the volumes.
        objects: every object of a kind in the cluster, by name.
        kubeconfig: returns a kubeconfig file's content for a service account.

    Attributes:
        logs: by pod: time and line.
        names: HOST:PORT of the cluster's Services, and their real addresses.
    """

    def __init__(
        self,
        folder: Path,
        objects: Callable[[str], dict[str, dict[str, Any]]],
        kubeconfig: Callable[[str], str],
    ) -> None:
        self.folder, self._objects, self._kubeconfig = folder, objects, kubeconfig
        self.logs: dict[str, list[tuple[str, str]]] = {}
        self.names: dict[str, tuple[str, int]] = {}
        self._processes: list[tuple[str, subprocess.Popen[str]]] = []
        (folder / "python").mkdir(parents=True)
        (folder / "python" / "sitecustomize.py").write_text(_RESOLVER)
        self.name({})

    def name(self, more: Mapping[str, int]) -> None:
        """Map names HOST:PORT to ports of this machine."""
        self.names |= {name: ("127.0.0.1", port) for name, port in more.items()}
        partial = self.folder / "names.partial"
        partial.write_text(json.dumps(self.names))
        partial.rename(self.folder / "names.json")

    def claim(self, name: str) -> Path:
        """Return the folder of a claim's volume. Raises: KeyError, if there is no such claim."""
        folder = (
            self.folder
            / "claims"
            / self._objects("PersistentVolumeClaim")[name]["metadata"]["name"]
        )
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def secret(self, name: str, key: str, optional: bool = False) -> str | None:
        """Return a secret's value; None if it is optional and missing.

        Raises: KeyError, if required.
        """
        try:
            return base64.b64decode(self._objects("Secret")[name]["data"][key]).decode()
        except KeyError:
            if optional:
                return None
            raise

    def said(self, name: str) -> str:
        """Return a pod's log."""
        return "".join(f"{line}\n" for _, line in self.logs.get(name, ()))

    def say(self, name: str, line: str) -> None:
        """Add a line to a pod's log."""
        self.logs.setdefault(name, []).append((stamp(), line))

    def run(self, pod: Mapping[str, Any], own: Mapping[str, str], moved: Mapping[str, str]) -> int:
        """Run a pod's containers in order; return the first exit code that is not 0, or 0.

        Args:
            own: what its controller adds to the environment.
            moved: words of its command lines that must differ, since all pods share the loopback.
        """
        name, spec = pod["metadata"]["name"], pod["spec"]
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            try:
                labels = pod["metadata"].get("labels", {})
                environment, places = self._environment_and_mounts(
                    spec, container, self.folder / "pods" / name, labels
                )
                words = [
                    moved.get(word, word)
                    for word in [*container["command"], *container.get("args", [])]
                ]
                # In a pod, the client finds the service account's token by itself; here it needs a
                # kubeconfig.
                words = [
                    word.replace("load_incluster_config()", "load_kube_config()") for word in words
                ]
                words = [placed(_expanded(word, environment), places) for word in words]
                unseen = [
                    word
                    for word in words
                    if str(self.folder) in word
                    and not any(place in word for place in places.values())
                ]
                assert not unseen, f"this pod mounts {', '.join(places)}, and does not see {unseen}"
            except (AssertionError, KeyError) as refusal:
                self.say(name, f"the pod cannot start: {refusal!r}")
                return 128
            if code := self.execute(name, words, {**environment, **own}):
                return code
        return 0

    def execute(
        self, name: str, words: list[str], environment: Mapping[str, str], given: str = ""
    ) -> int:
        """Run a command, and store its output as a pod's log."""
        pipe = subprocess.PIPE
        with warm.Popen(
            words,
            env=environment,
            cwd=ROOT,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            self._processes.append((name, process))
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(given)
            process.stdin.close()
            for line in process.stdout:
                self.say(name, line.rstrip("\n"))
            return process.wait()

    def end(self, pods: str = "") -> None:
        """Kill the processes of the pods whose names start with a prefix."""
        for name, process in list(self._processes):
            if name.startswith(pods) and process.poll() is None:
                own = psutil.Process(process.pid)
                for one in [*own.children(recursive=True), own]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        one.kill()

    def environment(self, pod: str, account: str | None) -> dict[str, str]:
        """Return every container's environment: programs, the cluster's names, a service account."""
        home = self.folder / "pods" / pod
        home.mkdir(parents=True, exist_ok=True)
        environment = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}",
            # images have this checkout's code
            "PYTHONPATH": f"{self.folder / 'python'}{os.pathsep}{ROOT}",
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

    def _environment_and_mounts(
        self,
        spec: Mapping[str, Any],
        container: Mapping[str, Any],
        scratch: Path,
        labels: Mapping[str, str],
    ) -> tuple[dict[str, str], dict[str, str]]:
        """Return a container's environment and mounts.

        Raises: KeyError, AssertionError, if invalid.
        """
        volumes, places = (
            {volume["name"]: volume for volume in spec.get("volumes", ())},
            dict[str, str](),
        )
        for mount in container.get("volumeMounts", ()):
            volume, folder = volumes[mount["name"]], scratch / mount["name"]
            if "persistentVolumeClaim" in volume:
                folder = self.claim(volume["persistentVolumeClaim"]["claimName"])
            elif "configMap" in volume:
                folder.mkdir(parents=True, exist_ok=True)
                for file, text in self._objects("ConfigMap")[volume["configMap"]["name"]][
                    "data"
                ].items():
                    (folder / file).write_text(text)
            elif "projected" in volume:
                folder.mkdir(parents=True, exist_ok=True)
                (source,) = volume["projected"]["sources"]
                token = source["serviceAccountToken"]
                text = token_of(spec["serviceAccountName"], token["audience"])
                (folder / token["path"]).write_text(text)
            elif volume["emptyDir"].get("medium") == "Memory":
                folder = Path(mount["mountPath"])
            folder.mkdir(parents=True, exist_ok=True)
            places[mount["mountPath"]] = str(folder)
        for secret in spec.get("imagePullSecrets", ()):
            assert secret["name"] in self._objects("Secret"), f"no pull secret {secret['name']}"
        account = spec.get("serviceAccountName")
        assert account is None or account in self._objects("ServiceAccount"), (
            f"no service account {account}"
        )
        environment = self.environment(
            scratch.name, account if spec.get("automountServiceAccountToken", True) else None
        )
        for variable in container.get("env", ()):
            source = variable.get("valueFrom", {})
            value: str | None
            if source.get("fieldRef") == {"fieldPath": "status.podIP"}:
                value = "127.0.0.1"
            elif "fieldRef" in source:
                value = labels[
                    source["fieldRef"]["fieldPath"]
                    .removeprefix("metadata.labels['")
                    .removesuffix("']")
                ]
            else:
                value = (
                    self.secret(**source["secretKeyRef"])
                    if source
                    else _expanded(variable.get("value", ""), environment)
                )
            if value is not None:
                environment[variable["name"]] = placed(value, places)
        return environment, places


def token_of(account: str, audience: str) -> str:
    """Return a service account's token for an audience."""
    return f"{account}.{audience}"


def _expanded(word: str, environment: Mapping[str, str]) -> str:
    """Return an argument with its $(VARIABLES) expanded, as Kubernetes does."""
    return re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], word)


def placed(text: str, places: Mapping[str, str]) -> str:
    """Replace paths on a mount by their paths on this machine."""
    mounts = "|".join(re.escape(place) for place in sorted(places, key=len, reverse=True))
    return (
        re.sub(rf"(?<![\w.-])(?:{mounts})(?![\w.-])", lambda found: places[found[0]], text)
        if mounts
        else text
    )


def stamp() -> str:
    """Return the time as in a container's log."""
    return f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%S.%f}000Z"
