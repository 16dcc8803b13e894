"""`python -m benchmarks.peers PEERS_FOLDER [SHAPE ...]`: our training step next to the released code
of NeMo AutoModel, TRL and Unsloth, on the same weights, batch, noise, blocks and coins.

Each side is a process with two threads, float32, that takes its turn with the others; a step is
forward and backward, batch preparation included. Per shape: the loss and every gradient against
ours, FLOPs that ran, seconds and memory in addition to weights and gradients, with and without
checkpointing. None of the peers' code is in this project. What PEERS_FOLDER has to hold:

  python -m pip install --no-deps --target PEERS_FOLDER \\
      nemo-automodel==0.7.0 unsloth==2026.10.9 torchao==0.18.0 torchdata==0.11.0
  git -C A_CLONE_OF_huggingface/trl show \\
      f2cd57710:examples/scripts/sft_diffusion_gemma.py > PEERS_FOLDER/sft_diffusion_gemma.py

TRL itself is one of this project's development packages. Without a SHAPE, writes
benchmarks/results/peers.json.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import step
from benchmarks.engine import bench_recipe
from benchmarks.measure import (
    ROOT,
    alternate,
    cache_rate,
    command_parser,
    matmul_rate,
    one_of,
    say,
    worker,
    write_result,
)
from benchmarks.step import THREADS, Shape, made_examples
from benchmarks.synthetic_checkpoint import write_synthetic
from canvastune.data.packing import pack
from canvastune.perf_model.architecture import read_architecture
from canvastune.perf_model.flops import needed_flops

WORKER = ROOT / "benchmarks" / "instruments" / "peer_worker.py"
QUIET = {  # of what libraries say that has nothing to do with a measurement
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
}
PACKAGES = {
    "nemo_automodel": "0.7.0",
    "unsloth": "2026.10.9",
    "torchao": "0.18.0",
    "torchdata": "0.11.0",
}
EXAMPLE, EXAMPLE_COMMIT = "sft_diffusion_gemma.py", "f2cd57710"
EXAMPLE_BLOB = "56f8ecdfdb8958c5f0da0e603f238576e99c921c"  # its id in that commit
SHAPES = step.SHAPES | {
    # The rows of `benchmarks.step` cost NeMo's step over 9 GB.
    "ragged": Shape(
        "lengths from 64 to 512",
        step.SHAPES["short"].model,
        ((48, 16), (160, 96), (300, 212)),
    )
}
DEFAULT = ("short", "long", "ragged")
ROUNDS = 5  # a peer's steps differ by a third from each other
PEERS = {"nemo": "NeMo AutoModel", "trl": "TRL", "unsloth": "Unsloth"}
SIDES = ("ours", *PEERS)
MODES = {"kept": False, "checkpointed": True}  # whether layers are computed again
GOALS = {"nemo": 2.5, "trl": 2.0, "unsloth": 2.0}  # times as fast on short answers, all kept
EXACT = 1e-5  # of the gradient's norm
OTHER_LOSS = {"trl"}  # its window of a sliding layer ends elsewhere: reported, and no error


def main() -> int:
    parser = command_parser("benchmarks.peers", __doc__)
    parser.add_argument("folder", type=Path, metavar="PEERS_FOLDER")
    parser.add_argument(
        "shapes",
        nargs="*",
        type=one_of(SHAPES),
        metavar="SHAPE",
        help=f"of {', '.join(SHAPES)}; default: {', '.join(DEFAULT)}",
    )
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help=f"timed steps of each side; default: {ROUNDS}"
    )
    chosen = parser.parse_args()
    if lacking := lacks(chosen.folder):
        parser.error(f"{chosen.folder} lacks {'; '.join(lacking)}. See --help")
    torch.set_num_threads(THREADS)
    rate, rows = matmul_rate(), {}
    for name in chosen.shapes or DEFAULT:
        rows[name] = measure(name, chosen.folder.resolve(), chosen.rounds)
        # The best that was seen: a floor is not raised by a slow moment.
        rate = max(rate, matmul_rate())
    result = {
        "versions": PACKAGES | {"trl": version("trl"), EXAMPLE: EXAMPLE_COMMIT},
        "matmul_flops_per_second": rate,
        "cache_bytes_per_second": cache_rate(),
        "shapes": rows,
    }
    for line in lines(result):
        say("peers", line)
    if not chosen.shapes:
        write_result("peers", result)
    return int(bool(missed(result)) or not exact(result))


def lacks(folder: Path) -> list[str]:
    """Return what a folder of peers lacks."""
    lacking = [
        f"{package} {wanted}"
        for package, wanted in PACKAGES.items()
        if not (folder / f"{package}-{wanted}.dist-info").is_dir()
    ]
    file = folder / EXAMPLE
    content = file.read_bytes() if file.is_file() else b""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False)
    if blob.hexdigest() != EXAMPLE_BLOB:
        lacking.append(f"{EXAMPLE} as of TRL's commit {EXAMPLE_COMMIT}")
    return lacking


def measure(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Measure all figures of a shape."""
    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        weights = Path(scratch) / "weights"
        write_synthetic(weights, shape.config())
        workers = {
            side: stack.enter_context(
                worker([str(WORKER), side, str(folder), str(weights), name], ROOT, QUIET)
            )
            for side in SIDES
        }
        checks = _check(workers, Path(scratch))
        apart = (f"{side} {checks[side]['gradient_difference']:.1e}" for side in PEERS)
        say("peers", f"{name}: gradients differ from ours by {', '.join(apart)}")
        for side, ask in workers.items():
            checks[side] |= ask({"do": "products"})
        modes: dict[str, Any] = {}
        for mode, checkpointed in MODES.items():
            modes[mode] = _measure_mode(workers, checkpointed, rounds)
            over = (f"over {peer} {_times(ratios(modes, mode, peer))}" for peer in PEERS)
            say("peers", f"{name}, {mode}: {', '.join(over)}")
        needed = needed_flops(
            read_architecture(bench_recipe(), weights), pack(*made_examples(shape))
        )
    return {
        "about": shape.about,
        "examples": shape.examples,
        "rounds": rounds,
        "flops_needed": needed,
        "checks": checks,
        **modes,
    }


def _check(workers: dict[str, Any], scratch: Path) -> dict[str, dict[str, float]]:
    """Compare each side's loss and gradients with ours, and count the FLOPs of its step."""
    found: dict[str, dict[str, float]] = {}
    expected: dict[str, torch.Tensor] = {}
    for side, ask in workers.items():
        file = scratch / f"{side}.safetensors"
        found[side] = ask({"do": "check", "gradients": str(file)})
        gradients = load_file(file)
        file.unlink()
        expected = expected or gradients  # ours are the first
        found[side]["gradient_difference"] = difference(gradients, expected)
    return found


def difference(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """|found - expected| / |expected| over all of them together."""
    if gradients.keys() != expected.keys():
        apart = sorted(gradients.keys() ^ expected.keys())
        raise ValueError(f"only one side has gradients of {apart}")
    off = sum(
        float((gradients[name] - value).square().sum(dtype=torch.float64))
        for name, value in expected.items()
    )
    total = sum(float(value.square().sum(dtype=torch.float64)) for value in expected.values())
    return math.sqrt(off / total)


def _measure_mode(
    workers: dict[str, Any], checkpointed: bool, rounds: int
) -> dict[str, dict[str, float]]:
    """Measure memory in a first step of each side, then seconds in turns, each of a step that
    follows another, as in training.
    """
    memory = {
        side: ask({"do": "memory", "checkpointed": checkpointed})["extra_memory_bytes"]
        for side, ask in workers.items()
    }
    request = {"do": "step", "checkpointed": checkpointed}
    steps = {side: functools.partial(ask, request) for side, ask in workers.items()}
    return {"seconds": alternate(steps, rounds, settle=True), "extra_memory_bytes": memory}


def ratios(row: dict[str, Any], mode: str, peer: str) -> dict[str, float]:
    """Return how many times faster and leaner our step is than a peer's."""
    seconds, memory = row[mode]["seconds"], row[mode]["extra_memory_bytes"]
    return {"faster": seconds[peer] / seconds["ours"], "leaner": memory[peer] / memory["ours"]}


def mean_ratios(result: dict[str, Any], mode: str, peer: str) -> dict[str, float]:
    """Return the geometric means of `ratios` over all shapes."""
    found = [ratios(row, mode, peer) for row in result["shapes"].values()]
    return {
        quantity: statistics.geometric_mean(each[quantity] for each in found)
        for quantity in ("faster", "leaner")
    }


def floor(result: dict[str, Any], row: dict[str, Any], peer: str) -> float:
    """Return how many times faster than a peer's a step would be that ran only the FLOPs that the
    loss needs, at the rate of a large matmul.
    """
    least: float = row["flops_needed"] / result["matmul_flops_per_second"]
    return float(row["kept"]["seconds"][peer]) / least


def missed(result: dict[str, Any]) -> dict[str, float]:
    """Return the ratios on short answers that miss their goal."""
    row = result["shapes"].get("short")
    if row is None:
        return {}
    found = {peer: ratios(row, "kept", peer)["faster"] for peer in GOALS}
    return {peer: ratio for peer, ratio in found.items() if ratio < GOALS[peer]}


def exact(result: dict[str, Any]) -> bool:
    """Return whether every side whose loss is ours has our gradients."""
    return all(
        check["gradient_difference"] < EXACT
        for row in result["shapes"].values()
        for side, check in row["checks"].items()
        if side not in OTHER_LOSS
    )


def lines(result: dict[str, Any]) -> list[str]:
    """Return the tables and the verdict, in Markdown."""
    return [*_seconds_table(result), "", *_checks_table(result), "", verdict(result)]


def _seconds_table(result: dict[str, Any]) -> list[str]:
    heads = ["shape", "layers", "ours", *PEERS.values()]
    table = [_row(heads), "|---" * len(heads) + "|"]
    for row in result["shapes"].values():
        for mode in MODES:
            figures = [
                f"{row[mode]['seconds'][side]:.2f} s, {row[mode]['extra_memory_bytes'][side] / 1e6:,.0f} MB"
                for side in SIDES
            ]
            over = [_times(ratios(row, mode, peer)) for peer in PEERS]
            cells = [f"{figure}: {times}" for figure, times in zip(figures[1:], over, strict=True)]
            table.append(_row([row["about"], mode, figures[0], *cells]))
    for mode in MODES:
        means = [_times(mean_ratios(result, mode, peer)) for peer in PEERS]
        table.append(_row(["geometric mean", mode, "", *means]))
    return table


def _times(ratio: dict[str, float]) -> str:
    return f"{ratio['faster']:.2f}x, {ratio['leaner']:.1f}x"


def _checks_table(result: dict[str, Any]) -> list[str]:
    heads = [
        *("shape", "step", "loss", "gradient differs by", "GFLOP executed", "relative to ours"),
        *(
            "GFLOP per second",
            "seconds in matrix products and attention",
            "each repeated by itself",
        ),
        "maximum speedup",
    ]
    table = [_row(heads), "|---" * len(heads) + "|"]
    for row in result["shapes"].values():
        for side, check in row["checks"].items():
            cells = [
                row["about"],
                PEERS.get(side, side),
                f"{check['loss']:.5f}",
                f"{check['gradient_difference']:.0e}" if side in PEERS else "",
                f"{check['flops'] / 1e9:.1f}",
                f"{check['flops'] / row['checks']['ours']['flops']:.2f}x",
                f"{check['flops'] / row['kept']['seconds'][side] / 1e9:.0f}",
                f"{check['products_seconds']:.2f}",
                f"{check['products_alone_seconds']:.2f}",
                f"{floor(result, row, side):.1f}x",
            ]
            table.append(_row(cells))
    return table


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def verdict(result: dict[str, Any]) -> str:
    """Say which goals are missed, and by how much."""
    if "short" not in result["shapes"]:
        return "The goals are for short answers."
    found = missed(result)
    if not found:
        return "Every ratio on short answers reaches its goal."
    row = result["shapes"]["short"]
    seconds, ours = row["kept"]["seconds"], row["checks"]["ours"]
    named = ", ".join(
        f"{ratio:.2f}x over {PEERS[peer]} (goal {GOALS[peer]}x: a step in"
        f" {seconds[peer] / GOALS[peer]:.2f} s, {GOALS[peer] / floor(result, row, peer):.0%} of the"
        " matmul rate)"
        for peer, ratio in found.items()
    )
    least = ours["other_bytes"] / result["cache_bytes_per_second"]
    limits = ", ".join(
        f"at most {seconds[peer] / (ours['products_alone_seconds'] + least):.2f}x as fast as {PEERS[peer]}'s"
        for peer in found
    )
    return (
        f"Goals missed on short answers: {named}. The percentage is the fraction of a large matmul's"
        " rate at which the needed FLOPs would have to run to reach the goal; our step runs them"
        f" at {1 / floor(result, row, 'ours'):.0%}. Matrix products and attention, without norms,"
        f" softmax and moving rows, take {ours['products_seconds']:.2f} s of its"
        f" {seconds['ours']:.2f} s; each of them repeated by itself, with its operands in the caches,"
        f" {ours['products_alone_seconds']:.2f} s. The other operations read and write"
        f" {ours['other_bytes'] / 1e9:.1f} GB, at least {least:.2f} s at the"
        f" {result['cache_bytes_per_second'] / 1e9:.0f} GB/s of a product of elements in the caches."
        f" With both, this step could be {limits}."
    )


if __name__ == "__main__":
    sys.exit(main())
