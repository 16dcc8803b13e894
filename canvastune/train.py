"""`torchrun ... -m canvastune.train -c RECIPE`: one training run, from a base model and a data set to an adapter or a model."""

from __future__ import annotations

import argparse
import ctypes
import datetime
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from canvastune.checkpoints import Checkpoints
from canvastune.config import RunConfig, load_config
from canvastune.data.batches import PreparedData, filling_token
from canvastune.data.prepare import prepare_data
from canvastune.errors import UserError
from canvastune.layout import check_layout
from canvastune.model.checkpoint_files import CheckpointReader
from canvastune.model.export import export_adapter, export_model
from canvastune.model.load import build_model, load_weights, read_model_config
from canvastune.model.source import resolve_model
from canvastune.outputs import NO_ROOM, fingerprint, write_provenance
from canvastune.parallel import build_meshes, shard_model
from canvastune.progress import FORMAT_HELP, FORMATS, TrainingProgress, speak
from canvastune.ranks import LostRank, RollCall, Watchdog, on_first_rank, together
from canvastune.tracking import FindRun, MetricsWriter, PipelineRun, training_run
from canvastune.trainer import Trainer, export_path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# What collectives say when another process is gone.
_LOST = re.compile(r"closed by peer|Connection reset|Broken pipe|Connection refused|remote process|NCCL|[Tt]imed out|Socket")
_EPILOG = """examples:
  torchrun --standalone --nproc-per-node=8 -m canvastune.train -c pipelines/recipes/gsm8k_lora.yaml --output runs/gsm8k
  torchrun --standalone --nproc-per-node=2 -m canvastune.train -c pipelines/recipes/tiny_lora.yaml --set train.steps=20 --output runs/try
  python -m canvastune.train -c pipelines/recipes/tiny_lora.yaml --output runs/one --set parallel.ep=1 --log-format json > run.jsonl

The same command again goes on from the newest checkpoint below --output, and does nothing once the run is finished.

exit codes: 0 done, 1 refused or failed (the reason is the last line), 2 a wrong command line, 3 stopped on request with the state
saved, 4 a rank hangs, which is named. torchrun itself ends with 1 where a rank's code is not 0, and names the rank's code."""


def train(
    config: RunConfig, data: Path | None, output: Path, metrics_run: FindRun | None = None, roll_call: RollCall | None = None
) -> dict[str, Any] | None:
    """Train on the ranks of this process group; every rank makes this call.

    Args:
        data: a prepared data set; None: prepared below `output`.
        output: gets checkpoints/, metrics.jsonl, adapter/ or model/, and result.json last.
        metrics_run: finds the MLflow run that the numbers go to as well; None: only to metrics.jsonl.
        roll_call: finds the rank that hangs or is gone; None: a hang ends with the process group's timeout.

    Returns:
        What result.json holds; None if a stop was requested and the state saved.

    Raises:
        UserError: anything in the input that is wrong, found before a step is made where that can be.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    device = _device()
    if config.train.attention == "flex" and device.type != "cuda":
        raise UserError(
            "key 'train.attention': found 'flex', and no CUDA device: FlexAttention has no backward pass on a CPU. Leave it out, or set "
            "train.attention=sdpa"
        )
    base = on_first_rank(lambda: resolve_model(config.model))
    model_config = together(lambda: read_model_config(base))
    text = model_config.text_config
    check_layout(config, world_size, experts=text.num_experts, hidden=text.hidden_size, expert_size=text.moe_intermediate_size)
    if data is None:
        data = output / "data"
        on_first_rank(lambda: None if data.exists() else prepare_data(config, base, data))
    data_print = on_first_rank(lambda: fingerprint(data / "train") + fingerprint(data / "validation"))
    model = build_model(config, model_config)
    shard_model(model, build_meshes(world_size, config.parallel.ep, device.type), config)
    together(lambda: load_weights(model, CheckpointReader(base), device, config.seed))

    prepared = together(
        lambda: PreparedData(
            data,
            canvas_length=model_config.canvas_length,
            vocab_size=text.vocab_size,
            eos_token_id=filling_token(text.eos_token_id),
            seed=config.seed,
        )
    )
    metrics = MetricsWriter(output / "metrics.jsonl", run=metrics_run) if rank == 0 else None
    display = TrainingProgress(config.train.steps, config.train.log_every) if rank == 0 else None
    checkpoints = Checkpoints(output / "checkpoints", config, data_print)
    trainer = Trainer(config, model, prepared, checkpoints, metrics, display)
    started = time.time()
    try:
        finished = _run(trainer, roll_call)
    finally:
        if display is not None:
            display.close()
        if metrics is not None:
            metrics.close()
    if not finished:
        return None
    step = trainer.take_best_weights() if config.train.export == "best" else trainer.progress.step
    if step != trainer.progress.step:
        _say(f"the weights of step {step} are exported: no checkpoint has a lower validation loss")
    out = export_path(output, config)
    if rank == 0 and out.exists():  # by an attempt of this run that was killed right after it, from the same weights
        shutil.rmtree(out)
    (export_adapter if config.train.method == "lora" else export_model)(model, config, base, out)
    result = {
        "method": config.train.method,
        "steps": trainer.progress.step,
        "skipped_steps": trainer.progress.skipped,
        "exported_step": step,
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


def _run(trainer: Trainer, roll_call: RollCall | None) -> bool:
    """The trainer's loop, stopped by signals, and with an eye on the other ranks."""

    def request_stop(*_: object) -> None:
        trainer.stop_requested = trainer.stop_requested or time.monotonic()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, request_stop)
    if roll_call is None:
        return trainer.run()
    watchdog = Watchdog(roll_call, trainer.config.train.hang_timeout)
    trainer.beat = watchdog.beat
    try:
        return trainer.run()
    except (RuntimeError, CheckpointException) as error:
        if not _LOST.search(str(error)):
            raise
        raise LostRank(roll_call.missing(watchdog.doing)) from error
    finally:
        watchdog.close()


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 1 refused, 3 stopped on request with the state saved."""
    options = _parser().parse_args(arguments)
    _end_with_the_parent()
    speak(options.log_format)
    locks: list[IO[str]] = []  # the first rank's
    roll_call: RollCall | None = None
    try:
        config = load_config(options.config, options.set)
        roll_call = _start_processes()
        on_first_rank(lambda: locks.append(_claim(options.output, export_path(options.output, config))))
        finished = on_first_rank((options.output / "result.json").is_file)
        if finished:
            _say(f"already finished: {options.output / 'result.json'} stands. Give another --output to train again")
            return 0
        result = train(config, options.data, options.output, _metrics_run(options, config), roll_call)
    except UserError as error:
        _say(f"error: {error}")
        return 1
    except LostRank as error:
        if error.args[0] is not None:  # the first of those that are left speaks
            print(f"canvastune: error: {error}", file=sys.stderr)
        _leave(1)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        print(
            f"canvastune: error: {error.filename or options.output}: {error.strerror}. Make room, and the same command goes on",
            file=sys.stderr,
        )
        return 1
    except Exception as error:
        if roll_call is None:
            raise
        roll_call.leave(error)
        traceback.print_exc()
        _leave(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for lock in locks:
            lock.close()
    if result is None:
        _say(f"stopped on request; the state is saved. The same command goes on: {options.output}")
        return 3
    _say(f"trained {result['steps']} steps in {result['seconds']:.0f} s; {result['method']} weights: {options.output / result['export']}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "canvastune.train", description=__doc__, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-c", "--config", required=True, help="recipe (YAML)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe; may be repeated")
    parser.add_argument("--data", type=Path, help="folder that `canvastune prepare` wrote; default: prepared from the recipe's data.source")
    parser.add_argument("--output", type=Path, required=True, help="folder of this run; holds its checkpoints too")
    parser.add_argument("--mlflow-run", help="id of the MLflow run that gets the metrics as well (MLFLOW_TRACKING_URI says where)")
    parser.add_argument("--mlflow-job", help="the pipeline's job instead: its run is found, or made, once MLflow is there")
    parser.add_argument("--log-format", choices=FORMATS, default="text", help=FORMAT_HELP)
    return parser


def _metrics_run(options: argparse.Namespace, config: RunConfig) -> FindRun | None:
    if options.mlflow_run:
        return lambda client: str(options.mlflow_run)
    if options.mlflow_job:
        return training_run(PipelineRun(config, options.output.absolute().parent, options.mlflow_job))
    return None


def _start_processes() -> RollCall:
    if "RANK" not in os.environ:  # started without torchrun: one process
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    device = _device()
    store, rank, world_size = next(dist.rendezvous("env://"))
    # The store may outlive an attempt (torchrun --max-restarts), and the addresses in it do not.
    store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    # Checkpoints are written over gloo beside NCCL; on CPU gloo is all there is. Hours, since rank 0 may prepare data or a slow disk
    # may give the weights meanwhile; in training a watchdog looks after the ranks.
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("collectives", store),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(hours=2),
    )
    return RollCall(dist.PrefixStore("roll-call", store), rank, world_size)


def _end_with_the_parent() -> None:
    """A rank whose torchrun was killed saves its state and goes, instead of training on unseen."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _leave(code: int) -> NoReturn:
    """End now: an orderly end would wait for ranks that are gone."""
    sys.stderr.flush()
    os._exit(code)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def _claim(output: Path, export: Path) -> IO[str]:
    """Take the output folder for this process, and clear away what a killed attempt left there half done."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("w")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}). Give --output a folder where you may write") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{output}: another trainer is writing to this folder. Wait for it, or give another --output") from None
    for stale in output.glob(".*.partial-*"):  # nobody else writes here
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    begun = (output / "result.json").is_file() or any(output.glob("checkpoints/step-*/complete.json"))
    if export.exists() and not begun:
        raise UserError(f"{export}: already exists, and no run was begun in {output}. Give another --output, or move it away")
    return lock


def _say(line: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"canvastune: {line}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
