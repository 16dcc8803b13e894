"""Run the body of a step in its process: read its config, record it in MLflow, and report its
error.

Apart from `decorator`, because Kubeflow's executor runs without `kfp.dsl.component`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from canvastune.config import RunConfig, parse_config
from canvastune.errors import UserError
from canvastune.io.atomic import disk_full
from canvastune.logging import configure_logging, log_error
from canvastune.tracking import Step, StepRun, step_run
from components.run_directory import pipeline_run
from components.run_owner import end_with_owner


@contextlib.contextmanager
def step(
    name: Step, config: str, run_folder: str, mlflow_run_id: str
) -> Iterator[tuple[RunConfig, StepRun]]:
    """Run the block as one step of a run.

    Args:
        config: the resolved config as JSON text, from the step `resolve`.
        mlflow_run_id: the run in MLflow; "" if MLflow was unreachable when the run started.

    Yields:
        The config, and the record of what MLflow shows of the step.
    """
    with exit_on_user_error():
        recipe = parse_config(config)
        with step_run(pipeline_run(recipe, run_folder, mlflow_run_id), name) as record:
            yield recipe, record


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a UserError or a full disk in the block into a message as the last lines, and exit code 1."""
    configure_logging()
    end_with_owner()
    try:
        yield
    except UserError as error:
        log_error(error)
        raise SystemExit(1) from None
    except OSError as error:
        full = disk_full(error, "the step's outputs")
        if full is None:
            raise
        log_error(full)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
