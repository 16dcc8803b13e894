"""The step `resolve`: from a recipe's text to the run's config, folder and MLflow run."""

from typing import NamedTuple

from components.decorator import component


@component
def resolve(
    recipe: str,
    overrides: str,
    dataset: str,
    workspace: str,
    run_name: str,
    job_name: str,
    job_id: str,
    cluster: str,
    pipeline_image: str,
    kubeflow_url: str,
    compare: str,
    steps: str,
    compiled_steps: str,
) -> NamedTuple(  # type: ignore[valid-type]
    "Settings",
    [
        ("config", str),
        ("method", str),
        ("data_config", str),
        ("data_fingerprint", str),
        ("run_folder", str),
        ("mlflow_run_id", str),
    ],
):
    """Validate the recipe, claim the run's folder and open its MLflow run."""
    parameters = dict(locals())
    from components.resolve.step import resolve
    from components.runtime import exit_on_user_error

    with exit_on_user_error():
        return resolve(**parameters)
