"""The step `evaluate`: answers to held-out rows by the base and by the tuned model."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components.definition import component


@component
def evaluate(
    config: str, run_folder: str, mlflow_run_id: str, dataset: Input[Dataset], tuned: Input[Model], evaluation: Output[Artifact]
) -> None:
    """Answer held-out rows before and after, and count what is right."""
    import json
    from pathlib import Path

    from components.evaluate.answering import answer
    from components.step import step

    with step("evaluate", config, run_folder, mlflow_run_id) as (recipe, record):
        out = Path(evaluation.path)
        record.metrics(answer(recipe, Path(dataset.path), Path(tuned.path), Path(run_folder), out, record))
        record.table([json.loads(line) for line in (out / "answers.jsonl").read_text(encoding="utf-8").splitlines()])
        record.outputs(out)
