"""Declare a step to Kubeflow as a lightweight component in the project's image."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

from kfp import dsl

from canvastune import __version__
from canvastune.config import RunConfig, parse_config
from canvastune.errors import UserError
from canvastune.logging import configure_logging, log_error
from canvastune.tracking import Step, StepRun, step_run
from components.run_directory import with_tracking_uri

IMAGE = (
    f"canvastune/pipeline:{__version__}"  # the pipeline's parameter `pipeline_image` replaces it
)

component = functools.partial(dsl.component, base_image=IMAGE, install_kfp_package=False)


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
        with step_run(with_tracking_uri(recipe, run_folder, mlflow_run_id), name) as record:
            yield recipe, record


@contextlib.contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Turn a UserError in the block into its message as the last lines, and exit code 1."""
    configure_logging()
    try:
        yield
    except UserError as error:
        log_error(error)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
