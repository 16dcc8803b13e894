"""`torchrun ... -m canvastune.train -c RECIPE`: train an adapter or a model on a data set."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import IO

import torch.distributed as dist

from canvastune.config import load_config
from canvastune.distributed.processes import (
    die_with_parent,
    exit_without_cleanup,
    log_on_rank0,
    start_processes,
)
from canvastune.distributed.sync import run_on_rank0
from canvastune.distributed.watchdog import RankLostError, RankRegistry
from canvastune.errors import UserError
from canvastune.io.atomic import disk_full
from canvastune.logging import FORMAT_HELP, FORMATS, configure_logging, log_error, log_exception
from canvastune.training.devices import select_device
from canvastune.training.run import acquire_output_lock, find_finished, find_metrics_run, train
from canvastune.training.trainer import export_path

logger = logging.getLogger("canvastune")  # not __name__, which is __main__ here

_RANK_LOST = (
    "Repeat the command to resume from the newest checkpoint; if memory was short, with a lower "
    "train.micro_batch_size."
)
_EPILOG = """examples:
  torchrun --standalone --nproc-per-node=8 -m canvastune.train \\
      -c pipelines/recipes/gsm8k_lora.yaml --output runs/gsm8k
  torchrun --standalone --nproc-per-node=2 -m canvastune.train \\
      -c pipelines/recipes/tiny_lora.yaml --set train.steps=20 --output runs/try
  python -m canvastune.train -c pipelines/recipes/tiny_lora.yaml --output runs/one \\
      --set parallel.ep=1 --log-format json > run.jsonl

If you repeat the command, it resumes from the newest checkpoint in --output; if the run is
finished, it does nothing.

exit codes: 0 success, 1 refused or failed (the last message gives the reason), 2 invalid command
line, 3 stopped on request after saving the state, 4 a rank hung (the error names it). torchrun
itself exits with 1 if a rank's exit code is not 0, and prints that code."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code.

    0 done, 1 refused, 3 stopped on request with the state saved.
    """
    options = _parser().parse_args(arguments)
    die_with_parent()
    configure_logging(options.log_format)
    locks: list[IO[str]] = []  # rank 0's
    rank_registry: RankRegistry | None = None
    try:
        config = load_config(options.config, options.set)
        rank_registry = start_processes(select_device)
        run_on_rank0(
            lambda: locks.append(
                acquire_output_lock(options.output, export_path(options.output, config))
            )
        )
        finished = run_on_rank0(lambda: find_finished(options.output, config, options.data))
        if finished is not None:
            logger.info(f"canvastune: {finished}")
            return 0
        result = train(
            config, options.data, options.output, find_metrics_run(options, config), rank_registry
        )
    except UserError as error:
        log_on_rank0(error)
        return 1
    except RankLostError as error:
        if error.args[0] is not None:  # only on the lowest surviving rank
            log_error(UserError(str(error), hint=_RANK_LOST))
        exit_without_cleanup(1)
    except OSError as error:
        full = disk_full(error, options.output)
        if full is None:
            raise
        log_error(full)
        return 1
    except Exception as error:
        if rank_registry is None:
            raise
        rank_registry.report_exit(error)
        log_exception(error)
        exit_without_cleanup(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for lock in locks:
            lock.close()
    if result is None:
        logger.info(
            "canvastune: stopped on request; the state is saved. Run the same command again to "
            f"resume: {options.output}"
        )
        return 3
    done = f"trained {result['steps']} steps in {result['seconds']:.0f} s"
    logger.info(
        f"canvastune: {done}; {result['method']} weights: {options.output / result['export']}"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "canvastune.train",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-c", "--config", required=True, help="recipe (YAML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the recipe; may be repeated",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help=(
            "folder written by `canvastune prepare` (default: the data is prepared from the "
            "recipe's data.source)"
        ),
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of this run, including its checkpoints"
    )
    parser.add_argument(
        "--mlflow-run",
        help="ID of the MLflow run that also gets the metrics (server: MLFLOW_TRACKING_URI)",
    )
    parser.add_argument(
        "--mlflow-job",
        help=(
            "instead of --mlflow-run, the ID of the pipeline's job, whose MLflow run is found or "
            "created once MLflow is reachable"
        ),
    )
    parser.add_argument("--log-format", choices=FORMATS, default="text", help=FORMAT_HELP)
    return parser


if __name__ == "__main__":
    sys.exit(main())
