"""The step `evaluate`: answers to held-out rows by the base and by the tuned model."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.definition import component


@component
def evaluate(
    config: str,
    run_folder: str,
    mlflow_run_id: str,
    dataset: Input[Dataset],
    tuned: Input[Model],
    evaluation: Output[Artifact],
    figures: Output[Metrics],
) -> None:
    """Answer held-out rows before and after, count what is right, and measure the validation loss of both models."""
    from pathlib import Path

    from canvastune.evaluate import measured
    from components.evaluate.answering import answer
    from components.evaluate.publication import publish
    from components.run_folder import pointed
    from components.step import step

    with step("evaluate", config, run_folder, mlflow_run_id) as (recipe, record):
        out = Path(evaluation.path)
        record.dataset(Path(dataset.path), "evaluation")
        record.judged_model()
        found = measured(answer(recipe, Path(dataset.path), pointed(tuned), Path(run_folder), out, record))
        for name, value in found.items():
            figures.log_metric(name, value)
        publish(found, out, record)
