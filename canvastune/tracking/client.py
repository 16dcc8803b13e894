"""One MLflow tracking server, which may be down: calls are bounded, a failure is one warning."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote

from canvastune.config import RunConfig
from canvastune.errors import UserError, one_line
from canvastune.tracking.new_store import create_store

if TYPE_CHECKING:
    from mlflow import MlflowClient

Answer = TypeVar("Answer")
log = logging.getLogger("canvastune.tracking")

LOCK_SECONDS = 60.0  # an embedded store is opened in two to ten
# MLflow's own defaults may wait for a quarter of an hour: seven retries of two minutes each.
_BOUNDS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # which may ask for hours
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # between a step's own lines
    "MLFLOW_UV_AUTO_DETECT": "false",  # a lock file of the current folder is of another project
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a training cluster does not call third parties unasked
}
# MLflow's codes for a call that is always refused, and for a client that is. Others pass: a lost
# connection, 429, 5xx.
_REFUSALS = (
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_DOES_NOT_EXIST",
    "RESOURCE_ALREADY_EXISTS",
    "NOT_FOUND",
    "INVALID_STATE",
)
_UNAUTHORIZED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
_NOTE = "mlflow.note.content"  # the tag that MLflow's page shows as an experiment's description
_DEFAULT_EXPERIMENT = "0"  # its id: MLflow creates it in each new store
_DEFAULT_NOTE = (
    "Runs of programs that name no experiment appear here. Canvastune's are in the experiment "
    "`canvastune`, or the one that a recipe names as `tracking.experiment`."
)
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",  # MLflow's UI: not for agents
    _NOTE: "Fine-tuning with Canvastune. *Model training* (top left) has the runs, "
    "with their steps as nested runs; the tab *Traces* of `RUN: evaluate` has "
    "the tuned model's answers, that of `RUN: evaluate_base` the base's.",
}
_NOISY_LOGGERS = (
    "mlflow.store.db.utils",
    "mlflow.store.model_registry.abstract_store",
    "mlflow.system_metrics.system_metrics_monitor",
    "mlflow.pyfunc",
    "mlflow.tracking.client",
    "alembic",
    "urllib3.connectionpool",
)


class TrackingError(Exception):
    """A failed call to MLflow. The message is one line: the kind of failure and, in (), the reason.

    `final` if the same call would be refused again; otherwise the server is down or broken.
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


@dataclass(frozen=True)
class Timeouts:
    """Seconds that a client waits, or does not ask again."""

    probe: float = 5.0  # a server that does not respond /health within this is down
    trust: float = 15.0  # a server that answered this recently is not probed again
    retry: float = 10.0  # a server that was down is not asked again before this


def tracking_uri(config: RunConfig, workspace: Path) -> str:
    """Return MLFLOW_TRACKING_URI, else `tracking.uri`, else mlflow.db in the workspace.

    A relative SQLite path becomes absolute: from the environment it is relative to the current
    directory, as in MLflow; otherwise to the workspace.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    uri = given or config.tracking.uri or "sqlite:///mlflow.db"
    scheme, _, path = uri.partition(":///")
    if scheme == "sqlite" and path and not path.startswith("/"):
        folder = str(Path.cwd() if given else workspace.absolute())
        # SQLAlchemy reads % and ? of a path as those of an address.
        uri = f"sqlite:///{folder.replace('%', '%25').replace('?', '%3F')}/{path}"
    return uri


def database_file(uri: str) -> Path:
    """Return the file of an embedded store, sqlite:///PATH."""
    return Path(unquote(uri.removeprefix("sqlite:///")))


@functools.cache
def connect(uri: str) -> TrackingClient:
    """Return the process's client of a server."""
    return TrackingClient(uri)


class TrackingClient:
    """Send requests to an MLflow server. Waits are bounded; after a failure there is a pause."""

    def __init__(self, uri: str, timeouts: Timeouts = Timeouts()) -> None:
        self.uri = uri
        self.timeouts = timeouts
        self._client: MlflowClient | None = None
        self._trusted_until = 0.0
        self._retry_after = 0.0
        self._last_error = TrackingError("")
        self._warned: set[str] = set()

    def __str__(self) -> str:
        """Return the address without its password."""
        return _without_password(self.uri)

    def request(self, action: Callable[[MlflowClient], Answer]) -> Answer:
        """Return the answer to `action(client)`.

        Raises:
            TrackingError: the server is down or refuses.
        """
        if time.monotonic() < self._retry_after:
            raise self._last_error
        try:
            answer = action(self._connected())
        except Exception as error:
            # Of MLflow, the network or the artifact store: training continues.
            failure = self._classify(error)
            if not failure.final:
                self._last_error, self._trusted_until = failure, 0.0
                self._retry_after = time.monotonic() + self.timeouts.retry
            raise failure from error
        self._trusted_until = time.monotonic() + self.timeouts.trust
        return answer

    def warn(self, error: TrackingError, consequence: str, what: str = "") -> None:
        """Log what fails, why and the consequence, once per kind of failure (and per `what`)."""
        kind = what + str(error).partition(" (")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("MLflow at %s %s. %s", self, error, consequence)

    def _classify(self, error: Exception) -> TrackingError:
        """Return what an error means: server down, broken, closed to us, or a refused call."""
        reason = _short(error)
        if isinstance(error, TrackingError):
            return error
        ours = UserError | LookupError | TypeError | AttributeError | FileNotFoundError
        if isinstance(error, ours):
            return TrackingError(
                f"cannot be sent this ({type(error).__name__}: {reason})", final=True
            )
        code = getattr(error, "error_code", None)  # MLflow's; an artifact store's has a response
        status = getattr(getattr(error, "response", None), "status_code", None)
        if code in _REFUSALS or status in (400, 404, 409, 413):
            return TrackingError(f"refuses ({reason})", final=True)
        if code in _UNAUTHORIZED or status in (401, 403):
            authorized = self._is_authorized()
            kind = "does not permit this" if authorized else "does not let us in"
            return TrackingError(f"{kind} ({reason})", final=authorized)
        if re.search(r"error responses|error code 5", reason):
            return TrackingError(f"is out of order ({reason})")
        kind = "does not respond" if "timed out" in reason else "cannot be reached"
        return TrackingError(f"{kind} ({reason})")

    def _is_authorized(self) -> bool:
        try:
            return (
                self._client is not None
                and self._client.search_experiments(max_results=1) is not None
            )
        except Exception:  # the caller has an error that says more
            return False

    def experiment(self, name: str) -> str:
        """Return the id of the experiment, created if it does not exist.

        Raises:
            TrackingError: the server is down or refuses.
        """

        def find_or_create(client: MlflowClient) -> str:
            found = client.get_experiment_by_name(name)
            if found is None:
                try:
                    return client.create_experiment(
                        name, self._artifact_location(), _EXPERIMENT_TAGS
                    )
                except load_mlflow().MlflowException as error:
                    found = client.get_experiment_by_name(name)
                    if found is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
            return found.experiment_id

        return self.request(find_or_create)

    def _artifact_location(self) -> str | None:
        """Return a directory next to an embedded store's file; MLflow's default is the cwd."""
        if not self.uri.startswith("sqlite:///"):
            return None
        return (database_file(self.uri).parent / "mlartifacts").as_uri()

    def _connected(self) -> MlflowClient:
        if self._client is None:
            with _exclusive_opener(self.uri):
                mlflow, new = load_mlflow(), False
                if is_plain_file(self.uri):
                    new = not database_file(self.uri).exists()
                    create_store(database_file(self.uri), mlflow.__version__)
                self._client = mlflow.MlflowClient(self.uri, registry_uri=self.uri)
                if new:  # no one else's: nothing that a person wrote is replaced
                    self._client.set_experiment_tag(_DEFAULT_EXPERIMENT, _NOTE, _DEFAULT_NOTE)
        if time.monotonic() >= self._trusted_until:
            self._probe()
        return self._client

    def server_version(self) -> str:
        """Return the version of a server over HTTP; "" if it is down, or says none: those of others,
        such as Databricks', do not.
        """
        if not self.uri.startswith("http"):
            return ""
        try:
            response = self.request(lambda _: self._get("/version"))
        except TrackingError:
            return ""  # the calls that matter say so
        found = re.fullmatch(r"\d+\.\d+\S*", response.text.strip())
        return found[0] if found and response.status_code == 200 else ""

    def _get(self, path: str) -> Any:
        """Return the response to a GET, with MLflow's own credentials, certificates and proxies."""
        utils = load_mlflow().utils
        credentials = utils.credentials.get_default_host_creds(self.uri)
        options = {"timeout": self.timeouts.probe, "max_retries": 0, "raise_on_status": False}
        return utils.rest_utils.http_request(credentials, path, "GET", **options)

    def _probe(self) -> None:
        """Raise if /health fails."""
        if not self.uri.startswith("http"):
            return
        response = self._get("/health")
        # From 500 on, a gateway without its server; the next call explains 401 to 404.
        if response.status_code >= 500:
            raise TrackingError(f"is out of order (/health answers {response.status_code})")


def is_plain_file(uri: str) -> bool:
    """Return whether an address is that of an embedded store, without options."""
    return uri.startswith("sqlite:////") and "?" not in uri


@contextlib.contextmanager
def _exclusive_opener(uri: str) -> Iterator[None]:
    """Open an embedded store in one process at a time: concurrent migrations break its file."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = database_file(uri)
    with file_lock(database.with_name(f".{database.name}.lock")):
        yield


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock between processes. Raises: TrackingError, it was held for a minute."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    reason = f"another process has held {path} for {LOCK_SECONDS:.0f} seconds"
                    raise TrackingError(f"cannot be reached ({reason})") from None
                time.sleep(0.1)
        yield


def load_mlflow() -> Any:
    """Import MLflow (two seconds): bounded waits, no telemetry, few logs; user settings win."""
    for name, value in _BOUNDS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def _short(error: Exception) -> str:
    """Return an error's reason: for a failed connection its last cause, wrapped four times."""
    text = _without_password(one_line(error, 2000))
    text = re.split(r" \[SQL: | \(Background on this error", text)[
        0
    ]  # SQLAlchemy's, for programmers
    cause = re.search(r"\[Errno -?\d+\] ([\w ]+)", text) or re.search(r"Caused by (.*)", text)
    return one_line(cause.group(1) if cause and "Max retries exceeded" in text else text)


def _without_password(text: str) -> str:
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)
