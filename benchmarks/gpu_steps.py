"""Our step against the plain one on one device, over sequence lengths: part of `python -m
benchmarks.gpu`.

Forward and backward of full fine-tuning in bfloat16, without an update, on the same weights, batch
and draws: of two examples of a
length, half of it response, one is self-conditioned. Utilization is the FLOPs that the loss needs
over the seconds times the device's rate in
a large matmul.
"""

from __future__ import annotations

import functools
import gc
import re
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine import allocate_gradients, bench_recipe
from benchmarks.made_model import SyntheticCheckpoint, largest_model
from benchmarks.measure import alternate, extra_memory, matmul_rate, say
from benchmarks.plain_step import PlainBatch, plain_step, plain_twin
from benchmarks.profile import costs_table, largest_costs
from benchmarks.step import Shape, made_examples
from canvastune.checkpoint.load import build_model, load_weights
from canvastune.config import RunConfig
from canvastune.data.packing import PackedBatch, pack
from canvastune.model import kernels
from canvastune.model.attention import PACKINGS
from canvastune.model.diffusion_gemma import WeightTiedDiffusionGemma
from canvastune.objective import losses
from canvastune.perf_model.architecture import VISION_KIND, Architecture, read_architecture
from canvastune.perf_model.flops import needed_flops
from tools import attention_backends

LENGTHS, SMALL_LENGTHS = (512, 1024, 2048, 4096), (128, 256)
EXAMPLES = 2
# of the device's memory for weights and gradients; the plain step needs the rest for logits and
# activations
WEIGHTS_SHARE = 0.25
# attention, whether each layer is recomputed in the backward pass, as a recipe's default is, and
# whether with our Triton kernels
OURS = {
    "ours": ("sdpa", False, True),
    "ours, checkpointed": ("sdpa", True, True),
    "ours, checkpointed, without Triton kernels": ("sdpa", True, False),
    "ours, flex": ("flex", False, True),
    "ours, flex, checkpointed": ("flex", True, True),
}
DEFAULT = "ours, checkpointed"
PLAIN = {"chosen block": False, "all blocks": True}

_OPERATOR = re.compile(
    r"aten::_scaled_dot_product_"
    r"(?:(flash|efficient|cudnn)_attention(?:_for_cpu)?|attention_(math))"
)

Sides = dict[str, Callable[[], torch.Tensor]]


class Models:
    """Our model and the plain one, on the same weights and the same gradients."""

    def __init__(
        self, folder: Path, device: torch.device, memory: float, dtype: torch.dtype, small: bool
    ) -> None:
        """
        Args:
            folder: gets the model's config.json.
            memory: bytes of the device.
            small: a small model, for a CPU.
        """
        config = bench_recipe(precision="bfloat16")
        self.config, self.architecture = largest_model(
            folder, small, lambda found: _fitting(config, found, memory)
        )
        self.device = device
        self.ours = build_model(config, self.config)
        for parameter in self.ours.parameters():
            parameter.data = parameter.data.to(
                dtype
            )  # what layers compute in; the trainer's float32 masters are FSDP's
        load_weights(self.ours, SyntheticCheckpoint(self.config), device, config.seed)
        self.plain = plain_twin(self.ours, self.config)
        self.trained = [
            parameter for parameter in self.ours.parameters() if parameter.requires_grad
        ]
        self.zero_gradients()

    def zero_gradients(self) -> None:
        allocate_gradients(self.ours)

    def gradient_norm(self) -> float:
        norms = [
            torch.linalg.vector_norm(p.grad, dtype=torch.float32)
            for p in self.trained
            if p.grad is not None
        ]
        return float(torch.linalg.vector_norm(torch.stack(norms)))


def measured_steps(
    folder: Path,
    device: torch.device,
    memory: float,
    *,
    small: bool,
    dtype: torch.dtype = torch.bfloat16,
    rounds: int = 3,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure all lengths; see `Models` for the arguments.

    Args:
        keep: is given the result after each length: the time may be up before the next one.
    """
    rate = matmul_rate(256 if small else 8192, device=device, dtype=dtype)
    models = Models(folder, device, memory, dtype, small)
    layers = models.config.text_config.num_hidden_layers
    say(
        "gpu",
        f"steps: {layers} layers, {str(dtype).removeprefix('torch.')} matmul at {rate / 1e12:.3g}"
        " TFLOP/s",
    )
    held = sum(
        2 * parameter.nbytes if parameter.requires_grad else parameter.nbytes
        for parameter in models.ours.parameters()
    )
    result: dict[str, Any] = {
        "layers": layers,
        "examples": EXAMPLES,
        "weights_and_gradients_bytes": held,
        "matmul_flops_per_second": rate,
        "lengths": [],
    }
    for length in SMALL_LENGTHS if small else LENGTHS:
        result["lengths"].append(_of_length(models, length, rate, rounds))
        say("gpu", described_row(result["lengths"][-1]))
        # of flex attention, whose kernels are compiled; lengths are bucketed so that they share some
        result["compiled_graphs"] = counters["stats"]["unique_graphs"]
        keep(result)
    return result


def described_row(row: dict[str, Any]) -> str:
    """Return a length's figures as lines of text."""
    lines = [f"S {row['seq_length']}"]
    for name, side in row["sides"].items():
        if "failed" in side:
            lines.append(f"  {name:<26} {side['failed']}")
            continue
        rates = (
            f"{side['seconds']:8.3f} s {side['tokens_per_second']:9.0f} tokens/s"
            f" {side['utilisation']:6.1%} utilization"
        )
        apart = side.get("gradient_difference")
        lines.append(
            f"  {name:<26} {rates} {side['memory_bytes'] / 1e9:7.2f} GB above weights and gradients"
            + (f", gradients differ by {apart:.1e}" if apart is not None else "")
        )
    return "\n".join([*lines, costs_table(row["profile"])] if row["profile"] else lines)


def _fitting(config: RunConfig, folder: Path, memory: float) -> Architecture | None:
    """Return the model's sizes if its weights and gradients of two bytes leave enough memory."""
    architecture = read_architecture(config, folder)
    held = sum(
        2 * weight.numel * (1 + weight.trained)
        for weight in architecture.weights
        if weight.kind != VISION_KIND
    )
    return architecture if held <= WEIGHTS_SHARE * memory else None


def _of_length(models: Models, length: int, rate: float, rounds: int) -> dict[str, Any]:
    text = models.config.text_config
    sizes = {"canvas": models.config.canvas_length, "vocabulary": text.vocab_size}
    examples, draws = made_examples(Shape("", sizes, ((length // 2, length // 2),) * EXAMPLES))
    packed = pack(examples, draws).to(models.device)
    cuda = models.device.type == "cuda"
    sides: Sides = {
        name: lambda how=how: our_step(models.ours, packed, *how)  # type: ignore[misc]
        for name, how in OURS.items()
        if cuda or (how[0] != "flex" and how[2])  # without a backward pass, and kernels, on a CPU
    }
    for name, all_blocks in PLAIN.items():
        batch = PlainBatch.of(examples, draws, text.sliding_window, all_blocks=all_blocks).to(
            models.device
        )
        sides[name] = lambda batch=batch: plain_step(models.plain, batch)  # type: ignore[misc]
    tried = {name: _tried(name, run, models) for name, run in sides.items()}
    running = {name: run for name, run in sides.items() if isinstance(tried[name], float)}
    needed = needed_flops(models.architecture, packed)
    tokens = len(packed.clean) + len(packed.canvas)
    memory = {name: extra_memory(run, models.device) for name, run in running.items()}
    seconds = alternate(running, rounds)
    measured = {
        name: {
            "loss": tried[name],
            "seconds": seconds[name],
            "tokens_per_second": tokens / seconds[name],
            "memory_bytes": memory[name],
            "utilisation": needed / seconds[name] / rate,
        }
        for name in running
    }
    for name in measured.keys() & OURS.keys() if "chosen block" in running else ():
        measured[name]["gradient_difference"] = _difference(models, packed, running, name)
    return {
        "seq_length": length,
        "tokens": tokens,
        "flops_needed": needed,
        "sides": {name: measured.get(name) or {"failed": tried[name]} for name in sides},
        "attention": attention_calls(running[DEFAULT]) if DEFAULT in running else None,
        "attention_seen": attention_seen(running[DEFAULT]) if DEFAULT in running else None,
        "profile": largest_costs(running[DEFAULT], models.device) if DEFAULT in running else None,
    }


def our_step(
    model: WeightTiedDiffusionGemma,
    batch: PackedBatch,
    attention: str,
    checkpointing: bool,
    triton_kernels: bool,
    sign: int = 1,
) -> torch.Tensor:
    """Forward and backward of a packed batch as the trainer does it, attention laid out as
    `train.attention` says.
    """
    kernels.allow(triton_kernels)
    window = model.config.text_config.sliding_window
    weights = 1 / len(batch.canvas_targets), 1 / len(batch.next_targets)
    with mock.patch.object(model, "packing", lambda rows: PACKINGS[attention].of(rows, window)):
        loss, _, _ = losses(
            model,
            batch,
            weights,
            any_self_conditioned=any(batch.self_conditioned),
            checkpointing=checkpointing,
        )
        (sign * loss).backward()
    return loss.detach()


def attention_calls(step: Callable[[], torch.Tensor]) -> list[dict[str, Any]]:
    """Return the distinct SDPA calls of a step, how often each is made, and which backend this
    device takes for it.

    `table` is the backend that `tools.attention_backends` has for the call, or None: it is known for
    one build of torch on sm_90.
    """
    found: Counter[tuple[Any, ...]] = Counter()
    known = (
        torch.cuda.is_available()
        and torch.cuda.get_device_capability() == (9, 0)
        and torch.__version__.split("+")[0] == attention_backends.VERSION
    )
    attend = F.scaled_dot_product_attention

    @functools.wraps(attend)
    def counted(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        how: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        call = (query, key, value, attn_mask, dropout_p, is_causal)
        chosen = SDPBackend(torch._fused_sdp_choice(*call, **how)).name
        backend = chosen.removesuffix("_ATTENTION").lower()
        table = None
        if known:
            table, _ = attention_backends.backend_of(
                query, key, value, attn_mask, is_causal, enable_gqa
            )
        shapes = tuple(query.shape), tuple(key.shape)
        found[(*shapes, attn_mask is not None, is_causal, enable_gqa, backend, table)] += 1
        return attend(*call, **how)

    with mock.patch.object(F, "scaled_dot_product_attention", counted):
        step()
    columns = ("query", "key", "masked", "causal", "grouped", "backend", "table")
    return [
        {**dict(zip(columns, call, strict=True)), "calls": calls} for call, calls in found.items()
    ]


def attention_seen(step: Callable[[], torch.Tensor]) -> dict[str, int]:
    """Return how often a step runs the operator of each of SDPA's backends, as the profiler sees
    them.
    """
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    seen: Counter[str] = Counter()
    for event in found.key_averages():
        if backend := _OPERATOR.fullmatch(event.key):
            seen[backend[1] or backend[2]] += event.count
    return dict(seen)


def _difference(models: Models, packed: PackedBatch, running: Sides, name: str) -> float:
    """|plain - ours| / |plain| over all gradients together: ours is taken off where the plain ones
    stand.
    """
    models.zero_gradients()
    running["chosen block"]()
    norm = models.gradient_norm()
    our_step(models.ours, packed, *OURS[name], sign=-1)
    return models.gradient_norm() / norm


def _tried(name: str, run: Callable[[], torch.Tensor], models: Models) -> float | str:
    """Return a side's loss, or why it cannot run here, whatever the error: the others' measurements
    must not be lost.
    """
    try:
        return float(run())
    except torch.OutOfMemoryError as error:
        why = f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
    say("gpu", f"{name}: {why}")
    models.zero_gradients()
    gc.collect()
    if models.device.type == "cuda":
        torch.cuda.empty_cache()
    return why
