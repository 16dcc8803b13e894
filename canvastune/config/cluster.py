"""The section `cluster`, and Kubernetes value types, checked before its API server sees them."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from canvastune import __version__
from canvastune.config.strict import InvalidSetting, StrictModel


def matching(pattern: str, expected: str) -> AfterValidator:
    """Return a validator that a whole text matches a pattern, which `expected` describes."""

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
ResourceName = Annotated[
    str,
    matching(
        rf"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?{_LABEL}",
        "the name of a resource, such as cpu, memory or nvidia.com/gpu",
    ),
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
    key: str = Field(min_length=1, description="key in the secret")


class Toleration(StrictModel):
    """A taint of nodes that the pods accept."""

    key: LabelKey | None = Field(None, description="key of the taint; default: every taint")
    operator: Literal["Exists", "Equal"] = Field(
        "Exists", description="Equal compares the taint's value, Exists does not"
    )
    value: str | None = Field(None, description="value of the taint, for the operator Equal")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="effect of the taint; default: every effect"
    )


class Resources(StrictModel):
    """Requests and limits of a container, as in Kubernetes."""

    requests: dict[ResourceName, Quantity] = Field(
        {}, description="requests by resource, such as cpu: 32"
    )
    limits: dict[ResourceName, Quantity] = Field(
        {}, description="limits by resource, such as cpu: 32"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Resources:
        for name in self.requests.keys() & self.limits.keys():
            if parse_quantity(self.requests[name]) > parse_quantity(self.limits[name]):
                raise InvalidSetting(
                    f"resources: the request of {name}, {self.requests[name]}, is above its limit, "
                    f"{self.limits[name]}",
                    hint="Lower the request, or raise the limit.",
                )
        return self


class CaBundle(StrictModel):
    """Certificates of authorities, in PEM, that replace those of the image."""

    config_map: Name | None = Field(None, description="name of the ConfigMap with the bundle")
    secret: Name | None = Field(None, description="name of the secret with the bundle")
    key: Annotated[str, matching(r"[-._a-zA-Z0-9]+", "a key of a ConfigMap or secret")] = Field(
        "ca.crt", description="key in the ConfigMap or secret"
    )

    @model_validator(mode="after")
    def _one_source(self) -> CaBundle:
        if (self.config_map is None) == (self.secret is None):
            raise InvalidSetting(
                "ca_bundle: expected either config_map or secret",
                hint="Name the one that holds the bundle, for example {config_map: company-ca}.",
            )
        return self


CA_PATH = "/etc/canvastune-ca"  # where the bundle is mounted
# Each is read by some of: Python and Go, requests, curl, S3's client, git, MLflow's client.
_CA_VARIABLES = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "AWS_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
)
# What PodSecurity restricted allows.
VOLUME_SOURCES = (
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
)
_AFFINITIES = ("nodeAffinity", "podAffinity", "podAntiAffinity")


class PodSettings(StrictModel):
    """What pods of training and pods of the pipeline's steps can both be given."""

    section: ClassVar[str] = "cluster."  # before a key, in messages
    env: dict[EnvVarName, str] = Field({}, description="environment variables")
    secret_env: dict[EnvVarName, SecretKey] = Field(
        {}, description="variables whose values come from secrets"
    )
    pull_secrets: tuple[Name, ...] = Field((), description="existing secrets for pulling the image")
    resources: Resources = Field(
        Resources(), description="requests and limits of a container, limits of CPU among them"
    )
    node_selector: dict[LabelKey, LabelValue] = Field(
        {}, description="labels of the nodes to run on"
    )
    tolerations: tuple[Toleration, ...] = Field((), description="taints that the pods tolerate")
    affinity: dict[str, Any] = Field(
        {}, description="affinity of the pods, as in Kubernetes, such as nodeAffinity"
    )
    priority_class: Name | None = Field(None, description="PriorityClass of the pods")
    extra_volumes: tuple[dict[str, Any], ...] = Field(
        (), description="volumes of the pods, as in Kubernetes"
    )
    extra_volume_mounts: tuple[dict[str, Any], ...] = Field(
        (), description="volume mounts of the container, as in Kubernetes"
    )
    ca_bundle: CaBundle | None = Field(
        None,
        description="certificates of your company's authority together with the public ones, for Python, "
        "the Hub, MLflow, S3 and git",
    )

    @model_validator(mode="after")
    def _consistent_pods(self) -> PodSettings:
        for name in self.env:
            if SECRET.fullmatch(name):
                raise InvalidSetting(
                    f"{self.section}env: {name} looks like a secret, which would be readable in the job",
                    hint=f"Set it in {self.section}secret_env: {{{name}: {{secret: S, key: K}}}}.",
                )
            if name in self.secret_env:
                raise InvalidSetting(
                    f"{self.section}env and {self.section}secret_env both set {name}",
                    hint="Remove one of them.",
                )
        if unknown := sorted(set(self.affinity) - set(_AFFINITIES)):
            raise InvalidSetting(
                f"{self.section}affinity.{unknown[0]}: expected {', '.join(_AFFINITIES)}",
                hint="Correct the key.",
            )
        self._check_volumes()
        return self

    def _check_volumes(self) -> None:
        names = [str(volume.get("name", "")) for volume in self.extra_volumes]
        for number, volume in enumerate(self.extra_volumes):
            sources = sorted(set(volume) - {"name"})
            if not names[number] or len(sources) != 1 or sources[0] not in VOLUME_SOURCES:
                raise InvalidSetting(
                    f"{self.section}extra_volumes[{number}]: expected a name and one of "
                    f"{', '.join(VOLUME_SOURCES)}, found {', '.join(sorted(volume)) or 'nothing'}",
                    hint="PodSecurity restricted allows no others.",
                )
        for number, mount in enumerate(self.extra_volume_mounts):
            path = mount.get("mountPath")
            if mount.get("name") not in names or not str(path or "").startswith("/"):
                raise InvalidSetting(
                    f"{self.section}extra_volume_mounts[{number}]: expected the name of one of extra_volumes and "
                    f"an absolute mountPath, found {mount.get('name')} and {path}",
                    hint=f"The names are {', '.join(names) or 'none'}.",
                )

    def ca_env(self) -> dict[str, str]:
        """Return the variables that point programs to the bundle of certificates."""
        file = f"{CA_PATH}/{self.ca_bundle.key}" if self.ca_bundle else ""
        return dict.fromkeys(_CA_VARIABLES, file) if file else {}


class ClusterConfig(PodSettings):
    """Where training runs: in the step's own container, or as a job. This does not affect the weights."""

    env: dict[EnvVarName, str] = Field(
        {},
        description="environment variables of the training processes, such as NCCL_SOCKET_IFNAME",
    )
    tolerations: tuple[Toleration, ...] = Field(
        (), description="taints that the pods tolerate, in addition to that of gpu_resource"
    )
    priority_class: Name | None = Field(
        None,
        description="Kueue's WorkloadPriorityClass if there is a queue, otherwise the PriorityClass of "
        "the pods",
    )

    backend: Literal["local", "pytorchjob", "trainjob"] = Field(
        "local",
        description="local: processes in the step's own container; pytorchjob: a PyTorchJob (training "
        "operator 1.9); trainjob: a TrainJob (Trainer 2.3)",
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
    claim: Name | None = Field(
        None,
        description="existing PersistentVolumeClaim with the workspace; default: the one mounted in the "
        "train step",
    )
    mount_path: Annotated[str, matching("/[^:,]+", "an absolute path")] = Field(
        "/workspace",
        description="where the claim is mounted, both in the pods and in the pipeline's steps",
    )
    sub_path: Annotated[str, matching(r"[-\w.][-\w./]*", "a folder within the claim")] | None = (
        Field(None, description="folder of the claim to mount; default: the whole claim")
    )
    gpu_resource: LabelKey | None = Field(
        "nvidia.com/gpu", description="resource name of an accelerator; null: train on CPU"
    )
    cpu: Quantity | None = Field(
        None, description="CPU request of a pod; for a limit, see resources"
    )
    memory: Quantity | None = Field(
        None, description="memory request and limit of a pod, including its use of shm"
    )
    shm: Quantity = Field("64Gi", description="size limit of the memory-backed /dev/shm")
    credentials: Name | None = Field(
        None,
        description="existing secret whose keys HF_TOKEN, MLFLOW_TRACKING_USERNAME, _PASSWORD and "
        "_TOKEN become variables of the pods",
    )
    fs_group: int | None = Field(
        10001,
        ge=1,
        description="group that owns the claim, by default that of the images' user; null: chosen by the "
        "platform, as on OpenShift",
    )
    queue: Name | None = Field(None, description="Kueue's LocalQueue that admits the job")
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
        72, gt=0, le=8760, description="hours after which a running job is stopped"
    )
    queue_hours: float = Field(
        24,
        gt=0,
        le=8760,
        description="hours after which the job is withdrawn if its pods are not running",
    )
    restarts: int = Field(
        3,
        ge=0,
        le=100,
        description="maximum number of restarts of failed pods, which resume from the newest checkpoint",
    )
    ttl_hours: float | None = Field(
        24,
        ge=0,
        le=8760,
        description="hours for which a finished PyTorchJob is kept; a TrainJob is deleted immediately; "
        "null: either is kept until you delete it",
    )
    runtime: Name | None = Field(
        "canvastune",
        description="TrainingRuntime of a TrainJob; it also sets scheduler, restarts and "
        "PriorityClass",
    )
    gpu_hour_price: float | None = Field(
        None,
        gt=0,
        description="hourly price of one accelerator, or of one process without an accelerator; if set, "
        "plan and report show the cost of the run",
    )
    currency: Annotated[str, matching(r"[^\W\d_]{1,8}|[$€£¥₹]", "a currency, such as USD")] = Field(
        "USD", description="currency of gpu_hour_price"
    )

    @property
    def memory_limit(self) -> str | None:
        """Memory limit of a training pod; None: its node's memory."""
        return self.resources.limits.get("memory", self.memory)

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
        if self.gpu_resource in {**self.resources.requests, **self.resources.limits}:
            raise InvalidSetting(
                f"cluster.resources: {self.gpu_resource} is set by parallel.nproc_per_node",
                hint=f"Remove {self.gpu_resource}.",
            )
        requested = {"cpu": self.cpu, "memory": self.memory}
        for name, limit in self.resources.limits.items():
            request = self.resources.requests.get(name) or requested.get(name)
            if request is not None and parse_quantity(request) > parse_quantity(limit):
                raise InvalidSetting(
                    f"cluster.resources.limits.{name} ({limit}) is below the request ({request})",
                    hint=f"Lower cluster.{name}, or raise the limit.",
                )
        memory = self.memory_limit
        if memory is not None and parse_quantity(self.shm) >= parse_quantity(memory):
            raise InvalidSetting(
                f"cluster.shm ({self.shm}) is part of cluster.memory ({memory}), expected "
                "less than it",
                hint="Lower cluster.shm.",
            )
        if self.backend == "trainjob" and self.runtime is None:
            raise InvalidSetting(
                "cluster.runtime: found null with cluster.backend = trainjob, expected a name",
                hint="Set cluster.runtime to the TrainingRuntime that the TrainJob refers to.",
            )
        return self
