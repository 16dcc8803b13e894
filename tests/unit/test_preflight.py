"""What only a later step reads of recipe, data and model is looked at before the run trains."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    DiffusionGemmaGenerationConfig,
)

from canvastune.checkpoint import generation_config, hub_push
from canvastune.checkpoint.generation_config import (
    STOCK_KEYS,
    read_generation_file,
    sampler_keys,
    sampler_settings,
    write_generation_file,
)
from canvastune.checkpoint.hf_inference import load_stock
from canvastune.checkpoint.resume import changed_run
from canvastune.config import RunConfig, parse_config
from canvastune.config.data import ColumnsConfig
from canvastune.config.loading import known_keys
from canvastune.config.schema import SamplerConfig
from canvastune.config.strict import flatten
from canvastune.errors import UserError
from canvastune.evaluation.preflight import (
    NOT_SCORED,
    check_generation_config,
    describe_answers,
    describe_scoring,
)
from canvastune.planner.planner import make_plan
from canvastune.preparation.prepare import prepare_data
from components.earlier_runs import find_compared
from components.plan.step import describe_shortage
from components.report.step import _existing_runs
from components.resolve import step as resolution
from components.train import step as training
from pipelines import submit as submission
from pipelines.cli import main
from pipelines.doctor.later_steps import check_evaluation
from pipelines.kfp_client import KubeflowClient
from tools.report_sample import sample_config, sample_run


def recipe(rows: Path, model: Path, **sections: Any) -> RunConfig:
    data = {"source": str(rows), "seq_length": 96, "validation_fraction": 0.3}
    tree = {"name": "chat", "model": {"id": str(model)}, "data": data}
    return parse_config(tree | sections)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write chat rows without `#### 7`; every eighth of the answers has a number in parentheses."""
    path = tmp_path_factory.mktemp("rows") / "chat.jsonl"
    with path.open("w") as file:
        for number in range(40):
            answer = f"({number})" if number % 8 == 0 else "I do not know."
            file.write(json.dumps({"prompt": f"What is {number}?", "response": answer}) + "\n")
    return path


@pytest.fixture(scope="module")
def prepared(rows: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "data"
    prepare_data(recipe(rows, tiny_model), tiny_model, out)
    return out


@pytest.fixture
def changed_model(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that copies the tiny model with other settings in a JSON file."""

    def change(**settings: Any) -> Path:
        folder = tmp_path / "changed"
        folder.mkdir()
        for file in tiny_model.iterdir():
            (folder / file.name).symlink_to(file)
        file = folder / "generation_config.json"
        tree = json.loads(file.read_text()) | settings
        file.unlink()
        file.write_text(json.dumps(tree))
        return folder

    return change


# --- exact match


def test_a_pattern_that_matches_no_reference_is_found_before_training(
    rows: Path, prepared: Path, tiny_model: Path
) -> None:
    (line,) = describe_scoring(recipe(rows, tiny_model), prepared)
    held_out = json.loads((prepared / "card.json").read_text())["validation"]
    assert re.match(rf"evaluate\.judge: chrF\b.* {held_out} held-out references: ", line)
    assert "####\\s*(-?[\\d.,]+) matches none " in line
    named = recipe(rows, tiny_model, evaluate={"judge": "pattern"})
    (line,) = describe_scoring(named, prepared)
    assert f" 0 of {held_out} " in line
    assert NOT_SCORED in line


def test_the_matches_of_a_pattern_are_counted(rows: Path, prepared: Path, tiny_model: Path) -> None:
    def line(pattern: str | None) -> str:
        (found,) = describe_scoring(
            recipe(rows, tiny_model, evaluate={"answer_pattern": pattern}), prepared
        )
        return found

    held_out = json.loads((prepared / "card.json").read_text())["validation"]
    assert f" {held_out} of {held_out} " in line("(.+)")
    some = re.search(r" (\d+) of ", line(r"\((\d+)\)"))
    assert some is not None
    assert 0 < int(some[1]) < held_out
    assert re.fullmatch(rf"evaluate\.judge: chrF\b.* {held_out} held-out references", line(None)), (
        "it speaks of a pattern that is not set"
    )


def test_prepare_doctor_and_the_step_say_it(
    rows: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from components.prepare_data.step import prepare_data as step

    config = recipe(rows, tiny_model)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    line = r"chrF judges all \d+ held-out references: evaluate\.answer_pattern .* matches none"
    assert main(["prepare", str(file), "--output", str(tmp_path / "prepared")]) == 0
    said = capsys.readouterr().err
    assert re.search(line, said)
    assert "evaluate.rows is 64" in said
    step(config, tmp_path / "data", tmp_path / "card.html")
    assert re.search(line, capsys.readouterr().err)
    (found,) = [one for one in check_evaluation(config) if "answer_pattern" in one.found]
    assert found.state == "ok"
    assert re.search(line, found.found)
    unscored = recipe(rows, tiny_model, evaluate={"judge": "pattern"})
    (found,) = [one for one in check_evaluation(unscored) if "answer_pattern" in one.found]
    assert found.state == "warning"
    scored = recipe(rows, tiny_model, evaluate={"answer_pattern": "(.+)", "max_new_tokens": 32})
    (found,) = [one for one in check_evaluation(scored) if "answer_pattern" in one.found]
    assert found.state == "ok"


def test_the_step_prepare_data_is_given_the_judges_and_no_other_later_setting(
    rows: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolution.tracking, "start", lambda *_: "")
    text = yaml.safe_dump(recipe(rows, tiny_model).model_dump(mode="json"))

    def data_config(job: str, overrides: str) -> str:
        return resolution.resolve(text, overrides, "", str(tmp_path), "", job, job).data_config

    first = data_config("a", "")
    assert data_config("b", "evaluate.rows=2\ntracking.promote=never") == first
    changed = data_config("c", "evaluate.answer_pattern=null")
    assert json.loads(changed)["evaluate"]["answer_pattern"] is None
    assert json.loads(data_config("d", "evaluate.judge=chrf"))["evaluate"]["judge"] == ["chrf"]


# --- what evaluation will do


def test_settings_that_evaluation_cannot_follow_are_said(
    rows: Path, prepared: Path, tiny_model: Path
) -> None:
    def lines(**sections: Any) -> list[str]:
        return describe_answers(recipe(rows, tiny_model, **sections), prepared)

    fitting = {"rows": 2, "max_new_tokens": 32, "judge": []}
    assert lines(evaluate=fitting) == []
    (line,) = lines(evaluate=fitting | {"rows": 64})
    assert re.match(r"evaluate\.rows is 64\b.* \d+ rows\b", line)
    assert lines(evaluate=fitting | {"max_new_tokens": 20}) == [], "it cuts exactly there"
    (line,) = lines(evaluate=fitting | {"max_new_tokens": 16 * 10**6})
    assert "positions" in line
    registered = {"registered_model": "chat"}
    (line,) = lines(evaluate=fitting, tracking=registered)
    assert re.search(r"\bchat\b.* champion\b", line)
    assert lines(evaluate=fitting, tracking=registered | {"promote": "never"}) == []
    (line,) = lines(evaluate=fitting | {"judge": "chrf"}, tracking=registered)
    assert re.match(r"2 scored rows\b.* 6\b", line)


def test_the_step_train_says_it_before_it_trains(
    rows: Path,
    prepared: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def begin(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "run_ranks", begin)
    with pytest.raises(KeyboardInterrupt):
        training.train(recipe(rows, tiny_model), prepared, tmp_path / "train", training.StepRun())
    assert "evaluate.rows is 64" in capsys.readouterr().err


# --- the generation config


def test_the_base_model_is_there_before_a_job_asks_for_gpus(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Exception):
        pass

    def ask_for_gpus(*_: Any) -> None:
        raise Stopped

    downloaded: list[str] = []
    config = recipe(rows, Path("team/model"), cluster={"backend": "pytorchjob"})
    monkeypatch.setattr(training, "_job_context", lambda *_: None)
    monkeypatch.setattr(training, "resolve_model", lambda model: downloaded.append(model.id))
    monkeypatch.setattr(training, "run_job", ask_for_gpus)
    with pytest.raises(Stopped):
        training.train(config, None, tmp_path / "train", training.StepRun())
    assert downloaded == ["team/model"]


def test_a_usual_generation_config_gives_no_remark(
    tiny_model: Path, changed_model: Callable[..., Path]
) -> None:
    assert check_generation_config(tiny_model) == []
    assert (
        check_generation_config(changed_model(max_new_tokens=64, cache_implementation=None)) == []
    )


def test_the_keys_and_the_sampler_are_those_of_stock_transformers() -> None:
    assert vars(DiffusionGemmaGenerationConfig()).keys() == STOCK_KEYS
    sampler = DiffusionGemmaGenerationConfig._get_default_generation_params()["sampler_config"]
    settings = generation_config._defaults()
    assert sampler_keys(settings)["sampler_config"]["_cls_name"] == type(sampler).__name__


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"temperature": 1.0, "top_k": 64}, r"temperature, top_k\b"),
        ({"return_dict_in_generate": False}, r"return_dict_in_generate\b.* False\b"),
        ({"t_min": 0.8, "t_max": 0.4}, r"t_min\b.* 0\.8\b.*t_max\b.*0\.4\b"),
        ({"t_max": "hot"}, r"t_max\b.*'hot'"),
        ({"max_length": 20}, r"max_length\b.* 20\b.* evaluate\.max_new_tokens "),
        ({"cache_implementation": "static"}, r"cache_implementation\b.*'static'"),
        ({"max_denoising_steps": 2.5}, r"max_denoising_steps\b.* 2\.5\b"),
        ({"sampler_config": {"_cls_name": "Other"}}, r"sampler_config\b"),
        ({"eos_token_id": "<eos>"}, r"eos_token_id\b.*'<eos>'"),
    ],
)
def test_what_a_generation_config_has_that_is_not_used_is_a_line_before_training(
    settings: dict[str, Any],
    word: str,
    changed_model: Callable[..., Path],
    rows: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from components.prepare_data.step import prepare_data as step

    model = changed_model(**settings)
    (remark,) = check_generation_config(model)
    assert "generation_config.json: " in remark
    assert re.search(word, remark)
    if "top_k" in settings:
        with caplog.at_level("INFO"):
            step(recipe(rows, model), tmp_path / "data", tmp_path / "card.html")
        assert remark in caplog.text


def test_weights_that_are_cut_off_are_refused_before_training(
    changed_model: Callable[..., Path], rows: Path, tmp_path: Path
) -> None:
    from components.prepare_data.step import prepare_data as step

    model = changed_model()
    shard = min(model.glob("*.safetensors"))
    content = shard.read_bytes()
    shard.unlink()  # it may be a link to the file of other tests
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=rf"{re.escape(str(shard))}: .*{len(content) // 2} bytes"):
        step(recipe(rows, model), tmp_path / "data", tmp_path / "card.html")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "settings",
    [{"confidence_threshold": 1}, {"t_min": 0, "t_max": 1}, {"max_denoising_steps": 16.0}],
)
def test_an_integer_in_the_place_of_a_float_is_that_float(
    settings: dict[str, Any], changed_model: Callable[..., Path]
) -> None:
    model = changed_model(**settings)
    assert check_generation_config(model) == []
    (key, value), *_ = settings.items()
    name = "steps" if key == "max_denoising_steps" else key
    assert getattr(read_generation_file(model).sampler, name) == value
    load_stock(model, torch.device("cpu"))


def test_a_generation_config_that_is_no_json_is_refused_before_training(
    changed_model: Callable[..., Path],
) -> None:
    model = changed_model()
    (model / "generation_config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"generation_config\.json: "):
        check_generation_config(model)


def test_the_recipe_wins_over_the_base_and_the_base_over_the_defaults(
    changed_model: Callable[..., Path],
) -> None:
    model = changed_model(max_denoising_steps=5, t_min=0.1)
    assert sampler_settings(model, SamplerConfig()).steps == 5
    found = sampler_settings(model, SamplerConfig(steps=7, confidence_threshold=0.0))
    assert (found.steps, found.t_min, found.confidence_threshold) == (7, 0.1, 0.0)
    (model / "generation_config.json").unlink()
    found = sampler_settings(model, SamplerConfig())
    assert (found.steps, found.t_min, found.t_max, found.entropy_bound) == (48, 0.4, 0.8, 0.1)
    with pytest.raises(UserError, match=r"evaluate\.sampler: t_min is 0\.9"):
        sampler_settings(model, SamplerConfig(t_min=0.9))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 1.0, "top_k": 64, "do_sample": True},
        {"max_length": 20, "cache_implementation": "static"},
        {"return_dict_in_generate": False, "confidence_threshold": 1},
        None,
    ],
    ids=str,
)
def test_a_model_made_of_any_base_is_loaded_by_stock_transformers_and_complete_for_servers(
    settings: dict[str, Any] | None, changed_model: Callable[..., Path], tmp_path: Path
) -> None:
    base = changed_model(**(settings or {}))
    if settings is None:
        (base / "generation_config.json").unlink()
    load_stock(base, torch.device("cpu"))
    out = tmp_path / "out"
    out.mkdir()
    write_generation_file(base, out)
    loaded = DiffusionGemmaGenerationConfig.from_pretrained(out, local_files_only=True)
    assert loaded.return_dict_in_generate
    assert (loaded.max_length, loaded.cache_implementation) == (None, None)
    written = json.loads((out / "generation_config.json").read_text())
    # vLLM 0.33 looks these up and fails without.
    assert written.keys() >= {"t_min", "t_max", "stability_threshold", "confidence_threshold"}
    assert written["sampler_config"]["_cls_name"] == "EntropyBoundSamplerConfig"
    assert written["sampler_config"]["entropy_bound"] > 0
    assert read_generation_file(out).sampler == read_generation_file(base).sampler


def test_a_usual_generation_config_is_copied_byte_for_byte(
    tiny_model: Path, tmp_path: Path
) -> None:
    write_generation_file(tiny_model, tmp_path)
    name = "generation_config.json"
    assert (tmp_path / name).read_bytes() == (tiny_model / name).read_bytes()


# --- names, and runs to compare with


@pytest.mark.parametrize("name", ["google/dg", "a:b", "it's", 'a"b', " ", "..", "./x", "a\\b"])
def test_a_model_name_that_mlflow_refuses_is_refused_with_the_recipe(name: str) -> None:
    tree = {"name": "x", "data": {"source": "x"}, "tracking": {"registered_model": name}}
    with pytest.raises(UserError, match=r"tracking\.registered_model: found"):
        parse_config(tree)


@pytest.mark.parametrize("name", ["", "x" * 501])
def test_an_experiment_name_that_mlflow_refuses_is_refused_with_the_recipe(name: str) -> None:
    with pytest.raises(UserError, match=r"tracking\.experiment: found"):
        parse_config({"name": "x", "data": {"source": "x"}, "tracking": {"experiment": name}})


def test_a_run_that_cannot_be_compared_is_refused_at_the_start_and_left_out_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    for name in ("good", "no-steps", "no-json"):
        folder = tmp_path / name
        run = sample_run(folder, sample_config())
        for file in (folder / "train").iterdir():
            shutil.copy(file, folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
        folders.append(folder)
    good, no_steps, no_json = folders
    metrics = no_steps / "metrics.jsonl"
    metrics.write_text(
        "".join(line for line in metrics.open() if json.loads(line)["kind"] != "train")
    )
    (no_json / "evaluation" / "evaluation.json").write_text("{")
    assert len(find_compared([good])) == 1
    for folder in (no_steps, no_json):
        with pytest.raises(UserError, match=folder.name):
            find_compared([good, folder])
    with pytest.raises(UserError, match="good is named twice"):
        find_compared([good, tmp_path / "." / "good"])
    with pytest.raises(UserError, match="good is the run itself"):
        find_compared([good], own=good)
    assert [run.name for run in _existing_runs(folders)] == ["good"]
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("not compared") == 2


def test_submit_refuses_more_runs_to_compare_than_colors() -> None:
    config = parse_config({"name": "x", "data": {"source": "openai/gsm8k"}})
    client = KubeflowClient.from_address("http://localhost:1", None, None)
    with pytest.raises(UserError, match=r"\b6 runs, .*\b5\b"):
        submission.submit(config, client, compare=list("abcdef"))


# --- settings of later steps may change


OTHER = {
    "evaluate.rows": 3,
    "evaluate.batch_size": 3,
    "evaluate.gpus": 2,
    "evaluate.max_new_tokens": 32,
    "evaluate.sampler.steps": 3,
    "evaluate.sampler.entropy_bound": 0.5,
    "evaluate.sampler.t_min": 0.1,
    "evaluate.sampler.t_max": 1.5,
    "evaluate.sampler.stability_threshold": 2,
    "evaluate.sampler.confidence_threshold": 0.1,
    "evaluate.sampler.self_conditioning": False,
    "evaluate.answer_pattern": None,
    "evaluate.judge": ["chrf"],
    "evaluate.slices": ["topic"],
    "evaluate.judge_model.address": "http://judge.example/v1",
    "evaluate.judge_model.model": "other",
    "evaluate.judge_model.instructions": "End with Score: N.",
    "evaluate.judge_model.concurrency": 2,
    "evaluate.judge_model.timeout": 5.0,
    **{
        f"evaluate.forgetting.{name}": "other" for name in ("source", "config", "revision", "split")
    },
    "evaluate.forgetting.format": "messages",
    "evaluate.forgetting.rows": 3,
    **{f"evaluate.forgetting.columns.{name}": "other" for name in ColumnsConfig.model_fields},
    "evaluate.repeats": 2,
    "tracking.uri": "http://mlflow.example",
    "tracking.experiment": "other",
    "tracking.registered_model": "other",
    "tracking.promote": "never",
    "tracking.hub_model_id": "team/model",
    "tracking.hub_private_repo": False,
    "tracking.hub_content": "adapter",
    "tracking.log_texts": False,
    "train.export": "last",
    "hardware.gpu_memory": 9.0,
    "hardware.accelerator": "cpu",
}


def test_every_setting_of_evaluation_and_tracking_is_tried_here() -> None:
    later = {key for key in known_keys() if key.startswith(("evaluate.", "tracking.", "hardware."))}
    sections = {"evaluate.judges"}  # which has a separate test
    sections |= {f"evaluate.{name}" for name in ("sampler", "judge_model", "forgetting")}
    sections.add("evaluate.forgetting.columns")
    assert later - sections <= OTHER.keys()


@pytest.mark.parametrize("key", OTHER)
def test_an_unfinished_run_goes_on_with_another_value_of_what_only_later_steps_read(
    key: str, rows: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolution.tracking, "start", lambda *_: "")
    monkeypatch.setattr(hub_push, "check_push", lambda _: None)  # it asks the Hub
    before = recipe(rows, tiny_model)
    text = yaml.safe_dump(before.model_dump(mode="json"))
    assert flatten(before.model_dump(mode="json"))[key] != OTHER[key]

    def resolve(job: str, overrides: str, compare: str = "") -> RunConfig:
        found = resolution.resolve(
            text, overrides, "", str(tmp_path), "mine", job, job, compare=compare
        )
        return parse_config(found.config)

    resolve("job-1", "")
    after = resolve("job-2", f"{key}={json.dumps(OTHER[key])}")
    assert flatten(after.model_dump(mode="json"))[key] == OTHER[key]
    identity = flatten(before.model_dump(mode="json")) | {"data": "same"}
    assert changed_run(identity, after, "same") == ""


def test_an_unfinished_run_may_be_compared_with_other_runs(
    rows: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolution.tracking, "start", lambda *_: "")
    other = tmp_path / "runs" / "other"
    run = sample_run(other, sample_config())
    shutil.copy(other / "train" / "metrics.jsonl", other)
    (other / "config.yaml").write_text(yaml.safe_dump(run.config.model_dump(mode="json")))
    text = yaml.safe_dump(recipe(rows, tiny_model).model_dump(mode="json"))
    for job, compare in (("job-1", ""), ("job-2", "other"), ("job-3", "")):
        resolution.resolve(text, "", "", str(tmp_path), "mine", job, job, compare=compare)
    with pytest.raises(UserError, match="missing"):
        resolution.resolve(text, "", "", str(tmp_path), "mine", "j", "job-4", compare="missing")


def test_a_disk_that_is_too_small_for_checkpoints_and_model_is_said_before_training(
    middling: Path,
) -> None:
    config = parse_config(
        {
            "name": "full",
            "data": {"source": "x"},
            "train": {"method": "full", "keep_checkpoints": 1},
            "parallel": {"nproc_per_node": 1, "ep": 1},
        }
    )
    plan = make_plan(config, middling, 1)
    needed = 3 * plan.checkpoint_bytes + 2 * plan.parameters["total"].total
    assert describe_shortage(plan, needed) is None
    shortage = describe_shortage(plan, needed - 1)
    assert shortage is not None
    assert "lower train.keep_checkpoints" in shortage


def test_an_unfinished_run_goes_on_with_judges_of_a_source(
    rows: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolution.tracking, "start", lambda *_: "")
    text = yaml.safe_dump(recipe(rows, tiny_model).model_dump(mode="json"))
    judges = json.dumps({str(rows): "text"})
    for job, overrides in (("job-1", ""), ("job-2", f"evaluate.judges={judges}")):
        found = resolution.resolve(text, overrides, "", str(tmp_path), "mine", job, job)
    assert parse_config(found.config).evaluate.judges == {str(rows): ("text",)}
    assert json.loads(found.data_config)["evaluate"]["judges"] == {str(rows): ["text"]}
