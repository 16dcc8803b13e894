"""Resolve a recipe's text to the run's config, its folder, and the cache key of its data."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from canvastune import tracking
from canvastune.config import RunConfig, changed_settings, loads, parse_config
from canvastune.config.unread import unread_settings
from canvastune.errors import UserError
from canvastune.io.hashing import hash_path
from canvastune.io.provenance import local_inputs
from canvastune.preparation import PREPARATION_VERSION
from canvastune.tracking.client import connect
from canvastune.tracking.steps import Attempt
from components.earlier_runs import compared_folders, find_compared
from components.run_directory import (
    RunRecord,
    pipeline_run,
    read_record,
    run_directory,
    write_record,
)
from components.run_owner import owner_of_this_step
from components.versions import MLFLOW

# What prepare_data reads of a checkpoint: a changed weight does not change a token.
_TOKENIZER_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
# What it looks at, or keeps, for the evaluation.
_PREPARED_FOR = ("answer_pattern", "judge", "judges", "judge_model", "slices", "forgetting")

logger = logging.getLogger(__name__)


class Resolved(NamedTuple):
    """What the pipeline's later steps are given; every field is an output of the component."""

    config: str  # the whole config, as JSON
    method: str  # lora or full
    # as JSON: the sections that the prepared data depends on, every other key at its default
    data_config: str
    data_fingerprint: str
    run_folder: str  # named like the output of the component
    mlflow_run_id: str


def resolve(
    recipe: str,
    overrides: str,
    dataset: str,
    workspace: str,
    run_name: str,
    job_name: str,
    job_id: str,
    cluster: str = "{}",
    pipeline_image: str = "",
    kubeflow_url: str = "",
    compare: str = "",
    steps: str = "{}",
    compiled_steps: str = "{}",
) -> Resolved:
    """Validate a recipe, and claim the folder of its run.

    Args:
        recipe: YAML or JSON text.
        overrides: lines of `key=value`, applied in order.
        dataset: replaces `data.source`, or the whole `data.mixture`; "" keeps the recipe's.
        workspace: the folder that outlives the run's pods.
        run_name: name of the run's folder; "": the pipeline job's name.
        job_id: the pipeline job; the same one may come again (a retried task), another one only to
            resume an unfinished run.
        pipeline_image, kubeflow_url: the steps' image and the address of Kubeflow's page, for tags
            in MLflow; "": not known.
        cluster: JSON object with defaults of the recipe's section `cluster`, as the chart gives
            them.
        compare: earlier runs that the report will lay over this one, found here and not days later.
        steps, compiled_steps: settings of the steps' pods that the run names, and those of the
            graph, which cannot be changed for one run.

    Raises:
        UserError: one line per problem of the recipe; a workspace that is not there; a run folder
            that belongs to a run with another recipe or other data, or that is finished; no run
            where one is to be compared with; a Hub token that may not push; a judging model that
            refuses.
    """
    if steps != compiled_steps:
        raise UserError(
            f"pipeline parameter steps: found {steps[:200]}, but the uploaded graph has "
            f"{compiled_steps[:200]}",
            hint="Leave the parameter at its default; canvastune upload --steps-file changes it.",
        )
    settings = [*filter(None, map(str.strip, overrides.splitlines())), *dataset_override(dataset)]
    config = _tracked(loads(recipe, overrides=settings, defaults=_cluster_defaults(cluster)))
    if config.tracking.hub_model_id is not None:
        # Here, as it takes a second to import.
        from canvastune.checkpoint.hub_push import check_push

        check_push(config.tracking.hub_model_id)
    _say_what_later_steps_lack(config)
    folder = run_directory(workspace, run_name, job_name)
    find_compared(compared_folders(compare, Path(workspace)), folder)
    data_config = parse_config(
        {
            "name": "prepared-data",
            "model": config.model.model_dump(),
            "data": config.data.model_dump(),
            # Only looked at: the step says how many references they can judge by.
            "evaluate": {
                name: value
                for name, value in config.evaluate.model_dump().items()
                if name in _PREPARED_FOR
            },
        }
    )
    earlier = read_record(folder)
    first_job = earlier.known_as if earlier else job_id
    claim = RunRecord(
        job_id, config.model_dump_json(), data_fingerprint(config), first_job=first_job
    )
    if earlier is not None and _may_start_over(folder, earlier):
        for name in ("data", "plan"):
            shutil.rmtree(folder / name, ignore_errors=True)
    elif earlier is not None:
        _refuse_other(folder, earlier, claim, config)
        changed = changed_settings(json.loads(earlier.config), config, affecting_weights=False)
        _remove_outdated(folder, [key for key, *_ in changed])
    write_record(folder, claim)
    url = f"{kubeflow_url.rstrip('/')}/#/runs/details/{job_id}" if kubeflow_url else ""
    about = {"pipeline_job": job_name, "pipeline_url": url, "pipeline_image": pipeline_image}
    parent = tracking.start(
        pipeline_run(config, folder, ""),
        {f"canvastune.{name}": value for name, value in about.items() if value},
        _attempt(folder, job_id),
    )
    write_record(folder, replace(claim, mlflow_run_id=parent))
    _warn_of_old_server(pipeline_run(config, folder, parent).uri, folder)
    return Resolved(
        claim.config,
        config.train.method,
        data_config.model_dump_json(),
        claim.data_fingerprint,
        str(folder),
        parent,
    )


def _warn_of_old_server(uri: str, folder: Path) -> None:
    client = connect(uri)
    version = client.server_version()
    if MLFLOW.is_below(version):
        logger.warning(
            f"MLflow at {client}: found version {version}, expected {MLFLOW.version} or newer, for "
            f"{MLFLOW.reason}. The run continues without it: after you upgrade the server, "
            f"canvastune sync {folder} sends what it refused"
        )


def _say_what_later_steps_lack(config: RunConfig) -> None:
    """Log settings that nothing reads, and a judging model that does not judge now.

    Raises:
        UserError: a judging model that refuses.
    """
    for line in unread_settings(config):
        logger.warning(line)
    if "model" in config.evaluate.judge_names:
        from canvastune.evaluation.model_judge import check_judge

        # On a cluster, cluster.secret_env gives the key to the pods that evaluate.
        elsewhere = config.cluster.backend != "local"
        if remark := check_judge(config.evaluate.judge_model, key_comes_later=elsewhere):
            logger.warning(remark)


def _attempt(folder: Path, job_id: str) -> Attempt:
    """Return the attempt that starts now, with the process that owns it, if one does."""
    attempt, owner = Attempt(job_id, time.time()), owner_of_this_step(folder)
    if owner is None:
        return attempt
    return replace(
        attempt,
        started=owner.since,
        host=owner.host,
        process=owner.process,
        command=owner.command,
        directory=owner.directory,
    )


def _cluster_defaults(text: str) -> dict[str, Any]:
    """Return the chart's defaults of the section `cluster` from their JSON text.

    Raises:
        UserError: not a JSON object.
    """
    try:
        defaults = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise UserError(
            f"pipeline parameter cluster: not JSON ({error})",
            hint="Pass a JSON object with settings of the section `cluster`.",
        ) from None
    if not isinstance(defaults, dict):
        raise UserError(
            f"pipeline parameter cluster: expected a JSON object, found {text[:60]}",
            hint="Pass settings of the section `cluster`, or {}.",
        )
    return defaults


def _tracked(config: RunConfig) -> RunConfig:
    """Copy the chart's MLflow address from the training pods' environment into the config."""
    uri = config.cluster.env.get("MLFLOW_TRACKING_URI")
    if uri is None or config.tracking.uri is not None:
        return config
    return config.with_values("tracking", uri=uri)


def dataset_override(dataset: str) -> list[str]:
    """Return the overrides for `dataset`, which takes the place of a mixture as well.

    Quoted, since a path may be parsed as another YAML type.
    """
    return ["data.mixture=[]", f"data.source={json.dumps(dataset)}"] if dataset else []


def data_fingerprint(config: RunConfig) -> str:
    """Hash what prepared data depends on in addition to its config.

    Content, tokenizer, PREPARATION_VERSION.

    Content on the Hub is identified by the config's revision and is not included.
    """
    parts = [f"preparation {PREPARATION_VERSION}"]
    for name, path in local_inputs(config.source_keys).items():
        parts.append(f"{name.replace('data', 'source', 1)} {hash_path(path, whole=True)}")
    model = Path(config.model.id)
    parts += [
        f"{name} {hash_path(model / name)}" for name in _TOKENIZER_FILES if (model / name).is_file()
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _may_start_over(folder: Path, earlier: RunRecord) -> bool:
    """Return whether a run may take any recipe and data: nothing is trained yet, and this process
    owns it. On a cluster a run has no owner, and a job of the other recipe may still run.
    """
    untouched = not earlier.finished and not (folder / "train").exists()
    return untouched and owner_of_this_step(folder) is not None


def _refuse_other(folder: Path, earlier: RunRecord, claim: RunRecord, config: RunConfig) -> None:
    if earlier.finished and earlier.job_id != claim.job_id:
        raise UserError(
            f"{folder}: found a finished run, expected a new or an unfinished one; a finished run "
            "is never overwritten",
            hint="Choose another run name.",
        )
    if earlier.data_fingerprint != claim.data_fingerprint:
        raise UserError(
            f"{folder}: an earlier run of this name used other data, another tokenizer, or an "
            "earlier version of the data preparation",
            hint="Choose another run name.",
        )
    changed = changed_settings(json.loads(earlier.config), config)
    if changed:
        found = "; ".join(f"{key} = {before!r}, now {after!r}" for key, before, after in changed)
        raise UserError(
            f"{folder}: an earlier run of this name had {found}",
            hint="Choose another run name, or use the same recipe.",
        )


def _remove_outdated(folder: Path, changed: list[str]) -> None:
    """Remove outputs of an earlier attempt's later steps that depend on changed settings."""
    answers = [key for key in changed if key.startswith(("evaluate.", "train.validation_"))]
    for name in [*(("plan", "report") if changed else ()), *(("evaluation",) if answers else ())]:
        shutil.rmtree(folder / name, ignore_errors=True)
