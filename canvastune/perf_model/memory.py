"""The memory of one rank over a step: the peak is the largest moment of the timeline, and its parts
add up to it.

The timeline follows the engine: `objective.losses` (the embedding's gradient is summed in float32
over chunks of rows), `model.moe` (of the rows, only those that other ranks sent are kept),
`model.memory_efficient` (norms and gated MLPs keep only their inputs), and FSDP2 (a forward pass
copies a gathered unit out of a flat buffer; a backward pass gathers the next unit while it
computes, and keeps the last reduction's input). What each moment holds was measured tensor by
tensor; tests hold these formulas to the engine.

Letters: T tokens of a micro-batch, H hidden size, V vocabulary, K experts per token; c bytes of the
compute dtype.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

from canvastune.config.model_sizes import LayerShape
from canvastune.config.schema import Checkpointing, is_recomputed
from canvastune.logit_chunks import chunk_rows, tile_columns
from canvastune.model.attention_calls import (
    canvas_calls,
    canvas_mask_elements,
    clean_mask_elements,
)
from canvastune.perf_model.architecture import FLOAT, Architecture, Weight

# Keys of plan.json, whose spelling is kept. prose: ok
PARTS = (
    "weights",
    "gradients",
    "optimiser",
    "activations",
    "layer workspace",
    "logits and loss",
    "communication",
)  # prose: ok


@dataclass(frozen=True)
class StepShape:
    """Sizes of what one rank does in an optimizer step."""

    world_size: int
    ep: int
    micro_batch: int  # examples per rank and forward
    micro_steps: int  # forwards per optimizer step
    clean: int  # clean tokens per example
    canvas: int  # tokens of a canvas
    checkpointing: Checkpointing
    self_conditioning: float  # probability that an example is self-conditioned
    device: str = "cpu"  # or "cuda"; decides the size of a chunk of logits
    # Clean tokens before an example's one chosen block; None: its last blocks are chosen.
    chosen_start: int | None = None
    blocks: int = 1  # chosen blocks per example: canvases next to its clean tokens
    blocks_at_once: int | None = None  # of an example in one forward; the others take further ones
    is_last: bool = True  # False: only the clean tokens before the last canvas, none of them scored

    @property
    def efsdp(self) -> int:
        return self.world_size // self.ep

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, T."""
        return self.micro_batch * (self.clean + self.canvas_rows)

    @property
    def canvas_rows(self) -> int:
        """Canvas tokens per example."""
        return self.blocks * self.canvas

    @property
    def pasts(self) -> tuple[int, ...]:
        """Clean tokens that each canvas of an example sees in full attention, ascending."""
        if self.chosen_start is not None:
            return (self.chosen_start,)
        after = 1 if self.is_last else 0
        return tuple(
            max(0, self.clean - before * self.canvas)
            for before in range(self.blocks - 1 + after, after - 1, -1)
        )

    @property
    def scored_clean(self) -> int:
        """Clean tokens per example whose prediction is scored."""
        return self.clean - 1 if self.is_last else 0

    @property
    def forwards(self) -> tuple[StepShape, ...]:
        """Shapes of the forwards that the blocks of an example take; the last one is the largest."""
        count = -(-self.blocks // (self.blocks_at_once or self.blocks))
        edges = [self.blocks * at // count for at in range(count + 1)]
        return tuple(
            replace(
                self,
                blocks=stop - first,
                blocks_at_once=None,
                # before the last of its blocks
                clean=max(0, self.clean - (self.blocks - stop + 1) * self.canvas)
                if stop < self.blocks
                else self.clean,
                is_last=stop == self.blocks,
            )
            for first, stop in itertools.pairwise(edges)
        )


@dataclass(frozen=True)
class FsdpUnit:
    """Weights that FSDP gathers and reduces together, in bytes on one rank."""

    gathered: int  # whole unit in the compute dtype
    flat: int  # the collective's buffer; 0 on one rank, where nothing is gathered
    gradient: int  # whole gradient in the compute dtype
    reduction: int  # whole gradient in float32: the input of the reduction
    shard: int  # this rank's float32 gradient
    received: int  # by an all-gather, from other ranks
    reduced: int  # by a reduce-scatter, from other ranks


@dataclass(frozen=True)
class FsdpUnits:
    """The engine's FSDP units; under expert parallelism a layer's experts are a separate unit."""

    root: FsdpUnit
    layers: tuple[FsdpUnit, ...]
    experts: tuple[FsdpUnit, ...]  # without frozen weights that FSDP ignores


def fsdp_units(architecture: Architecture, step: StepShape) -> FsdpUnits:
    """Divide the model into units as `parallelize.shard_model` does."""
    return _fsdp_units(architecture, step.world_size, step.ep)


@functools.lru_cache(maxsize=64)  # the searches change the batch more often than the mesh
def _fsdp_units(architecture: Architecture, world_size: int, ep: int) -> FsdpUnits:
    separate = ep > 1
    # Each expert is then on one rank: FSDP ignores it if it is frozen.
    ignored = separate and ep == world_size
    compute = architecture.compute_bytes
    by_layer: list[tuple[list[Weight], list[Weight]]] = [([], []) for _ in architecture.layers]
    root: list[Weight] = []
    for weight in architecture.weights:
        group = root if weight.layer is None else by_layer[weight.layer][separate and weight.expert]
        if weight.trained or not (ignored and weight.expert):
            group.append(weight)
    return FsdpUnits(
        root=_fsdp_unit(root, world_size, 1, compute),
        layers=tuple(_fsdp_unit(dense, world_size, 1, compute) for dense, _ in by_layer),
        experts=tuple(_fsdp_unit(experts, world_size, ep, compute) for _, experts in by_layer),
    )


def local_numel(weight: Weight, step: StepShape) -> int:
    """Return the number of elements of a parameter on the rank that has the most of it."""
    return weight.shard(step.world_size, step.ep)


def memory_timeline(architecture: Architecture, step: StepShape) -> dict[str, dict[str, int]]:
    """Return the bytes by part at each moment that can be the peak, from the second step on.

    The first step has no optimizer state yet.
    """
    accumulating, step = step.micro_steps * len(step.forwards) > 1, step.forwards[-1]
    groups = fsdp_units(architecture, step)
    trained = [weight for weight in architecture.weights if weight.trained]
    weights = sum(local_numel(weight, step) * weight.itemsize for weight in architecture.weights)
    optimizer = sum(local_numel(weight, step) for weight in trained) * 2 * FLOAT
    of_layer = [
        layer.shard + experts.shard
        for layer, experts in zip(groups.layers, groups.experts, strict=True)
    ]
    all_gradients = groups.root.shard + sum(of_layer)
    before, steady = all_gradients if accumulating else 0, _steady(architecture, step)
    kept = [
        steady + so_far
        for so_far in itertools.accumulate(
            _kept(architecture, step, index) for index in range(len(architecture.layers))
        )
    ]
    table = architecture.vocabulary * architecture.hidden
    table_gradient = architecture.compute_bytes * table if architecture.full else 0
    last = len(architecture.layers) - 1
    found: dict[str, dict[str, int]] = {}

    def moment(
        name: str,
        gradients: int,
        activations: int = 0,
        communication: int = 0,
        *,
        workspace: int = 0,
        loss: int = 0,
    ) -> None:
        held = (weights, gradients, optimizer, activations, workspace, loss, communication)
        found[name] = dict(zip(PARTS, held, strict=True))

    # The last layer stays gathered until its backward pass.
    held = groups.layers[-1].gathered + groups.experts[-1].gathered
    first = groups.layers[0]
    moment(
        "gathering, embedding",
        before,
        communication=groups.root.gathered + groups.root.flat + first.gathered + first.flat,
    )
    for index in _heaviest(groups.layers):
        layer, experts = groups.layers[index], groups.experts[index]
        waiting = groups.root.gathered + (held if step.self_conditioning and index < last else 0)
        gathering = waiting + layer.gathered + layer.flat
        previous = groups.layers[max(0, index - 1)].flat
        moment(f"forward, gathering layer {index + 1}", before, kept[index], gathering + previous)
        moment(
            f"forward, layer {index + 1}",
            before,
            kept[index],
            waiting + layer.gathered + experts.gathered + (experts.flat or layer.flat),
            workspace=_forward_workspace(architecture, step, index),
        )
    all_kept = kept[last] + _tail(architecture, step)
    # The last unit's flat buffer, if it was gathered in this pass, is freed when the root's forward
    # pass ends, after the loss.
    flat = (
        (groups.experts if groups.experts[last].gathered else groups.layers)[last].flat
        if not step.self_conditioning
        else 0
    )
    moment(
        "loss",
        before,
        all_kept,
        groups.root.gathered + held + flat,
        loss=_loss_workspace(architecture, step),
    )
    if architecture.full:
        sums = FLOAT * table + (table_gradient if architecture.compute_bytes < FLOAT else 0)
        moment("backward, loss", before, all_kept, groups.root.gathered + held, loss=sums)
    done = 0
    for index in range(last, -1, -1):
        name, layer, experts = f"layer {index + 1}", groups.layers[index], groups.experts[index]
        ahead = groups.root.gathered + (groups.layers[index - 1].flat if index else 0)
        behind = groups.layers[index + 1].reduction if index < last else 0
        gradients = all_gradients if accumulating else done
        rest, rows = _saved(architecture, step, architecture.layers[index])
        inputs = kept[index] - (0 if is_recomputed(step.checkpointing, index) else rest + rows)
        moment(
            f"backward, experts of {name}",
            gradients,
            inputs,
            ahead + layer.gathered + experts.gathered + behind,
            workspace=rest + rows + _combine_workspace(architecture, step),
            loss=table_gradient,
        )
        if experts.reduction:
            row = architecture.experts_per_token * architecture.hidden * architecture.compute_bytes
            moment(
                f"backward, reducing the experts of {name}",
                gradients + experts.shard,
                inputs,
                ahead + layer.gathered + experts.gradient + experts.reduction,
                workspace=rest + step.tokens * row,
                loss=table_gradient,
            )
        moment(
            f"backward, reducing {name}",
            gradients + of_layer[index],
            inputs,
            ahead + layer.gradient + layer.reduction,
            loss=table_gradient,
        )
        done += of_layer[index]
    if architecture.full:
        # The gradients of the lookups and the soft embedding are added to the head's; in float32 in
        # place.
        temporary = step.self_conditioning and architecture.compute_bytes < FLOAT
        moment(
            "backward, embedding",
            all_gradients - (0 if accumulating else groups.root.shard),
            steady,
            groups.root.gathered + groups.layers[0].reduction,
            loss=table_gradient * (2 if temporary else 1),
        )
    largest = max(local_numel(weight, step) for weight in trained)
    moment("update", all_gradients, workspace=largest * FLOAT)
    return found


def peak(timeline: dict[str, dict[str, int]]) -> tuple[str, dict[str, int]]:
    """Return the moment that holds the most, and its parts."""
    return max(timeline.items(), key=lambda item: sum(item[1].values()))


def peak_by_phase(timeline: dict[str, dict[str, int]]) -> dict[str, int]:
    """Return the bytes of the peak of each phase, the phases in a step's order."""
    highest: dict[str, int] = {}
    for name, parts in timeline.items():
        phase = name.split(",")[0]
        highest[phase] = max(highest.get(phase, 0), sum(parts.values()))
    return highest


def _fsdp_unit(weights: list[Weight], world_size: int, ep: int, compute: int) -> FsdpUnit:
    padded = trained = whole = shard = 0
    ranks = world_size // ep
    for weight in weights:
        local = weight.shard(world_size, ep)
        padded += local * ranks
        if weight.trained:
            trained += local * ranks
            whole += weight.numel // ep
            shard += local
    others = (ranks - 1) / ranks
    return FsdpUnit(
        gathered=padded * compute,
        flat=padded * compute if ranks > 1 else 0,
        gradient=whole * compute,
        reduction=trained * FLOAT,
        shard=shard * FLOAT,
        received=round(padded * compute * others),
        reduced=round(trained * FLOAT * others),
    )


def _heaviest(groups: tuple[FsdpUnit, ...]) -> set[int]:
    """Return the layers of a forward pass that can be its peak: the last one of each size."""
    return set({group.gathered: index for index, group in enumerate(groups)}.values())


def _kept(architecture: Architecture, step: StepShape, index: int) -> int:
    """Return the bytes kept from a layer's forward to its backward pass."""
    if is_recomputed(step.checkpointing, index):
        return step.tokens * architecture.hidden * architecture.compute_bytes
    return sum(_saved(architecture, step, architecture.layers[index]))


def _saved(architecture: Architecture, step: StepShape, layer: LayerShape) -> tuple[int, int]:
    """Return the bytes that autograd keeps of a layer: (all but the experts, the experts' rows)."""
    c, hidden, trained = architecture.compute_bytes, architecture.hidden, architecture.full
    # Whether the experts' projections keep their inputs.
    inputs = trained or architecture.expert_rank > 0
    # Inputs of the norms, three of which share one, and outputs of matmuls.
    norms = hidden * (6 + (3 if inputs else 2))
    # Inputs of the heads' norms.
    heads = layer.query_width + layer.key_width * (2 if layer.own_values else 1)
    rows = step.clean + step.canvas_rows
    calls = canvas_calls(_canvases(step), architecture.window if layer.sliding else None)
    joined = sum(call.key_rows for call in calls) / rows  # keys and values of the canvases' calls
    # Queries, the calls' outputs, joined output.
    attention = 3 * layer.query_width + 2 * layer.key_width * (1 + joined)
    mlp = 3 * architecture.intermediate
    router = FLOAT * architecture.experts + 48 * architecture.experts_per_token
    scalars = FLOAT * (8 + 2 * architecture.heads + 2 * layer.key_width // layer.head_dim)
    adapters = c * architecture.rank * (7 if layer.own_values else 6)
    # A mask and a copy of each input, while projections without dropout share one.
    if architecture.dropout:
        dropped = (
            hidden * (5 if layer.own_values else 4) + layer.query_width + architecture.intermediate
        )
        adapters += dropped + c * hidden * (3 if layer.own_values else 2)
    per_token = c * (norms + heads + attention + mlp) + router + scalars + adapters
    # Gate and up; their weighted product if the next projection is trained; the rows if they came
    # from other ranks.
    rows_kept = inputs and (step.ep > 1 or architecture.expert_rank > 0)
    row = c * (
        architecture.expert_size * (3 if inputs else 2)
        + hidden * rows_kept
        + 2 * architecture.expert_rank
    )
    return round(step.tokens * per_token), step.tokens * architecture.experts_per_token * row


def _combine_workspace(architecture: Architecture, step: StepShape) -> int:
    """Return the bytes in addition to a layer's saved tensors while the experts are differentiated,
    its widest point.
    """
    c, hidden = architecture.compute_bytes, architecture.hidden
    # A row as sent and as received, of which the latter stays until the layer's end; float32 where
    # it is weighted.
    received = not (architecture.full or architecture.expert_rank)  # else it is counted as saved
    row = c * hidden * (2 + received if step.ep > 1 else 1) + FLOAT * architecture.expert_size * (
        1 if step.ep > 1 else 2
    )
    return step.tokens * (architecture.experts_per_token * row + 3 * c * hidden)


def _forward_workspace(architecture: Architecture, step: StepShape, index: int) -> int:
    """Return the bytes of a layer's forward pass at its widest, in addition to what it keeps: the
    experts' rows.
    """
    c, hidden, several_ranks = architecture.compute_bytes, architecture.hidden, step.ep > 1
    if not is_recomputed(step.checkpointing, index):
        return (
            step.tokens * c * architecture.experts_per_token * hidden * (2 if several_ranks else 1)
        )
    rows = architecture.experts_per_token * (
        hidden * (3 if several_ranks else 1) + 3 * architecture.expert_size
    )
    return step.tokens * c * (rows + 6 * hidden)


def _steady(architecture: Architecture, step: StepShape) -> int:
    """Return the bytes kept from the embedding to the end of the backward pass: rotary tables,
    self-conditioning.
    """
    c, hidden = architecture.compute_bytes, architecture.hidden
    head_dims = sum({layer.sliding: layer.head_dim for layer in architecture.layers}.values())
    canvas = step.micro_batch * step.canvas_rows
    total = step.tokens * 2 * c * head_dims
    for sliding in {layer.sliding for layer in architecture.layers}:
        window = architecture.window if sliding else None
        masks = step.micro_batch * canvas_mask_elements(canvas_calls(_canvases(step), window))
        total += c * (masks + (clean_mask_elements(step.clean, window) if window else 0))
    if step.self_conditioning:
        total += canvas * c * hidden * (2 if architecture.full else 1)
    if architecture.full:
        total += canvas * (c * (4 * architecture.intermediate + 2 * hidden) + FLOAT * 4 * hidden)
    return total


def _canvases(step: StepShape) -> tuple[tuple[int, int, int], ...]:
    return tuple((0, past, step.canvas) for past in step.pasts)


def _tail(architecture: Architecture, step: StepShape) -> int:
    """Return the bytes between the last layer and the loss: the last norm, the scored rows and
    their gradient.
    """
    c = architecture.compute_bytes
    norm = FLOAT * (2 if architecture.full else 1) + c
    scored = step.micro_batch * (step.scored_clean + step.canvas_rows)
    return architecture.hidden * (step.tokens * norm + scored * 2 * c)


def _loss_workspace(architecture: Architecture, step: StepShape) -> int:
    """Return the bytes of a chunk of logits, a tile of it, and the float32 gradient of a trained
    embedding.
    """
    c, vocabulary, hidden = architecture.compute_bytes, architecture.vocabulary, architecture.hidden
    rows = min(
        chunk_rows(vocabulary, step.device),
        step.micro_batch * (step.scored_clean + step.canvas_rows),
    )
    columns = tile_columns(rows, vocabulary, step.device)
    found = FLOAT * rows * (vocabulary + columns + 2 * hidden)
    if c < FLOAT:  # an operand, and a product that cannot be added in place
        found += c * columns * (rows + (hidden if architecture.full else 0))
    return found + (FLOAT * vocabulary * hidden if architecture.full else 0)
