"""Every pod of the chart and of runs, in a namespace with a quota, a LimitRange and PodSecurity restricted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

import helm_python
import pytest

from canvastune.config.cluster import ClusterConfig, parse_quantity
from tests.e2e.test_pipeline import STEPS
from tests.support.cluster_rules import pod_security_problems
from tests.support.every_pod import every_pod
from tests.support.rendered_chart import (
    FILES,
    PROXY,
    env_of,
    render,
    texts,
)
from tools.chart_table import CHART

LIMIT_RANGE = {"cpu": ("10m", "128"), "memory": ("32Mi", "2Ti")}
LIMIT_RATIO = 10.0  # of a limit to its request, at most


@pytest.mark.parametrize("name", FILES)
def test_every_pod_is_admitted_with_quota_limit_range_and_restricted(name: str) -> None:
    """The chart's, its hooks' too; the steps' of the compiled graph; training's, the evaluation's."""
    problems, found = [], list(every_pod(render(FILES[name])))
    for where, pod in found:
        problems += [f"{where}: {problem}" for problem in pod_security_problems(pod)]
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            problems += [
                f"{where}: {container['name']}: {problem}"
                for problem in _quantities(container.get("resources") or {})
            ]
    assert not problems, "\n".join(problems)
    kinds = Counter(where.partition(" ")[0] for where, _ in found)
    assert kinds["step"] >= len(STEPS), kinds
    assert (kinds["train"], kinds["evaluate"]) == (1, 1), kinds
    assert kinds["Deployment"] >= (name != "external-mlflow"), kinds


_ANYWHERE = {"matchExpressions": [{"key": "pool", "operator": "Exists"}]}
SECTION: dict[str, Any] = {  # every key that `steps` and `training` share, but for the priority
    "env": PROXY,
    "secretEnv": {"GIT_TOKEN": {"secret": "git", "key": "token"}},
    "pullSecrets": ["mirror"],
    "resources": {
        "requests": {"cpu": "3", "memory": "5Gi"},
        "limits": {"cpu": "7", "memory": "9Gi"},
    },
    "nodeSelector": {"pool": "a"},
    "tolerations": [{"key": "team", "operator": "Exists"}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [_ANYWHERE]}
        }
    },
    "extraVolumes": [{"name": "scratch", "emptyDir": {}}],
    "extraVolumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
    "caBundle": {"configMap": "company-ca"},
}


@pytest.mark.parametrize("backend", ["pytorchjob", "trainjob"])
def test_the_same_section_reaches_the_pods_of_steps_training_and_evaluation(backend: str) -> None:
    """From the chart's values through the uploaded graph and its parameters."""
    values = {"steps": SECTION, "training": {"backend": backend, "shm": "1Gi", **SECTION}}
    shared = set(helm_python.values_from_yaml((CHART / "values.yaml").read_text())["steps"])
    assert set(SECTION) == shared - {"priorityClassName"}, "a key without a check"
    pods = [
        (where, pod)
        for where, pod in every_pod(render(values))
        if where.partition(" ")[0] in ("step", "train", "evaluate")
    ]
    assert len(pods) >= len(STEPS) + 2
    bundle = ClusterConfig.model_validate({"ca_bundle": {"config_map": "company-ca"}}).ca_env()
    for where, pod in pods:
        (container,) = pod["containers"]
        env = env_of(container)
        assert {**PROXY, **bundle}.items() <= env.items(), where
        source = env["GIT_TOKEN"]["secretKeyRef"]
        assert (source["name"], source["key"]) == ("git", "token"), where
        assert pod["imagePullSecrets"] == [{"name": "mirror"}], where
        for kind, found in SECTION["resources"].items():
            assert found.items() <= container["resources"][kind].items(), where
        assert pod["nodeSelector"] == {"pool": "a"}, where
        assert "team" in [one["key"] for one in pod["tolerations"]], where
        assert pod["affinity"] == SECTION["affinity"], where
        paths = {mount["mountPath"] for mount in container["volumeMounts"]}
        assert paths >= {"/scratch", "/etc/canvastune-ca", "/workspace"}, where


def test_every_template_with_a_pod_is_met_there() -> None:
    """An optional object that no values file enables would not be checked at all."""
    met = {
        PurePath(path).name
        for values in FILES.values()
        for path, text in texts(values).items()
        if re.search(r"^ *containers:$", text, re.MULTILINE)
    }
    paths = [path for path in (CHART / "templates").rglob("*") if path.is_file()]
    assert met == {
        path.name for path in paths if re.search(r"^ *containers:", path.read_text(), re.MULTILINE)
    }


def _quantities(resources: dict[str, Any]) -> Iterator[str]:
    """Yield what a quota on requests and limits of cpu and memory, or a LimitRange, refuses."""
    for name in ("cpu", "memory"):
        low, high = LIMIT_RANGE[name]
        found = {kind: (resources.get(kind) or {}).get(name) for kind in ("requests", "limits")}
        if None in found.values():
            yield f"must specify {' and '.join(k for k, v in found.items() if v is None)} of {name}"
            continue
        request, limit = (parse_quantity(str(value)) for value in found.values())
        if not parse_quantity(low) <= request <= limit <= parse_quantity(high):
            yield f"{name} {request} to {limit} is outside of {low} to {high}"
        if limit / request > LIMIT_RATIO:
            yield f"limit of {name} is {limit / request:g} times the request"
