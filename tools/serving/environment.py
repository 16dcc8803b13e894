"""The run whose model is served, and a separate environment for each server's packages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canvastune.evaluation.result import EvaluationResult, read_answers
from canvastune.evaluation.scoring import find_reference, is_correct

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / "build" / "test-serving"


def install(
    name: str, packages: Sequence[str], without: Sequence[str] = (), *, for_text: bool = False
) -> Path:
    """Return the folder of an environment with these packages, made once for each set of them.

    Args:
        without: packages that are removed again.
        for_text: torchvision is imported without its operators, as `torchvision_ops` says.
    """
    folder = ENVIRONMENTS / name
    done = folder / "packages.json"
    if not done.is_file() or json.loads(done.read_text("utf-8")) != list(packages):
        print(f"installing {' '.join(packages)} into {folder.relative_to(ROOT)}", flush=True)
        venv.create(folder, clear=True, with_pip=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", *packages], check=True)
        if without:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *without], check=True)
        done.write_text(json.dumps(packages), "utf-8")
    if for_text:
        (site,) = (folder / "lib").glob("python3.*/site-packages")
        shutil.copy(Path(__file__).with_name("torchvision_ops.py"), site / "sitecustomize.py")
    return folder


def run_script(environment: Path, name: str, *arguments: str, given: str = "") -> str:
    """Run a script of this folder in an environment; return its standard output.

    Args:
        given: its standard input.
    """
    command = [str(environment / "bin" / "python"), str(Path(__file__).with_name(name)), *arguments]
    return subprocess.run(
        command, input=given, stdout=subprocess.PIPE, text=True, check=True
    ).stdout


@dataclass(frozen=True)
class Run:
    """A finished run: its model, and what it was asked."""

    model: Path
    prompts: list[str]
    references: list[str]
    max_tokens: int
    pattern: re.Pattern[str]
    right: list[bool]  # the answers of our evaluation

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run with an evaluation by a regular expression."""
        rows: list[dict[str, Any]] = read_answers(folder / "evaluation")
        result = EvaluationResult.read(folder / "evaluation")
        merged = folder / "model"
        return cls(
            merged if merged.is_dir() else folder / "train" / "model",
            [row["prompt"] for row in rows],
            [row["reference"] for row in rows],
            result.max_new_tokens,
            re.compile(str(result.answer_pattern)),
            [bool(row["correct_after"]) for row in rows],
        )

    def judge(self, answers: Sequence[str]) -> list[bool]:
        """Return which answers are right."""
        right = []
        for answer, text in zip(answers, self.references, strict=True):
            reference = find_reference(self.pattern, text)
            assert reference is not None
            right.append(is_correct(self.pattern, answer, reference)[0])
        return right


def tiny_run() -> Path:
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
