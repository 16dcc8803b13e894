"""`canvastune`: the commands a person types. Each one puts the rooms together and calls one of them."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from canvastune import __version__
from canvastune.errors import UserError
from canvastune.logging import FORMAT_HELP, FORMATS, configure_logging, event, log_error
from pipelines.kfp_client import TOKEN, KubeflowClient

if TYPE_CHECKING:  # the doctor is called where nothing is installed yet
    from canvastune.config import RunConfig

logger = logging.getLogger("canvastune")  # the program's name; __name__ may be __main__

_DESCRIPTION = "Fine-tune DiffusionGemma: prepare data, plan, train, merge, evaluate and report, as one pipeline."
_EXIT_CODES = """exit codes:
  0    done
  1    refused or failed: the reason is the last line on standard error
  2    the command line itself is wrong
  130  interrupted (Ctrl-C, or SIGTERM); a run's last checkpoint is saved first
canvastune.train also ends with 3 when it was asked to stop and saved its state, and with 4 when a rank hangs, which it names."""
_EXAMPLES = """examples:
  canvastune demo                                              # everything on a tiny model, in minutes, without a GPU
  canvastune doctor                                            # what this machine lacks, in the order to mend it
  canvastune run pipelines/recipes/tiny_lora.yaml              # the pipeline on this machine
  canvastune plan pipelines/recipes/gsm8k_lora.yaml --gpus 8 --gpu-memory 80GB
  canvastune submit pipelines/recipes/gsm8k_lora.yaml --host http://localhost:8080 --wait    # on Kubeflow
  canvastune COMMAND --help                                    # more examples of each

Training alone, for example on one machine with 8 GPUs:
  torchrun --standalone --nproc-per-node=8 -m canvastune.train -c pipelines/recipes/gsm8k_lora.yaml --output runs/gsm8k"""
_RUN = """The tiny recipes use the model and the data that `canvastune demo` makes. The same command with the same --run-name goes on with
a run that was interrupted.

examples:
  canvastune run pipelines/recipes/tiny_lora.yaml
  canvastune run pipelines/recipes/tiny_lora.yaml --set lora.rank=16 --set train.steps=100 --run-name rank16
  canvastune run pipelines/recipes/tiny_lora.yaml --set lora.rank=32 --run-name rank32 --compare workspace/runs/rank16
  canvastune run pipelines/recipes/tiny_lora.yaml --log-format json > run.jsonl
  canvastune run pipelines/recipes/gsm8k_lora.yaml --workspace /data/runs --set data.source=my.jsonl"""
_DEMO = """Makes a random model of 1.6 M parameters and word problems below workspace/, trains, merges, evaluates and reports.

examples:
  canvastune demo"""
_PLAN = """From the model's configuration alone: no weights, no GPU. Exit code 1 where the run cannot fit, with the smallest changes
with which it would.

examples:
  canvastune plan pipelines/recipes/gsm8k_lora.yaml
  canvastune plan pipelines/recipes/gsm8k_sft.yaml --gpus 8 --gpu-memory 80GB
  canvastune plan pipelines/recipes/gsm8k_lora.yaml --gpus 4 --set parallel.ep=4 --set train.micro_batch_size=1"""
_PREPARE = """Every row is read, checked, split by its content and tokenized; bad rows are named. card.html and card.json say what
became of them.

examples:
  canvastune prepare pipelines/recipes/gsm8k_lora.yaml --output prepared
  canvastune prepare pipelines/recipes/gsm8k_lora.yaml --output prepared --set data.source=my.jsonl --set data.max_bad_row_fraction=0.05"""
_REPORT = """RUN is a folder below workspace/runs, or the --output of canvastune.train. Without --output the page comes in the place of the
one in RUN/report. At most five runs can be compared with: their curves are laid over, their figures and settings become tables.

examples:
  canvastune report workspace/runs/rank16
  canvastune report workspace/runs/rank16 --compare workspace/runs/rank32 workspace/runs/rank64
  canvastune report workspace/runs/rank16 --output look         # of a run that still goes on, too"""
_SYNC = """A run goes on while MLflow is away, out of order or closed to it. What it had to tell waits in RUN/unsent: each later step sends
it, and so does this command. Once everything has arrived, the folder is gone.

examples:
  canvastune sync workspace/runs/rank16
  MLFLOW_TRACKING_URI=http://localhost:5000 canvastune sync workspace/runs/rank16   # to the server where it is now"""
_COMPILE = """examples:
  canvastune compile                                           # finetune.yaml, for kfp run create -f or Kubeflow's upload page
  canvastune compile -o build/finetune.yaml"""
_SUBMIT = """The recipe is checked here first; data and models must lie on the Hub or on the workspace volume. The pipeline is
uploaded when it differs from what the server has.

examples:
  kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80 &
  canvastune submit pipelines/recipes/gsm8k_lora.yaml --host http://localhost:8080 --set lora.rank=32 --wait
  canvastune submit my.yaml --host https://kubeflow.example/pipeline --namespace team-a --token-file ~/.kube/kubeflow-token
  canvastune submit my.yaml --host http://localhost:8080 --set data.source=/workspace/my.jsonl --cluster-file cluster.yaml

A token is read from a file or from KF_PIPELINES_TOKEN, never from the command line, where others could see it. A server
with a certificate of your own authority: SSL_CERT_FILE names its bundle. With --wait, exit code 1 means that the run
failed, and the last line names the step."""
_UPLOAD = """Uploads a new version only when the pipeline's content changed. The settings that become the defaults of its parameters
here hold for later versions too, until they are given again.

examples:
  canvastune upload --host http://localhost:8080
  canvastune upload --host http://ml-pipeline.kubeflow:8888 --namespace team-a --token-file /var/run/secrets/kubeflow/pipelines/token \\
      --cluster-file cluster.yaml --pipeline-image registry.example/canvastune/pipeline:0.1.0

cluster.yaml holds settings of a recipe's section `cluster`:
  backend: pytorchjob
  image: registry.example/canvastune/trainer:0.1.0
  claim: canvastune-workspace"""
_DOCTOR = """Nothing is changed, and no weights are fetched. The cluster is asked where a kubeconfig or a pod's account is at hand.

examples:
  canvastune doctor                                            # this machine alone
  canvastune doctor pipelines/recipes/gsm8k_lora.yaml          # and the recipe's model and data set
  canvastune doctor --tracking-uri http://localhost:5000       # and MLflow
  canvastune doctor pipelines/recipes/gsm8k_lora.yaml --host http://localhost:8080 --namespace team-a    # and Kubeflow

Exit code 0: no problem (there may be warnings). 1: the last line says what to mend first."""
_TINY = """Random weights, 1.6 M parameters, the released model's module layout and a tokenizer with its chat markers.

examples:
  canvastune make-tiny-model tiny
  canvastune plan pipelines/recipes/tiny_lora.yaml --set model.id=tiny"""

_COMPLETION = """Prints what the shell reads to complete commands, options and file names with the Tab key.

examples:
  canvastune completion bash > ~/.local/share/bash-completion/completions/canvastune
  canvastune completion zsh > ~/.zfunc/_canvastune             # a folder of $fpath; then start a new shell"""


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code: 0 done, 1 refused or failed with the reason on standard error, 130 interrupted."""
    options = _parser().parse_args(arguments)
    configure_logging(getattr(options, "log_format", "text"))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends us ends the run's processes too
    try:
        return options.command(options) or 0
    except UserError as error:
        log_error(error)
        return 1
    except KeyboardInterrupt:
        logger.info("canvastune: interrupted")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace) -> None:
    from pipelines.local_runner import run_recipe

    run_recipe(_config(options), options.workspace, options.run_name, options.compare)


def _demo(options: argparse.Namespace) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when transformers is imported
    from pipelines.demo import demo

    demo()


def _report(options: argparse.Namespace) -> None:
    from pipelines.reporting import report_again

    print(report_again(options.run, options.compare, options.output))


def _sync(options: argparse.Namespace) -> None:
    from components.finish.step import sync

    print(sync(options.run))


def _compile(options: argparse.Namespace) -> None:
    out: Path = options.output
    if out.suffix not in (".yaml", ".yml"):
        raise UserError(f"-o {out}: Kubeflow reads no other file than .yaml. Give a name that ends so, such as finetune.yaml")
    from pipelines.submit import compile_pipeline

    partial = out.with_name(f".{out.stem}-{os.getpid()}{out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        compile_pipeline(partial)
        partial.replace(out)
    except OSError as error:
        raise UserError(f"-o {out}: cannot be written ({error.strerror}). Give a file in a place where you may write") from None
    finally:
        if partial.is_file():
            partial.unlink()
    print(out)


def _submit(options: argparse.Namespace) -> None:
    from pipelines.submit import read_cluster_file, submit

    cluster = read_cluster_file(options.cluster_file) if options.cluster_file else None
    names = {"experiment": options.experiment, "run_name": options.run_name}
    submit(_config(options), _server(options), cluster=cluster, compare=options.compare, wait=options.wait, **names)


def _upload(options: argparse.Namespace) -> None:
    from pipelines.submit import read_cluster_file, upload

    cluster = read_cluster_file(options.cluster_file) if options.cluster_file else None
    upload(_server(options), name=options.pipeline_name, cluster=cluster, image=options.pipeline_image)


def _server(options: argparse.Namespace) -> KubeflowClient:
    return KubeflowClient(options.host.partition("/#")[0].rstrip("/"), options.namespace, options.token_file)


def _make_tiny_model(options: argparse.Namespace) -> None:
    from canvastune.tiny_model import make_tiny_model

    make_tiny_model(options.folder)
    print(options.folder)


def _plan(options: argparse.Namespace) -> None:
    from canvastune.planner.plan import refuse_if_too_big
    from canvastune.planner.planner import find_architecture, make_plan
    from canvastune.planner.render import render

    if options.gpu_memory is not None:
        options.set.append(f"hardware.gpu_memory={options.gpu_memory}")
    config = _config(options)
    ranks = config.world_size if options.gpus is None else options.gpus
    plan = make_plan(config, find_architecture(config.model), ranks)
    print(render(plan))
    refuse_if_too_big(plan)


def _prepare(options: argparse.Namespace) -> None:
    from canvastune.checkpoint.hub import resolve_model
    from canvastune.preparation.prepare import prepare_data

    config = _config(options)
    card = prepare_data(config, resolve_model(config.model, weights=False), options.output)
    counts = {key: card[key] for key in ("rows_read", "kept", "train", "validation", "seconds")}
    logger.info("", extra=event("prepared", folder=str(options.output), **counts))


def _completion(options: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs the package shtab: pip install 'canvastune[pipeline]'") from None
    parser = _parser()
    (commands,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in (action for command in commands.values() for action in command._actions):
        if action.type is Path or action.dest == "recipe":
            action.complete = shtab.FILE
    print(shtab.complete(parser, shell=options.shell))


def _doctor(options: argparse.Namespace) -> int:
    from pipelines.doctor.doctor import doctor
    from pipelines.doctor.finding import DoctorOptions

    asked = {"tracking_uri": options.tracking_uri, "namespace": options.namespace, "host": options.host, "token_file": options.token_file}
    return doctor(DoctorOptions(options.recipe, tuple(options.set), **asked))


def _config(options: argparse.Namespace) -> RunConfig:
    from canvastune.config import load_config

    return load_config(options.recipe, options.set)


def _gigabytes(text: str) -> float:
    """`80`, `80GB` or `80GiB` as GB (1e9 bytes)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)?", text, re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected gigabytes: 80GB, or 80GiB")
    return float(found[1]) * (2**30 / 1e9 if (found[2] or "").lower() == "gib" else 1)


def _doctor_options(doctoring: argparse.ArgumentParser) -> None:
    doctoring.add_argument("recipe", nargs="?", metavar="RECIPE", help="look for its model, data, tracking server and backend too")
    doctoring.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe; may be repeated")
    doctoring.add_argument("--tracking-uri", metavar="URI", help="MLflow's server (default: MLFLOW_TRACKING_URI, or the recipe's)")
    doctoring.add_argument("--namespace", metavar="NS", help="of the cluster (default: the kubeconfig's)")
    doctoring.add_argument("--host", metavar="URL", help="Kubeflow's address, to see whether it answers")
    doctoring.add_argument("--token-file", type=Path, metavar="FILE", help="file with a bearer token for it")


def _server_options() -> argparse.ArgumentParser:
    server = argparse.ArgumentParser(add_help=False)
    server.add_argument("--host", required=True, metavar="URL", help="Kubeflow's address, as a browser shows it before /#/")
    server.add_argument("--namespace", metavar="NS", help="yours, where Kubeflow has one for each team")
    server.add_argument("--token-file", type=Path, metavar="FILE", help=f"file with a bearer token (default: that in {TOKEN}, if any)")
    server.add_argument("--cluster-file", type=Path, metavar="FILE", help="YAML or JSON with settings of a recipe's section `cluster`")
    return server


def _submit_options(submitting: argparse.ArgumentParser) -> None:
    submitting.add_argument("--experiment", metavar="NAME", help="of Kubeflow (default: the recipe's tracking.experiment)")
    submitting.add_argument("--run-name", metavar="NAME", help="in Kubeflow and MLflow, and the name of the run's folder")
    submitting.add_argument("--compare", nargs="+", default=[], metavar="RUN", help="names of runs that the report lays over this one")
    submitting.add_argument("--wait", action="store_true", help="follow the run to its end")


def _sync_options(syncing: argparse.ArgumentParser) -> None:
    syncing.add_argument("run", type=Path, metavar="RUN", help="its folder, such as workspace/runs/rank16")
    syncing.set_defaults(command=_sync)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "canvastune", description=_DESCRIPTION, epilog=f"{_EXAMPLES}\n\n{_EXIT_CODES}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"canvastune {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(name: str, teaching: str, **more: Any) -> argparse.ArgumentParser:
        return commands.add_parser(name, epilog=teaching, formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    recipe = argparse.ArgumentParser(add_help=False)
    recipe.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as pipelines/recipes/tiny_lora.yaml")
    recipe.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a key of the recipe; may be repeated")
    logs = argparse.ArgumentParser(add_help=False)
    logs.add_argument("--log-format", choices=FORMATS, default="text", help=FORMAT_HELP)
    workspace = argparse.ArgumentParser(add_help=False)
    workspace.add_argument(
        "--workspace", type=Path, default=Path("workspace"), metavar="DIR", help="where runs are kept (default: %(default)s)"
    )

    compared = argparse.ArgumentParser(add_help=False)
    compared.add_argument("--compare", nargs="+", type=Path, default=[], metavar="RUN", help="folders of runs that the report lays over")

    run = add("run", _RUN, parents=[recipe, workspace, compared, logs], help="run the whole pipeline on this machine")
    run.add_argument(
        "--run-name", metavar="NAME", help="name of a new run, or of an unfinished one to go on with (default: recipe and time)"
    )
    run.set_defaults(command=_run)

    demo = add("demo", _DEMO, help="the pipeline on a tiny model that it makes first; minutes, no GPU")
    demo.set_defaults(command=_demo)

    plan = add("plan", _PLAN, parents=[recipe], help="what a run will need of its hardware, without weights or a GPU")
    plan.add_argument("--gpus", type=int, metavar="N", help="default: the recipe's cluster.nodes x parallel.nproc_per_node")
    plan.add_argument(
        "--gpu-memory", type=_gigabytes, metavar="SIZE", help="memory of each, as 80GB (default: the recipe's hardware.gpu_memory)"
    )
    plan.set_defaults(command=_plan)

    prepare = add("prepare", _PREPARE, parents=[recipe, logs], help="read, check, split and tokenize a recipe's data")
    prepare.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    prepare.set_defaults(command=_prepare)

    report = add("report", _REPORT, parents=[compared], help="the report of a run again, compared with others")
    report.add_argument("run", type=Path, metavar="RUN", help="its folder, such as workspace/runs/rank16")
    report.add_argument("--output", type=Path, metavar="DIR", help="a new folder for the page and its pictures (default: RUN/report)")
    report.set_defaults(command=_report)

    _sync_options(add("sync", _SYNC, help="send MLflow what it missed of a run"))

    compiling = add("compile", _COMPILE, help="write the pipeline for Kubeflow")
    compiling.add_argument("-o", "--output", type=Path, default=Path("finetune.yaml"), metavar="FILE", help="(default: %(default)s)")
    compiling.set_defaults(command=_compile)

    server = _server_options()
    submitting = add("submit", _SUBMIT, parents=[recipe, server, logs], help="run the pipeline on Kubeflow")
    _submit_options(submitting)
    submitting.set_defaults(command=_submit)

    uploading = add("upload", _UPLOAD, parents=[server], help="bring the pipeline to Kubeflow, for others to run")
    uploading.add_argument("--pipeline-name", default="canvastune-finetune", metavar="NAME", help="in Kubeflow (default: %(default)s)")
    uploading.add_argument("--pipeline-image", metavar="IMAGE", help="becomes the default image of the steps")
    uploading.set_defaults(command=_upload)

    doctoring = add("doctor", _DOCTOR, help="what this machine has and lacks for a run, in the order to mend it")
    _doctor_options(doctoring)
    doctoring.set_defaults(command=_doctor)

    completion = add("completion", _COMPLETION, help="shell completion, for bash or zsh")
    completion.add_argument("shell", choices=("bash", "zsh"))
    completion.set_defaults(command=_completion)

    tiny = add("make-tiny-model", _TINY, help="write a small random DiffusionGemma, as the Hub would have it")
    tiny.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    tiny.set_defaults(command=_make_tiny_model)
    return parser


if __name__ == "__main__":
    sys.exit(main())
