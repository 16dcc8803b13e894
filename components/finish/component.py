"""The exit task `finish`: records the final state and cleans up, however the run ended."""

from kfp.dsl import PipelineTaskFinalStatus

from components.decorator import component


@component
def finish(
    workspace: str, run_name: str, job_name: str, job_id: str, status: PipelineTaskFinalStatus
) -> None:
    """Mark the run finished or failed, in its folder and in MLflow."""
    from components.finish.step import finish
    from components.runtime import exit_on_user_error

    with exit_on_user_error():
        finish(workspace, run_name, job_name, job_id, status.state, status.error_message or "")
