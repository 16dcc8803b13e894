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

    def __init__(self, accept: list[str]) -> None:
        self.rows: list[tuple[str, int, list[str], list[str]]] = []
        self._accept = accept

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

    comparison = Comparison(options.accept)
    with _folder(options.keep) as work, _worktree(options.base, work / "tree") as tree:
        shared = work / "shared"
        with Side(tree, work / "base", say) as base, Side(ROOT, work / "now", say) as now:
            _compare_inputs(base, now, shared, comparison)
            _compare_commands(base, now, comparison)
            ranks = [count for count in options.ranks if count < 4 or not options.quick]
            for method in options.methods:
                for count in ranks:
                    _compare_training(base, now, method, count, comparison)
            _compare_torchrun(base, now, comparison, say)
            _compare_stopping(base, now, comparison, say)
            if not options.quick:
                _compare_pipeline(base, now, comparison, say)
        print(f"\n{comparison}\n{time.monotonic() - started:.0f} s, base {options.base}")
    return int(comparison.failed)


def _compare_inputs(base: Side, now: Side, shared: Path, comparison: Comparison) -> None:
    """Compare the tiny model and the prepared data, then let both trees use those of the base."""
    for each in (base, now):
        each.run("pipelines.cli", "make-tiny-model", "model")
        each.run("pipelines.cli", "prepare", "recipe.yaml", "--output", "prepared")
    _both(
        comparison,
        "tiny model: files",
        base,
        now,
        lambda s: snapshot.file_hashes(s.folder / "model"),
    )
    _both(
        comparison,
        "prepared: rows",
        base,
        now,
        lambda s: snapshot.prepared_rows(s.folder / "prepared"),
    )
    _both(
        comparison,
        "prepared: files, byte for byte",
        base,
        now,
        lambda s: snapshot.file_hashes(s.folder / "prepared"),
    )
    _both(
        comparison,
        "prepared: file names",
        base,
        now,
        lambda s: snapshot.file_names(s.folder / "prepared"),
    )
    _both(
        comparison,
        "prepared: keys",
        base,
        now,
        lambda s: snapshot.artifact_keys(s.folder / "prepared"),
    )
    _both(comparison, "prepared: every form", base, now, sides.prepared_forms)
    shared.mkdir()
    for name in ("model", "prepared"):
        (base.folder / name).rename(shared / name)
        shutil.rmtree(now.folder / name)
        for each in (base, now):
            (each.folder / name).symlink_to(shared / name)


def _compare_commands(base: Side, now: Side, comparison: Comparison) -> None:
    _both(comparison, "options of every command", base, now, sides.options_of_commands)
    _both(comparison, "exit codes", base, now, sides.exit_codes)
    for each in (base, now):
        each.run("pipelines.cli", "compile", "-o", "compiled.yaml")
    _both(
        comparison,
        "pipeline: parameters and artifacts",
        base,
        now,
        lambda s: snapshot.pipeline_names(s.folder / "compiled.yaml"),
    )


def _compare_training(
    base: Side, now: Side, method: str, ranks: int, comparison: Comparison
) -> None:
    what = f"{method}, {ranks} rank{'s' * (ranks > 1)}"
    experts = min(ranks, 2) if method == "lora" else ranks  # other layouts, too
    settings = (*snapshot.METHODS[method], f"parallel.ep={experts}")
    output = f"{method}-{ranks}"
    for each in (base, now):
        each.train(output, *settings, ranks=ranks)
    _both(comparison, f"{what}: losses", base, now, lambda s: snapshot.losses(s.folder / output))
    _both(comparison, f"{what}: weights", base, now, lambda s: _weights(s.folder / output))
    _both(
        comparison,
        f"{what}: checkpoint",
        base,
        now,
        lambda s: snapshot.tensor_hashes(s.folder / output / "checkpoints/step-000002"),
    )
    _both(
        comparison,
        f"{what}: file names",
        base,
        now,
        lambda s: snapshot.file_names(s.folder / output),
    )
    _both(
        comparison, f"{what}: keys", base, now, lambda s: snapshot.artifact_keys(s.folder / output)
    )
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


def _compare_torchrun(
    base: Side, now: Side, comparison: Comparison, say: Callable[[str], object]
) -> None:
    """Compare runs under torchrun itself: the other runs are forks of one process."""
    for each in (base, now):
        say(f"{each.folder.name}: torchrun --nproc-per-node=2")
        line = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "canvastune.train",
        ]
        command = [
            sys.executable,
            *line,
            *sides.training("torchrun", "train.method=full", "parallel.ep=2"),
        ]
        done = subprocess.run(
            command,
            cwd=each.folder,
            env=each.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CommandError(
                f"{each.folder}: torchrun ended with {done.returncode}:\n{done.stderr[-3000:]}"
            )
    _both(
        comparison,
        "torchrun, 2 ranks: losses",
        base,
        now,
        lambda s: snapshot.losses(s.folder / "torchrun"),
    )
    _both(
        comparison,
        "torchrun, 2 ranks: weights",
        base,
        now,
        lambda s: _weights(s.folder / "torchrun"),
    )


def _compare_stopping(
    base: Side, now: Side, comparison: Comparison, say: Callable[[str], object]
) -> None:
    """Compare runs that SIGTERM stops, and resume the run of the base with this tree."""
    settings = ("train.method=lora", "parallel.ep=1", "train.steps=12", "train.validate_every=100")
    codes = []
    for each in (base, now):
        say(f"{each.folder.name}: SIGTERM in the middle of 12 steps")
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


def _compare_pipeline(
    base: Side, now: Side, comparison: Comparison, say: Callable[[str], object]
) -> None:
    """Compare `canvastune run`, from the rows to the report."""
    for each in (base, now):
        say(f"{each.folder.name}: canvastune run")
        settings = [
            f"model.id={each.folder / 'model'}",
            f"data.source={each.folder / 'problems.jsonl'}",
        ]
        settings += ["parallel.nproc_per_node=2", "parallel.ep=2", "tracking.registered_model=tiny"]
        changed = [part for setting in settings for part in ("--set", setting)]
        command = [
            sys.executable,
            "-m",
            "pipelines.cli",
            "run",
            "recipe.yaml",
            "--run-name",
            "whole",
            *changed,
        ]
        done = subprocess.run(
            command,
            cwd=each.folder,
            env=each.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise CommandError(
                f"{each.folder}: canvastune run ended with"
                f" {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
            )
    run = Path("workspace/runs/whole")
    _both(comparison, "run: losses", base, now, lambda s: snapshot.losses(s.folder / run / "train"))
    _both(
        comparison,
        "run: adapter and merged model",
        base,
        now,
        lambda s: _weights(s.folder / run / "train") | _weights(s.folder / run),
    )
    _both(comparison, "run: file names", base, now, lambda s: snapshot.file_names(s.folder / run))
    _both(comparison, "run: keys", base, now, lambda s: snapshot.artifact_keys(s.folder / run))
    _both(
        comparison,
        "run: steps' artifacts, keys",
        base,
        now,
        lambda s: step_artifacts(s.folder / "workspace"),
    )
    _both(
        comparison,
        "run: names in MLflow",
        base,
        now,
        lambda s: snapshot.mlflow_names(s.folder / "workspace/mlflow.db"),
    )


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


def _both(
    comparison: Comparison, what: str, base: Side, now: Side, look: Callable[[Side], Any]
) -> None:
    comparison.compare(what, look(base), look(now))


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
