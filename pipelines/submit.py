"""Upload the pipeline to Kubeflow if it has changed, start a run, and follow it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from canvastune import __version__
from canvastune.config import RunConfig, parse_config
from canvastune.config.loading import load_yaml_file
from canvastune.config.places import is_path, refuse_address
from canvastune.errors import UserError
from canvastune.logging import event
from components.earlier_runs import refuse_too_many
from components.versions import RESTRICTED_STEPS
from pipelines.job_reports import JobReports
from pipelines.kfp_client import KubeflowClient, named, translate_errors

logger = logging.getLogger(__name__)

PIPELINE = "canvastune-finetune"
DEFAULT_IMAGE = "canvastune/pipeline:"
_ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
_RETRY_SECONDS = 600.0  # how long the server of a followed run may be unreachable


@dataclass(frozen=True)
class Version:
    """One version of the pipeline on a server."""

    pipeline_id: str
    version_id: str
    steps: frozenset[str]  # names of the tasks that run a container, as the graph shows them


def submit(
    config: RunConfig,
    kubeflow: KubeflowClient,
    *,
    experiment: str | None = None,
    run_name: str | None = None,
    cluster: str | None = None,
    compare: Sequence[str] = (),
    wait: bool = False,
    pause: float = 5.0,
) -> str:
    """Start a run of the pipeline on a recipe, log its address, and with `wait` follow it.

    Args:
        experiment: default: the recipe's tracking.experiment.
        run_name: shown in Kubeflow, and the name of the run's folder; default: the recipe's name,
            and the pipeline job's.
        cluster: JSON text of `cluster` settings for this run; None: the uploaded pipeline's.
        compare: names of runs on the workspace to compare with in the report.
        pause: seconds between two requests for the state of a followed run.

    Returns:
        The address of the run.

    Raises:
        UserError: as `create_kfp_client`; paths that pods cannot see; with `wait`, a run that did
            not succeed; more runs to compare than colors; a run of that name is in progress.
    """
    refuse_local_paths(config, cluster)
    refuse_too_many(len(compare))
    client = kubeflow.create_kfp_client()
    if run_name:
        _refuse_running(client, kubeflow, run_name)
    version = _upload_if_changed(client, kubeflow, PIPELINE, {})
    parameters = {"recipe": recipe_text(config), "kubeflow_url": kubeflow.host}
    parameters |= {"run_name": run_name} if run_name else {}
    parameters |= {"compare": "\n".join(compare)} if compare else {}
    parameters |= _cluster_parameters(cluster)
    with translate_errors(kubeflow), _quiet():
        home = client.create_experiment(
            experiment or config.tracking.experiment, namespace=kubeflow.namespace
        )
        run = client.run_pipeline(
            home.experiment_id,
            run_name or config.name,
            params=parameters,
            pipeline_id=version.pipeline_id,
            version_id=version.version_id,
        )
    address = f"{kubeflow.host}/#/runs/details/{run.run_id}"
    logger.info(
        f"run {run.display_name}: {address}", extra=event("run", state="submitted", address=address)
    )
    if wait:
        reports = JobReports(run.run_id, kubeflow.namespace or "kubeflow")
        try:
            follow(
                lambda: client.get_run(run.run_id),
                version.steps,
                kubeflow,
                address,
                pause,
                reports=reports,
            )
        except KeyboardInterrupt:
            logger.info(f"the run continues: {address}")
            raise
    return address


def _refuse_running(client: Any, kubeflow: KubeflowClient, run_name: str) -> None:
    """Raise: UserError, a run of this name is in progress, and works in the folder of this name."""
    with translate_errors(kubeflow), _quiet():
        found = client.list_runs(
            page_size=100,
            sort_by="created_at desc",
            namespace=kubeflow.namespace,
            filter=named(run_name),
        )
    for run in found.runs or ():
        if run.display_name == run_name and run.state not in _ENDED:
            raise UserError(
                f"--run-name {run_name}: this run is in progress, created {run.created_at}: "
                f"{kubeflow.host}/#/runs/details/{run.run_id}",
                hint="Wait for it to end, terminate it there, or choose another name.",
            )


def upload(
    kubeflow: KubeflowClient,
    *,
    name: str = PIPELINE,
    cluster: str | None = None,
    image: str | None = None,
    steps: str | None = None,
) -> Version:
    """Upload the pipeline, unless the server has the same version already.

    Args:
        cluster: JSON text; the default of the parameter `cluster`, and its claim the default of
            `volume_claim`.
        image: the default of the parameter `pipeline_image`.
        steps: JSON text with settings of the steps' pods, which the graph is compiled with.

    Raises:
        UserError: as `create_kfp_client`.
    """
    defaults = _cluster_parameters(cluster) | ({"pipeline_image": image} if image else {})
    defaults |= {"steps": steps} if steps is not None else {}
    return _upload_if_changed(kubeflow.create_kfp_client(), kubeflow, name, defaults)


def follow(
    get_run: Callable[[], Any],
    steps: frozenset[str],
    kubeflow: KubeflowClient,
    address: str,
    pause: float,
    retry_seconds: float = _RETRY_SECONDS,
    reports: JobReports | None = None,
) -> None:
    """Log each change of a step's state, and what its job waits for, until the run has ended.

    Args:
        get_run: returns the run as the server has it.
        pause: seconds between two calls.
        retry_seconds: how long the server may be unreachable.
        reports: of the run's jobs; None: they are not shown.

    Raises:
        UserError: the run did not succeed (with the step that failed), or the server is unreachable
            for too long.
    """
    seen: dict[str, str] = {}
    last_response, unreachable = time.monotonic(), False
    while True:
        try:
            with translate_errors(kubeflow), _quiet():
                run = get_run()
            last_response, unreachable = time.monotonic(), False
        except UserError as error:
            if time.monotonic() - last_response > retry_seconds:
                raise UserError(
                    f"{error} (the run continues: {address})", hint=error.hint
                ) from None
            if not unreachable:
                _log_now(f"no response, trying again: {error}")
            unreachable = True
            time.sleep(pause)
            continue
        details = (run.run_details and run.run_details.task_details) or []
        tasks = [task for task in details if task.display_name in steps and task.state]
        for task in tasks:
            if seen.get(task.display_name) != task.state:
                seen[task.display_name] = task.state
                state = task.state.lower()
                fields = event("task", task=task.display_name, state=state)
                _log_now(f"{task.display_name:<16}{state}", fields)
        if reports is not None:
            with _quiet():
                lines = reports.new(running=any(task.state == "RUNNING" for task in tasks))
            for line in lines:
                _log_now(line, event("job", report=line))
        if run.state in _ENDED:
            break
        time.sleep(pause)
    _log_now(f"run {run.state.lower()}", event("run", state=run.state.lower()))
    if run.state != "SUCCEEDED":
        refused = next(iter(reports.refusals.items()), None) if reports is not None else None
        if refused is not None and run.state == "FAILED":
            step, (message, hint) = refused
            raise UserError(f"step {step} has no pod: {message}", hint=f"{hint} See {address}.")
        raise UserError(
            _failure_reason(run, tasks, kubeflow.namespace or "kubeflow"), hint=f"See {address}."
        )


def _log_now(line: str, fields: dict[str, Any] | None = None) -> None:
    logger.info(f"{time.strftime('%H:%M:%S')}  {line}", extra=fields)


def refuse_local_paths(config: RunConfig, cluster: str | None = None) -> None:
    """Refuse data and models at a path that no pod can see.

    Raises:
        UserError: names the key and the path.
    """
    mount = json.loads(cluster or "{}").get("mount_path") or config.cluster.mount_path
    data = [(key, source.source, "data set") for key, source in config.source_keys.items()]
    for key, place, kind in (*data, ("model.id", config.model.id, "model")):
        if kind == "data set":
            refuse_address(key, place)
        path = Path(place).expanduser()
        if (is_path(place) or path.exists()) and not path.is_relative_to(mount):
            message = (
                f"{key}: {place} is a path on this machine, which no pod of the cluster can see"
            )
            copy = f"Copy it to the workspace volume and use {mount}/{path.name}"
            hint = f"{copy}, or use the id of a {kind} on the Hub."
            raise UserError(message, hint=hint)
    for file in map(Path, config.evaluate.judge_files):
        if not file.is_relative_to(mount):
            raise UserError(
                f"evaluate.judge: {file} is a path on this machine, which no pod of the cluster can "
                "see",
                hint=f"Copy it to the workspace volume and use {mount}/{file.name}.",
            )


def read_cluster_file(path: Path) -> str:
    """Read a file with settings of a recipe's section `cluster`; return them as JSON text.

    Raises:
        UserError: file not found, not YAML or JSON, or one line per invalid setting.
    """
    tree = load_yaml_file(path)
    if isinstance(tree, dict) and set(tree) == {"cluster"}:
        tree = tree["cluster"]
    if not isinstance(tree, dict):
        message = (
            f"{path}: found {type(tree).__name__}, expected settings such as `backend: pytorchjob`"
        )
        raise UserError(message, hint="Write one setting per line.")
    parse_config({"name": "settings", "data": {"source": "none"}, "cluster": tree}, str(path))
    return json.dumps(tree, sort_keys=True)


def recipe_text(config: RunConfig) -> str:
    """Return the resolved recipe as YAML; `cluster` only as far as the recipe sets it."""
    tree = config.model_dump(mode="json", exclude={"cluster"})
    if chosen := config.cluster.model_dump(mode="json", exclude_unset=True):
        tree["cluster"] = chosen
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def compile_pipeline(
    path: Path, defaults: dict[str, str] | None = None, *, restricted: bool = True
) -> None:
    """Write the compiled pipeline.

    Args:
        defaults: replace the defaults of its parameters.
        restricted: steps ask for what PodSecurity restricted wants; Kubeflow Pipelines older than
            `RESTRICTED_STEPS` refuses a graph with that.
    """
    from kfp.compiler import Compiler

    from pipelines.finetune import pipeline_with
    from pipelines.steps import dump, parse_steps

    given = dict(defaults or {})
    settings = parse_steps(given.get("steps", "{}"))
    if "steps" in given:  # written as this version writes it: the run compares the texts
        given["steps"] = dump(settings)
    sub_path = json.loads(given.get("cluster") or "{}").get("sub_path") or ""
    pipeline = pipeline_with(settings, sub_path, restricted)
    Compiler().compile(pipeline, str(path), pipeline_parameters=given or None)


def _cluster_parameters(cluster: str | None) -> dict[str, str]:
    """Return the pipeline's parameters: steps get the same claim and secret as jobs' pods."""
    if cluster is None:
        return {}
    settings = json.loads(cluster)
    shared = {"volume_claim": settings.get("claim"), "credentials": settings.get("credentials")}
    return {"cluster": cluster, **{key: value for key, value in shared.items() if value}}


def _upload_if_changed(
    client: Any, kubeflow: KubeflowClient, name: str, defaults: dict[str, str]
) -> Version:
    """Return the version that this code compiles to; upload it if the server does not have it."""
    with translate_errors(kubeflow), _quiet():
        listed = client.list_pipelines(filter=named(name), namespace=kubeflow.namespace)
        found = listed.pipelines or []
        versions: list[Any] = []
        if found:
            listed = client.list_pipeline_versions(
                found[0].pipeline_id, page_size=100, sort_by="created_at desc"
            )
            versions = listed.pipeline_versions or []
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "finetune.yaml"
        kept = _kept_defaults(versions[0]) if versions else {}
        restricted = not RESTRICTED_STEPS.is_below(kubeflow.health()["tag_name"])
        compile_pipeline(package, kept | defaults, restricted=restricted)
        text = package.read_bytes()
        digest = hashlib.sha256(text).hexdigest()[:12]
        # The server names a pipeline's first version like the pipeline, and keeps this description.
        mark = f"content {digest}"
        version = next(
            (
                v
                for v in versions
                if mark in (v.description or "") or digest in (v.display_name or "")
            ),
            None,
        )
        if version is None:
            about = f"Canvastune {__version__}, {mark}"
            with translate_errors(kubeflow), _quiet():
                if found:
                    version = client.upload_pipeline_version(
                        str(package),
                        f"{__version__}-{digest}",
                        pipeline_id=found[0].pipeline_id,
                        description=about,
                    )
                else:
                    created = client.upload_pipeline(
                        str(package), name, description=about, namespace=kubeflow.namespace
                    )
                    listed = client.list_pipeline_versions(created.pipeline_id, page_size=1)
                    version = listed.pipeline_versions[0]
            logger.info(
                f"pipeline {name}: {'new version' if found else 'uploaded,'} {__version__}-{digest}"
            )
        else:
            logger.info(f"pipeline {name}: {__version__}-{digest} is already there")
    return Version(
        version.pipeline_id,
        version.pipeline_version_id,
        _steps(yaml.safe_load(text.split(b"\n---")[0])),
    )


def _kept_defaults(version: Any) -> dict[str, str]:
    """Return the defaults that were uploaded with the newest version: the next one keeps them."""
    spec = version.pipeline_spec or {}
    parameters = (
        spec.get("pipeline_spec", spec)
        .get("root", {})
        .get("inputDefinitions", {})
        .get("parameters", {})
    )
    names = ("cluster", "volume_claim", "credentials", "pipeline_image", "steps")
    kept = {name: parameters.get(name, {}).get("defaultValue") for name in names}
    return {
        key: value for key, value in kept.items() if value and not value.startswith(DEFAULT_IMAGE)
    }


def _steps(spec: dict[str, Any]) -> frozenset[str]:
    """Return the names of the tasks that run a container, in every branch of the pipeline."""
    names = set()
    for graph in (spec["root"], *spec["components"].values()):
        for name, task in graph.get("dag", {}).get("tasks", {}).items():
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                names.add(name)
    return frozenset(names)


def _failure_reason(run: Any, tasks: list[Any], namespace: str) -> str:
    failed = [task for task in tasks if task.state == "FAILED"]
    if not failed:
        reason = (
            " ".join(run.error.message.split())
            if run.error and run.error.message
            else "no step reported a reason; Argo's of each: kubectl get workflows.argoproj.io -n "
            f"{namespace} -l pipeline/runid={run.run_id} -o jsonpath="
            "'{.items[*].status.nodes.*.message}'"
        )
        return f"run {run.state.lower()}: {reason}"
    first = min(failed, key=lambda task: (task.end_time is None, str(task.end_time)))
    if first.error and first.error.message:
        reason = " ".join(first.error.message.split())
    else:  # a server reports no reason for a step whose container failed
        pods = f"-n {namespace} -l pipeline/runid={run.run_id}"
        log = f"kubectl logs {pods} -c main --tail=-1 | grep error:"
        reason = f"its log has the reason ({log})"
    return f"step {first.display_name} failed: {reason}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Kubeflow's client, which prints links and logs retries."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
