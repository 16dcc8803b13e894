"""Settings for the pods of the pipeline's steps, compiled into the graph: most cannot be parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

from kfp import dsl, kubernetes
from pydantic import model_validator

from canvastune.config.cluster import CA_PATH, PodSettings
from canvastune.config.loading import load_yaml_file, parse_section
from canvastune.config.strict import InvalidSetting
from canvastune.errors import UserError
from components.jobs.pod_spec import STEP_ONLY

_SOURCES = {  # of volumes, and the fields of each
    "persistentVolumeClaim": {"claimName"},
    "configMap": {"name", "optional"},
    "secret": {"secretName", "optional"},
    "emptyDir": {"medium", "sizeLimit"},
}


class StepsConfig(PodSettings):
    """The section `steps`: the same keys as for training, as far as Kubeflow's tasks take them."""

    section: ClassVar[str] = "steps."

    @model_validator(mode="after")
    def _taken_by_kubeflow(self) -> StepsConfig:
        if self.priority_class is not None:
            raise InvalidSetting(
                "steps.priority_class: Kubeflow Pipelines does not support priority classes for steps",
                hint="Remove it. An administrator can set one for all pods of runs "
                "(COMPILED_PIPELINE_SPEC_PATCH of the deployment ml-pipeline).",
            )
        if others := sorted(set(self.affinity) - {"nodeAffinity"}):
            raise InvalidSetting(
                f"steps.affinity.{others[0]}: Kubeflow Pipelines supports only nodeAffinity",
                hint="Remove it.",
            )
        for number, volume in enumerate(self.extra_volumes):
            (source,) = set(volume) - {"name"}
            if source not in _SOURCES or set(volume[source] or {}) - _SOURCES[source]:
                raise InvalidSetting(
                    f"steps.extra_volumes[{number}]: Kubeflow Pipelines supports "
                    f"{', '.join(_SOURCES)} by name, found {json.dumps(volume)}",
                    hint="Remove what it does not support, or mount it for training only.",
                )
        for number, mount in enumerate(self.extra_volume_mounts):
            if extra := sorted(set(mount) - {"name", "mountPath", "subPath", "readOnly"}):
                raise InvalidSetting(
                    f"steps.extra_volume_mounts[{number}].{extra[0]}: Kubeflow Pipelines has no "
                    "such setting",
                    hint="Remove it.",
                )
        unknown = {*self.resources.requests, *self.resources.limits} - {"cpu", "memory"}
        if unknown:
            raise InvalidSetting(
                f"steps.resources: Kubeflow Pipelines supports cpu and memory, found {min(unknown)}",
                hint="Remove it.",
            )
        return self


def read_steps_file(path: Path) -> str:
    """Read a file with the section `steps`; return it as JSON text.

    Raises:
        UserError: file not found, not YAML or JSON, or one line per invalid setting.
    """
    tree = load_yaml_file(path)
    if isinstance(tree, dict) and set(tree) == {"steps"}:
        tree = tree["steps"]
    return dump(parse_section(StepsConfig, tree, str(path)))


def parse_steps(text: str) -> StepsConfig:
    """Read the pipeline parameter `steps`. Raises: UserError, as `read_steps_file`."""
    try:
        tree = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise UserError(
            f"pipeline parameter steps: not JSON ({error})", hint="Upload the pipeline again."
        ) from None
    return parse_section(StepsConfig, tree, "steps")


def dump(steps: StepsConfig) -> str:
    """Return the settings that differ from the defaults, as JSON text; {} for none."""
    return json.dumps(steps.model_dump(mode="json", exclude_defaults=True), sort_keys=True)


def apply(task: dsl.PipelineTask, steps: StepsConfig) -> dsl.PipelineTask:
    """Set what the recipe says of a task's pod."""
    for name, value in {**steps.ca_env(), **steps.env}.items():
        task.set_env_variable(name, value)
    for name, source in steps.secret_env.items():
        kubernetes.use_secret_as_env(task, source.secret, {source.key: name})
    if steps.pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(steps.pull_secrets))
    setters = {
        ("requests", "cpu"): task.set_cpu_request,
        ("requests", "memory"): task.set_memory_request,
        ("limits", "cpu"): task.set_cpu_limit,
        ("limits", "memory"): task.set_memory_limit,
    }
    limits = steps.resources.limits
    # What has only a limit gets it as the request, as pods of training do.
    given = {"requests": {**limits, **steps.resources.requests}, "limits": limits}
    for (kind, resource), set_it in setters.items():
        if resource in given[kind]:
            set_it(given[kind][resource])
    for key, value in steps.node_selector.items():
        kubernetes.add_node_selector(task, key, value)
    for toleration in steps.tolerations:
        kubernetes.add_toleration(task, **toleration.model_dump())
    if steps.affinity:
        kubernetes.add_node_affinity_json(task, steps.affinity["nodeAffinity"])
    _mount(task, steps)
    return task


def _mount(task: dsl.PipelineTask, steps: StepsConfig) -> None:
    sources = {volume["name"]: volume for volume in steps.extra_volumes}
    for mount in steps.extra_volume_mounts:
        volume, path = sources[mount["name"]], mount["mountPath"]
        if claim := volume.get("persistentVolumeClaim"):
            kubernetes.mount_pvc(task, claim["claimName"], path, mount.get("subPath", ""))
        elif source := volume.get("configMap"):
            optional = bool(source.get("optional"))
            kubernetes.use_config_map_as_volume(task, source["name"], path, optional)
        elif source := volume.get("secret"):
            optional = bool(source.get("optional"))
            kubernetes.use_secret_as_volume(task, source["secretName"], path, optional)
        else:
            folder = volume.get("emptyDir") or {}
            kubernetes.empty_dir_mount(
                task, mount["name"], path, folder.get("medium"), folder.get("sizeLimit")
            )
    if bundle := steps.ca_bundle:
        if bundle.secret:
            kubernetes.use_secret_as_volume(task, bundle.secret, CA_PATH)
        else:
            kubernetes.use_config_map_as_volume(task, bundle.config_map or "", CA_PATH)


def keep_from_training_pods(task: dsl.PipelineTask, steps: StepsConfig) -> None:
    """Keep what `apply` gave the launcher's pod from the training pods, which have their own.

    Kubeflow hands a task's variables and volumes on to the launcher, for the pods of its job.
    """
    names = [*steps.ca_env(), *steps.env, *steps.secret_env]
    paths = [mount["mountPath"] for mount in steps.extra_volume_mounts]
    paths += [CA_PATH] if steps.ca_bundle else []
    task.set_env_variable(STEP_ONLY, json.dumps({"env": names, "mounts": paths}))
