"""A Kubeflow Pipelines server: its address, the token for it, and its refusals in words."""

from __future__ import annotations

import contextlib
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

from canvastune.errors import UserError

TOKEN = "KF_PIPELINES_TOKEN"
_PORT_FORWARD_SECONDS = 5.0
_TOKEN_PATH = "KF_PIPELINES_SA_TOKEN_PATH"  # Kubeflow's own: where a pod's token for it is mounted
_EXAMPLE = "http://localhost:8080 while `kubectl port-forward -n kubeflow svc/ml-pipeline-ui 8080:80` runs"


@dataclass(frozen=True)
class KubeflowClient:
    """Where the pipelines are.

    Attributes:
        host: http(s) address without a slash at its end, as a browser shows it before `/#/`.
        namespace: the team's, on a server that has several; None: the server's only one.
        token_file: file with a bearer token, read for each request; None: what the environment has, as a token or a file.
    """

    host: str
    namespace: str | None = None
    token_file: Path | None = None

    def token(self) -> str | None:
        """The bearer token. Raises: UserError, a file without one."""
        file = self.token_file or (None if os.environ.get(TOKEN) else os.environ.get(_TOKEN_PATH))
        if file is None:
            return os.environ.get(TOKEN, "").strip() or None
        try:
            text = Path(file).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"token file {file}: {getattr(error, 'strerror', None) or 'not a text file'}. Give a file with the token alone"
            ) from None
        if len(text.split()) != 1:
            raise UserError(f"token file {file}: expected one token, found {len(text.split())} words. Give a file with the token alone")
        return text

    def connect(self) -> Any:
        """A `kfp.Client` that has been answered.

        Raises:
            UserError: nobody answers, somebody else answers, no token or not this one, or no namespace where one is needed.
        """
        several = self.has_profiles()
        if several and self.namespace is None:
            raise UserError(f"{self.host}: this Kubeflow has a namespace for each team. Say which is yours with --namespace")
        if self.namespace is not None and not several:
            raise UserError(f"{self.host}: this Kubeflow has one namespace for all, not {self.namespace!r}. Leave --namespace out")
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # its retries are not a person's business
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

    def has_profiles(self) -> bool:
        """Whether each team has a namespace there. Raises: UserError, as `connect`."""
        if not self.host.startswith(("http://", "https://")) or not urlsplit(self.host).hostname:
            raise UserError(f"--host {self.host}: expected an http or https address, for example {_EXAMPLE}")
        return self._health().get("multi_user") is True

    def _health(self) -> dict[str, Any]:
        """What the server says of itself; Kubeflow's own client asks for half a minute, and takes a web page for an answer."""
        headers = {"Authorization": f"Bearer {token}"} if (token := self.token()) else {}
        opener = urllib.request.build_opener(_NoRedirect)  # a login page elsewhere is not to see the token
        request = urllib.request.Request(f"{self.host}/apis/v2beta1/healthz", headers=headers)
        try:
            with _answering(opener, request) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code in (301, 302, 303, 307, 308):
                raise UserError(f"{self.host}: asks for a login ({_site(error)}). {_hint(self)}") from None
            raise UserError(_refused(self, error.code, error.read())) from None
        except (OSError, ValueError) as error:
            if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
                raise UserError(f"{self.host}: {_stranger('answers with a web page or a login')}") from None
            reason = getattr(error, "reason", None) or error
            if "CERTIFICATE" in str(reason):
                raise UserError(
                    f"{self.host}: its certificate is not trusted here. Name your authority's bundle in SSL_CERT_FILE"
                ) from None
            raise UserError(f"{self.host}: nobody answers there ({reason}). Expected Kubeflow's address, for example {_EXAMPLE}") from None
        if not isinstance(found, dict):
            raise UserError(f"{self.host}: {_stranger('answers')}")
        return found


def _answering(opener: urllib.request.OpenerDirector, request: urllib.request.Request) -> Any:
    """The answer; a port-forward that was started a moment ago refuses connections for a second or two."""
    deadline = time.monotonic() + _PORT_FORWARD_SECONDS
    while True:
        try:
            return opener.open(request, timeout=20)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError) or time.monotonic() > deadline:
                raise
        time.sleep(0.2)


@contextlib.contextmanager
def answered(server: KubeflowClient) -> Iterator[None]:
    """Turns what a request to the server can fail with into a UserError of one line."""
    import kfp_server_api
    import urllib3

    try:
        yield
    except kfp_server_api.ApiException as error:
        raise UserError(_refused(server, error.status or 0, error.body or str(error.reason))) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{server.host}: does not answer any more ({' '.join(str(reason).split())[:200]}). Try again later") from None


def _credentials(server: KubeflowClient) -> Any:
    from kfp.client.token_credentials_base import TokenCredentialsBase

    class Credentials(TokenCredentialsBase):
        """Reads the token anew for each request: one that a cluster mounts is replaced every hour."""

        def refresh_api_key_hook(self, config: Any) -> None:
            config.api_key["authorization"] = self.get_token()

        def get_token(self) -> str | None:
            return server.token()

    return Credentials()


def _refused(server: KubeflowClient, status: int, body: bytes | str) -> str:
    said = _message(body)
    where = f" in namespace {server.namespace!r}" if server.namespace else ""
    if status == 401:
        return f"{server.host}: does not know who you are (401). {_hint(server)}"
    if status == 403:
        return f"{server.host}: not allowed{where} (403: {said}). Check that the namespace exists and is yours. {_hint(server)}"
    if status == 404 and "{" not in str(body):
        return f"{server.host}: {_stranger('answers, and has no pipelines (404)')}"
    return f"{server.host}: refused{where} ({status}: {said}). Correct what it names, or ask who runs it"


def _hint(server: KubeflowClient) -> str:
    if server.token() is None:
        return f"Give a token with --token-file FILE or in {TOKEN}"
    source = f"--token-file {server.token_file}" if server.token_file else TOKEN if os.environ.get(TOKEN) else _TOKEN_PATH
    return f"The token of {source} is not accepted here, or has expired: get a new one"


def _stranger(does: str) -> str:
    return f"{does}, but not as Kubeflow Pipelines. Expected the address that a browser shows before `/#/`, for example {_EXAMPLE}"


def _message(body: bytes | str) -> str:
    """The server's own words in an answer, on one line."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body
    with contextlib.suppress(json.JSONDecodeError, AttributeError):
        tree = json.loads(text)
        text = tree.get("message") or tree.get("error_message") or tree.get("error") or text
    return " ".join(str(text).split())[:300]


def _site(error: urllib.error.HTTPError) -> str:
    """Where a redirection leads, without its query, which may hold secrets."""
    to = urlsplit(error.headers.get("Location", ""))
    return f"{to.scheme}://{to.netloc}{to.path}" if to.netloc else to.path


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None
