"""Run the checks of `canvastune doctor` and print them in the order to fix them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from canvastune.errors import UserError
from pipelines.doctor.finding import DoctorOptions, Finding
from pipelines.doctor.machine import _data, _disk, _memory, _model, _packages, _python, _recipe, _torch
from pipelines.doctor.tracking import _tracking

if TYPE_CHECKING:
    from canvastune.config import RunConfig


def doctor(question: DoctorOptions) -> int:
    """Print a line per check as it is made, and last what to do next; returns 1 if there is a problem, else 0."""
    findings = []
    for finding in examine(question):
        findings.append(finding)
        print(f"{finding.state:<9}{finding.name:<13}{finding.found}", flush=True)
        if finding.cure:
            print(f"{'':<22}-> {finding.cure}", flush=True)
    problems = [finding for finding in findings if finding.state == "problem"]
    if problems:
        print(f"{len(problems)} problem{'s' * (len(problems) > 1)}. Mend {problems[0].name} first: {problems[0].cure}")
        return 1
    print(f"nothing stands in the way. Next: {_next(question)}")
    return 0


def examine(question: DoctorOptions) -> Iterator[Finding]:
    """Every check, in the order in which to mend: what stands on something else comes after it."""
    yield from _whole("python", _python)
    yield from _whole("packages", _packages)
    yield from _whole("torch", _torch)
    yield from _whole("memory", _memory)
    yield from _whole("disk", _disk)
    config: RunConfig | None = None
    if question.recipe is not None:
        config, finding = _recipe(question)
        yield finding
    if config is not None:
        yield from _whole("model", lambda: _model(config, question.host is not None))
        yield from _whole("data", lambda: _data(config, question.host is not None))
    elif question.recipe is None:
        yield Finding("model, data", "skipped", "no recipe was named", "canvastune doctor RECIPE looks for its model and data too")
    uri = question.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or (config.tracking.uri if config else None)
    yield from _whole("tracking", lambda: _tracking(uri))
    from pipelines.doctor import cluster

    backend = config.cluster.backend if config else "local"
    yield from _whole("cluster", lambda: cluster.cluster(question.namespace, backend))
    yield from _whole("kubeflow", lambda: cluster.kubeflow(question.host, question.namespace, question.token_file))


def _whole(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """A check's findings; one that breaks is itself a finding, and the others are still made."""
    try:
        yield from check()
    except UserError as error:
        yield Finding(name, "problem", str(error), "see the message")
    except ImportError as error:
        yield Finding(name, "skipped", f"needs the package {error.name}", "install the packages above first")
    except Exception as error:  # a diagnosis goes on where a program would not
        yield Finding(
            name, "problem", f"could not be examined: {type(error).__name__}: {' '.join(str(error).split())[:200]}", "report this"
        )


def _next(question: DoctorOptions) -> str:
    if question.recipe is None:
        return "canvastune demo"
    settings = "".join(f" --set {shlex.quote(one)}" for one in question.overrides)
    if question.host is not None:
        return f"canvastune submit {question.recipe} --host {question.host}{settings} --wait"
    return f"canvastune run {question.recipe}{settings}"
