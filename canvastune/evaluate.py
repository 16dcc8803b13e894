"""Evaluate the base and the tuned model from the command line.

`python -m canvastune.evaluate -c RECIPE --data PREPARED --tuned MODEL --output DIR` runs the step
`evaluate` without Kubeflow: answers to held-out prompts, and the validation loss of both
models.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from canvastune.checkpoint.hub import resolve_model
from canvastune.config import load_config
from canvastune.errors import UserError
from canvastune.evaluation.run import evaluate
from canvastune.logging import FORMAT_HELP, FORMATS, configure_logging, log_error

logger = logging.getLogger("canvastune")  # not __name__, which is __main__ here

_EPILOG = """examples:
  python -m canvastune.evaluate -c pipelines/recipes/gsm8k_lora.yaml --data runs/gsm8k/data \\
      --tuned runs/merged --output runs/evaluation

The same command again resumes an interrupted evaluation.

exit codes: 0 done, 1 refused or failed (the last lines give the reason), 2 invalid command line,
130 interrupted (results are kept)."""


def main(arguments: list[str] | None = None) -> int:
    """Evaluate once; return 0, 1 after an error with its message printed, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    configure_logging(options.log_format)
    try:
        config = load_config(options.config)
        evaluate(
            config,
            options.data,
            resolve_model(config.model),
            options.tuned,
            options.output,
            base_results=options.base_results,
        )
    except UserError as error:
        log_error(error)
        return 1
    except KeyboardInterrupt:
        logger.info("evaluate: interrupted; results are kept, and the same command resumes")
        return 130
    return 0


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
        help="folder where the base's answers and losses are kept, and used again by evaluations "
        "that ask it the same",
    )
    add("--log-format", choices=FORMATS, default="text", help=FORMAT_HELP)
    return parser


if __name__ == "__main__":
    sys.exit(main())
