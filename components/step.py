"""What every step does around its work: read the config, keep MLflow's record of the step, and fail with words that a person can use."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

from canvastune.config import RunConfig, parse_config
from canvastune.errors import UserError
from canvastune.tracking import StepRun, step_run
from canvastune.tracking.outbox import Step
from components.run_folder import tracked

ERROR = "canvastune: error: "  # a failed step's last words begin with this


@contextlib.contextmanager
def step(name: Step, config: str, run_folder: str, mlflow_run_id: str) -> Iterator[tuple[RunConfig, StepRun]]:
    """Run the block as one step of a run.

    Args:
        config: the resolved config as JSON text, as the step `resolve` gives it.
        mlflow_run_id: the parent of the step's record in MLflow; "" where MLflow was away when the run began.

    Yields:
        The config, and the record, which takes what the step wants to be seen in MLflow.
    """
    with last_words():
        recipe = parse_config(config)
        with step_run(tracked(recipe, run_folder, mlflow_run_id), name) as record:
            yield recipe, record


@contextlib.contextmanager
def last_words() -> Iterator[None]:
    """A UserError inside the block ends the process with exit code 1 and its message as the last lines, not with a traceback."""
    # KFP's executor shows every library's log at INFO.
    logging.basicConfig(force=True, level=logging.WARNING, stream=sys.stdout, format="%(levelname)s %(message)s")
    try:
        yield
    except UserError as error:
        print(f"{ERROR}{error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def error_in(said: str) -> str | None:
    """The last words in what a step said, without their mark; None if it did not end with an error of ours."""
    _, mark, words = said.rpartition(ERROR)
    return words.strip() if mark else None
