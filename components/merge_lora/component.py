"""The step `merge_lora`: from the base model and an adapter to one complete checkpoint, with proof."""

from kfp.dsl import Input, Model, Output

from components.decorator import component


@component
def merge_lora(config: str, run_folder: str, mlflow_run_id: str, adapter: Input[Model], merged: Output[Model]) -> None:
    """Merge shard by shard into the run's folder; the artifact points to it."""
    from pathlib import Path

    from canvastune.checkpoint.hub import resolve_model
    from canvastune.merge import merge_lora
    from components.run_directory import write_pointer
    from components.runtime import step

    with step("merge_lora", config, run_folder, mlflow_run_id) as (recipe, record):
        folder = Path(run_folder) / "model"
        if not folder.exists():  # a retried step finds the whole model, or none
            merge_lora(recipe, resolve_model(recipe.model), Path(adapter.path), folder)
        write_pointer(merged, folder)
        record.outputs(folder)
        record.model(folder, "merged")
