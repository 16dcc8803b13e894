"""Run the commands of one source tree in a separate folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.loss_compare import snapshot

_WARM_START = Path(__file__).with_name("warm_start.py")


class CommandError(RuntimeError):
    """A command ended with an unexpected exit code; the message holds its output."""


class Side:
    """The commands of a source tree, run in `folder`, which gets the tiny recipe and its rows."""

    def __init__(
        self, tree: Path, folder: Path, say: Callable[[str], object] = lambda line: None
    ) -> None:
        self.folder, self._say = folder, say
        self.logs = folder / ".logs"
        self.logs.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(snapshot.RECIPE, encoding="utf-8")
        snapshot.write_rows(folder / "problems.jsonl", snapshot.problem_rows())
        outer = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MLFLOW_", "CANVASTUNE_"))
        }
        self.environment = {
            **outer,
            "PYTHONPATH": str(tree),
            "PYTHONSAFEPATH": "1",  # nothing in the current folder is a module
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
            "COLUMNS": "120",  # where --help breaks its lines
        }
        with (self.logs / "start").open("w") as errors:
            self._server = subprocess.Popen(
                [sys.executable, "-P", str(_WARM_START)],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._loaded = False
        self._tree = tree

    def run(
        self,
        module: str,
        *arguments: str,
        ranks: int = 0,
        expect: int | None = 0,
        folder: Path | None = None,
    ) -> tuple[int, str]:
        """Run `python -m MODULE ARGUMENTS` in `folder`, or in this side's; return the exit code and
        the output.

        With `ranks`, run it on so many as torchrun would; the exit code is the highest.

        Raises:
            CommandError: the exit code is not `expect`.
        """
        if not self._loaded:
            found = self._ask(None)
            if Path(found).parent.resolve() != self._tree.resolve():
                raise CommandError(
                    f"{self._tree}: the package was imported from {found}. Nothing would be"
                    " compared"
                )
            self._loaded = True
        file = self.logs / f"{len(list(self.logs.iterdir())):03d}-{module}"
        self.say(f"{module} {' '.join(arguments)}" + (f" on {ranks}" if ranks else ""))
        job = {
            "module": module,
            "arguments": arguments,
            "folder": str(folder or self.folder),
            "ranks": ranks,
            "log": str(file),
        }
        code = max(self._ask(job), key=abs)
        said = file.read_text(errors="replace")
        if expect is not None and code != expect:
            raise CommandError(
                f"{self.folder}: {module} {' '.join(arguments)} ended with {code}, not"
                f" {expect}:\n{said[-3000:]}"
            )
        return code, said

    def run_apart(self, module: str, *arguments: str) -> None:
        """Run `python -m MODULE ARGUMENTS` in a new interpreter, not a fork.

        Raises:
            CommandError: the exit code is not 0.
        """
        self.say(f"{module} {' '.join(arguments)}, in a new interpreter")
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CommandError(
                f"{self.folder}: {module} ended with"
                f" {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
            )

    def say(self, line: str) -> None:
        """Report what this side does now."""
        self._say(f"{self.folder.name}: {line}")

    def train(
        self,
        output: str,
        *settings: str,
        ranks: int = 1,
        data: str = "prepared",
        expect: int | None = 0,
    ) -> Path:
        """Train with the tiny recipe; return the output folder."""
        self.run(
            "canvastune.train", *training(output, *settings, data=data), ranks=ranks, expect=expect
        )
        return self.folder / output

    def _ask(self, job: dict[str, Any] | None) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        if job is not None:
            self._server.stdin.write(json.dumps(job) + "\n")
            self._server.stdin.flush()
        line = self._server.stdout.readline()
        if not line:
            raise CommandError(
                f"{self._tree}: the program does not"
                f" start:\n{(self.logs / 'start').read_text()[-3000:]}"
            )
        return json.loads(line)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()


def training(output: str, *settings: str, data: str = "prepared") -> list[str]:
    """Return the arguments of canvastune.train."""
    changed = [part for setting in settings for part in ("--set", setting)]
    return ["-c", "recipe.yaml", "--data", data, "--output", output, *changed]


def options_of_commands(side: Side) -> dict[str, list[str]]:
    """Return the options and positional arguments of every command, and the list of subcommands."""
    _, main_help = side.run("pipelines.cli", "--help")
    found = {
        "canvastune": snapshot.command_options(main_help),
        "canvastune COMMAND": snapshot.subcommands(main_help),
    }
    for command in found["canvastune COMMAND"]:
        found[f"canvastune {command}"] = snapshot.command_options(
            side.run("pipelines.cli", command, "--help")[1]
        )
    for module in ("canvastune.train", "canvastune.evaluate"):
        found[module] = snapshot.command_options(side.run(module, "--help")[1])
    return found


def exit_codes(side: Side) -> dict[str, int]:
    """Return the exit code of every case of `snapshot.exit_code_cases`."""
    cases = snapshot.exit_code_cases().items()
    return {
        name: side.run(module, *arguments, expect=None)[0] for name, (module, arguments) in cases
    }


def prepared_forms(side: Side) -> dict[str, dict[str, list[str]]]:
    """Prepare rows in every form and return the prepared rows."""
    found = {}
    for form, rows in snapshot.form_rows().items():
        snapshot.write_rows(side.folder / "rows.jsonl", rows)
        settings = [part for setting in snapshot.form_settings(form) for part in ("--set", setting)]
        side.run("pipelines.cli", "prepare", "recipe.yaml", "--output", f"forms/{form}", *settings)
        found[form] = snapshot.prepared_rows(side.folder / "forms" / form)
    return found


def interrupted(run: Path, copy: Path, step: int) -> None:
    """Copy a run to the state after a kill right after the checkpoint of a step."""
    newest = f"step-{step:06d}"
    later = [folder.name for folder in (run / "checkpoints").iterdir() if folder.name > newest]
    kept_out = shutil.ignore_patterns(
        "result.json", "adapter", "model", "provenance.json", "config.yaml", ".lock", *later
    )
    shutil.copytree(run, copy, ignore=kept_out)
    lines = (copy / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text(
        "".join(line for line in lines if json.loads(line)["step"] <= step), encoding="utf-8"
    )
