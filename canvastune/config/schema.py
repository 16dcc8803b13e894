"""The one typed tree that describes a run: read from YAML, changed by `--set key=value`, written
next to every output.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from canvastune.config.cluster import ClusterConfig
from canvastune.config.data import DataConfig, MixtureSource, SourceFields
from canvastune.config.judge import AsList, JudgeNames, check_pattern, python_place, split_judge
from canvastune.config.strict import ChangeableOnResume, InvalidSetting, StrictModel

Checkpointing = bool | Literal["selective"]


def _check_blocks(value: Any) -> Any:
    """Refuse here what no member of the union takes, with one message instead of one each."""
    if value == "all" or (type(value) is int and value >= 1):
        return value
    raise PydanticCustomError("blocks", "a whole number of at least 1, or all")


Blocks = int | Literal["all"]


class ModelConfig(StrictModel):
    """The base model."""

    id: str = Field(
        "google/diffusiongemma-26B-A4B-it",
        description="Hub ID, or a folder with a checkpoint in the Hub's layout",
    )
    revision: str | None = Field(
        None, description="Hub commit, tag or branch; does not apply to a local folder"
    )


class LoraConfig(StrictModel):
    """The adapter."""

    rank: int = Field(16, ge=1, description="rank r of the two factors")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    rslora: bool = Field(
        False, description="scale by alpha / sqrt(rank) instead (rank-stabilized LoRA)"
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="fraction of an adapter's input that is zeroed in training; never on experts",
    )
    experts: bool = Field(
        False, description="whether every expert's two projections get adapters too"
    )

    @property
    def scale(self) -> float:
        """Factor that B @ A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class ObjectiveConfig(StrictModel):
    """What one step computes."""

    blocks: Blocks = Field(
        1,
        description="number of blocks of each example, or `all`, that a step denoises with one pass over "
        "the clean tokens; they are drawn without replacement, and an example with fewer "
        "blocks has all of them denoised",
    )
    self_conditioning_probability: float = Field(
        0.5,
        ge=0,
        le=1,
        description="probability that an example is denoised twice, the second time conditioned on the "
        "first prediction",
    )
    min_corruption: float = Field(
        0.001, gt=0, lt=1, description="lower bound eps of the corruption level t ~ U(eps, 1)"
    )
    encoder_loss_weight: float = Field(
        1.0, ge=0, description="weight of the autoregressive loss in the total"
    )
    _check_blocks = field_validator("blocks", mode="before")(_check_blocks)


class OptimizerConfig(StrictModel):
    """AdamW with linear warm-up and decay."""

    lr: float = Field(1.5e-4, gt=0, description="peak learning rate")
    min_lr: float = Field(
        1.5e-5, ge=0, description="learning rate at the last step; unused by the constant schedule"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the learning rate decays from lr to min_lr after the warm-up"
    )
    warmup_steps: int = Field(
        25,
        ge=0,
        description="steps of linear warm-up; the first step already uses lr / warmup_steps",
    )
    betas: tuple[float, float] = Field(
        (0.95, 0.99),
        description="decay rates of the running means of the gradient and of its square",
    )
    eps: float = Field(
        1e-8,
        gt=0,
        description="added to the square root of the running mean of the squared gradient",
    )
    weight_decay: float = Field(
        1e-4, ge=0, description="weight decay of matrices; see decay_vectors"
    )
    decay_vectors: bool = Field(
        False,
        description="whether weight decay also applies to norms and other one-dimensional weights",
    )
    max_grad_norm: float = Field(
        1.0, gt=0, description="value to which the global gradient norm is clipped"
    )


class TrainConfig(StrictModel):
    """The training loop."""

    method: Literal["lora", "full"] = Field(
        "lora",
        description="lora: adapters on a frozen base; full: every weight except the router and the vision "
        "tower",
    )
    steps: int = Field(800, ge=1, description="optimizer steps")
    global_batch_size: int = Field(
        8, ge=1, description="examples per optimizer step, over all ranks"
    )
    micro_batch_size: ChangeableOnResume[int | None] = Field(
        None,
        ge=1,
        description="examples per rank and forward pass; default: all of the rank's examples at once",
    )
    micro_batch_blocks: ChangeableOnResume[int | None] = Field(
        None,
        ge=1,
        description="blocks of an example per forward pass; the rest of objective.blocks go through "
        "further passes, each of which computes the preceding clean tokens again; default: "
        "all at once",
    )
    precision: Literal["bfloat16", "float32"] = Field(
        "bfloat16",
        description="compute dtype; master weights of trained parameters are always float32",
    )
    attention: ChangeableOnResume[Literal["sdpa", "flex"]] = Field(
        "sdpa",
        description="sdpa: one example at a time; flex: the whole batch in one compiled FlexAttention "
        "kernel per layer, only on CUDA",
    )
    triton_kernels: ChangeableOnResume[bool] = Field(
        True,
        description="true: on CUDA, if a C compiler and Python's headers are installed, norms, rotary "
        "embeddings, gates and routing run as Triton kernels, with a third of the launches; "
        "false: they run as PyTorch operators",
    )
    activation_checkpointing: ChangeableOnResume[Checkpointing] = Field(
        True,
        description="layers that the backward pass recomputes instead of keeping their activations: all "
        "(true), every second one (selective) or none (false)",
    )
    log_every: ChangeableOnResume[int] = Field(
        10, ge=1, description="steps between log lines; metrics.jsonl has every step"
    )
    validate_every: ChangeableOnResume[int] = Field(
        100,
        ge=1,
        description="steps between validations; the base and the last step are always validated",
    )
    validation_levels: ChangeableOnResume[tuple[float, ...]] = Field(
        (0.1, 0.3, 0.5, 0.7, 0.9),
        min_length=1,
        description="corruption levels of the validation loss, each above 0 and at most 1",
    )
    validation_blocks: ChangeableOnResume[Blocks] = Field(
        1,
        description="number of blocks of each held-out example that a validation scores, or `all`; with "
        "more than 1, the loss is also recorded by block, which shows where in the answer the "
        "model is wrong",
    )
    validation_batches: ChangeableOnResume[int | None] = Field(
        None, ge=1, description="maximum number of global batches per validation"
    )
    checkpoint_every: ChangeableOnResume[int] = Field(
        100,
        ge=1,
        description="steps between checkpoints; one is also written after the last step, except by "
        "full fine-tuning that exports the last step's weights",
    )
    keep_checkpoints: ChangeableOnResume[int] = Field(
        2,
        ge=1,
        description="number of newest checkpoints to keep, in addition to the one with the best "
        "validation loss",
    )
    async_checkpoints: ChangeableOnResume[bool] = Field(
        True,
        description="write checkpoints in the background; requires a copy of the state in host memory",
    )
    export: ChangeableOnResume[Literal["best", "last"]] = Field(
        "best",
        description="weights that a run exports: those with the best validation loss, or those of the "
        "last step",
    )
    early_stopping: ChangeableOnResume[int | None] = Field(
        None,
        ge=1,
        description="stop after this many consecutive validations without a better loss; default: never",
    )
    max_skipped_steps: ChangeableOnResume[int] = Field(
        3,
        ge=0,
        description="number of consecutive steps with a non-finite loss or gradient that are skipped "
        "before the run stops",
    )
    stop_grace: ChangeableOnResume[int] = Field(
        60,
        ge=1,
        description="seconds that a run has to save its state after SIGTERM, before it is killed",
    )
    hang_timeout: ChangeableOnResume[int] = Field(
        600,
        ge=10,
        description="seconds without progress after which a run ends and names the rank that hangs",
    )
    _check_blocks = field_validator("validation_blocks", mode="before")(_check_blocks)

    def validated_rows(self, rows: int) -> int:
        """Return how many of the held-out rows a validation takes; it takes the first ones."""
        if self.validation_batches is None:
            return rows
        return min(rows, self.validation_batches * self.global_batch_size)


class ParallelConfig(StrictModel):
    """How ranks share the work. World size = efsdp x ep; all weights except the experts are sharded over all ranks."""

    nproc_per_node: int = Field(
        8,
        ge=1,
        description="number of processes that the pipeline's train step starts; with torchrun, its own "
        "option applies instead",
    )
    ep: int = Field(
        8,
        ge=1,
        description="expert-parallel degree; must divide the world size and the number of experts",
    )


class SamplerConfig(StrictModel):
    """How answers are denoised. The default of each key is the value in the base's
    generation_config.json, or else DiffusionGemma's own.
    """

    steps: int | None = Field(
        None, ge=1, description="maximum number of denoising steps per block (max_denoising_steps)"
    )
    entropy_bound: float | None = Field(
        None,
        gt=0,
        description="in nats; a step accepts tokens in order of increasing entropy until the sum of their "
        "entropies exceeds this",
    )
    t_min: float | None = Field(None, ge=0, description="final temperature of a block's schedule")
    t_max: float | None = Field(None, gt=0, description="initial temperature of a block's schedule")
    stability_threshold: int | None = Field(
        None,
        ge=0,
        description="a block may end once its most likely tokens have not changed for this many steps",
    )
    confidence_threshold: float | None = Field(
        None,
        ge=0,
        description="in nats; a stable block ends when its mean entropy is below this; 0: never",
    )
    self_conditioning: bool = Field(
        True,
        description="whether a denoising step sees the soft embeddings predicted by the previous step",
    )


class JudgeModelConfig(StrictModel):
    """The model that the judge `model` asks, behind an OpenAI-compatible address. The API key is
    only read from the environment, as OPENAI_API_KEY.
    """

    address: str | None = Field(
        None,
        pattern=r"^https?://[^@\s]+$",
        description="base URL of an OpenAI-compatible API, such as http://localhost:8000/v1",
    )
    model: str | None = Field(None, min_length=1, description="name of the model at that address")
    instructions: str | None = Field(
        None,
        description="instructions for the model, whose reply has to end with `Score: N`, where N is 0 to "
        "10; default: to compare the meaning of the answer with that of the reference",
    )
    concurrency: int = Field(4, ge=1, le=64, description="maximum number of concurrent calls")
    timeout: float = Field(60.0, gt=0, description="seconds that a call may take")


class ForgettingConfig(SourceFields):
    """Rows of another data set, never trained on, which both models answer: the cost of tuning."""

    source: str | None = Field(
        None, description="like `data.source`; default: no other rows are answered"
    )
    rows: int = Field(64, ge=1, description="number of rows to answer")


class EvaluateConfig(StrictModel):
    """Answers before and after training, on held-out rows."""

    rows: int = Field(64, ge=1, description="number of held-out rows to answer")
    batch_size: int = Field(
        8, ge=1, description="number of rows answered at once; does not affect the answers"
    )
    gpus: int | None = Field(
        None,
        ge=1,
        description="number of GPUs that take questions from a shared queue; does not affect the answers; "
        "above `parallel.nproc_per_node`, it must be a multiple of it; experts are split across as few "
        "GPUs as can hold the model; default: the smallest number that can hold it, usually "
        "one",
    )
    max_new_tokens: int = Field(
        1024,
        ge=1,
        description="maximum number of tokens in an answer; longer answers are cut",
    )
    sampler: SamplerConfig = Field(default_factory=SamplerConfig)
    answer_pattern: str | None = Field(
        r"####\s*(-?[\d.,]+)",
        description="regular expression for the judge `pattern`, which compares group 1 of its last "
        "match; null: none, for data whose answers have no such part",
    )
    judge: JudgeNames | None = Field(
        None,
        description="what decides whether an answer is right, or how close it is: `pattern` or "
        "`pattern:REGEX`, `number`, `text`, `json`, `tool_call`, `chrf`, `model`, "
        "`python:FILE.py:FUNCTION`; of several, the first one that can use a row's reference "
        "judges that row; default: `pattern` where it matches a held-out reference, else "
        "`chrf`; []: none",
    )
    judges: dict[str, JudgeNames] = Field(
        {},
        description="judges for individual sources of `data.mixture`, by their `source`; the others use "
        "`evaluate.judge`",
    )
    judge_model: JudgeModelConfig = Field(default_factory=JudgeModelConfig)
    forgetting: ForgettingConfig = Field(default_factory=ForgettingConfig)
    slices: Annotated[tuple[str, ...], AsList] = Field(
        (),
        description="columns of the data with one value per row; all figures are also reported for the "
        "rows with each value",
    )
    repeats: int = Field(
        1,
        ge=1,
        le=100,
        description="number of answers of each model to each row, with seeds `seed`, `seed` + 1, ...; "
        "figures are the means over them, and their intervals include sampling noise",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_earlier_name(cls, found: Any) -> Any:
        """Take `max_denoising_steps`, the name until 0.9, for `sampler.steps`."""
        if not isinstance(found, dict) or "max_denoising_steps" not in found:
            return found
        rest = dict(found)
        steps, sampler = rest.pop("max_denoising_steps"), rest.get("sampler") or {}
        if not isinstance(sampler, dict) or sampler.get("steps", steps) not in (None, steps):
            raise InvalidSetting(
                f"evaluate.max_denoising_steps ({steps}) is the earlier name of "
                f"evaluate.sampler.steps, and both are set",
                hint="Remove evaluate.max_denoising_steps.",
            )
        return rest | {"sampler": {**sampler, "steps": steps}}

    @model_validator(mode="after")
    def _check_judge_model(self) -> EvaluateConfig:
        for name in ("address", "model"):
            if "model" in self.judge_names and getattr(self.judge_model, name) is None:
                raise InvalidSetting(
                    f"evaluate.judge: found model, without evaluate.judge_model.{name}",
                    hint=f"Set evaluate.judge_model.{name}.",
                )
        return self

    @field_validator("answer_pattern")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        return check_pattern("evaluate.answer_pattern", value) if value else None

    @property
    def judge_names(self) -> list[str]:
        """The judges of all sources, as the recipe names them."""
        return [name for names in (self.judge or (), *self.judges.values()) for name in names]

    @property
    def judge_files(self) -> list[str]:
        """The files of the judges that are the user's functions."""
        found = [split_judge(name) for name in self.judge_names]
        return [python_place(argument)[0] for kind, argument in found if kind == "python"]


class TrackingConfig(StrictModel):
    """MLflow and the Hub. MLFLOW_TRACKING_URI in the environment takes precedence over `uri`."""

    uri: str | None = Field(
        None,
        description="tracking server or sqlite:/// file; default: sqlite:///mlflow.db in the "
        "workspace",
    )
    experiment: str = Field(
        "canvastune",
        min_length=1,
        max_length=500,
        description="name of the experiment in MLflow, and in Kubeflow unless `submit` sets another one",
    )
    registered_model: str | None = Field(
        None,
        description="name under which the tuned model is registered, without /, : or quotes; default: not "
        "registered",
    )
    promote: Literal["better", "never"] = Field(
        "better",
        description="when a registered model gets the alias champion; better: if the paired test on the "
        "same held-out rows shows that it is better than the champion or, if there is none, "
        "than the base",
    )
    log_texts: bool = Field(
        True,
        description="whether MLflow gets texts of the data: the first rows with the dataset, questions, "
        "answers, and pages with them; false: only figures, the rest is in the run folder",
    )
    hub_model_id: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$",
        max_length=96,
        description="Hub repository, as owner/name, to which the tuned model and its model card are "
        "pushed after the evaluation, with the token in the environment variable HF_TOKEN; "
        "default: not pushed",
    )
    hub_private_repo: bool = Field(
        True, description="whether the repository is private, if the push creates it"
    )
    hub_content: Literal["model", "adapter"] = Field(
        "model", description="what is pushed: the complete model, or only the LoRA adapter"
    )

    @field_validator("registered_model")
    @classmethod
    def _check_model_name(cls, value: str | None) -> str | None:
        if not value:
            return None
        # MLflow refuses blanks, "/", ":" and leading dots; a quote would end its search's text.
        if not value.strip() or value.startswith(".") or set(value) & set("/:'\"`\\"):
            raise PydanticCustomError(
                "name", "a name that MLflow accepts: no /, :, \\, quotes or leading dot"
            )
        return value


class HardwareConfig(StrictModel):
    """The accelerators that the planner assumes."""

    gpu_memory: float = Field(80.0, gt=0, description="GB (1e9 bytes) per accelerator")
    accelerator: str = Field("h100", description="name in the planner's table of accelerators")


class RunConfig(StrictModel):
    """A recipe."""

    name: str = Field(
        pattern=r"^[a-z0-9]([-a-z0-9_]*[a-z0-9])?$",
        max_length=50,
        description="used in the names of the recipe's runs, jobs and models",
    )
    seed: int = Field(
        42,
        ge=0,
        lt=2**63,
        description="determines the data order, the noise and new weights, in the same way on any number "
        "of ranks",
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig
    train: TrainConfig = Field(default_factory=TrainConfig)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    parallel: ChangeableOnResume[ParallelConfig] = Field(default_factory=ParallelConfig)
    evaluate: ChangeableOnResume[EvaluateConfig] = Field(default_factory=EvaluateConfig)
    tracking: ChangeableOnResume[TrackingConfig] = Field(default_factory=TrackingConfig)
    hardware: ChangeableOnResume[HardwareConfig] = Field(default_factory=HardwareConfig)
    cluster: ChangeableOnResume[ClusterConfig] = Field(default_factory=ClusterConfig)

    @property
    def source_keys(self) -> dict[str, MixtureSource]:
        """Every data set that is prepared, by the key of the recipe that names it."""
        named = dict(self.data.source_keys)
        other = self.evaluate.forgetting
        if other.source is not None:
            fields = {name: getattr(other, name) for name in SourceFields.model_fields}
            named["evaluate.forgetting"] = MixtureSource(**fields)
        return named

    def with_values(self, section: str, **values: Any) -> Self:
        """Return the recipe with other values in a section; they are not checked."""
        changed = getattr(self, section).model_copy(update=values)
        return self.model_copy(update={section: changed})

    @property
    def world_size(self) -> int:
        """Processes that train together in the pipeline, over all nodes."""
        return self.cluster.nodes * self.parallel.nproc_per_node

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        low, high = self.evaluate.sampler.t_min, self.evaluate.sampler.t_max
        if low is not None and high is not None and low > high:
            raise InvalidSetting(
                f"evaluate.sampler.t_min ({low}) is above evaluate.sampler.t_max ({high})",
                hint="Lower evaluate.sampler.t_min.",
            )
        gpus, node = self.evaluate.gpus, self.parallel.nproc_per_node
        if gpus is not None and gpus > node and gpus % node:
            raise InvalidSetting(
                f"evaluate.gpus: found {gpus}, expected at most parallel.nproc_per_node ({node}), or "
                "a multiple of it",
                hint=f"Set evaluate.gpus={gpus // node * node}.",
            )
        sources = [source.source for source in self.data.sources]
        if self.evaluate.forgetting.source is not None:
            sources.append(self.evaluate.forgetting.source)
        for name in self.evaluate.judges:
            if name not in sources:
                raise InvalidSetting(
                    f"evaluate.judges: found {name!r}, which is not a source of data.mixture",
                    hint=f"The sources are {', '.join(sources)}.",
                )
        if self.optimizer.min_lr > self.optimizer.lr:
            raise InvalidSetting(
                f"optimizer.min_lr ({self.optimizer.min_lr}) is above optimizer.lr "
                f"({self.optimizer.lr})",
                hint="Lower optimizer.min_lr.",
            )
        if self.tracking.hub_content == "adapter" and self.train.method == "full":
            raise InvalidSetting(
                "tracking.hub_content: found adapter, but train.method=full produces none",
                hint="Set tracking.hub_content=model.",
            )
        bad = [level for level in self.train.validation_levels if not 0 < level <= 1]
        if bad:
            raise InvalidSetting(
                f"train.validation_levels: found {bad[0]}, expected fractions of corrupted tokens "
                "in (0, 1]",
                hint="Correct the level.",
            )
        return self


def is_recomputed(checkpointing: Checkpointing, layer: int) -> bool:
    """Return whether the backward pass recomputes a layer; `selective` recomputes every second one,
    from the first on.
    """
    return layer % 2 == 0 if checkpointing == "selective" else bool(checkpointing)


def block_count(setting: Blocks, blocks: int) -> int:
    """Return how many of an example's blocks a setting chooses."""
    return blocks if setting == "all" else min(setting, blocks)
