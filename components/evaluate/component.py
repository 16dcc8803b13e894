"""The step `evaluate`: answers to held-out rows by the base and by the tuned model."""

from kfp.dsl import Artifact, Dataset, Input, Metrics, Model, Output

from components.decorator import component


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

    from canvastune.evaluation.run import measured
    from components.decorator import step
    from components.evaluate.step import answer, publish
    from components.run_directory import read_pointer

    with step("evaluate", config, run_folder, mlflow_run_id) as (recipe, record):
        out = Path(evaluation.path)
        record.dataset(Path(dataset.path), "evaluation")
        record.judged_model()
        found = measured(answer(recipe, Path(dataset.path), read_pointer(tuned), Path(run_folder), out, record))
        for name, value in found.items():
            figures.log_metric(name, value)
        publish(found, out, record)
