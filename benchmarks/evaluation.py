"""`python -m benchmarks.evaluation [--shapes head,middle,trunk,demo] [--rows 16]`: answers by our
sampler, against stock `generate()` in padded batches of 8, as evaluation used it before.

Both get the same noise, so both give the same answers with the same number of denoising steps, which
is checked. Stock draws as it always does, and that is timed; what it drew is then replaced, off the
clock. Each side runs in a separate process, which reports its peak memory above the loaded
weights. In another run, of a block of one batch, it counts the FLOPs of its matrix products and
attention, and the bytes that its operators read and write. Of memory, it counts what any sampler
holds that keeps its keys and calls stock's layers: the keys and values that the canvases see, their
expected embeddings, and what the layers hold while they run on all canvases. With the base's answers
kept, two models cost stock two runs, and us one and the reading of what is kept. Weights are random, in float32.
Writes benchmarks/results/evaluation.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import operator
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
)

from benchmarks.instruments.live_bytes import CPU_FORMULAS, LiveBytes
from benchmarks.instruments.operator_bytes import OperatorBytes
from benchmarks.measure import (
    ROOT,
    command_parser,
    extra_memory,
    python_module,
    say,
    write_result,
)
from benchmarks.synthetic_checkpoint import SMALLEST_VISION
from canvastune.checkpoint.generation_config import SamplerSettings
from canvastune.evaluation.base_results import BaseResults
from canvastune.evaluation.generation import Question
from canvastune.evaluation.row_attention import Canvases, Part, RowCaches, seen_tokens
from canvastune.evaluation.sampler import Sampler
from canvastune.noise import AnswerNoise

BATCH, BLOCKS = 8, 3
GOALS = {"head": 8.0, "middle": 4.0, "trunk": 2.0, "demo": 1.0}
MEMORY_GOAL = 0.1  # of stock's
WITH_BASE = ("head", "middle", "trunk")  # shapes with a goal for kept answers: twice the other one
SIDES = ("stock", "ours")


@dataclass(frozen=True)
class Shape:
    """What decides where the time goes: the head and the sampler, or the layers."""

    vocabulary: int
    hidden: int
    layers: int
    experts: int
    canvas: int


SHAPES = {
    "head": Shape(vocabulary=262_144, hidden=64, layers=2, experts=4, canvas=8),
    "middle": Shape(vocabulary=262_144, hidden=256, layers=12, experts=16, canvas=8),
    "trunk": Shape(vocabulary=8_192, hidden=512, layers=12, experts=16, canvas=32),
    "demo": Shape(vocabulary=768, hidden=64, layers=4, experts=8, canvas=16),
}
SMOKE = Shape(vocabulary=2_048, hidden=64, layers=2, experts=4, canvas=8)
# Random weights are sure of nothing at usual temperatures. At these a block ends after 4 to 20 steps.
SETTINGS = SamplerSettings(
    steps=48,
    entropy_bound=2.0,
    t_min=0.001,
    t_max=0.005,
    stability_threshold=1,
    confidence_threshold=0.5,
)


def main() -> int:
    parser = command_parser("benchmarks.evaluation", __doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="of these, separated by commas")
    parser.add_argument("--rows", type=int, default=16, help="questions")
    parser.add_argument("--smoke", action="store_true", help="a tiny shape; writes no result")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        shape = SMOKE if options.smoke else SHAPES[options.shapes]
        print(json.dumps(_measure(options.side, shape, options.rows)))
        return 0
    names = ["smoke"] if options.smoke else options.shapes.split(",")
    found = {name: _compare(name, options.rows) for name in names}
    print(json.dumps(found, indent=2))
    if not options.smoke:
        write_result("evaluation", {"rows": options.rows, "batch": BATCH, "shapes": found})
    return 0


def _compare(name: str, rows: int) -> dict[str, Any]:
    sides: dict[str, dict[str, Any]] = {}
    for side in SIDES:
        chosen = ["--smoke"] if name == "smoke" else ["--shapes", name]
        command = python_module("benchmarks.evaluation", *chosen, "--side", side, "--rows", rows)
        ended = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        sides[side] = json.loads(ended.stdout.splitlines()[-1])
        say("evaluation", f"{name}: {side}: {sides[side]['seconds']:.1f} s")
    stock, ours = (sides[side] for side in SIDES)
    counts = ours["forwards"]
    answers = sum(map(operator.eq, stock.pop("answers"), ours.pop("answers")))
    forwards = sum(map(operator.eq, stock.pop("forwards"), counts))
    kept = ours["seconds"] + ours["kept_seconds"]
    return {
        **sides,
        "goal": GOALS.get(name),
        "faster": stock["seconds"] / ours["seconds"],
        "faster_with_base": 2 * stock["seconds"] / kept,
        "fewer_flops": stock["flops"] / ours["flops"],
        "fewer_bytes": stock["bytes"] / ours["bytes"],
        "memory_share": ours["peak_bytes"] / stock["peak_bytes"],
        "memory_goal": MEMORY_GOAL,
        "least_memory_share": ours["least_bytes"] / stock["peak_bytes"],
        "equal_answers": answers,
        "equal_step_counts": forwards,
        "steps_of_an_answer": sum(counts) / len(counts),
        "stock_bytes_per_logit": stock["bytes"] / stock["logits"],
        "shape": dataclasses.asdict(SHAPES.get(name, SMOKE)),
    }


def _measure(side: str, shape: Shape, rows: int) -> dict[str, Any]:
    model = made_model(shape)
    questions = _questions(shape, rows)
    stops = list(range(5, shape.vocabulary, 2 * shape.canvas))  # a canvas often has one of them
    noise = AnswerNoise(0, shape.canvas, shape.vocabulary)
    run = _Stock(model, noise, stops) if side == "stock" else _Ours(model, noise, stops)
    run(questions[:1])  # warm-up
    run.reset()
    found: dict[str, Any] = {}

    def timed() -> None:
        started = time.perf_counter()
        found.update(run(questions))
        found["seconds"] = time.perf_counter() - started - run.paused

    found["peak_bytes"] = extra_memory(timed)
    run.reset()
    if isinstance(run, _Ours):
        run.measured = True
        run(questions[:BATCH])
        found["least_bytes"] = run.least_bytes
        run.measured = False
    run.blocks, asked = 1, questions[:BATCH]  # the ratio counts, and stock takes long
    flops = FlopCounterMode(display=False, custom_mapping=CPU_FORMULAS)
    with flops, OperatorBytes(lambda: run.counting) as moved:
        run(asked)
    found |= {"flops": flops.get_total_flops(), "bytes": moved.bytes}
    found["logits"] = run.steps * BATCH * shape.canvas * shape.vocabulary  # that stock computes
    if isinstance(run, _Ours):
        found["kept_seconds"] = _kept_seconds(found["answers"])
    return found


def _kept_seconds(answers: list[list[int]]) -> float:
    """Return the time in which evaluation finds the base's answers of an earlier run."""
    keys = [{"id": f"q{index}", "seed": 0} for index in range(len(answers))]
    with tempfile.TemporaryDirectory() as folder:
        kept = BaseResults(Path(folder), "base")
        for key, tokens in zip(keys, answers, strict=True):
            kept.put(key, {"text": "", "tokens": tokens})
        kept.save()
        started = time.perf_counter()
        again = BaseResults(Path(folder), "base")
        assert all(again.get(key) is not None for key in keys)
        return time.perf_counter() - started


def made_model(shape: Shape) -> Any:
    kinds = ["sliding_attention"] * (shape.layers - 1) + ["full_attention"]
    text = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": 2 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": shape.hidden // 4,
        "global_head_dim": shape.hidden // 2,
        "num_global_key_value_heads": 1,
        "sliding_window": 64,
        "layer_types": kinds,
        "num_experts": shape.experts,
        "top_k_experts": 2,
        "moe_intermediate_size": shape.hidden // 2,
    }
    config = DiffusionGemmaConfig(
        text_config=text, vision_config=SMALLEST_VISION, canvas_length=shape.canvas
    )
    torch.manual_seed(0)
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.self_attn.q_norm.weight.mul_(layer.self_attn.head_dim**-0.5)
    return model


def _questions(shape: Shape, rows: int) -> list[Question]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 97, (rows,), generator=generator).tolist()
    return [
        Question(
            f"q{index}",
            "",
            torch.randint(5, shape.vocabulary, (length,), generator=generator).tolist(),
            "",
        )
        for index, length in enumerate(lengths)
    ]


class _Ours:
    """Our sampler, as evaluation uses it."""

    def __init__(self, model: Any, noise: AnswerNoise, stops: list[int]) -> None:
        self.paused, self.counting, self.steps = 0.0, True, 0
        self.model, self.noise, self.stops, self.blocks = model, noise, stops, BLOCKS
        self.measured, self.least_bytes = False, 0  # of a step: what no sampler can do without

    def reset(self) -> None:
        pass

    def __call__(self, questions: list[Question]) -> dict[str, Any]:
        limit = self.blocks * self.noise.canvas_length
        kind = _CountedSampler if self.measured else Sampler
        sampler = kind(
            self.model, SETTINGS, self.noise, rows=BATCH, max_new_tokens=limit, stops=self.stops
        )
        found = {answer.question: answer for answer in sampler.answer(questions)}
        if isinstance(sampler, _CountedSampler):
            self.least_bytes = sampler.kept_bytes + sampler.layer_bytes
        each = [found[question.id] for question in questions]
        return {"answers": [one.tokens for one in each], "forwards": [one.forwards for one in each]}


class _CountedSampler(Sampler):
    """Counts the bytes that a step needs at least."""

    kept_bytes = layer_bytes = 0

    def _denoise(self, rows: Sequence[Any], caches: RowCaches) -> list[Any]:
        ended = super()._denoise(rows, caches)
        config, size = self.model.config.text_config, self.head.head.element_size()
        floats = len(rows) * self.canvas_length * config.hidden_size
        for layer in self.model.model.decoder.layers:
            attention = layer.self_attn
            width = 2 * attention.k_proj.out_features
            floats += width * sum(seen_tokens(row.length, attention.sliding_window) for row in rows)
        self.kept_bytes = max(self.kept_bytes, size * floats)
        return ended

    def _run_layers(
        self, hidden: torch.Tensor, positions: torch.Tensor, parts: Sequence[Part], encoded: int
    ) -> torch.Tensor:
        canvases = (part for part in parts if isinstance(part, Canvases))
        kept = (pairs for part in canvases for pairs in part.caches._layers.values())
        with LiveBytes([*self.model.parameters(), *self.model.buffers(), *kept]) as live:
            found = super()._run_layers(hidden, positions, parts, encoded)
        if not encoded:  # else rows may grow, and are kept
            self.layer_bytes = max(self.layer_bytes, live.peak - live.held)
        return found


class _Stock:
    """Stock `generate()` on batches of similar length, padded on the left."""

    def __init__(self, model: Any, noise: AnswerNoise, stops: list[int]) -> None:
        self.model, self.noise, self.stops = model, noise, stops
        self.paused, self.counting, self.batch = 0.0, True, list[Question]()
        self.steps, self.blocks = 0, BLOCKS  # steps of all batches
        self.block, self.step, self.new_block = -1, 0, True

    def reset(self) -> None:
        self.paused, self.steps = 0.0, 0

    def __call__(self, questions: list[Question]) -> dict[str, Any]:
        ordered = sorted(questions, key=lambda one: len(one.tokens))
        found: dict[str, tuple[list[int], int]] = {}
        for at in range(0, len(ordered), BATCH):
            found |= self._answer(ordered[at : at + BATCH])
        each = [found[question.id] for question in questions]
        return {"answers": [tokens for tokens, _ in each], "forwards": [steps for _, steps in each]}

    def _answer(self, batch: list[Question]) -> dict[str, tuple[list[int], int]]:
        self.batch, self.block, self.new_block = batch, -1, True
        width = max(len(one.tokens) for one in batch)
        padding = [width - len(one.tokens) for one in batch]
        ids = torch.tensor(
            [[0] * pad + one.tokens for pad, one in zip(padding, batch, strict=True)]
        )
        mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
        draw, finalize = torch.multinomial, type(self.model)._finalize_canvas

        def chosen(probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:
            draw(probabilities, num_samples)
            return self._choose(probabilities)

        def finalized(*given: Any, **named: Any) -> Any:
            self.new_block = True
            return finalize(*given, **named)

        with (
            mock.patch.object(EntropyBoundSampler, "initialize_canvas", self._canvas),
            mock.patch.object(torch, "multinomial", chosen),
            mock.patch.object(type(self.model), "_finalize_canvas", staticmethod(finalized)),
        ):
            found = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=self.blocks * self.noise.canvas_length,
                max_denoising_steps=SETTINGS.steps,
                sampler_config=EntropyBoundSamplerConfig(SETTINGS.entropy_bound),
                t_min=SETTINGS.t_min,
                t_max=SETTINGS.t_max,
                stability_threshold=SETTINGS.stability_threshold,
                confidence_threshold=SETTINGS.confidence_threshold,
                eos_token_id=self.stops,
                pad_token_id=0,
            )
        stops, answers = set(self.stops), {}
        for one, row, rate in zip(
            batch, found.sequences[:, width:].tolist(), found.tokens_per_forward, strict=True
        ):
            end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
            kept = sum(token != 0 for token in row)
            answers[one.id] = (row[:end], round(kept / float(rate)))
        return answers

    def _canvas(self, *_: Any, **__: Any) -> torch.Tensor:
        started, self.counting = time.perf_counter(), False
        if self.new_block:
            self.block, self.step, self.new_block = self.block + 1, 0, False
        place = (self.block, self.step)
        rows = [self.noise.renoise(one.id, *place) for one in self.batch]
        canvas = torch.stack(rows)
        self.paused, self.counting = self.paused + time.perf_counter() - started, True
        return canvas

    def _choose(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Return the tokens of the noise that our side gets, off the clock."""
        started, self.counting = time.perf_counter(), False
        self.step, self.steps = self.step + 1, self.steps + 1
        place = (self.block, self.step)
        uniforms = torch.cat([self.noise.uniforms(one.id, *place) for one in self.batch])
        chosen = []
        for row, uniform in zip(probabilities, uniforms, strict=True):
            cumulated = row.double().cumsum(0)
            chosen.append(torch.searchsorted(cumulated, uniform * cumulated[-1], right=True))
        found = torch.stack(chosen)[:, None]
        self.paused, self.counting = self.paused + time.perf_counter() - started, True
        return found


if __name__ == "__main__":
    sys.exit(main())
