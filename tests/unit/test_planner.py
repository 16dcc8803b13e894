"""What a plan says: the released model's known sizes, what fits, what would, its files.

Against the engine: test_plan_measured.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import yaml

from canvastune.config import RunConfig, load_config
from canvastune.config.cluster import parse_quantity
from canvastune.config.schema import ModelConfig
from canvastune.errors import UserError
from canvastune.perf_model import flops as work
from canvastune.perf_model.checkpoints import (
    DISK_RATE,
    MOST_SHARE,
    CheckpointTimes,
    checkpoint_times,
)
from canvastune.perf_model.launches import LAUNCH_SECONDS
from canvastune.perf_model.memory import StepShape
from canvastune.perf_model.step_time import LAUNCHES, WAITS, Seconds
from canvastune.planner import planner
from canvastune.planner.plan import Plan, as_tree, refuse_if_too_big
from canvastune.planner.planner import SHIPPED_CONFIG, find_architecture, make_plan, write_plan
from canvastune.planner.render import render, summarize
from components.plan.step import describe_shortage
from tests.support.small import CANVAS
from tools.chart_table import CHART

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
DRY_RUN = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_dry_run.json"
GIB = 2**30


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(RECIPES / f"{name}.yaml", list(overrides))


@functools.cache
def released(name: str, *overrides: str, ranks: int = 8) -> Plan:
    """Plan a recipe, by default with each layer recomputed."""
    settings = ("train.activation_checkpointing=true", *overrides)
    return make_plan(recipe(name, *settings), SHIPPED_CONFIG, ranks)


def refusal(name: str, *overrides: str, ranks: int = 8) -> str:
    with pytest.raises(UserError) as error:
        refuse_if_too_big(released(name, *overrides, ranks=ranks))
    return f"{error.value} {error.value.hint}"


def test_the_released_model_has_its_known_parameters_by_kind() -> None:
    counts = released("gsm8k_sft").parameters
    expected = {
        "experts": 22.84,
        "attention": 1.11,
        "embedding": 0.74,
        "dense MLP": 0.54,
        "vision tower (not in memory)": 0.57,
        "total": 25.82,
    }
    assert {kind: round(counts[kind].total / 1e9, 2) for kind in expected} == expected
    assert round(counts["total"].active / 1e9, 2) == 3.84
    frozen = counts["router"].total + counts["vision tower (not in memory)"].total
    assert counts["total"].trained == counts["total"].total - frozen, (
        "full fine-tuning trains all but the router and the vision tower"
    )


def test_an_adapter_of_rank_16_on_the_released_model_has_18_6_million_parameters() -> None:
    counts = released("gsm8k_lora").parameters
    assert counts["total"].trained == counts["adapters"].total == 18_585_600
    assert released("gsm8k_lora", "lora.rank=32").parameters["adapters"].total == 2 * 18_585_600


def test_expert_adapters_of_rank_16_on_the_released_model_have_475_8_million_parameters() -> None:
    plan = released("gsm8k_lora", "lora.experts=true")
    expected = 30 * 128 * 16 * (2816 + 2 * 704 + 704 + 2816)
    assert plan.parameters["expert adapters"].total == expected == 475_791_360
    assert plan.parameters["expert adapters"].active == expected * 8 // 128
    assert plan.parameters["total"].trained == expected + 18_585_600
    more = sum(
        plan.memory[part] - released("gsm8k_lora").memory[part] for part in ("weights", "optimiser")
    )
    assert more == 3 * 4 * expected // 8, (
        "each of eight ranks holds an eighth of the factors and of their two moments, in float32"
    )


def test_the_released_model_needs_its_known_memory_on_eight_ranks() -> None:
    full, lora = released("gsm8k_sft"), released("gsm8k_lora")
    assert full.memory_bytes / GIB == pytest.approx(51, rel=0.03), (
        "53 before the uses of the embedding shared one gradient"
    )
    assert lora.memory_bytes / GIB == pytest.approx(8.9, rel=0.03)
    assert full.fits
    assert lora.fits


def test_the_coins_of_self_conditioning_are_counted_by_their_probabilities() -> None:
    for batch, world_size in ((1, 1), (1, 3), (3, 2)):
        step = StepShape(
            world_size, 1, batch, 1, 64, CANVAS, checkpointing=True, self_conditioning=0.3
        )
        anyone = idle = slowest = 0.0
        for coins in itertools.product([0, 1], repeat=batch * world_size):
            probability = 0.3 ** sum(coins) * 0.7 ** (len(coins) - sum(coins))
            by_rank = [sum(coins[rank * batch : (rank + 1) * batch]) for rank in range(world_size)]
            anyone += probability * any(coins)
            idle += probability * (any(coins) and not by_rank[0])
            slowest += probability * max(by_rank) / batch
        expected = (anyone, idle, slowest)
        assert (
            work.any_self_conditioning_share(step),
            work.padding_pass_share(step),
            work.slowest_self_conditioning(step),
        ) == pytest.approx(expected)
        always = dataclasses.replace(step, self_conditioning=1.0)
        assert (
            work.any_self_conditioning_share(always),
            work.padding_pass_share(always),
            work.slowest_self_conditioning(always),
        ) == (
            1,
            0,
            1,
        )


def test_the_largest_micro_batch_and_sequence_fit_and_the_next_do_not() -> None:
    plan = released("gsm8k_sft")
    batch, length = plan.largest_micro_batch, plan.largest_sequence
    assert batch is not None
    assert length is not None
    for fits, grown in ((True, 0), (False, 1)):
        count = batch + grown
        assert released("gsm8k_sft", f"train.global_batch_size={8 * count}").fits is fits, (
            f"{count} examples a forward"
        )
        assert released("gsm8k_sft", f"data.seq_length={length + grown}").fits is fits, (
            f"{length + grown} tokens"
        )


def test_a_plan_names_what_limits_the_longest_sequence() -> None:
    """Without a head, whose logits are computed in tiles, the inputs of the layers grow most."""
    small, whole = released("gsm8k_lora", "hardware.gpu_memory=40"), released("gsm8k_lora")
    assert small.sequence_limit is not None
    assert small.largest_sequence is not None
    assert small.sequence_limit.startswith("memory in backward"), small.sequence_limit
    assert whole.sequence_limit is not None
    positions = whole.largest_sequence == 262_144
    assert positions == (whole.sequence_limit == "the model's positions")


def test_the_most_blocks_of_an_example_fit_and_one_more_does_not() -> None:
    settings = ("data.seq_length=16384", "hardware.gpu_memory=20")
    plan = released("gsm8k_lora", *settings)
    assert plan.fits
    assert plan.largest_blocks is not None
    for fits, grown in ((True, 0), (False, 1)):
        blocks = plan.largest_blocks + grown
        assert released("gsm8k_lora", *settings, f"objective.blocks={blocks}").fits is fits, blocks


def test_blocks_that_do_not_fit_together_fit_in_several_forwards() -> None:
    settings = ("data.seq_length=16384", "hardware.gpu_memory=20", "objective.blocks=all")
    plan = released("gsm8k_lora", *settings)
    assert not plan.fits
    named = [setting for change in plan.changes for setting in change.settings]
    (change,) = [setting for setting in named if setting.startswith("train.micro_batch_blocks=")]
    parted = released("gsm8k_lora", *settings, change)
    assert parted.fits
    assert parted.forwards_per_example == -(-plan.blocks // int(change.split("=")[1]))
    assert f"in {parted.forwards_per_example} forward passes" in render(parted)
    assert parted.model_flops == plan.model_flops
    assert sum(parted.flops_by_pass.values()) > sum(plan.flops_by_pass.values())


def test_a_run_that_cannot_fit_is_refused_with_its_number_by_part_and_the_smallest_change() -> None:
    told = refusal(
        "gsm8k_sft",
        "train.activation_checkpointing=false",
        "train.global_batch_size=64",
        "hardware.gpu_memory=70",
    )
    assert "70.0 GB" in told
    assert "optimizer 25.2" in told
    assert "--set train.activation_checkpointing=true" in told


@pytest.mark.parametrize(
    "overrides",
    [
        ["hardware.gpu_memory=40"],
        ["data.seq_length=65536"],
        ["train.activation_checkpointing=false", "train.global_batch_size=512"],
        ["train.method=lora", "lora.experts=true", "hardware.gpu_memory=12"],
    ],
)
def test_every_change_that_a_refusal_names_fits(overrides: list[str]) -> None:
    plan = released("gsm8k_sft", *overrides)
    assert not plan.fits
    assert plan.changes
    for change in plan.changes:
        ranks = next(
            (int(setting.split()[0]) for setting in change.settings if setting.endswith("ranks")), 8
        )
        settings = [setting for setting in change.settings if "=" in setting]
        changed = released("gsm8k_sft", *overrides, *settings, ranks=ranks)
        assert changed.fits, change.settings
        assert changed.needed_bytes == change.memory_bytes


def test_what_no_change_can_make_fit_is_refused_as_such() -> None:
    message = refusal("gsm8k_lora", "hardware.gpu_memory=1")
    assert "has 1.0 GB" in message
    assert "--set" not in message, "a change that would not fit is suggested"


@pytest.mark.parametrize(
    ("overrides", "ranks", "facts"),
    [
        (["parallel.ep=8"], 12, ("parallel.ep: found 8", "ranks, 12", "1, 2, 4")),
        (
            ["parallel.ep=24", "train.global_batch_size=24"],
            24,
            ("parallel.ep: found 24", "experts, 128"),
        ),
        (["train.global_batch_size=24"], 24, ("parallel.ep: found 8", "24 ranks", "over 3")),
        (["train.global_batch_size=12"], 8, ("train.global_batch_size: found 12", "8 ranks")),
        (["train.micro_batch_size=3"], 8, ("--set train.global_batch_size=24",)),
        (
            ["train.method=lora", "lora.experts=true", "lora.rank=12"],
            8,
            ("lora.rank: found 12", "multiple of 8"),
        ),
        (
            [
                "train.global_batch_size=512",
                "parallel.ep=4",
                "train.method=lora",
                "lora.experts=true",
            ],
            512,
            ("parallel.ep: found 4", "512 ranks", "over 128", "704"),
        ),
        (["hardware.accelerator=h1000"], 8, ("hardware.accelerator: found 'h1000'", "'h100'")),
    ],
)
def test_sizes_that_do_not_divide_are_refused_by_name(
    overrides: list[str], ranks: int, facts: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as error:
        released("gsm8k_sft", *overrides, ranks=ranks)
    for fact in facts:
        assert fact in f"{error.value} {error.value.hint}"


def test_a_config_that_is_not_a_diffusion_gemma_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"}', encoding="utf-8")
    with pytest.raises(UserError, match="gemma3"):
        make_plan(recipe("gsm8k_lora"), tmp_path, 8)


def test_the_released_model_is_planned_without_the_hub_and_the_plan_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unreachable(config: ModelConfig, *, weights: bool) -> Path:
        raise UserError(f"{config.id} cannot be fetched")

    monkeypatch.setattr(planner, "resolve_model", unreachable)
    config = recipe("gsm8k_lora")
    assert find_architecture(config.model) == SHIPPED_CONFIG
    assert "config.json" in render(make_plan(config, find_architecture(config.model), 8))
    with pytest.raises(UserError, match="someone/else"):
        find_architecture(ModelConfig(id="someone/else"))


def test_on_cpu_the_process_itself_is_part_of_the_memory(middling: Path) -> None:
    cpu = make_plan(
        recipe("gsm8k_lora", "hardware.accelerator=cpu", "hardware.gpu_memory=8"), middling, 8
    )
    gpu = make_plan(recipe("gsm8k_lora"), middling, 8)
    assert cpu.memory["process"] > 0 == gpu.memory.get("process", 0)
    assert cpu.memory_bytes == sum(cpu.memory.values())
    assert cpu.memory["weights"] == gpu.memory["weights"]
    assert "On CPU" in render(cpu)
    assert "On CPU" not in render(gpu)


def test_small_parts_of_a_plan_are_not_shown_as_nothing(tiny_model: Path) -> None:
    plan = make_plan(recipe("tiny_lora"), tiny_model, 2)
    assert 0 < plan.memory["weights"] < 5e6
    memory = render(plan).partition("\nCompute")[0]
    shown = dict(re.findall(r"^  (.+?)  +([\d.,]+)$", memory, re.MULTILINE))
    assert float(shown["weights"]) * 1e6 == pytest.approx(plan.memory["weights"], abs=1e5)


def test_a_faster_accelerator_and_more_ranks_shorten_a_step() -> None:
    seconds = [
        released("gsm8k_lora", f"hardware.accelerator={name}").step_seconds
        for name in ("b200", "h100", "a100", "l40s")
    ]
    assert seconds == sorted(seconds)
    plan = released("gsm8k_sft", "train.global_batch_size=64")
    spread = released("gsm8k_sft", "train.global_batch_size=64", ranks=64)
    assert spread.step_seconds < plan.step_seconds
    assert plan.tokens_per_step == spread.tokens_per_step == 64 * (1024 + 256)
    assert 0.05 < plan.model_flops_utilisation < 0.45


def test_plan_files_hold_the_plan_and_a_refused_plan_leaves_nothing(
    tmp_path: Path, middling: Path
) -> None:
    config = recipe("gsm8k_lora")
    plan = make_plan(config, middling, 8)
    write_plan(plan, config, tmp_path / "plan")
    written = json.loads((tmp_path / "plan" / "plan.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(as_tree(plan)))
    assert written["memory_bytes"] == sum(written["memory"].values())
    assert written["step_seconds"] > 0
    assert (tmp_path / "plan" / "plan.txt").read_text(encoding="utf-8") == render(plan)
    assert (tmp_path / "plan" / "provenance.json").is_file()
    too_big = released("gsm8k_sft", "hardware.gpu_memory=16")
    with pytest.raises(UserError):
        write_plan(too_big, config, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_plan_says_what_each_number_of_blocks_costs_and_gives() -> None:
    plan = released("gsm8k_lora", "data.seq_length=4096", "objective.blocks=all")
    assert [cost.blocks for cost in plan.block_costs] == [1, 2, 4, 8, "all"]
    assert [cost.share for cost in plan.block_costs] == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1]
    one, every = plan.block_costs[0], plan.block_costs[-1]
    for quantity in ("scored_per_second", "step_seconds", "memory_bytes"):
        values = [getattr(cost, quantity) for cost in plan.block_costs]
        assert values == sorted(values), f"{quantity} does not grow with the blocks"
    assert every.scored_tokens == 8 * 4096 == 16 * one.scored_tokens
    assert every.step_seconds == pytest.approx(plan.step_seconds), "another step than the plan's"
    assert every.memory_bytes == plan.needed_bytes
    assert every.scored_per_gpu_hour == pytest.approx(
        every.scored_tokens / every.step_seconds * 3600 / 8
    )
    short = released("gsm8k_lora", "data.seq_length=256")
    assert [cost.blocks for cost in short.block_costs] == ["all"], "one block is all of them"


def test_the_most_blocks_fit_and_one_more_does_not() -> None:
    settings = ("data.seq_length=8192", "objective.blocks=all", "hardware.gpu_memory=17")
    plan = released("gsm8k_lora", *settings)
    most = plan.largest_blocks
    assert most is not None
    assert 1 < most < 32
    assert not plan.fits
    assert [cost.fits for cost in plan.block_costs] == [
        cost.blocks != "all" and cost.blocks <= most for cost in plan.block_costs
    ]
    for blocks in (most, most + 1):
        fits = released("gsm8k_lora", *settings, f"objective.blocks={blocks}").fits
        assert fits == (blocks == most)
    found = [change.settings for change in plan.changes]
    assert any(s[0].startswith("objective.blocks=") and len(s) == 1 for s in found), found
    assert re.search(rf"\(objective\.blocks\): {most}\b", render(plan))


def test_a_plan_says_how_often_the_steps_see_each_row_of_a_local_file(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}')
    settings = ("train.steps=6", "train.global_batch_size=8")
    plan = released("gsm8k_lora", f"data.source={tmp_path / 'rows.jsonl'}", *settings)
    (note,) = [each for each in plan.notes if "data.source" in each]
    assert re.findall(r" ([\d.]+) ", note) == ["48", "16", "3"]
    assert not any("data.source" in each for each in released("gsm8k_lora", *settings).notes)


def test_the_data_card_decides_what_blocks_cost_and_give(tmp_path: Path) -> None:
    card = {
        "canvas_length": 256,
        "validation": 149,
        "block_histogram": {"1": 30, "3": 10},
        "prefix_tokens": {"mean": 128.4},
    }
    (tmp_path / "card.json").write_text(json.dumps(card), encoding="utf-8")
    plan = make_plan(recipe("gsm8k_lora"), SHIPPED_CONFIG, 8, tmp_path)
    assert [cost.blocks for cost in plan.block_costs] == [1, 2, "all"]
    assert [cost.share for cost in plan.block_costs] == [40 / 60, 50 / 60, 1]
    assert [cost.scored_tokens for cost in plan.block_costs] == [
        8 * 256 * mean for mean in (1, 1.25, 1.5)
    ]
    assert re.search(r"\b1\.5 blocks of 256 tokens\D+\b3\b\D+\b25% ", render(plan))
    (tmp_path / "card.json").write_text(json.dumps(card | {"canvas_length": 16}), encoding="utf-8")
    with pytest.raises(UserError, match=r"canvas_length is 16\b.* 256"):
        make_plan(recipe("gsm8k_lora"), SHIPPED_CONFIG, 8, tmp_path)
    with pytest.raises(UserError, match=r"missing.card\.json: "):
        make_plan(recipe("gsm8k_lora"), SHIPPED_CONFIG, 8, tmp_path / "missing")


def test_the_table_says_whether_it_fits_and_what_would() -> None:
    fits, not_ = (
        render(released("gsm8k_lora")),
        render(released("gsm8k_sft", "hardware.gpu_memory=40")),
    )
    assert re.search(r"^Fits\b", fits, re.MULTILINE)
    assert not re.search(r"^Fits\b", not_, re.MULTILINE)
    assert "train.method=lora" in not_
    assert "train.method=lora" not in fits
    assert max(map(len, fits.splitlines())) <= 120


def test_a_small_batch_is_bound_by_the_hosts_launches_and_a_larger_one_by_the_gpus() -> None:
    small = released("gsm8k_lora", "data.seq_length=256")
    large = released("gsm8k_lora_throughput")
    assert small.seconds.bound == LAUNCHES
    assert small.step_seconds == small.seconds.launches + small.seconds.waits
    assert small.seconds.launches > small.seconds.computation
    assert large.seconds.bound == "computation"
    assert large.tokens_per_step / large.step_seconds > small.tokens_per_step / small.step_seconds
    assert "train.global_batch_size" in _time_of(small)
    assert "train.global_batch_size" not in _time_of(large)
    cpu = released("gsm8k_lora", "hardware.accelerator=cpu", "hardware.gpu_memory=500")
    assert cpu.seconds.launches == 0


def test_launches_of_long_examples_are_those_of_the_dry_run() -> None:
    counted = json.loads(DRY_RUN.read_text("utf-8"))
    planned = released("gsm8k_sft", "data.seq_length=8192").seconds.launches / LAUNCH_SECONDS
    assert planned == pytest.approx(counted["cases"]["full, 8,192 tokens"]["launches"], rel=0.15)


def test_a_gpu_without_a_grouped_matmul_launches_one_for_each_expert() -> None:
    hopper, ampere = (
        released("gsm8k_lora", f"hardware.accelerator={name}") for name in ("h100", "a100")
    )
    # 30 layers; each of pass 1, forward, recomputation and backward has two grouped matmuls, over 16
    # experts
    more = 30 * 4 * 2 * (16 - 2)
    assert ampere.seconds.launches - hopper.seconds.launches == pytest.approx(
        more * LAUNCH_SECONDS, rel=0.01
    )


@pytest.mark.parametrize("case", ["lora", "lora, checkpointed", "full", "full, checkpointed"])
def test_waits_are_those_of_the_dry_run(case: str) -> None:
    """One in each of 30 layers and in each pass, and one in the step: 61 without recomputation."""
    counted = json.loads(DRY_RUN.read_text("utf-8"))["cases"][case]["waits"]
    method, _, recomputed = case.partition(", ")
    recipe_name = {"lora": "gsm8k_lora", "full": "gsm8k_sft"}[method]
    overrides = ("data.seq_length=256", f"train.activation_checkpointing={bool(recomputed)}")
    assert released(recipe_name, *overrides).waits == counted
    assert counted == 30 * (3 if recomputed else 2) + 1


@pytest.mark.parametrize(
    ("overrides", "loops"),
    [
        # pass 1 and forward: 2 grouped matmuls each; backward: 2 for the inputs' gradients
        (("hardware.accelerator=a100",), 30 * (2 * 2 + 2)),
        (("hardware.accelerator=l40s",), 30 * (2 * 2 + 2)),
        (("train.precision=float32",), 30 * (2 * 2 + 2)),  # the kernel of an H100 takes bfloat16
        # 2 more for the weights' gradients
        (("hardware.accelerator=a100", "train.method=full"), 30 * (2 * 2 + 4)),
        # 3 for each projection, of which an adapter's two also have weights' gradients
        (("hardware.accelerator=a100", "lora.experts=true"), 30 * (2 * 6 + 10)),
    ],
)
def test_each_grouped_matmul_without_a_kernel_waits_and_launches_a_matmul_for_each_expert(
    overrides: tuple[str, ...], loops: int
) -> None:
    settings = ("train.activation_checkpointing=false", "objective.self_conditioning_probability=1")
    plan = released("gsm8k_lora", *settings, *overrides)
    assert plan.expert_loops == loops
    assert plan.waits == 61 + loops
    assert plan.seconds.waits == pytest.approx((61 + loops) * 22e-6), "12 us, and a launch of 10"
    assert plan.seconds.expert_launches == pytest.approx(loops * 16 * 10e-6), (
        "an eighth of 128 experts"
    )
    assert f"{loops} grouped matmuls" in render(plan)
    hopper = released("gsm8k_lora", *settings)
    assert (hopper.expert_loops, hopper.seconds.expert_launches) == (0, 0)
    assert "grouped matmuls" not in render(hopper)


def test_loops_over_experts_overlap_with_nothing_else() -> None:
    """10 s of experts that 2 s of launches precede, 1 s of the rest whose launches take 6 s."""
    step = Seconds(
        experts=10,
        everything_else=1,
        gathering=0,
        exchange=0,
        update=0,
        launches=8,
        expert_launches=2,
        waits=0.5,
    )
    assert step.bounds == {
        "computation": 11.5,
        "all-gather and reduce-scatter": 0.5,
        LAUNCHES: 8.5,
        WAITS: 10 + 6 + 0.5,
    }
    assert (step.bound, step.total) == (WAITS, 16.5)
    busy = dataclasses.replace(step, everything_else=7)
    assert (busy.bound, busy.total) == ("computation", 17.5), "the GPU never waits for launches"
    idle = dataclasses.replace(step, experts=1)
    assert (idle.bound, idle.total) == (LAUNCHES, 8.5), "the GPU always does"
    assert WAITS not in dataclasses.replace(step, expert_launches=0).bounds


def test_a_validation_is_counted_by_its_tokens_and_forwards() -> None:
    """16 forwards of one row of 256 tokens on each of 8 ranks, with a canvas of 256 for each of five
    levels.
    """
    plan = released(
        "gsm8k_lora", "data.seq_length=256", "train.activation_checkpointing=false"
    ).validation
    assert (plan.rows, plan.forwards, plan.count) == (128, 128 // 8, 1 + 2)
    tokens, canvases = 256 + 5 * 256, 5 * 256
    layers = 22.84e9 * 8 / 128 + 1.11e9 + 0.54e9 + 0.011e9  # parameters that a token uses
    head = 262_144 * 2816
    scores = 256 * 256 + canvases * (0 + 256)  # of one head's dimension, over clean and own tokens
    attention = 4 * scores * (25 * 16 * 256 + 5 * 16 * 512)
    flops = 2 * (tokens * layers + (tokens - 1) * head + canvases * 17.84e6) + attention
    row = 2 * 2816 * 2 + 4  # bytes, there and back, and its weight
    exchanged = 30 * tokens * 8 * row * 7 / 8
    forward = flops / (0.45 * 989e12) + exchanged / (0.7 * 450e9) + 31 * 22e-6
    assert plan.seconds == pytest.approx(16 * forward, rel=0.01)
    assert plan.share == pytest.approx(3 * plan.seconds / (800 * 0.0610), rel=0.01)


def test_a_validation_takes_the_rows_of_the_data_card_or_of_one_epoch(tmp_path: Path) -> None:
    def rows(*overrides: str, prepared: Path | None = None) -> int:
        config = recipe("gsm8k_lora", "train.validation_batches=null", *overrides)
        return make_plan(config, SHIPPED_CONFIG, 8, prepared).validation.rows

    assert rows() == round(800 * 8 * 0.02 / 0.98)
    assert rows("data.validation_rows=40") == 40
    write_card(tmp_path, held_out=1_000)
    assert rows(prepared=tmp_path) == 1_000
    assert rows("train.validation_batches=3", prepared=tmp_path) == 3 * 8


def test_levels_of_several_blocks_take_a_forward_each() -> None:
    one = released("gsm8k_lora").validation
    several = released("gsm8k_lora", "train.validation_blocks=2").validation
    assert several.forwards == 5 * one.forwards
    assert several.seconds > one.seconds


@pytest.mark.parametrize("length", [256, 1024])
@pytest.mark.parametrize("method", ["lora", "sft"])
@pytest.mark.parametrize("size", ["", "_throughput"])
def test_validation_takes_under_a_twentieth_of_the_recipes_for_the_released_model(
    method: str, size: str, length: int, tmp_path: Path
) -> None:
    write_card(tmp_path, held_out=149)  # 2% of GSM8K
    config = recipe(f"gsm8k_{method}{size}", f"data.seq_length={length}")
    found = make_plan(config, SHIPPED_CONFIG, 8, tmp_path).validation
    assert found.rows == 128, "the same rows, so that losses can be compared"
    assert 0.01 < found.share < 0.05
    assert found.every_from is not None
    assert found.every_from <= config.train.validate_every


def test_a_plan_says_from_which_interval_on_validation_takes_a_twentieth() -> None:
    settings = ("data.seq_length=256", "train.validate_every=100")
    often = released("gsm8k_lora", *settings).validation
    assert often.count == 1 + 8
    assert often.share > 0.05
    assert often.every_from is not None
    seldom, sooner = (
        released("gsm8k_lora", "data.seq_length=256", f"train.validate_every={every}").validation
        for every in (often.every_from, often.every_from - 1)
    )
    assert seldom.share <= 0.05 < sooner.share
    assert f"train.validate_every={often.every_from}" in render(released("gsm8k_lora", *settings))
    long = released("gsm8k_lora", "train.steps=20", "data.validation_fraction=0.5").validation
    assert long.every_from is None


def write_card(folder: Path, held_out: int) -> None:
    card = {
        "canvas_length": 256,
        "validation": held_out,
        "block_histogram": {"1": 7_000},
        "prefix_tokens": {"mean": 110.0},
    }
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")


def _time_of(plan: Plan) -> str:
    return render(plan).partition("Time, estimated")[2].partition("Blocks of")[0]


def test_the_summary_has_what_decides_in_two_lines() -> None:
    first, second = summarize(released("gsm8k_lora")).splitlines()
    assert re.match(r"8\b.* NVIDIA H100 SXM\b\D+[\d.]+ GB\D+80\.0 GB\b.*\bfits$", first)
    found = re.search(r"[\d.]+ ms\b.* ([\d.]+) s, ([\d.]+) accelerator-hours$", second)
    assert found
    assert float(found[2]) == pytest.approx(8 * float(found[1]) / 3600, rel=0.01)
    plan = render(released("gsm8k_lora")).splitlines()
    assert [line.strip() for line in plan if line.strip() in (first, second)] == [first, second]
    assert plan.index(f"  {first}") < 5, "what decides is far down"
    assert "does not fit" in summarize(released("gsm8k_sft", "hardware.gpu_memory=40"))


def test_a_price_gives_the_cost_of_all_steps() -> None:
    plan = released("gsm8k_lora", "cluster.gpu_hour_price=2.5", "cluster.currency=EUR")
    hours = 8 * plan.run_seconds / 3600
    assert f"{hours:.3g} accelerator-hours, {2.5 * hours:,.2f} EUR" in render(plan)
    assert "USD" not in render(released("gsm8k_lora"))


def test_training_waits_for_what_is_written_longer_than_the_steps_between_take() -> None:
    def behind(size: float, every: int, *, asynchronous: bool = True) -> float:
        last = int(size / 3)  # without two moments
        found = times_of(int(size), last, 100, every, asynchronous=asynchronous)
        assert found.waited == found.behind, "a copy takes no time"
        assert found.share == pytest.approx(found.waited / (10 + found.waited))
        written = (-(-100 // every) - 1) * found.write + found.last
        assert found.overlapped == pytest.approx(written - found.behind)
        return found.behind

    def times_of(
        size: int, last: int, steps: int, every: int, *, asynchronous: bool = True
    ) -> CheckpointTimes:
        return checkpoint_times(
            size,
            last,
            steps,
            every,
            0.1,
            asynchronous=asynchronous,
            ranks=1,
            host_rate=math.inf,
            pinned=False,
        )

    assert behind(3 * DISK_RATE, 50) == pytest.approx(1)  # 5 s between them: only the last one
    assert behind(6 * DISK_RATE, 50) == pytest.approx(2 + 1)
    assert behind(6 * DISK_RATE, 40) == pytest.approx(2 + 2 + 4)  # at 40, 80 and 100
    assert behind(6 * DISK_RATE, 100) == behind(6 * DISK_RATE, 1000) == pytest.approx(2)
    assert behind(3 * DISK_RATE, 50, asynchronous=False) == pytest.approx(3 + 1)
    size = int(6 * DISK_RATE)
    hidden = times_of(size, size // 3, 100, 10).hidden_from
    assert behind(6 * DISK_RATE, hidden) < behind(6 * DISK_RATE, hidden // 2)
    enough = times_of(size, size // 3, 100, 10).enough
    longer = times_of(size, size // 3, enough, enough)
    assert longer.waited == 2
    assert longer.share == pytest.approx(0.1)


def test_training_waits_for_copies_that_outlast_the_step_up_to_its_update() -> None:
    """800 GB over 4 ranks of 100 GB/s, at steps 40, 80 and 100 of 1 s, of which 0.5 before the update."""
    size, last = 800 * 10**9, 80 * 10**9

    def of(every: int, *, asynchronous: bool = True) -> CheckpointTimes:
        return checkpoint_times(
            size,
            last,
            100,
            every,
            1.0,
            asynchronous=asynchronous,
            ranks=4,
            host_rate=100e9,
            until_update=0.5,
        )

    found = of(40)
    assert found.staging == pytest.approx(2), "200 GB of each rank"
    assert found.pinning == pytest.approx(100), "at 2 GB/s"
    assert found.staged == pytest.approx((100 + 2 - 0.5) + (2 - 0.5) + 0.2)
    # Written at 2 GB/s in 400 s, of which the steps to the next one hide 39.5 and 19.5; the last in 40.
    assert found.behind == pytest.approx((400 - 39.5) + (400 - 19.5) + 40)
    assert found.overlapped == pytest.approx(39.5 + 19.5)
    assert found.waited == pytest.approx(103.2 + 781)
    assert found.share == pytest.approx(884.2 / 984.2)
    only = of(100)
    assert (only.pinning, only.staged) == pytest.approx((10, 10.2)), "only the last one is copied"
    plain = of(40, asynchronous=False)
    assert (plain.staged, plain.waited) == pytest.approx((0, 840)), "it is written from the GPU"


def test_a_plan_copies_a_checkpoint_at_the_rate_of_its_accelerators_pcie() -> None:
    """25.24 B trained parameters of 12 bytes, over 8 ranks: 37.9 GB, at 45 or 25 GB/s."""
    part = released("gsm8k_sft").parameters["total"].trained * 12 / 8
    for name, rate in (("h100", 45e9), ("b200", 45e9), ("a100", 25e9), ("l40s", 25e9)):
        plan = released("gsm8k_sft", f"hardware.accelerator={name}", "train.checkpoint_every=100")
        times, hidden = plan.checkpoint_times, plan.step_seconds - plan.seconds.update
        assert times.staging == pytest.approx(part / rate)
        assert times.pinning == pytest.approx(part / 2e9)
        six = 6 * max(0.0, part / rate - hidden)  # the model is written instead of an eighth
        first = part / rate + part / 2e9 - hidden
        assert times.staged == pytest.approx(first + six)
        assert plan.host_copy_bytes == int(part)


def test_copies_of_a_checkpoint_in_host_memory_are_compared_with_a_pods() -> None:
    """8 ranks a node keep 302.9 GB; half of them do with 4 ranks a node, on two nodes."""
    pods = ("cluster.backend=pytorchjob", "cluster.memory=300Gi")
    fits = released("gsm8k_sft", *pods)
    trained = fits.parameters["total"].trained
    assert fits.host_bytes == pytest.approx(12 * trained, abs=8)
    assert fits.host_limit_bytes == 300 * 2**30
    assert fits.copies_fit
    told = refusal("gsm8k_sft", "cluster.backend=pytorchjob", "cluster.memory=280Gi")
    assert "cluster.memory is 300.6 GB" in told
    assert "302.9 GB" in told
    smaller = ("parallel.nproc_per_node=4", "cluster.nodes=2")
    assert released("gsm8k_sft", *pods, *smaller).host_bytes * 2 == fits.host_bytes
    local = released("gsm8k_sft", "cluster.memory=128Gi")
    assert local.host_limit_bytes is None, "a run on this machine has no pod"
    plain = released("gsm8k_sft", *pods, "train.async_checkpoints=false")
    assert plain.host_bytes == plain.host_copy_bytes == 0, "it is written without a copy"
    limited = released("gsm8k_sft", *pods, "cluster.resources={limits: {memory: 400Gi}}")
    assert limited.host_limit_bytes == 400 * 2**30


def test_the_last_checkpoint_has_only_weights_and_full_fine_tuning_none() -> None:
    plan = released("gsm8k_lora")
    times, trained = plan.checkpoint_times, plan.parameters["total"].trained
    assert times.last == pytest.approx(4 * trained / DISK_RATE) == pytest.approx(times.write / 3)
    full = released("gsm8k_sft", "train.steps=800", "train.checkpoint_every=400").checkpoint_times
    assert full.last == 0
    assert full.overlapped > 0, "the one at step 400"
    assert full.overlapped + full.behind == pytest.approx(full.write)


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("gsm8k*.yaml")))
def test_the_shipped_recipes_fit_the_claim_and_checkpoints_take_less_than_a_tenth(
    name: str,
) -> None:
    """On the chart's default claim, next to the base model of 52 GB that is downloaded into it."""
    plan = released(name)
    assert plan.checkpoint_times.share < MOST_SHARE
    chart = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    base = 2 * plan.parameters["total"].total
    free = int(parse_quantity(chart["workspace"]["size"])) - base
    assert describe_shortage(plan, free) is None
    kept = released(name, "train.checkpoint_every=1", "train.keep_checkpoints=2")
    assert kept.checkpoints == 4, "the newest two, the best, and the one that is being written"
