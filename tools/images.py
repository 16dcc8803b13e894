"""The images on a real Docker engine: `make test-images` builds them and runs MLflow, the trainer and the tiny pipeline on them.

Needs Docker, or root on Debian or Ubuntu to install it; says what it skipped where it has neither. Takes some eight
minutes and 8 GB the first time. An engine that it started keeps its layers in build/test-images, for the next time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from canvastune import __version__
from tests.support.rendered_chart import installed, server
from tools.image_builds import Refused, builder, built_base, running_engine

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "test-images"
IMAGES = {name: f"canvastune/{name}:{__version__}" for name in ("trainer", "pipeline", "mlflow")}
PORT = 15000  # MLflow's, on this machine's loopback
# As PodSecurity "restricted" and the chart have it; the network is the host's, since an engine in a sandbox may have no other.
CONFINED = [
    *("--rm", "--network=host", "--read-only", "--tmpfs=/tmp:exec,mode=1777", "--shm-size=512m"),
    *("--user=10001:10001", "--cap-drop=ALL", "--security-opt=no-new-privileges"),
]
RECIPE = """
name: images
model: {id: /workspace/tiny}
data: {source: /workspace/rows.jsonl, seq_length: 96, validation_fraction: 0.2, validation_rows: 4}
train:
  steps: 20
  global_batch_size: 2
  precision: float32
  log_every: 10
  validate_every: 10
  validation_levels: [0.5]
  checkpoint_every: 10
lora: {rank: 8}
parallel: {nproc_per_node: 2, ep: 2}
evaluate: {rows: 2, batch_size: 2, max_new_tokens: 16, max_denoising_steps: 2}
tracking: {experiment: seen-in-a-browser}
"""


class Report:
    """What was claimed, and what became of it."""

    def __init__(self) -> None:
        self.passed = self.failed = self.skipped = 0

    @contextlib.contextmanager
    def claim(self, words: str) -> Iterator[None]:
        """A claim that holds unless the block raises."""
        started = time.monotonic()
        try:
            yield
        except Refused as error:
            self.skipped += 1
            print(f"SKIPPED  {words}: {error}", flush=True)
        except Exception as error:  # the other claims are worth knowing all the same
            self.failed += 1
            said = getattr(error, "stdout", None) or ""
            print(f"FAILED   {words}\n{said[-6000:]}\n{type(error).__name__}: {error}", flush=True)
        else:
            self.passed += 1
            print(f"ok       {words} ({time.monotonic() - started:.0f} s)", flush=True)


def docker(*arguments: str, check: bool = True) -> str:
    """What a docker command says on either stream."""
    done = subprocess.run(["docker", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=check)
    return done.stdout


def describe(image: str) -> dict[str, Any]:
    """`docker inspect`."""
    (found,) = json.loads(docker("inspect", image))
    return found


def check_image(image: str, *, kfp: bool) -> None:
    """Non-root by number, labelled, with a bill of materials, and nothing of this machine in it."""
    about = describe(image)
    config, layers = about["Config"], docker("history", "--no-trunc", "--format={{.CreatedBy}}", image)
    assert config["User"] == "10001:10001", config["User"]
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    baked = [word for word in ("127.0.0.1:", "/run/secrets/ca", "index-url=") if word in json.dumps(config["Env"])]
    assert not baked, f"the environment names {baked}"
    code = f"import importlib.util as u, os; assert bool(u.find_spec('kfp')) is {kfp}; assert not os.path.exists('/etc/pip.conf')"
    docker("run", *CONFINED, image, "python", "-c", code)
    bill = json.loads(docker("run", *CONFINED, image, "sh", "-c", "cat /usr/share/sbom/*.cdx.json"))
    print(f"         {image}: {about['Size'] / 1e9:.2f} GB, {len(bill['components'])} components, {len(layers.splitlines())} steps")


@contextlib.contextmanager
def mlflow_server(workspace: Path) -> Iterator[None]:
    """The containers of MLflow's pod as the chart renders them: the database is migrated, then the server runs. Only its port differs."""
    pod = server(installed("default"))
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (10001, 10001), "not as CONFINED has it"
    (workspace / "mlflow").mkdir(mode=0o777)
    for container in pod["initContainers"]:
        docker("run", *CONFINED, *_as_in_pod(container, workspace))
    (container,) = pod["containers"]
    moved = {"--port=5000": f"--port={PORT}", "--host=0.0.0.0": "--host=127.0.0.1"}
    container = container | {"args": [moved.get(argument, argument) for argument in container["args"]]}
    name = "canvastune-test-mlflow"
    docker("rm", "--force", name, check=False)
    docker("run", "--detach", f"--name={name}", *CONFINED[1:], *_as_in_pod(container, workspace))
    try:
        deadline = time.monotonic() + 120
        while status("127.0.0.1") != 200:
            assert time.monotonic() < deadline, f"MLflow does not answer after two minutes:\n{docker('logs', name)[-4000:]}"
            time.sleep(1)
        yield
    finally:
        docker("rm", "--force", name, check=False)


def _as_in_pod(container: dict[str, Any], workspace: Path) -> list[str]:
    """Arguments of `docker run` for a container of a pod: volume, environment, image, command."""
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    words = [*container["command"], *container.get("args", [])]
    for name, value in environment.items():
        words = [word.replace(f"$({name})", value) for word in words]
    named = [f"--env={name}={value}" for name, value in environment.items()]
    return [f"--volume={workspace}/mlflow:/mlflow", *named, IMAGES["mlflow"], *words]


def status(host: str, path: str = "/health") -> int:
    """The server's answer to a request that came by the given name; 0: none."""
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", headers={"Host": f"{host}:{PORT}" if host == "127.0.0.1" else host})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def check_hosts() -> None:
    """The API answers to the Service's name and to no other; /health answers the kubelet, which calls by the pod's address."""
    search = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    service = "canvastune-mlflow.team-a.svc.cluster.local:5000"
    found = {host: (status(host), status(host, search)) for host in (service, "evil.example", "10.1.2.3:5000")}
    assert found[service] == (200, 200), found
    assert found["evil.example"][1] == 403, found
    assert found["10.1.2.3:5000"][0] == 200, f"a kubelet's probe is refused: {found}"


def check_page(scratch: Path) -> None:
    """A browser draws MLflow's page, with the run that the pipeline left."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        raise Refused("no Chromium here; `apt-get install chromium` gives one")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={scratch / 'browser'}", "--window-size=1280,900"]
    options += ["--virtual-time-budget=20000", f"--screenshot={CACHE / 'mlflow.png'}", "--dump-dom"]
    page = subprocess.run([browser, *options, f"http://127.0.0.1:{PORT}/"], capture_output=True, text=True, timeout=120, check=True).stdout
    assert "seen-in-a-browser" in page, f"the page does not show the experiment of the run:\n{page[:2000]}"


def prepare(workspace: Path) -> None:
    """A tiny model and some rows, made by the pipeline image."""
    inside = [*CONFINED, f"--volume={workspace}:/workspace", IMAGES["pipeline"]]
    docker("run", *inside, "canvastune", "make-tiny-model", "/workspace/tiny")
    rows = "from pathlib import Path; from canvastune.tiny_model import write_problems"
    docker("run", *inside, "python", "-c", f"{rows}; write_problems(Path('/workspace/rows.jsonl'), 'change', rows=40, seed=1)")
    (workspace / "recipe.yaml").write_text(RECIPE)


def check_training(workspace: Path) -> None:
    """What a training pod does, on two ranks, in the trainer image."""
    train = ["torchrun", "--standalone", "--nproc-per-node=2", "-m", "canvastune.train", "-c", "/workspace/recipe.yaml"]
    offline = ["--env=MLFLOW_TRACKING_URI=sqlite:////tmp/mlflow.db", "--env=OMP_NUM_THREADS=1"]
    docker("run", *CONFINED, *offline, f"--volume={workspace}:/workspace", IMAGES["trainer"], *train, "--output", "/workspace/trained")
    assert any((workspace / "trained").rglob("adapter_model.safetensors")), "no adapter"


def run_pipeline(workspace: Path) -> None:
    """The committed graph, each step a container of the pipeline image, recorded by the MLflow server above."""
    from kfp import local

    from pipelines.finetune import finetune

    runner = local.DockerRunner(
        network_mode="host",
        read_only=True,
        tmpfs={"/tmp": "exec,mode=1777"},
        user="10001:10001",
        cap_drop=["ALL"],
        security_opt=["no-new-privileges"],
        shm_size="512m",
        environment={"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{PORT}", "OMP_NUM_THREADS": "1"},
    )
    # On a cluster the image is the parameter `pipeline_image`; this runner takes an image for what it says.
    for executor in finetune.pipeline_spec.deployment_spec.fields["executors"].struct_value.fields.values():
        executor.struct_value.fields["container"].struct_value.fields["image"].string_value = IMAGES["pipeline"]
    # It mounts `pipeline_root` under its own name, and removes `workspace_root` at the end.
    local.init(runner, pipeline_root=str(workspace), workspace_root=str(workspace / "kfp"))
    with (CACHE / "pipeline.log").open("w") as log, contextlib.redirect_stdout(log):
        finetune(recipe=RECIPE.replace("/workspace/", f"{workspace}/"), workspace=str(workspace), run_name="on-docker")
    folder = workspace / "runs" / "on-docker"
    summary = json.loads((folder / "summary.json").read_text())
    assert (folder / "report" / "report.html").stat().st_size > 10_000
    assert any((folder / "model").glob("*.safetensors")), "no merged model"
    print(f"         training loss {summary['train_loss_first']:.3f} -> {summary['train_loss_last']:.3f}")


def main() -> int:
    """Run every claim; 1 if one failed."""
    report = Report()
    os.umask(0)  # folders made here are written by the containers' user
    with contextlib.ExitStack() as stack:
        workspace = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="canvastune-images-", ignore_cleanup_errors=True)))
        workspace.chmod(0o777)
        try:
            stack.enter_context(running_engine(CACHE))
            base = built_base()
            build = stack.enter_context(builder(ROOT, base))
        except Refused as error:
            print(f"SKIPPED  everything: {error}\n0 passed, 0 failed, 1 skipped")
            return 0
        for name, image in IMAGES.items():
            with report.claim(f"docker/{name}.Dockerfile builds"):
                build(name, image)
            with report.claim(f"{name}: non-root, labelled, billed, kfp where it belongs, nothing of this machine"):
                check_image(image, kfp=name == "pipeline")
        with report.claim("the pipeline image makes a tiny model and rows"):
            prepare(workspace)
        with report.claim("torchrun trains in the trainer image, confined"):
            check_training(workspace)
        with contextlib.ExitStack() as serving:
            with report.claim("MLflow's pod runs from its image as the chart has it: migration, server, read-only root, non-root"):
                serving.enter_context(mlflow_server(workspace))
            with report.claim("MLflow answers to its Service's names, and to others with 403"):
                check_hosts()
            with report.claim("the tiny pipeline runs through kfp.local.DockerRunner on the pipeline image, recorded in MLflow"):
                run_pipeline(workspace)
            with report.claim("a browser opens MLflow's page"):
                check_page(workspace)
    print("SKIPPED  the CUDA build of torch and its base image: this machine has the CPU's")
    print(f"{report.passed} passed, {report.failed} failed, {report.skipped + 1} skipped")
    return int(report.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
