"""A namespace on the stand-in of the API server, an operator, and launchers that run in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import pytest
from kubernetes import client as kubernetes

from canvastune.config import RunConfig, parse_config
from canvastune.errors import UserError
from components.jobs.client import KubernetesClient
from components.jobs.launcher import launch
from components.jobs.manifests import JobContext
from components.jobs.states import KINDS
from tests.fakes.fake_kubernetes import Clock, FakeKubernetes, Operator

WORKFLOW = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "flow", "uid": "w-1", "controller": True}
FACTS = JobContext(
    run_id="run-1",
    output=PurePosixPath("/workspace/runs/a/train"),
    module=("canvastune.train", "-c", "/workspace/runs/a/train/recipe.yaml", "--output", "/workspace/runs/a/train"),
)
HOUR = 3600.0


def config_of(backend: str = "pytorchjob", **cluster: Any) -> RunConfig:
    section = {"backend": backend, "claim": "workspace", "queue_hours": 0.1, "deadline_hours": 0.2, **cluster}
    return parse_config({"name": "gsm8k_lora", "data": {"source": "openai/gsm8k"}, "cluster": section})


class Cluster:
    """A namespace with what a run needs, an operator for one kind of job, and launchers that run in it."""

    def __init__(self, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.backend, self.clock, self._capsys, self.said = backend, Clock(), capsys, ""
        self.api = FakeKubernetes(self.clock)
        self.operator = Operator(self.api, KINDS[backend].plural)
        self.api.put("persistentvolumeclaims", "workspace")
        self.api.put("trainingruntimes", "canvastune", spec={"template": {"spec": {"replicatedJobs": []}}})

    def client(self) -> kubernetes.ApiClient:
        settings = kubernetes.Configuration(host=self.api.url)
        settings.retries = False
        return kubernetes.ApiClient(settings)

    def launch(self, config: RunConfig | None = None, facts: JobContext = FACTS, task: Mapping[str, Any] | None = None) -> None:
        """Run a launcher to its end, as a step of the pipeline does."""
        try:
            launch(
                KubernetesClient(self.client(), "team-a", KINDS[self.backend], self.clock),
                config or config_of(self.backend),
                facts,
                task,
                self.clock,
            )
        finally:
            self.said += self._capsys.readouterr().out

    def fails(self, config: RunConfig | None = None, facts: JobContext = FACTS) -> str:
        """Run a launcher that must fail; its words."""
        with pytest.raises(UserError) as caught:
            self.launch(config, facts)
        return str(caught.value)

    def at(self, seconds: float, action: Callable[..., object], *arguments: Any, **named: Any) -> None:
        self.clock.at(seconds, lambda: action(*arguments, **named))

    def say(self, seconds: float, *lines: str) -> None:
        """Rank 0 says lines at a time."""
        for line in lines:
            self.clock.at(seconds, lambda line=line: self.api.say(self.operator.first_pod, f"[rank 0]: {line}"))  # type: ignore[misc]

    def goes_well(self, start: float = 0) -> None:
        """From `start` on the job runs, and succeeds after a minute."""
        self.at(start + 1, self.operator.created)
        self.at(start + 3, self.operator.pending)
        self.at(start + 10, self.operator.running)
        self.say(start + 11, "step 1/800")
        self.say(start + 40, "step 2/800")
        self.at(start + 60, self.operator.succeeded)

    @property
    def creations(self) -> int:
        return self.api.calls.count(f"create {KINDS[self.backend].plural}")


def stage(backend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster for one test."""
    monkeypatch.delenv("KFP_POD_NAME", raising=False)
    monkeypatch.setenv("HOSTNAME", "launcher-pod")
    made = Cluster(backend, capsys)
    yield made
    made.api.close()
