"""The step `merge_lora`: from base model and adapter to one complete, verified checkpoint."""

from kfp.dsl import Input, Model, Output

from components.decorator import component


@component
def merge_lora(
    config: str,
    run_folder: str,
    mlflow_run_id: str,
    adapter: Input[Model],
    merged: Output[Model],
) -> None:
    """Merge shard by shard into the run's directory; the artifact points to it."""
    from pathlib import Path

    from components.merge_lora.step import merge_lora as merge_adapter
    from components.run_directory import write_pointer
    from components.runtime import step

    with step("merge_lora", config, run_folder, mlflow_run_id) as (recipe, record):
        folder = merge_adapter(recipe, Path(adapter.path), Path(run_folder), record)
        write_pointer(merged, folder)
