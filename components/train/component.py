"""The step `train`: from the base model and the prepared data to an adapter or a whole model."""

from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components.definition import component


@component
def train(
    config: str, run_folder: str, mlflow_run_id: str, dataset: Input[Dataset], trained: Output[Model], metrics: Output[Artifact]
) -> None:
    """Train; a run that has checkpoints goes on from them, a finished one is not trained again."""
    import shutil
    from pathlib import Path

    from components.step import step
    from components.train.launcher import train

    with step("train", config, run_folder, mlflow_run_id) as (recipe, record):
        weights = train(recipe, Path(dataset.path), Path(run_folder) / "train", record)
        shutil.copy(Path(run_folder) / "train" / "metrics.jsonl", metrics.path)
        if recipe.train.method == "lora":
            shutil.copytree(weights, trained.path)
        else:  # tens of GB stay on the workspace: the artifact points to them
            trained.uri = str(weights)
