"""Connect to a Kubeflow Pipelines server, and turn its errors into UserErrors."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from canvastune.errors import UserError, one_line
from components.versions import PIPELINES

TOKEN = "KF_PIPELINES_TOKEN"
# Kubeflow's own: where a pod's service account token is mounted
_TOKEN_PATH = "KF_PIPELINES_SA_TOKEN_PATH"
_EXAMPLE = (
    "http://localhost:8080 while `kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80` runs"
)
_GIVE_ADDRESS = f"Use the address that a browser shows before `/#/`, for example {_EXAMPLE}."
_GIVE_TOKEN_FILE = "Use a file that holds only the token."


@dataclass(frozen=True)
class KubeflowClient:
    """The address of a Kubeflow Pipelines server, and how to authenticate there.

    Attributes:
        host: http(s) address without a slash at its end, as a browser shows it before `/#/`.
        namespace: the team's, on a server with profiles; None: the server has only one.
        token_file: file with a bearer token, read for each request; None: the token or file that
            the environment names.
        retry_seconds: how long a refused connection is tried again: a port-forward needs a moment
            to start.
    """

    host: str
    namespace: str | None = None
    token_file: Path | None = None
    retry_seconds: float = 5.0

    @classmethod
    def from_address(
        cls, address: str, namespace: str | None = None, token_file: Path | None = None
    ) -> KubeflowClient:
        """Take the address as it was copied from a browser, with the page after `/#/`."""
        return cls(address.partition("/#")[0].rstrip("/"), namespace, token_file)

    def token(self) -> str | None:
        """Return the bearer token. Raises: UserError, a file without one."""
        file = self.token_file or (None if os.environ.get(TOKEN) else os.environ.get(_TOKEN_PATH))
        if file is None:
            return os.environ.get(TOKEN, "").strip() or None
        try:
            text = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not a text file"
            raise UserError(f"token file {file}: {reason}", hint=_GIVE_TOKEN_FILE) from None
        if len(text.split()) != 1:
            found = len(text.split())
            raise UserError(
                f"token file {file}: found {found} words, expected one token", hint=_GIVE_TOKEN_FILE
            )
        return text

    def create_kfp_client(self) -> Any:
        """Return a `kfp.Client` whose server has responded.

        Raises:
            UserError: no response, not Kubeflow or too old, no token or a rejected one, or a
                namespace that is missing or unknown.
        """
        health = self.health()
        profiles = health.get("multi_user") is True
        if profiles and self.namespace is None:
            message = (
                f"{self.host}: this Kubeflow has a namespace for each team, and none was given"
            )
            raise UserError(message, hint="Add --namespace NAME.")
        if self.namespace is not None and not profiles:
            found = f"found namespace {self.namespace!r}"
            message = f"{self.host}: {found}, but this Kubeflow has no namespaces for teams"
            raise UserError(message, hint="Leave out --namespace.")
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries are not worth a log line
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import kfp

            scheme = urlsplit(self.host).scheme
            proxied = not urllib.request.proxy_bypass(urlsplit(self.host).netloc)
            return kfp.Client(
                host=self.host,
                namespace=self.namespace or "kubeflow",
                credentials=_credentials(self) if self.token() else None,
                proxy=urllib.request.getproxies().get(scheme) if proxied else None,
                ssl_ca_cert=os.environ.get("SSL_CERT_FILE"),
            )

    def health(self) -> dict[str, Any]:
        """Return what the server says of itself: `multi_user` if each team has a namespace there,
        and its version as `tag_name`. It is asked once.

        Raises:
            UserError: as `create_kfp_client`.
        """
        return self._health

    @functools.cached_property
    def _health(self) -> dict[str, Any]:
        if not self.host.startswith(("http://", "https://")) or not urlsplit(self.host).hostname:
            message = f"--host {self.host}: expected an http or https address"
            raise UserError(message, hint=f"For example {_EXAMPLE}.")
        health = self._request_health()
        # The page's own server, which a port-forward reaches, has another name for it.
        version = str(health.get("tag_name") or health.get("apiServerTagName") or "")
        if PIPELINES.is_below(version):
            raise UserError(
                f"{self.host}: found Kubeflow Pipelines {version}, expected {PIPELINES.version} or "
                f"newer: older ones lack {PIPELINES.reason}",
                hint="Upgrade Kubeflow Pipelines, or use another cluster.",
            )
        return {**health, "tag_name": version}

    def _request_health(self) -> dict[str, Any]:
        """Get the server's health; kfp.Client waits half a minute, and accepts any web page."""
        headers = {"Authorization": f"Bearer {token}"} if (token := self.token()) else {}
        opener = urllib.request.build_opener(
            _NoRedirect
        )  # a login page elsewhere must not get the token
        request = urllib.request.Request(f"{self.host}/apis/v2beta1/healthz", headers=headers)
        try:
            with _open_with_retry(opener, request, self.retry_seconds) as response:
                found = json.loads(response.read())
        except urllib.error.HTTPError as error:
            if error.code in (301, 302, 303, 307, 308):
                message = f"{self.host}: redirects to a login page ({_redirect_target(error)})"
                raise UserError(message, hint=_token_hint(self)) from None
            raise _http_error(self, error.code, error.read()) from None
        except (OSError, ValueError) as error:
            if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                raise _not_kubeflow(self, "a web page or a login") from None
            reason = getattr(error, "reason", None) or error
            if "CERTIFICATE" in str(reason):
                hint = "Set SSL_CERT_FILE to the bundle of your certificate authority."
                raise UserError(f"{self.host}: certificate not trusted", hint=hint) from None
            hint = f"Use the address of Kubeflow, for example {_EXAMPLE}."
            raise UserError(f"{self.host}: no response ({reason})", hint=hint) from None
        if not isinstance(found, dict):
            raise _not_kubeflow(self, "JSON of another form")
        return found


def _open_with_retry(
    opener: urllib.request.OpenerDirector, request: urllib.request.Request, seconds: float
) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        try:
            return opener.open(request, timeout=20)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError) or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


@contextlib.contextmanager
def translate_errors(kubeflow: KubeflowClient) -> Iterator[None]:
    """Turn the errors of requests to the server into a UserError."""
    import kfp_server_api
    import urllib3

    try:
        yield
    except kfp_server_api.ApiException as error:
        raise _http_error(kubeflow, error.status or 0, error.body or str(error.reason)) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        reason = one_line(getattr(error, "reason", None) or error)
        raise UserError(
            f"{kubeflow.host}: no longer responds ({reason})", hint="Try again later."
        ) from None


def named(name: str) -> str:
    """Return the filter of a list request for what has this name."""
    predicate = {"operation": "EQUALS", "key": "display_name", "stringValue": name}
    return json.dumps({"predicates": [predicate]})


def _credentials(kubeflow: KubeflowClient) -> Any:
    from kfp.client.token_credentials_base import TokenCredentialsBase

    class Credentials(TokenCredentialsBase):
        """Read the token for each request: a cluster replaces a mounted token every hour."""

        def refresh_api_key_hook(self, config: Any) -> None:
            config.api_key["authorization"] = self.get_token()

        def get_token(self) -> str | None:
            return kubeflow.token()

    return Credentials()


def _http_error(kubeflow: KubeflowClient, status: int, body: bytes | str) -> UserError:
    reason = _server_message(body)
    where = f" in namespace {kubeflow.namespace!r}" if kubeflow.namespace else ""
    if status == 401:
        return UserError(
            f"{kubeflow.host}: authentication failed (401)", hint=_token_hint(kubeflow)
        )
    if status == 403:
        hint = f"Check that the namespace exists and is yours. {_token_hint(kubeflow)}"
        return UserError(f"{kubeflow.host}: access denied{where} (403: {reason})", hint=hint)
    if status == 404 and "{" not in str(body):
        return _not_kubeflow(kubeflow, "404, no pipelines there")
    hint = "Correct what the message names, or ask the administrator of Kubeflow."
    return UserError(f"{kubeflow.host}: request refused{where} ({status}: {reason})", hint=hint)


def _token_hint(kubeflow: KubeflowClient) -> str:
    if kubeflow.token() is None:
        return f"Pass a token with --token-file FILE or in {TOKEN}."
    environment = TOKEN if os.environ.get(TOKEN) else _TOKEN_PATH
    source = f"--token-file {kubeflow.token_file}" if kubeflow.token_file else environment
    return f"The token of {source} was rejected or has expired: get a new one."


def _not_kubeflow(kubeflow: KubeflowClient, found: str) -> UserError:
    return UserError(
        f"{kubeflow.host}: the response is not from Kubeflow Pipelines: {found}", hint=_GIVE_ADDRESS
    )


def _server_message(body: bytes | str) -> str:
    """Return the message in a response of the server, on one line."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body
    with contextlib.suppress(json.JSONDecodeError, AttributeError):
        tree = json.loads(text)
        text = tree.get("message") or tree.get("error_message") or tree.get("error") or text
    return one_line(str(text))


def _redirect_target(error: urllib.error.HTTPError) -> str:
    """Return the address that a redirection leads to, without its query, which may hold secrets."""
    to = urlsplit(error.headers.get("Location", ""))
    return f"{to.scheme}://{to.netloc}{to.path}" if to.netloc else to.path


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None
