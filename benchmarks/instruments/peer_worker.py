"""Run training steps of one side on request, for `benchmarks.peers`: ours, or a peer's own released
code. Arguments: the side, the folder of the peers, the folder of the weights, a shape of
`benchmarks.peers`.

Each line on standard input is a request as JSON, each answer a line:
{"do": "check", "gradients": FILE} runs a step from zero gradients, counts its FLOPs and saves its
gradients by the checkpoint's names; {"do": "products"} runs three more, and counts the seconds of
products and attention in the second one, those that the third one's take by themselves, and the
bytes of its other operations;
{"do": "memory", "checkpointed": BOOL} and {"do": "step", "checkpointed": BOOL} run one more.

What of the peers runs:

- NeMo AutoModel: its model class, state dict adapter and default backend, and of its recipe
  `pre_step`, `_compute_loss_denominators` and `forward_backward`, as `_run_train_optim_step` calls
  them. Checkpointing is its `apply_ac`. The recipe's `setup`, which wants a GPU and a process
  group, is not run: its attributes are set here, to the values of its DiffusionGemma recipe.
- TRL: `compute_loss` of its example's trainer, on Hugging Face's model with the default attention.
- Unsloth: `compute_loss` of its DiffusionGemma profile, on Hugging Face's model with the profile's
  attention. Its modules are loaded without its packages' `__init__`, which want a GPU.

Every draw is scripted: `torch.rand` and `torch.randint` return the draws of our step, in each
peer's order, so that all sides score the same block with the same noise and the same coins.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion

from benchmarks import peers
from benchmarks.engine import allocate_gradients, bench_recipe, loaded_model
from benchmarks.measure import extra_memory, timed
from benchmarks.planner import Flops
from benchmarks.step import THREADS, Shape, made_examples, our_step
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.data.packing import Example
from canvastune.noise import NoiseSample

IGNORED = -100  # label of a token that is not of the response
LEVEL = 0.5  # the peers draw a level and compare: below it corrupted, above it not
BELOW, ABOVE = 0.25, 0.75
_FLASH = "aten::_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = {
    *("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_"),
    *("aten::_grouped_mm", _FLASH, f"{_FLASH}_backward"),
}


ALLOCATIONS = {
    *("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty"),
    *("aten::detach", "aten::_unsafe_view"),
}


@dataclass
class Side:
    """A model and its training step: forward and backward, batch preparation included."""

    model: nn.Module
    step: Callable[[bool], torch.Tensor]  # whether checkpointed -> the loss
    named: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]  # by the checkpoint's names


def main() -> None:
    name, folder, weights, shape = sys.argv[1:]
    # What libraries print goes to standard error; the protocol keeps standard output.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(THREADS)
    side = SIDES[name](Path(folder), Path(weights), peers.SHAPES[shape])
    side.model.train()
    allocate_gradients(side.model)
    for line in sys.stdin:
        answers.write(json.dumps(answer(side, json.loads(line))) + "\n")
        answers.flush()


def answer(side: Side, request: dict[str, Any]) -> dict[str, float]:
    """Do what a line asks for."""
    match request:
        case {"do": "check", "gradients": file}:
            for parameter in side.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.zero_()
            with Flops() as counter:
                loss = side.step(False)
            found = {
                name: parameter.grad
                for name, parameter in side.model.named_parameters()
                if parameter.grad is not None
            }
            gradients = side.named(found).items()
            save_file({name: gradient.contiguous() for name, gradient in gradients}, file)
            return {"loss": float(loss), "flops": counter.total}
        case {"do": "products"}:
            side.step(False)
            with profile(activities=[ProfilerActivity.CPU]) as found:
                side.step(False)
            spent = (e.self_cpu_time_total for e in found.key_averages() if e.key in PRODUCTS)
            with ProductCalls() as calls:
                side.step(False)
            return {
                "products_seconds": sum(spent) / 1e6,
                "products_alone_seconds": calls.seconds(),
                "other_bytes": calls.other_bytes,
            }
        case {"do": "memory", "checkpointed": checkpointed}:
            return {"extra_memory_bytes": extra_memory(lambda: side.step(checkpointed))}
        case {"do": "step", "checkpointed": checkpointed}:
            return {"loss": float(side.step(checkpointed))}
    raise ValueError(f"no such request: {request}")


class ProductCalls(TorchDispatchMode):
    """Every different call of a product or attention and how often a step makes it, and the bytes
    that all other operations read and write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.other_bytes = 0
        self._calls: dict[str, tuple[Callable[[], object], list[int]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in PRODUCTS:
            tensors = tree_map_only(torch.Tensor, _layout, (args, kwargs))
            key = f"{func} {tensors}"
            if key not in self._calls:
                own_args, own_kwargs = tree_map_only(torch.Tensor, _copy, (args, kwargs))
                call = functools.partial(func, *own_args, **own_kwargs)
                self._calls[key] = (call, [0])
            self._calls[key][1][0] += 1
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if not func.is_view and func._schema.name not in ALLOCATIONS:
            # An operand that is also the result is one tensor, read and written.
            given = {id(one): one for one in tree_iter((args, kwargs)) if torch.is_tensor(one)}
            self.other_bytes += sum(
                one.nbytes for one in (*given.values(), *tree_iter(out)) if torch.is_tensor(one)
            )
        return out

    def seconds(self, rounds: int = 5) -> float:
        """Return the seconds of all calls, each at the best of some rounds of the same call."""
        total = 0.0
        with torch.no_grad():
            for call, (times,) in self._calls.values():
                call()
                total += times * min(timed(call) for _ in range(rounds))
        return total


def _layout(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype}"


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor's values and strides, without what is between them."""
    once = tensor[tuple(slice(None if stride else 1) for stride in tensor.stride())]
    copy = torch.empty_strided(once.shape, once.stride(), dtype=tensor.dtype).copy_(once)
    return copy.expand(tensor.shape)


def ours(_folder: Path, weights: Path, shape: Shape) -> Side:
    """Return our side, as the trainer runs it."""
    config = bench_recipe()
    model = loaded_model(config, shape.config(), weights, config.seed)
    examples, draws = made_examples(shape)
    return Side(model, lambda checkpointed: our_step(model, examples, draws, checkpointed), dict)


def nemo(folder: Path, weights: Path, shape: Shape) -> Side:
    """Return NeMo AutoModel's side."""
    sys.path.append(str(folder))
    model_of = importlib.import_module("nemo_automodel.components.models.diffusion_gemma.model")
    recipe_of = importlib.import_module("nemo_automodel.recipes.dllm.train_ft")
    parallelizer = importlib.import_module("nemo_automodel.components.moe.parallelizer")
    config = DiffusionGemmaConfig.from_pretrained(weights)
    for each in (config, config.text_config):
        each.dtype = torch.float32
    model = model_of.DiffusionGemmaForBlockDiffusion(config).to(torch.float32)
    adapter = model.state_dict_adapter
    adapter.dtype = torch.float32
    stored = CheckpointReader(weights)
    read = {name: stored.get(name).to(torch.float32) for name in stored.names()}
    model.load_state_dict(adapter.from_hf(read))

    layers = model.model.layers
    kept = dict(layers.items())
    parallelizer.apply_ac(model)
    wrapped = dict(layers.items())

    recipe = _nemo_recipe(recipe_of, model, shape.model["vocabulary"])
    examples, draws = made_examples(shape)
    script = nemo_script(examples, draws)

    def step(checkpointed: bool) -> torch.Tensor:
        for name in kept:
            layers[name] = (wrapped if checkpointed else kept)[name]
        tokens, attended, response = padded(examples)
        batch = {
            "input_ids": tokens,
            "attention_mask": attended.long(),
            "loss_mask": response.long(),
        }
        losses: list[torch.Tensor] = []
        with scripted(script):
            counts = recipe.dllm_strategy.pre_step(recipe, [batch])
            diffusion, autoregressive = recipe._compute_loss_denominators([batch], *counts)
            recipe.dllm_strategy.forward_backward(
                recipe,
                0,
                batch,
                loss_buffer=losses,
                num_diffusion_tokens=diffusion,
                num_ar_tokens=autoregressive,
                num_batches=1,
            )
        recipe._dllm_loss_buffer.clear()
        return losses[0]

    def named(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # The adapter adds scales that have no gradient.
        back = adapter.to_hf(
            {name.replace("._checkpoint_wrapped_module", ""): grad for name, grad in found.items()}
        )
        return {name: grad for name, grad in back.items() if "router" not in name}

    return Side(model, step, named)


def _nemo_recipe(recipe_of: types.ModuleType, model: Any, vocabulary: int) -> Any:
    """Make the recipe as its `setup` leaves it on one process."""
    recipe = object.__new__(recipe_of.DiffusionGemmaSFTRecipe)
    recipe.model_parts = [model]
    recipe.device_mesh = None
    recipe.te_fp8 = None
    recipe.dist_env = types.SimpleNamespace(device=torch.device("cpu"))
    recipe.distributed_config = types.SimpleNamespace(autocast_dtype=None)
    recipe.step_scheduler = types.SimpleNamespace(step=0, grad_acc_steps=1)
    recipe.dllm_strategy = recipe_of.get_dllm_strategy("block_diffusion")
    recipe.dllm_loss_fn = recipe.dllm_strategy.create_loss_fn({"vocab_size": vocabulary})
    recipe.mask_token_id = 0
    recipe.dllm_eps = 1e-3
    recipe.dllm_block_size = None
    recipe.dllm_half_life_ratio = None
    recipe._dllm_loss_buffer = []
    recipe.canvas_length = model.canvas_length
    recipe.block_diffusion_sliding_window = model.text_config.sliding_window
    recipe.self_conditioning_p = 0.5
    recipe._self_cond_base_seed = 42
    recipe._encoder_loss_weight = 1.0
    return recipe


def trl(folder: Path, weights: Path, shape: Shape) -> Side:
    """Return TRL's side."""
    file = folder / peers.EXAMPLE
    found = importlib.util.spec_from_file_location(file.stem, file)
    assert found is not None
    assert found.loader is not None
    example = importlib.util.module_from_spec(found)
    sys.modules[file.stem] = example
    found.loader.exec_module(example)
    model = _stock(weights)
    # As its `__init__` leaves it; that wants a data set and a tokenizer.
    trainer = object.__new__(example.DiffusionGemmaSFTTrainer)
    trainer.model = model
    trainer.args = types.SimpleNamespace(max_length=None)
    trainer.canvas_length = model.config.canvas_length
    trainer.vocab_size = model.config.text_config.vocab_size
    trainer.final_logit_softcapping = model.config.text_config.final_logit_softcapping
    trainer.eos_token_id = model.config.text_config.eos_token_id
    trainer.model_prediction_type = "mean"
    return _stock_side(model, shape, lambda batch: trainer.compute_loss(model, batch))


def unsloth(folder: Path, weights: Path, shape: Shape) -> Side:
    """Return Unsloth's side."""
    for name, path in (("unsloth", "unsloth"), ("unsloth.models", "unsloth/models")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder / path)]
        sys.modules[name] = package
    objective = importlib.import_module("unsloth.models.diffusion_gemma_objective")
    profile = objective.DIFFUSION_GEMMA_PROFILE
    model = _stock(weights, attn_implementation=profile.defaults["attn_implementation"])
    return _stock_side(model, shape, lambda batch: profile.compute_loss(model, batch, None)[0])


SIDES = {"ours": ours, "nemo": nemo, "trl": trl, "unsloth": unsloth}


def _stock(weights: Path, **options: Any) -> DiffusionGemmaForBlockDiffusion:
    """Read Hugging Face's model; routers and the vision tower, which no text reaches, are frozen."""
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(weights, dtype=torch.float32, **options)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision" not in name and "router" not in name)
    return model


def _stock_side(
    model: DiffusionGemmaForBlockDiffusion,
    shape: Shape,
    compute_loss: Callable[[dict[str, torch.Tensor]], torch.Tensor],
) -> Side:
    examples, draws = made_examples(shape)
    script = stock_script(examples, draws)

    def step(checkpointed: bool) -> torch.Tensor:
        if checkpointed:
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()
        tokens, attended, response = padded(examples)
        labels = tokens.masked_fill(~response, IGNORED)
        with scripted(script):
            loss = compute_loss(
                {"input_ids": tokens, "attention_mask": attended.long(), "labels": labels}
            )
        loss.backward()
        return loss.detach()

    def named(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name.replace("model.encoder.language_model.", "model.decoder."): grad
            for name, grad in found.items()
        }

    return Side(model, step, named)


def padded(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad on the right, as the peers' collators do.

    Returns:
        int64[B, S]: tokens; bool[B, S]: those of an example; bool[B, S]: those of its response,
        which ends with the fill of its last block.
    """
    longest = max(len(example.tokens) for example in examples)
    tokens = torch.zeros(len(examples), longest, dtype=torch.int64)
    attended, response = (torch.zeros_like(tokens, dtype=torch.bool) for _ in range(2))
    for row, example in enumerate(examples):
        length = len(example.tokens)
        tokens[row, :length] = example.tokens
        attended[row, :length] = True
        response[row, example.prefix_length : length] = True
    return tokens, attended, response


def stock_script(examples: list[Example], draws: list[NoiseSample]) -> list[torch.Tensor]:
    """Return what TRL's and Unsloth's `compute_loss` draw, in order: block, level, corrupted places
    and replacements of a canvas, coin.
    """
    return [
        _blocks(examples, draws),
        torch.full((len(draws), 1), LEVEL),
        torch.stack([_uniform(draw.corrupted) for draw in draws]),
        torch.stack([draw.replacement for draw in draws]),
        _uniform(torch.tensor([draw.self_condition for draw in draws])),
    ]


def nemo_script(examples: list[Example], draws: list[NoiseSample]) -> list[torch.Tensor]:
    """Return what NeMo's recipe draws, in order: for each example level, corrupted places and
    replacements of its whole row; then block, coin.

    It decodes every block; those that it does not score have the chosen one's noise.
    """
    longest = max(len(example.tokens) for example in examples)
    script = []
    for example, draw in zip(examples, draws, strict=True):
        corrupted = torch.zeros(1, longest, dtype=torch.bool)
        replacement = torch.zeros(1, longest, dtype=torch.int64)
        response = slice(example.prefix_length, len(example.tokens))
        size = len(example.tokens) - example.prefix_length
        corrupted[0, response] = draw.corrupted.repeat(example.blocks)[:size]
        replacement[0, response] = draw.replacement.repeat(example.blocks)[:size]
        script += [torch.full((1, 1), LEVEL), _uniform(corrupted), replacement]
    coins = _uniform(torch.tensor([draw.self_condition for draw in draws]))
    return [*script, _blocks(examples, draws), coins]


def _blocks(examples: list[Example], draws: list[NoiseSample]) -> torch.Tensor:
    """Uniform variates that choose the blocks: the floor of each times the number of blocks."""
    return torch.tensor(
        [(draw.block + 0.5) / example.blocks for example, draw in zip(examples, draws, strict=True)]
    )


def _uniform(happens: torch.Tensor) -> torch.Tensor:
    return torch.where(happens, BELOW, ABOVE)


@contextlib.contextmanager
def scripted(script: list[torch.Tensor]) -> Iterator[None]:
    """Let `torch.rand` and `torch.randint` return these tensors in this order, floating ones and
    integers; another call, another shape or a tensor that nothing asks for is an error.
    """
    left = list(script)

    def draw(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
        if not left:
            raise RuntimeError(f"torch.{kind}{shape} is one draw more than the script has")
        value = left.pop(0)
        is_kind = value.is_floating_point() == (kind == "rand")
        if not is_kind or tuple(value.shape) != shape:
            raise RuntimeError(
                f"torch.{kind}{shape} where the script has {value.dtype}{tuple(value.shape)}"
            )
        return value

    def rand(*size: Any, **_options: Any) -> torch.Tensor:
        return draw("rand", tuple(size[0]) if isinstance(size[0], tuple) else size)

    def randint(*bounds_and_size: Any, **_options: Any) -> torch.Tensor:
        return draw("randint", tuple(bounds_and_size[-1]))

    with mock.patch.object(torch, "rand", rand), mock.patch.object(torch, "randint", randint):
        yield
    if left:
        raise RuntimeError(f"{len(left)} of {len(script)} scripted draws were not asked for")


if __name__ == "__main__":
    main()
