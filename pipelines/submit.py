"""The pipeline on a Kubeflow Pipelines server: uploaded when it changed, run on a recipe, followed to its end."""

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
from canvastune.errors import UserError
from canvastune.logging import event
from pipelines.kfp_client import KubeflowClient, answered

logger = logging.getLogger(__name__)

PIPELINE = "canvastune-finetune"
STOCK_IMAGE = "canvastune/pipeline:"
_ENDED = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")
_PATIENCE = 600  # seconds that a followed run's server may be away


@dataclass(frozen=True)
class Version:
    """One version of the pipeline on a server."""

    pipeline_id: str
    version_id: str
    steps: frozenset[str]  # names of the tasks that do work, as the graph shows them


def submit(
    config: RunConfig,
    server: KubeflowClient,
    *,
    experiment: str | None = None,
    run_name: str | None = None,
    cluster: str | None = None,
    compare: Sequence[str] = (),
    wait: bool = False,
    pause: float = 5.0,
) -> str:
    """Start a run of the pipeline on a recipe, print its address, and with `wait` follow it to its end.

    Args:
        experiment: default: the recipe's tracking.experiment.
        run_name: shown in Kubeflow, and RUN of the run's folder; default: the recipe's name, and the pipeline job's.
        cluster: JSON text of `cluster` settings for this run; None: those of the uploaded pipeline.
        compare: names of runs on the workspace that the report lays over this one.
        pause: seconds between two looks at a followed run.

    Returns:
        The run's address.

    Raises:
        UserError: as `connect`; paths that pods do not see; with `wait`, a run that did not succeed, with the step that failed.
    """
    refuse_local_paths(config, cluster)
    client = server.connect()
    version = _uploaded(client, server, PIPELINE, {})
    parameters = {"recipe": recipe_text(config), "kubeflow_url": server.host}
    parameters |= {"run_name": run_name} if run_name else {}
    parameters |= {"compare": "\n".join(compare)} if compare else {}
    parameters |= _cluster_parameters(cluster)
    with answered(server), _quiet():
        home = client.create_experiment(experiment or config.tracking.experiment, namespace=server.namespace)
        run = client.run_pipeline(
            home.experiment_id, run_name or config.name, params=parameters, pipeline_id=version.pipeline_id, version_id=version.version_id
        )
    address = f"{server.host}/#/runs/details/{run.run_id}"
    logger.info(f"run {run.display_name}: {address}", extra=event("run", state="submitted", address=address))
    if wait:
        try:
            follow(lambda: client.get_run(run.run_id), version.steps, server, address, pause)
        except KeyboardInterrupt:
            logger.info(f"the run goes on: {address}")
            raise
    return address


def upload(server: KubeflowClient, *, name: str = PIPELINE, cluster: str | None = None, image: str | None = None) -> Version:
    """Bring the pipeline to a server, if what it has is not the same already.

    Args:
        cluster: JSON text that becomes the default of the parameter `cluster`, and its claim that of `volume_claim`.
        image: becomes the default of the parameter `pipeline_image`.

    Raises:
        UserError: as `connect`.
    """
    return _uploaded(server.connect(), server, name, _cluster_parameters(cluster) | ({"pipeline_image": image} if image else {}))


def follow(look: Callable[[], Any], steps: frozenset[str], server: KubeflowClient, address: str, pause: float) -> None:
    """Print a line per change of a step's state until the run has ended.

    Args:
        look: asks the server for the run.

    Raises:
        UserError: it did not succeed: the step that failed, and what the server knows of it; a server that is away for long.
    """
    seen: dict[str, str] = {}
    last_answer, away = time.monotonic(), False
    while True:
        try:
            with answered(server), _quiet():
                run = look()
            last_answer, away = time.monotonic(), False
        except UserError as error:
            if time.monotonic() - last_answer > _PATIENCE:
                raise UserError(f"{error} (the run goes on: {address})") from None
            if not away:
                logger.info(f"{time.strftime('%H:%M:%S')}  no answer, asking again: {error}")
            away = True
            time.sleep(pause)
            continue
        tasks = [task for task in (run.run_details and run.run_details.task_details) or [] if task.display_name in steps and task.state]
        for task in tasks:
            if seen.get(task.display_name) != task.state:
                seen[task.display_name] = task.state
                state = task.state.lower()
                logger.info(
                    f"{time.strftime('%H:%M:%S')}  {task.display_name:<16}{state}", extra=event("task", task=task.display_name, state=state)
                )
        if run.state in _ENDED:
            break
        time.sleep(pause)
    logger.info(f"{time.strftime('%H:%M:%S')}  run {run.state.lower()}", extra=event("run", state=run.state.lower()))
    if run.state != "SUCCEEDED":
        raise UserError(_why(run, tasks, server.namespace or "kubeflow", address))


def refuse_local_paths(config: RunConfig, cluster: str | None = None) -> None:
    """Refuse data and models that lie where no pod sees them.

    Raises:
        UserError: names the key, the path and what to do.
    """
    mount = json.loads(cluster or "{}").get("mount_path") or config.cluster.mount_path
    for key, place, hub in (("data.source", config.data.source, "data set"), ("model.id", config.model.id, "model")):
        path = Path(place).expanduser()
        local = place.startswith(("/", ".", "~")) or place.count("/") > 1 or path.suffix in (".jsonl", ".json", ".parquet", ".gz")
        if (local or path.exists()) and not path.is_relative_to(mount):
            raise UserError(
                f"{key}: {place} is a path of this machine, which no pod of the cluster sees. "
                f"Copy it to the workspace volume and give {mount}/{path.name}, or the id of a {hub} on the Hub"
            )


def read_cluster_file(path: Path) -> str:
    """JSON text of a file with the settings of the recipes' section `cluster`, or with that section itself.

    Raises:
        UserError: no such file, not YAML or JSON, or one line per setting that cannot be.
    """
    tree = load_yaml_file(path)
    if isinstance(tree, dict) and set(tree) == {"cluster"}:
        tree = tree["cluster"]
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected settings such as `backend: pytorchjob`, found {type(tree).__name__}. Write them one to a line")
    parse_config({"name": "settings", "data": {"source": "none"}, "cluster": tree}, str(path))
    return json.dumps(tree, sort_keys=True)


def recipe_text(config: RunConfig) -> str:
    """The resolved recipe as YAML; of `cluster` only what it sets, so that the uploaded pipeline's settings hold for the rest."""
    tree = config.model_dump(mode="json", exclude={"cluster"})
    if chosen := config.cluster.model_dump(mode="json", exclude_unset=True):
        tree["cluster"] = chosen
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def compile_pipeline(path: Path, defaults: dict[str, str] | None = None) -> None:
    """Write the compiled pipeline; `defaults` replaces the defaults of its parameters."""
    from kfp.compiler import Compiler

    from pipelines.finetune import finetune

    Compiler().compile(finetune, str(path), pipeline_parameters=defaults or None)


def _cluster_parameters(cluster: str | None) -> dict[str, str]:
    """The pipeline's parameters that `cluster` settings stand for: the steps get the claim and the secret that the jobs' pods get."""
    if cluster is None:
        return {}
    settings = json.loads(cluster)
    same = {"volume_claim": settings.get("claim"), "credentials": settings.get("credentials")}
    return {"cluster": cluster, **{key: value for key, value in same.items() if value}}


def _uploaded(client: Any, server: KubeflowClient, name: str, defaults: dict[str, str]) -> Version:
    """The version of the pipeline that this code compiles to, uploaded unless it is there."""
    wanted = json.dumps({"predicates": [{"operation": "EQUALS", "key": "display_name", "stringValue": name}]})
    with answered(server), _quiet():
        found = client.list_pipelines(filter=wanted, namespace=server.namespace).pipelines or []
        versions: list[Any] = []
        if found:
            listed = client.list_pipeline_versions(found[0].pipeline_id, page_size=100, sort_by="created_at desc")
            versions = listed.pipeline_versions or []
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "finetune.yaml"
        compile_pipeline(package, (_resolve_options(versions[0]) if versions else {}) | defaults)
        text = package.read_bytes()
        digest = hashlib.sha256(text).hexdigest()[:12]
        mark = f"content {digest}"  # the server names a pipeline's first version like the pipeline, and keeps this description
        same = next((v for v in versions if mark in (v.description or "") or digest in (v.display_name or "")), None)
        if same is None:
            about = f"Canvastune {__version__}, {mark}"
            with answered(server), _quiet():
                if found:
                    same = client.upload_pipeline_version(
                        str(package), f"{__version__}-{digest}", pipeline_id=found[0].pipeline_id, description=about
                    )
                else:
                    made = client.upload_pipeline(str(package), name, description=about, namespace=server.namespace)
                    listed = client.list_pipeline_versions(made.pipeline_id, page_size=1)
                    same = listed.pipeline_versions[0]
            logger.info(f"pipeline {name}: {'new version' if found else 'uploaded,'} {__version__}-{digest}")
        else:
            logger.info(f"pipeline {name}: {__version__}-{digest} is there already")
    return Version(same.pipeline_id, same.pipeline_version_id, _steps(yaml.safe_load(text.split(b"\n---")[0])))


def _resolve_options(version: Any) -> dict[str, str]:
    """The defaults that whoever runs the cluster gave to the newest version: a new one keeps them."""
    spec = version.pipeline_spec or {}
    parameters = spec.get("pipeline_spec", spec).get("root", {}).get("inputDefinitions", {}).get("parameters", {})
    kept = {key: parameters.get(key, {}).get("defaultValue") for key in ("cluster", "volume_claim", "credentials", "pipeline_image")}
    return {key: value for key, value in kept.items() if value and not value.startswith(STOCK_IMAGE)}


def _steps(spec: dict[str, Any]) -> frozenset[str]:
    """Names of the tasks that run a container, in every branch of a compiled pipeline."""
    names = set()
    for graph in (spec["root"], *spec["components"].values()):
        for name, task in graph.get("dag", {}).get("tasks", {}).items():
            if "executorLabel" in spec["components"][task["componentRef"]["name"]]:
                names.add(name)
    return frozenset(names)


def _why(run: Any, tasks: list[Any], namespace: str, address: str) -> str:
    failed = [task for task in tasks if task.state == "FAILED"]
    if not failed:
        said = " ".join(run.error.message.split()) if run.error and run.error.message else "no step says why"
        return f"the run {run.state.lower()}: {said}. See {address}"
    first = min(failed, key=lambda task: (task.end_time is None, str(task.end_time)))
    if first.error and first.error.message:
        said = " ".join(first.error.message.split())
    else:  # what a real server says of a step whose container failed
        said = f"the log says why (kubectl logs -n {namespace} -l pipeline/runid={run.run_id} -c main --tail=-1 | grep error:)"
    return f"step {first.display_name} failed: {said}. See {address}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Kubeflow's client prints links and logs retries; what a person needs of it is said here."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
