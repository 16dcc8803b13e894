"""The oldest version of each program that this one works with; docs/support.md has the same table."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Floor:
    """The oldest version that works, and why older ones do not."""

    program: str
    version: str
    reason: str
    compared: str  # by which commands, with what

    def is_below(self, found: str) -> bool:
        """Return whether a version is older; False for text that is not one, such as a branch's."""
        parts, wanted = _numbers(found), _numbers(self.version)
        return bool(parts) and parts < wanted

    def __str__(self) -> str:
        return f"{self.program} {self.version}"


PIPELINES = Floor(
    "Kubeflow Pipelines",
    "2.15",
    "optional secrets of steps (`SecretAsEnv.optional`)",
    "`submit`, `upload` and `doctor`, using `tag_name` from its healthz endpoint",
)
RESTRICTED_STEPS = Floor(
    "Kubeflow Pipelines, where PodSecurity *restricted* is enforced",
    "2.16",
    "security contexts of steps",
    "`submit` and `upload`, which omit `runAsNonRoot` for older versions; `doctor`",
)
TRAINING_OPERATOR = Floor(
    "training operator",
    "1.9",
    "the CRD that PyTorchJobs are written for; older versions were not tried",
    "the launcher, using the job that the API server stored; `doctor`, using the API's schema",
)
TRAINER = Floor(
    "Kubeflow Trainer",
    "2.3",
    "the grace period of pods in a TrainJob's `runtimePatches`; 2.1 has no `runtimePatches`",
    "the launcher, using the job that the API server stored; `doctor`, using the API's schema",
)
KUEUE = Floor(
    "Kueue",
    "0.14",
    "queueing of TrainJobs; older versions are sufficient for PyTorchJobs",
    "the launcher: a job that runs without a Workload did not go through its queue",
)
KUBERNETES = Floor(
    "Kubernetes",
    "1.25",
    "PodSecurity admission",
    "the chart (`kubeVersion`), the launcher and `doctor`",
)
HELM = Floor("Helm", "3.8", "the chart's templates and schema", "the chart, when it is rendered")
MLFLOW = Floor(
    "MLflow server",
    "3.5",
    "logged models, and `--allowed-hosts`",
    "`doctor` and each run's first step, using the server's /version",
)
MLFLOW_CLIENT = Floor(
    "MLflow client",
    "3.17",
    "the version that the package pins and the images contain",
    "pip; `doctor`, using the installed version",
)
FLOORS = (
    KUBERNETES,
    HELM,
    PIPELINES,
    RESTRICTED_STEPS,
    TRAINING_OPERATOR,
    TRAINER,
    KUEUE,
    MLFLOW,
    MLFLOW_CLIENT,
)


def _numbers(text: str) -> tuple[int, ...]:
    """Return major and minor of `v1.29.3-gke.1`, `2.14.0` or `1.29+`; () if it has neither."""
    match = re.match(r"v?(\d+)\.(\d+)", text.strip())
    return (int(match[1]), int(match[2])) if match else ()
