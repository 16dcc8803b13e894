"""The command line of `canvastune`: its commands, options and help texts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

from canvastune import __version__
from canvastune.logging import FORMAT_HELP, FORMATS
from pipelines.doctor.finding import WORKSPACE
from pipelines.kfp_client import TOKEN

_DESCRIPTION = """Fine-tune DiffusionGemma: prepare data, plan, train, merge, evaluate and report,
as one pipeline."""
_EXIT_CODES = """exit codes:
  0    done
  1    refused or failed: the reason is the last line on standard error
  2    the command line itself is wrong
  130  interrupted (Ctrl-C, or SIGTERM); a run's last checkpoint is saved first
canvastune.train also ends with 3 when it was asked to stop and saved its state, and with 4 when a
rank hangs, which it names."""
_EXAMPLES = """examples:
  canvastune demo                                  # everything on a tiny model, in minutes, no GPU
  canvastune doctor                                # what this machine lacks, in the order to fix it
  canvastune run pipelines/recipes/tiny_lora.yaml  # the pipeline on this machine
  canvastune plan pipelines/recipes/gsm8k_lora.yaml --gpus 8 --gpu-memory 80GB
  canvastune submit pipelines/recipes/gsm8k_lora.yaml --host http://localhost:8080 --wait
  canvastune COMMAND --help                        # more examples of each

Training only, for example on one machine with 8 GPUs:
  torchrun --standalone --nproc-per-node=8 -m canvastune.train \\
      -c pipelines/recipes/gsm8k_lora.yaml --output runs/gsm8k"""
_RUN = """The tiny recipes use the model and the data that `canvastune demo` writes; tiny_sft.yaml
starts from `canvastune make-tiny-model workspace/tiny-random`. An interrupted run is resumed by the
same command with its --run-name, which the last line prints, or with --resume. Only one process at a
time works on a run; `canvastune runs` lists all of them.

examples:
  canvastune run pipelines/recipes/tiny_lora.yaml
  canvastune run pipelines/recipes/tiny_lora.yaml --resume    # the newest unfinished run of the recipe
  canvastune run pipelines/recipes/tiny_lora.yaml --set lora.rank=16 --run-name rank16
  canvastune run pipelines/recipes/tiny_lora.yaml --set lora.rank=32 --run-name rank32 \\
      --compare workspace/runs/rank16
  canvastune run pipelines/recipes/tiny_lora.yaml --log-format json > run.jsonl
  canvastune run pipelines/recipes/gsm8k_lora.yaml --workspace /data --set data.source=my.jsonl"""
_DEMO = """Writes a model of 1.6 M parameters and word problems to workspace/, then trains,
merges, evaluates and reports.

With `support`, a second model of that size learns the answers of a support desk instead: prose, and
calls to a tool.

examples:
  canvastune demo
  canvastune demo support"""
_PLAN = """Computed from the model's configuration: no weights, no GPU. Exit code 1 if the run
cannot fit, with the smallest changes that make it fit.

examples:
  canvastune plan pipelines/recipes/gsm8k_lora.yaml
  canvastune plan pipelines/recipes/gsm8k_sft.yaml --gpus 8 --gpu-memory 80GB
  canvastune plan pipelines/recipes/gsm8k_lora.yaml --gpus 4 --set parallel.ep=4"""
_PREPARE = """Reads, checks, splits (by content) and tokenizes every row; lists invalid rows.
card.html and card.json account for every row.

examples:
  canvastune prepare pipelines/recipes/gsm8k_lora.yaml --output prepared
  canvastune prepare pipelines/recipes/gsm8k_lora.yaml --output prepared \\
      --set data.source=my.jsonl --set data.max_bad_row_fraction=0.05"""
_REPORT = """RUN is a folder in workspace/runs, or the --output of canvastune.train. Without
--output, the new page replaces the one in RUN/report. At most five runs can be compared: their
curves are overlaid, their figures and settings become tables.

examples:
  canvastune report workspace/runs/rank16
  canvastune report workspace/runs/rank16 --compare workspace/runs/rank32 workspace/runs/rank64
  canvastune report workspace/runs/rank16 --output look     # also of an unfinished run"""
_MERGE = """Streams the base, adds the adapter's update once to each weight, and verifies the result. A run
does so itself: this is for an adapter that was copied elsewhere, or that a run of `canvastune.train`
left. PEFT's merge_and_unload() adds the update twice: encoder and decoder share their weights.

examples:
  canvastune merge workspace/runs/rank16/train/adapter --output merged
  canvastune merge adapter --output merged --base /data/diffusiongemma    # a copy of the base"""
_SERVE = """Checks that the folder has all that the server reads, and that the server computes what was trained;
prints the server's command (the only line on standard output), or becomes the server with --run. No server
loads an adapter: merge it first. What was run and what was only read: docs/serving.md.

  vllm          NVIDIA or AMD GPU; reads generation_config.json
  sglang        NVIDIA or AMD GPU; reads sglang.yaml, which is written into the folder if it lacks it
  mlx           Apple silicon, or a CPU; requests choose the sampler
  transformers  any device; for trying a model, one request at a time

examples:
  canvastune serve workspace/runs/rank16/model
  canvastune serve workspace/runs/rank16/model --backend mlx --port 8080 --run
  canvastune serve model -- --tensor-parallel-size 2    # after --: options of the server
  curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
      -d '{"model": "model", "messages": [{"role": "user", "content": "..."}], "max_tokens": 256}'"""
_EVALUATE = """RUN is a finished run in workspace/runs. If only judges change, its answers are judged again
in seconds; other settings of evaluate.* have both models answer again. Nothing is trained.

--sweep answers with a few settings of the sampler around the recipe's: a table, sweep.json, sweep.svg
and sweep.png show quality against forward passes.

examples:
  canvastune evaluate workspace/runs/rank16 --set evaluate.judge=chrf
  canvastune evaluate workspace/runs/rank16 --set evaluate.judge=python:judge.py:grade --output own
  canvastune evaluate workspace/runs/rank16 --set evaluate.repeats=4 --set evaluate.rows=256
  canvastune evaluate workspace/runs/rank16 --sweep
  canvastune report workspace/runs/rank16 --evaluation workspace/runs/rank16/evaluation-2 --output look"""
_RUNS = """Read from the runs' folders alone, in a second; a workspace on a cluster is read where it is mounted.

states:
  running      by the process named, or by a Kubeflow job
  interrupted  with Ctrl-C, or killed: the command that resumes it is below the table
  failed       in the step named; the reason and the command that resumes it are below
  finished     with its main figures, before and after training

examples:
  canvastune runs
  canvastune runs --workspace /data --json > runs.json
  canvastune runs rm rank16 rank32 --dry-run    # what would be deleted
  canvastune runs rm rank16 --checkpoints       # keep the run, and free most of its space"""
_REMOVE = """Deletes the folders of runs, and what only they use of kfp/. MLflow keeps its records and what was
uploaded to it. Refused: a run in progress; one whose model has an alias in MLflow, such as champion
(candidate does not count); one whose model or files another run was trained from.

examples:
  canvastune runs rm rank16 --dry-run
  canvastune runs rm rank16 rank32
  canvastune runs rm rank16 --checkpoints --yes"""
_SYNC = """A run continues while MLflow is unreachable, broken or refuses access. Each later step
sends MLflow what it missed, and so does this command. A run whose process was killed on this machine
no longer counts as running afterwards.

examples:
  canvastune sync workspace/runs/rank16
  MLFLOW_TRACKING_URI=http://localhost:5000 canvastune sync workspace/runs/rank16"""
_COMPILE = """examples:
  canvastune compile                 # finetune.yaml, for kfp run create or Kubeflow's upload page
  canvastune compile -o build/finetune.yaml"""
_SUBMIT = """The recipe is checked here first; data and models must be on the Hub or on the
workspace volume. The pipeline is uploaded if it differs from the server's.

examples:
  kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80 &
  canvastune submit pipelines/recipes/gsm8k_lora.yaml --host http://localhost:8080 --wait
  canvastune submit my.yaml --host https://kubeflow.example/pipeline --namespace team-a \\
      --token-file ~/.kube/kubeflow-token
  canvastune submit my.yaml --host http://localhost:8080 \\
      --set data.source=/workspace/my.jsonl --cluster-file cluster.yaml

A token is read from a file or from KF_PIPELINES_TOKEN, never from the command line, where others
could see it. A server with a certificate from a private authority: set SSL_CERT_FILE to its
bundle. With --wait, exit code 1 means that the run failed, and the last line names the step."""
_UPLOAD = """Uploads a new version only if the pipeline's content has changed. Defaults of its
parameters that are set here apply to later versions too, until they are set again.

examples:
  canvastune upload --host http://localhost:8080
  canvastune upload --host http://ml-pipeline.kubeflow:8888 --namespace team-a \\
      --token-file /var/run/secrets/kubeflow/pipelines/token \\
      --cluster-file cluster.yaml --pipeline-image registry.example/canvastune/pipeline:0.1.0

cluster.yaml holds settings of a recipe's section `cluster`:
  backend: pytorchjob
  image: registry.example/canvastune/trainer:0.1.0
  claim: canvastune-workspace"""
_FETCH = """Downloads to HF_HOME, on a cluster the workspace, so that runs need no Hub (HF_HUB_OFFLINE=1).
Room is checked before, size and SHA-256 of every file after; an interrupted download continues.

examples:
  canvastune fetch pipelines/recipes/gsm8k_lora.yaml
  HF_HOME=/data/huggingface canvastune fetch my.yaml --set model.revision=main"""
_DOCTOR = """Changes nothing and downloads no weights. The cluster is checked if there is a
kubeconfig or a pod's service account.

examples:
  canvastune doctor                                            # only this machine
  canvastune doctor pipelines/recipes/gsm8k_lora.yaml          # and the recipe's model and data set
  canvastune doctor --tracking-uri http://localhost:5000       # and MLflow
  canvastune doctor pipelines/recipes/gsm8k_lora.yaml \\
      --host http://localhost:8080 --namespace team-a          # and Kubeflow

Exit code 0: no problem (there may be warnings). 1: the last line says what to fix first."""
_TINY = """Random weights, 1.6 M parameters, the released model's module layout and a tokenizer
with its chat markers.

examples:
  canvastune make-tiny-model tiny
  canvastune plan pipelines/recipes/tiny_lora.yaml --set model.id=tiny"""
_COMPLETION = """Prints a script for the shell that completes commands, options and file names
with the Tab key.

examples:
  canvastune completion bash > ~/.local/share/bash-completion/completions/canvastune
  canvastune completion zsh > ~/.zfunc/_canvastune     # a folder of $fpath; then start a new shell"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `canvastune`; the parsed `command` is the name of the command."""
    parser = argparse.ArgumentParser(
        "canvastune",
        description=_DESCRIPTION,
        epilog=f"{_EXAMPLES}\n\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"canvastune {__version__}")
    commands = parser.add_subparsers(
        required=True, dest="command", metavar="COMMAND", title="commands"
    )

    def add(
        name: str, epilog: str, help_text: str, parents: Iterable[argparse.ArgumentParser] = ()
    ) -> argparse.ArgumentParser:
        formatter = argparse.RawDescriptionHelpFormatter
        return commands.add_parser(
            name, epilog=epilog, formatter_class=formatter, help=help_text, parents=list(parents)
        )

    recipe, logs, compare, kubeflow = (
        _recipe_options(),
        _log_options(),
        _compare_options(),
        _kubeflow_options(),
    )
    run = add(
        "run",
        _RUN,
        "run the whole pipeline on this machine",
        [recipe, _workspace_options(), compare, logs],
    )
    run.add_argument(
        "--run-name",
        metavar="NAME",
        help="a new run, or an unfinished one to resume (default: recipe and time)",
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="resume the newest unfinished run of the recipe, or that of --run-name; start none",
    )
    demo = add("demo", _DEMO, "the pipeline on a tiny model that comes with it; minutes, no GPU")
    demo.add_argument(
        "data",
        nargs="?",
        choices=("problems", "support"),
        default="problems",
        help="word problems with one right answer, or what a support desk answers, in prose; default:"
        " problems",
    )
    plan = add(
        "plan", _PLAN, "estimate a run's memory, FLOPs and time, without weights or a GPU", [recipe]
    )
    plan.add_argument(
        "--gpus",
        type=int,
        metavar="N",
        help="default: the recipe's cluster.nodes x parallel.nproc_per_node",
    )
    plan.add_argument(
        "--gpu-memory",
        type=parse_gigabytes,
        metavar="SIZE",
        help="memory of each GPU, such as 80GB (default: the recipe's hardware.gpu_memory)",
    )
    plan.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a prepared data set, whose answers decide what objective.blocks costs and gives",
    )
    prepare = add(
        "prepare", _PREPARE, "read, check, split and tokenize a recipe's data", [recipe, logs]
    )
    prepare.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    add("fetch", _FETCH, "download a recipe's model and data to the Hub's cache", [recipe, logs])
    report = add(
        "report", _REPORT, "write a run's report again, compared with other runs", [compare]
    )
    report.add_argument(
        "run", type=Path, metavar="RUN", help="its folder, such as workspace/runs/rank16"
    )
    report.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="a new folder for the page and its images (default: RUN/report)",
    )
    merge = add("merge", _MERGE, "merge an adapter into its base, and verify the result", [logs])
    merge.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="its folder, such as RUN/train/adapter"
    )
    merge.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    merge.add_argument(
        "--base",
        metavar="MODEL",
        help="id or folder of the base (default: as in the adapter's config.yaml)",
    )
    serving = add(
        "serve", _SERVE, "check a model for an inference server, and print or run its command"
    )
    serving.add_argument("model", type=Path, metavar="MODEL", help="its folder, such as RUN/model")
    serving.add_argument(
        "options", nargs="*", metavar="OPTION", help="after --: more options of the server"
    )
    serving.add_argument(
        "--backend",
        choices=("vllm", "sglang", "mlx", "transformers"),
        default="vllm",
        help="the server (default: %(default)s)",
    )
    serving.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: %(default)s)"
    )
    serving.add_argument(
        "--port", type=int, default=8000, help="port to listen on (default: %(default)s)"
    )
    serving.add_argument("--run", action="store_true", help="start the server")
    _add_evaluate_options(
        report,
        add("evaluate", _EVALUATE, "evaluate a finished run again, without training", [logs]),
    )
    _add_runs_options(add("runs", _RUNS, "list the runs of a workspace, or remove some"))
    sync = add("sync", _SYNC, "send MLflow what it missed of a run")
    sync.add_argument(
        "run", type=Path, metavar="RUN", help="its folder, such as workspace/runs/rank16"
    )
    compiling = add("compile", _COMPILE, "write the pipeline for Kubeflow")
    compiling.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("finetune.yaml"),
        metavar="FILE",
        help="(default: %(default)s)",
    )
    _add_submit_options(
        add("submit", _SUBMIT, "run the pipeline on Kubeflow", [recipe, kubeflow, logs])
    )
    upload = add(
        "upload", _UPLOAD, "upload the pipeline to Kubeflow, for others to run", [kubeflow]
    )
    upload.add_argument(
        "--pipeline-name",
        default="canvastune-finetune",
        metavar="NAME",
        help="in Kubeflow (default: %(default)s)",
    )
    upload.add_argument(
        "--steps-file",
        type=Path,
        metavar="FILE",
        help="YAML or JSON with settings of the pods of the pipeline's steps",
    )
    upload.add_argument("--pipeline-image", metavar="IMAGE", help="the default image of the steps")
    _add_doctor_options(
        add("doctor", _DOCTOR, "check what this machine lacks for a run, in the order to fix it")
    )
    completion = add("completion", _COMPLETION, "shell completion, for bash or zsh")
    completion.add_argument("shell", choices=("bash", "zsh"))
    tiny = add("make-tiny-model", _TINY, "write a small random DiffusionGemma, in the Hub's format")
    tiny.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse a command line; what follows `--` are options of the server that `serve` starts.

    argparse would take them only directly after the model.
    """
    own = arguments.index("--") if arguments[:1] == ["serve"] and "--" in arguments else None
    options = build_parser().parse_args(arguments[:own])
    if own is not None:
        options.options = arguments[own + 1 :]
    return options


def run_command(options: argparse.Namespace) -> list[str]:
    """Return the words after `canvastune` that repeat a `run` with all its options but its name."""
    words = ["run", options.recipe]
    for setting in options.set:
        words += ["--set", setting]
    if options.workspace != WORKSPACE:
        words += ["--workspace", str(options.workspace)]
    if options.compare:
        words += ["--compare", *map(str, options.compare)]
    if options.log_format != FORMATS[0]:
        words += ["--log-format", options.log_format]
    return words


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    (choices,) = [
        action.choices
        for action in parser._actions
        if isinstance(action, argparse._SubParsersAction)
    ]
    return dict(choices)


def parse_gigabytes(text: str) -> float:
    """Read `80`, `80GB` or `80GiB` as GB (1e9 bytes)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|GiB)?", text, re.IGNORECASE)
    if found is None:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected gigabytes: 80GB, or 80GiB")
    return float(found[1]) * (2**30 / 1e9 if (found[2] or "").lower() == "gib" else 1)


def _recipe_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, such as pipelines/recipes/tiny_lora.yaml"
    )
    _add_set_option(parser)
    return parser


def _log_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--log-format", choices=FORMATS, default=FORMATS[0], help=FORMAT_HELP)
    return parser


def _workspace_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    _add_workspace_option(parser)
    return parser


def _add_workspace_option(parser: argparse.ArgumentParser, default: object = WORKSPACE) -> None:
    parser.add_argument(
        "--workspace",
        type=Path,
        default=default,
        metavar="DIR",
        help=f"folder of all runs (default: {WORKSPACE})",
    )


def _compare_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        default=[],
        metavar="RUN",
        help="folders of runs to compare with in the report",
    )
    return parser


def _kubeflow_options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--host",
        required=True,
        metavar="URL",
        help="Kubeflow's address, as a browser shows it before /#/",
    )
    parser.add_argument(
        "--namespace", metavar="NS", help="yours, if Kubeflow has one for each team"
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"file with a bearer token (default: that of {TOKEN}, if set)",
    )
    parser.add_argument(
        "--cluster-file",
        type=Path,
        metavar="FILE",
        help="YAML or JSON with settings of a recipe's section `cluster`",
    )
    return parser


def _add_evaluate_options(
    report: argparse.ArgumentParser, evaluate: argparse.ArgumentParser
) -> None:
    report.add_argument(
        "--evaluation",
        type=Path,
        metavar="DIR",
        help="what `canvastune evaluate` wrote (default: RUN/evaluation)",
    )
    evaluate.add_argument(
        "run", type=Path, metavar="RUN", help="its folder, such as workspace/runs/rank16"
    )
    _add_set_option(evaluate)
    evaluate.add_argument(
        "--sweep", action="store_true", help="quality against forward passes, by sampler setting"
    )
    evaluate.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="a new folder (default: RUN/evaluation-2, or the next number; RUN/sweep)",
    )


def _add_runs_options(parser: argparse.ArgumentParser) -> None:
    _add_workspace_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    actions = parser.add_subparsers(dest="action", metavar="rm", title="actions")
    removing = actions.add_parser(
        "rm",
        epilog=_REMOVE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="remove runs to free space",
    )
    removing.add_argument("names", nargs="+", metavar="NAME", help="of a run")
    # Not set where it is not given: the option before `rm` holds as well.
    _add_workspace_option(removing, default=argparse.SUPPRESS)
    removing.add_argument(
        "--checkpoints",
        action="store_true",
        help="only the training's checkpoints, which a finished run does not need",
    )
    removing.add_argument(
        "--dry-run", action="store_true", help="say what would be deleted, and delete nothing"
    )
    removing.add_argument("--yes", action="store_true", help="do not ask")


def _add_submit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--experiment",
        metavar="NAME",
        help="in Kubeflow (default: the recipe's tracking.experiment)",
    )
    parser.add_argument(
        "--run-name",
        metavar="NAME",
        help="in Kubeflow and MLflow, and the name of the run's folder",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="RUN",
        help="names of runs to compare with in the report",
    )
    parser.add_argument("--wait", action="store_true", help="follow the run to completion")


def _add_doctor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        nargs="?",
        metavar="RECIPE",
        help="also check its model, plan, data, tracking server and backend against this machine",
    )
    _add_set_option(parser)
    _add_workspace_option(parser)
    parser.add_argument(
        "--tracking-uri",
        metavar="URI",
        help="MLflow's server (default: MLFLOW_TRACKING_URI, or the recipe's)",
    )
    parser.add_argument(
        "--namespace", metavar="NS", help="in the cluster (default: the kubeconfig's)"
    )
    parser.add_argument(
        "--host", metavar="URL", help="Kubeflow's address, to check that it responds"
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file with a bearer token for it"
    )


def _add_set_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the recipe; may be repeated",
    )
