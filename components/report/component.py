"""The step `report`: one page of charts, answers and figures."""

from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components.decorator import component


@component
def report(
    config: str,
    run_folder: str,
    mlflow_run_id: str,
    compare: str,
    metrics: Input[Artifact],
    dataset: Input[Dataset],
    plan: Input[Artifact],
    evaluation: Input[Artifact],
    tuned: Input[Model],
    page: Output[HTML],
    figures: Output[Metrics],
) -> None:
    """Write the report into the run's folder; show it and the main figures in Kubeflow."""
    import shutil
    from pathlib import Path

    from components.earlier_runs import compared_folders
    from components.report.step import publish, push_model
    from components.run_directory import read_pointer, workspace_of
    from components.runtime import step

    made = {"metrics": metrics, "data": dataset, "plan": plan, "evaluation": evaluation}
    with step("report", config, run_folder, mlflow_run_id) as (recipe, record):
        others = compared_folders(compare, workspace_of(run_folder))
        summary = publish(
            recipe,
            record,
            Path(run_folder),
            **{name: Path(each.path) for name, each in made.items()},
            tuned=read_pointer(tuned),
            compare=others,
        )
        shutil.copy(Path(run_folder) / "report" / "report.html", page.path)
        for name, value in summary.figures().items():
            figures.log_metric(name, value)
        push_model(recipe, record, Path(run_folder), read_pointer(tuned))
