"""Journeys three and four of docs/journeys.md, command by command: from an empty namespace to a
run, on a stand-in for a cluster. The chart's README, too: into a profile behind a proxy.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import certifi
import helm_python
import pytest
import yaml

from canvastune import __version__
from canvastune.tiny_model import write_problems
from tests.e2e.test_pipeline import STEPS
from tests.fakes.fake_cluster import FakeCluster
from tests.fakes.fake_node import token_of
from tests.support.documents import Block, blocks
from tools import images
from tools.chart_table import CHART

ROOT = Path(__file__).parents[2]
JOURNEYS = ROOT / "docs" / "journeys.md"
NAMESPACE = "kubeflow"
# In addition to the page's my-values.yaml: a small node without a GPU.
SMALLER = """
mlflow: {workers: 1, resources: {requests: {cpu: 100m, memory: 512Mi}, limits: {memory: 2Gi}}, persistence: {size: 1Gi}}
workspace: {size: 2Gi}
training: {gpuResource: "", cpu: 500m, memory: 3Gi, shm: 256Mi, deadlineHours: 1, queueHours: 0.5, ttlHours: 1}
"""
# pipelines/recipes/gsm8k_lora.yaml needs the Hub and eight GPUs: this replaces it.
_TREE = yaml.safe_load(images.RECIPE) | {
    "name": "gsm8k-lora",
    "hardware": {"accelerator": "cpu", "gpu_memory": 12},
}
del _TREE["tracking"]
_TREE["train"] |= {"steps": 4, "log_every": 2, "validate_every": 4, "checkpoint_every": 4}
_TREE["evaluate"] |= {"max_new_tokens": 8}
RECIPE = yaml.safe_dump(_TREE, sort_keys=False)
DIFFERENCES = {  # all in which the reader here differs from one of the page on a cluster
    "my-values.yaml": "with SMALLER on top",
    "pipelines/recipes/gsm8k_lora.yaml": "RECIPE",
    "helm": "real Helm 4, as a package",
    "kubectl port-forward": (
        "from then on `localhost:8080` is read as the Service's address: no fixed port of this"
        " machine is taken"
    ),
    "before canvastune submit": (
        "puts a tiny model and its rows on the claim, where the page's recipe takes both from"
        " the Hub"
    ),
    "PIPELINE_ID": "of what `kfp pipeline list` prints",
    "VERSION_ID": "of what `kfp pipeline list-versions PIPELINE_ID` prints",
    "after submit": (
        "the runs that Kubeflow's own command and client start are created, and not executed"
    ),
}


class Reader:
    """Does what the page says, in a checkout of the repository."""

    def __init__(self, cluster: FakeCluster, home: Path, model: Path, values: str) -> None:
        self.said: dict[str, str] = {}  # by command
        self._cluster, self._home, self._model = cluster, home, model
        self._meant: dict[str, str] = {}  # addresses and placeholders
        recipes = home / "pipelines" / "recipes"
        recipes.mkdir(parents=True)
        (recipes / "gsm8k_lora.yaml").write_text(RECIPE)
        (home / "pipelines" / "finetune.yaml").symlink_to(ROOT / "pipelines" / "finetune.yaml")
        (home / "charts").symlink_to(ROOT / "charts")
        asked = yaml.safe_load(values)
        small = {key: {**asked.get(key, {}), **own} for key, own in yaml.safe_load(SMALLER).items()}
        (home / "my-values.yaml").write_text(yaml.safe_dump({**asked, **small}))

    def do(self, command: str) -> None:
        """One command of a shell. Raises: AssertionError, it failed."""
        words = shlex.split(command, comments=True)
        if words[:2] == ["canvastune", "submit"]:
            workspace = self._cluster.node.claim("canvastune-workspace")
            shutil.copytree(self._model, workspace / "tiny")
            write_problems(workspace / "rows.jsonl", "change", rows=24, seed=1)
        own = {"helm": self._helm, "kubectl": self._kubectl}
        said = own[words[0]](words[1:]) if words[0] in own else self.execute("bash", "-c", command)
        self._meant |= {
            f"{kind.upper()}_ID": number
            for number, kind in re.findall(r"\b((pipeline|version)-\d+)\b", said)
        }
        self.said[" ".join(words)] = said
        print(f"{time.strftime('%H:%M:%S')} $ {command}\n{said}", flush=True)

    def execute(self, *words: str) -> str:
        """A process in the checkout; what it says. Raises: AssertionError, it failed."""
        known = "|".join(map(re.escape, self._meant)) or "$^"
        filled = [re.sub(known, lambda found: self._meant[found[0]], word) for word in words]
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment = {**os.environ, "HOME": str(self._home), "PATH": programs, "NO_PROXY": "*"}
        pipes: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "text": True,
        }
        done = subprocess.run(filled, cwd=self._home, env=environment, check=False, **pipes)
        assert done.returncode == 0, f"{' '.join(filled)}\n{done.stdout}"
        return str(done.stdout)

    def _helm(self, words: list[str]) -> str:
        known = argparse.ArgumentParser("helm")
        for name in ("command", "name"):
            known.add_argument(name)
        known.add_argument("chart", nargs="?")
        known.add_argument("-n", required=True)
        known.add_argument("-f")
        given = known.parse_args(words)
        with helm_python.Config(
            kubeconfig_content=self._cluster.kubeconfig, namespace=given.n
        ) as helm:
            if given.command == "test":
                return str(helm.test(given.name, timeout=60, logs=True)["logs"])
            assert given.command == "install", f"helm {given.command} is not built here"
            values = (
                helm_python.values_from_yaml((self._home / given.f).read_text()) if given.f else {}
            )
            return str(
                helm.install(
                    self._home / given.chart, given.name, values, namespace=given.n, timeout=60
                )["notes"]
            )

    def _kubectl(self, words: list[str]) -> str:
        line, of = " ".join(words), f"-n {self._cluster.namespace}"
        if line.startswith(rollout := f"rollout status {of} deployment/"):
            name = line.removeprefix(rollout)
            until(
                f"{name} is ready",
                lambda: self._cluster.all("Deployment")[name]["status"].get("readyReplicas"),
            )
            return f'deployment "{name}" successfully rolled out'
        found = re.fullmatch(rf"port-forward {of} svc/(\S+) (\d+):(\d+) &", line)
        assert found is not None, f"kubectl {line}: nothing of that kind is built here"
        self._meant[f"localhost:{found[2]}"] = self._cluster.address(found[1], int(found[3]))
        return f"Forwarding from 127.0.0.1:{found[2]} -> {found[3]}"


class ProfileReader(Reader):
    """Does what the chart's README says for a Kubeflow profile."""

    def _kubectl(self, words: list[str]) -> str:
        if words[0] == "create":
            return self._create(words[1:])
        if words == ["port-forward", "-n", "kubeflow", "svc/ml-pipeline-ui", "8080:80", "&"]:
            self._meant["localhost:8080"] = self._cluster.address("ml-pipeline-ui", 80)
            return "Forwarding from 127.0.0.1:8080 -> 80"
        return super()._kubectl(words)

    def _create(self, words: list[str]) -> str:
        words, output = (words[:-2], words[-1]) if words[-2] == ">" else (words, "")
        known = argparse.ArgumentParser("kubectl create")
        known.add_argument("kind", nargs="+")
        known.add_argument("-n", required=True)
        for option in ("--type", "--from-file", "--audience", "--duration"):
            known.add_argument(option)
        given = known.parse_args(words)
        assert given.n == self._cluster.namespace
        if given.audience:
            kind, account = given.kind
            assert kind == "token"
            assert account in self._cluster.all("ServiceAccount")
            (self._home / output).write_text(token_of(account, given.audience))
            return ""
        key, _, path = given.from_file.rpartition("=")
        file = self._home / path.replace("$HOME/", "")
        made: dict[str, Any] = {"apiVersion": "v1", "metadata": {"name": given.kind[-1]}}
        if given.kind[0] == "configmap":
            made |= {"kind": "ConfigMap", "data": {key or file.name: file.read_text()}}
        else:
            data = {key: base64.b64encode(file.read_bytes()).decode()}
            made |= {"kind": "Secret", "type": given.type, "data": data}
        self._cluster.put(made)
        return f"{given.kind[0]}/{given.kind[-1]} created"


def told(journey: int) -> list[Block]:
    """The blocks of one of the journeys."""
    text = JOURNEYS.read_text(encoding="utf-8")
    first, last = (
        text.count("\n", 0, text.index(f"\n## {number}. ")) for number in (journey, journey + 1)
    )
    return [block for block in blocks(JOURNEYS) if first < block.line <= last]


def commands(block: str) -> list[str]:
    return [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def until(what: str, holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 90
    while not holds():
        assert time.monotonic() < deadline, f"waited without success until {what}"
        time.sleep(0.1)


def in_mlflow(address: str, experiment: str) -> list[dict[str, Any]]:
    """The runs of an experiment."""

    def ask(path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(
            f"http://{address}/api/2.0/mlflow/{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=20
        ) as answer:
            return json.load(answer)

    number = ask(f"experiments/get-by-name?experiment_name={experiment}")["experiment"][
        "experiment_id"
    ]
    return [run["info"] for run in ask("runs/search", experiment_ids=[number])["runs"]]


def job_states(cluster: FakeCluster) -> dict[str, tuple[str, set[str]]]:
    """By role: the conditions that hold, and the owner of its one job."""
    found: dict[str, tuple[str, set[str]]] = {}
    for job in cluster.all("PyTorchJob").values():
        role, (owner,) = (
            job["metadata"]["labels"]["app.kubernetes.io/component"],
            job["metadata"]["ownerReferences"],
        )
        assert role not in found, f"two jobs for {role}"
        found[role] = (
            owner["name"],
            {
                condition["type"]
                for condition in job["status"]["conditions"]
                if condition["status"] == "True"
            },
        )
    return found


@pytest.mark.timeout(280)
def test_a_reader_goes_from_an_empty_namespace_to_a_finished_run(
    tmp_path: Path, tiny_model: Path
) -> None:
    (values, install), (submit, plain, client) = told(3), told(4)
    assert [block.language for block in (values, install, submit, plain, client)] == [
        "yaml",
        "sh",
        "sh",
        "sh",
        "python",
    ]
    with FakeCluster(tmp_path / "cluster", NAMESPACE) as cluster:
        reader = Reader(cluster, tmp_path / "checkout", tiny_model, values.text)
        print(*(f"{what}: {why}" for what, why in DIFFERENCES.items()), sep="\n")
        try:
            for command in commands(install.text + submit.text):
                reader.do(command)
        finally:  # what the test shows where it fails
            print(*(f"--- {pod}\n{cluster.node.said(pod)[-6000:]}" for pod in cluster.node.logs))
        check_install(cluster, reader)
        check_run(cluster, reader)
        cluster.running = False
        for command in commands(plain.text):
            reader.do(command)
        reader.execute(sys.executable, "-c", client.text)
        check_plain_runs(cluster)


@pytest.mark.timeout(280)
def test_a_reader_of_the_chart_s_readme_installs_into_a_profile_behind_a_proxy(
    tmp_path: Path, tiny_model: Path
) -> None:
    """With a private registry and Kubeflow's API, which wants a token of the profile."""
    page = CHART / "README.md"
    text = page.read_text(encoding="utf-8")
    first = text.count("\n", 0, text.index("### A Kubeflow profile"))
    values, install = [block for block in blocks(page) if block.line > first][:2]
    assert (values.name, install.language) == ("my-values.yaml", "sh")
    home = tmp_path / "checkout"
    with FakeCluster(tmp_path / "cluster", "team-a") as cluster:
        cluster.running = False
        port = int(cluster.address("ml-pipeline", 8888).rpartition(":")[2])
        cluster.node.name({"ml-pipeline.kubeflow.svc.cluster.local:8888": port})
        cluster.kubeflow.namespaces = ("team-a",)
        cluster.kubeflow.token = token_of("default-editor", "pipelines.kubeflow.org")
        account = {"apiVersion": "v1", "kind": "ServiceAccount"}
        cluster.put(account | {"metadata": {"name": "default-editor"}})
        reader = ProfileReader(cluster, home, tiny_model, values.text)
        (home / "ca.crt").write_text(Path(certifi.where()).read_text())
        (home / ".docker").mkdir()
        (home / ".docker" / "config.json").write_text('{"auths": {"registry.example.com": {}}}')
        try:
            for command in commands(install.text):
                reader.do(command)
        finally:  # what the test shows where it fails
            print(*(f"--- {pod}\n{cluster.node.said(pod)[-6000:]}" for pod in cluster.node.logs))
        (version,), (run,) = cluster.kubeflow.versions, cluster.kubeflow.runs
        assert "uploaded" in cluster.node.said("canvastune-upload-0")
        (tested,) = [said for line, said in reader.said.items() if line.startswith("helm test")]
        assert "yes create kubeflow.org/pytorchjobs" in tested
        check_private(version["pipeline_spec"])
        for pod in cluster.all("Pod").values():
            assert pod["spec"]["imagePullSecrets"] == [{"name": "regcred"}]
            for container in pod["spec"]["containers"]:
                assert container["image"].startswith("registry.example.com/ml/")
        assert run["pipeline_version_reference"]["pipeline_version_id"] == "version-1"


def check_private(uploaded: dict[str, Any]) -> None:
    """Every step and the training pods have registry, pull secret, proxy and certificates."""
    spec, platform = uploaded["pipeline_spec"], uploaded["platform_spec"]
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for name, executor in spec["deploymentSpec"]["executors"].items():
        env = {one["name"]: one["value"] for one in executor["container"]["env"]}
        assert env["HTTPS_PROXY"] == "http://proxy.example.com:3128", name
        assert env["SSL_CERT_FILE"] == "/etc/canvastune-ca/ca.crt", name
        assert "regcred" in json.dumps(settings[name]["imagePullSecret"]), name
        assert "company-ca" in json.dumps(settings[name]["configMapAsVolume"]), name
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert parameters["pipeline_image"]["defaultValue"].startswith("registry.example.com/ml/")
    training = json.loads(parameters["cluster"]["defaultValue"])
    assert training["image"].startswith("registry.example.com/ml/")
    assert training["pull_secrets"] == ["regcred"]
    assert training["env"]["HTTPS_PROXY"] == "http://proxy.example.com:3128"
    assert training["ca_bundle"]["config_map"] == "company-ca"


def check_install(cluster: FakeCluster, reader: Reader) -> None:
    """The chart's own job has uploaded the pipeline with the chart's settings; its tests have asked
    what they are there for.
    """
    (version,) = cluster.kubeflow.versions
    assert "uploaded" in cluster.node.said("canvastune-upload-0")
    parameters = version["pipeline_spec"]["pipeline_spec"]["root"]["inputDefinitions"]["parameters"]
    settings = json.loads(parameters["cluster"]["defaultValue"])
    assert parameters["volume_claim"]["defaultValue"] == settings["claim"] == "canvastune-workspace"
    assert parameters["pipeline_image"]["defaultValue"].startswith("registry.example.com/team/")
    (tested,) = [said for command, said in reader.said.items() if command.startswith("helm test")]
    assert len(re.findall(r"^200 http://canvastune-mlflow", tested, re.MULTILINE)) == 4
    assert "yes create kubeflow.org/pytorchjobs" in tested
    assert "is already there" in next(
        said for command, said in reader.said.items() if command.startswith("canvastune submit")
    )


def check_run(cluster: FakeCluster, reader: Reader) -> None:
    """Check that every step is shown, that one job per role has succeeded, and that the claim and
    MLflow hold what a run leaves.
    """
    (run,) = cluster.kubeflow.runs
    (said,) = [
        said for command, said in reader.said.items() if command.startswith("canvastune submit")
    ]
    shown = {
        (name, state) for name, state in re.findall(r"^[\d:]{8}  (\S+) +(\w+)$", said, re.MULTILINE)
    }
    assert {(step.replace("_", "-"), "succeeded") for step in (*STEPS, "run")} <= shown
    made = {
        pod["spec"]["containers"][0]["image"]
        for name, pod in cluster.all("Pod").items()
        if "-worker-" in name
    }
    assert made == {f"registry.example.com/team/canvastune/trainer:{__version__}"}
    assert job_states(cluster) == dict.fromkeys(
        ("evaluate", "train"), (run["run_id"], {"Created", "Succeeded"})
    )
    assert list(cluster.overlapping.values()) == [[], []], "two jobs of the run hold GPUs at a time"
    runs = cluster.node.claim("canvastune-workspace") / "runs"
    (folder,) = (each for each in runs.iterdir() if not each.name.startswith("."))
    assert (folder / "report" / "report.html").stat().st_size > 10_000
    assert json.loads((folder / "summary.json").read_text())["train_loss_last"] > 0
    assert any((folder / "model").glob("*.safetensors")), "no merged model"
    found = in_mlflow(cluster.address("canvastune-mlflow", 5000), run_experiment(run))
    assert {one["status"] for one in found if one["run_name"] == folder.name} == {"FINISHED"}


def run_experiment(run: dict[str, Any]) -> str:
    recipe = yaml.safe_load(run["runtime_config"]["parameters"]["recipe"])
    return str(recipe["tracking"]["experiment"])


def check_plain_runs(cluster: FakeCluster) -> None:
    """Kubeflow's own command and its client have started the uploaded version on the recipe."""
    _, by_command, by_client = cluster.kubeflow.runs
    for run in (by_command, by_client):
        assert run["pipeline_version_reference"] == {
            "pipeline_id": "pipeline-1",
            "pipeline_version_id": "version-1",
        }
    assert by_command["runtime_config"]["parameters"] == {
        "recipe": RECIPE.rstrip("\n"),
        "overrides": "lora.rank=32",
    }
    assert by_client["runtime_config"]["parameters"] == {"recipe": RECIPE}
