"""The step `train`: train an adapter or a full model on the prepared data."""

from kfp import dsl
from kfp.dsl import Artifact, Dataset, Input, Model, Output

from components.decorator import component

_FOR_THE_JOB = (  # set on the task, passed to the training pods
    dsl.TaskConfigField.RESOURCES,
    dsl.TaskConfigField.KUBERNETES_TOLERATIONS,
    dsl.TaskConfigField.KUBERNETES_NODE_SELECTOR,
    dsl.TaskConfigField.KUBERNETES_AFFINITY,
)
_FOR_BOTH = (dsl.TaskConfigField.ENV, dsl.TaskConfigField.KUBERNETES_VOLUMES)


@component(
    task_config_passthroughs=[
        *_FOR_THE_JOB,
        *(dsl.TaskConfigPassthrough(field=field, apply_to_task=True) for field in _FOR_BOTH),
    ]
)
def train(
    config: str,
    run_folder: str,
    mlflow_run_id: str,
    dataset: Input[Dataset],
    trained: Output[Model],
    metrics: Output[Artifact],
    task_config: dsl.TaskConfig,
) -> None:
    """Train; resume from checkpoints if there are any; a finished run is not trained again."""
    import shutil
    from pathlib import Path

    from components.run_directory import write_pointer
    from components.runtime import step
    from components.train.step import train

    with step("train", config, run_folder, mlflow_run_id) as (recipe, record):
        weights = train(
            recipe, Path(dataset.path), Path(run_folder) / "train", record, vars(task_config)
        )
        shutil.copy(Path(run_folder) / "train" / "metrics.jsonl", metrics.path)
        if recipe.train.method == "lora":
            shutil.copytree(weights, trained.path)
        else:
            write_pointer(trained, weights)
