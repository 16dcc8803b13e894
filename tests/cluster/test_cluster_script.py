"""tools.cluster without a cluster: its refusals, objects and installs, on a fake API server."""

from __future__ import annotations

import json
import re
import socket
import stat
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
from kubernetes import client

from canvastune.config.cluster import ClusterConfig
from canvastune.errors import UserError
from tests.fakes.fake_api_server import NAMESPACE, FakeApiServer
from tests.support.cluster_rules import pod_security_problems
from tools import cluster
from tools.chart_table import CHART
from tools.image_builds import Refused
from tools.images import IMAGES, Report

CRD = {"metadata": {"name": "pytorchjobs.kubeflow.org"}}


class Kubeflow(FakeApiServer):
    """The fake API server, with what an administrator can list."""

    crds: tuple[dict[str, Any], ...] = (CRD,)
    refusal = 0

    def names_in(self, namespace: str) -> set[str]:
        with self.changed:
            return {f"{kind}/{name}" for kind, its, name in self.objects if its == namespace}

    def answer(
        self, method: str, url: str, content_type: str, data: bytes, account: str = ""
    ) -> tuple[int, Any]:
        if self.refusal:
            return self.refusal, {}
        if url.startswith(
            "/apis/apiextensions.k8s.io/v1/customresourcedefinitions?fieldSelector=metadata.name%3Dpytorchjobs.kubeflow.org"
        ):
            return 200, {"items": list(self.crds)}
        path, _, query = url.partition("?")
        if method == "DELETE" and path.split("/")[-2] == NAMESPACE:  # of a kind, by label
            url = (
                f"{path}?{query}" if query else f"{path}?{urllib.parse.urlencode(json.loads(data))}"
            )
            for one in super().answer("GET", url, "", b"", account)[1]["items"]:
                super().answer(
                    "DELETE", f"{path}/{one['metadata']['name']}", content_type, b"{}", account
                )
            return 200, {"status": "Success"}
        return super().answer(method, url, content_type, data, account)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kubeflow]:
    server = Kubeflow()
    with server:
        (tmp_path / "kubeconfig").write_text(server.kubeconfig)
        monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        yield server


@pytest.fixture
def place() -> cluster.Cluster:
    return cluster.Cluster(client.CoreV1Api(), "kubeflow", "kubeflow", "canvastune-test-0a1b2c")


def refusal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> str:
    monkeypatch.setattr("sys.argv", ["cluster", *arguments])
    assert cluster.main() == 1
    error = capsys.readouterr().err
    assert re.search("^REFUSED  ", error, re.MULTILINE)
    assert "Traceback" not in error
    return error


def test_no_kubeconfig_is_refused_and_no_cluster_is_guessed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KUBECONFIG", raising=False)
    assert "export KUBECONFIG=" in refusal(capsys, monkeypatch)


@pytest.mark.parametrize(
    "content",
    [None, "{", "clusters: []", '{"current-context": "gone", "contexts": [], "clusters": []}'],
)
def test_a_kubeconfig_that_leads_nowhere_is_refused(
    content: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "kubeconfig"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(file))
    said = refusal(capsys, monkeypatch)
    assert str(file) in said
    assert "kubectl config get-contexts" in said


def test_a_server_that_is_down_is_named(
    api: Kubeflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = Path(cluster.os.environ["KUBECONFIG"])
    file.write_text(file.read_text().replace(str(api.server_port), str(port)))
    said = refusal(capsys, monkeypatch)
    assert f"http://127.0.0.1:{port}: " in said
    assert "refused" in said


@pytest.mark.parametrize("status", [401, 403])
def test_insufficient_permissions_are_named(
    status: int, api: Kubeflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api.refusal = status
    said = refusal(capsys, monkeypatch)
    assert str(status) in said
    assert "administrator" in said


def test_a_missing_operator_is_named_with_its_command(
    api: Kubeflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    api.crds = ()
    said = refusal(capsys, monkeypatch)
    assert "no PyTorchJob (kubeflow.org/v1)" in said
    assert cluster.OPERATOR in said


def test_a_missing_kubeflow_is_named_with_its_command(
    api: Kubeflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = refusal(capsys, monkeypatch)
    assert "no Kubeflow Pipelines" in said
    assert cluster.PIPELINES in said
    assert api.calls == [], "something was created before the refusal"


def test_an_unreachable_kubeflow_is_refused_before_anything_is_created(
    api: Kubeflow,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    put_kubeflow(api)
    api.calls.clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--host" in refusal(capsys, monkeypatch)
    kubectl = tmp_path / "kubectl"
    cause = "error: unable to forward port because pod is not running"
    kubectl.write_text(f"#!/bin/sh\necho '{cause}'\n")
    kubectl.chmod(stat.S_IRWXU)
    assert cause in refusal(capsys, monkeypatch)
    assert "127.0.0.1:1" in refusal(capsys, monkeypatch, "--host", "http://127.0.0.1:1/")
    assert api.calls == []


def test_a_port_forward_is_found_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(
        '#!/bin/sh\necho "$@" > said\necho "Forwarding from 127.0.0.1:43210 -> 3000"\nexec'
        " /bin/sleep 60\n"
    )
    kubectl.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with cluster.kubeflow_address(None, "kubeflow") as host:
        assert host == "http://127.0.0.1:43210"
        assert (tmp_path / "said").read_text().split() == [
            "port-forward",
            "--namespace",
            "kubeflow",
            "service/ml-pipeline-ui",
            ":80",
        ]


def put_kubeflow(api: FakeApiServer) -> None:
    api.put(
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "ml-pipeline"},
            "spec": {"ports": [{"port": 8888}]},
        }
    )


def test_the_namespace_of_pipelines_without_profiles_is_kubeflows(api: Kubeflow) -> None:
    put_kubeflow(api)
    found = cluster.find_cluster(None)
    assert (found.kubeflow, found.home) == (NAMESPACE, NAMESPACE)
    assert found.name != cluster.find_cluster(None).name
    assert (cluster.find_cluster("profile").kubeflow, cluster.find_cluster("profile").home) == (
        NAMESPACE,
        "profile",
    )


@pytest.mark.parametrize(
    "version",
    [kubernetes_validate.utils.all_versions()[0], kubernetes_validate.utils.all_versions()[-1]],
)
def test_the_jobs_are_valid_and_pass_pod_security_restricted(
    version: str, place: cluster.Cluster
) -> None:
    for name, command in (
        ("fill", ["sh", "-c", cluster.FILL]),
        ("read-first", ["python", "-c", cluster.READ, "first", place.name]),
    ):
        made = cluster.job(place, name, IMAGES["pipeline"], command)
        kubernetes_validate.validate(made, version, strict=True)
        pod = made["spec"]["template"]["spec"]
        assert pod_security_problems(pod) == []
        (container,) = pod["containers"]
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {
            "name": "workspace",
            "persistentVolumeClaim": {"claimName": f"{place.name}-workspace"},
        } in pod["volumes"]
        assert "nvidia" not in json.dumps(made)
    compile(cluster.READ, "READ", "exec")


@pytest.mark.parametrize("home", ["kubeflow", "profile"])
def test_the_chart_takes_the_values(home: str, place: cluster.Cluster) -> None:
    values = cluster.chart_values(
        cluster.Cluster(place.core, "kubeflow", home, place.name), IMAGES, "ReadWriteOnce"
    )
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        rendered = chart.render(values, name=place.name, namespace=home)
    text = "\n".join(rendered.values())
    assert f"name: {place.name}-mlflow" in text
    start = text.index("cluster.json: |") + len("cluster.json: |")
    settings, _ = json.JSONDecoder().raw_decode(text[start:].lstrip())
    training = ClusterConfig(**settings)
    assert (training.backend, training.gpu_resource, training.claim) == (
        "pytorchjob",
        None,
        f"{place.name}-workspace",
    )
    assert training.image == IMAGES["trainer"]
    assert ("kubeflow" if home == "profile" else "default-editor") not in json.dumps(
        values["permissions"]
    )


@pytest.mark.parametrize(
    "reference",
    [
        "canvastune/trainer:0.1.0",
        "registry.example.com:5000/team/trainer:1.0",
        "localhost/trainer:a",
        f"r.example/t@sha256:{'a' * 64}",
    ],
)
def test_images_keep_their_names_through_the_chart(reference: str, place: cluster.Cluster) -> None:
    values = cluster.chart_values(place, IMAGES | {"trainer": reference}, "ReadWriteMany")
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(values)
        rendered = chart.render(values, name=place.name, namespace="kubeflow")
    assert f'"image": "{reference}"' in "\n".join(rendered.values())


def test_the_recipe_leaves_the_backend_to_the_release(place: cluster.Cluster) -> None:
    recipe = cluster.recipe(place, "first", 20)
    assert recipe.parallel.nproc_per_node == 2
    assert "cluster" not in cluster.submission.recipe_text(recipe)
    cluster.submission.refuse_local_paths(recipe)


def test_installs_jobs_and_removals_reach_the_cluster(
    api: Kubeflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    put_kubeflow(api)
    found = cluster.find_cluster(None)
    values = cluster.chart_values(found, IMAGES, "ReadWriteOnce")
    cluster.install(found, found.home, values)
    assert f"{found.name}-mlflow" in api.all("Deployment")
    cluster.run_job(
        found, cluster.job(found, "fill", IMAGES["pipeline"], ["sh", "-c", cluster.FILL])
    )
    assert f"{found.name}-fill" not in api.all("Job")
    api.failing.add(f"{found.name}-bad")
    with pytest.raises(AssertionError, match="bad has failed"):
        cluster.run_job(found, cluster.job(found, "bad", IMAGES["pipeline"], ["false"]))
    cluster.remove("the release", lambda: cluster.helm_in(found.home).uninstall(found.name), False)
    assert f"{found.name}-mlflow" not in api.all("Deployment")
    cluster.remove("what stays", lambda: pytest.fail("removed"), True)
    cluster.remove("what cannot go", lambda: 1 / 0, False)
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "removed  the release",
        "KEPT     what stays",
        "LEFT     what cannot go: division by zero",
    ]


def test_what_was_created_is_removed_when_a_run_fails(
    api: Kubeflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsubmitted(*_: Any, **__: Any) -> str:
        made.update(api.names())
        raise UserError("step train failed")

    made: set[str] = set()
    put_kubeflow(api)
    api.put(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "a-teams"},
            "spec": {},
        }
    )
    before, found, report = api.names(), cluster.find_cluster(None), Report()
    monkeypatch.setattr(cluster, "access_mode", lambda _: "ReadWriteOnce")
    monkeypatch.setattr(cluster, "forget", lambda *_: None)
    monkeypatch.setattr(cluster.submission, "submit", unsubmitted)
    removals: list[tuple[str, Any]] = []
    cluster.check(
        found,
        cluster.KubeflowClient("http://127.0.0.1:1"),
        IMAGES,
        report,
        lambda what, undo: removals.append((what, undo)),
    )
    assert (report.passed, report.failed) == (3, 1), capsys.readouterr().out
    label = api.all("Namespace")[found.name]["metadata"]["labels"]
    assert label == {"pod-security.kubernetes.io/enforce": "restricted"}
    own = {
        "Deployment/{}-mlflow",
        "PersistentVolumeClaim/{}-workspace",
        "Job/{}-upload",
        "Pod/{}-test-permissions",
    }
    assert {name.format(found.name) for name in own} <= made
    for what, undo in reversed(removals):
        cluster.remove(what, undo, False)
    assert "LEFT" not in capsys.readouterr().out
    assert found.name not in api.all("Namespace")
    assert api.names_in(NAMESPACE) == before


def test_everything_is_removed_when_it_is_interrupted(
    api: Kubeflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Any, __: Any, ___: Any, report: Report, later: Any) -> None:
        later("the first", lambda: None)
        later("the second", lambda: None)
        with report.claim("it is interrupted"):
            raise KeyboardInterrupt

    put_kubeflow(api)
    monkeypatch.setattr(cluster, "check", interrupted)
    monkeypatch.setattr(cluster.KubeflowClient, "create_kfp_client", lambda _: None)
    monkeypatch.setattr("sys.argv", ["cluster", "--host", "http://127.0.0.1:1"])
    before = cluster.signal.getsignal(cluster.signal.SIGTERM)
    try:
        assert cluster.main() == 130
    finally:
        cluster.signal.signal(cluster.signal.SIGTERM, before)
    assert capsys.readouterr().out.splitlines()[1:] == ["removed  the second", "removed  the first"]
    assert cluster.submission.PIPELINE == "canvastune-finetune"


def test_an_invalid_image_reference_is_refused() -> None:
    with pytest.raises(Refused, match="a@b"):
        cluster.image_values("a@b")
