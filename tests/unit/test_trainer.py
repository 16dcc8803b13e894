"""The loop outside its steps.

Schedules, decay, skipped steps, early stopping, the best checkpoint, other numbers of ranks.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.tensor import DTensor

from benchmarks.instruments.ranks import run_ranks
from canvastune.checkpoint.hf_format import CheckpointReader
from canvastune.checkpoint.load import build_model, load_weights, read_model_config
from canvastune.checkpoint.resume import Checkpoints
from canvastune.config import RunConfig, load_config, parse_config
from canvastune.config.schema import OptimizerConfig
from canvastune.data.dataset import TrainingDataset
from canvastune.distributed.parallel_dims import ParallelDims
from canvastune.distributed.parallelize import shard_model
from canvastune.errors import UserError
from canvastune.objective import LossWeights
from canvastune.planner.planner import make_plan
from canvastune.report.summary import Energy
from canvastune.tracking import MetricsWriter, read_metrics
from canvastune.training import energy
from canvastune.training.energy import EnergyMeter
from canvastune.training.optimizer import build_optimizer, learning_rate
from canvastune.training.run import can_export
from canvastune.training.trainer import Trainer
from tests.support.small import CANVAS, EOS, VOCABULARY
from tests.support.training import make_ground, records
from tools.faults import damage


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ground(tmp_path_factory.mktemp("ground"))


def make_trainer(ground: Path, output: Path, *settings: str) -> Trainer:
    """A trainer of the small run, on every rank of this process group."""
    config = load_config(ground / "recipe.yaml", list(settings))
    model = build_model(config, read_model_config(ground / "base"))
    shard_model(
        model,
        ParallelDims(dist.get_world_size() // config.parallel.ep, config.parallel.ep).build_meshes(
            "cpu"
        ),
        config,
    )
    load_weights(model, CheckpointReader(ground / "base"), torch.device("cpu"), config.seed)
    sizes = {"canvas_length": CANVAS, "vocab_size": VOCABULARY, "eos_token_id": EOS}
    data = TrainingDataset(ground / "data", **sizes, seed=config.seed, objective=config.objective)
    metrics = MetricsWriter(output / "metrics.jsonl") if dist.get_rank() == 0 else None
    return Trainer(
        config, model, data, Checkpoints(output / "checkpoints", config, "data"), metrics, None
    )


def whole(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every trained weight and moment, gathered."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in trainer.trained.items():
        for key, value in {
            "weight": parameter.detach(),
            **trainer.optimizer.state.get(parameter, {}),
        }.items():
            state[f"{key} {name}"] = (
                value.full_tensor() if isinstance(value, DTensor) else value
            ).clone()
    return state


def spoil(trainer: Trainer, steps: set[int], rank: int) -> None:
    """Make the loss of some steps not a number on one rank, in its second micro-batch."""
    compute, calls = trainer.compute_losses, [0]

    def losses(
        batch: Any, weights: LossWeights, any_self_conditioned: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        found = compute(batch, weights, any_self_conditioned)
        calls[0] += 1
        step, micro_batch = divmod(calls[0] - 1, 2)
        bad = step + 1 in steps and micro_batch == 1 and trainer.rank == rank
        return (found[0] * torch.nan, found[1] * torch.nan, found[2]) if bad else found

    trainer.compute_losses = losses  # type: ignore[method-assign]


def read_energy(rank: int) -> EnergyMeter:
    """A meter whose counter has taken 10 joules on rank 0 at every reading, and 20 on rank 1."""
    counter = itertools.count(500, 10 * (rank + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(energy, "open_counter", lambda _: lambda: float(next(counter)))
        return EnergyMeter(torch.device("cuda"))


def spoiled_runs(folder: Path, ground: Path) -> None:
    settings = (
        "train.method=lora",
        "parallel.ep=2",
        "train.steps=8",
        "train.micro_batch_size=2",
        "train.validate_every=100",
        "train.checkpoint_every=4",
    )
    trainer = make_trainer(ground, folder / "some", *settings)
    trainer.energy = read_energy(trainer.rank)
    spoil(trainer, {2, 5, 6, 7}, rank=1)
    before = {}
    train_step = trainer.train_step

    def watched() -> dict[str, Any]:
        before[trainer.progress.step + 1] = whole(trainer)
        return train_step()

    trainer.train_step = watched  # type: ignore[method-assign]
    assert trainer.run()
    assert trainer.progress.skipped == 4
    assert trainer.progress.skipped_in_a_row == 0
    for step in (2, 5, 6, 7):
        for name, value in before[step].items():
            assert torch.equal(value, before[step + 1][name]), (
                f"the skipped step {step} changed {name}"
            )
    assert any(not torch.equal(value, before[4][name]) for name, value in before[3].items()), (
        "no step changes anything"
    )

    trainer = make_trainer(ground, folder / "many", *settings, "train.max_skipped_steps=2")
    trainer.energy = read_energy(trainer.rank)
    spoil(trainer, {6, 7, 8}, rank=0)
    with pytest.raises(UserError, match=r"step 8.*train\.max_skipped_steps") as error:
        trainer.run()
    assert "optimizer.lr" in error.value.hint
    if dist.get_rank() == 0:
        assert [p.name for p in (folder / "many" / "checkpoints").glob("*/complete.json")] == [
            "complete.json"
        ]
        assert (folder / "many" / "checkpoints" / "step-000004" / "complete.json").exists()

    trainer = make_trainer(ground, folder / "many", *settings, "train.max_skipped_steps=2")
    trainer.energy = read_energy(trainer.rank)
    assert trainer.run(), "resumed from step 4"

    for steps, allowed in ((8, 1), (2, 8)):  # also where that was all of the run
        limits = f"train.steps={steps}", f"train.max_skipped_steps={allowed}"
        trainer = make_trainer(ground, folder / f"base-{steps}", *settings, *limits)
        spoil(trainer, {1, 2}, rank=0)
        with pytest.raises(UserError, match=r"step 2.*train\.max_skipped_steps") as error:
            trainer.run()
        assert "train.precision" in error.value.hint, "the base model itself is not finite"


def test_a_step_that_is_not_finite_is_skipped_counted_and_told_and_a_run_of_them_ends_the_run(
    ground: Path, tmp_path: Path
) -> None:
    run_ranks(spoiled_runs, 2, tmp_path, ground)
    told = [
        record
        for record in records(tmp_path / "some", "event")
        if record["event"] == "skipped_step"
    ]
    for run, readings in (("some", 8 + 2), ("many", 8 + 1 + 4 + 1)):
        found = read_metrics(tmp_path / run / "metrics.jsonl")
        assert Energy.from_records(found).kwh == pytest.approx(30 * readings / 3.6e6), (
            f"{run}: steps that were skipped, or repeated by a resumed attempt, took energy, too"
        )
    assert [record["step"] for record in told] == [2, 5, 6, 7]
    assert [record["step"] for record in records(tmp_path / "some", "train")] == [
        1,
        3,
        4,
        8,
    ]
    trained = records(tmp_path / "some", "train")
    assert [record["epoch"] for record in trained] == [step * 8 / 40 for step in (1, 3, 4, 8)]
    seen = [record["tokens_seen"] for record in trained]
    assert seen[0] == trained[0]["tokens"]
    assert seen[1] - seen[0] > trained[1]["tokens"], "a skipped step has read its tokens too"
    recipe = load_config(ground / "recipe.yaml")
    sizes = {"canvas_length": CANVAS, "vocab_size": VOCABULARY, "eos_token_id": EOS}
    data = TrainingDataset(ground / "data", **sizes, seed=recipe.seed, objective=recipe.objective)
    # Step 2 is positions 8 to 15, in micro-batches of two: rank 1's second one.
    shares = data.balance_microbatches(range(8, 16), 2, 2)
    culprits = data.train_origins(part.position for part in shares[1][1])
    assert f"on rows {', '.join(culprits)}" in told[0]["detail"]
    assert all(re.fullmatch(r"\S+:\d+", row) for row in culprits), "not a file's rows"


def validated(trainer: Trainer, by_step: dict[int, float]) -> Trainer:
    """Replace the validation by these held-out losses."""

    def validate() -> dict[str, Any]:
        return {
            "loss": by_step[trainer.progress.step],
            "levels": {},
            "autoregressive_loss": 0.0,
            "seconds": 0.0,
        }

    trainer.validate = validate  # type: ignore[method-assign]
    return trainer


CURVE = {0: 5.0, 2: 4.0, 4: 3.0, 6: 3.5, 8: 3.2, 10: 3.4, 12: 2.0}
SPARSE = (
    "train.method=lora",
    "train.global_batch_size=2",
    "train.activation_checkpointing=false",
    "parallel.ep=1",
    "train.steps=12",
    "train.validate_every=2",
    "train.checkpoint_every=2",
)


def best_runs(folder: Path, ground: Path) -> None:
    trainer = validated(
        make_trainer(
            ground,
            folder / "stopped",
            *SPARSE,
            "train.early_stopping=3",
            "train.keep_checkpoints=1",
        ),
        CURVE,
    )
    at_best: dict[str, torch.Tensor] = {}
    train_step = trainer.train_step

    def watched() -> dict[str, Any]:
        if trainer.progress.step == 4:
            at_best.update(whole(trainer))
        return train_step()

    trainer.train_step = watched  # type: ignore[method-assign]
    assert trainer.run()
    assert trainer.progress.step == 10, "three validations in a row were not better than step 4's"
    complete = sorted(
        marker.parent.name
        for marker in (folder / "stopped" / "checkpoints").glob("*/complete.json")
    )
    assert complete == ["step-000004", "step-000010"], "the best one is kept with the newest"
    assert trainer.load_best_checkpoint() == 4
    for name, value in whole(trainer).items():
        if name.startswith("weight"):
            assert torch.equal(value, at_best[name]), f"{name} is not that of the best checkpoint"

    again = validated(
        make_trainer(ground, folder / "stopped", *SPARSE, "train.early_stopping=3"), CURVE
    )
    assert again.run()
    assert again.progress.step == 10, (
        "a run that stopped early is over: the same command trains no further"
    )

    patient = validated(make_trainer(ground, folder / "patient", *SPARSE), CURVE)
    assert patient.run()
    assert patient.progress.step == 12
    assert patient.load_best_checkpoint() == 12

    losses = {0: math.nan, 2: math.nan, 4: 3.0, 6: math.inf, 8: math.nan, 10: 3.4, 12: math.nan}
    options = (*SPARSE, "train.keep_checkpoints=9")
    unstable = validated(make_trainer(ground, folder / "unstable", *options), losses)
    assert unstable.run()
    assert unstable.load_best_checkpoint() == 4, "a loss that is not finite counts as the best"
    for marker in (folder / "unstable" / "checkpoints").glob("*/complete.json"):
        json.loads(marker.read_text(), parse_constant=lambda name: pytest.fail(f"not JSON: {name}"))


def test_early_stopping_and_the_best_checkpoint(ground: Path, tmp_path: Path) -> None:
    run_ranks(best_runs, 1, tmp_path, ground)


def stopped_in_validation(folder: Path, ground: Path) -> None:
    trainer = make_trainer(ground, folder / "run", *SPARSE)
    compute = trainer.validate

    def interrupted() -> dict[str, Any] | None:
        if trainer.progress.step == 6:
            trainer.stop_requested = 1.0
        return compute()

    trainer.validate = interrupted  # type: ignore[method-assign]
    assert not trainer.run()
    assert trainer.progress.step == 6
    assert make_trainer(ground, folder / "run", *SPARSE).run()
    assert make_trainer(ground, folder / "whole", *SPARSE).run()


def test_a_stop_in_the_middle_of_a_validation_loses_no_validation(
    ground: Path, tmp_path: Path
) -> None:
    run_ranks(stopped_in_validation, 1, tmp_path, ground)
    found, expected = (records(tmp_path / name, "validation") for name in ("run", "whole"))
    assert [(v["step"], v["levels"]) for v in found] == [(v["step"], v["levels"]) for v in expected]
    marker = json.loads(
        (tmp_path / "run" / "checkpoints" / "step-000012" / "complete.json").read_text()
    )
    assert marker["progress"]["best"] == min(v["loss"] for v in found)


def damaged_runs(folder: Path, ground: Path) -> None:
    trainer = make_trainer(ground, folder / "run", *SPARSE, "train.steps=4")
    assert trainer.run()
    told = {
        "cut": r"\.safetensors.*\d+ bytes",
        "flip": r"\.safetensors.*SHA-256",
        "remove": r"\.safetensors",
        "marker": "marker",
    }
    for how, words in told.items():
        copied = folder / how
        shutil.copytree(folder / "run", copied)
        newest = copied / "checkpoints" / "step-000004"
        damage(newest, how)
        again = make_trainer(ground, copied, *SPARSE, "train.steps=4")
        progress, damages = again.checkpoints.restore(again.trained, again.optimizer)
        assert progress is not None
        assert progress["step"] == 2
        assert len(damages) == 1
        assert re.search(f"step-000004.*{words}", damages[0]), damages
        assert (newest / "damaged.json").exists(), "a damaged checkpoint is set aside, not deleted"

        damage(copied / "checkpoints" / "step-000002", how)
        last = make_trainer(ground, copied, *SPARSE, "train.steps=4")
        with pytest.raises(UserError, match=r"step-000002"):
            last.checkpoints.restore(last.trained, last.optimizer)
        assert (copied / "checkpoints" / "step-000002" / "complete.json").exists(), (
            "a checkpoint was thrown away"
        )


def test_a_damaged_checkpoint_is_found_out_and_set_aside_and_the_last_one_never(
    ground: Path, tmp_path: Path
) -> None:
    run_ranks(damaged_runs, 1, tmp_path, ground)


def copied_runs(folder: Path, ground: Path) -> None:
    settings = [
        *("train.method=lora", "parallel.ep=2", "train.steps=4", "train.validate_every=100"),
        *("train.checkpoint_every=1", "train.keep_checkpoints=9"),
    ]
    threads, stage, failing = ThreadPoolExecutor(1), DefaultStager.stage, [False]

    def slow(stager: DefaultStager, state: dict[str, Any]) -> Future[dict[str, Any]]:
        fails = failing[0] and dist.get_rank() == 1

        def copy() -> dict[str, Any]:
            time.sleep(0.5)  # the next step's gradients are there before
            if fails:
                raise RuntimeError("no memory")
            copied = stage(stager, state)
            assert isinstance(copied, Future)
            return copied.result()

        return threads.submit(copy)

    hashes = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DefaultStager, "stage", slow)
        for background in ("true", "false"):
            output = folder / background
            trainer = make_trainer(
                ground, output, *settings, f"train.async_checkpoints={background}"
            )
            assert trainer.run()
            trainer.checkpoints.close()
            dist.barrier()  # rank 0 writes the markers
            hashes[background] = [
                json.loads((output / f"checkpoints/step-{step:06d}/complete.json").read_text())
                for step in range(1, 5)
            ]
        for copied, direct in zip(hashes["true"], hashes["false"], strict=True):
            assert copied["files"] == direct["files"], (
                f"step {copied['step']} holds what the steps after it made of its state"
            )
        trainer = make_trainer(ground, folder / "fails", *settings)
        compute = trainer.train_step

        def fail_from_two() -> dict[str, Any]:
            failing[0] = trainer.progress.step + 1 >= 2
            return compute()

        trainer.train_step = fail_from_two  # type: ignore[method-assign]
        with pytest.raises(UserError, match="rank 1: RuntimeError: no memory"):
            trainer.run()
        if dist.get_rank() == 0:
            kept = (folder / "fails" / "checkpoints").glob("*/complete.json")
            assert [marker.parent.name for marker in kept] == ["step-000001"]


def test_training_changes_nothing_that_is_being_copied_and_a_copy_that_fails_ends_every_rank(
    ground: Path, tmp_path: Path
) -> None:
    run_ranks(copied_runs, 2, tmp_path, ground)


def last_checkpoints(folder: Path, ground: Path) -> None:
    def saved(name: str, *settings: str, exportable: bool = True) -> set[str]:
        trainer = make_trainer(ground, folder / name, *settings)
        trainer.can_export = lambda: exportable
        assert trainer.run()
        assert trainer.load_best_checkpoint() == 4
        markers = (folder / name / "checkpoints").glob("*/complete.json")
        return {marker.parent.name for marker in markers}

    full = ("train.method=full", "train.steps=4", "train.checkpoint_every=2", "parallel.ep=1")
    assert saved("best", *full) == {"step-000002"}, "the model that follows has these weights"
    assert saved("last", *full, "train.export=last") == {"step-000002"}
    assert saved("full disk", *full, exportable=False) == {"step-000002", "step-000004"}
    lora = ("train.method=lora", *full[1:])
    assert saved("lora", *lora) == {"step-000002", "step-000004"}

    worse = make_trainer(ground, folder / "worse", *full, "train.validate_every=2")
    worse = validated(worse, {0: 9.0, 2: 3.0, 4: 5.0})
    worse.can_export = lambda: True
    assert worse.run()
    assert worse.load_best_checkpoint() == 2
    assert (folder / "worse" / "checkpoints" / "step-000004" / "complete.json").exists()
    assert can_export(ground / "base", folder)
    assert not can_export(ground / "nothing", folder)


def test_a_full_run_ends_with_its_model_and_no_checkpoint_of_the_same_weights(
    ground: Path, tmp_path: Path
) -> None:
    run_ranks(last_checkpoints, 1, tmp_path, ground)


RESHARD = (
    "train.method=full",
    "train.steps=4",
    "train.checkpoint_every=2",
    "train.validate_every=100",
)


def save_at_four(folder: Path, ground: Path) -> None:
    trainer = make_trainer(ground, folder / "run", *RESHARD, "parallel.ep=4")
    assert trainer.run()
    state = whole(trainer)
    newest = folder / "run" / "checkpoints" / "step-000004"
    last = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
    again = make_trainer(ground, folder / "run", *RESHARD, "parallel.ep=4")
    progress, _ = again.checkpoints.restore(again.trained, again.optimizer)
    assert progress is not None
    assert not again.optimizer.state, "nothing is trained after the last step"
    for name, value in whole(again).items():
        assert torch.equal(value, state[name])
    trainer.checkpoints.save(4, trainer.trained, trainer.optimizer, progress)
    trainer.checkpoints.wait()
    if dist.get_rank() == 0:
        torch.save(state, folder / "state.pt")
        plan = make_plan(trainer.config, ground / "base", 4)
        written = sum(file.stat().st_size for file in newest.glob("*.safetensors"))
        headers = 4 * 400 * len(state)  # each rank names each tensor
        weights = plan.checkpoint_bytes // 3
        assert weights <= last <= weights + headers, "the last one has no optimizer state"
        assert plan.checkpoint_bytes <= written <= plan.checkpoint_bytes + headers, (
            plan.checkpoint_bytes,
            written,
            headers,
        )
        assert plan.host_copy_bytes * 4 == pytest.approx(plan.checkpoint_bytes, abs=4)


def reload(folder: Path, ground: Path, degrees: tuple[int, ...]) -> None:
    expected = torch.load(folder / "state.pt", weights_only=True)
    for ep in degrees:
        trainer = make_trainer(ground, folder / "run", *RESHARD, f"parallel.ep={ep}")
        progress, damages = trainer.checkpoints.restore(trainer.trained, trainer.optimizer)
        assert progress is not None
        assert progress["step"] == 4
        assert not damages
        found = whole(trainer)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(found[name], value), (
                f"{name} at {dist.get_world_size()} ranks, EP {ep}"
            )
        # Written again at this number of ranks, for the next one to read.
        trainer.checkpoints.save(4, trainer.trained, trainer.optimizer, progress)
        trainer.checkpoints.wait()


def test_a_checkpoint_is_read_at_other_numbers_of_ranks_and_expert_parallel_degrees(
    ground: Path, tmp_path: Path
) -> None:
    run_ranks(save_at_four, 4, tmp_path, ground)
    run_ranks(reload, 2, tmp_path, ground, (1, 2))
    run_ranks(reload, 8, tmp_path, ground, (2, 8))


def test_schedules() -> None:
    def rates(schedule: str) -> list[float]:
        config = parse_config(
            {
                "name": "x",
                "data": {"source": "-"},
                "optimizer": {"schedule": schedule, "warmup_steps": 2},
            }
        ).optimizer
        return [learning_rate(config, step, 6) for step in range(1, 7)]

    low, high = 1.5e-5, 1.5e-4
    assert rates("constant") == pytest.approx([high / 2, *[high] * 5])
    assert rates("linear") == pytest.approx(
        [high / 2, high, *(high - (high - low) * k / 4 for k in (1, 2, 3, 4))]
    )
    assert rates("cosine")[3:] == pytest.approx(
        [(high + low) / 2, low + (high - low) * 0.5 * (1 - 2**-0.5), low]
    )


@pytest.mark.parametrize("decay_vectors", [False, True])
def test_norms_decay_only_where_that_is_asked_for(decay_vectors: bool) -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = build_optimizer(
        [matrix, vector], OptimizerConfig(lr=0.1, weight_decay=0.5, decay_vectors=decay_vectors)
    )
    for parameter in (matrix, vector):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert matrix.detach().eq(0.95).all()
    assert vector.detach().eq(0.95 if decay_vectors else 1.0).all()


def test_a_recipe_names_its_schedule_or_is_refused() -> None:
    with pytest.raises(UserError, match=r"optimizer.schedule.*'step'"):
        parse_config({"name": "x", "data": {"source": "-"}, "optimizer": {"schedule": "step"}})
    assert isinstance(parse_config({"name": "x", "data": {"source": "-"}}), RunConfig)
