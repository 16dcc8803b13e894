"""Servers with OpenAI's API: started by `canvastune serve --run`, and asked a run's questions."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from canvastune.evaluation.scoring import mcnemar
from canvastune.serving import BACKENDS
from tools.serving.environment import ROOT, Run, install, run_script

_CLIENT = "openai==3.57.0"
_START_SECONDS = 300
# A difference of exact match with a smaller p is more than chance.
_LEVEL = 0.01


@dataclass(frozen=True)
class Way:
    """One way to ask a server."""

    name: str
    body: Mapping[str, Any] = field(default_factory=dict)  # in addition to the messages
    own_sampler: bool = False  # of the server: it may be better for a task, and must not be worse


WAYS: Mapping[str, tuple[Way, ...]] = {
    "mlx": (
        Way("the server's sampler (confidence threshold, temperature 0)", own_sampler=True),
        Way(
            "the model's sampler (entropy bound, whole canvases)",
            {
                "diffusion_sampler": "entropy-bound",
                "diffusion_full_canvas": True,
                "temperature": 1.0,
            },
        ),
    ),
    "transformers": (
        Way("stock generate()", {"generation_config": '{"return_dict_in_generate": false}'}),
    ),
}


def check(backend: str, run: Run) -> bool:
    """Serve, ask and compare; return whether every answer came and chance explains a difference."""
    packages = [*shlex.split(BACKENDS[backend].install)[2:], _CLIENT]
    environment = install(backend, packages, for_text=backend == "transformers")
    passed = True
    with _server(backend, run.model, environment) as address:
        for way in WAYS[backend]:
            started = time.monotonic()
            found = _ask(environment, address, run, way)
            seconds = time.monotonic() - started
            right = run.judge([answer["text"] for answer in found["answers"]])
            gained = sum(new and not old for new, old in zip(right, run.right, strict=True))
            lost = sum(old and not new for new, old in zip(right, run.right, strict=True))
            p = mcnemar(gained, lost)
            ended = sum(answer["end"] == "stop" for answer in found["answers"])
            alike = p >= _LEVEL or (gained > lost and way.own_sampler)
            well = alike and bool(found["streamed"].strip()) and any(right)
            passed = passed and well
            print(
                f"{'ok  ' if well else 'FAIL'} {backend}, {way.name}: {sum(right)} of {len(right)} "
                f"right, our evaluation {sum(run.right)} (p = {p:.2f}); {ended} ended by "
                f"themselves; streamed {found['streamed']!r}; {seconds:.0f} s",
                flush=True,
            )
    return passed


@contextlib.contextmanager
def _server(backend: str, model: Path, environment: Path) -> Iterator[str]:
    """Run `canvastune serve --run` on a free port; yield the address of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "pipelines.cli", "serve", str(model)]
    log = environment / "server.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, "--backend", backend, "--port", str(port), "--run"],
            cwd=ROOT,
            env=os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + _START_SECONDS
        while not _healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{log.read_text('utf-8')[-3000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):  # it does not listen yet
        return False


def _ask(environment: Path, address: str, run: Run, way: Way) -> dict[str, Any]:
    asked = {
        "address": address,
        "model": str(run.model),
        "max_tokens": run.max_tokens,
        "body": dict(way.body),
        "prompts": run.prompts,
    }
    answered = run_script(environment, "openai_client.py", given=json.dumps(asked))
    return dict(json.loads(answered))
