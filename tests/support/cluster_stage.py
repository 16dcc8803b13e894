"""A namespace on the fake API server, an operator, and launchers that run in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import pytest
from kubernetes import client as kubernetes

from canvastune.config import RunConfig, parse_config
from canvastune.errors import UserError, format_error
from components.jobs.backends import JobContext
from components.jobs.client import KubernetesClient
from components.jobs.launcher import launch
from components.jobs.states import KINDS
from tests.fakes.fake_kubernetes import Clock, FakeKubernetes, Operator

WORKFLOW = {
    "apiVersion": "argoproj.io/v1alpha1",
    "kind": "Workflow",
    "name": "flow",
    "uid": "w-1",
    "controller": True,
}
CONTEXT = JobContext(
    run_id="run-1",
    output=PurePosixPath("/workspace/runs/a/train"),
    module=(
        "canvastune.train",
        "-c",
        "/workspace/runs/a/train/recipe.yaml",
        "--output",
        "/workspace/runs/a/train",
    ),
)
HOUR = 3600.0


def config_of(backend: str = "pytorchjob", **cluster: Any) -> RunConfig:
    section = {
        "backend": backend,
        "claim": "workspace",
        "queue_hours": 0.1,
        "deadline_hours": 0.2,
        **cluster,
    }
    return parse_config(
        {"name": "gsm8k_lora", "data": {"source": "openai/gsm8k"}, "cluster": section}
    )


class Cluster:
    """A namespace with what a run needs, an operator for one kind of job, and launchers."""

    def __init__(self, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.backend, self.clock, self._capsys, self.output = backend, Clock(), capsys, ""
        self.kind = KINDS[backend]
        self.api = FakeKubernetes(self.clock)
        self.operator = Operator(self.api, self.kind.plural)
        self.api.put("persistentvolumeclaims", "workspace")
        self.api.put(
            "trainingruntimes", "canvastune", spec={"template": {"spec": {"replicatedJobs": []}}}
        )

    def client(self) -> KubernetesClient:
        settings = kubernetes.Configuration(host=self.api.url)
        settings.retries = False
        return KubernetesClient(kubernetes.ApiClient(settings), "team-a", self.kind, self.clock)

    def jobs(self) -> list[dict[str, Any]]:
        return self.api.all(self.kind.plural)

    def launch(
        self,
        config: RunConfig | None = None,
        context: JobContext = CONTEXT,
        task: Mapping[str, Any] | None = None,
    ) -> dict[str, str]:
        """Run a launcher to completion, as a step of the pipeline does."""
        try:
            return launch(self.client(), config or config_of(self.backend), context, task)
        finally:
            self.output += self._capsys.readouterr().out

    def fails(self, config: RunConfig | None = None, context: JobContext = CONTEXT) -> str:
        """Run a launcher that must fail, and return its error without the names of this job."""
        with pytest.raises(UserError) as caught:
            self.launch(config, context)
        return self.without_names(format_error(caught.value))

    def without_names(self, text: str) -> str:
        """Replace the kind and name of the job and the names of its pods: hashes change with any
        setting.
        """
        text = re.sub(r"\b(train|evaluate)-gsm8k-lora-\w{8}-\w{8}\b", "JOB", text)
        return re.sub(r"JOB-(worker|node-0)-0", "POD", text).replace(self.kind.kind, "KIND")

    def at(
        self, seconds: float, action: Callable[..., object], *arguments: Any, **named: Any
    ) -> None:
        self.clock.at(seconds, lambda: action(*arguments, **named))

    def log(self, seconds: float, *lines: str) -> None:
        """Let rank 0 write lines at a time."""
        for line in lines:
            self.at(seconds, self._log_line, f"[rank 0]: {line}")

    def _log_line(self, line: str) -> None:
        self.api.log(self.operator.first_pod, line)

    def goes_well(self, start: float = 0) -> None:
        """Let the job start at `start`, and succeed after a minute."""
        self.at(start + 1, self.operator.created)
        self.at(start + 3, self.operator.pending)
        self.at(start + 10, self.operator.running)
        self.log(start + 11, "step 1/800")
        self.log(start + 40, "step 2/800")
        self.at(start + 60, self.operator.succeeded)

    @property
    def creations(self) -> int:
        return self.api.calls.count(f"create {self.kind.plural}")


def stage(
    backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Cluster]:
    """Yield a cluster for one test."""
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    monkeypatch.setenv("HOSTNAME", "launcher-pod")
    cluster = Cluster(backend, capsys)
    yield cluster
    cluster.api.close()
