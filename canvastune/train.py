"""`torchrun ... -m canvastune.train -c RECIPE`: one training run, from a base model and a data set to an adapter or a model."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import fcntl
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist

from canvastune.checkpoints import Checkpoints
from canvastune.config import RunConfig, load_config
from canvastune.data.batches import PreparedData
from canvastune.data.prepare import prepare_data
from canvastune.errors import UserError
from canvastune.layout import check_layout
from canvastune.model.checkpoint_files import CheckpointReader
from canvastune.model.export import export_adapter, export_model
from canvastune.model.load import build_model, load_weights, read_model_config
from canvastune.model.source import resolve_model
from canvastune.outputs import fingerprint, write_provenance
from canvastune.parallel import build_meshes, shard_model
from canvastune.progress import TrainingProgress
from canvastune.tracking import MetricsWriter
from canvastune.trainer import Trainer, export_path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_EPILOG = """examples:
  torchrun --standalone --nproc-per-node=8 -m canvastune.train -c pipelines/recipes/gsm8k_lora.yaml --output runs/gsm8k
  torchrun --standalone --nproc-per-node=2 -m canvastune.train -c pipelines/recipes/tiny_lora.yaml --set train.steps=20 --output runs/try

The same command again goes on from the newest checkpoint below --output, and does nothing once the run is finished."""


def train(config: RunConfig, data: Path | None, output: Path, metrics_run: str | None = None) -> dict[str, Any] | None:
    """Train on the ranks of this process group; every rank makes this call.

    Args:
        data: a prepared data set; None: prepared below `output`.
        output: gets checkpoints/, metrics.jsonl, adapter/ or model/, and result.json last.
        metrics_run: the MLflow run that the numbers go to as well; None: only to metrics.jsonl.

    Returns:
        What result.json holds; None if a stop was requested and the state saved.

    Raises:
        UserError: anything in the input that is wrong, found before a step is made where that can be.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    base = _on_first_rank(lambda: resolve_model(config.model))
    model_config = read_model_config(base)
    text = model_config.text_config
    check_layout(config, world_size, experts=text.num_experts, hidden=text.hidden_size, expert_size=text.moe_intermediate_size)
    if data is None:
        data = output / "data"
        _on_first_rank(lambda: None if data.exists() else prepare_data(config, base, data))
    data_print = _on_first_rank(lambda: fingerprint(data / "train") + fingerprint(data / "validation"))
    device = _device()
    model = build_model(config, model_config)
    shard_model(model, build_meshes(world_size, config.parallel.ep, device.type), config)
    load_weights(model, CheckpointReader(base), device, config.seed)

    prepared = PreparedData(
        data,
        canvas_length=model_config.canvas_length,
        vocab_size=text.vocab_size,
        eos_token_id=_first(text.eos_token_id),
        seed=config.seed,
    )
    metrics = MetricsWriter(output / "metrics.jsonl", run_id=metrics_run) if rank == 0 else None
    progress = TrainingProgress(config.train.steps, config.train.log_every) if rank == 0 else None
    trainer = Trainer(config, model, prepared, Checkpoints(output / "checkpoints", config, data_print), metrics, progress)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(trainer, "stop_requested", True))
    started = time.time()
    try:
        finished = trainer.run()
    finally:
        if progress is not None:
            progress.close()
        if metrics is not None:
            metrics.close()
    if not finished:
        return None
    out = export_path(output, config)
    (export_adapter if config.train.method == "lora" else export_model)(model, config, base, out)
    result = {
        "method": config.train.method,
        "steps": trainer.step,
        "world_size": world_size,
        "seconds": time.time() - started,
        "train": trainer.last.get("train", {}),
        "validation": trainer.last.get("validation", {}),
        "export": out.name,
    }
    if rank == 0:
        write_provenance(output, "train", config, {"data": data, "base": base})
        unfinished = output / ".result.json"
        unfinished.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        unfinished.rename(output / "result.json")
    dist.barrier()
    return result


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 1 refused, 3 stopped on request with the state saved."""
    parser = argparse.ArgumentParser(
        "canvastune.train", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", required=True, help="recipe (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe; may be repeated")
    parser.add_argument("--data", type=Path, help="folder that `canvastune prepare` wrote; default: prepared from the recipe's data.source")
    parser.add_argument("--output", type=Path, required=True, help="folder of this run; holds its checkpoints too")
    parser.add_argument("--mlflow-run", help="id of the MLflow run that gets the metrics as well (MLFLOW_TRACKING_URI says where)")
    options = parser.parse_args(arguments)
    lock: IO[str] | None = None
    try:
        config = load_config(options.config, options.set)
        _start_processes()
        lock = _on_first_rank(partial(_lock, options.output), share=False)
        finished = _on_first_rank((options.output / "result.json").is_file)
        if finished:
            _say(f"already finished: {options.output / 'result.json'} stands. Give another --output to train again")
            return 0
        result = train(config, options.data, options.output, options.mlflow_run)
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"canvastune: error: {error}", file=sys.stderr)
        return 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if lock is not None:
            lock.close()
    if result is None:
        _say(f"stopped on request; the state is saved. The same command goes on: {options.output}")
        return 3
    _say(f"trained {result['steps']} steps in {result['seconds']:.0f} s; {result['method']} weights: {options.output / result['export']}")
    return 0


def _start_processes() -> None:
    if "RANK" not in os.environ:  # started without torchrun: one process
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    if sys.platform == "linux":  # a rank whose torchrun was killed saves its state and goes, instead of training on unseen
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    device = _device()
    # Checkpoints are written over gloo beside NCCL; on CPU gloo is all there is.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=10))


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _on_first_rank(function: Any, *, share: bool = True) -> Any:
    """Call on rank 0 and give every rank its result, or its UserError: no rank waits for one that has failed."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[1] = str(error)
    shared = [outcome[0] if share else None, outcome[1]]
    dist.broadcast_object_list(shared)
    if shared[1] is not None:
        raise UserError(shared[1])
    return shared[0] if share else outcome[0]


def _lock(output: Path) -> IO[str]:
    output.mkdir(parents=True, exist_ok=True)
    lock = (output / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{output}: another trainer is writing to this folder. Wait for it, or give another --output") from None
    return lock


def _first(value: int | list[int]) -> int:
    return value[0] if isinstance(value, list) else value


def _say(line: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"canvastune: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
