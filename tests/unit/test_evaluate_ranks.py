"""Several ranks answer as one does, whatever a rank takes, and where the experts are divided too."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import yaml

from benchmarks.evaluation import Shape, made_model
from benchmarks.instruments.live_bytes import LiveBytes
from benchmarks.instruments.ranks import run_ranks
from canvastune.checkpoint.generation_config import SamplerSettings
from canvastune.config import parse_config
from canvastune.config.loading import load_config
from canvastune.errors import UserError
from canvastune.evaluation import model_run, sweep
from canvastune.evaluation.generation import Question
from canvastune.evaluation.ranks import Ranks
from canvastune.evaluation.run import evaluate, evaluate_on_ranks
from canvastune.evaluation.sampler import Sampler
from canvastune.evaluation.validation_loss import denoising_loss
from canvastune.noise import AnswerNoise
from canvastune.perf_model.architecture import read_architecture
from canvastune.perf_model.evaluation import AnswerShape, answer_memory
from canvastune.planner.evaluation import evaluation_layout
from canvastune.planner.planner import SHIPPED_CONFIG
from components.evaluate.step import evaluate_here
from tests.support.evaluation import recipe
from tests.support.small import CANVAS, VOCABULARY, examples_and_draws
from tests.support.warm import Popen
from tests.unit.test_evaluate_resume import TIMES
from tests.unit.test_sampler import NEVER, QUESTIONS, SETTINGS

CPU = torch.device("cpu")


def answer_and_denoise(folder: Path, checkpoint: Path) -> None:
    """Write what one rank, two ranks and two ranks with divided experts make of the same."""
    for name, ranks in (("alone", Ranks()), ("shared", Ranks(1)), ("divided", Ranks(2))):
        if name == "alone" and dist.get_rank():
            continue
        model = ranks.load(checkpoint, CPU)
        noise = AnswerNoise(7, CANVAS, VOCABULARY)
        options: dict[str, Any] = {"rows": 2, "max_new_tokens": 4 * CANVAS, "stops": [3, NEVER]}
        sampler = Sampler(model, SETTINGS, noise, **options)

        def answer(taken: Iterator[Any], sampler: Sampler = sampler) -> Iterator[Any]:
            for each in sampler.answer(taken):
                yield each.question, each.tokens, each.forwards

        def denoise(taken: Iterator[int], model: Any = model) -> Iterator[Any]:
            for at in taken:
                examples, _ = examples_and_draws()
                yield at, denoising_loss(model, [examples[at]], (0.3, 0.9), 2)["sums"]

        ended: list[int] = []

        def count(_: Any, results: int, ended: list[int] = ended) -> None:
            ended.append(results)

        found = {
            "answers": ranks.share_out(QUESTIONS, answer, count),
            "losses": ranks.share_out(range(5), denoise, lambda *_: None),
            "experts": model.model.decoder.layers[0].experts.gate_up_proj.shape[0],
        }
        if dist.get_rank() == 0:
            found["ended"] = sum(ended)
            (folder / name).write_text(json.dumps(found))


def test_ranks_share_questions_and_experts_without_a_trace(
    checkpoint: Path, tmp_path: Path
) -> None:
    run_ranks(answer_and_denoise, 2, tmp_path, checkpoint)
    alone, shared, divided = (
        json.loads((tmp_path / name).read_text()) for name in ("alone", "shared", "divided")
    )
    assert len({forwards for _, _, forwards in alone["answers"]}) > 3, "all answers end at once"
    assert (alone["experts"], shared["experts"], divided["experts"]) == (8, 8, 4)
    for found in (shared, divided):
        assert sorted(found["answers"]) == sorted(alone["answers"])
        assert 0 <= found["ended"] <= len(QUESTIONS)
        for (at, sums), (other, expected) in zip(
            sorted(found["losses"]), sorted(alone["losses"]), strict=True
        ):
            assert at == other
            assert sums == pytest.approx(expected, rel=1e-5)
    assert sorted(shared["losses"]) == sorted(alone["losses"]), "the same model, other sums"


def two_settings(own: SamplerSettings) -> dict[str, SamplerSettings]:
    return {"own": own, "one step": replace(own, steps=1)}


def whole_evaluations(folder: Path, file: Path, data: Path, base: Path, tuned: Path) -> None:
    """Evaluate on one rank, on two, and on two of which one fails and which then resume."""
    config, rank = load_config(file), dist.get_rank()
    if rank == 0:
        evaluate(config, data, base, tuned, folder / "alone")
    evaluate_on_ranks(config, data, base, tuned, folder / "shared", Ranks(1))
    evaluate_on_ranks(config, data, base, tuned, folder / "divided", Ranks(2))
    with mock.patch.object(sweep, "settings_to_try", two_settings):
        if rank == 0:
            sweep.sweep(config, data, base, tuned, folder / "sweep-alone", Ranks())
        sweep.sweep(config, data, base, tuned, folder / "sweep-shared", Ranks(1))
    generate = model_run.generate_answers

    def first_answer_only(*given: Any) -> Iterator[Any]:
        dist.barrier()  # both take questions at once
        answers = generate(*given)
        if rank == 0:
            yield from answers
            return
        yield next(answers)
        raise UserError("out of device memory")

    resumed = folder / "resumed"
    with (
        mock.patch.object(model_run, "generate_answers", first_answer_only),
        pytest.raises(UserError, match=r"\bmemory\b"),
    ):
        evaluate_on_ranks(config, data, base, tuned, resumed, Ranks(1))
    dist.barrier()
    if rank == 0:
        for path in folder.glob(".resumed.unfinished.jsonl*"):
            shutil.copy(path, folder / f"kept{path.name}")
    dist.barrier()
    evaluate_on_ranks(config, data, base, tuned, resumed, Ranks(2))


def test_an_evaluation_on_ranks_writes_what_one_process_does(
    problems: Path, prepared: Path, models: tuple[Path, Path], tmp_path: Path
) -> None:
    config = recipe(problems, rows=6, batch_size=2, max_new_tokens=32, repeats=2)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder := tmp_path / "evaluations").mkdir()
    run_ranks(whole_evaluations, 2, folder, file, prepared, *models)
    for name in ("shared", "divided", "resumed"):
        for part in ("answers.jsonl", "film.json", "config.yaml"):
            same = (folder / name / part).read_bytes() == (folder / "alone" / part).read_bytes()
            assert same, f"{name}: other {part}"
        found, expected = (
            json.loads((folder / each / "evaluation.json").read_text()) for each in (name, "alone")
        )
        for key in TIMES:
            del found[key], expected[key]
        losses = [key for key in expected if key.startswith("validation_loss_")]
        for key in losses:
            assert found.pop(key) == pytest.approx(expected.pop(key), rel=1e-6), f"{name}: {key}"
        assert found == expected, name
    alone, shared = (
        json.loads((folder / f"sweep-{name}" / "sweep.json").read_text())
        for name in ("alone", "shared")
    )
    for point in (*alone["points"], *shared["points"]):
        del point["seconds"]
    assert shared == alone
    assert alone["points"][0]["forwards"] > alone["points"][1]["forwards"] == 2
    kept = sorted(path.name for path in folder.glob("kept*"))
    assert kept == ["kept.resumed.unfinished.jsonl", "kept.resumed.unfinished.jsonl.rank-1"]
    assert len((folder / kept[1]).read_bytes().splitlines()) == 1, (
        "the failed rank's answer is lost"
    )
    left = [path.name for path in folder.iterdir() if "unfinished" in path.name]
    assert sorted(left) == kept, "working files are left behind"


def test_without_a_cluster_as_many_processes_evaluate(
    problems: Path,
    prepared: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("subprocess.Popen", Popen)
    tree = recipe(problems, rows=3, gpus=2).model_dump(mode="json")
    config = parse_config(tree | {"model": {"id": str(tiny_model)}})
    found = evaluate_here(config, prepared, tiny_model, tmp_path / "out", tmp_path / "kept")
    assert (found.rows, found.before.correct) == (3, found.after.correct)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "kept"}, "files are left behind"


@pytest.mark.parametrize(
    ("memory", "gpus", "expected"),
    [
        (80, None, (1, 1)),
        (80, 8, (8, 1)),
        (40, None, (2, 2)),
        (40, 8, (8, 2)),
        (24, 8, (8, 4)),
        (18, 8, (8, 8)),
    ],
)
def test_experts_are_divided_over_as_few_gpus_as_hold_the_model(
    memory: float, gpus: int | None, expected: tuple[int, int]
) -> None:
    tree = {"name": "test", "data": {"source": "none"}, "hardware": {"gpu_memory": memory}}
    plan = evaluation_layout(parse_config(tree | {"evaluate": {"gpus": gpus}}), SHIPPED_CONFIG)
    assert (plan.gpus, plan.ep) == expected
    assert plan.needed_bytes <= memory * 1e9


def test_an_evaluation_that_fits_on_no_gpu_is_refused_with_what_would() -> None:
    tree: dict[str, Any] = {"name": "test", "data": {"source": "none"}}
    tree |= {"hardware": {"gpu_memory": 62.0}, "evaluate": {"gpus": 1, "batch_size": 256}}
    with pytest.raises(UserError, match=r"\b1 GPU\b.* \(weights ") as caught:
        evaluation_layout(parse_config(tree), SHIPPED_CONFIG)
    assert "evaluate.batch_size=" in (caught.value.hint or "")
    tree["hardware"] = {"gpu_memory": 24.0}
    with pytest.raises(UserError) as caught:
        evaluation_layout(parse_config(tree), SHIPPED_CONFIG)
    assert "Raise evaluate.gpus" in (caught.value.hint or "")


def test_answers_hold_what_the_plan_says(tmp_path: Path) -> None:
    shape = Shape(vocabulary=4_096, hidden=64, layers=3, experts=4, canvas=32)
    model = made_model(shape)
    (tmp_path / "config.json").write_text(model.config.to_json_string())
    tree = {"name": "test", "data": {"source": "none"}, "train": {"precision": "float32"}}
    architecture = read_architecture(parse_config(tree), tmp_path)
    rows, prompt, blocks = 8, 100, 2
    planned = answer_memory(
        architecture, AnswerShape(rows, 1, prompt, blocks * shape.canvas, device="cpu")
    )
    weights = {id(one): one for one in model.parameters()}.values()
    assert planned.pop("weights") == sum(one.nbytes for one in weights)
    asked = [Question(str(index), "", [7] * prompt, "") for index in range(rows)]
    settings = replace(SETTINGS, steps=3, stability_threshold=3)
    noise = AnswerNoise(0, shape.canvas, shape.vocabulary)
    options: dict[str, Any] = {"rows": rows, "max_new_tokens": blocks * shape.canvas, "stops": []}
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        assert len(list(Sampler(model, settings, noise, **options).answer(asked))) == rows
    # In the plan all tokens are chosen in one tile, here in four.
    ratio = sum(planned.values()) / (live.peak - live.held)
    assert 1.0 <= ratio < 2.5, f"planned {ratio:.2f} of what is held"
