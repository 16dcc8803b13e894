"""`canvastune`: run one command. Each one imports the rooms that it needs and calls one of them."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from canvastune.errors import UserError
from canvastune.logging import configure_logging, event, log_error
from pipelines.kfp_client import KubeflowClient
from pipelines.parser import build_parser, parse, run_command, subcommands

if TYPE_CHECKING:  # `canvastune doctor` runs before anything is installed
    from canvastune.config import RunConfig

logger = logging.getLogger("canvastune")  # not __name__, which may be __main__


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit code.

    0: done; 1: refused or failed, with the reason on standard error; 130: interrupted."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    configure_logging(getattr(options, "log_format", "text"))
    before = signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # SIGTERM ends the run's processes too
    try:
        code = COMMANDS[options.command](options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # What reads the output has ended, as `head` does. Python flushes once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        log_error(error)
        return 1
    except KeyboardInterrupt as error:
        resume = f". To resume the run:\n  {error}" if str(error) else ""
        logger.info(f"canvastune: interrupted{resume}", extra=event("interrupted"))
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace) -> None:
    from pipelines.warm_start import warm_processes

    with warm_processes():  # imports what the steps need while this process imports its own
        config = _load_config(options)
        from components.run_artifacts import find_run_folder
        from pipelines.local_runner import run_recipe

        run_recipe(
            config,
            options.workspace,
            options.run_name,
            [find_run_folder(run, options.workspace) for run in options.compare],
            command=run_command(options),
            resume=options.resume,
        )


def _demo(options: argparse.Namespace) -> None:
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when transformers is imported
    from pipelines.warm_start import warm_processes

    with warm_processes():
        from pipelines.demo import demo, demo_support

        {"problems": demo, "support": demo_support}[options.data]()


def _plan(options: argparse.Namespace) -> None:
    from canvastune.planner.plan import refuse_if_too_big
    from canvastune.planner.planner import find_architecture, make_plan
    from canvastune.planner.render import render

    if options.gpu_memory is not None:
        options.set.append(f"hardware.gpu_memory={options.gpu_memory}")
    config = _load_config(options)
    ranks = config.world_size if options.gpus is None else options.gpus
    plan = make_plan(config, find_architecture(config.model), ranks, options.data)
    print(render(plan))
    refuse_if_too_big(plan)


def _prepare(options: argparse.Namespace) -> None:
    from canvastune.checkpoint.hub import resolve_model
    from canvastune.evaluation import preflight
    from canvastune.preparation.prepare import prepare_data

    config = _load_config(options)
    model = resolve_model(config.model, weights=False)
    preflight.log_remarks(preflight.check_generation_config(model))
    card = prepare_data(config, model, options.output)
    preflight.log_remarks(preflight.describe_scoring(config, options.output))
    preflight.log_remarks(preflight.describe_answers(config, options.output))
    counts = {key: card[key] for key in ("rows_read", "kept", "train", "validation", "seconds")}
    logger.info("", extra=event("prepared", folder=str(options.output), **counts))


def _fetch(options: argparse.Namespace) -> None:
    from canvastune.checkpoint.fetch import fetch_model
    from canvastune.preparation.sources import open_sources

    config = _load_config(options)
    fetch_model(config.model)
    for source in open_sources(config.data):  # downloads what is on the Hub
        logger.info(
            f"data: {source.source.label}", extra=event("fetched", data=source.source.label)
        )


def _report(options: argparse.Namespace) -> None:
    from canvastune.report.build import build_report
    from components.earlier_runs import find_compared
    from components.run_artifacts import find_pages, find_run, find_run_folder
    from components.run_directory import read_record

    folder = find_run_folder(options.run, options.workspace)
    compared = [find_run_folder(run, options.workspace) for run in options.compare]
    others = find_compared(compared, folder)
    run = find_run(folder)
    if options.evaluation is not None:
        run = replace(run, evaluation=options.evaluation)
    if run.folder is not None:
        run = replace(run, pages=find_pages(run.config, run.folder))
    if options.output is not None:
        print(build_report(run, options.output, others))
        return
    record = read_record(folder)
    if record is not None and not record.finished:
        message = f"{folder}: this run is not finished, and writes its report at its end"
        raise UserError(message, hint="Add --output DIR to see it now.")
    report = folder / "report"
    new, old = (folder / f".report.{state}-{os.getpid()}" for state in ("new", "old"))
    build_report(run, new, others)
    if report.exists():
        report.rename(old)
    new.rename(report)
    shutil.rmtree(old, ignore_errors=True)
    print(report / "report.html")


def _merge(options: argparse.Namespace) -> None:
    from canvastune.merge import merge_folder

    merge_folder(options.adapter, options.output, options.base)
    print(options.output)


def _serve(options: argparse.Namespace) -> None:
    from canvastune.serving import find_server

    server = find_server(
        options.model, options.backend, options.host, options.port, options.options
    )
    for remark in server.remarks:
        logger.info(f"serve: {remark}")
    print(server, flush=True)
    if options.run:
        server.run()


def _evaluate(options: argparse.Namespace) -> None:
    from components.evaluate.again import evaluate_again, sweep_again
    from components.run_artifacts import find_run_folder

    again = sweep_again if options.sweep else evaluate_again
    folder = find_run_folder(options.run, options.workspace)
    print(again(folder, options.set, options.output))


def _ask(options: argparse.Namespace) -> None:
    from pipelines.ask import ask

    ask(
        options.run,
        options.questions,
        options.workspace,
        settings=options.set,
        system=options.system,
        base=options.base,
    )


def _runs(options: argparse.Namespace) -> None:
    from pipelines.runs import remove_runs, show_runs

    if options.action != "rm":
        print(show_runs(options.workspace, as_json=options.json))
        return
    if options.json:
        raise UserError("--json: not available for rm", hint="Leave it out.")
    print(
        remove_runs(
            options.workspace,
            options.names,
            checkpoints=options.checkpoints,
            dry_run=options.dry_run,
            yes=options.yes,
        )
    )


def _sync(options: argparse.Namespace) -> None:
    from components.finish.step import sync
    from components.run_artifacts import find_run_folder

    print(sync(find_run_folder(options.run, options.workspace)))


def _compile(options: argparse.Namespace) -> None:
    out: Path = options.output
    if out.suffix not in (".yaml", ".yml"):
        message = f"-o {out}: expected a name that ends with .yaml, as Kubeflow requires"
        raise UserError(message, hint="For example finetune.yaml.")
    from pipelines.submit import compile_pipeline

    partial = out.with_name(f".{out.stem}-{os.getpid()}{out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        compile_pipeline(partial)
        partial.replace(out)
    except OSError as error:
        raise UserError(
            f"-o {out}: cannot write ({error.strerror})", hint="Choose a file that you can write."
        ) from None
    finally:
        if partial.is_file():
            partial.unlink()
    print(out)


def _submit(options: argparse.Namespace) -> None:
    from pipelines.submit import read_cluster_file, submit

    submit(
        _load_config(options),
        _kubeflow(options),
        experiment=options.experiment,
        run_name=options.run_name,
        cluster=read_cluster_file(options.cluster_file) if options.cluster_file else None,
        compare=options.compare,
        wait=options.wait,
    )


def _upload(options: argparse.Namespace) -> None:
    from pipelines.steps import read_steps_file
    from pipelines.submit import read_cluster_file, upload

    cluster = read_cluster_file(options.cluster_file) if options.cluster_file else None
    upload(
        _kubeflow(options),
        name=options.pipeline_name,
        cluster=cluster,
        image=options.pipeline_image,
        steps=read_steps_file(options.steps_file) if options.steps_file else None,
    )


def _doctor(options: argparse.Namespace) -> int:
    from pipelines.doctor.doctor import doctor
    from pipelines.doctor.finding import DoctorOptions

    return doctor(
        DoctorOptions(
            options.recipe,
            tuple(options.set),
            options.tracking_uri,
            options.namespace,
            options.host,
            options.token_file,
            options.workspace,
        )
    )


def _completion(options: argparse.Namespace) -> None:
    try:
        import shtab
    except ImportError:
        hint = "Install it: pip install 'canvastune[pipeline]'."
        raise UserError(
            "completion needs the package shtab, which is not installed", hint=hint
        ) from None
    parser = build_parser()
    for action in (
        action for command in subcommands(parser).values() for action in command._actions
    ):
        if action.type is Path or action.dest == "recipe":
            setattr(action, "complete", shtab.FILE)  # noqa: B010
    print(shtab.complete(parser, shell=options.shell))


def _make_tiny_model(options: argparse.Namespace) -> None:
    from canvastune.tiny_model import make_tiny_model

    make_tiny_model(options.folder)
    print(options.folder)


def _load_config(options: argparse.Namespace) -> RunConfig:
    from canvastune.config import load_config

    return load_config(options.recipe, options.set)


def _kubeflow(options: argparse.Namespace) -> KubeflowClient:
    return KubeflowClient.from_address(options.host, options.namespace, options.token_file)


COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {
    "run": _run,
    "demo": _demo,
    "plan": _plan,
    "prepare": _prepare,
    "fetch": _fetch,
    "report": _report,
    "merge": _merge,
    "serve": _serve,
    "evaluate": _evaluate,
    "ask": _ask,
    "runs": _runs,
    "sync": _sync,
    "compile": _compile,
    "submit": _submit,
    "upload": _upload,
    "doctor": _doctor,
    "completion": _completion,
    "make-tiny-model": _make_tiny_model,
}


if __name__ == "__main__":
    sys.exit(main())
