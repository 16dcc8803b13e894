"""Prepare image builds: a Docker engine, a base image, and this machine's package index."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from canvastune import __version__

PULLED_BASE = "python:3.12-slim-bookworm"
LOCAL_BASE = "canvastune-test-base:bookworm"
_SETTINGS = ("index-url", "extra-index-url", "find-links", "trusted-host", "proxy", "timeout")


class Refused(Exception):
    """This machine lacks something; what depends on it is skipped."""


def default_base(dockerfile: Path) -> str:
    """Return the base image that a Dockerfile names."""
    found = re.search(r"^ARG BASE_IMAGE=(\S+)$", dockerfile.read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


@contextlib.contextmanager
def running_engine(folder: Path) -> Iterator[None]:
    """Set DOCKER_HOST to a running Docker engine, or start one and stop it at the end.

    Raises:
        Refused: none runs, and none can be started.
    """
    if shutil.which("docker") and _succeeds("docker", "info"):
        _use_builder()
        yield
        return
    if os.geteuid() != 0 or sys.platform != "linux":
        raise Refused(
            "no Docker engine runs, and only root can start one. Start Docker, or run this as "
            "root on Linux"
        )
    if shutil.which("dockerd") is None:
        _install("docker.io")
        for part in ("docker-cli", "docker-buildx"):  # separate packages on newer systems
            _succeeds("apt-get", "install", "--yes", "--no-install-recommends", part)
    _use_builder()
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="canvastune-engine-", ignore_cleanup_errors=True)
        )
        log = stack.enter_context((folder / "dockerd.log").open("w"))
        socket = f"unix://{scratch}/docker.sock"
        command = [
            "dockerd",
            f"--host={socket}",
            f"--data-root={folder / 'engine'}",
            f"--exec-root={scratch}/exec",
        ]
        # Builds and containers share the host's network: a sandbox may have neither iptables nor
        # bridges.
        command += [f"--pidfile={scratch}/pid", "--iptables=false", "--bridge=none"]
        engine = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        before = os.environ.get("DOCKER_HOST")
        os.environ["DOCKER_HOST"] = socket
        try:
            deadline = time.monotonic() + 60
            while not _succeeds("docker", "info"):
                if engine.poll() is not None or time.monotonic() > deadline:
                    raise Refused(f"dockerd does not start; see its log, {log.name}")
                time.sleep(0.5)
            yield
        finally:
            os.environ.pop("DOCKER_HOST")
            if before is not None:
                os.environ["DOCKER_HOST"] = before
            engine.terminate()
            engine.wait(timeout=60)
            _succeeds("umount", f"{scratch}/exec/netns/default")  # left mounted by the engine


def base_image(wanted: str = PULLED_BASE) -> str:
    """Return a base image: the one that is wanted, or else one built from Debian's packages, with
    Python.
    """
    for image in (wanted, LOCAL_BASE):
        if _succeeds("docker", "image", "inspect", image):
            return image
    with contextlib.suppress(subprocess.TimeoutExpired):
        if _succeeds("docker", "pull", wanted, timeout=120):
            return wanted
    if shutil.which("mmdebstrap") is None:
        _install("mmdebstrap")
    packages = "python3,python3-venv,ca-certificates"
    with tempfile.TemporaryDirectory() as scratch:
        tree = f"{scratch}/base.tar"
        if not _succeeds(
            "mmdebstrap", "--variant=minbase", f"--include={packages}", "bookworm", tree
        ):
            raise Refused(f"{wanted} cannot be pulled, and mmdebstrap reaches no Debian mirror")
        subprocess.run(
            ["docker", "import", tree, LOCAL_BASE], check=True, stdout=subprocess.DEVNULL
        )
    return LOCAL_BASE


class Builder:
    """Builds docker/NAME.Dockerfile with this machine's settings of pip.

    They and the certificates are build secrets, and local package folders are served over loopback
    HTTP, so that none of it is in the image.
    """

    def __init__(self, root: Path, options: list[str], torch: dict[str, list[str]]) -> None:
        self.root, self._options, self._torch = root, options, torch

    def build(
        self,
        dockerfile: Path,
        image: str,
        base: str,
        torch: str = "cpu",
        arguments: Mapping[str, str] | None = None,
    ) -> None:
        """Build an image; `torch` is cpu or cuda, `arguments` are more of Docker's --build-arg."""
        given = {"BASE_IMAGE": base, **(arguments or {})}
        capture(
            *("docker", "build", "--progress=plain", *self._options, *self._torch[torch]),
            *(f"--build-arg={name}={value}" for name, value in given.items()),
            *(f"--file={dockerfile}", f"--tag={image}", str(self.root)),
            variables={"DOCKER_BUILDKIT": "1"},
        )


@contextlib.contextmanager
def builder(root: Path) -> Iterator[Builder]:
    """Yield a builder of the Dockerfiles, for as long as its package folders are served."""
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="canvastune-pip-")))
        settings = _pip_settings()
        certificates = (
            settings.pop("cert", None)
            or os.environ.get("SSL_CERT_FILE")
            or os.environ.get("REQUESTS_CA_BUNDLE")
        )
        of_cpu = [
            place for place in settings.get("find-links", "").split() if _has_cpu_torch(place)
        ]
        served = {
            place: stack.enter_context(_serve(place))
            for value in settings.values()
            for place in value.split()
        }
        options = ["--network=host", f"--build-arg=VERSION={__version__}"]
        options += [
            f"--build-arg={name}"
            for name in ("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
            if name in os.environ
        ]
        if certificates:
            options += ["--secret", f"id=ca,src={certificates}"]
        torch = {}
        # 2.13.0+cpu is newer than 2.13.0, and would be taken for a build of CUDA.
        for kind, without in {"cpu": [], "cuda": of_cpu}.items():
            lines = ["[global]", *(["cert = /run/secrets/ca"] if certificates else [])]
            for key, value in settings.items():
                places = [served[place] for place in value.split() if place not in without]
                lines += [f"{key} = {' '.join(places)}"] if places else []
            (scratch / kind).write_text("\n".join(lines) + "\n")
            torch[kind] = [f"--secret=id=pip,src={scratch / kind}", f"--build-arg=TORCH={kind}"]
            if of_cpu or kind == "cuda":
                torch[kind].append("--build-arg=TORCH_INDEX=")
        yield Builder(root, options, torch)


def _has_cpu_torch(place: str) -> bool:
    folder = _local_folder(place)
    return folder is not None and any(Path(folder).glob("torch-*+cpu-*.whl"))


def _pip_settings() -> dict[str, str]:
    """Return pip's settings, merged from files and environment: one value per key."""
    said = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[str]] = {}
    for line in said.splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in (*_SETTINGS, "cert"):
            found.setdefault(key, []).extend(
                part for part in shlex.split(value)[0].split() if part not in found.get(key, [])
            )
    return {
        key: (values[-1] if key in ("cert", "timeout", "index-url") else " ".join(values))
        for key, values in found.items()
    }


def _local_folder(place: str) -> str | None:
    """Return the folder of a package location; None if it is a URL."""
    path = unquote(urlsplit(place).path) if place.startswith("file:") else place
    return path if path.startswith("/") else None


@contextlib.contextmanager
def _serve(place: str) -> Iterator[str]:
    """Yield a URL for a local folder of packages; yield any other location unchanged."""
    folder = _local_folder(place)
    if folder is None:
        yield place
        return
    handler = functools.partial(
        _QuietHandler, directory=str(Path(folder).parent)
    )  # an index links to a sibling folder
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{Path(folder).name}/"
        server.shutdown()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def _install(package: str) -> None:
    if shutil.which("apt-get") is None:
        raise Refused(f"{package} is not installed, and apt-get is missing")
    print(f"installing {package}", flush=True)
    for words in (("update",), ("install", "--yes", "--no-install-recommends", package)):
        variables = {"DEBIAN_FRONTEND": "noninteractive"}
        done = capture("apt-get", *words, variables=variables, check=False)
    if done.returncode:
        raise Refused(f"{package} cannot be installed: {done.stdout.strip().splitlines()[-1]}")


def _use_builder() -> None:
    """Put Debian's Docker client first in PATH if the current client lacks the BuildKit plug-in."""
    if not _succeeds("docker", "buildx", "version") and Path("/usr/bin/docker").exists():
        os.environ["PATH"] = f"/usr/bin{os.pathsep}{os.environ['PATH']}"


def capture(
    *command: str, variables: Mapping[str, str] | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run a command with more variables; both of its streams are in `stdout`."""
    return subprocess.run(
        command,
        env={**os.environ, **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=check,
    )


def _succeeds(*command: str, timeout: float | None = None) -> bool:
    return (
        subprocess.run(command, capture_output=True, check=False, timeout=timeout).returncode == 0
    )
