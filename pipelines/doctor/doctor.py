"""Run the checks of `canvastune doctor` and print them in the order to fix them.

Nothing may be installed yet: the checks import everything but the standard library where they need
it.
"""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from canvastune.errors import UserError, one_line
from pipelines.doctor.cluster import check_cluster, check_kubeflow
from pipelines.doctor.finding import WORKSPACE, DoctorOptions, Finding
from pipelines.doctor.machine import (
    check_disk,
    check_memory,
    check_packages,
    check_python,
    check_torch,
)
from pipelines.doctor.tracking import check_tracking
from pipelines.kfp_client import KubeflowClient

if TYPE_CHECKING:
    from canvastune.config import RunConfig

Check = Callable[[], Iterator[Finding]]


def doctor(options: DoctorOptions) -> int:
    """Run every check and print its findings; return 1 if there is a problem, else 0."""
    return print_findings(run_checks(options), options)


def print_findings(findings: Iterable[Finding], options: DoctorOptions) -> int:
    """Print each finding, and last what to do next; return 1 if there is a problem, else 0."""
    problems = []
    for finding in findings:
        print(f"{finding.state:<9}{finding.name:<13}{finding.found}", flush=True)
        if finding.fix:
            print(f"{'':<22}-> {finding.fix}", flush=True)
        if finding.state == "problem":
            problems.append(finding)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        print(f"{count} found. Fix {problems[0].name} first: {problems[0].fix}")
        return 1
    print(f"No problems found. Next: {_next_command(options)}")
    return 0


def run_checks(options: DoctorOptions) -> Iterator[Finding]:
    """Yield the findings of every check; a check comes after those that it depends on."""
    yield from run_check("python", check_python)
    yield from run_check("packages", check_packages)
    yield from run_check("torch", check_torch)
    yield from run_check("memory", check_memory)
    yield from run_check("disk", lambda: check_disk(options.workspace))
    config: RunConfig | None = None
    if options.recipe is not None:
        config, finding = _check_recipe(options.recipe, options.overrides)
        yield finding
    if config is not None:
        submitted = options.host is not None
        yield from _check_unread(config)
        for name, check in (
            ("model", _later("sources", "check_model", config, submitted)),
            (
                "plan",
                _later(
                    "hardware", "check_hardware", config, options.workspace, submitted=submitted
                ),
            ),
            ("data", _later("sources", "check_data", config, submitted)),
            ("evaluation", _later("later_steps", "check_evaluation", config)),
            ("judge", _later("later_steps", "check_judge", config, submitted)),
            ("hub", _later("later_steps", "check_push", config, submitted)),
        ):
            yield from run_check(name, check)
    elif options.recipe is None:
        fix = "canvastune doctor RECIPE also checks its model and data"
        yield Finding("model, data", "skipped", "no recipe was given", fix)
    uri = (
        options.tracking_uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or (config.tracking.uri if config else None)
    )
    yield from run_check("tracking", lambda: check_tracking(uri, options.workspace))
    backend = config.cluster.backend if config else "local"
    kubeflow = None
    if options.host is not None:
        kubeflow = KubeflowClient.from_address(options.host, options.namespace, options.token_file)
    yield from run_check("cluster", lambda: check_cluster(options.namespace, backend))
    yield from run_check("kubeflow", lambda: check_kubeflow(kubeflow))


def run_check(name: str, check: Check) -> Iterator[Finding]:
    """Yield a check's findings; an exception is a finding too, so that the others still run."""
    try:
        yield from check()
    except UserError as error:
        yield Finding(name, "problem", str(error), error.hint or "see the message")
    except ImportError as error:
        yield Finding(
            name, "skipped", f"needs the package {error.name}", "install the packages above first"
        )
    except Exception as error:
        found = f"the check failed: {type(error).__name__}: {one_line(error)}"
        yield Finding(name, "problem", found, "report this as a bug")


def _check_recipe(recipe: str, overrides: tuple[str, ...]) -> tuple[RunConfig | None, Finding]:
    try:
        from canvastune.config import load_config

        config = load_config(recipe, list(overrides))
    except ImportError as error:
        found = f"needs the package {error.name}"
        return None, Finding("recipe", "skipped", found, "install the packages above first")
    except UserError as error:
        return None, Finding(
            "recipe", "problem", str(error), f"correct {recipe}. {error.hint}".strip()
        )
    train, backend = config.train, config.cluster.backend
    found = f"{config.name}: {train.method}, {train.steps} steps, cluster.backend={backend}"
    return config, Finding("recipe", "ok", found)


def _check_unread(config: RunConfig) -> Iterator[Finding]:
    from canvastune.config.unread import unread_settings

    for line in unread_settings(config):
        yield Finding("recipe", "warning", line, "remove it, or set what would read it")


def _later(module: str, check: str, *arguments: Any, **options: Any) -> Check:
    """Return a check of another module of the doctor, which is imported when the check runs."""
    path = f"pipelines.doctor.{module}"
    return lambda: getattr(importlib.import_module(path), check)(*arguments, **options)


def _next_command(options: DoctorOptions) -> str:
    if options.recipe is None:
        return "canvastune demo"
    settings = "".join(f" --set {shlex.quote(override)}" for override in options.overrides)
    if options.host is None and options.workspace != WORKSPACE:
        settings += f" --workspace {shlex.quote(str(options.workspace))}"
    if options.host is not None:
        return f"canvastune submit {options.recipe} --host {options.host}{settings} --wait"
    return f"canvastune run {options.recipe}{settings}"
