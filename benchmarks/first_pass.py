"""`python -m benchmarks.first_pass`: pass 1 of self-conditioning in three forms, each on one rank
and on four, at S 512, 2,048 and 4,096.

- whole: the example is packed again, all of its clean tokens.
- before: packed again, but of the clean tokens only those before the chosen block, which are all
  that the canvas sees.
- reused: nothing is packed again. Clean rows go through the layers once, with gradient; each layer
  keeps their keys and values, and
  the canvas of pass 1 is computed with them, without gradient. Pass 2 is only the canvas; its
  gradients flow into the kept keys.

One example a rank, denoised twice, checkpointed, full fine-tuning in float32; real gloo ranks,
FSDP2 as the engine shards. Four ranks
share two cores, so there FLOPs and bytes say more than seconds. Writes
benchmarks/results/first_pass.json.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from benchmarks.engine import bench_recipe, draw_noise, loaded_model
from benchmarks.instruments.ranks import run_ranks
from benchmarks.measure import alternate, say, timed, write_result
from benchmarks.planner import Flops
from benchmarks.synthetic_checkpoint import described, write_synthetic
from benchmarks.traffic import Traffic
from canvastune.checkpoint.load import read_model_config
from canvastune.data.packing import Example, PackedBatch, pack
from canvastune.distributed.parallelize import local_tensor
from canvastune.model.attention import Packing
from canvastune.model.attention_calls import CanvasCall
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.objective import losses

MODEL = {"layers": 3, "hidden": 128, "experts": 16, "vocabulary": 2048, "canvas": 64}
LENGTHS, PREFIX = (512, 2048, 4096), 64
LAYOUTS = ((1, 1), (4, 1), (4, 4))  # ranks, and how many of them share a layer's experts
CHOSEN = (
    "middle",
    "uniform",
)  # the block: in the middle of the response, or drawn again in every step
FORMS = ("whole", "before", "reused")
ROUNDS = 3  # on one rank; once on four
SEED, EXACT = 7, 1e-5

Rotary = dict[str, tuple[torch.Tensor, torch.Tensor]]  # by layer type
Kept = tuple[torch.Tensor, torch.Tensor]  # keys and values of clean rows, [1, G, N, D]


@dataclasses.dataclass(frozen=True)
class CleanRows:
    """Attention of one example's clean rows, which leaves its keys and values in `kept`."""

    packing: Packing
    kept: list[torch.Tensor]
    row_keys: None = None

    def attend(
        self, kind: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend as `Packing.attend` does."""
        self.kept[:] = key, value
        no_canvas: dict[str, tuple[CanvasCall, ...]] = dict.fromkeys(self.packing.calls, ())
        return dataclasses.replace(self.packing, calls=no_canvas).attend(
            kind, query, key, value, scale
        )


@dataclasses.dataclass(frozen=True)
class CanvasRows:
    """Attention of one example's canvas rows, against a layer's kept keys and values."""

    packing: Packing
    kept: Kept
    row_keys: None = None

    def attend(
        self, kind: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend as `Packing.attend` does."""
        (call,) = self.packing.calls[kind]
        seen = slice(call.first, call.stop)
        keys, values = (
            torch.cat([old[:, :, seen], new], dim=2)
            for old, new in zip(self.kept, (key, value), strict=True)
        )
        return F.scaled_dot_product_attention(
            query, keys, values, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )


class ReusedKeys:
    """The form `reused` behind the engine's own `losses`: it takes the place of the model's
    `hidden_states`.
    """

    def __init__(self, model: WeightTiedDiffusionGemma, batch: PackedBatch) -> None:
        """Lay out a batch of one self-conditioned example."""
        self.model, self.batch = model, batch
        self.packing = Packing.of(batch, model.config.text_config.sliding_window)
        self.clean: torch.Tensor | None = None  # [N, H], after the last norm
        self.kept: list[Kept] = []  # of each layer

    def hidden_states(
        self, _: PackedBatch, canvas: torch.Tensor, __: Packing, *, checkpointing: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`losses` calls it for pass 1 without gradients, then for pass 2 with them."""
        decoder, batch = self.model.model.decoder, self.batch
        kinds, hidden = self.model.config.text_config.layer_types, canvas[None]
        rotary = self._rotary(hidden, batch.canvas_positions)
        if torch.is_grad_enabled():
            assert self.clean is not None
            for layer, kind, kept in zip(decoder.layers, kinds, self.kept, strict=True):
                run = functools.partial(
                    layer,
                    position_embeddings=rotary[kind],
                    attention_mask=None,
                    packing=CanvasRows(self.packing, kept),
                )
                hidden = checkpoint(run, hidden, **_HOW)
            return self.clean, decoder.norm(hidden)[0]
        with torch.enable_grad():
            clean = decoder.embed_tokens(batch.clean)[None]
            rotary_clean = self._rotary(clean, batch.clean_positions)
            for layer, kind in zip(decoder.layers, kinds, strict=True):
                done: list[torch.Tensor] = []
                run = functools.partial(_both, layer, hidden, done, self.packing, rotary[kind])
                clean, *kept = checkpoint(run, clean, rotary_clean[kind], **_HOW)
                hidden = done[0]
                self.kept.append((kept[0], kept[1]))
            self.clean = decoder.norm(clean)[0]
        return self.clean, decoder.norm(hidden)[0]

    def _rotary(self, hidden: torch.Tensor, positions: torch.Tensor) -> Rotary:
        decoder = self.model.model.decoder
        return {
            kind: decoder.rotary_emb(hidden, positions[None], kind)
            for kind in decoder.unique_layer_types
        }


_HOW: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def _both(
    layer: Any,
    first: torch.Tensor,
    done: list[torch.Tensor],
    packing: Packing,
    rotary_first: Any,
    *clean: Any,
) -> Any:
    return layer.both(*clean, first, done, packing, rotary_first)


def _layer_of_both(
    layer: Any,
    clean: torch.Tensor,
    rotary: Any,
    first: torch.Tensor,
    done: list[torch.Tensor],
    packing: Packing,
    rotary_first: Any,
) -> tuple[torch.Tensor, ...]:
    """Run a layer once gathered on clean rows with gradient and on pass 1's canvas rows without.

    Recomputed in the backward pass, it leaves out the canvas: `done` has its rows.
    """
    kept: list[torch.Tensor] = []
    how = {"attention_mask": None}
    clean = layer.forward(
        clean, position_embeddings=rotary, packing=CleanRows(packing, kept), **how
    )
    if not done:
        with torch.no_grad():
            against = CanvasRows(packing, (kept[0], kept[1]))
            done.append(
                layer.forward(first, position_embeddings=rotary_first, packing=against, **how)
            )
    return clean, *kept


def form_of(
    name: str, model: WeightTiedDiffusionGemma, batch: PackedBatch
) -> AbstractContextManager[object]:
    """Run the engine's step with pass 1 in this form."""
    if name == "whole":
        return mock.patch.object(PackedBatch, "before_blocks", lambda self: self)
    if name == "reused":
        return mock.patch.object(model, "hidden_states", ReusedKeys(model, batch).hidden_states)
    return nullcontext()


def step(
    model: WeightTiedDiffusionGemma, form: str, batch: PackedBatch, weights: tuple[float, float]
) -> torch.Tensor:
    """Run forward and backward, leaving the gradients in the model, and return this rank's part of
    the loss [].
    """
    model.zero_grad(set_to_none=True)
    with form_of(form, model, batch):
        loss, _, _ = model.run_under_fsdp(
            losses, batch, weights, any_self_conditioned=True, checkpointing=True
        )
        loss.backward()
    return loss.detach()


def rank_figures(folder: Path, ground: Path, world_size: int, ep: int) -> None:
    """Measure all lengths on this rank; rank 0 writes the figures of all ranks."""
    torch.set_num_threads(2 if world_size == 1 else 1)
    config = bench_recipe(ep, activation_checkpointing=True)
    model = loaded_model(config, read_model_config(ground), ground, SEED)
    for layer in model.model.decoder.layers:
        layer.both = functools.partial(_layer_of_both, layer)
        register_fsdp_forward_method(layer, "both")
    rows = []
    for length in LENGTHS:
        for chosen in CHOSEN:
            started = time.monotonic()
            rows.append(
                {
                    "tokens": length,
                    "chosen": chosen,
                    "ranks": world_size,
                    "ep": ep,
                    **figures(model, length, chosen),
                }
            )
            if dist.get_rank() == 0:
                say("first_pass", f"{described_row(rows[-1])} ({time.monotonic() - started:.0f} s)")
    if dist.get_rank() == 0:
        (folder / f"{world_size}-{ep}.json").write_text(json.dumps(rows), encoding="utf-8")


def figures(model: WeightTiedDiffusionGemma, length: int, chosen: str) -> dict[str, Any]:
    """Return counts of the first batch (drawn blocks: means over all batches), differences from
    `whole`, and median seconds.
    """
    world_size, drawn = dist.get_world_size(), chosen == "uniform"
    batches = [
        made_batch(length, drawn, turn * world_size + dist.get_rank())
        for turn in range(4 // world_size if drawn else 1)
    ]
    weights = 1 / (world_size * MODEL["canvas"]), 1 / (world_size * (length - 1))
    result: dict[str, Any] = {
        "blocks_start": mean([float(batch.block_starts[0]) for batch in batches])
    }
    first: list[torch.Tensor] = []
    for form in FORMS:
        counts: list[tuple[float, float, float]] = []
        for batch in batches:
            traffic = Traffic(
                [local_tensor(parameter.detach()) for parameter in model.parameters()]
            )
            with Flops() as flops, traffic.watching():
                loss = step(model, form, batch, weights)
            counts.append((flops.total, sum(traffic.received_by_kind.values()), traffic.peak))
            if len(counts) == 1:
                gradients = [local_tensor(p.grad) for p in model.parameters() if p.grad is not None]
                losses_found = total(loss)
                first = first or [
                    torch.tensor(losses_found),
                    *[gradient.clone() for gradient in gradients],
                ]
                apart_by = [a - b for a, b in zip(gradients, first[1:], strict=True)]
                off, size = (
                    total(*(each.square().sum(dtype=torch.float64) for each in tensors))
                    for tensors in (apart_by, first[1:])
                )
                apart = abs(losses_found / float(first[0]) - 1), math.sqrt(off / size)
                gathers = max(traffic.gathers.values(), default=0)
            del traffic
        flop, received, _ = (mean([count[index] for count in counts]) for index in range(3))
        result[form] = {
            "flops": flop,
            "received_bytes": received,
            "peak_bytes": highest(max(count[2] for count in counts)),
            "layer_gathers": gathers,
            "loss_difference": apart[0],
            "gradient_difference": apart[1],
        }
    sides = {form: side(model, form, batches, weights) for form in FORMS}
    seconds: dict[str, float] = {}
    if world_size == 1:
        seconds = alternate(sides, ROUNDS)
    elif not drawn:
        seconds = {form: once(run) for form, run in sides.items()}
    for form, value in seconds.items():
        result[form]["seconds"] = highest(value)
    return result


def once(run: Callable[[], object]) -> float:
    """Seconds, on ranks that begin together."""
    dist.barrier()
    return timed(run)


def side(
    model: WeightTiedDiffusionGemma,
    form: str,
    batches: list[PackedBatch],
    weights: tuple[float, float],
) -> Callable[[], object]:
    """Step after step of a form, over the batches in turn."""
    turns = itertools.cycle(batches)
    return lambda: step(model, form, next(turns), weights)


def made_batch(length: int, drawn: bool, position: int) -> PackedBatch:
    """Make a batch of one self-conditioned example of this many tokens, prefix and whole blocks."""
    canvas, vocabulary = MODEL["canvas"], MODEL["vocabulary"]
    tokens = torch.randint(
        5, vocabulary, (length,), generator=torch.Generator().manual_seed(position)
    )
    example = Example(tokens, PREFIX, canvas, str(position))
    (draw,) = draw_noise(SEED, example, vocabulary, coin=1.0)
    batch = pack(
        [example], [draw if drawn else dataclasses.replace(draw, block=example.blocks // 2)]
    )
    return dataclasses.replace(batch, row_keys=None)  # nothing is dropped


def mean(values: list[float]) -> float:
    """Over the values and the ranks."""
    return (
        total(torch.tensor(sum(values) / len(values), dtype=torch.float64)) / dist.get_world_size()
    )


def total(*values: torch.Tensor) -> float:
    """Sum of scalars over all ranks."""
    found = torch.stack([value.double() for value in values]).sum()
    dist.all_reduce(found)
    return float(found)


def highest(value: float) -> float:
    """Over the ranks."""
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def described_row(row: dict[str, Any]) -> str:
    def of(form: str) -> str:
        found = row[form]
        sizes = (
            f"{found['flops'] / 1e9:.1f} GFLOP, {found['received_bytes'] / 1e6:.1f} MB in,"
            f" {found['peak_bytes'] / 1e6:.0f} MB"
        )
        seconds = f"{found['seconds']:.2f} s, " if "seconds" in found else ""
        return (
            f"{form} {seconds}{sizes}, off by {found['loss_difference']:.0e} and"
            f" {found['gradient_difference']:.0e}"
        )

    return (
        f"S {row['tokens']}, {row['ranks']} / {row['ep']}, {row['chosen']} block:"
        f" {'; '.join(map(of, FORMS))}"
    )


def main() -> int:
    os.environ |= {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
    }  # ranks that spin while they wait starve each other
    started, rows = time.monotonic(), []
    with tempfile.TemporaryDirectory() as scratch:
        ground = Path(scratch) / "model"
        write_synthetic(ground, described(**MODEL))
        for ranks, ep in LAYOUTS:
            folder = Path(scratch) / f"{ranks}-{ep}"
            folder.mkdir()
            run_ranks(rank_figures, ranks, folder, ground, ranks, ep)
            rows += json.loads((folder / f"{ranks}-{ep}.json").read_text(encoding="utf-8"))
    forms = [row[form] for row in rows for form in FORMS]
    worst = max(max(form["loss_difference"], form["gradient_difference"]) for form in forms)
    for form in FORMS[1:]:
        for name in ("seconds", "flops", "received_bytes", "peak_bytes"):
            ratios = [
                row[form][name] / row["whole"][name] for row in rows if row["whole"].get(name)
            ] or [1.0]  # one rank receives nothing
            say("first_pass", f"{form}: {name} of whole: {min(ratios):.3f} to {max(ratios):.3f}")
    say(
        "first_pass",
        f"loss and gradients differ by {worst:.0e} at most; {time.monotonic() - started:.0f} s",
    )
    write_result(
        "first_pass",
        {
            "model": MODEL,
            "prefix": PREFIX,
            "rounds": ROUNDS,
            "cases": rows,
            "worst_difference": worst,
        },
    )
    return int(worst >= EXACT)


if __name__ == "__main__":
    sys.exit(main())
