"""The pipeline: prepare data -> plan -> train -> merge (LoRA only) -> evaluate -> report."""

import copy
from typing import Any

from kfp import dsl, kubernetes
from kfp.dsl.graph_component import GraphComponent

from components.decorator import IMAGE
from components.evaluate.component import evaluate
from components.finish.component import finish
from components.jobs.pod_spec import CREDENTIALS, KEEP_NODE
from components.merge_lora.component import merge_lora
from components.plan.component import plan
from components.prepare_data.component import prepare_data
from components.report.component import report
from components.resolve.component import resolve
from components.train.component import train
from pipelines.steps import StepsConfig, apply, dump, keep_from_training_pods

# A parameter can set the claim of a mount, but not its path, and the mount cannot be left out: an
# empty name is an error
# on a cluster.
WORKSPACE_CLAIM = "canvastune-workspace"  # as the chart names it in a release `canvastune`
MOUNT_PATH = "/workspace"
SECRET = "canvastune-credentials"  # optional
JOB_NAME, JOB_ID = dsl.PIPELINE_JOB_NAME_PLACEHOLDER, dsl.PIPELINE_JOB_ID_PLACEHOLDER


def pipeline_with(
    settings: StepsConfig, sub_path: str = "", restricted: bool = True
) -> GraphComponent:
    """Return the pipeline whose steps have these settings, and mount this folder of the claim.

    Args:
        restricted: see `compile_pipeline`.
    """
    train_step = train if settings == StepsConfig() else _with_own_pod(train)

    @dsl.pipeline(
        name="canvastune-finetune",
        description="Fine-tune DiffusionGemma: full or LoRA, merged, evaluated and reported",
    )
    def finetune(
        recipe: str,
        overrides: str = "",
        dataset: str = "",
        workspace: str = MOUNT_PATH,
        run_name: str = "",
        pipeline_image: str = IMAGE,
        volume_claim: str = WORKSPACE_CLAIM,
        credentials: str = SECRET,
        cluster: str = "{}",
        kubeflow_url: str = "",
        compare: str = "",
        steps: str = dump(settings),
    ) -> None:
        """
        Args:
            recipe: the recipe as YAML or JSON text.
            overrides: changes to it, one `key=value` per line.
            dataset: replaces the recipe's `data.source` or `data.mixture`; "" keeps it.
            workspace: the folder that outlives the run's pods: checkpoints, merged model and report go
                to its `runs/RUN`.
            run_name: the RUN above, and the name in MLflow; "" takes the pipeline job's.
            pipeline_image: image of every step.
            volume_claim: existing PersistentVolumeClaim with the workspace, mounted at /workspace;
                unused on a laptop.
            credentials: secret whose keys HF_TOKEN, MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN
                every step gets, if set.
            cluster: JSON object with defaults of the recipe's section `cluster`: where and how training
                pods run.
            kubeflow_url: address of Kubeflow's page, for a tag in MLflow; `canvastune submit` sets it.
            compare: names of at most five earlier runs to compare with in the report, separated by
                commas or line breaks.
            steps: settings of the steps' pods, compiled into the graph: a run cannot change them.
        """

        def with_workspace(task: dsl.PipelineTask) -> dsl.PipelineTask:
            """Set the image, the workspace and the credentials of a task."""
            kubernetes.mount_pvc(task, volume_claim, MOUNT_PATH, sub_path)
            kubernetes.use_secret_as_env(
                task, credentials, {name: name for name in CREDENTIALS}, optional=True
            )
            if restricted:  # Kubeflow sets the rest of PodSecurity restricted, but not this
                kubernetes.set_security_context(task, run_as_non_root=True)
            return apply(task.set_container_image(pipeline_image), settings)

        def uncached(task: dsl.PipelineTask) -> dsl.PipelineTask:
            """Never use a cached result; the run's own switch does not reach into groups."""
            return with_workspace(task).set_caching_options(False)

        def keep_node(task: dsl.PipelineTask) -> dsl.PipelineTask:
            """Keep autoscalers from removing the node of a task that waits for days."""
            for key, value in KEEP_NODE.items():
                kubernetes.add_pod_annotation(task, key, value)
            return task

        exit_task = uncached(
            finish(workspace=workspace, run_name=run_name, job_name=JOB_NAME, job_id=JOB_ID)
        )
        with dsl.ExitHandler(exit_task):
            run = uncached(
                resolve(
                    recipe=recipe,
                    overrides=overrides,
                    dataset=dataset,
                    workspace=workspace,
                    run_name=run_name,
                    job_name=JOB_NAME,
                    job_id=JOB_ID,
                    cluster=cluster,
                    pipeline_image=pipeline_image,
                    kubeflow_url=kubeflow_url,
                    compare=compare,
                    steps=steps,
                    compiled_steps=dump(settings),
                )
            ).outputs
            common = {key: run[key] for key in ("config", "run_folder", "mlflow_run_id")}

            data = with_workspace(
                prepare_data(config=run["data_config"], content=run["data_fingerprint"])
            )
            prepared = data.outputs["dataset"]

            planned = uncached(plan(**common))
            training = uncached(train_step(**common, dataset=prepared)).after(planned)
            keep_node(training)
            if settings != StepsConfig():
                keep_from_training_pods(training, settings)

            def evaluate_and_report(tuned: Any) -> None:
                answers = keep_node(uncached(evaluate(**common, dataset=prepared, tuned=tuned)))
                uncached(
                    report(
                        **common,
                        metrics=training.outputs["metrics"],
                        dataset=prepared,
                        plan=planned.outputs["plan"],
                        evaluation=answers.outputs["evaluation"],
                        tuned=tuned,
                        compare=compare,
                    )
                )

            with dsl.If(run["method"] == "lora", name="lora"):
                merging = uncached(merge_lora(**common, adapter=training.outputs["trained"]))
                evaluate_and_report(merging.outputs["merged"])
            with dsl.Else(name="full"):
                evaluate_and_report(training.outputs["trained"])

    return finetune


def _with_own_pod(component: Any) -> Any:
    """Return the train step with a task's settings for its own pod, too, not only for its job's."""
    own = copy.deepcopy(component)
    spec = own.component_spec
    spec.task_config_passthroughs = [
        dsl.TaskConfigPassthrough(field=passthrough.field, apply_to_task=True)
        for passthrough in spec.task_config_passthroughs
    ]
    return own


finetune = pipeline_with(StepsConfig())
