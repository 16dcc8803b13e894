"""The section `steps`: every pod of the pipeline's steps gets it, and the training pods do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from canvastune.config.cluster import ClusterConfig, PodSettings
from canvastune.errors import UserError
from components.jobs.pod_spec import STEP_ONLY
from components.resolve.step import resolve
from pipelines.steps import StepsConfig, parse_steps, read_steps_file
from pipelines.submit import compile_pipeline

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "env": {"HTTPS_PROXY": "http://proxy.example.com:3128", "HF_HUB_OFFLINE": "1"},
    "secret_env": {"GIT_TOKEN": {"secret": "git", "key": "token"}},
    "pull_secrets": ["regcred", "mirror"],
    "resources": {
        "requests": {"cpu": "500m", "memory": "1Gi"},
        "limits": {"cpu": "4", "memory": "16Gi"},
    },
    "node_selector": {"pool": "cpu"},
    "tolerations": [{"key": "team", "operator": "Equal", "value": "a", "effect": "NoSchedule"}],
    "affinity": {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {
                "nodeSelectorTerms": [{"matchExpressions": [{"key": "cpu", "operator": "Exists"}]}]
            }
        }
    },
    "extra_volumes": [
        {"name": "lake", "persistentVolumeClaim": {"claimName": "lake"}},
        {"name": "scratch", "emptyDir": {}},
    ],
    "extra_volume_mounts": [
        {"name": "lake", "mountPath": "/lake", "subPath": "team-a"},
        {"name": "scratch", "mountPath": "/scratch"},
    ],
    "ca_bundle": {"config_map": "company-ca", "key": "bundle.pem"},
}
STEPS = {"finish", "resolve", "prepare-data", "plan", "train", "merge-lora", "evaluate", "report"}
STEPS |= {"evaluate-2", "report-2"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    path = tmp_path_factory.mktemp("compiled") / "finetune.yaml"
    compile_pipeline(path, {"steps": json.dumps(SETTINGS)})
    tree, platforms = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    return tree, platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def _container(compiled: tuple[dict[str, Any], dict[str, Any]], step: str) -> dict[str, Any]:
    executors = compiled[0]["deploymentSpec"]["executors"]
    found: dict[str, Any] = executors[f"exec-{step}"]["container"]
    return found


@pytest.mark.parametrize("step", sorted(STEPS))
def test_every_step_gets_every_setting(
    compiled: tuple[dict[str, Any], dict[str, Any]], step: str
) -> None:
    container, pod = _container(compiled, step), compiled[1][f"exec-{step}"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    assert SETTINGS["env"].items() <= env.items()
    bundle = "/etc/canvastune-ca/bundle.pem"
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE", "GIT_SSL_CAINFO"):
        assert env[name] == bundle
    assert {"secretKey": "token", "envVar": "GIT_TOKEN"} in [
        pair for source in pod["secretAsEnv"] for pair in source["keyToEnv"]
    ]
    assert [one["secretName"] for one in pod["imagePullSecret"]] == ["regcred", "mirror"]
    resources = container["resources"]
    assert (resources["resourceCpuRequest"], resources["resourceCpuLimit"]) == ("500m", "4")
    assert (resources["resourceMemoryRequest"], resources["resourceMemoryLimit"]) == ("1Gi", "16Gi")
    assert pod["nodeSelector"]["labels"] == {"pool": "cpu"}
    assert pod["tolerations"][0]["value"] == "a"
    assert "nodeAffinity" in pod
    claims = {mount["mountPath"]: mount for mount in pod["pvcMount"]}
    assert claims["/lake"]["subPath"] == "team-a"
    assert set(claims) == {"/lake", "/workspace"}
    assert pod["emptyDirMounts"][0]["mountPath"] == "/scratch"
    assert pod["configMapAsVolume"][0]["mountPath"] == "/etc/canvastune-ca"


def test_a_step_requests_what_has_only_a_limit(tmp_path: Path) -> None:
    settings = {"resources": {"limits": {"cpu": "2", "memory": "8Gi"}}}
    compile_pipeline(tmp_path / "a.yaml", {"steps": json.dumps(settings)})
    graph, _ = yaml.safe_load_all((tmp_path / "a.yaml").read_text(encoding="utf-8"))
    for executor in graph["deploymentSpec"]["executors"].values():
        given = executor["container"]["resources"]
        assert (given["resourceCpuRequest"], given["resourceMemoryRequest"]) == ("2", "8Gi")


def test_there_is_no_step_without_a_test(
    compiled: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    assert set(compiled[1]) == {f"exec-{step}" for step in STEPS}


def test_the_launcher_s_pod_is_placed_as_a_step_and_its_job_is_not(
    compiled: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    passed = compiled[0]["components"]["comp-train"]["taskConfigPassthroughs"]
    assert all(one["applyToTask"] for one in passed), "Kubeflow would not set it on its pod"
    env = {entry["name"]: entry["value"] for entry in _container(compiled, "train")["env"]}
    mark = json.loads(env[STEP_ONLY])
    assert {"HTTPS_PROXY", "SSL_CERT_FILE", "GIT_TOKEN"} <= set(mark["env"])
    assert set(mark["mounts"]) == {"/lake", "/scratch", "/etc/canvastune-ca"}


def test_without_settings_the_graph_is_the_one_in_the_repository(tmp_path: Path) -> None:
    compile_pipeline(tmp_path / "a.yaml", {"steps": "{}"})
    assert (tmp_path / "a.yaml").read_text() == (ROOT / "pipelines/finetune.yaml").read_text()


def test_every_step_mounts_the_folder_of_the_claim_that_training_mounts(tmp_path: Path) -> None:
    compile_pipeline(tmp_path / "a.yaml", {"cluster": json.dumps({"sub_path": "team/a"})})
    _, platforms = yaml.safe_load_all((tmp_path / "a.yaml").read_text(encoding="utf-8"))
    executors = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert {mount["subPath"] for one in executors.values() for mount in one["pvcMount"]} == {
        "team/a"
    }


def test_steps_and_training_have_the_same_keys() -> None:
    shared = set(PodSettings.model_fields)
    assert set(StepsConfig.model_fields) == shared
    assert shared <= set(ClusterConfig.model_fields)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"priority_class": "high"}, r"steps\.priority_class\b"),
        ({"affinity": {"podAffinity": {}}}, r"steps\.affinity\b.* nodeAffinity\b"),
        (
            {"resources": {"limits": {"nvidia.com/gpu": "1"}}},
            r"steps\.resources: .* nvidia\.com/gpu$",
        ),
        ({"extra_volumes": [{"name": "a", "csi": {"driver": "x"}}]}, "persistentVolumeClaim, conf"),
        (
            {"extra_volumes": [{"name": "a", "configMap": {"name": "b", "items": []}}]},
            "by name, found",
        ),
        ({"env": {"HF_TOKEN": "x"}}, r"steps\.env: HF_TOKEN .*\bsecret\b"),
        ({"resources": {"requests": {"cpu": 4}, "limits": {"cpu": 2}}}, r"\bcpu\b.* limit\b"),
        ({"secretEnv": {}}, "unknown key 'secretEnv'"),
    ],
)
def test_what_kubeflow_cannot_take_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        parse_steps(json.dumps(settings))


def test_a_file_may_name_its_section(tmp_path: Path) -> None:
    file = tmp_path / "steps.yaml"
    for tree in (SETTINGS, {"steps": SETTINGS}):
        file.write_text(yaml.safe_dump(tree))
        assert parse_steps(read_steps_file(file)) == StepsConfig.model_validate(SETTINGS)


def test_a_run_cannot_change_what_the_graph_was_compiled_with(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r'steps: found \{"env": \{\}\}, .* graph .*\{\}$'
    ) as refused:
        resolve("", "", "", str(tmp_path), "", "j", "j", steps='{"env": {}}', compiled_steps="{}")
    assert "canvastune upload --steps-file" in refused.value.hint
