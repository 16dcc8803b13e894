"""The step `plan`: what the run will need of its hardware, and a refusal of what cannot fit."""

from kfp.dsl import Artifact, Output

from components.decorator import component


@component
def plan(config: str, run_folder: str, mlflow_run_id: str, plan: Output[Artifact]) -> None:
    """Compute memory, FLOPs and time of the run from the model's config; fail if it cannot fit."""
    from pathlib import Path

    from components.plan.step import plan as plan_run
    from components.runtime import step

    with step("plan", config, run_folder, mlflow_run_id) as (recipe, record):
        plan_run(recipe, Path(run_folder), Path(plan.path), record)
