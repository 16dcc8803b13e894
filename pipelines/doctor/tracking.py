"""Check the MLflow server of a recipe."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from canvastune.errors import one_line
from components.versions import MLFLOW
from pipelines.doctor.finding import Finding

_TIMEOUT = 10.0  # seconds
_CORRECT_ADDRESS = "correct the address: use MLflow's, without a path below it"


def check_tracking(uri: str | None, workspace: Path) -> Iterator[Finding]:
    """Send MLflow one request.

    Args:
        uri: None: no server was given, and runs on this machine keep mlflow.db in the workspace.
    """
    if uri is None:
        yield check_database(workspace / "mlflow.db")
        return
    if not uri.startswith(("http://", "https://")):
        yield Finding("tracking", "skipped", f"{uri} is not a server over HTTP")
        return
    uri = uri.rstrip("/")
    request = urllib.request.Request(
        f"{uri}/api/2.0/mlflow/experiments/search?max_results=1", headers=_credentials()
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            json.loads(answer.read() or b"{}")
    except urllib.error.HTTPError as error:
        said = one_line(error.read(2000).decode(errors="replace"), 120)
        yield Finding(
            "tracking", "problem", f"{uri}: HTTP {error.code}: {said}", _fix(uri, error.code)
        )
    except ValueError:
        yield Finding(
            "tracking", "problem", f"{uri}: the response is not from MLflow", _CORRECT_ADDRESS
        )
    except OSError as error:
        fix = (
            "start it (mlflow server --port 5000), or correct --tracking-uri or MLFLOW_TRACKING_URI"
        )
        reason = getattr(error, "reason", None) or error
        yield Finding("tracking", "problem", f"{uri}: no response ({reason})", fix)
    else:
        yield _check_version(uri)


def check_database(path: Path) -> Finding:
    """Check that the workspace's database, if there is one, is one of MLflow that can be read."""
    if not path.exists():
        found = f"no server was set: a run on this machine uses {path}"
        return Finding("tracking", "skipped", found)
    move = shlex.join(["mv", str(path), f"{path}.old"])
    fix = f"move it away; canvastune sync RUN sends each run's record to a new one: {move}"
    try:
        uri = f"{path.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as database:
            database.execute("SELECT version_num FROM alembic_version").fetchone()
            # MLflow makes Default itself, with a place below the folder of that moment.
            query = "SELECT artifact_location FROM experiments WHERE name != 'Default'"
            places = database.execute(query).fetchall()
    except sqlite3.Error as error:
        return Finding("tracking", "problem", f"{path}: not a database of MLflow ({error})", fix)
    if not os.access(path, os.W_OK):
        return Finding(
            "tracking",
            "problem",
            f"{path}: cannot be written",
            "chmod u+w, or use another --workspace",
        )
    folders = [Path(unquote(str(uri).removeprefix("file://"))) for (uri,) in places]
    elsewhere = [
        folder
        for folder in folders
        if folder.is_absolute() and not folder.is_relative_to(path.absolute().parent)
    ]
    if elsewhere:
        found = f"{path}: MLflow's files are in {elsewhere[0]}: this workspace was moved or copied"
        return Finding("tracking", "warning", found, fix)
    return Finding("tracking", "ok", f"no server was set: runs are recorded in {path}")


def _check_version(uri: str) -> Finding:
    """Compare the server's version; servers of others, such as Databricks', do not say it."""
    request = urllib.request.Request(f"{uri}/version", headers=_credentials())
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as answer:
            text = answer.read(200).decode(errors="replace").strip()
    except OSError:
        text = ""
    version = text if re.fullmatch(r"\d+\.\d+\S*", text) else ""
    if MLFLOW.is_below(version):
        found = f"{uri}: MLflow {version}, expected {MLFLOW.version} or newer for {MLFLOW.reason}"
        return Finding("tracking", "problem", found, "upgrade the server, or use the chart's")
    return Finding("tracking", "ok", f"MLflow {version} responds at {uri}".replace("  ", " "))


def _fix(uri: str, status: int) -> str:
    host = uri.partition("://")[2].partition("/")[0]
    if status == 401:
        return "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if status == 403:
        return (
            f"the server rejects the host name {host}: start it with --allowed-hosts {host} "
            "(chart: mlflow.extraAllowedHosts); if it has users, ask for permission to read"
        )
    if status >= 500:
        return "the server runs but cannot use its store: look at its log and its database"
    return _CORRECT_ADDRESS


def _credentials() -> dict[str, str]:
    """Return the Authorization header that MLflow's client would send from the environment."""
    if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {token}"}
    user, password = (
        os.environ.get(f"MLFLOW_TRACKING_{what}") for what in ("USERNAME", "PASSWORD")
    )
    if user and password:
        return {
            "Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        }
    return {}
