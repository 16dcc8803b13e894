"""The command line of `canvastune`: its commands and options; `help` has the notes below them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from canvastune import __version__
from canvastune.logging import FORMAT_HELP, FORMATS
from pipelines.doctor.finding import WORKSPACE
from pipelines.kfp_client import TOKEN

_DESCRIPTION = """Fine-tune DiffusionGemma: prepare data, plan, train, merge, evaluate and report,
as one pipeline."""
_HELP = Path(__file__).with_name("help")  # notes, examples and exit codes, a file per command


class _Parser(argparse.ArgumentParser):
    """Takes the questions of `ask` anywhere: argparse only takes those directly after the run."""

    def parse_known_args(  # type: ignore[override]  # argparse has overloads
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        options, rest = super().parse_known_args(args, namespace)
        if hasattr(options, "questions") and not any(word.startswith("-") for word in rest):
            options.questions, rest = [*options.questions, *rest], []
        return options, rest


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `canvastune`; the parsed `command` is the name of the command."""
    parser = _Parser(
        "canvastune",
        description=_DESCRIPTION,
        epilog=_epilog("canvastune"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"canvastune {__version__}")
    commands = parser.add_subparsers(
        required=True, dest="command", metavar="COMMAND", title="commands"
    )

    def add(
        name: str, help_text: str, *options: Callable[[argparse.ArgumentParser], None]
    ) -> argparse.ArgumentParser:
        formatter = argparse.RawDescriptionHelpFormatter
        command = commands.add_parser(
            name, epilog=_epilog(name), formatter_class=formatter, help=help_text
        )
        for add_options in options:
            add_options(command)
        return command

    recipe, logs, compare, kubeflow = _add_recipe, _add_log, _add_compare, _add_kubeflow
    run = add(
        "run",
        "run the whole pipeline on this machine",
        *(recipe, _add_workspace_option, compare, logs),
    )
    run.add_argument(
        "--run-name",
        metavar="NAME",
        help="name of a new run, or of an unfinished one to resume (default: recipe and time)",
    )
    run.add_argument(
        "--resume",
        action="store_true",
        help="resume the recipe's newest unfinished run, or that of --run-name; never start a new one",
    )
    demo = add(
        "demo", "run the pipeline on a tiny model that is included; about two minutes on two cores"
    )
    demo.add_argument(
        "data",
        nargs="?",
        choices=("problems", "support"),
        default="problems",
        help="word problems with one right answer, or a support desk's free-text answers (default:"
        " %(default)s)",
    )
    plan = add("plan", "estimate a run's memory, FLOPs and time, without weights or a GPU", recipe)
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
        help="a prepared dataset, for which to show the cost and benefit of objective.blocks",
    )
    prepare = add("prepare", "read, check, split and tokenize a recipe's data", recipe, logs)
    prepare.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    add("fetch", "download a recipe's model and data to the Hub's cache", recipe, logs)
    report = add("report", "rebuild a run's report, optionally compared with other runs", compare)
    _add_run(report)
    report.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="a new folder for the page and its images (default: RUN/report)",
    )
    merge = add("merge", "merge an adapter into its base, and verify the result", logs)
    merge.add_argument(
        "adapter", type=Path, metavar="ADAPTER", help="its folder, such as RUN/train/adapter"
    )
    merge.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    merge.add_argument(
        "--base",
        metavar="MODEL",
        help="Hub ID or folder of the base (default: the one in the adapter's config.yaml)",
    )
    serving = add(
        "serve", "check that an inference server can serve a model, and print or run its command"
    )
    serving.add_argument("model", type=Path, metavar="MODEL", help="its folder, such as RUN/model")
    serving.add_argument(
        "options", nargs="*", metavar="OPTION", help="additional options of the server, after --"
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
        add("evaluate", "evaluate a finished run again, without training", logs),
    )
    _add_ask_options(add("ask", "ask the tuned model of a run questions, on this machine"))
    _add_runs_options(add("runs", "list the runs of a workspace, or remove some"))
    _add_run(add("sync", "upload what MLflow missed of a run while MLflow was down"))
    compiling = add("compile", "write the pipeline for Kubeflow")
    compiling.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("finetune.yaml"),
        metavar="FILE",
        help="(default: %(default)s)",
    )
    _add_submit_options(add("submit", "run the pipeline on Kubeflow", recipe, kubeflow, logs))
    upload = add("upload", "upload the pipeline to Kubeflow, for others to run", kubeflow)
    upload.add_argument(
        "--pipeline-name",
        default="canvastune-finetune",
        metavar="NAME",
        help="name in Kubeflow (default: %(default)s)",
    )
    upload.add_argument(
        "--steps-file",
        type=Path,
        metavar="FILE",
        help="YAML or JSON with settings of the pods of the pipeline's steps",
    )
    upload.add_argument("--pipeline-image", metavar="IMAGE", help="default image of the steps")
    _add_doctor_options(
        add("doctor", "list what is missing for a run on this machine, in the order to fix it")
    )
    add("completion", "print a shell completion script for bash or zsh").add_argument(
        "shell", choices=("bash", "zsh")
    )
    tiny = add("make-tiny-model", "write a small random DiffusionGemma, in the Hub's format")
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


def _epilog(name: str) -> str:
    """Return what the help of a command says after its options."""
    return (_HELP / f"{name}.txt").read_text(encoding="utf-8").rstrip("\n")


def _add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, such as pipelines/recipes/tiny_lora.yaml"
    )
    _add_set_option(parser)


def _add_run(parser: argparse.ArgumentParser) -> None:
    about = "its name, or its folder, such as workspace/runs/rank16"
    parser.add_argument("run", type=Path, metavar="RUN", help=about)
    _add_workspace_option(parser)


def _add_log(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-format", choices=FORMATS, default=FORMATS[0], help=FORMAT_HELP)


def _add_workspace_option(parser: argparse.ArgumentParser, default: object = WORKSPACE) -> None:
    parser.add_argument(
        "--workspace",
        type=Path,
        default=default,
        metavar="DIR",
        help=f"folder of all runs (default: {WORKSPACE})",
    )


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--compare",
        nargs="+",
        type=Path,
        default=[],
        metavar="RUN",
        help="runs to compare with in the report: names or folders",
    )


def _add_kubeflow(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host",
        required=True,
        metavar="URL",
        help="Kubeflow's address, as shown in a browser before /#/",
    )
    parser.add_argument(
        "--namespace", metavar="NS", help="your namespace, if Kubeflow has one for each team"
    )
    parser.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help=f"file with a bearer token (default: the token in {TOKEN}, if set)",
    )
    parser.add_argument(
        "--cluster-file",
        type=Path,
        metavar="FILE",
        help="YAML or JSON with settings of a recipe's section `cluster`",
    )


def _add_evaluate_options(
    report: argparse.ArgumentParser, evaluate: argparse.ArgumentParser
) -> None:
    report.add_argument(
        "--evaluation",
        type=Path,
        metavar="DIR",
        help="a folder written by `canvastune evaluate` (default: RUN/evaluation)",
    )
    _add_run(evaluate)
    _add_set_option(evaluate)
    evaluate.add_argument(
        "--sweep",
        action="store_true",
        help="compare sampler settings by quality and number of forward passes",
    )
    evaluate.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="a new folder (default: RUN/evaluation-2, or the next number; RUN/sweep)",
    )


def _add_ask_options(parser: argparse.ArgumentParser) -> None:
    _add_run(parser)
    parser.add_argument(
        "questions", nargs="*", metavar="QUESTION", help="(default: the lines of standard input)"
    )
    parser.add_argument(
        "--base", action="store_true", help="print the base model's answers too, for comparison"
    )
    parser.add_argument(
        "--system", default="", metavar="TEXT", help="a system message before each question"
    )
    _add_set_option(parser)


def _add_runs_options(parser: argparse.ArgumentParser) -> None:
    _add_workspace_option(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    actions = parser.add_subparsers(dest="action", metavar="rm", title="actions")
    removing = actions.add_parser(
        "rm",
        epilog=_epilog("runs-rm"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        help="remove runs to free space",
    )
    removing.add_argument("names", nargs="+", metavar="NAME", help="name of a run")
    # Not set where it is not given: the option before `rm` holds as well.
    _add_workspace_option(removing, default=argparse.SUPPRESS)
    removing.add_argument(
        "--checkpoints",
        action="store_true",
        help="delete only the checkpoints of training, which a finished run does not need",
    )
    removing.add_argument(
        "--dry-run", action="store_true", help="show what would be deleted, without deleting it"
    )
    removing.add_argument("--yes", action="store_true", help="do not ask for confirmation")


def _add_submit_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--experiment",
        metavar="NAME",
        help="experiment in Kubeflow (default: the recipe's tracking.experiment)",
    )
    parser.add_argument(
        "--run-name",
        metavar="NAME",
        help="name of the run in Kubeflow and MLflow, and of its folder",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="RUN",
        help="names of runs to compare with in the report",
    )
    parser.add_argument("--wait", action="store_true", help="watch the run until it ends")


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
        help="address of MLflow (default: MLFLOW_TRACKING_URI, or the recipe's)",
    )
    parser.add_argument(
        "--namespace", metavar="NS", help="namespace in the cluster (default: the kubeconfig's)"
    )
    parser.add_argument(
        "--host", metavar="URL", help="Kubeflow's address, to check that it responds"
    )
    parser.add_argument(
        "--token-file", type=Path, metavar="FILE", help="file with a bearer token for Kubeflow"
    )


def _add_set_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key of the recipe; may be repeated",
    )
