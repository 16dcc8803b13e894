"""Serve a tiny run's model with the real mlx-vlm server on this CPU, and ask it over HTTP:
`make test-serving`.

The server starts as its user starts it, by `canvastune serve --run`, in a separate environment. It
is asked the held-out questions of the run's evaluation by the `openai` client, with the server's
own sampler and with the model's. With the model's, exact match must be that of the evaluation, but
for chance; with the other, it must not be lower.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from canvastune.evaluation.result import EvaluationResult
from canvastune.evaluation.scoring import find_reference, is_correct, mcnemar
from canvastune.serving import BACKENDS

ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / "build" / "test-serving"
_CLIENT = "openai==3.57.0"
_START_SECONDS = 300
# A difference of exact match with a smaller p is more than chance.
_LEVEL = 0.01
SAMPLERS: dict[str, dict[str, Any]] = {
    "the server's own (confidence threshold, temperature 0)": {},
    "the model's (entropy bound, whole canvases)": {
        "diffusion_sampler": "entropy-bound",
        "diffusion_full_canvas": True,
        "temperature": 1.0,
    },
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve, ask and compare; return 0 if every answer came and chance explains the difference."""
    parser = argparse.ArgumentParser("python -m tools.serving", description=__doc__)
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="a finished run with an evaluation (default: the newest tiny one, made if there is none)",
    )
    options = parser.parse_args(arguments)
    run = options.run or _tiny_run()
    model = run / "model" if (run / "model").is_dir() else run / "train" / "model"
    rows = [
        json.loads(line)
        for line in (run / "evaluation" / "answers.jsonl").read_text("utf-8").splitlines()
    ]
    result = EvaluationResult.read(run / "evaluation")
    pattern = re.compile(str(result.answer_pattern))
    _install()
    passed = True
    with _server(model) as address:
        for name, settings in SAMPLERS.items():
            asked = {
                "address": address,
                "model": str(model),
                "max_tokens": result.max_new_tokens,
                "settings": settings,
                "prompts": [row["prompt"] for row in rows],
            }
            started = time.monotonic()
            found = _ask(asked)
            seconds = time.monotonic() - started
            right = []
            for row, answer in zip(rows, found["answers"], strict=True):
                reference = find_reference(pattern, row["reference"])
                assert reference is not None
                right.append(is_correct(pattern, answer["text"], reference)[0])
            ours = [bool(row["correct_after"]) for row in rows]
            gained = sum(new and not old for new, old in zip(right, ours, strict=True))
            lost = sum(old and not new for new, old in zip(right, ours, strict=True))
            p = mcnemar(gained, lost)
            ended = sum(answer["end"] == "stop" for answer in found["answers"])
            # Another sampler may be better for a task; it must not be worse.
            alike = p >= _LEVEL or (gained > lost and not settings)
            well = alike and bool(found["streamed"].strip()) and any(right)
            passed = passed and well
            print(
                f"{'ok  ' if well else 'FAIL'} {name}: {sum(right)} of {len(rows)} right, "
                f"our evaluation {sum(ours)} (p = {p:.2f}); {ended} ended by themselves; "
                f"streamed {found['streamed']!r}; {seconds:.0f} s"
            )
    return 0 if passed else 1


def _tiny_run() -> Path:
    """Return the newest finished run of the tiny model, of `make run`; make one if there is none."""
    for _ in range(2):
        runs = sorted(
            (folder.parent for folder in (ROOT / "workspace" / "runs").glob("tiny-lora-*/report")),
            key=lambda folder: folder.stat().st_mtime,
        )
        if runs:
            return runs[-1]
        subprocess.run([sys.executable, "-m", "pipelines.cli", "demo"], cwd=ROOT, check=True)
    raise RuntimeError("`canvastune demo` left no run")


def _install() -> None:
    """Make the server's environment, once for each set of versions."""
    packages = [*shlex.split(BACKENDS["mlx"].install)[2:], _CLIENT]
    done = ENVIRONMENT / "packages.json"
    if done.is_file() and json.loads(done.read_text("utf-8")) == packages:
        return
    print(f"installing {' '.join(packages)} into {ENVIRONMENT.name}", flush=True)
    venv.create(ENVIRONMENT, clear=True, with_pip=True)
    command = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet", *packages]
    subprocess.run([*command, "--disable-pip-version-check"], check=True)
    done.write_text(json.dumps(packages), "utf-8")


@contextlib.contextmanager
def _server(model: Path) -> Iterator[str]:
    """Run `canvastune serve --run` on a free port; yield the address of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{ENVIRONMENT / 'bin'}{os.pathsep}{os.environ['PATH']}"
    command = [sys.executable, "-m", "pipelines.cli", "serve", str(model)]
    log = ENVIRONMENT / "server.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [*command, "--backend", "mlx", "--port", str(port), "--run"],
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


def _ask(asked: dict[str, Any]) -> dict[str, Any]:
    client = Path(__file__).with_name("serving_client.py")
    done = subprocess.run(
        [str(ENVIRONMENT / "bin" / "python"), str(client)],
        input=json.dumps(asked),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return dict(json.loads(done.stdout))


if __name__ == "__main__":
    sys.exit(main())
