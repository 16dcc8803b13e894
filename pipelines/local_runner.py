"""Run the pipeline on this machine with Kubeflow's local runner, one process per step."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import yaml

from canvastune.config import RunConfig
from canvastune.data.files import missing_files
from canvastune.errors import UserError
from canvastune.evaluation.result import EvaluationResult
from canvastune.logging import json_requested
from canvastune.report.formatting import loss
from canvastune.report.summary import RunSummary
from canvastune.tracking import pending, run_page, tracking_uri
from canvastune.tracking.client import connect
from components.earlier_runs import find_compared
from components.finish.step import finish
from components.run_directory import pipeline_run, read_record
from pipelines.local_output import LocalOutput
from pipelines.warm_start import search_path, server_id, step_variables

logger = logging.getLogger(__name__)

_MLFLOW_UI = "http://127.0.0.1:5000"  # where `mlflow ui` listens
_SHUTDOWN_TIMEOUT = 90  # seconds for a step to end after Ctrl-C: the ranks save a checkpoint first


def run_recipe(
    config: RunConfig, workspace: Path, run_name: str | None, compare: Sequence[Path] = ()
) -> Path:
    """Run the whole pipeline on a recipe, log its results, and return the run's folder.

    Args:
        workspace: gets all output: runs/RUN, kfp/ (artifacts and their cache) and MLflow's store.
        run_name: RUN; an unfinished run of that name and recipe is resumed. None: the recipe's name
            and the time.
        compare: folders of runs to compare with in the report.

    Raises:
        UserError: a folder in `compare` is not a run; a step failed, with the message of the step.
        KeyboardInterrupt: interrupted; every process of the run has ended, and its MLflow run is
            closed.
    """
    from pipelines.finetune import finetune

    started = time.monotonic()
    find_compared(compare)
    workspace = workspace.absolute()
    try:
        workspace.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--workspace {workspace}: cannot create ({error.strerror})",
            hint="Choose a folder that you can write to.",
        ) from None
    folder = (
        workspace / "runs" / run_name if run_name else _new_folder(workspace / "runs", config.name)
    )
    logger.info(f"run {folder.name}: {_relative(folder)}")
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    parameters = {
        "recipe": text,
        "run_name": folder.name,
        "compare": "\n".join(str(other.absolute()) for other in compare),
        "workspace": str(workspace),
        "pipeline_image": "",
    }
    try:
        run_locally(finetune, parameters, workspace)
    except KeyboardInterrupt:
        record = read_record(folder)
        if record is not None:
            if not json_requested():
                print()  # below the terminal's ^C
            finish(str(workspace), folder.name, "", record.job_id, "FAILED")
        raise
    _log_result(config, workspace, folder, time.monotonic() - started)
    return folder


def run_locally(
    pipeline: Callable[..., object], arguments: dict[str, str], workspace: Path
) -> None:
    """Run a Kubeflow pipeline to completion.

    Artifacts go to `workspace`/kfp, a new folder each time; the cache of prepared data is there
    as well.

    Raises:
        UserError: a step failed, with the message of the step.
        KeyboardInterrupt: interrupted; every process of the run has ended.
    """
    from kfp import local

    _drop_incomplete_data(workspace / "kfp")
    output = LocalOutput(sys.stdout, json=json_requested())
    with _step_environment() as scratch, output.listening():
        local.init(
            local.SubprocessRunner(use_venv=False),
            pipeline_root=str(workspace / "kfp"),
            workspace_root=str(scratch / "kfp"),
            enable_caching=True,
        )
        try:
            pipeline(**arguments)
        except KeyboardInterrupt:
            _end_children()
            raise
        except RuntimeError:  # from KFP: it names the step that failed, but not the reason
            if output.failure is None:
                raise
            step, error = output.failure
            raise UserError(f"step {step} failed: {error}", hint=error.hint) from None


def _drop_incomplete_data(artifacts: Path) -> None:
    """Delete prepared data of which a file is missing, so that it is prepared again.

    KFP's cache looks whether the folder is there, not at what is in it.
    """
    for ended in sorted(artifacts.glob("*/prepare-data/executor_output.json")):
        data = ended.with_name("dataset")
        missing = missing_files(data) if data.is_dir() else []
        if missing:
            logger.warning(
                f"{data}: {missing[0].relative_to(data)} is missing: the data is prepared again"
            )
            shutil.rmtree(data)


@contextlib.contextmanager
def _step_environment() -> Iterator[Path]:
    """Set the environment that the steps' processes inherit; yield a temporary folder."""
    environment, executable = dict(os.environ), sys.executable
    with tempfile.TemporaryDirectory(prefix="canvastune-") as scratch:
        os.environ |= {
            **step_variables(),
            "TMPDIR": scratch,  # the runner leaves a folder per task
            "PATH": search_path(),
        }
        # The runner replaces every `python3` in a task's command line, also in paths, by
        # sys.executable.
        sys.executable = "python3"
        try:
            yield Path(scratch)
        finally:
            sys.executable = executable
            os.environ.clear()
            os.environ.update(environment)


def _end_children() -> None:
    """Send SIGTERM to the running step, which stops the processes it started; kill what remains.

    Only that process gets the signal: a second one during torchrun's shutdown would orphan its
    ranks.
    """
    children = psutil.Process().children(recursive=True)
    children = [process for process in children if process.pid != server_id()]
    for process in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            # Not the shell around it; what a stand-in gets, it passes on to the server's fork.
            if "kfp.dsl.executor_main" in process.cmdline() and process.ppid() != server_id():
                process.send_signal(signal.SIGTERM)
    _, remaining = psutil.wait_procs(children, timeout=_SHUTDOWN_TIMEOUT)
    for process in remaining:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(remaining, timeout=5)


def _new_folder(runs: Path, name: str) -> Path:
    """Create a folder whose name no earlier run has."""
    while True:
        folder = runs / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            time.sleep(0.2)
        else:
            return folder


def describe_result(config: RunConfig, workspace: Path, folder: Path) -> dict[str, str]:
    """Return the lines logged at the end of a run: its figures, and where its outputs are."""
    summary = RunSummary.read(folder)
    evaluation = EvaluationResult.read(folder / "evaluation")
    uri = tracking_uri(config, workspace)
    model = folder / ("model" if config.train.method == "lora" else "train/model")
    first, last = summary.validation_loss_first, summary.validation_loss_last
    lines = {
        "training loss": f"{loss(summary.train_loss_first)} -> {loss(summary.train_loss_last)}",
        "validation loss": f"{loss(first)} -> {loss(last)}",
        evaluation.measure: f"left out: {evaluation.unscored_reason}",
        "report": _relative(folder / "report" / "report.html"),
        "tuned model": _relative(model),
        "MLflow": str(connect(uri)),
    }
    run = pipeline_run(config, folder, "")
    page = run_page(run) or ""
    if uri.startswith("sqlite"):
        lines["MLflow"] = f"{shell_command('mlflow')} ui --backend-store-uri {uri}"
        lines["MLflow page"] = f"{_MLFLOW_UI}{page}"
    else:
        lines["MLflow"] = f"{connect(uri)}{page}"
    if pending(run):
        sync = f"canvastune sync {_relative(folder)}"
        lines["MLflow"] = f"incomplete; once {connect(uri)} responds again: {sync}"
    if evaluation.scored:
        before, after = evaluation.before.score, evaluation.after.score
        of = "of" if summary.exact_match_after is not None else "mean of"
        lines[evaluation.measure] = f"{before:.1%} -> {after:.1%} {of} held-out rows"
        ends = (summary.exact_match_normalized_before, summary.exact_match_normalized_after)
        if None not in ends:  # as in an evaluation of an earlier version
            lines[evaluation.measure] += f"; normalized {ends[0]:.1%} -> {ends[1]:.1%}"
    return lines


def _log_result(config: RunConfig, workspace: Path, folder: Path, seconds: float) -> None:
    logger.info(f"\n{folder.name} finished in {int(seconds // 60)}:{int(seconds % 60):02d}")
    for name, value in describe_result(config, workspace, folder).items():
        logger.info(f"    {name:<17}{value}")


def _relative(path: Path) -> str:
    """Return the path as it can be typed in the current folder."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def shell_command(name: str) -> str:
    """Return how to call a program of this Python's environment from the shell."""
    own = Path(sys.executable).parent / name
    return name if shutil.which(name) == str(own) or not own.exists() else _relative(own)
