"""`python -m benchmarks.startup [--baseline CHECKOUT] [--rounds 5] [--demo]`: what starting costs.

Seconds and peak memory of `canvastune plan` and `--help`; seconds of each step of a small local run
in addition to its work, which is measured in one process that has imported everything. With
--baseline the same is measured of another checkout, in turn; --demo adds `canvastune demo`, minutes
on each side. Writes benchmarks/results/startup.json.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, command_parser, commit_of, say, write_result
from benchmarks.pipeline import STEPS, run_once, write_recipe
from canvastune.checkpoint.hub import resolve_model
from canvastune.config import parse_config
from canvastune.distributed.processes import start_processes
from canvastune.evaluation.run import evaluate
from canvastune.io.provenance import local_inputs
from canvastune.merge import merge_lora
from canvastune.planner.planner import SHIPPED_CONFIG, make_plan, write_plan
from canvastune.preparation.prepare import prepare_data
from canvastune.report.build import build_report
from canvastune.tiny_model import make_tiny_model, write_problems
from canvastune.training.devices import select_device
from canvastune.training.run import train
from components.run_artifacts import find_run
from components.run_directory import read_record
from pipelines.warm_start.server import JOBS

GOALS = {"plan_seconds": 1.0, "plan_megabytes": 100.0, "step_overhead": 10.0, "demo": 2.5}
RECIPE = "pipelines/recipes/gsm8k_lora.yaml"  # of a checkout


def main() -> int:
    parser = command_parser("benchmarks.startup", __doc__)
    parser.add_argument("--baseline", type=Path, help="another checkout of this repository")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--demo", action="store_true")
    options = parser.parse_args()
    checkouts = {"ours": ROOT}
    if options.baseline is not None:
        checkouts["baseline"] = options.baseline.resolve()
    with tempfile.TemporaryDirectory(prefix="benchmark-startup-") as folder:
        work = Path(folder)
        result: dict[str, Any] = {
            "rounds": options.rounds,
            "baseline": commit_of(options.baseline) if options.baseline else None,
            "commands": _commands(checkouts, work, options.rounds),
            "imports": _imports(),
            "pipeline": _pipeline(checkouts, work, options.rounds),
        }
        if options.demo:
            result["demo"] = {
                name: _measured(["demo"], checkout, _folder(work / f"demo-{name}"))["seconds"]
                for name, checkout in checkouts.items()
            }
    write_result("startup", result)
    print("\n".join(lines(result)))
    return 0


def lines(result: Mapping[str, Any]) -> list[str]:
    """Return the rows of a table: what, ours, the baseline, and how many times ours."""

    def row(what: str, ours: float | None, baseline: float | None, form: str) -> str:
        shown = [form.format(each) if each is not None else "" for each in (ours, baseline)]
        ratio = f"{baseline / ours:.1f}x" if baseline and ours and ours > 0 else ""
        return f"| {what} | {' | '.join(shown)} | {ratio} |"

    rows = []
    for name, sides in result["commands"].items():
        for unit, key in (("s", "seconds"), ("MB", "megabytes")):
            ours, other = sides["ours"][key], sides.get("baseline", {}).get(key)
            what = f"`canvastune {name}`" if name == "plan" else "`canvastune` with `--help`"
            rows.append(row(what, ours, other, f"{{:.2f}} {unit}"))
    pipeline = result["pipeline"]
    for step in STEPS:
        ours, other = (pipeline["overhead"].get(side, {}).get(step) for side in _SIDES)
        what = f"step `{step}`, without its {pipeline['work'].get(step, 0.0):.2f} s of work"
        rows.append(row(what, ours, other, "{:.2f} s"))
    ours, other = (
        sum(pipeline["overhead"][side].values()) if side in pipeline["overhead"] else None
        for side in _SIDES
    )
    rows.append(row("all steps, without their work", ours, other, "{:.1f} s"))
    totals = {"a small run": pipeline["seconds"], "`canvastune demo`": result.get("demo", {})}
    for what, sides in totals.items():
        if sides:
            rows.append(row(what, sides["ours"], sides.get("baseline"), "{:.0f} s"))
    return rows


_SIDES = ("ours", "baseline")


def least_wait(result: Mapping[str, Any]) -> float:
    """Return the seconds that the step `train` waits at least, wherever steps are imported.

    A rank needs its libraries in one interpreter, which imports them on one processor; the step
    begins after what the command and the steps before it take.
    """
    begins = result["pipeline"]["begins"]["ours"]["train"]
    return float(result["imports"]["rank"] - begins)


def _commands(checkouts: Mapping[str, Path], work: Path, rounds: int) -> dict[str, Any]:
    """Measure commands that import, or compute, next to nothing."""
    model = _folder(work / "released")
    shutil.copy(SHIPPED_CONFIG, model / "config.json")  # the Hub's answer takes any time
    measured: dict[str, dict[str, list[dict[str, float]]]] = {}
    for number in range(rounds + 1):
        for name in ("plan", "--help"):
            for side, checkout in checkouts.items():
                plan = ["plan", str(checkout / RECIPE), "--set", f"model.id={model}"]
                command = plan if name == "plan" else [name]
                found = _measured(command, checkout, work)
                if number:  # the first run compiles, and fills the disk's cache
                    measured.setdefault(name, {}).setdefault(side, []).append(found)
    say("startup", "commands measured")
    return {
        name: {
            side: {
                key: statistics.median(each[key] for each in runs)
                for key in ("seconds", "megabytes")
            }
            for side, runs in sides.items()
        }
        for name, sides in measured.items()
    }


def _measured(command: Sequence[str], checkout: Path, folder: Path) -> dict[str, float]:
    """Run a command of a checkout: its seconds, and the peak memory of that process."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as output:
        ended = subprocess.run(
            [sys.executable, "-S", "-c", _WAIT, sys.executable, "-m", "pipelines.cli", *command],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            check=True,
        )
        found: dict[str, float] = json.loads(ended.stdout)
        if found.pop("code"):
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} of {checkout} failed:\n{output.read()}")
    return found


# In a small process: Linux counts the memory of the one that starts a command as the command's.
_WAIT = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=2)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - started
code = os.waitstatus_to_exitcode(status)
print(json.dumps({"code": code, "seconds": seconds, "megabytes": usage.ru_maxrss * 1024 / 1e6}))
"""


def _imports() -> dict[str, float]:
    """Return by step the processor seconds after which its server has its libraries; "rank": after
    which an interpreter has those of a rank, and no others.
    """
    found: dict[str, float] = {}
    for jobs in (*JOBS, "rank"):
        ended = subprocess.run(
            [sys.executable, "-c", _IMPORT, jobs],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT), "_KFP_RUNTIME": "true"},
            check=True,
        )
        found |= json.loads(ended.stdout)
    return found


_IMPORT = """
import gc, json, sys, time
from pipelines.warm_start import server
gc.disable()
ready = {}
jobs = {job: modules for found in server.JOBS.values() for job, modules in found.items()}
for job, modules in server.JOBS.get(sys.argv[1], {"rank": jobs["canvastune.train"]}).items():
    for module in modules:
        server.import_module(module)
    ready[job] = time.process_time()
print(json.dumps(ready))
"""


def _pipeline(checkouts: Mapping[str, Path], work: Path, rounds: int) -> dict[str, Any]:
    """Run a small pipeline on each side, and compare each step with its work."""
    make_tiny_model(work / "base")
    write_problems(work / "problems.jsonl", "compare", 1000, seed=0)
    recipe = write_recipe(work)
    walls: dict[str, list[dict[str, float]]] = {side: [] for side in checkouts}
    begins: dict[str, list[dict[str, float]]] = {side: [] for side in checkouts}
    seconds: dict[str, list[float]] = {side: [] for side in checkouts}
    for number in range(rounds):
        for side, checkout in checkouts.items():
            run = run_once(recipe, work / f"{side}-{number}", checkout)
            walls[side].append(run["steps"])
            begins[side].append(run["begins"])
            seconds[side].append(run["seconds"])
            say("startup", f"round {number + 1}, {side}: {run['seconds']:.1f} s")
    done = _work(next((work / "ours-0" / "runs").glob("overhead-*")), work)
    return {
        "seconds": {side: statistics.median(found) for side, found in seconds.items()},
        "work": done,
        "steps": {side: _medians(found) for side, found in walls.items()},
        "begins": {side: _medians(found) for side, found in begins.items()},
        "overhead": {
            side: {step: wall - done.get(step, 0.0) for step, wall in _medians(found).items()}
            for side, found in walls.items()
        },
    }


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {step: statistics.median(run[step] for run in runs) for step in STEPS}


def _work(run: Path, work: Path) -> dict[str, float]:
    """Time what the steps of a finished run did, here, the second time that it is done."""
    record = read_record(run)
    assert record is not None
    config, tuned = parse_config(record.config), run / "model"
    base, data = resolve_model(config.model), work / "work-data"
    assert local_inputs(config.source_keys)
    steps: dict[str, Callable[[Path], object]] = {
        "prepare_data": lambda out: prepare_data(config, base, out),
        "plan": lambda out: write_plan(make_plan(config, base, config.world_size), config, out),
        "train": lambda out: train(config, data, out),
        "merge_lora": lambda out: merge_lora(config, base, run / "train" / "adapter", out),
        "evaluate": lambda out: evaluate(config, data, base, tuned, out),
        "report": lambda out: build_report(find_run(run), out, []),
    }
    prepare_data(config, base, data)
    found: dict[str, float] = {}
    start_processes(select_device)  # the trainer's, of which this one is the only one
    for name, do in steps.items():
        do(work / f"work-{name}-1")
        started = time.perf_counter()
        do(work / f"work-{name}-2")
        found[name] = time.perf_counter() - started
    return found


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


if __name__ == "__main__":
    sys.exit(main())
