"""The chart's values: invalid ones are rejected with a reason, all are documented."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from tests.support.rendered_chart import ci_values, render, texts
from tools.chart_table import CHART, documented_values, values_table, with_table

_AFFINITIES = [("steps", "nodeAffinity")] + [
    (section, kind)
    for section in ("mlflow", "training", "serving")
    for kind in ("nodeAffinity", "podAffinity", "podAntiAffinity")
]


@pytest.fixture(scope="module")
def chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


@pytest.mark.parametrize(
    ("values", "where", "why"),
    [
        ({"mlflow": {"replica": 2}}, "/mlflow", "'replica' not allowed"),
        ({"minio": {}}, "", "'minio' not allowed"),
        ({"mlflow": {"replicas": 2}}, "/mlflow/replicas", "database"),
        (
            {"mlflow": {"replicas": 2, "database": {"existingSecret": {"name": "db"}}}},
            "/mlflow/replicas",
            "artifacts",
        ),
        (
            {
                "mlflow": {
                    "replicas": 2,
                    "auth": {"enabled": True, "existingSecret": {"name": "auth"}},
                }
            },
            "/mlflow/replicas",
            "mlflow.auth.database",
        ),
        ({"mlflow": {"autoscaling": {"enabled": True}}}, "/mlflow/autoscaling/enabled", "database"),
        (
            {
                "mlflow": {
                    "autoscaling": {"enabled": True},
                    "database": {"existingSecret": {"name": "db"}},
                    "auth": {"enabled": True, "existingSecret": {"name": "auth"}},
                }
            },
            "/mlflow/autoscaling/enabled",
            "mlflow.auth.database",
        ),
        (
            {"mlflow": {"auth": {"enabled": True}}},
            "/mlflow/auth/existingSecret/name",
            "mlflow.auth.enabled",
        ),
        (
            {"mlflow": {"artifacts": {"destination": "/data"}}},
            "/mlflow/artifacts/destination",
            "does not match",
        ),
        (
            {"mlflow": {"artifacts": {"s3": {"existingSecret": {"name": "s3"}}}}},
            "/mlflow/artifacts/destination",
            "mlflow.artifacts.s3.existingSecret.name",
        ),
        ({"mlflow": {"service": {"port": 70000}}}, "/mlflow/service/port", "65,535"),
        (
            {"mlflow": {"persistence": {"accessMode": "RWO"}}},
            "/mlflow/persistence/accessMode",
            "'ReadWriteOnce'",
        ),
        (
            {"mlflow": {"persistence": {"size": "20 GB"}}},
            "/mlflow/persistence/size",
            "does not match",
        ),
        (
            {"images": {"trainer": {"digest": "sha256:abc"}}},
            "/images/trainer/digest",
            "does not match",
        ),
        ({"images": {"pullPolicy": "Sometimes"}}, "/images/pullPolicy", "'IfNotPresent'"),
        ({"images": {"pullSecrets": [{"secret": "x"}]}}, "/images/pullSecrets/0", "'secret' not"),
        (
            {"mlflow": {"env": {"MLFLOW_STATIC_PREFIX": "/x"}}},
            "/mlflow/env/MLFLOW_STATIC_PREFIX",
            "set mlflow.pathPrefix",
        ),
        ({"mlflow": {"env": {"A": {"value": "1"}}}}, "/mlflow/env/A", "missing property"),
        ({"mlflow": {"pathPrefix": "mlflow/"}}, "/mlflow/pathPrefix", "does not match"),
        (
            {"training": {"priorityClass": "x"}},
            "/training/priorityClass",
            "training.priorityClassN",
        ),
        (
            {"training": {"extraVolumes": [{"name": "a", "hostPath": {"path": "/"}}]}},
            "/training/extraVolumes/0",
            "'hostPath' not allowed",
        ),
        ({"steps": {"affinity": {"podAffinity": {}}}}, "/steps/affinity", "'podAffinity' not"),
        ({"steps": {"env": {"HF_TOKEN": "x"}}}, "/steps/env/HF_TOKEN", "name a secret"),
        (
            {"httpRoute": {"enabled": True, "hostnames": ["a.b"]}},
            "/httpRoute/parentRefs",
            "httpRoute.enabled",
        ),
        (
            {"mlflow": {"service": {"type": "NodePort"}}},
            "/mlflow/extraAllowedHosts",
            "from outside",
        ),
        (
            {"mlflow": {"persistence": {"accessMode": "ReadWriteMany"}}},
            "/mlflow/persistence/accessMode",
            "mlflow.database.existingSecret.name",
        ),
        ({"podSecurity": {"runAsUser": 0}}, "/podSecurity/runAsUser", "minimum"),
        (
            {"ingress": {"tls": [{"secretName": "tls", "hosts": ["a.b"]}]}},
            "/ingress/hosts",
            "ingress.tls",
        ),
        ({"ingress": {"enabled": True}}, "/ingress/hosts", "ingress.enabled"),
        (
            {"ingress": {"enabled": True, "hosts": ["a.b"]}},
            "/networkPolicy/from",
            "networkPolicy.enabled",
        ),
        ({"ingress": {"hosts": ["https://a.b"]}}, "/ingress/hosts/0", "does not match"),
        (
            {"training": {"backend": "mpijob"}},
            "/training/backend",
            "'pytorchjob', 'trainjob', 'local'",
        ),
        (
            {"training": {"backend": "local", "nodes": 2}},
            "/training/nodes",
            "training.backend",
        ),
        ({"training": {"nodes": "two"}}, "/training/nodes", "integer"),
        ({"training": {"env": {"PET_NNODES": "2"}}}, "/training/env/PET_NNODES", "torchrun set it"),
        ({"training": {"env": {"NCCL_DEBUG": 1}}}, "/training/env/NCCL_DEBUG", "in quotes"),
        (
            {"training": {"env": {"HF_TOKEN": "hf_x"}}},
            "/training/env/HF_TOKEN",
            "training.secretEnv",
        ),
        (
            {"training": {"secretEnv": {"TOKEN": {"secret": "a"}}}},
            "/training/secretEnv/TOKEN",
            "missing property 'key'",
        ),
        ({"training": {"rdmaResource": "ib"}}, "/training/rdmaResource", "does not match"),
        (
            {"training": {"nodes": 2}, "workspace": {"accessMode": "ReadWriteOnce"}},
            "/workspace/accessMode",
            "training.nodes",
        ),
        ({"workspace": {"accessMode": "ReadOnlyMany"}}, "/workspace/accessMode", "'ReadWriteMany'"),
        (
            {"serving": {"enabled": True}},
            "/serving/model",
            "serving.enabled",
        ),
        ({"serving": {"model": "/workspace/runs/a/model"}}, "/serving/model", "does not match"),
        ({"serving": {"gpuResource": ""}}, "/serving/gpuResource", "does not match"),
        (
            {"serving": {"env": {"VLLM_API_KEY": "x"}}},
            "/serving/env/VLLM_API_KEY",
            "serving.apiKey.existingSecret",
        ),
        ({"pipeline": {"host": "ml-pipeline:8888"}}, "/pipeline/host", "does not match"),
    ],
)
def test_invalid_values_are_rejected_with_the_key_and_the_reason(
    chart: helm_python.Chart, values: dict[str, Any], where: str, why: str
) -> None:
    with pytest.raises(helm_python.HelmValuesError) as refused:
        chart.render(values, name="canvastune", namespace="team-a")
    lines = [
        line for line in str(refused.value).splitlines() if f"at '{where}'" in line and why in line
    ]
    assert lines, f"expected a line with {where!r} and {why!r}, found: {refused.value}"


def test_the_schema_has_exactly_the_keys_of_the_values(chart: helm_python.Chart) -> None:
    def keys(node: dict[str, Any]) -> dict[str, Any]:
        properties = (definitions[node["$ref"].split("/")[-1]] if "$ref" in node else node).get(
            "properties"
        )
        return {key: keys(child) for key, child in properties.items()} if properties else {}

    def missing(values: Any, schema: dict[str, Any], path: str = "") -> list[str]:
        unknown = [
            path + key for key in schema if not isinstance(values, dict) or key not in values
        ]
        return unknown + [
            name
            for key in schema
            if isinstance(values, dict)
            for name in missing(values.get(key), schema[key], f"{path}{key}.")
        ]

    schema = chart.schema
    assert schema is not None
    definitions = schema["$defs"]
    chart.validate_schema({})  # conversely: the schema accepts every key of values.yaml
    resources = {
        f"{where}.resources.{key}"
        for where in (
            "mlflow",
            "mlflow.backup",
            "pipeline.upload",
            "serving",
            "steps",
            "training",
            "workspace.fetch",
        )
        for key in ("requests", "limits")
    }
    free = resources | {f"{section}.affinity.{kind}" for section, kind in _AFFINITIES}
    assert set(missing(chart.values, keys(schema))) - free == {"global"}


def _paths(values: dict[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        if value is not None:
            yield (*above, key)
        if isinstance(value, dict):
            yield from _paths(value, (*above, key))


def _merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return values as Helm merges those of two files."""
    both = copy.deepcopy(one)
    for key, value in other.items():
        same = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = _merged(both[key], value) if same else copy.deepcopy(value)
    return both


def _empty(tree: Any) -> bool:
    """Return whether a field in rendered objects has no value."""
    if isinstance(tree, dict | list):
        return any(map(_empty, tree.values() if isinstance(tree, dict) else tree))
    return tree is None or (isinstance(tree, str) and ("<nil>" in tree or "%!" in tree))


@pytest.mark.parametrize(
    "files",
    [
        ("oidc", "airgapped", "company", "rdma", "serving", "trainjob-kueue"),
        ("postgres-s3",),
        ("ingress-tls-auth",),
    ],
    ids=lambda files: files[-1],
)
def test_a_key_without_a_value_is_refused_by_its_name_or_is_none(files: tuple[str, ...]) -> None:
    """Helm removes the default of a key whose value is null, as it is in YAML with all lines below
    it commented out.
    """
    values = functools.reduce(_merged, map(ci_values, files))
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    refused, wrong = 0, {}
    for path in _paths(defaults):
        null: Any = None
        for key in reversed(path):
            null = {key: null}
        try:
            rendered = render(_merged(values, null))
        except helm_python.HelmError as error:
            where, message = "/".join(("", *path[:-1])), str(error)
            if f"at '{where}': missing property '{path[-1]}'" in message:
                refused += 1
            elif ".".join(path) not in message or ", expected " not in message:
                wrong[path] = message
        else:
            if _empty(rendered):
                wrong[path] = "rendered without a value"
    assert wrong == {}
    assert refused > 100


def test_every_value_is_documented_and_the_readme_has_the_same_table() -> None:
    values, readme = (
        (CHART / "values.yaml").read_text(encoding="utf-8"),
        (CHART / "README.md").read_text(encoding="utf-8"),
    )
    assert len(list(documented_values(values))) > 80
    assert readme == with_table(readme, values_table(values)), "run python -m tools.chart_table"


def test_packaged_chart_renders_the_same(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "canvastune")
    archive = helm_python.package(tmp_path / "canvastune", destination=tmp_path)
    with helm_python.Chart.load(archive) as packaged:
        assert packaged.render({}, name="canvastune", namespace="team-a") == texts({}), (
            "the package lacks a file that templates read"
        )
        assert not [each["name"] for each in packaged.files if each["name"].startswith("ci/")]
