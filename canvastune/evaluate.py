"""The step `evaluate`: answers to held-out prompts by the base and by the tuned model with stock `generate()`, and their validation loss.

`python -m canvastune.evaluate -c RECIPE --data PREPARED --tuned MODEL --output DIR` does it alone.
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
  python -m canvastune.evaluate -c pipelines/recipes/gsm8k_lora.yaml --data runs/gsm8k/data --tuned runs/merged --output runs/evaluation

The same command again goes on where an interrupted one was.

exit codes: 0 done, 1 refused or failed (the reason is the last line), 2 a wrong command line, 130 interrupted, what was done is kept."""


def main(arguments: list[str] | None = None) -> int:
    """Evaluate once; 1 and a line of words where that cannot be, 130 on Ctrl-C."""
    options = _parser().parse_args(arguments)
    configure_logging(options.log_format)
    try:
        config = load_config(options.config)
        evaluate(config, options.data, resolve_model(config.model), options.tuned, options.output)
    except UserError as error:
        log_error(error)
        return 1
    except KeyboardInterrupt:
        logger.info("evaluate: interrupted; what was done is kept, and the same command goes on")
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "canvastune.evaluate",
        description="Answer held-out rows before and after tuning.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-c", "--config", required=True, type=Path, metavar="RECIPE", help="the run's recipe")
    parser.add_argument("--data", required=True, type=Path, help="prepared data, as `canvastune prepare` leaves it")
    parser.add_argument("--tuned", required=True, type=Path, metavar="MODEL", help="folder of the merged or fully tuned model")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="gets evaluation.json, answers.jsonl and film.json")
    parser.add_argument("--log-format", choices=FORMATS, default="text", help=FORMAT_HELP)
    return parser


if __name__ == "__main__":
    sys.exit(main())
