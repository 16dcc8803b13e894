"""What a plan says: the released model's known sizes, what fits, what would, its files.

Against the engine: test_plan_measured.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest

from canvastune.config.schema import ModelConfig
from canvastune.errors import UserError
from canvastune.perf_model import flops as work
from canvastune.perf_model.memory import StepShape
from canvastune.planner import planner
from canvastune.planner.plan import as_tree
from canvastune.planner.planner import SHIPPED_CONFIG, find_architecture, make_plan, write_plan
from canvastune.planner.render import render, summarize
from tests.support.plans import recipe, refusal, released
from tests.support.small import CANVAS

GIB = 2**30


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


def test_a_plan_says_how_often_the_steps_see_each_row_or_how_to_know_it(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3}')
    settings = ("train.steps=6", "train.global_batch_size=8")
    plan = released("gsm8k_lora", f"data.source={tmp_path / 'rows.jsonl'}", *settings)
    (note,) = [each for each in plan.notes if "data.source" in each]
    assert re.findall(r" ([\d.]+) ", note) == ["48", "16", "3"]
    on_the_hub = released("gsm8k_lora", *settings).notes
    assert not any("data.source" in each for each in on_the_hub)
    assert any("48 examples" in each and "--data DIR" in each for each in on_the_hub)


def test_the_data_card_decides_what_blocks_cost_and_give(tmp_path: Path) -> None:
    card = {
        "canvas_length": 256,
        "validation": 149,
        "train": 4800,
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
    seen = recipe("gsm8k_lora").train.steps * plan.global_batch_size
    assert f"{seen / 4800:.3g} x the 4,800 prepared examples" in render(plan)
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
