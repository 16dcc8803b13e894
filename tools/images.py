"""Build the images on a real Docker engine, and run MLflow, the trainer and the pipeline on them.

`make test-images` runs this. It needs Docker, or root on Debian or Ubuntu to install it, and prints
what it skips without either. It takes about 25 minutes and 20 GB the first time. An engine that it
started keeps its layers in build/test-images, for the next time.

The trainer and the pipeline are built twice, with torch for the CPU and for CUDA. Without a GPU,
those for CUDA show that they can compile what a GPU would run.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from tools.image_builds import (
    Builder,
    Refused,
    base_image,
    builder,
    capture,
    default_base,
    running_engine,
)

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "test-images"
IMAGES = {name: f"canvastune/{name}:{__version__}" for name in ("trainer", "pipeline", "mlflow")}
CUDA_IMAGES = {name: f"{IMAGES[name]}-cuda" for name in ("trainer", "pipeline")}
CUDA_TESTS_IMAGE = f"{CUDA_IMAGES['trainer']}-tests"
# What is known of a GPU without one: docs/verification.md, "CUDA without a GPU".
CUDA_TESTS = ("gpu_dry_run", "flex_attention", "fused", "triton_kernels", "devices")
TEST_PACKAGES = ("pytest", "pytest-timeout")
PORT = 15000  # MLflow's, on this machine's loopback
POD_IP = "10.1.2.3"  # of the pod, by its downward API
# As PodSecurity "restricted" and the chart; on the host's network: a sandbox may have no other.
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
evaluate: {rows: 2, batch_size: 2, max_new_tokens: 16, sampler: {steps: 2}}
tracking: {experiment: seen-in-a-browser}
"""


class Report:
    """Counts of the claims that passed, failed and were skipped."""

    def __init__(self) -> None:
        self.passed = self.failed = self.skipped = 0

    @contextlib.contextmanager
    def claim(self, description: str) -> Iterator[None]:
        """Count and print a claim, which passes unless the block raises."""
        started = time.monotonic()
        try:
            yield
        except Refused as error:
            self.skipped += 1
            print(f"SKIPPED  {description}: {error}", flush=True)
        except Exception as error:  # check the other claims anyway
            self.failed += 1
            output = getattr(error, "stdout", None) or ""
            print(
                f"FAILED   {description}\n{output[-6000:]}\n{type(error).__name__}: {error}",
                flush=True,
            )
        else:
            self.passed += 1
            print(f"ok       {description} ({time.monotonic() - started:.0f} s)", flush=True)

    def end(self) -> int:
        """Print the counts; return the exit code."""
        print(f"{self.passed} passed, {self.failed} failed, {self.skipped} skipped")
        return int(self.failed > 0)


def docker(*arguments: str, check: bool = True) -> str:
    """Run a docker command and return what it prints on either stream."""
    return capture("docker", *arguments, check=check).stdout


def describe(image: str) -> dict[str, Any]:
    """Return the result of `docker inspect`."""
    (found,) = json.loads(docker("inspect", image))
    return found


def check_image(image: str, *, kfp: bool) -> None:
    """Check that it is non-root by number, labeled, with an SBOM, and free of this machine's
    settings.
    """
    about = describe(image)
    config = about["Config"]
    layers = docker("history", "--no-trunc", "--format={{.CreatedBy}}", image)
    assert config["User"] == "10001:10001", config["User"]
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    leaked = [
        word
        for word in ("127.0.0.1:", "/run/secrets/ca", "index-url=")
        if word in json.dumps(config["Env"])
    ]
    assert not leaked, f"the environment names {leaked}"
    code = (
        f"import importlib.util as u, os; assert bool(u.find_spec('kfp')) is {kfp}; "
        "assert not os.path.exists('/etc/pip.conf')"
    )
    docker("run", *CONFINED, image, "python", "-c", code)
    sbom = json.loads(docker("run", *CONFINED, image, "sh", "-c", "cat /usr/share/sbom/*.cdx.json"))
    print(
        f"         {image}: {about['Size'] / 1e9:.2f} GB, {len(sbom['components'])} components, "
        f"{len(layers.splitlines())} steps"
    )


def check_build(
    report: Report, images: Builder, name: str, image: str, base: str, torch: str = "cpu"
) -> None:
    """Build an image, and check it."""
    dockerfile = ROOT / "docker" / f"{name}.Dockerfile"
    with report.claim(f"docker/{name}.Dockerfile builds as {image}"):
        images.build(dockerfile, image, base, torch)
    with report.claim(
        f"{image}: non-root, labeled, with an SBOM, kfp only in the pipeline image, nothing of "
        "this machine"
    ):
        check_image(image, kfp=name == "pipeline")


def check_compiler(image: str) -> None:
    """Check that an image for CUDA compiles Triton's launcher with its own compiler, confined."""
    script = Path(__file__).with_name("image_compiler.py")
    found = docker(
        "run", *CONFINED, f"--volume={script}:/check.py:ro", image, "python", "/check.py"
    )
    print(f"         {found.strip().splitlines()[-1]}")


def check_static(builder: Builder) -> None:
    """Run the tests of the CUDA path in the CUDA image, next to a C++ compiler and pytest."""
    locked = (ROOT / "requirements-dev.txt").read_text()
    packages = [
        found[0]
        for name in TEST_PACKAGES
        if (found := re.search(rf"^{name}==\S+", locked, re.MULTILINE))
    ]
    dockerfile = ROOT / "tools" / "image_tests.Dockerfile"
    arguments = {"PACKAGES": " ".join(packages)}
    builder.build(dockerfile, CUDA_TESTS_IMAGE, CUDA_IMAGES["trainer"], "cuda", arguments)
    tests = [f"tests/unit/test_{name}.py" for name in CUDA_TESTS]
    said = docker(
        "run",
        *CONFINED,
        *(f"--volume={ROOT}:/source:ro", "--workdir=/source", "--env=PYTHONPATH=/source"),
        CUDA_TESTS_IMAGE,
        *("python", "-m", "pytest", "-p", "no:cacheprovider", "-rs", *tests),
    )
    print(f"         {said.strip().splitlines()[-1]}")


@contextlib.contextmanager
def mlflow_server(workspace: Path) -> Iterator[None]:
    """Run the containers of MLflow's pod as the chart renders them, except for the port.

    The database is migrated first.
    """
    pod = server(installed("default"))
    assert (pod["securityContext"]["runAsUser"], pod["securityContext"]["runAsGroup"]) == (
        10001,
        10001,
    ), "differs from CONFINED"
    (workspace / "mlflow").mkdir(mode=0o777)
    for container in pod["initContainers"]:
        docker("run", *CONFINED, *run_arguments(container, workspace))
    (container,) = pod["containers"]
    moved = {"--port=5000": f"--port={PORT}", "--host=0.0.0.0": "--host=127.0.0.1"}
    container = container | {
        "args": [moved.get(argument, argument) for argument in container["args"]]
    }
    name = "canvastune-test-mlflow"
    docker("rm", "--force", name, check=False)
    docker("run", "--detach", f"--name={name}", *CONFINED[1:], *run_arguments(container, workspace))
    try:
        deadline = time.monotonic() + 120
        while status("127.0.0.1") != 200:
            assert time.monotonic() < deadline, (
                f"MLflow does not respond after two minutes:\n{docker('logs', name)[-4000:]}"
            )
            time.sleep(1)
        yield
    finally:
        docker("rm", "--force", name, check=False)


def run_arguments(container: dict[str, Any], workspace: Path) -> list[str]:
    """Return the arguments of `docker run` for a pod's container: volume, environment, image,
    command.
    """
    fields = {"status.podIP": POD_IP}
    environment = {
        variable["name"]: variable.get("value")
        or fields[variable["valueFrom"]["fieldRef"]["fieldPath"]]
        for variable in container["env"]
    }
    words = [*container["command"], *container.get("args", [])]
    for name, value in environment.items():
        words = [word.replace(f"$({name})", value) for word in words]
    named = [f"--env={name}={value}" for name, value in environment.items()]
    return [f"--volume={workspace}/mlflow:/mlflow", *named, IMAGES["mlflow"], *words]


def status(host: str, path: str = "/health") -> int:
    """Return the HTTP status of a request with the given Host header; 0 without a response."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}",
        headers={"Host": f"{host}:{PORT}" if host == "127.0.0.1" else host},
    )
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def check_hosts() -> None:
    """Check that the API accepts only the Service's names and the pod's address, which kubelet's
    probes use.
    """
    search = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    service = "canvastune-mlflow.team-a.svc.cluster.local:5000"
    found = {
        host: (status(host), status(host, search))
        for host in (service, "evil.example", f"{POD_IP}:5000")
    }
    assert found[service] == (200, 200), found
    assert found["evil.example"][1] == 403, found
    assert found[f"{POD_IP}:5000"][0] == 200, f"a kubelet's probe is refused: {found}"


def check_page(scratch: Path) -> None:
    """Check that a browser renders MLflow's page with the experiment of the pipeline's run."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        raise Refused("no Chromium; run `apt-get install chromium`")
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={scratch / 'browser'}",
        "--window-size=1280,900",
    ]
    options += ["--virtual-time-budget=20000", f"--screenshot={CACHE / 'mlflow.png'}", "--dump-dom"]
    page = subprocess.run(
        [browser, *options, f"http://127.0.0.1:{PORT}/"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "seen-in-a-browser" in page, (
        f"the page does not show the experiment of the run:\n{page[:2000]}"
    )


def prepare(workspace: Path) -> None:
    """Create a tiny model and some rows with the pipeline image."""
    inside = [*CONFINED, f"--volume={workspace}:/workspace", IMAGES["pipeline"]]
    docker("run", *inside, "canvastune", "make-tiny-model", "/workspace/tiny")
    rows = "from pathlib import Path; from canvastune.tiny_model import write_problems"
    docker(
        "run",
        *inside,
        "python",
        "-c",
        f"{rows}; write_problems(Path('/workspace/rows.jsonl'), 'change', rows=40, seed=1)",
    )
    (workspace / "recipe.yaml").write_text(RECIPE)


def check_training(workspace: Path, image: str) -> None:
    """Check that a trainer image trains as a training pod does, on two ranks on the CPU."""
    trained = f"trained-{image.rpartition(':')[2]}"
    train = [
        "torchrun",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "canvastune.train",
        "-c",
        "/workspace/recipe.yaml",
    ]
    offline = ["--env=MLFLOW_TRACKING_URI=sqlite:////tmp/mlflow.db", "--env=OMP_NUM_THREADS=1"]
    docker(
        "run",
        *CONFINED,
        *offline,
        f"--volume={workspace}:/workspace",
        image,
        *train,
        "--output",
        f"/workspace/{trained}",
    )
    assert any((workspace / trained).rglob("adapter_model.safetensors")), "no adapter"


def run_pipeline(workspace: Path) -> None:
    """Run the committed pipeline, each step in a container of the pipeline image, recorded in
    MLflow.
    """
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
    # On a cluster the image is the parameter `pipeline_image`; this runner does not resolve
    # parameters.
    for executor in finetune.pipeline_spec.deployment_spec.fields[
        "executors"
    ].struct_value.fields.values():
        executor.struct_value.fields["container"].struct_value.fields[
            "image"
        ].string_value = IMAGES["pipeline"]
    # The runner mounts `pipeline_root` under the same path, and removes `workspace_root` at the
    # end.
    local.init(runner, pipeline_root=str(workspace), workspace_root=str(workspace / "kfp"))
    with (CACHE / "pipeline.log").open("w") as log, contextlib.redirect_stdout(log):
        finetune(
            recipe=RECIPE.replace("/workspace/", f"{workspace}/"),
            workspace=str(workspace),
            run_name="on-docker",
        )
    folder = workspace / "runs" / "on-docker"
    summary = json.loads((folder / "summary.json").read_text())
    assert (folder / "report" / "report.html").stat().st_size > 10_000
    assert any((folder / "model").glob("*.safetensors")), "no merged model"
    print(
        f"         training loss {summary['train_loss_first']:.3f} -> "
        f"{summary['train_loss_last']:.3f}"
    )


def main() -> int:
    """Check every claim; return 1 if one failed."""
    report = Report()
    os.umask(0)  # the containers' user writes into folders created here
    with contextlib.ExitStack() as stack:
        workspace = Path(
            stack.enter_context(
                tempfile.TemporaryDirectory(prefix="canvastune-images-", ignore_cleanup_errors=True)
            )
        )
        workspace.chmod(0o777)
        try:
            stack.enter_context(running_engine(CACHE))
            base = base_image()
            images = stack.enter_context(builder(ROOT))
        except Refused as error:
            print(f"SKIPPED  everything: {error}\n0 passed, 0 failed, 1 skipped")
            return 0
        for name, image in IMAGES.items():
            check_build(report, images, name, image, base)
        wanted = default_base(ROOT / "docker" / "trainer.Dockerfile")
        cuda_base = base_image(wanted)
        with report.claim(f"images for CUDA are on {wanted}"):
            if cuda_base != wanted:
                raise Refused(f"it cannot be pulled, {cuda_base} took its place")
        for name, image in CUDA_IMAGES.items():
            check_build(report, images, name, image, cuda_base, "cuda")
            with report.claim(f"Triton builds its launcher with the compiler of {name} for CUDA"):
                check_compiler(image)
        with report.claim("the tests of CUDA without a GPU pass in the trainer's image"):
            check_static(images)
        with report.claim("the pipeline image creates a tiny model and rows"):
            prepare(workspace)
        for image in (IMAGES["trainer"], CUDA_IMAGES["trainer"]):
            with report.claim(f"torchrun trains in {image}, on the CPU, confined"):
                check_training(workspace, image)
        with contextlib.ExitStack() as serving:
            with report.claim(
                "MLflow's pod runs from its image as in the chart: migration, server, read-only "
                "root, non-root"
            ):
                serving.enter_context(mlflow_server(workspace))
            with report.claim("MLflow accepts its Service's names, and answers others with 403"):
                check_hosts()
            with report.claim(
                "the tiny pipeline runs through kfp.local.DockerRunner on the pipeline image, "
                "recorded in MLflow"
            ):
                run_pipeline(workspace)
            with report.claim("a browser opens MLflow's page"):
                check_page(workspace)
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
