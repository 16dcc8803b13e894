"""The step `report`: one page of curves, answers and figures."""

from kfp.dsl import HTML, Artifact, Dataset, Input, Metrics, Model, Output

from components.definition import component


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
    """Write the report into the run's folder, and show it and its main figures in Kubeflow."""
    import shutil
    from pathlib import Path

    from components.report.publication import publish
    from components.report.runs import compared_folders
    from components.run_folder import pointed, workspace_of
    from components.step import step

    made = {"metrics": metrics, "data": dataset, "plan": plan, "evaluation": evaluation}
    with step("report", config, run_folder, mlflow_run_id) as (recipe, record):
        others = compared_folders(compare, workspace_of(run_folder))
        summary = publish(
            recipe, record, Path(run_folder), **{name: Path(each.path) for name, each in made.items()}, tuned=pointed(tuned), compare=others
        )
        shutil.copy(Path(run_folder) / "report" / "report.html", page.path)
        for name, value in summary.items():
            figures.log_metric(name, value)
