"""Compare this tree with another commit: the same commands must give the same bits, files, keys and
exit codes.

    python -m tools.loss_compare --base REV                  # everything: about ten minutes on two
    cores
    python -m tools.loss_compare --base REV --quick          # one rank and two, no pipeline: about
    three

REV is checked out into a temporary git worktree. Both trees train a tiny model of REV on data that
REV prepared,
in float32: full, LoRA and expert LoRA, on each number of ranks. `tools/loss_compare/snapshot.py`
lists what is compared; floats
are compared bit for bit. Runs of REV that were stopped after a checkpoint are resumed by this tree
and must end
with REV's weights.

Exit code 1 if anything differs, except the intended differences that --accept matches.
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tools.loss_compare import side as sides
from tools.loss_compare import snapshot
from tools.loss_compare.side import CommandError, Side

ROOT = Path(__file__).parents[2]
_STOPPED_AT = 2  # step of the checkpoint that the interrupted runs have
_WORDS = {"ok": "same", "accepted": "differs, accepted", "bad": "DIFFERS"}


class Comparison:
    """Rows of the result table."""

    def __init__(self, base: Side, now: Side, accept: list[str]) -> None:
        self.rows: list[tuple[str, int, list[str], list[str]]] = []
        self.base, self.now = base, now
        self._accept = accept

    def of_sides(self, what: str, look: Callable[[Side], Any]) -> None:
        """Add a row: compare what a function returns for each side."""
        self.compare(what, look(self.base), look(self.now))

    def of_files(self, what: str, look: Callable[[Path], Any], path: str) -> None:
        """Add a row: compare what a function returns for a path in each side's folder."""
        self.of_sides(what, lambda side: look(side.folder / path))

    def compare(self, what: str, base: Any, now: Any) -> None:
        """Add a row: compare nested values leaf by leaf, floats bit for bit."""
        before, after = dict(_leaves(base)), dict(_leaves(now))
        found = [
            f"{what}: {key}: {_told(before, key)} -> {_told(after, key)}"
            for key in before | after
            if _differ(before, after, key)
        ]
        accepted = [
            line
            for line in found
            if any(fnmatch.fnmatch(line, pattern) for pattern in self._accept)
        ]
        self.rows.append(
            (what, len(before), accepted, [line for line in found if line not in accepted])
        )
        print(f"  {self._verdict(self.rows[-1])}: {what}", flush=True)

    @property
    def failed(self) -> bool:
        """Whether any row differs."""
        return any(bad for *_, bad in self.rows)

    def __str__(self) -> str:
        width = max(len(what) for what, *_ in self.rows)
        lines = [
            f"{what:{width}}  {values:6d} values  {self._verdict(row)}"
            for row in self.rows
            for what, values, *_ in [row]
        ]
        for _, _, accepted, bad in self.rows:
            lines += [f"accepted: {line}" for line in accepted[:20]]
            lines += [f"difference: {line}" for line in bad[:20]]
            lines += [f"... and {len(bad) - 20} more"] * (len(bad) > 20)
        return "\n".join(lines)

    @staticmethod
    def _verdict(row: tuple[str, int, list[str], list[str]]) -> str:
        _, values, accepted, bad = row
        return _WORDS["bad" if bad or not values else "accepted" if accepted else "ok"]


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:4.0f} s] {line}", flush=True)

    with _folder(options.keep) as work, _worktree(options.base, work / "tree") as tree:
        with Side(tree, work / "base", say) as base, Side(ROOT, work / "now", say) as now:
            comparison = Comparison(base, now, options.accept)
            _compare_inputs(comparison, work / "shared")
            _compare_commands(comparison)
            ranks = [count for count in options.ranks if count < 4 or not options.quick]
            for method in options.methods:
                for count in ranks:
                    _compare_training(comparison, method, count)
            _compare_torchrun(comparison)
            _compare_stopping(comparison)
            if not options.quick:
                _compare_pipeline(comparison)
        print(f"\n{comparison}\n{time.monotonic() - started:.0f} s, base {options.base}")
    return int(comparison.failed)


def _compare_inputs(comparison: Comparison, shared: Path) -> None:
    """Compare the tiny model and the prepared data, then let both trees use those of the base."""
    base, now = comparison.base, comparison.now
    for each in (base, now):
        each.run("pipelines.cli", "make-tiny-model", "model")
        each.run("pipelines.cli", "prepare", "recipe.yaml", "--output", "prepared")
    comparison.of_files("tiny model: files", snapshot.file_hashes, "model")
    comparison.of_files("prepared: rows", snapshot.prepared_rows, "prepared")
    comparison.of_files("prepared: files, byte for byte", snapshot.file_hashes, "prepared")
    comparison.of_files("prepared: file names", snapshot.file_names, "prepared")
    comparison.of_files("prepared: keys", snapshot.artifact_keys, "prepared")
    comparison.of_sides("prepared: every form", sides.prepared_forms)
    shared.mkdir()
    for name in ("model", "prepared"):
        (base.folder / name).rename(shared / name)
        shutil.rmtree(now.folder / name)
        for each in (base, now):
            (each.folder / name).symlink_to(shared / name)


def _compare_commands(comparison: Comparison) -> None:
    comparison.of_sides("options of every command", sides.options_of_commands)
    comparison.of_sides("exit codes", sides.exit_codes)
    for each in (comparison.base, comparison.now):
        each.run("pipelines.cli", "compile", "-o", "compiled.yaml")
    comparison.of_files(
        "pipeline: parameters and artifacts", snapshot.pipeline_names, "compiled.yaml"
    )


def _compare_training(comparison: Comparison, method: str, ranks: int) -> None:
    base, now = comparison.base, comparison.now
    what = f"{method}, {ranks} rank{'s' * (ranks > 1)}"
    experts = min(ranks, 2) if method == "lora" else ranks  # other layouts, too
    settings = (*snapshot.METHODS[method], f"parallel.ep={experts}")
    output = f"{method}-{ranks}"
    for each in (base, now):
        each.train(output, *settings, ranks=ranks)
    comparison.of_files(f"{what}: losses", snapshot.losses, output)
    comparison.of_files(f"{what}: weights", _weights, output)
    checkpoint = f"{output}/checkpoints/step-000002"
    comparison.of_files(f"{what}: checkpoint", snapshot.tensor_hashes, checkpoint)
    comparison.of_files(f"{what}: file names", snapshot.file_names, output)
    comparison.of_files(f"{what}: keys", snapshot.artifact_keys, output)
    resumed = f"{output}-resumed"
    sides.interrupted(base.folder / output, now.folder / resumed, _STOPPED_AT)
    now.run("canvastune.train", *sides.training(resumed, *settings), ranks=ranks)
    expected = (
        _weights(base.folder / output),
        snapshot.losses(base.folder / output),
        [_STOPPED_AT],
    )
    found = (
        _weights(now.folder / resumed),
        snapshot.losses(now.folder / resumed),
        snapshot.resumed_from(now.folder / resumed),
    )
    comparison.compare(f"{what}: base's checkpoint resumed", expected, found)


def _compare_torchrun(comparison: Comparison) -> None:
    """Compare runs under torchrun itself: the other runs are forks of one process."""
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")
    training = sides.training("torchrun", "train.method=full", "parallel.ep=2")
    for each in (comparison.base, comparison.now):
        each.run_apart(*torchrun, "-m", "canvastune.train", *training)
    comparison.of_files("torchrun, 2 ranks: losses", snapshot.losses, "torchrun")
    comparison.of_files("torchrun, 2 ranks: weights", _weights, "torchrun")


def _compare_stopping(comparison: Comparison) -> None:
    """Compare runs that SIGTERM stops, and resume the run of the base with this tree."""
    base, now = comparison.base, comparison.now
    settings = ("train.method=lora", "parallel.ep=1", "train.steps=12", "train.validate_every=100")
    codes = []
    for each in (base, now):
        each.say("SIGTERM in the middle of 12 steps")
        command = [sys.executable, "-m", "canvastune.train", *sides.training("stopped", *settings)]
        process = subprocess.Popen(
            command, cwd=each.folder, env=each.environment, stderr=subprocess.DEVNULL
        )
        metrics = each.folder / "stopped" / "metrics.jsonl"
        while process.poll() is None and not (
            metrics.is_file() and '"step": 3,' in metrics.read_text()
        ):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        codes.append(process.wait())
    comparison.compare("exit code after SIGTERM", codes[0], codes[1])
    shutil.copytree(base.folder / "stopped", now.folder / "stopped-by-base")
    through = base.train("whole", *settings)
    resumed = now.train("stopped-by-base", *settings)
    comparison.compare(
        "base's run, stopped by SIGTERM and resumed", _weights(through), _weights(resumed)
    )
    again = [
        each.run("canvastune.train", *sides.training(name, *settings))[0]
        for each, name in ((base, "whole"), (now, "stopped-by-base"))
    ]
    comparison.compare("exit code of the finished run's command", *again)


def _compare_pipeline(comparison: Comparison) -> None:
    """Compare `canvastune run`, from the rows to the report."""
    for each in (comparison.base, comparison.now):
        settings = [
            f"model.id={each.folder / 'model'}",
            f"data.source={each.folder / 'problems.jsonl'}",
        ]
        settings += ["parallel.nproc_per_node=2", "parallel.ep=2", "tracking.registered_model=tiny"]
        changed = [part for setting in settings for part in ("--set", setting)]
        each.run_apart("pipelines.cli", "run", "recipe.yaml", "--run-name", "whole", *changed)
    run = "workspace/runs/whole"
    comparison.of_files("run: losses", snapshot.losses, f"{run}/train")
    comparison.of_files(
        "run: adapter and merged model", lambda path: _weights(path / "train") | _weights(path), run
    )
    comparison.of_files("run: file names", snapshot.file_names, run)
    comparison.of_files("run: keys", snapshot.artifact_keys, run)
    comparison.of_files("run: steps' artifacts, keys", step_artifacts, "workspace")
    comparison.of_files("run: names in MLflow", snapshot.mlflow_names, "workspace/mlflow.db")


def step_artifacts(workspace: Path) -> dict[str, list[str]]:
    """Return the keys of the artifacts of each pipeline step, for a workspace with one job."""
    (job,) = (workspace / "kfp").glob("[!.]*")  # next to the local runner's cache
    return snapshot.artifact_keys(job)


def _weights(run: Path) -> dict[str, str]:
    exported = [folder for folder in (run / "adapter", run / "model") if folder.is_dir()]
    return {
        f"{folder.name}/{name}": digest
        for folder in exported
        for name, digest in snapshot.tensor_hashes(folder).items()
    }


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _leaves(below, f"{prefix}/{key}" if prefix else str(key))
    elif isinstance(value, list | tuple) and not all(isinstance(item, str) for item in value):
        for index, below in enumerate(value):
            yield from _leaves(below, f"{prefix}[{index}]")
    elif isinstance(
        value, list | tuple
    ):  # names: report what was added or removed, not what moved up
        for item in value:
            yield f"{prefix}: {item}", True
    else:
        yield prefix, float.hex(value) if isinstance(value, float) else value


def _differ(before: dict[str, Any], after: dict[str, Any], key: str) -> bool:
    return key not in before or key not in after or before[key] != after[key]


def _told(leaves: dict[str, Any], key: str) -> str:
    if key not in leaves:
        return "missing"
    value = leaves[key]
    return (
        f"{float.fromhex(value)!r}"
        if isinstance(value, str) and value.startswith(("0x1.", "-0x1."))
        else str(value)
    )


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        keep.mkdir(parents=True)
        yield keep.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="loss-compare-") as folder:
        yield Path(folder).resolve()


@contextlib.contextmanager
def _worktree(revision: str, folder: Path) -> Iterator[Path]:
    git = ["git", "-C", str(ROOT), "worktree"]
    subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision], check=True)
    try:
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], check=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "tools.loss_compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--base",
        required=True,
        metavar="REV",
        help="commit, tag or branch to compare this tree with",
    )
    parser.add_argument(
        "--ranks", nargs="+", type=int, default=[1, 2, 4], metavar="N", help="(default: 1 2 4)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=list(snapshot.METHODS), default=list(snapshot.METHODS)
    )
    parser.add_argument("--quick", action="store_true", help="1 and 2 ranks, no whole pipeline")
    parser.add_argument(
        "--accept",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help="differences that were meant, as `*: lora.*: missing -> *`",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="keep everything in a new folder, with a log of every command",
    )
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommandError as error:
        sys.exit(f"loss_compare: {error}")
