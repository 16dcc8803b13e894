"""`canvastune submit` and `upload` with Kubeflow's real client against a fake of its API."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from inline_snapshot import snapshot

from canvastune.config import load_config, parse_config
from canvastune.errors import UserError, format_error, parse_error
from pipelines import submit as submitting
from pipelines.cli import main
from pipelines.kfp_client import KubeflowClient
from pipelines.submit import compile_pipeline, follow, refuse_local_paths, upload
from tests.fakes.fake_kubeflow import FakeKubeflow

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "pipelines" / "recipes" / "gsm8k_lora.yaml"
COMPILED = ROOT / "pipelines" / "finetune.yaml"
SECRET = "ey.secret.token"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KF_PIPELINES_TOKEN", "KF_PIPELINES_SA_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("kfp.Client._LOCAL_KFP_CONTEXT", str(tmp_path / "context.json"))


@pytest.fixture
def kubeflow() -> Iterator[FakeKubeflow]:
    with FakeKubeflow() as fake:
        yield fake


@pytest.fixture
def team(tmp_path: Path) -> Iterator[FakeKubeflow]:
    """A Kubeflow of several teams that wants a token."""
    with FakeKubeflow(token=SECRET, namespaces=("team-a",)) as fake:
        yield fake


def _task(name: str, state: str, **more: Any) -> dict[str, Any]:
    return {"display_name": name, "state": state, **more}


def _state(state: str, *tasks: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"state": state, "run_details": {"task_details": list(tasks)}, **more}


def _submit(fake: FakeKubeflow, *arguments: str) -> int:
    return main(["submit", str(RECIPE), "--host", fake.host, *arguments])


def _error(capsys: pytest.CaptureFixture[str]) -> UserError:
    """Return the only error that was printed, with a message of one line and a hint of one line."""
    text = capsys.readouterr().err
    assert text.startswith("canvastune: error: "), text
    error = parse_error(text)
    assert error is not None
    assert text == format_error(error) + "\n"
    assert "\n" not in f"{error}{error.hint}", f"more than one line: {text}"
    return error


def _refused(kubeflow: KubeflowClient) -> UserError:
    with pytest.raises(UserError) as error:
        upload(kubeflow)
    return error.value


# --- the server's version ---


@pytest.mark.parametrize("page", [False, True])
@pytest.mark.parametrize("command", ["submit", "upload"])
def test_an_old_kubeflow_is_refused_before_anything_is_uploaded(
    kubeflow: FakeKubeflow, page: bool, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kubeflow.version, kubeflow.page = "2.14.0", page
    recipe = [str(RECIPE)] if command == "submit" else []
    assert main([command, *recipe, "--host", kubeflow.host]) == 1
    error = _error(capsys)
    assert re.search(r" 2\.14\.0, .* 2\.15\b", str(error))
    assert "SecretAsEnv.optional" in str(error)
    assert not kubeflow.pipelines


@pytest.mark.parametrize("version", ["2.15.0", "2.16.1", "2.17.0", "", "master"])
def test_new_and_unknown_versions_are_taken_with_the_graph_that_they_take(
    kubeflow: FakeKubeflow, version: str
) -> None:
    """2.15 stops at the field of security contexts; later ones set all of restricted but this."""
    kubeflow.version = version
    assert _submit(kubeflow) == 0
    assert len(kubeflow.called("GET", "/healthz")) <= 2
    (package,) = kubeflow.called("POST", "/pipelines/upload")
    _, platform = yaml.safe_load_all(package.body)
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    asked = {json.dumps(one.get("securityContext")) for one in executors.values()}
    assert asked == {"null" if version == "2.15.0" else '{"runAsNonRoot": true}'}


# --- a run -------------------------------------------------------------------------------------------------------------


def test_submit_uploads_the_pipeline_and_starts_a_run_of_the_resolved_recipe(
    kubeflow: FakeKubeflow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        _submit(
            kubeflow, "--set", "lora.rank=32", "--run-name", "mine", "--compare", "rank8", "rank16"
        )
        == 0
    )
    (run,) = kubeflow.runs
    assert run["display_name"] == "mine"
    assert run["pipeline_version_reference"] == {
        "pipeline_id": "pipeline-1",
        "pipeline_version_id": "version-1",
    }
    assert run["experiment_id"] == "experiment-1"
    assert kubeflow.experiments[0]["display_name"] == "canvastune", "the recipe's experiment"
    parameters = run["runtime_config"]["parameters"]
    assert set(parameters) == {"recipe", "run_name", "kubeflow_url", "compare"}
    assert (parameters["kubeflow_url"], parameters["compare"]) == (
        kubeflow.host,
        "rank8\nrank16",
    ), "MLflow's run leads to Kubeflow's"
    sent = parse_config(yaml.safe_load(parameters["recipe"]))
    assert sent == load_config(RECIPE, ["lora.rank=32"]), (
        "the cluster would train something else than what was checked here"
    )
    (package,) = kubeflow.called("POST", "/pipelines/upload")
    compile_pipeline(tmp_path / "finetune.yaml")
    assert package.body == (tmp_path / "finetune.yaml").read_text(), (
        "not what `canvastune compile` writes"
    )
    said = capsys.readouterr()
    assert f"{kubeflow.host}/#/runs/details/run-1" in said.out
    assert said.err == ""


def test_a_second_run_of_a_name_is_refused_while_the_first_is_in_progress(
    kubeflow: FakeKubeflow, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _submit(kubeflow, "--run-name", "mine") == 0
    capsys.readouterr()
    for state in ("PENDING", "RUNNING", "CANCELING", "PAUSED"):
        kubeflow.runs[0]["state"] = state
        assert _submit(kubeflow, "--run-name", "mine") == 1
        error = str(_error(capsys))
        assert re.match(r"--run-name mine: .* 20\d\d-", error)
        assert error.endswith(f": {kubeflow.host}/#/runs/details/run-1")
    assert _submit(kubeflow, "--run-name", "other") == 0
    kubeflow.runs[0]["state"] = "FAILED"
    assert _submit(kubeflow, "--run-name", "mine") == 0, "an unfinished run cannot be resumed"
    assert len(kubeflow.runs) == 3


def test_the_pipeline_is_uploaded_again_only_when_it_changed(
    kubeflow: FakeKubeflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        assert _submit(kubeflow) == 0
    assert [v["pipeline_version_id"] for v in kubeflow.versions] == ["version-1"]
    monkeypatch.setattr(
        submitting,
        "compile_pipeline",
        lambda path, *_, **__: path.write_text(COMPILED.read_text() + "# changed\n"),
    )
    for _ in range(2):
        assert _submit(kubeflow) == 0
    assert len(kubeflow.pipelines) == 1
    assert [v["pipeline_version_id"] for v in kubeflow.versions] == ["version-1", "version-2"]
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*-[0-9a-f]{12}", kubeflow.versions[1]["display_name"])
    used = [run["pipeline_version_reference"]["pipeline_version_id"] for run in kubeflow.runs]
    assert used == ["version-1"] * 3 + ["version-2"] * 2


def test_settings_that_were_uploaded_hold_for_later_versions(
    kubeflow: FakeKubeflow, tmp_path: Path
) -> None:
    settings = tmp_path / "cluster.yaml"
    settings.write_text("backend: pytorchjob\nclaim: workspace\n")
    image = "registry.example/canvastune/pipeline:1"
    given = ["--cluster-file", str(settings), "--pipeline-image", image]
    assert main(["upload", "--host", kubeflow.host, *given]) == 0
    assert main(["upload", "--host", kubeflow.host, *given]) == 0
    assert _submit(kubeflow) == 0
    assert len(kubeflow.versions) == 1, (
        "submit without settings replaced the administrator's pipeline"
    )
    spec = kubeflow.versions[0]["pipeline_spec"]
    defaults = spec.get("pipeline_spec", spec)["root"]["inputDefinitions"]["parameters"]
    assert json.loads(defaults["cluster"]["defaultValue"]) == {
        "backend": "pytorchjob",
        "claim": "workspace",
    }
    assert defaults["volume_claim"]["defaultValue"] == "workspace", (
        "the steps would mount another volume than the training pods"
    )
    assert defaults["pipeline_image"]["defaultValue"] == image
    assert "cluster" not in kubeflow.runs[0]["runtime_config"]["parameters"]


def test_a_recipe_overrides_the_uploaded_settings_only_where_it_says_so(
    kubeflow: FakeKubeflow,
) -> None:
    assert _submit(kubeflow, "--set", "cluster.backend=pytorchjob", "--set", "cluster.nodes=2") == 0
    sent = yaml.safe_load(kubeflow.runs[0]["runtime_config"]["parameters"]["recipe"])
    assert sent["cluster"] == {
        "backend": "pytorchjob",
        "nodes": 2,
    }, "defaults of this machine would hide the chart's"


def test_a_cluster_file_of_submit_is_for_that_run(kubeflow: FakeKubeflow, tmp_path: Path) -> None:
    settings = tmp_path / "cluster.json"
    settings.write_text('{"cluster": {"backend": "trainjob", "nodes": 2}}')
    assert _submit(kubeflow, "--cluster-file", str(settings)) == 0
    assert json.loads(kubeflow.runs[0]["runtime_config"]["parameters"]["cluster"]) == {
        "backend": "trainjob",
        "nodes": 2,
    }


def test_a_team_has_its_namespace_and_its_token(
    team: FakeKubeflow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    assert _submit(team, "--namespace", "team-a", "--token-file", str(file), "--wait") == 0
    assert {call.token for call in team.calls} == {SECRET}, "a call without the token"
    assert team.pipelines[0]["namespace"] == "team-a"
    assert team.experiments[0]["namespace"] == "team-a"
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err


def test_a_token_of_the_environment_does_too(
    team: FakeKubeflow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KF_PIPELINES_TOKEN", SECRET)
    assert main(["upload", "--host", team.host + "/#/pipelines", "--namespace", "team-a"]) == 0
    assert len(team.versions) == 1


def test_a_pods_token_is_read_again_for_each_request(
    team: FakeKubeflow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text(SECRET)
    monkeypatch.setenv("KF_PIPELINES_SA_TOKEN_PATH", str(file))
    client = KubeflowClient(team.host, "team-a").create_kfp_client()
    team.token = "renewed"
    file.write_text("renewed")
    assert not client.list_pipelines(namespace="team-a").pipelines


def test_no_option_takes_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["submit", "--help"])
    assert "--token " not in capsys.readouterr().out


# --- followed ----------------------------------------------------------------------------------------------------------


def _follow(fake: FakeKubeflow, *script: dict[str, Any]) -> None:
    server = KubeflowClient(fake.host)
    version = upload(server)
    fake.script = list(script)
    client = server.create_kfp_client()
    fake.runs.append({"run_id": "run-1", "display_name": "r"})
    follow(lambda: client.get_run("run-1"), version.steps, server, "http://run", pause=0.01)


def test_wait_says_each_change_of_a_step_once(
    kubeflow: FakeKubeflow, capsys: pytest.CaptureFixture[str]
) -> None:
    driver = _task("train-driver", "SUCCEEDED")  # Kubeflow's own tasks are not steps
    _follow(
        kubeflow,
        _state("PENDING"),
        _state("RUNNING", driver, _task("prepare-data", "RUNNING")),
        _state("RUNNING", driver, _task("prepare-data", "RUNNING")),
        _state("RUNNING", driver, _task("prepare-data", "SUCCEEDED"), _task("train", "RUNNING")),
        _state(
            "SUCCEEDED", driver, _task("prepare-data", "SUCCEEDED"), _task("train", "SUCCEEDED")
        ),
    )
    lines = [
        line.split()[1:]
        for line in capsys.readouterr().out.splitlines()
        if re.match(r"\d\d:\d\d:\d\d", line)
    ]
    assert lines == [
        ["prepare-data", "running"],
        ["prepare-data", "succeeded"],
        ["train", "running"],
        ["train", "succeeded"],
        ["run", "succeeded"],
    ]


def test_a_failed_run_names_the_step_that_failed_first(kubeflow: FakeKubeflow) -> None:
    late = _task("finish", "FAILED", end_time="2026-01-01T00:00:09Z")
    first = _task(
        "train",
        "FAILED",
        end_time="2026-01-01T00:00:05Z",
        error={"message": "rank 3:\nout of memory"},
    )
    with pytest.raises(UserError) as error:
        _follow(kubeflow, _state("FAILED", late, first))
    assert str(error.value) == snapshot("step train failed: rank 3: out of memory")
    assert "http://run" in error.value.hint


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("CANCELED", snapshot("run canceled: stopped by ann")),
        (
            "SKIPPED",
            snapshot(
                "run skipped: no step reported a reason; Argo's of each: kubectl get"
                " workflows.argoproj.io -n kubeflow -l pipeline/runid=run-1 -o"
                " jsonpath='{.items[*].status.nodes.*.message}'"
            ),
        ),
    ],
)
def test_a_run_that_did_not_fail_did_not_succeed_either(
    state: str, message: str, kubeflow: FakeKubeflow
) -> None:
    reason = {"message": "stopped by ann"} if state == "CANCELED" else None
    with pytest.raises(UserError) as error:
        _follow(kubeflow, _state(state, error=reason))
    assert str(error.value) == message


def test_wait_ends_with_code_1_and_the_steps_name(
    kubeflow: FakeKubeflow, capsys: pytest.CaptureFixture[str]
) -> None:
    kubeflow.script = [_state("FAILED", _task("plan", "FAILED"))]
    assert _submit(kubeflow, "--wait") == 1
    assert str(_error(capsys)) == snapshot(
        "step plan failed: its log has the reason (kubectl logs -n kubeflow -l pipeline/runid=run-1"
        " -c main --tail=-1 | grep error:)"
    )


def test_ctrl_c_leaves_the_run_alone(
    kubeflow: FakeKubeflow, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submitting, "follow", interrupted)
    assert _submit(kubeflow, "--wait") == 130
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f": {kubeflow.host}/#/runs/details/run-1")
    assert not [call for call in kubeflow.calls if "terminate" in call.path]


def test_a_server_that_is_away_for_a_while_does_not_end_the_watch(
    kubeflow: FakeKubeflow, capsys: pytest.CaptureFixture[str]
) -> None:
    server = KubeflowClient(kubeflow.host)
    client = server.create_kfp_client()
    kubeflow.runs.append({"run_id": "run-1"})
    kubeflow.script = [_state("RUNNING"), _state("SUCCEEDED")]
    kubeflow.broken["/runs/"] = (502, "<html>bad gateway</html>", {})
    asked = []

    def look() -> Any:
        asked.append(1)
        if len(asked) == 4:
            kubeflow.broken.clear()
        return client.get_run("run-1")

    follow(look, frozenset(), server, "http://run", pause=0.01)
    assert len(asked) >= 5
    assert capsys.readouterr().out.count("502") == 1, "an outage is logged once"
    kubeflow.broken["/runs/"] = (502, "", {})
    with pytest.raises(UserError, match=r"502.*http://run"):
        follow(look, frozenset(), server, "http://run", pause=0.01, retry_seconds=0)


# --- refused -----------------------------------------------------------------------------------------------------------


def test_a_bad_recipe_never_reaches_the_cluster(
    kubeflow: FakeKubeflow, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _submit(kubeflow, "--set", "lora.rnak=32") == 1
    error = _error(capsys)
    assert "lora.rank" in f"{error}{error.hint}"
    assert kubeflow.calls == []


@pytest.mark.parametrize(
    ("setting", "path"),
    [
        ("data.source=my/rows.jsonl", "/workspace/rows.jsonl"),
        ("data.source=~/rows", "/workspace/rows"),
        ("model.id=/home/ann/models/base", "/workspace/base"),
        ("data.source=pipelines", "/workspace/pipelines"),
    ],
)
def test_what_no_pod_sees_is_refused_before_anything_is_sent(
    setting: str,
    path: str,
    kubeflow: FakeKubeflow,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    assert _submit(kubeflow, "--set", setting) == 1
    error = _error(capsys)
    assert str(error).startswith(setting.replace("=", ": "))
    assert path in error.hint
    assert kubeflow.calls == []


def test_the_workspace_volume_is_seen_wherever_it_is_mounted() -> None:
    refuse_local_paths(
        load_config(
            RECIPE,
            ["data.source=/workspace/rows.jsonl", "model.id=google/diffusiongemma-26B-A4B-it"],
        )
    )
    refuse_local_paths(
        load_config(RECIPE, ["data.source=/data/rows.jsonl"]), '{"mount_path": "/data"}'
    )


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("backend: pytorchjobb", "cluster.backend"),
        ("nods: 2", "cluster.nodes"),
        ("[1]", "found list"),
        ("{", "YAML"),
        (None, "No such file"),
    ],
)
def test_bad_cluster_settings_never_reach_the_cluster(
    text: str | None,
    hint: str,
    kubeflow: FakeKubeflow,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = tmp_path / "cluster.yaml"
    if text is not None:
        settings.write_text(text)
    assert main(["upload", "--host", kubeflow.host, "--cluster-file", str(settings)]) == 1
    error = capsys.readouterr().err
    assert "cluster.yaml" in error
    assert hint in error
    assert kubeflow.calls == []


def test_no_response_at_the_address() -> None:
    error = _refused(KubeflowClient("http://127.0.0.1:9", retry_seconds=0.3))
    assert str(error).startswith("http://127.0.0.1:9: ")
    assert "kubectl port-forward" in error.hint


@pytest.mark.parametrize("host", ["localhost:8080", "http://", "ftp://x"])
def test_an_address_without_its_scheme(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upload", "--host", host]) == 1
    assert str(_error(capsys)).startswith(f"--host {host.rstrip('/')}: ")


@pytest.mark.parametrize(
    ("status", "body", "headers", "hint"),
    [
        (200, "<html>Welcome to nginx</html>", {}, "hint: .*`/#/`"),
        (200, "[]", {}, "hint: .*`/#/`"),
        (404, "404 page not found", {}, "hint: .*`/#/`"),
        (
            302,
            "",
            {"Location": "https://login.example/auth?state=s3cr3t"},
            r"\(https://login\.example/auth\)",
        ),
        (401, "", {}, r"\(401\)\n  hint: .* --token-file FILE .*KF_PIPELINES_TOKEN"),
        (403, "RBAC: access denied", {}, "RBAC: access denied"),
        (503, "no healthy upstream", {}, "503: no healthy upstream"),
    ],
)
def test_another_server_at_the_address(
    status: int,
    body: str,
    headers: dict[str, str],
    hint: str,
    kubeflow: FakeKubeflow,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kubeflow.broken["/healthz"] = (status, body, headers)
    assert _submit(kubeflow) == 1
    error = format_error(_error(capsys))
    assert re.search(hint, error)
    assert "s3cr3t" not in error


def test_a_token_that_is_not_accepted(
    team: FakeKubeflow, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "token"
    file.write_text("old")
    assert _submit(team, "--namespace", "team-a", "--token-file", str(file)) == 1
    error = _error(capsys)
    assert "401" in str(error)
    assert f"--token-file {file}" in error.hint


@pytest.mark.parametrize(
    ("content", "hint"),
    [(None, "No such file"), ("", "found 0 words"), ("two words", "found 2 words")],
)
def test_a_token_file_without_a_token(
    content: str | None,
    hint: str,
    kubeflow: FakeKubeflow,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    assert _submit(kubeflow, "--token-file", str(file)) == 1
    assert hint in str(_error(capsys))


@pytest.mark.parametrize(
    ("namespace", "hint"), [(None, "--namespace"), ("team-b", "namespace 'team-b'")]
)
def test_no_namespace_or_not_this_one(
    namespace: str | None,
    hint: str,
    team: FakeKubeflow,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KF_PIPELINES_TOKEN", SECRET)
    assert _submit(team, *(["--namespace", namespace] if namespace else [])) == 1
    assert hint in format_error(_error(capsys))
    assert not team.runs


def test_a_namespace_where_there_is_only_one(
    kubeflow: FakeKubeflow, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _submit(kubeflow, "--namespace", "team-a") == 1
    assert "--namespace" in _error(capsys).hint


def test_an_upload_that_the_server_refuses_says_why(
    kubeflow: FakeKubeflow, capsys: pytest.CaptureFixture[str]
) -> None:
    kubeflow.broken["/upload"] = (
        400,
        '{"error_message": "pipeline upload denied: permission to create pipelines is required"}',
        {},
    )
    assert _submit(kubeflow) == 1
    assert "permission to create pipelines is required" in str(_error(capsys))


def test_a_port_forward_that_is_just_starting_is_waited_for(
    kubeflow: FakeKubeflow, capsys: pytest.CaptureFixture[str]
) -> None:
    port = int(kubeflow.host.rpartition(":")[2])
    kubeflow.__exit__()  # the port is closed

    late = threading.Timer(0.7, kubeflow.listen, [port])
    late.start()
    assert _submit(kubeflow) == 0, capsys.readouterr().err
    assert len(kubeflow.runs) == 1
