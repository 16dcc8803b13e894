"""The section `cluster`, and the Kubernetes value types that are checked before its API server sees
them.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from canvastune import __version__
from canvastune.config.strict import InvalidSetting, StrictModel


def matching(pattern: str, expected: str) -> AfterValidator:
    """Return a validator that the whole text matches a pattern; `expected` describes it in the
    error.
    """

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise PydanticCustomError("form", expected)
        return text

    return AfterValidator(check)


_LABEL = "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
_QUANTITY = r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?"
Name = Annotated[
    str,
    matching(
        r"(?=.{1,253}$)[a-z0-9]([-a-z0-9.]*[a-z0-9])?",
        "a Kubernetes name: a-z, 0-9, '-' and '.', at most 253",
    ),
]
LabelKey = Annotated[
    str,
    matching(
        rf"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?{_LABEL}",
        "a Kubernetes label key such as nvidia.com/gpu.product",
    ),
]
LabelValue = Annotated[
    str,
    matching(
        f"({_LABEL})?", "a Kubernetes label value: at most 63 letters, digits, '-', '_' and '.'"
    ),
]
Quantity = Annotated[
    str,
    # as Kubernetes does: 32 is "32"
    BeforeValidator(lambda value: str(value) if type(value) in (int, float) else value),
    matching(f"(?=.*[1-9]){_QUANTITY}", "a Kubernetes quantity above 0, such as 32, 500m or 512Gi"),
]
EnvVarName = Annotated[
    str, matching("[A-Za-z_][A-Za-z0-9_]*", "the name of an environment variable")
]
Image = Annotated[
    str,
    matching(
        r"[a-z0-9]\S*",
        "an image such as registry.example/canvastune/trainer:1.0, or one with @sha256:...",
    ),
]
# set by the training operators
RESERVED = re.compile(r"PET_.*|MASTER_(ADDR|PORT)|RANK|WORLD_SIZE|NODE_RANK")
SECRET = re.compile(r"(.*_)?(TOKEN|PASSWORD|SECRET|KEY)")


def parse_quantity(quantity: str) -> float:
    """Return a Kubernetes quantity as a number."""
    number = re.match(r"[0-9.]+", quantity)
    assert number is not None
    unit = quantity[number.end() :]
    powers = {"": 1.0, "m": 1e-3, "k": 1e3} | {
        letter: 1000.0 ** (n + 2) for n, letter in enumerate("MGTP")
    }
    return (
        float(number[0])
        * (powers | {f"{letter}i": 1024.0 ** (n + 1) for n, letter in enumerate("KMGTP")})[unit]
    )


class SecretKey(StrictModel):
    """A key of an existing Kubernetes secret."""

    secret: Name = Field(description="name of the secret")
    key: str = Field(min_length=1, description="key in it")


class Toleration(StrictModel):
    """A taint of nodes that the pods accept."""

    key: LabelKey | None = Field(None, description="key of the taint; default: every taint")
    operator: Literal["Exists", "Equal"] = Field(
        "Exists", description="Equal compares the taint's value, Exists does not"
    )
    value: str | None = Field(None, description="for operator Equal")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="default: every effect"
    )


class ClusterConfig(StrictModel):
    """Where the training runs: in the pipeline step's own container, or as a job on Kubernetes. It
    changes no weight.
    """

    backend: Literal["local", "pytorchjob", "trainjob"] = Field(
        "local",
        description="local: torchrun in the step itself; otherwise a PyTorchJob (training operator 1.9) "
        "or a TrainJob (Trainer 2.3)",
    )
    nodes: int = Field(
        1,
        ge=1,
        le=1024,
        description="pods of the job, each with parallel.nproc_per_node accelerators",
    )
    image: Image = Field(
        f"canvastune/trainer:{__version__}", description="image of the training pods"
    )
    pull_secrets: tuple[Name, ...] = Field((), description="existing secrets for pulling the image")
    claim: Name | None = Field(
        None,
        description="existing PersistentVolumeClaim with the workspace; default: the one that is "
        "mounted in the train step",
    )
    mount_path: Annotated[str, matching("/[^:,]+", "an absolute path")] = Field(
        "/workspace",
        description="where the claim is mounted, both in the pods and in the pipeline's steps",
    )
    gpu_resource: LabelKey | None = Field(
        "nvidia.com/gpu", description="resource name of an accelerator; null: train on CPU"
    )
    cpu: Quantity | None = Field(None, description="CPU request of a pod")
    memory: Quantity | None = Field(
        None, description="memory request and limit of a pod, including its use of shm"
    )
    shm: Quantity = Field("64Gi", description="size limit of the memory-backed /dev/shm")
    env: dict[EnvVarName, str] = Field(
        {}, description="variables of the training processes, such as NCCL_SOCKET_IFNAME"
    )
    secret_env: dict[EnvVarName, SecretKey] = Field(
        {}, description="variables whose values come from secrets"
    )
    credentials: Name | None = Field(
        None,
        description="existing secret whose keys HF_TOKEN, MLFLOW_TRACKING_USERNAME, _PASSWORD and "
        "_TOKEN become variables of the pods",
    )
    fs_group: int | None = Field(
        10001,
        ge=1,
        description="group that owns the claim, that of the images' user; null: the platform's, as "
        "on OpenShift",
    )
    node_selector: dict[LabelKey, LabelValue] = Field(
        {}, description="labels of the nodes to run on"
    )
    tolerations: tuple[Toleration, ...] = Field(
        (), description="taints that the pods tolerate, in addition to that of gpu_resource"
    )
    queue: Name | None = Field(None, description="Kueue's LocalQueue that admits the job")
    priority_class: Name | None = Field(
        None,
        description="Kueue's WorkloadPriorityClass with a queue; without one, the pods' "
        "PriorityClass",
    )
    scheduler: Name | None = Field(
        None, description="scheduler of the pods; default: the cluster's"
    )
    service_account: Name | None = Field(
        None,
        description="service account of the training pods, which get no token; default: the "
        "namespace's",
    )
    rdma_resource: LabelKey | None = Field(
        None, description="resource name of an RDMA device, such as rdma/hca_shared_devices_a"
    )
    rdma_count: int = Field(
        1, ge=1, le=64, description="RDMA devices per pod, if rdma_resource is set"
    )
    deadline_hours: float = Field(
        72, gt=0, le=8760, description="the job is stopped after running for this many hours"
    )
    queue_hours: float = Field(
        24,
        gt=0,
        le=8760,
        description="the job is withdrawn if its pods do not run after this many hours",
    )
    restarts: int = Field(
        3,
        ge=0,
        le=100,
        description="how often failed pods are restarted; they resume from the newest checkpoint",
    )
    ttl_hours: float | None = Field(
        24,
        ge=0,
        le=8760,
        description="a finished PyTorchJob is kept for this long, a TrainJob not at all; null: "
        "until it is deleted",
    )
    runtime: Name | None = Field(
        "canvastune",
        description="TrainingRuntime of a TrainJob; it also sets scheduler, restarts and "
        "PriorityClass",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ClusterConfig:
        if self.nodes > 1 and self.backend == "local":
            raise InvalidSetting(
                f"cluster.nodes: found {self.nodes} with cluster.backend = local, expected 1",
                hint="Set cluster.backend to pytorchjob or trainjob.",
            )
        for name in (*self.env, *self.secret_env):
            if RESERVED.fullmatch(name):
                raise InvalidSetting(
                    f"cluster.env: {name} is set by the training operator", hint=f"Remove {name}."
                )
        for name in self.env:
            if SECRET.fullmatch(name):
                raise InvalidSetting(
                    f"cluster.env: {name} looks like a secret, which would be readable in the job",
                    hint=f"Set it in cluster.secret_env: {{{name}: {{secret: S, key: K}}}}.",
                )
            if name in self.secret_env:
                raise InvalidSetting(
                    f"cluster.env and cluster.secret_env both set {name}",
                    hint="Remove one of them.",
                )
        if self.memory is not None and parse_quantity(self.shm) >= parse_quantity(self.memory):
            raise InvalidSetting(
                f"cluster.shm ({self.shm}) is part of cluster.memory ({self.memory}), expected "
                "less than it",
                hint="Lower cluster.shm.",
            )
        if self.backend == "trainjob" and self.runtime is None:
            raise InvalidSetting(
                "cluster.runtime: found null with cluster.backend = trainjob, expected a name",
                hint="Set cluster.runtime to the TrainingRuntime that the TrainJob refers to.",
            )
        return self
