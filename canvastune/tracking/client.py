"""One MLflow tracking server, which may be away: calls are bounded, and a failure is one line of warning."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from canvastune.config import RunConfig
from canvastune.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

Answer = TypeVar("Answer")
log = logging.getLogger("canvastune.tracking")

_PROBE_SECONDS = 5.0  # a server that does not say it is healthy within this is away
_TRUST_SECONDS = 15.0  # a server that answered this recently is not probed again
_LOCK_SECONDS = 60.0  # an embedded store is opened in two to ten
_AWAY_SECONDS = 10.0  # a server found away is not asked again before this
# MLflow's own defaults may wait for a quarter of an hour: seven retries of two minutes, each with growing pauses.
_BOUNDS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # which may ask for hours
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a training cluster does not call third parties unasked
}
# MLflow's words for a call that is refused whenever it comes, and for a client that is. All else passes: a lost connection, 429, 5xx.
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "NOT_FOUND", "INVALID_STATE")
_CLOSED = ("PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED")
_MODEL_TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # which of its pages MLflow shows: not those for agents
_TALKATIVE = (
    "mlflow.store.db.utils",
    "mlflow.store.model_registry.abstract_store",
    "mlflow.system_metrics.system_metrics_monitor",
    "mlflow.tracking.client",
    "alembic",
    "urllib3.connectionpool",
)


class TrackingError(Exception):
    """A call to MLflow that came to nothing. The message is one line: what kind of failure, and the reason in parentheses.

    `final` where the same call would be refused again; otherwise the server is away, or in no state to answer anybody.
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


def tracking_uri(config: RunConfig, workspace: Path) -> str:
    """MLFLOW_TRACKING_URI, else `tracking.uri`, else mlflow.db in the workspace. A relative SQLite path becomes absolute.

    What stands in the environment is relative to the current folder, as MLflow has it; all else to the workspace.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    uri = given or config.tracking.uri or "sqlite:///mlflow.db"
    scheme, _, path = uri.partition(":///")
    if scheme == "sqlite" and path and not path.startswith("/"):
        uri = f"sqlite:///{(Path.cwd() if given else workspace.absolute()) / path}"
    return uri


@functools.cache
def connect(uri: str) -> TrackingClient:
    """The process's one connection to a server."""
    return TrackingClient(uri)


class TrackingClient:
    """Asks an MLflow server things. Every wait is bounded; after a failure it is left alone for some seconds."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client: MlflowClient | None = None
        self._trusted_until = 0.0
        self._away_until = 0.0
        self._away = TrackingError("")
        self._warned: set[str] = set()

    def __str__(self) -> str:
        """The address as it may be shown: without a password."""
        return _without_password(self.uri)

    def request(self, action: Callable[[MlflowClient], Answer]) -> Answer:
        """The answer to `action(client)`.

        Raises:
            TrackingError: the server is away or refuses.
        """
        if time.monotonic() < self._away_until:
            raise self._away
        try:
            answer = action(self._connected())
        except Exception as error:  # whatever MLflow, the network or the artifact store came up with: training goes on
            found = self._explained(error)
            if not found.final:
                self._away, self._away_until, self._trusted_until = found, time.monotonic() + _AWAY_SECONDS, 0.0
            raise found from error
        self._trusted_until = time.monotonic() + _TRUST_SECONDS
        return answer

    def warn(self, error: TrackingError, so: str, what: str = "") -> None:
        """Say in one line what does not work, why, and what becomes of it, once per kind of failure (and per `what`)."""
        kind = what + str(error).partition(" (")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("MLflow at %s %s. %s", self, error, so)

    def _explained(self, error: Exception) -> TrackingError:
        """What an error says of the server: away, out of order, closed to us, or sound and refusing this one call."""
        reason = _short(error)
        if isinstance(error, TrackingError):
            return error
        if isinstance(error, UserError | LookupError | TypeError | AttributeError | FileNotFoundError):  # not the server's
            return TrackingError(f"cannot be told ({type(error).__name__}: {reason})", final=True)
        code = getattr(error, "error_code", None)  # MLflow's own; an artifact store's errors have a response
        status = getattr(getattr(error, "response", None), "status_code", None)
        if code in _REFUSALS or status in (400, 404, 409, 413):
            return TrackingError(f"refuses ({reason})", final=True)
        if code in _CLOSED or status in (401, 403):
            admitted = self._admits_us()
            return TrackingError(f"does not {'permit this' if admitted else 'let us in'} ({reason})", final=admitted)
        broken = re.search(r"error responses|error code 5", reason)
        return TrackingError(
            f"{'is out of order' if broken else 'does not answer' if 'timed out' in reason else 'cannot be reached'} ({reason})"
        )

    def _admits_us(self) -> bool:
        try:
            return self._client is not None and self._client.search_experiments(max_results=1) is not None
        except Exception:  # the caller has an error that says more
            return False

    def experiment(self, name: str) -> str:
        """Id of the experiment, made if there is none.

        Raises:
            TrackingError: the server is away or refuses.
        """

        def find_or_make(client: MlflowClient) -> str:
            found = client.get_experiment_by_name(name)
            if found is None:
                try:
                    return client.create_experiment(name, self._artifact_location(), _MODEL_TRAINING)
                except load_mlflow().MlflowException as error:
                    found = client.get_experiment_by_name(name)
                    if found is None or error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
            return found.experiment_id

        return self.request(find_or_make)

    def _artifact_location(self) -> str | None:
        """Beside the database file of an embedded store (its own default is the current folder); a server knows for itself."""
        scheme, _, path = self.uri.partition(":///")
        return (Path(path).parent / "mlartifacts").as_uri() if scheme == "sqlite" else None

    def _connected(self) -> MlflowClient:
        if self._client is None:
            with _sole_opener(self.uri):
                self._client = load_mlflow().MlflowClient(self.uri, registry_uri=self.uri)
        if time.monotonic() >= self._trusted_until:
            self._probe()
        return self._client

    def _probe(self) -> None:
        """Raise if no server answers within seconds. Uses MLflow's own credentials, certificates and proxies."""
        if not self.uri.startswith("http"):
            return
        utils = load_mlflow().utils
        credentials = utils.credentials.get_default_host_creds(self.uri)
        response = utils.rest_utils.http_request(
            credentials, "/health", "GET", timeout=_PROBE_SECONDS, max_retries=0, raise_on_status=False
        )
        if response.status_code >= 500:  # a gateway that has lost its server; 401 to 404 come from something that will say more
            raise TrackingError(f"is out of order (/health answers {response.status_code})")


@contextlib.contextmanager
def _sole_opener(uri: str) -> Iterator[None]:
    """Open an embedded store one process at a time: two that make its tables at once leave a broken file."""
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(f".{database.name}.lock").open("w") as lock:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    reason = f"another process has been opening it for {_LOCK_SECONDS:.0f} seconds"
                    raise TrackingError(f"cannot be reached ({reason})") from None
                time.sleep(0.1)
        yield


def load_mlflow() -> Any:
    """Import MLflow (two seconds) with bounded waits, without telemetry and without its chatter. The user's settings win."""
    for name, value in _BOUNDS.items():
        os.environ.setdefault(name, value)
    import mlflow

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


def _short(error: Exception) -> str:
    """The reason in an error: of a failed connection its last cause, which the client wraps four times."""
    text = _without_password(" ".join(str(error).split())) or type(error).__name__
    cause = re.search(r"\[Errno -?\d+\] ([\w ]+)", text) or re.search(r"Caused by (.*)", text)
    return (cause.group(1) if cause and "Max retries exceeded" in text else text)[:300]


def _without_password(text: str) -> str:
    return re.sub(r"(?<=://)[^/@\s]*@", "", text)
