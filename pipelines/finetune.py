"""The product as one graph: prepare data -> plan -> train -> merge the adapter (LoRA alone) -> evaluate -> report."""

from typing import Any

from kfp import dsl, kubernetes

from components.decorator import IMAGE
from components.evaluate.component import evaluate
from components.finish.component import finish
from components.jobs.pod_spec import CREDENTIALS
from components.merge_lora.component import merge_lora
from components.plan.component import plan
from components.prepare_data.component import prepare_data
from components.report.component import report
from components.resolve.component import resolve
from components.train.component import train

# A mount can be given its claim by a parameter, but neither its path, nor can it be left out: an empty name is an error on a cluster.
WORKSPACE_CLAIM, MOUNT_PATH = "canvastune-workspace", "/workspace"  # the first is what the chart makes in a release `canvastune`
SECRET = "canvastune-credentials"  # may be absent
JOB_NAME, JOB_ID = dsl.PIPELINE_JOB_NAME_PLACEHOLDER, dsl.PIPELINE_JOB_ID_PLACEHOLDER


@dsl.pipeline(name="canvastune-finetune", description="Fine-tune DiffusionGemma: full or LoRA, merged, evaluated and reported")
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
) -> None:
    """
    Args:
        recipe: the recipe as YAML or JSON text.
        overrides: changes to it, a line of `key=value` each.
        dataset: replaces the recipe's `data.source`; "" keeps it.
        workspace: the folder that outlives the run's pods: checkpoints, merged model and report go to `runs/RUN` below it.
        run_name: the RUN above, and the name in MLflow; "" takes the pipeline job's.
        pipeline_image: image of every step.
        volume_claim: existing PersistentVolumeClaim with the workspace, mounted at /workspace in every step; means nothing on a laptop.
        credentials: secret whose keys HF_TOKEN, MLFLOW_TRACKING_USERNAME, _PASSWORD and _TOKEN every step gets, where they exist.
        cluster: JSON object beneath the recipe's section `cluster`: where and how training pods run, as the chart gives it.
        kubeflow_url: address of Kubeflow's page, for a tag in MLflow; `canvastune submit` gives it.
        compare: earlier runs of the workspace that the report lays over this one: names, by commas or line breaks; at most five.
    """

    def mounted(task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A task in the pipeline's image, with the workspace and the credentials."""
        kubernetes.mount_pvc(task, pvc_name=volume_claim, mount_path=MOUNT_PATH)
        kubernetes.use_secret_as_env(task, credentials, {name: name for name in CREDENTIALS}, optional=True)
        return task.set_container_image(pipeline_image)

    def fresh(task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A task that Kubeflow never answers from its cache. Set on each: the run's own switch does not reach into groups."""
        return mounted(task).set_caching_options(False)

    def stays(task: dsl.PipelineTask) -> dsl.PipelineTask:
        """A task that waits for a job, for days: a node that is given back would take its pod along."""
        return kubernetes.add_pod_annotation(task, "cluster-autoscaler.kubernetes.io/safe-to-evict", "false")

    closing = fresh(finish(workspace=workspace, run_name=run_name, job_name=JOB_NAME, job_id=JOB_ID))
    with dsl.ExitHandler(closing):
        run = fresh(
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
            )
        ).outputs
        common = {key: run[key] for key in ("config", "run_folder", "mlflow_run_id")}

        data = mounted(prepare_data(config=run["data_config"], content=run["data_fingerprint"]))
        dataset_made = data.outputs["dataset"]

        planned = fresh(plan(**common))
        training = fresh(train(**common, dataset=dataset_made)).after(planned)
        stays(training)

        def judge(tuned: Any) -> None:
            answers = stays(fresh(evaluate(**common, dataset=dataset_made, tuned=tuned)))
            fresh(
                report(
                    **common,
                    metrics=training.outputs["metrics"],
                    dataset=dataset_made,
                    plan=planned.outputs["plan"],
                    evaluation=answers.outputs["evaluation"],
                    tuned=tuned,
                    compare=compare,
                )
            )

        with dsl.If(run["method"] == "lora", name="lora"):
            merging = fresh(merge_lora(**common, adapter=training.outputs["trained"]))
            judge(merging.outputs["merged"])
        with dsl.Else(name="full"):
            judge(training.outputs["trained"])
