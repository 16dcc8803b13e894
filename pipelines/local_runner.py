"""Run the pipeline on this machine with Kubeflow's local runner, one process per step."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import psutil
import yaml

from canvastune.checkpoint.hub import resolve_model
from canvastune.config import RunConfig
from canvastune.config.places import refuse_missing
from canvastune.data.files import missing_files
from canvastune.errors import UserError
from canvastune.evaluation.result import VERDICTS, EvaluationResult
from canvastune.logging import event, json_requested
from canvastune.report.formatting import loss
from canvastune.report.next_action import ask_command
from canvastune.report.summary import RunSummary
from canvastune.tracking import pending, run_page, tracking_uri
from canvastune.tracking.client import connect, database_file
from canvastune.tracking.shared_store import STORE
from canvastune.tracking.steps import FAILED, KILLED, format_reason
from components.earlier_runs import find_compared
from components.finish.step import close_own_run
from components.run_artifacts import MLFLOW_UI
from components.run_directory import pipeline_run, read_record, run_directory
from components.run_list import RunInfo, unfinished_runs
from components.run_owner import Owner, own_run, owner_environment
from pipelines.doctor.tracking import check_database
from pipelines.local_output import LocalOutput
from pipelines.warm_start import search_path, server_ids, step_variables

logger = logging.getLogger(__name__)

_SHUTDOWN_TIMEOUT = 90.0  # seconds for a step to end after Ctrl-C, or longer: `train.stop_grace`
_NO_RESUME = "`canvastune runs` lists all runs. Without --resume, a new one is started."
_REPORT_EVERY = 10.0  # seconds between lines that say what is waited for
_AT_THE_END = {"train": "save its state", "evaluate": "keep its answers"}  # of a step's process


class StepFailed(UserError):
    """A step of the pipeline failed."""

    def __init__(self, step: str, error: UserError) -> None:
        super().__init__(f"step {step} failed: {error}", hint=error.hint)
        self.step, self.error = step, error


def run_recipe(
    config: RunConfig,
    workspace: Path,
    run_name: str | None,
    compare: Sequence[Path] = (),
    command: Sequence[str] = (),
    *,
    resume: bool = False,
) -> Path:
    """Run the whole pipeline on a recipe, log its results, and return the run's folder.

    Args:
        workspace: gets all output: runs/RUN, kfp/ (artifacts and their cache) and MLflow's store.
        run_name: RUN; an unfinished run of that name and recipe is resumed. None: the recipe's name
            and the time; unfinished runs of the recipe are named.
        compare: folders of runs to compare with in the report.
        command: words after `canvastune` that start this run, without its name.
        resume: never start a new run; without a name, resume the newest unfinished one of the
            recipe.

    Raises:
        UserError: a folder in `compare` is not a run; another process works on this run; the
            workspace is not writable; no run to resume; a step failed, with the message of the
            step.
        KeyboardInterrupt: interrupted; every process of the run has ended, and its MLflow run is
            closed. The message is the command that resumes the run, once there is one to resume.
    """
    started = time.monotonic()
    find_compared(compare)
    _refuse_missing_inputs(config)
    workspace = workspace.absolute()
    _make_workspace(workspace)
    _warn_if_moved(config, workspace)
    start = [shell_command("canvastune"), *command]
    folder = _choose_folder(config, workspace, run_name, start, resume)
    again = _with_name(start, folder.name)
    with own_run(folder, again) as killed:
        if killed is not None:
            _wait_for_orphans(folder, killed, config.train.stop_grace)
        logger.info(f"run {folder.name}: {_relative(folder)}")
        _run_pipeline(config, workspace, folder, compare, again)
    _log_result(config, workspace, folder, time.monotonic() - started)
    return folder


def _warn_if_moved(config: RunConfig, workspace: Path) -> None:
    """Warn where MLflow would put the run's files: below the path that the workspace had before."""
    uri = tracking_uri(config, workspace)
    if uri.startswith("sqlite:///"):
        finding = check_database(database_file(uri))
        if finding.state == "warning":
            logger.warning(f"canvastune: {finding.found}. To have them here, {finding.fix}")


def _run_pipeline(
    config: RunConfig, workspace: Path, folder: Path, compare: Sequence[Path], again: str
) -> None:
    from pipelines.finetune import finetune

    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    parameters = {
        "recipe": text,
        "run_name": folder.name,
        "compare": "\n".join(str(other.absolute()) for other in compare),
        "workspace": str(workspace),
        "pipeline_image": "",
    }
    try:
        run_locally(
            finetune,
            parameters,
            workspace,
            config.train.stop_grace,
            _store_variable(tracking_uri(config, workspace)),
        )
    except StepFailed as failure:
        close_own_run(folder, FAILED, failure.step, format_reason(failure.error))
        if failure.step == "resolve":  # it refused the command itself
            raise
        error, told = failure.error, f"Then resume the run: {again}"
        hint = f"{error.hint}\n  {told}" if error.hint else told
        raise StepFailed(failure.step, UserError(str(error), hint=hint)) from None
    except KeyboardInterrupt:
        if read_record(folder) is None:  # it has not started
            raise
        logger.info("recording the interruption in the run's folder and in MLflow")
        close_own_run(folder, KILLED, "", "interrupted (Ctrl-C, or SIGTERM)")
        raise KeyboardInterrupt(again) from None


def _store_variable(uri: str) -> dict[str, str]:
    return {STORE: uri} if uri.startswith("sqlite:") else {}


def run_locally(
    pipeline: Callable[..., object],
    arguments: dict[str, str],
    workspace: Path,
    grace: float = 0,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Run a Kubeflow pipeline to completion.

    Artifacts go to `workspace`/kfp, a new folder each time; the cache of prepared data is there
    as well.

    Args:
        grace: seconds that the ranks of a training have to save their state.
        environment: variables of the steps in addition to this process's.

    Raises:
        UserError: a step failed, with the message of the step.
        KeyboardInterrupt: interrupted; every process of the run has ended.
    """
    from kfp import local

    _adopt_cache(workspace / "kfp")
    _drop_incomplete_data(workspace / "kfp")
    output = LocalOutput(sys.stdout, json=json_requested())
    with _step_environment(environment) as scratch, output.listening():
        local.init(
            local.SubprocessRunner(use_venv=False),
            pipeline_root=str(workspace / "kfp"),
            workspace_root=str(scratch / "kfp"),
            enable_caching=True,
        )
        try:
            pipeline(**arguments)
        except KeyboardInterrupt:
            _end_children(output.step, grace)
            raise
        except RuntimeError:  # from KFP: it names the step that failed, but not the reason
            if output.failure is None:
                raise
            raise StepFailed(*output.failure) from None


def _adopt_cache(artifacts: Path) -> None:
    """Make the cache of a workspace that was moved or copied point to its own artifacts.

    KFP's cache holds absolute paths: a copy would use the original's data.
    """
    for entry in sorted((artifacts / ".kfp_cache").glob("*.json")):
        try:
            found = json.loads(entry.read_text(encoding="utf-8"))
            paths = {name: Path(artifact["uri"]) for name, artifact in found.items()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # an output that is no artifact, or a damaged entry, which KFP leaves out
        if all(path.is_relative_to(artifacts) for path in paths.values()):
            continue
        own = {name: artifacts.joinpath(*path.parts[-3:]) for name, path in paths.items()}
        if not all(path.exists() for path in own.values()):
            logger.warning(f"{entry}: its artifacts are in another workspace and are created again")
            entry.unlink()
            continue
        for name, path in own.items():
            found[name]["uri"] = str(path)
        entry.write_text(json.dumps(found), encoding="utf-8")


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
def _step_environment(variables: Mapping[str, str]) -> Iterator[Path]:
    """Set the environment that the steps' processes inherit; yield a temporary folder."""
    environment, executable = dict(os.environ), sys.executable
    with tempfile.TemporaryDirectory(prefix="canvastune-") as scratch:
        os.environ |= {
            **step_variables(),
            "TMPDIR": scratch,  # the runner leaves a folder per task
            "PATH": search_path(),
            **owner_environment(),
            **variables,
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


def _end_children(step: str, grace: float) -> None:
    """Send SIGTERM to the running step, which stops the processes it started; kill what remains.

    Only that process gets the signal: a second one during torchrun's shutdown would orphan its
    ranks.
    """
    children = psutil.Process().children(recursive=True)
    children = [process for process in children if process.pid not in server_ids()]
    for process in filter(_is_step, children):
        with contextlib.suppress(psutil.NoSuchProcess):
            # What a stand-in gets, it passes on to the server's fork.
            if process.ppid() not in server_ids():
                process.send_signal(signal.SIGTERM)
    if not json_requested():
        print(file=sys.stderr)  # below the terminal's ^C
    _wait_for(children, step or "the run", grace)


def _wait_for_orphans(folder: Path, killed: Owner, grace: float) -> None:
    """Wait until the step of a killed `canvastune run` has ended, which it does by itself."""
    children = [process for process in psutil.process_iter() if _is_step(process, str(folder))]
    if children:
        logger.info(f"run {folder.name}: its earlier attempt ({killed}) was killed")
        _wait_for(children, "its step", grace)


def _is_step(process: psutil.Process, argument: str = "") -> bool:
    """Return whether a process is a step's, not the shell around it, and names an argument."""
    try:
        command = process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
        return False
    return "kfp.dsl.executor_main" in command and any(argument in word for word in command)


def _wait_for(processes: list[psutil.Process], step: str, grace: float) -> None:
    """Wait for the processes of a step to end, and say so; kill them after a timeout."""
    what = _AT_THE_END.get(step, "end")
    timeout = max(_SHUTDOWN_TIMEOUT, grace + _SHUTDOWN_TIMEOUT / 3)
    logger.info(
        f"waiting for {step} to {what}, for at most {timeout:.0f} s",
        extra=event("waiting", step=step, seconds=timeout),
    )
    begin = time.monotonic()
    _, remaining = psutil.wait_procs(processes, timeout=_REPORT_EVERY)
    while remaining and (waited := time.monotonic() - begin) < timeout:
        logger.info(
            f"still waiting for {step} to {what}: {waited:.0f} s",
            extra=event("waiting", step=step, seconds=round(timeout - waited)),
        )
        _, remaining = psutil.wait_procs(remaining, timeout=_REPORT_EVERY)
    for process in remaining:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(remaining, timeout=5)


def _refuse_missing_inputs(config: RunConfig) -> None:
    """Refuse a base model or a data set that is not there: a step would leave a run's folder.

    Raises:
        UserError: no such local path; or a model that may be one, and is not on the Hub.
    """
    refuse_missing("model.id", config.model.id, "model")
    for key, source in config.data.source_keys.items():
        refuse_missing(key, source.source, "" if key == "data.validation" else "data set")
    if Path(config.model.id).parent.is_dir():
        resolve_model(config.model, weights=False)


def _make_workspace(workspace: Path) -> None:
    """Create the workspace and what this process itself writes there.

    Raises:
        UserError: it cannot be created or written.
    """
    for folder in (workspace, workspace / "runs", workspace / "kfp"):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--workspace {workspace}: cannot create {folder} ({error.strerror})",
                hint="Choose a folder that you can write to.",
            ) from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(
                f"--workspace {workspace}: cannot write in {folder} (not permitted, or mounted "
                "read-only)",
                hint="Choose a folder that you can write to.",
            )


def _choose_folder(
    config: RunConfig, workspace: Path, run_name: str | None, start: Sequence[str], resume: bool
) -> Path:
    """Return the folder of a new run, or of the one to resume.

    Raises:
        UserError: an invalid name; no run to resume.
    """
    if run_name:
        folder = run_directory(str(workspace), run_name, "")
        record = read_record(folder)
        if record is not None and record.finished:
            raise UserError(
                f"{folder}: this run is finished; a finished run is never overwritten",
                hint="Choose another --run-name; `canvastune evaluate` evaluates it again.",
            )
        if resume and record is None:
            raise UserError(
                f"--resume: found no run in {folder}",
                hint=_NO_RESUME,
            )
        return folder
    unfinished = unfinished_runs(workspace, config)
    if resume and not unfinished:
        raise UserError(
            f"--resume: found no unfinished run of this recipe in {workspace / 'runs'}",
            hint=_NO_RESUME,
        )
    if resume:
        logger.info(f"resuming {_describe(unfinished[-1])}")
        return unfinished[-1].folder
    if unfinished:
        more = f" (and {len(unfinished) - 1} older)" if len(unfinished) > 1 else ""
        logger.info(
            f"An unfinished run of this recipe exists{more}: {_describe(unfinished[-1])}\n"
            f"To resume it instead of starting a new one:\n"
            f"  {_with_name(start, unfinished[-1].name)}\n"
        )
    return _new_folder(workspace / "runs", config.name)


def _describe(run: RunInfo) -> str:
    return f"{run.name}, {run.progress}"


def _with_name(start: Sequence[str], name: str) -> str:
    return shlex.join([*start, "--run-name", name])


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
        "verdict": "none: no row was scored",
        "report": _relative(folder / "report" / "report.html"),
        "tuned model": _relative(model),
        "try it": ask_command(_relative(folder), shell_command("canvastune")),
        "MLflow": str(connect(uri)),
    }
    run = pipeline_run(config, folder, "")
    page = run_page(run) or ""
    if uri.startswith("sqlite"):
        lines["MLflow"] = f"{shell_command('mlflow')} ui --backend-store-uri {shlex.quote(uri)}"
        lines["MLflow page"] = f"{MLFLOW_UI}{page}"
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
        lines["verdict"] = (
            f"{VERDICTS[evaluation.verdict or 'undecided']}: {evaluation.gained} gained, {evaluation.lost} "
            f"lost of {evaluation.scored} rows, p = {evaluation.p_value:.2g}"
        )
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
