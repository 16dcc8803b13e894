"""Texts of the data in MLflow: the dataset's first rows, questions and answers as traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import AssessmentSource

from canvastune import tracking
from canvastune.tracking import PipelineRun
from canvastune.tracking.client import load_mlflow
from canvastune.tracking.steps import Attempt
from tests.fakes.tracking_server import prepared
from tests.support.pipeline_runs import client_of, nested_runs, pipeline_run

pytestmark = pytest.mark.usefixtures("own_mlflow")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One embedded store for the module: making its tables takes two seconds."""
    return tmp_path_factory.mktemp("workspace")


def test_answers_are_traces_of_two_evaluations_and_a_repeated_one_replaces_them(
    workspace: Path, tmp_path: Path
) -> None:
    run = pipeline_run(workspace, "answered")
    parent = tracking.start(run)
    client = client_of(workspace)
    row = {"reference": "Because.", "judge": "chrf", "correct_after": None}

    def evaluate(count: int, after: str) -> dict[str, list[Any]]:
        lines = [
            {**row, "id": f"row-{number}", "prompt": f"Why {number}?", "before": "", "after": after}
            | ({"score_before": 0.2, "score_after": 0.1} if number else {})
            for number in range(count)
        ]
        (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
        with tracking.step_run(run, "evaluate") as record:
            scores = {"eval/score_before": 0.2, "eval/score_after": 0.1}
            record.metrics({"eval/cut_before": 0, "eval/cut_after": 0} | scores)
            record.dataset(prepared(tmp_path / str(count)), "evaluation")
            record.answers(tmp_path)
        assert tracking.pending(run) == []
        return {
            nested.info.run_name: [
                (nested, trace)
                for trace in client.search_traces(locations=["1"], run_id=nested.info.run_id)
            ]
            for nested in nested_runs(client, parent)
        }

    assert {name: len(found) for name, found in evaluate(120, "So.").items()} == {
        "answered: evaluate": 100,
        "answered: evaluate_base": 100,
    }, "more traces than the description says"
    found = evaluate(2, "Because!")
    assert {len(traces) for traces in found.values()} == {2}, "traces of other rows are left"
    asked = client.search_datasets(["1"], "name LIKE 'openai/gsm8k held out%'")
    assert sorted(len(dataset.to_df()) for dataset in asked) == [2, 100]
    shown = client.search_traces(locations=["1"], run_id=parent)
    assert [trace.data.spans[0].outputs for trace in shown] == ["Because!"] * 2
    for name, value in (("evaluate", 0.1), ("evaluate_base", 0.2)):
        evaluation = found[f"answered: {name}"][0][0]
        assert evaluation.info.status == "FINISHED"
        assert evaluation.data.tags["mlflow.runType"] == "genai_evaluate"
        assert evaluation.data.metrics["eval/score"] == value, "MLflow compares nothing"
        shared = [key for key in evaluation.data.metrics if key in ("eval/score", "eval/cut")]
        assert shared == ["eval/score", "eval/cut"], "the list of evaluations begins with details"
        assert evaluation.inputs.dataset_inputs
    traces = {trace.info.tags["canvastune.row"]: trace for _, trace in found["answered: evaluate"]}
    first, second = traces["row-0"], traces["row-1"]
    assert first.data.spans[0].inputs == {"question": "Why 0?"}
    assert first.data.spans[0].outputs == "Because!"
    assert [each.name for each in first.info.assessments] == ["expected_response"]
    assert first.info.tags["canvastune.change"] == "not scored"
    assert second.info.tags["canvastune.change"] == "lost"
    said = {each.name: (each.value, each.source.source_id) for each in second.info.assessments}
    assert said == {"expected_response": ("Because.", "data"), "score": (0.1, "chrf")}
    assert {each.run_id for trace in shown for each in trace.info.assessments} == {None}, (
        "the pipeline run's page leaves out what another run says of an answer"
    )


def test_the_dataset_shows_the_first_rows_of_the_data_card(workspace: Path, tmp_path: Path) -> None:
    samples = [
        {"prefix": f"<bos>user\n{number}? " + "x" * 400, "response": f"{number}!<eos>"}
        for number in range(9)
    ]
    run = pipeline_run(workspace, "previewed", data={"source": "previewed.jsonl"})
    parent, data = tracking.start(run), prepared(tmp_path, samples)
    tracking.log_data(run, data)
    with tracking.step_run(run, "evaluate") as record:
        record.dataset(data, "evaluation", of="run/")
    found = {
        entry.tags[0].value: json.loads(entry.dataset.profile)
        for entry in client_of(workspace).get_run(parent).inputs.dataset_inputs
    }
    assert found["evaluation"] == {"num_rows": 10}, "the card has no held-out rows"
    shown = found["training"]
    assert {name: shown[name] for name in ("num_rows", "train")} == {"num_rows": 90, "train": 80}
    assert shown["row 1 prompt"] == samples[0]["prefix"][:300] + "..."
    assert shown["row 6 response"] == samples[5]["response"]
    assert "row 7 prompt" not in shown


def test_texts_of_the_data_stay_in_the_run_folder_if_the_recipe_says_so(
    workspace: Path, tmp_path: Path
) -> None:
    secret, row = (
        "Zanzibar-17",
        {"id": "a", "judge": "f1", "score_before": 0.5, "score_after": 0.25},
    )
    sides = dict.fromkeys(("prompt", "reference", "before", "after"), f"of {secret}")
    samples = [{"prefix": secret, "response": secret}]
    client = client_of(workspace)

    def go(number: int, source: str, name: str, texts: bool) -> dict[str, Any]:
        settings = {"data": {"source": source}, "tracking": {"log_texts": texts}}
        run, folder = pipeline_run(workspace, name, **settings), tmp_path / f"{number}"
        parent, data = tracking.start(run, attempt=Attempt(f"{number}", 1.0)), folder / "data"
        tracking.log_data(run, prepared(folder, samples))
        with tracking.step_run(run, "evaluate") as record:
            (folder / "answers.jsonl").write_text(json.dumps({**row, **sides}))
            (folder / "film.json").write_text(json.dumps(secret))
            (folder / "evaluation.json").write_text("{}")
            record.dataset(data, "evaluation")
            record.metrics({"eval/score_after": 0.25})
            record.table([row | sides], of=("", "run/"))
            record.outputs(folder)
            record.answers(folder)
        with tracking.step_run(run, "report") as record:
            page = run.folder / "report.html"
            page.write_text(secret)
            record.file(page, of="run/")
        assert tracking.pending(run) == []
        found = client.get_run(record.pipeline_run_id)
        traces = client.search_traces(locations=["1"], run_id=parent)
        files = [file.path for file in client.list_artifacts(parent)]
        return {"traces": len(traces), "files": files, "metrics": found.data.metrics}

    def places() -> list[str]:
        stored = [workspace / "mlflow.db", *(workspace / "mlartifacts").rglob("*")]
        return [str(path) for path in stored if path.is_file() and secret in _text_of(path)]

    kept = go(1, "private.jsonl", "private", texts=False)
    assert places() == [], "MLflow has a text of the data"
    assert kept["traces"] == 0
    assert kept["files"] == ["config.yaml"]
    (evaluated,) = client.search_runs(["1"], "attributes.run_name = 'private: evaluate'")
    assert evaluated.data.metrics["eval/score"] == 0.25, "the figures are kept back, too"
    assert [file.path for file in client.list_artifacts(evaluated.info.run_id)] == [
        "evaluation.json"
    ]
    shown = go(2, "shared.jsonl", "private", texts=True)
    assert shown["traces"] == 1
    assert shown["files"] == ["answers.json", "config.yaml", "report.html"]
    assert len(places()) > 5
    assert go(3, "shared.jsonl", "private", texts=False)["traces"] == 0, "traces stay"


def _text_of(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def test_what_people_say_of_an_answer_stays_with_it(workspace: Path, tmp_path: Path) -> None:
    mlflow = load_mlflow()
    mlflow.set_tracking_uri(client_of(workspace).tracking_uri)
    ann = AssessmentSource("HUMAN", "ann@example.com")

    def evaluate(attempt: int, answers: list[str], judged: dict[str, Any]) -> PipelineRun:
        """As an attempt at the run that ends with this evaluation."""
        run = pipeline_run(workspace, "reviewed")
        tracking.start(run, attempt=Attempt(str(attempt), 1.0))
        rows = [
            {"id": f"row-{number}", "prompt": f"Why {number}?", "reference": "So.", "judge": "f1"}
            | {"before": "No.", "after": answer, **judged}
            for number, answer in enumerate(answers)
        ]
        (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
        with tracking.step_run(run, "evaluate") as record:
            record.answers(tmp_path)
        assert tracking.pending(run) == []
        return run

    def traces() -> dict[tuple[str, str], Any]:
        (step,) = client_of(workspace).search_runs(
            ["1"], "attributes.run_name = 'reviewed: evaluate'"
        )
        found = mlflow.search_traces(
            locations=["1"], run_id=step.info.run_id, return_type="list", max_results=50
        )
        names = [(each.info.tags["canvastune.row"], each.data.spans[0].outputs) for each in found]
        assert len(set(names)) == len(names), "an answer is shown twice"
        return dict(zip(names, found, strict=True))

    def said(trace: Any) -> dict[str, Any]:
        return {each.name: each.value for each in trace.info.assessments if each.valid is not False}

    run = evaluate(1, ["A.", "B.", "C.", "D."], {"correct_after": True, "score_after": 1.0})
    first = {row: trace.info.trace_id for (row, _), trace in traces().items()}
    judge = {name: value for name, value in said(traces()["row-1", "B."]).items()}
    assert judge == {"expected_response": "So.", "correct": True, "score": 1.0}
    for row in ("row-0", "row-1"):
        told = {"name": "helpful", "value": False, "rationale": "too short"}
        mlflow.log_feedback(trace_id=first[row], source=ann, **told)
    (correct,) = [a for a in traces()["row-1", "B."].info.assessments if a.name == "correct"]
    mlflow.override_feedback(
        trace_id=first["row-1"], assessment_id=correct.assessment_id, value=False, source=ann
    )
    mlflow.update_assessment(
        trace_id=first["row-0"],
        assessment_id=next(
            each.assessment_id
            for each in traces()["row-0", "A."].info.assessments
            if each.name == "expected_response"
        ),
        assessment=mlflow.entities.Expectation("expected_response", "Because."),
    )

    (run.folder / ".tracking/published.json").unlink()
    assert tracking.sync(run) == []
    feedback = said(traces()["row-0", "A."])
    assert feedback == {**judge, "helpful": False, "expected_response": "Because."}
    assert said(traces()["row-1", "B."]) == {**judge, "helpful": False, "correct": False}

    # Judged otherwise, with another answer to row-0 and to the row that no one assessed.
    evaluate(2, ["A!", "B.", "C!", "D."], {"score_after": 0.5})
    found = traces()
    same = [("row-1", "B."), ("row-3", "D.")]
    assert sorted(found) == sorted([("row-0", "A!"), ("row-0", "A."), ("row-2", "C!"), *same])
    carried_on, replaced = found["row-1", "B."].info, found["row-0", "A."].info
    assert carried_on.trace_id == first["row-1"]
    assert said(found["row-1", "B."]) == {
        **{"expected_response": "So.", "score": 0.5},
        **{"helpful": False, "correct": False},
    }
    assert (replaced.trace_id, said(found["row-0", "A."])) == (first["row-0"], feedback)
    assert replaced.tags["canvastune.superseded"] == "true"
    assert "canvastune.superseded" not in found["row-0", "A!"].info.tags
    assert said(found["row-0", "A!"]) == {"expected_response": "So.", "score": 0.5}
    assert said(found["row-3", "D."]) == {"expected_response": "So.", "score": 0.5}
    people = [each.source for each in carried_on.assessments if each.name == "helpful"]
    assert [(each.source_type, each.source_id) for each in people] == [("HUMAN", ann.source_id)]

    evaluate(3, ["A."], {})
    again = traces()["row-0", "A."].info
    assert again.trace_id == first["row-0"]
    assert "canvastune.superseded" not in again.tags
