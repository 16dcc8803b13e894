"""The step `evaluate`: answers of the base and of the tuned model to held-out rows."""

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
    """Answer held-out rows before and after, and measure both models' validation loss."""
    from pathlib import Path

    from components.evaluate.step import publish, run_evaluation
    from components.run_directory import read_pointer
    from components.runtime import step

    with step("evaluate", config, run_folder, mlflow_run_id) as (recipe, record):
        out = Path(evaluation.path)
        record.dataset(Path(dataset.path), "evaluation", of="run/")
        record.dataset(Path(dataset.path), "evaluation")
        record.evaluated_model()
        result = run_evaluation(
            recipe, Path(dataset.path), read_pointer(tuned), Path(run_folder), out, record
        )
        for name, value in result.figures().items():
            figures.log_metric(name, value)
        publish(result, out, record)
