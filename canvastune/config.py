"""The one typed tree that describes a run: read from YAML, changed by `--set key=value`, written beside every output."""

from __future__ import annotations

import difflib
import json
import math
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from canvastune import __version__
from canvastune.errors import UserError
from canvastune.kubernetes_forms import RESERVED, SECRET, Image, LabelKey, LabelValue, Name, Quantity, Variable, amount, written
from canvastune.section import Section
from canvastune.yaml_text import read_yaml, read_yaml_file

Checkpointing = bool | Literal["selective"]


class ModelConfig(Section):
    """The base model."""

    id: str = Field("google/diffusiongemma-26B-A4B-it", description="Hub id, or the folder of a checkpoint in the Hub's layout")
    revision: str | None = Field(None, description="Hub commit, tag or branch; not for a local folder")


class ColumnsConfig(Section):
    """Which columns hold the two sides of an example, for `data.format: columns`."""

    prompt: str = Field("prompt", description="column with the user's turn")
    response: str = Field("response", description="column with the assistant's turn")
    system: str | None = Field(None, description="column with the system turn, if there is one")


class DataConfig(Section):
    """Where the examples come from and what is refused."""

    source: str = Field(description="Hub data set id, or a local file or folder: .jsonl, .json, .parquet, each also .gz")
    config: str | None = Field(None, description="configuration of a Hub data set, as in openai/gsm8k `main`")
    revision: str | None = Field(None, description="Hub commit, tag or branch")
    split: str = Field("train", description="split of a Hub data set")
    format: Literal["auto", "messages", "gsm8k", "columns"] = Field("auto", description="form of a row; auto looks at the first row's keys")
    columns: ColumnsConfig = Field(default_factory=ColumnsConfig)
    seq_length: int = Field(1024, ge=8, description="tokens of prefix and response kept per example")
    validation_fraction: float = Field(0.02, gt=0, lt=1, description="share of the examples held out, chosen by a hash of their content")
    validation_rows: int | None = Field(
        None, ge=1, description="at most this many held-out examples (the rest of them is not trained on either)"
    )
    max_bad_rows: float = Field(0.01, ge=0, lt=1, description="share of rows that may be unreadable before the step fails")
    max_duplicates: float = Field(
        0.1, ge=0, le=1, description="share of rows that may repeat an earlier one before the step fails; repeats are always dropped"
    )
    max_rows: int | None = Field(None, ge=1, description="read no more rows than this")


class LoraConfig(Section):
    """The adapter."""

    rank: int = Field(16, ge=1, description="rank r of the two factors")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (rank-stabilised LoRA)")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of an adapter's input that is zeroed in training; never on experts")
    experts: bool = Field(False, description="adapters on every expert's two projections as well")

    @property
    def scale(self) -> float:
        """What B @ A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class ObjectiveConfig(Section):
    """What one step computes."""

    self_conditioning_probability: float = Field(
        0.5, ge=0, le=1, description="probability that an example is denoised twice, the second time seeing the first"
    )
    min_corruption: float = Field(0.001, gt=0, lt=1, description="eps of t ~ U(eps, 1)")
    encoder_loss_weight: float = Field(1.0, ge=0, description="weight of the autoregressive loss in the total")


class OptimizerConfig(Section):
    """AdamW with linear warm-up and a decay."""

    lr: float = Field(1.5e-4, gt=0, description="peak learning rate")
    min_lr: float = Field(1.5e-5, ge=0, description="learning rate at the last step; unused by the constant schedule")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="how the rate goes from lr to min_lr after the warm-up")
    warmup_steps: int = Field(25, ge=0, description="steps of linear warm-up; the first step already uses lr / warmup_steps")
    betas: tuple[float, float] = Field((0.95, 0.99), description="decay of the running means of the gradient and of its square")
    eps: float = Field(1e-8, gt=0, description="what is added to the root of the latter")
    weight_decay: float = Field(1e-4, ge=0, description="of matrices; see decay_vectors")
    decay_vectors: bool = Field(False, description="whether norms and other one-dimensional weights decay too")
    max_grad_norm: float = Field(1.0, gt=0, description="global gradient norm is clipped here")


class TrainConfig(Section):
    """The loop."""

    method: Literal["lora", "full"] = Field("lora", description="adapters on a frozen base, or every weight but router and vision")
    steps: int = Field(800, ge=1, description="optimiser steps")
    global_batch_size: int = Field(8, ge=1, description="examples per optimiser step, over all ranks")
    micro_batch_size: int | None = Field(None, ge=1, description="examples per rank and forward; default: the rank's whole share at once")
    precision: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="dtype of the compute; master weights of trained parameters are always float32"
    )
    attention: Literal["sdpa", "flex"] = Field(
        "sdpa",
        description="sdpa: each example by itself; flex: all of a batch in one FlexAttention kernel per layer, compiled, on CUDA alone",
    )
    activation_checkpointing: Checkpointing = Field(
        True,
        description="recompute layers in the backward pass instead of keeping their activations: true, each of them; selective, every "
        "second one; false, none",
    )
    log_every: int = Field(10, ge=1, description="steps between log lines; metrics.jsonl has every step")
    validate_every: int = Field(100, ge=1, description="steps between validations; the base and the last step are validated too")
    validation_levels: tuple[float, ...] = Field(
        (0.1, 0.3, 0.5, 0.7, 0.9), min_length=1, description="corruption levels of the validation loss, each above 0 and at most 1"
    )
    validation_batches: int | None = Field(None, ge=1, description="at most this many global batches per validation")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints; after the last step there is one too")
    keep_checkpoints: int = Field(
        2, ge=1, description="newest checkpoints that are kept; the one with the best validation loss stays besides"
    )
    async_checkpoints: bool = Field(True, description="write checkpoints beside the training; takes a copy of the state in host memory")
    export: Literal["best", "last"] = Field(
        "best", description="which weights a run ends with: the checkpoint of the best validation loss, or the last step"
    )
    early_stopping: int | None = Field(
        None, ge=1, description="stop after this many validations in a row without a better loss; default: never"
    )
    max_skipped_steps: int = Field(
        3, ge=0, description="steps in a row whose loss or gradient is not finite that are skipped before the run stops"
    )
    stop_grace: int = Field(
        60, ge=1, description="seconds in which a run that is asked to stop (SIGTERM) saves its state before it is killed"
    )
    hang_timeout: int = Field(600, ge=10, description="seconds without progress after which a run ends and names the rank that hangs")


class ParallelConfig(Section):
    """How the ranks share the work. world size = efsdp x ep; everything but the experts is sharded over all ranks."""

    nproc_per_node: int = Field(8, ge=1, description="processes that the pipeline's train step starts; torchrun sets its own")
    ep: int = Field(8, ge=1, description="expert-parallel degree: divides the world size and the number of experts")


class EvaluateConfig(Section):
    """Answers before and after, on held-out rows."""

    rows: int = Field(64, ge=1, description="held-out rows that are answered")
    batch_size: int = Field(8, ge=1, description="rows that are answered at once")
    max_new_tokens: int = Field(256, ge=1, description="tokens of an answer, at most")
    max_denoising_steps: int = Field(48, ge=1, description="denoising steps of a block, at most")
    answer_pattern: str = Field(
        r"####\s*(-?[\d.,]+)", description="regular expression whose last match's group 1 is the answer that exact match compares"
    )


class TrackingConfig(Section):
    """MLflow. MLFLOW_TRACKING_URI in the environment wins over `uri`."""

    uri: str | None = Field(None, description="tracking server or sqlite:/// file; default: sqlite:///mlflow.db in the workspace")
    experiment: str = Field("canvastune", description="of MLflow, and of Kubeflow where `submit` is given none")
    registered_model: str | None = Field(None, description="name under which the tuned model is registered; default: not registered")
    promote: Literal["better", "never"] = Field(
        "better",
        description="when a registered model gets the alias champion: better, if its exact match is above the champion's on the same rows "
        "(the first one: not below the base's); never",
    )


class SecretKey(Section):
    """A key of an existing Kubernetes secret."""

    secret: Name = Field(description="name of the secret")
    key: str = Field(min_length=1, description="key in it")


class Toleration(Section):
    """A taint of nodes that the pods accept."""

    key: LabelKey | None = Field(None, description="key of the taint; default: every taint")
    operator: Literal["Exists", "Equal"] = Field("Exists", description="Equal compares the taint's value, Exists does not")
    value: str | None = Field(None, description="for operator Equal")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(None, description="default: every effect")


class ClusterConfig(Section):
    """Where the training runs: in the pipeline step's own container, or as a job on Kubernetes. It changes no weight."""

    backend: Literal["local", "pytorchjob", "trainjob"] = Field(
        "local", description="local: torchrun in the step itself; else a PyTorchJob (training operator 1.9) or a TrainJob (Trainer 2)"
    )
    nodes: int = Field(1, ge=1, le=1024, description="pods of the job, each with parallel.nproc_per_node accelerators")
    image: Image = Field(f"canvastune/trainer:{__version__}", description="image of the training pods")
    pull_secrets: tuple[Name, ...] = Field((), description="existing secrets that the image is pulled with")
    claim: Name | None = Field(
        None, description="existing PersistentVolumeClaim with the workspace; default: the one that is mounted in the train step"
    )
    mount_path: Annotated[str, written("/[^:,]+", "an absolute path")] = Field(
        "/workspace", description="where the claim is mounted, in the pods as in the pipeline's steps"
    )
    gpu_resource: LabelKey | None = Field("nvidia.com/gpu", description="resource of an accelerator; null: train on CPU")
    cpu: Quantity | None = Field(None, description="CPU request of a pod")
    memory: Quantity | None = Field(None, description="memory request and limit of a pod; what is used of shm counts")
    shm: Quantity = Field("64Gi", description="size limit of the memory-backed /dev/shm")
    env: dict[Variable, str] = Field({}, description="variables of the training processes, such as NCCL_SOCKET_IFNAME")
    secret_env: dict[Variable, SecretKey] = Field({}, description="variables whose value is a secret's")
    credentials: Name | None = Field(
        None, description="existing secret whose keys HF_TOKEN, MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN become variables of the pods"
    )
    fs_group: int | None = Field(
        10001, ge=1, description="group that owns the claim, that of the images' user; null: the platform's, as on OpenShift"
    )
    node_selector: dict[LabelKey, LabelValue] = Field({}, description="labels of the nodes to run on")
    tolerations: tuple[Toleration, ...] = Field((), description="taints that the pods accept; that of gpu_resource is one already")
    queue: Name | None = Field(None, description="Kueue's LocalQueue that admits the job")
    priority_class: Name | None = Field(
        None, description="Kueue's WorkloadPriorityClass with a queue; without one, the pods' PriorityClass"
    )
    scheduler: Name | None = Field(None, description="scheduler of the pods; default: the cluster's")
    service_account: Name | None = Field(None, description="of the training pods, which get no token; default: the namespace's")
    rdma_resource: LabelKey | None = Field(None, description="resource of an RDMA device, such as rdma/hca_shared_devices_a")
    rdma_count: int = Field(1, ge=1, le=64, description="RDMA devices of a pod, where rdma_resource is set")
    deadline_hours: float = Field(72, gt=0, le=8760, description="the job is ended after this many hours of running")
    queue_hours: float = Field(24, gt=0, le=8760, description="the job is withdrawn if its pods do not run after this many hours")
    restarts: int = Field(3, ge=0, le=100, description="how often failed pods are started again; they go on from the newest checkpoint")
    ttl_hours: float | None = Field(
        24,
        ge=0,
        le=8760,
        description="a finished PyTorchJob is kept for this long, a TrainJob not at all; null: until somebody deletes it",
    )
    runtime: Name | None = Field(
        "canvastune", description="TrainingRuntime of a TrainJob; it also sets scheduler, restarts and PriorityClass"
    )

    @model_validator(mode="after")
    def _possible(self) -> ClusterConfig:
        if self.nodes > 1 and self.backend == "local":
            raise ValueError(f"cluster.nodes = {self.nodes} with cluster.backend = local: choose backend pytorchjob or trainjob")
        for name in (*self.env, *self.secret_env):
            if RESERVED.fullmatch(name):
                raise ValueError(f"cluster.env: {name} is set by the training operator. Leave it out")
        for name in self.env:
            if SECRET.fullmatch(name):
                raise ValueError(
                    f"cluster.env: {name} looks like a secret. Name it in cluster.secret_env: {{{name}: {{secret: S, key: K}}}}"
                )
            if name in self.secret_env:
                raise ValueError(f"cluster.env and cluster.secret_env both set {name}. Keep one")
        if self.memory is not None and amount(self.shm) >= amount(self.memory):
            raise ValueError(f"cluster.shm ({self.shm}) is part of cluster.memory ({self.memory}), and must be below it. Lower cluster.shm")
        if self.backend == "trainjob" and self.runtime is None:
            raise ValueError("cluster.runtime is null: name the TrainingRuntime that the TrainJob refers to")
        return self


class HardwareConfig(Section):
    """What the planner plans for."""

    gpu_memory: float = Field(80.0, gt=0, description="GB (1e9 bytes) per accelerator")
    accelerator: str = Field("h100", description="row of the planner's table of accelerators")


class RunConfig(Section):
    """A recipe."""

    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9_]*[a-z0-9])?$", max_length=50, description="of the recipe's runs, jobs and models")
    seed: int = Field(42, ge=0, lt=2**63, description="decides order, noise and new weights, on any number of ranks alike")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
    evaluate: EvaluateConfig = Field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)
    cluster: ClusterConfig = Field(default_factory=ClusterConfig)

    @property
    def world_size(self) -> int:
        """Processes that train together in the pipeline, over all nodes."""
        return self.cluster.nodes * self.parallel.nproc_per_node

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.optimizer.min_lr > self.optimizer.lr:
            raise ValueError(f"optimizer.min_lr ({self.optimizer.min_lr}) is above optimizer.lr ({self.optimizer.lr}). Lower it")
        bad = [level for level in self.train.validation_levels if not 0 < level <= 1]
        if bad:
            raise ValueError(f"train.validation_levels: {bad[0]} is outside (0, 1]. Give shares of corrupted tokens")
        return self


def load_config(recipe: Path | str, overrides: list[str] | None = None) -> RunConfig:
    """Read a recipe from a YAML file and apply `key=value` overrides (values are YAML: `lora.rank=32`, `train.method=full`).

    Raises:
        UserError: no such file, not YAML, an unknown key (with the nearest known one) or an ill-typed value.
    """
    path = Path(recipe)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe file. Give the path of a YAML file, for example pipelines/recipes/tiny_lora.yaml")
    tree = _mapping(read_yaml_file(path), str(path))
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree, str(path))


def parse_config(tree: dict[str, Any] | str, where: str = "recipe") -> RunConfig:
    """Validate a tree, or its JSON text, as a RunConfig.

    Raises:
        UserError: one line per problem, each naming the key, the value and what is allowed.
    """
    if isinstance(tree, str):
        try:
            tree = json.loads(tree)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON: {error}. Give what the step `resolve` wrote") from None
    try:
        return RunConfig.model_validate(_mapping(tree, where))
    except ValidationError as error:
        raise UserError("\n".join(_explain(where, problem) for problem in error.errors())) from None


def write_config(config: RunConfig, path: Path) -> None:
    """Write the whole tree, defaults included, as YAML."""
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def known_keys(section: type[Section] = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the tree with its pydantic field, branches before their leaves."""
    keys: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        keys[prefix + name] = field
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= known_keys(field.annotation, f"{prefix}{name}.")
    return keys


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"--set {override}: expected key=value, for example --set lora.rank=32")
    if key not in known_keys():
        raise UserError(f"--set {override}: unknown key {key!r}{_nearest(key)}")
    value = read_yaml(text, f"--set {override}")
    *branches, leaf = key.split(".")
    for branch in branches:
        if not isinstance(tree.get(branch), dict):
            tree[branch] = {}
        tree = tree[branch]
    tree[leaf] = value


def _explain(where: str, problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    value = problem["input"]
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key {key!r} (value {_short(value)}){_nearest(key)}"
    if problem["type"] == "missing":
        return f"{where}: key {key!r} is missing: {_describe(key)}. Set it in the recipe, or with --set {key}=VALUE"
    if problem["type"] == "value_error":
        return f"{where}: {problem['ctx']['error']}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{where}: key {key!r}: found {_short(value)}, expected: {message}. Correct it: {_describe(key)}".rstrip(": ")


def _describe(key: str) -> str:
    field = known_keys().get(key)
    return field.description or "" if field is not None else ""


def _nearest(key: str) -> str:
    keys = list(known_keys())
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not close:  # the last part alone may be right, in another branch
        leaves = {known.rsplit(".", 1)[-1]: known for known in keys}
        close = [leaves[leaf] for leaf in difflib.get_close_matches(key.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.6)]
    return f"; did you mean {close[0]!r}?" if close else f"; known keys begin with {', '.join(RunConfig.model_fields)}. Use one of those"


def _short(value: Any) -> str:
    brief = reprlib.Repr()  # bounded work as well: aliases can make a small file a vast value
    brief.maxstring = brief.maxother = 60
    text = brief.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _mapping(tree: Any, where: str) -> dict[str, Any]:
    if isinstance(tree, dict):
        return tree
    found = "nothing" if tree is None else f"a {type(tree).__name__}"
    raise UserError(f"{where}: a recipe is a mapping of keys, found {found}. Begin with pipelines/recipes/tiny_lora.yaml, and change it")
