"""Evaluate the base and the tuned model from the command line.

`python -m canvastune.evaluate -c RECIPE --data PREPARED --tuned MODEL --output DIR` runs the step
`evaluate` without Kubeflow: answers to held-out prompts, and the validation loss of both
models. Under torchrun, its processes share the work.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import torch.distributed as dist

from canvastune.checkpoint.hub import resolve_model
from canvastune.config import RunConfig, load_config
from canvastune.distributed.processes import (
    die_with_parent,
    exit_without_cleanup,
    log_on_rank0,
    start_processes,
)
from canvastune.distributed.sync import run_on_rank0
from canvastune.distributed.watchdog import RankRegistry
from canvastune.errors import UserError
from canvastune.evaluation.ranks import Ranks
from canvastune.evaluation.run import evaluate_on_ranks
from canvastune.evaluation.sweep import sweep
from canvastune.logging import FORMAT_HELP, FORMATS, configure_logging, log_exception
from canvastune.planner.evaluation import evaluation_layout
from canvastune.planner.planner import find_architecture
from canvastune.training.devices import select_device

logger = logging.getLogger("canvastune")  # not __name__, which is __main__ here

_EPILOG = """examples:
  python -m canvastune.evaluate -c pipelines/recipes/gsm8k_lora.yaml --data runs/gsm8k/data \\
      --tuned runs/merged --output runs/evaluation

  torchrun --standalone --nproc-per-node=8 -m canvastune.evaluate \\
      -c pipelines/recipes/gsm8k_lora.yaml --data runs/gsm8k/data \\
      --tuned runs/merged --output runs/evaluation

Under torchrun, all processes take questions from a shared queue; if a GPU is too small for the
model, the experts are divided over several GPUs. To resume an interrupted evaluation, repeat the
command, with any number of processes.

exit codes: 0 done, 1 refused or failed (the last lines give the reason), 2 invalid command line,
130 interrupted (results are kept)."""


def main(arguments: list[str] | None = None) -> int:
    """Evaluate once; return 0, 1 after an error with its message printed, 130 after Ctrl-C."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.sweep and options.base_results:
        parser.error("--base-results: only the tuned model answers in a sweep; leave it out")
    configure_logging(options.log_format)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    registry: RankRegistry | None = None
    try:
        config = load_config(options.config)
        if processes > 1:
            die_with_parent()
            registry = start_processes(select_device)
        ranks = _ranks(config, processes)
        base = ranks.on_first(lambda: resolve_model(config.model))
        if not ranks.is_first:
            logger.setLevel(logging.WARNING)
        paths = (options.data, base, options.tuned, options.output)
        if options.sweep:
            sweep(config, *paths, ranks, options.cache)
        else:
            evaluate_on_ranks(config, *paths, ranks, options.cache, options.base_results)
    except UserError as error:
        log_on_rank0(error)
        return 1
    except KeyboardInterrupt:
        logger.info("evaluate: interrupted; results are kept, and the same command resumes")
        return 130
    except Exception as error:
        if registry is None:
            raise
        registry.report_exit(error)
        log_exception(error)
        exit_without_cleanup(1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


def _ranks(config: RunConfig, processes: int) -> Ranks:
    """Join the process group; its size and the model's decide over how many ranks experts go."""
    if processes == 1:
        return Ranks()
    model = run_on_rank0(lambda: find_architecture(config.model))
    return Ranks(evaluation_layout(config, model, processes).ep)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        "canvastune.evaluate",
        description="Answer held-out rows before and after tuning.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("-c", "--config", required=True, type=Path, metavar="RECIPE", help="the run's recipe")
    add(
        "--data", required=True, type=Path, help="prepared data: the output of `canvastune prepare`"
    )
    add(
        "--tuned",
        required=True,
        type=Path,
        metavar="MODEL",
        help="folder of the merged or fully tuned model",
    )
    add(
        "--output",
        required=True,
        type=Path,
        metavar="DIR",
        help="folder for evaluation.json, answers.jsonl and film.json",
    )
    add(
        "--base-results",
        type=Path,
        metavar="DIR",
        help="folder for the base's answers and losses, which later evaluations with the same "
        "questions reuse",
    )
    add(
        "--cache",
        type=Path,
        metavar="FILE",
        help="file for partial results until all results exist (default: one next to --output)",
    )
    add(
        "--sweep",
        action="store_true",
        help="instead of evaluating both models, let the tuned model answer with a few sampler "
        "settings; writes sweep.json, sweep.svg and sweep.png to --output",
    )
    add("--log-format", choices=FORMATS, default="text", help=FORMAT_HELP)
    return parser


if __name__ == "__main__":
    sys.exit(main())
