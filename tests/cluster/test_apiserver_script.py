"""tools.apiserver without an API server: its refusals, what it reads, and the objects it sends."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.jobs.states import TRAINJOB
from tests.support.api_server import ASSETS, default_plugins, find_assets
from tests.support.cluster_rules import pod_security_problems
from tests.support.every_pod import every_pod
from tests.support.rendered_chart import ci_values, render
from tools.apiserver.__main__ import PLUGINS, main
from tools.apiserver.crds import Crd, read_crds
from tools.apiserver.launcher import REFUSALS
from tools.apiserver.objects import refusal_of
from tools.image_builds import Refused

HELP = """
      --enable-admission-plugins strings
        admission plugins that should be enabled in addition to default enabled ones (LimitRanger,
        PodSecurity, ResourceQuota). Comma-delimited list of admission plugins: AlwaysAdmit, ...
"""


def test_without_the_folder_it_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(ASSETS, raising=False)
    monkeypatch.setattr("sys.argv", ["apiserver"])
    assert main() == 1
    error = capsys.readouterr().err
    assert error.startswith("REFUSED ")
    assert ASSETS in error
    assert "etcd and kube-apiserver" in error
    assert "setup-envtest" in error


def test_a_folder_without_the_programs_is_named_with_what_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(ASSETS, str(tmp_path))
    with pytest.raises(Refused, match=r"\betcd\b.*\bkube-apiserver\b"):
        find_assets()
    for name in ("etcd", "kube-apiserver"):
        (tmp_path / name).write_text("#!/bin/sh\n")
    (tmp_path / "etcd").chmod(stat.S_IRWXU)
    with pytest.raises(Refused, match=r"(?<!etcd and no )\bkube-apiserver\b"):
        find_assets()
    (tmp_path / "kube-apiserver").chmod(stat.S_IRWXU)
    assert find_assets() == tmp_path


def test_the_admission_plugins_are_those_that_the_server_lists() -> None:
    assert default_plugins(HELP) == {"LimitRanger", "PodSecurity", "ResourceQuota"}
    with pytest.raises(Refused, match="does not list"):
        default_plugins("usage: something else")


def test_crds_are_read_by_version_and_other_files_are_not(tmp_path: Path) -> None:
    def write(file: str, kind: str, name: str) -> None:
        document = {"kind": kind, "metadata": {"name": name}}
        (tmp_path / file).write_text(yaml.safe_dump(document))

    for version in ("2.10.0", "2.9.1"):
        write(f"group_jobs.v{version}.yaml", "CustomResourceDefinition", "jobs.group")
    write("runtime.v2.3.0.yaml", "ClusterTrainingRuntime", "torch")
    found = read_crds(tmp_path)
    assert [crd.text for crd in found["jobs.group"]] == ["2.9.1", "2.10.0"], "the oldest first"
    assert list(found) == ["jobs.group"]


class Server:
    """An API server that has kinds, and admits or refuses pods."""

    def __init__(self, plugins: set[str], refusal: str = "") -> None:
        self.plugins, self.version, self.refusal = frozenset(plugins), "v1.20.0", refusal
        self.sent: list[dict[str, Any]] = []

    def create(
        self, document: dict[str, Any], namespace: str, *, dry_run: bool = False
    ) -> tuple[int, Any]:
        self.sent.append(document)
        return (403, {"message": self.refusal}) if self.refusal else (201, document)


@pytest.mark.parametrize("refusal", ["", "exceeded quota: team-quota"])
def test_a_pod_that_is_refused_is_a_failure_with_the_server_s_words(refusal: str) -> None:
    server: Any = Server(set(), refusal)
    answer = refusal_of(server, "a", {"containers": []})
    assert (answer or {}).get("message", "") == refusal


def test_every_step_s_pod_has_what_the_graph_says() -> None:
    """As Kubeflow's driver makes it."""
    pods = [pod for where, pod in every_pod(render(ci_values("company"))) if "step " in where]
    assert len(pods) >= 8
    for pod in pods:
        (container,) = pod["containers"]
        assert pod_security_problems(pod) == []
        assert container["resources"]["limits"].keys() == {"cpu", "memory"}
        assert "/etc/canvastune-ca" in [mount["mountPath"] for mount in container["volumeMounts"]]
        assert [one["key"] for one in pod["tolerations"]] == ["team"]
        assert pod["serviceAccountName"] == "default-editor"


def test_every_refusal_has_words_and_a_plugin_that_gives_them() -> None:
    for case in REFUSALS:
        assert case.words, case.what
        assert case.hint, case.what
        assert case.plugin in (*PLUGINS, "NamespaceLifecycle"), case.what


def test_an_older_trainer_is_one_below_the_floor() -> None:
    floor = tuple(map(int, TRAINJOB.floor.version.split(".")))
    assert Crd((2, 1, 0), {}).version[:2] < floor
    assert not Crd((*floor, 0), {}).version[:2] < floor
