#!/bin/sh
# Renew the lock files in this folder and requirements-dev.txt, from pyproject.toml:   pip install uv && docker/renew-locks.sh
# Packages keep the version in the lock file as long as it satisfies pyproject.toml; `docker/renew-locks.sh --upgrade` takes the newest.
set -eu
cd "$(dirname "$0")/.."

# lock FILE SOURCE...: every package by version and hash.
lock() {
    file=$1 && shift
    uv pip compile --quiet --universal --python-version 3.11 --generate-hashes \
        --no-annotate --custom-compile-command docker/renew-locks.sh "$@" --output-file "$file"
}

pipeline=docker/requirements-pipeline.txt
lock $pipeline pyproject.toml --extra pipeline "$@"
# Packages that the images and developers share have one version: in pods of jobs and steps, in MLflow's server and client.
lock docker/requirements-trainer.txt pyproject.toml --constraint $pipeline "$@"
lock docker/requirements-mlflow.txt docker/requirements-mlflow.in --constraint $pipeline "$@"
lock requirements-dev.txt pyproject.toml --extra dev --constraint $pipeline "$@"

# torch and its CUDA libraries are a separate layer of gigabytes, which only changes with torch.
python3 - <<'END'
import re
from pathlib import Path

LOCKS = Path("docker")


def entries(name: str) -> tuple[str, list[str]]:
    head, *packages = re.split(r"^(?=[a-z])", (LOCKS / f"requirements-{name}.txt").read_text(), flags=re.MULTILINE)
    return head, [p for p in packages if not re.search(r"sys_platform == '(win32|emscripten)'", p)]


for name in ("pipeline", "trainer", "mlflow"):
    head, packages = entries(name)
    cuda = [p for p in packages if re.match(r"torch==|triton==|nvidia-(?!ml-py)|cuda-", p)]
    (LOCKS / f"requirements-{name}.txt").write_text(head + "".join(p for p in packages if p not in cuda))
    if name == "trainer":
        (LOCKS / "requirements-torch-cuda.txt").write_text(head + "".join(cuda))
        torch = next(p for p in cuda if p.startswith("torch==")).split()[0]
        (LOCKS / "requirements-torch-cpu.txt").write_text(f"{torch}+cpu\n")
END
