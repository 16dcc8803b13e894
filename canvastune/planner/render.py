"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from canvastune.io.byte_size import format_bytes
from canvastune.perf_model.checkpoints import DISK_RATE, MOST_SHARE
from canvastune.perf_model.hardware import FRAGMENTATION, MATMUL_SHARE
from canvastune.perf_model.step_time import LAUNCHES, WAITS
from canvastune.perf_model.validation import MOST_SHARE as VALIDATION_SHARE
from canvastune.planner.plan import EvaluationPlan, Plan, part_name

_METHODS = {"lora": "LoRA", "full": "full fine-tuning"}

_CHECKPOINTING = {True: "on", "selective": "on every second layer", False: "off"}


def render(plan: Plan) -> str:
    """Return the whole plan as plain text, at most 100 columns wide."""
    lines = [f"Plan of {plan.name}: {_METHODS[plan.method]} of {plan.model}"]
    lines += [f"  {note}" for note in plan.notes]
    lines += [
        "",
        *(f"  {line}" for line in summarize(plan).splitlines()),
        "",
        (
            f"  {plan.world_size} ranks on {plan.accelerator} = efsdp {plan.efsdp} x ep {plan.ep},"
            f" compute in {plan.precision}"
        ),
        (
            f"  global batch {plan.global_batch_size} = {plan.world_size} ranks x"
            f" {plan.micro_batch_size} examples x {plan.micro_steps} forward passes"
        ),
        f"  sequences of {plan.seq_length} tokens, canvas {plan.canvas_length}",
        *(
            [
                f"  up to {plan.blocks} blocks per example and step, in"
                f" {plan.forwards_per_example} forward passes"
            ]
            if plan.blocks > 1
            else []
        ),
        f"  activation checkpointing {_CHECKPOINTING[plan.activation_checkpointing]}",
        "",
        *_parameters(plan),
        "",
        *_memory(plan),
        "",
        *_work(plan),
        "",
        *_time(plan),
        "",
        *_blocks(plan),
        "",
        *_evaluation(plan.evaluation),
        "",
        *_verdict(plan),
    ]
    return "\n".join(lines) + "\n"


def summarize(plan: Plan) -> str:
    """Return what a run needs, and whether it fits, in two lines."""
    needed, limit = format_bytes(plan.needed_bytes), format_bytes(plan.limit_bytes)
    fits = "fits" if plan.fits else "does not fit"
    return (
        f"{plan.world_size} ranks on {plan.accelerator}: {needed} of {limit} each: {fits}\n"
        f"a step takes about {_seconds(plan.step_seconds)}, all steps {_seconds(plan.run_seconds)}"
        f"{', ' if _cost(plan) else ''}{_cost(plan)}"
    )


def _cost(plan: Plan) -> str:
    """Return the accelerator-hours of all steps and, with a price, their cost; "" on CPU."""
    hours = plan.accelerator_hours
    if plan.hour_price is not None:
        return f"{hours:.3g} accelerator-hours, {hours * plan.hour_price:,.2f} {plan.currency}"
    return "" if plan.accelerator.startswith("CPU") else f"{hours:.3g} accelerator-hours"


def _parameters(plan: Plan) -> list[str]:
    rows = [
        (kind, _count(c.total), _count(c.active), _count(c.trained))
        for kind, c in plan.parameters.items()
    ]
    return _table(("Parameters", "total", "active per token", "trained"), rows)


def _memory(plan: Plan) -> list[str]:
    unit = _byte_unit(plan.needed_bytes)
    rows = [(part_name(part), unit.format(size)) for part, size in plan.memory.items()]
    rows += [
        ("peak", unit.format(plan.memory_bytes)),
        (
            f"driver, collectives, fragmentation ({FRAGMENTATION:.0%})",
            unit.format(plan.reserved_bytes),
        ),
        ("needed", unit.format(plan.needed_bytes)),
        ("available", unit.format(plan.limit_bytes)),
    ]
    phases = [(phase, unit.format(size)) for phase, size in plan.phases.items()]
    longest = plan.seq_length + plan.canvas_length - 1
    return [
        *_table((f"Memory per rank at the peak ({plan.moment})", unit.name), rows),
        f"  Assumes examples of {longest} tokens, with the last block filled.",
        f"  Checkpoints: {format_bytes(plan.checkpoint_bytes)} each, up to {plan.checkpoints} on"
        " disk at once.",
        *_checkpoint_times(plan),
        "",
        *_table(("Peak memory per rank in each phase of a step", unit.name), phases),
    ]


def _pod_memory(plan: Plan) -> str:
    if plan.host_limit_bytes is None:
        return ""
    return f", of {format_bytes(plan.host_limit_bytes)} that a pod has"


def _checkpoint_times(plan: Plan) -> list[str]:
    times = plan.checkpoint_times
    lines = [
        f"  At {format_bytes(int(DISK_RATE))}/s, writing one takes {_seconds(times.write)}, and the last"
        f" one, without optimizer state, {_seconds(times.last)}."
        if times.last
        else f"  At {format_bytes(int(DISK_RATE))}/s, writing one takes {_seconds(times.write)}. After the last"
        " step, the complete model is written instead."
    ]
    if plan.host_bytes:
        pinned = f", after {_seconds(times.pinning)} to pin that memory, once" * bool(times.pinning)
        lines += [
            f"  Copied first to host memory, {format_bytes(plan.host_copy_bytes)} a rank and"
            f" {format_bytes(plan.host_bytes)} a node{_pod_memory(plan)},",
            f"  which takes {_seconds(times.staging)}{pinned}.",
        ]
    if not times.waited + times.overlapped:
        return [*lines, "  Only a run that is stopped writes one."]
    lines += [
        f"  Training waits for them for {_seconds(times.waited)}, {times.share:.0%} of a run's time:"
        f" {_seconds(times.staged)} for copies, {_seconds(times.behind)} for files;",
        f"  {_seconds(times.overlapped)} of writing take place while it runs.",
    ]
    if times.share > MOST_SHARE:
        if times.behind > 1.01 * times.last:
            lines.append(
                "  With --set train.checkpoint_every="
                f"{times.hidden_from}, training "
                + ("only waits for the last one." if times.last else "waits for none of them.")
            )
        if times.last:
            lines.append(
                f"  The last one takes at most {MOST_SHARE:.0%} of a run of {times.enough:,} steps"
                " or more."
            )
    return lines


def _work(plan: Plan) -> list[str]:
    total, all_bytes = sum(plan.flops_by_pass.values()), sum(plan.bytes_received.values())
    flop = _Unit("TFLOP", 1e12) if total >= 1e12 else _Unit("GFLOP", 1e9)
    byte = _byte_unit(all_bytes)
    passes = [
        (name, flop.format(value), f"{value / total:.0%}")
        for name, value in plan.flops_by_pass.items()
        if value
    ]
    parts = [
        (name, flop.format(value), f"{value / total:.0%}")
        for name, value in plan.flops_by_part.items()
        if value
    ]
    received = [(name, byte.format(value)) for name, value in plan.bytes_received.items() if value]
    received.append(("total", byte.format(all_bytes)))
    return [
        *_table(
            ("Compute per rank and step", flop.name, "share"),
            [*passes, ("total", flop.format(total), "")],
        ),
        "",
        *_table(("of which", flop.name, "share"), sorted(parts, key=lambda row: -float(row[1]))),
        "",
        *_table(("Received per rank and step", byte.name), received),
    ]


def _time(plan: Plan) -> list[str]:
    seconds = plan.seconds
    rows = [
        ("experts", _seconds(seconds.experts)),
        ("everything else", _seconds(seconds.everything_else)),
        ("all-gather and reduce-scatter (overlapped)", _seconds(seconds.gathering)),
        ("all-to-all of expert rows", _seconds(seconds.exchange)),
        ("optimizer", _seconds(seconds.update)),
        *(
            [
                (f"{LAUNCHES} by the host (overlapped)", _seconds(seconds.launches)),
                ("host waits for the GPU", _seconds(seconds.waits)),
            ]
            if seconds.launches
            else []
        ),
        ("one step", _seconds(plan.step_seconds)),
        ("all steps", _seconds(plan.run_seconds)),
    ]
    if cost := _cost(plan):
        rows.append(("cost of all steps", cost))
    rate = plan.tokens_per_step / plan.step_seconds
    return [
        *_table(("Time, estimated", ""), rows),
        (
            f"  {plan.tokens_per_step:,} tokens per step, {rate:,.0f} tokens/s;"
            f" {plan.model_flops_utilisation:.0%} of the peak rate, if matmuls reach {MATMUL_SHARE:.0%}"
        ),
        f"  A step is bound by {seconds.bound}.",
        *_host(plan),
        *_advice(plan),
        *_validation(plan),
        "  Assumes examples of full length; shorter ones take less time.",
    ]


def _host(plan: Plan) -> list[str]:
    """Say what the host does in a step, and what loops over experts cost."""
    if not plan.launches:
        return []
    lines = [
        f"  The host launches {plan.launches:,} kernels and waits {plan.waits} times for its GPU."
    ]
    if plan.expert_loops:
        loops = plan.seconds.expert_launches
        wait = plan.seconds.waits * plan.expert_loops / plan.waits
        lines += [
            f"  PyTorch loops over the experts of {plan.expert_loops} grouped matmuls here, each"
            " after a wait:",
            f"  {_seconds(loops)} of these launches, {_seconds(wait)} of these waits.",
        ]
    return lines


def _validation(plan: Plan) -> list[str]:
    times = plan.validation
    assumed = "" if plan.answer_blocks else ", assumed for data that it trains on once"
    lines = [
        f"  {times.count} validations of {times.rows:,} rows{assumed}: {times.forwards} forwards a"
        f" rank, {_seconds(times.seconds)} each,",
        f"  {times.share:.1%} of the time of all steps.",
    ]
    if times.share > VALIDATION_SHARE:
        lines.append(
            f"  At most {VALIDATION_SHARE:.0%} with --set train.validate_every={times.every_from}."
            if times.every_from
            else "  Fewer rows take less: data.validation_rows, train.validation_batches."
        )
    return lines


def _advice(plan: Plan) -> list[str]:
    """Say how to fill GPUs that wait for their host, where memory allows it."""
    seconds = plan.seconds
    larger = plan.largest_micro_batch or 0
    if seconds.bound != LAUNCHES or larger <= plan.micro_batch_size:
        return []
    bounds = seconds.bounds
    busy = max(size for name, size in bounds.items() if name not in (LAUNCHES, WAITS))
    return [
        f"  GPUs wait for their host {1 - busy / bounds[LAUNCHES]:.0%} of the time, so a larger"
        " train.global_batch_size hardly takes longer."
    ]


def _blocks(plan: Plan) -> list[str]:
    canvas = plan.canvas_length
    if plan.answer_blocks is None:
        most = -(-plan.seq_length // canvas)
        assumed = (
            f"  Assumes answers of {most} blocks of {canvas} tokens, which fill data.seq_length;"
            " pass --data for yours."
        )
    else:
        rows, most = sum(plan.answer_blocks.values()), max(plan.answer_blocks)
        several = sum(count for blocks, count in plan.answer_blocks.items() if blocks > 1)
        mean = sum(blocks * count for blocks, count in plan.answer_blocks.items()) / rows
        assumed = (
            f"  Answers have {mean:.1f} blocks of {canvas} tokens on average, at most {most};"
            f" {several / rows:.0%} have more than one."
        )
    unit = _byte_unit(max(cost.memory_bytes for cost in plan.block_costs))
    table = _table(
        (
            "Blocks of an answer (objective.blocks)",
            "per epoch",
            "step",
            "scored/s",
            "per GPU-hour",
            unit.name,
        ),
        [
            (
                f"{cost.blocks}{'' if cost.fits else ' (does not fit)'}",
                f"{cost.share:.0%}",
                _seconds(cost.step_seconds),
                f"{cost.scored_per_second:,.0f}",
                f"{cost.scored_per_gpu_hour:,.0f}",
                unit.format(cost.memory_bytes),
            )
            for cost in plan.block_costs
        ],
    )
    return [*table, assumed]


def _evaluation(plan: EvaluationPlan) -> list[str]:
    unit = _byte_unit(plan.needed_bytes)
    rows = [(part, unit.format(size)) for part, size in plan.memory.items()]
    rows += [
        ("needed", unit.format(plan.needed_bytes)),
        ("available", unit.format(plan.limit_bytes)),
    ]
    gpus = "1 GPU" if plan.gpus == 1 else f"{plan.gpus} GPUs"
    divided = f", experts divided over {plan.ep}" if plan.ep > 1 else ""
    return [
        *_table((f"Evaluation on {gpus}{divided}", unit.name), rows),
        (
            f"  {plan.rows} questions, {plan.batch_size} at once per GPU; both models take at most"
            f" {_seconds(plan.seconds)} for answers of {plan.blocks_per_answer:.1f} blocks."
        ),
        *([] if plan.fits else ["  Does not fit."]),
    ]


def _verdict(plan: Plan) -> list[str]:
    lines = ["Fits." if plan.fits else "Does not fit."]
    batch, length = plan.largest_micro_batch, plan.largest_sequence
    if batch:
        lines.append(f"  Largest micro-batch at {plan.seq_length} tokens: {batch}")
    if length:
        lines.append(
            f"  Longest sequence with {plan.micro_batch_size} examples per forward pass: {length:,} tokens"
        )
        lines.append(f"    limited by {plan.sequence_limit}")
    if plan.largest_blocks:
        lines.append(
            f"  Most blocks per example and step (objective.blocks): {plan.largest_blocks}"
        )
    for change in plan.changes:
        lines.append(
            f"  Would fit with {' and '.join(change.settings)}: {format_bytes(change.memory_bytes)}"
        )
    return lines


@dataclass(frozen=True)
class _Unit:
    """The unit of a column."""

    name: str
    size: float
    digits: int = 2

    def format(self, value: float) -> str:
        return f"{value / self.size:.{self.digits}f}"


def _byte_unit(largest: float) -> _Unit:
    """Return the unit for a column of bytes: MB where GB would show small parts as 0.00."""
    return _Unit("GB", 1e9) if largest >= 5e9 else _Unit("MB", 1e6, 1)


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    everything = [head, *rows]
    widths = [max(len(row[column]) for row in everything) for column in range(len(head))]

    def line(row: tuple[str, ...], indent: str) -> str:
        first = indent + row[0]
        return (
            first.ljust(widths[0] + 2)
            + "".join(
                f"  {cell.rjust(width)}" for cell, width in zip(row[1:], widths[1:], strict=True)
            )
        ).rstrip()

    return [line(head, ""), *(line(row, "  ") for row in everything[1:])]


def _count(number: int) -> str:
    if number >= 1e8:
        return f"{number / 1e9:.2f} B"
    return f"{number / 1e6:.2f} M" if number >= 1e4 else str(number)


def _seconds(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.1f} ms"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"
