"""Runs the pipeline on this machine: Kubeflow's local runner, one process a step."""

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
from canvastune.errors import UserError
from canvastune.logging import json_requested
from canvastune.report.formatting import loss
from canvastune.report.summary import RunSummary
from canvastune.tracking import tracking_uri
from canvastune.tracking.client import connect
from components.earlier_runs import find_compared
from components.finish.step import finish
from components.run_directory import read_record
from pipelines.local_output import LocalOutput

logger = logging.getLogger(__name__)

_FAREWELL = 90  # seconds that a step gets to end in after Ctrl-C: the ranks save a checkpoint first


def run_recipe(config: RunConfig, workspace: Path, run_name: str | None, compare: Sequence[Path] = ()) -> Path:
    """Run the whole pipeline on a recipe, say what was achieved, and return the run's folder.

    Args:
        workspace: gets everything that the run makes: runs/RUN, kfp/ (artifacts and their cache) and MLflow's store.
        run_name: RUN; an unfinished run of that name and recipe is gone on with. None: a new name, from the recipe's and the time.
        compare: folders of runs that the report lays over this one.

    Raises:
        UserError: a folder to compare with that is no run's; a step failed: the message is the step's own last words.
        KeyboardInterrupt: interrupted; no process of the run is left, and its MLflow run is closed.
    """
    from pipelines.finetune import finetune

    started = time.monotonic()
    find_compared(compare)
    workspace = workspace.absolute()
    try:
        workspace.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workspace {workspace}: cannot be made ({error.strerror}). Give a folder where you may write") from None
    folder = workspace / "runs" / run_name if run_name else _new_folder(workspace / "runs", config.name)
    logger.info(f"run {folder.name}: {_shown(folder)}")
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    given = {"recipe": text, "run_name": folder.name, "compare": "\n".join(str(other.absolute()) for other in compare)}
    try:
        run_locally(finetune, {**given, "workspace": str(workspace), "pipeline_image": ""}, workspace)
    except KeyboardInterrupt:
        record = read_record(folder)
        if record is not None:
            if not json_requested():
                print()  # below the terminal's ^C
            finish(str(workspace), folder.name, "", record.job_id, "FAILED")
        raise
    _print_result(config, workspace, folder, time.monotonic() - started)
    return folder


def run_locally(pipeline: Callable[..., object], arguments: dict[str, str], workspace: Path) -> None:
    """Run a Kubeflow pipeline to its end.

    Artifacts go to `workspace`/kfp, a new folder each time; the cache of prepared data stands there as well.

    Raises:
        UserError: a step failed; the message is the step's own last words.
        KeyboardInterrupt: interrupted; no process of the run is left.
    """
    from kfp import local

    output = LocalOutput(sys.stdout, json=json_requested())
    with _surroundings() as scratch, output.listening():
        runner = local.SubprocessRunner(use_venv=False)
        local.init(runner, pipeline_root=str(workspace / "kfp"), workspace_root=str(scratch / "kfp"), enable_caching=True)
        try:
            pipeline(**arguments)
        except KeyboardInterrupt:
            _end_children()
            raise
        except RuntimeError:  # KFP's own: it says which step failed, but not why
            if output.failure is None:
                raise
            step, words = output.failure
            raise UserError(f"step {step} failed: {words}") from None


@contextlib.contextmanager
def _surroundings() -> Iterator[Path]:
    """What the steps' processes inherit; yields a scratch folder that is gone afterwards."""
    environment, executable = dict(os.environ), sys.executable
    with tempfile.TemporaryDirectory(prefix="canvastune-") as scratch:
        os.environ |= {
            "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait starve the other rank of a small machine
            "PYTHONSAFEPATH": "1",  # a person's own datasets.py in the current folder is not the library
            "PYTHONUNBUFFERED": "1",  # words appear when they are said
            "TQDM_DISABLE": "1",  # bars would come as a line per update
            "TMPDIR": scratch,  # the runner leaves a folder per task behind
            "PATH": f"{Path(executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        }
        # The runner replaces every `python3` in a task's command line, paths in its arguments included, by sys.executable.
        sys.executable = "python3"
        try:
            yield Path(scratch)
        finally:
            sys.executable = executable
            os.environ.clear()
            os.environ.update(environment)


def _end_children() -> None:
    """End the running step: ask its own process, which asks those that it started; kill what is left in the end.

    Nobody else is asked: torchrun loses its ranks, and they their checkpoint, if a second signal interrupts its farewell.
    """
    everyone = psutil.Process().children(recursive=True)
    for process in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            if "kfp.dsl.executor_main" in process.cmdline():  # not the shell around it, where there is one
                process.send_signal(signal.SIGTERM)
    _, left = psutil.wait_procs(everyone, timeout=_FAREWELL)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=5)


def _new_folder(runs: Path, name: str) -> Path:
    """Claim a folder of a name that no earlier run has."""
    while True:
        folder = runs / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            time.sleep(0.2)
        else:
            return folder


def describe_result(config: RunConfig, workspace: Path, folder: Path) -> dict[str, str]:
    """Return the lines printed at the end of a run: its figures, and where its outputs are."""
    summary = RunSummary.read(folder)
    uri = tracking_uri(config, workspace)
    lines = {
        "training loss": f"{loss(summary.train_loss_first)} -> {loss(summary.train_loss_last)}",
        "validation loss": f"{loss(summary.validation_loss_first)} -> {loss(summary.validation_loss_last)}",
        "exact match": "no held-out row has an answer that evaluate.answer_pattern finds",
        "report": _shown(folder / "report" / "report.html"),
        "tuned model": _shown(folder / ("model" if config.train.method == "lora" else "train/model")),
        "MLflow": f"{_command('mlflow')} ui --backend-store-uri {uri}" if uri.startswith("sqlite") else str(connect(uri)),
    }
    if (folder / "unsent").exists():
        lines["MLflow"] = f"lacks a part of this run; when {connect(uri)} is back: canvastune sync {_shown(folder)}"
    if summary.exact_match_after is not None:
        lines["exact match"] = f"{summary.exact_match_before:.1%} -> {summary.exact_match_after:.1%} of held-out rows"
    return lines


def _print_result(config: RunConfig, workspace: Path, folder: Path, seconds: float) -> None:
    lines = describe_result(config, workspace, folder)
    logger.info(f"\n{folder.name} finished in {int(seconds // 60)}:{int(seconds % 60):02d}")
    for name, value in lines.items():
        logger.info(f"    {name:<17}{value}")


def _shown(path: Path) -> str:
    """A path as short as it can be typed here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _command(name: str) -> str:
    """How a program of this Python's environment is called from the person's shell."""
    own = Path(sys.executable).parent / name
    return name if shutil.which(name) == str(own) or not own.exists() else _shown(own)
