"""Train one run from a base model and a data set to an adapter or a model."""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import math
import re
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from canvastune.checkpoint.export import export_adapter, export_model
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.hub import resolve_model
from canvastune.checkpoint.load import build_model, load_weights, read_model_config
from canvastune.checkpoint.resume import Checkpoints, changed_run, newest_identity
from canvastune.config import RunConfig, changed_settings
from canvastune.config.loading import load_yaml_file
from canvastune.config.strict import flatten
from canvastune.data.dataset import TrainingDataset
from canvastune.distributed.parallel_dims import ParallelDims
from canvastune.distributed.parallelize import shard_model
from canvastune.distributed.sync import gather_results, run_on_all_ranks, run_on_rank0
from canvastune.distributed.watchdog import RankLostError, RankRegistry, Watchdog
from canvastune.errors import UserError
from canvastune.io.hashing import hash_path
from canvastune.io.json_text import write_json
from canvastune.io.provenance import local_inputs, write_provenance
from canvastune.logging import TrainingProgress
from canvastune.preparation.prepare import prepare_data
from canvastune.tracking import FindRun, PipelineRun, open_metrics, training_run
from canvastune.training.devices import refuse_locked_memory, refuse_silent_cpu, select_device
from canvastune.training.trainer import Trainer, export_path

logger = logging.getLogger(__name__)

# Messages of collectives after another process has exited.
_LOST = re.compile(
    r"closed by peer|Connection reset|Broken pipe|Connection refused|remote process|NCCL|"
    r"[Tt]imed out|Socket"
)


def train(
    config: RunConfig,
    data: Path | None,
    output: Path,
    metrics_run: FindRun | None = None,
    rank_registry: RankRegistry | None = None,
) -> dict[str, Any] | None:
    """Train on the ranks of this process group; every rank makes this call.

    Args:
        data: a prepared data set; None: prepared below `output`.
        output: gets checkpoints/, metrics.jsonl, adapter/ or model/, and result.json last.
        metrics_run: finds the MLflow run that also gets the metrics; None: only metrics.jsonl.
        rank_registry: finds ranks that hang or have exited; None: a hang ends with the process
            group's timeout.

    Returns:
        The content of result.json; None if a stop was requested and the state saved.

    Raises:
        UserError: invalid input, found before the first step where possible.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = select_device()
    if config.train.attention == "flex" and device.type != "cuda":
        raise UserError(
            "train.attention: found 'flex' without a CUDA device: FlexAttention has no backward "
            "pass on a CPU",
            hint="Set train.attention=sdpa.",
        )
    base = run_on_rank0(lambda: resolve_model(config.model))
    model_config = run_on_all_ranks(lambda: read_model_config(base))
    text = model_config.text_config
    refuse_silent_cpu(config, device, text)
    refuse_locked_memory(device, world_size)
    dims = ParallelDims.of(
        config,
        world_size,
        experts=text.num_experts,
        hidden=text.hidden_size,
        expert_size=text.moe_intermediate_size,
    )
    if data is None:
        data = output / "data"
        run_on_rank0(
            lambda: (
                check_prepared(data, config) if data.exists() else prepare_data(config, base, data)
            )
        )
    fingerprint = run_on_rank0(lambda: data_fingerprint(data))
    model = build_model(config, model_config)
    shard_model(model, dims.build_meshes(device.type), config)
    run_on_all_ranks(lambda: load_weights(model, CheckpointReader(base), device, config.seed))

    prepared = run_on_all_ranks(lambda: TrainingDataset.of_run(data, config, model_config))
    metrics = open_metrics(output / "metrics.jsonl", run=metrics_run) if rank == 0 else None
    display = TrainingProgress(config.train.steps, config.train.log_every) if rank == 0 else None
    checkpoints = Checkpoints(output / "checkpoints", config, fingerprint)
    trainer = Trainer(config, model, prepared, checkpoints, metrics, display)
    trainer.can_export = partial(can_export, base, output)
    started = time.monotonic()
    try:
        finished = _run(trainer, rank_registry)
    finally:
        if display is not None:
            display.close()
        if metrics is not None:
            metrics.close()
    checkpoints.close()
    if not finished:
        return None
    step = trainer.load_best_checkpoint()
    if step != trainer.progress.step:
        logger.info(
            f"canvastune: exporting the weights of step {step}, which have the lowest validation "
            "loss"
        )
    out = export_path(output, config)
    # By an attempt that was killed right after the export, from the same weights.
    if rank == 0 and out.exists():
        shutil.rmtree(out)
    export = export_adapter if config.train.method == "lora" else export_model
    export(model, config, base, out, data)
    result = {
        "method": config.train.method,
        "steps": trainer.progress.step,
        "skipped_steps": trainer.progress.skipped,
        "exported_step": step,
        "world_size": world_size,
        "seconds": time.monotonic() - started,
        "train": trainer.last.get("train", {}),
        "validation": trainer.last.get("validation", {}),
        "export": out.name,
    }
    if rank == 0:
        write_provenance(output, "train", config, {"data": data, "base": base})
        write_json(output / "result.json", result)
    dist.barrier()
    return result


def can_export(base: Path, output: Path) -> bool:
    """Return whether a whole model can be written: its base is there, and so is the space."""

    def fits() -> bool:
        specs = CheckpointReader(base).specs()
        size = sum(math.prod(shape) * dtype.itemsize for shape, dtype in specs.values())
        return size <= shutil.disk_usage(output).free

    try:
        return all(gather_results(fits))
    except UserError:  # the checkpoint is written, and the export then says what is wrong
        return False


def _run(trainer: Trainer, rank_registry: RankRegistry | None) -> bool:
    """Run the trainer's loop; signals stop it, and a watchdog observes the other ranks."""

    def request_stop(*_: object) -> None:
        trainer.stop_requested = trainer.stop_requested or time.monotonic()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    if rank_registry is None:
        return trainer.run()
    watchdog = Watchdog(rank_registry, trainer.config.train.hang_timeout)
    trainer.heartbeat = watchdog.heartbeat
    try:
        return trainer.run()
    except (RuntimeError, CheckpointException) as error:
        if not _LOST.search(str(error)):
            raise
        raise RankLostError(rank_registry.missing_ranks(watchdog.activity)) from error
    finally:
        watchdog.close()


def find_metrics_run(options: argparse.Namespace, config: RunConfig) -> FindRun | None:
    """Return how to find the MLflow run that the options name; None if they name none."""
    if options.mlflow_run:
        return lambda client: str(options.mlflow_run)
    if options.mlflow_job:
        return training_run(
            PipelineRun(config, options.output.absolute().parent, options.mlflow_job)
        )
    return None


def acquire_output_lock(output: Path, export: Path) -> IO[str]:
    """Lock the output folder for this process, and remove partial outputs of a killed attempt."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"{output}: cannot write here ({error.strerror})",
            hint="Choose an --output that you can write to.",
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{output}: locked by another trainer",
            hint="Wait for it to end, or choose another --output.",
        ) from None
    for stale in output.glob(".*.partial-*"):  # the lock is ours: no one writes them
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    signs = ("result.json", "metrics.jsonl", "checkpoints/step-*/complete.json")
    started = any(path.is_file() for sign in signs for path in output.glob(sign))
    if export.exists() and not started:
        raise UserError(
            f"{export}: already exists, but {output} contains no run",
            hint="Choose another --output, or move it away.",
        )
    return lock


def find_finished(output: Path, config: RunConfig, data: Path | None) -> str | None:
    """Return a message for the user if this run is already finished, None otherwise.

    Args:
        data: as for `train`. Data that were prepared below `output` and deleted since cannot be
            compared.

    Raises:
        UserError: `output` holds a finished run of another recipe or other data.
    """
    if not (output / "result.json").is_file():
        return None
    below = data is None and (output / "data").exists()
    data = output / "data" if below else data
    identity = newest_identity(output / "checkpoints")
    if identity is not None:
        fingerprint = data_fingerprint(data) if data else None
    else:  # the checkpoints were deleted to free disk space
        identity = flatten(load_yaml_file(output / "config.yaml")) | {
            "data": _hashed_inputs(output)["data"]
        }
        fingerprint = hash_path(data) if data else None
    changed = changed_run(identity, config, fingerprint)
    if changed:
        raise UserError(
            f"{output}: found a finished run with other settings or data: {changed}",
            hint=(
                "Choose another --output, or use the recipe and data that this run was trained "
                "with."
            ),
        )
    if below:
        check_prepared(output / "data", config)
    unused = [
        key
        for key, *_ in changed_settings(identity, config, affecting_weights=False)
        if key.startswith("train.")
    ]
    note = (
        f" (changed since, without effect on a finished run: {', '.join(unused)})" if unused else ""
    )
    result = output / "result.json"
    return f"already finished: {result} exists{note}. To train again, choose another --output or run name"


def check_prepared(data: Path, config: RunConfig) -> None:
    """Check that data that an earlier attempt prepared below the output fit this recipe.

    Raises:
        UserError: other settings of `data` or `model`, or rows of a local source that changed
            since.
    """
    if not (data / "provenance.json").is_file():  # not prepared by this program
        return
    changes = changed_settings(load_yaml_file(data / "config.yaml"), config)
    found = [
        f"{key} was {before!r} and is now {after!r}"
        for key, before, after in changes
        if key.startswith(("data.", "model."))
    ]
    hashes = _hashed_inputs(data)
    for name, source in {} if found else local_inputs(config.data.source_keys).items():
        if name in hashes and hash_path(source) != hashes[name]:
            found.append(f"the content of {source} changed")
    if found:
        raise UserError(
            f"{data}: found data prepared for another run: {'; '.join(found)}",
            hint=f"Choose another --output, or delete {data} if this run has no checkpoint yet.",
        )


def data_fingerprint(data: Path) -> str:
    """Return a hash of what is trained and validated on, by which checkpoints know their data."""
    return hash_path(data / "train") + hash_path(data / "validation")


def _hashed_inputs(folder: Path) -> dict[str, str]:
    path = folder / "provenance.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["inputs"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{path}: expected the record of a finished output, found {error!r}",
            hint="Choose another --output.",
        ) from None
