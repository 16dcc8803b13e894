"""Check a recipe's MLflow."""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipelines.doctor.finding import Finding
from pipelines.doctor.machine import _SECONDS

if TYPE_CHECKING:
    pass


def _tracking(uri: str | None) -> Iterator[Finding]:
    if uri is None:
        yield Finding("tracking", "skipped", "no server is named: a run on this machine keeps mlflow.db in its workspace")
        return
    if not uri.startswith(("http://", "https://")):
        yield Finding("tracking", "skipped", f"{uri} is not a server over HTTP")
        return
    uri = uri.rstrip("/")
    request = urllib.request.Request(f"{uri}/api/2.0/mlflow/experiments/search?max_results=1", headers=_credentials())
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        said = " ".join(error.read(2000).decode(errors="replace").split())[:120]
        yield Finding("tracking", "problem", f"{uri} answers {error.code}: {said}", _tracking_cure(uri, error.code))
    except ValueError:
        yield Finding("tracking", "problem", f"{uri} answers, but not as MLflow", "correct the address: MLflow's, without a path below it")
    except OSError as error:
        cure = "start it (mlflow server --port 5000), or correct --tracking-uri or MLFLOW_TRACKING_URI"
        yield Finding("tracking", "problem", f"{uri}: nobody answers there ({getattr(error, 'reason', None) or error})", cure)
    else:
        yield Finding("tracking", "ok", f"MLflow answers at {uri}")


def _tracking_cure(uri: str, status: int) -> str:
    host = uri.partition("://")[2].partition("/")[0]
    if status == 401:
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if status == 403:
        return (
            f"the server is not told to answer as {host}: start it with --allowed-hosts {host} (chart: mlflow.extraAllowedHosts), "
            "or, if it has users, ask for the right to read its experiments"
        )
    if status >= 500:
        return "the server runs and its store does not answer it: look at its log and at its database"
    return "correct the address: MLflow's, without a path below it"


def _credentials() -> dict[str, str]:
    """The Authorization header that MLflow's own client would send from the environment."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{what}") for what in ("USERNAME", "PASSWORD"))
    if user and password:
        return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
    return {}
