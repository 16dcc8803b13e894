"""The step `plan`: what the run will need of its hardware, and a refusal of what cannot fit."""

from kfp.dsl import Artifact, Output

from components.decorator import component


@component
def plan(config: str, run_folder: str, mlflow_run_id: str, plan: Output[Artifact]) -> None:
    """Compute memory, FLOPs and time of the run from the model's config alone; fail if it cannot fit."""
    from pathlib import Path

    from canvastune.planner.planner import find_architecture, make_plan, write_plan
    from components.decorator import step

    with step("plan", config, run_folder, mlflow_run_id) as (recipe, record):
        made = make_plan(recipe, find_architecture(recipe.model), recipe.world_size)
        write_plan(made, recipe, Path(plan.path))
        print((Path(plan.path) / "plan.txt").read_text(encoding="utf-8"))
        record.outputs(Path(plan.path))
