"""What a plan says of time: what bounds a step, waits, validations and checkpoints.

Counts are those of the dry run; figures are derived by hand.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import yaml

from canvastune.config.cluster import parse_quantity
from canvastune.perf_model.checkpoints import (
    DISK_RATE,
    MOST_SHARE,
    CheckpointTimes,
    checkpoint_times,
)
from canvastune.perf_model.launches import LAUNCH_SECONDS
from canvastune.perf_model.step_time import LAUNCHES, WAITS, Seconds
from canvastune.planner.plan import Plan
from canvastune.planner.planner import SHIPPED_CONFIG, make_plan
from canvastune.planner.render import render
from components.plan.step import describe_shortage
from tests.support.plans import RECIPES, recipe, refusal, released
from tools.chart_table import CHART

DRY_RUN = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_dry_run.json"


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
        "train": 6_000,
        "block_histogram": {"1": 7_000},
        "prefix_tokens": {"mean": 110.0},
    }
    (folder / "card.json").write_text(json.dumps(card), encoding="utf-8")


def _time_of(plan: Plan) -> str:
    return render(plan).partition("Time, estimated")[2].partition("Blocks of")[0]


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
