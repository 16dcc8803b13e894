"""A real Kubernetes API server with its etcd, from the folder in KUBEBUILDER_ASSETS.

Nothing else of a cluster runs: no controller, scheduler or node. So objects stay as they are sent,
and what controllers would set (a quota's status, service accounts, pods) is set by the caller.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from kubernetes import client as kubernetes

from tools.image_builds import Refused

ASSETS = "KUBEBUILDER_ASSETS"  # envtest's variable
PROGRAMS = ("etcd", "kube-apiserver")
# OpenShift has it enabled: without the permission, it refuses references that block an owner.
_MORE_PLUGINS = ("OwnerReferencesPermissionEnforcement",)
_START_SECONDS = 120.0
_SERVER_TLS = {"key": "apiserver.key", "certificate": "apiserver.crt"}


def find_assets() -> Path:
    """Return the folder with the programs. Raises: Refused, it says what is needed."""
    how = (
        "Get one with controller-runtime's setup-envtest (setup-envtest use -p path 1.36.x) and "
        f"export {ASSETS}=FOLDER"
    )
    given = os.environ.get(ASSETS)
    if not given:
        raise Refused(
            f"{ASSETS} is not set: it names the folder with the programs {' and '.join(PROGRAMS)}. "
            f"{how}"
        )
    folder = Path(given).expanduser()
    missing = [name for name in PROGRAMS if not os.access(folder / name, os.X_OK)]
    if missing:
        raise Refused(f"{ASSETS}={given}: found no program {' and no '.join(missing)} there. {how}")
    return folder


def default_plugins(text: str) -> frozenset[str]:
    """Return the admission plug-ins that are enabled by default, from the server's --help."""
    words = " ".join(text.split())
    found = re.search(r"in addition to default enabled ones \(([^)]*)\)", words)
    if found is None:
        raise Refused("kube-apiserver --help does not list its admission plug-ins")
    return frozenset(name.strip() for name in found[1].split(","))


class ApiServer:
    """The two processes; a context manager.

    Attributes:
        version: such as v1.36.2.
        plugins: names of the admission plug-ins that are enabled.
    """

    def __init__(self, assets: Path, folder: Path) -> None:
        self._assets, self._folder = assets, folder
        self._token, self._processes = secrets.token_hex(16), list[subprocess.Popen[bytes]]()
        self.version, self.plugins, self.url = "", frozenset[str](), ""
        self._certificates = folder / "certificates"
        self._tls: ssl.SSLContext | None = None
        self._resources: dict[tuple[str, str], tuple[str, bool]] = {}

    def __enter__(self) -> ApiServer:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # --- requests

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        content_type: str = "application/json",
    ) -> tuple[int, Any]:
        """Return status and content of a response; the caller is an administrator by default."""
        request = urllib.request.Request(
            self.url + path,
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {token or self._token}", "Content-Type": content_type},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=60, context=self._tls) as response:
                status, text = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text.decode(errors="replace")

    def api_client(self, token: str) -> kubernetes.ApiClient:
        """Return the client that the launcher uses, for the account of a token."""
        settings = kubernetes.Configuration(host=self.url)
        settings.ssl_ca_cert = str(self._certificates / _SERVER_TLS["certificate"])
        settings.api_key = {"authorization": f"Bearer {token}"}
        settings.retries = False
        return kubernetes.ApiClient(settings)

    def path(self, document: Mapping[str, Any], namespace: str) -> str | None:
        """Return the path of a document's collection; None if this server has no such kind."""
        version, kind = document["apiVersion"], document["kind"]
        if (version, kind) not in self._resources:
            status, found = self.call("GET", _group_path(version))
            for one in found["resources"] if status == 200 else ():
                if "/" not in one["name"]:
                    self._resources[version, one["kind"]] = one["name"], one["namespaced"]
        if (version, kind) not in self._resources:
            return None
        plural, namespaced = self._resources[version, kind]
        where = f"/namespaces/{namespace}" if namespaced else ""
        return f"{_group_path(version)}{where}/{plural}"

    def create(
        self, document: Mapping[str, Any], namespace: str = "", *, dry_run: bool = False
    ) -> tuple[int, Any]:
        """Create an object; the server refuses fields that its schema lacks."""
        path = self.path(document, namespace)
        if path is None:
            return 404, {"message": f"this server has no {document['kind']}"}
        query = "?fieldValidation=Strict" + ("&dryRun=All" if dry_run else "")
        return self.call("POST", path + query, document)

    def must_create(self, document: Mapping[str, Any], namespace: str = "") -> Any:
        """Create an object. Raises: AssertionError, the server refuses it."""
        status, made = self.create(document, namespace)
        assert status in (200, 201), f"{document['kind']}: {status} {_message(made)}"
        return made

    def set_status(self, document: Mapping[str, Any], namespace: str, **status: Any) -> None:
        """Set an object's status, as its controller would."""
        path = f"{self.path(document, namespace)}/{document['metadata']['name']}/status"
        code, made = self.call(
            "PATCH", path, {"status": status}, content_type="application/merge-patch+json"
        )
        assert code == 200, f"{path}: {code} {_message(made)}"

    def token_of(self, account: str, namespace: str) -> str:
        """Return a service account's token."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
        code, made = self.call(
            "POST", path, {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest"}
        )
        assert code == 201, f"{path}: {code} {_message(made)}"
        return str(made["status"]["token"])

    def install_crd(self, crd: Mapping[str, Any]) -> None:
        """Install a CRD or replace it, and wait until its fields are in effect."""
        path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        name = crd["metadata"]["name"]
        status, found = self.call("GET", f"{path}/{name}")
        if status == 200:
            version = found["metadata"]["resourceVersion"]
            body = {**crd, "metadata": {**crd["metadata"], "resourceVersion": version}}
            status, made = self.call("PUT", f"{path}/{name}", body)
        else:
            status, made = self.call("POST", path, crd)
        assert status in (200, 201), f"{name}: {status} {_message(made)}"
        for _ in range(300):
            _, found = self.call("GET", f"{path}/{name}")
            conditions = (found.get("status") or {}).get("conditions") or ()
            if any(c["type"] == "Established" and c["status"] == "True" for c in conditions):
                return
            time.sleep(0.1)
        raise AssertionError(f"{name}: not established within 30 seconds")

    # --- the processes

    def _start(self) -> None:
        etcd, peers, secure = _free_port(), _free_port(), _free_port()
        self._certificates.mkdir(parents=True)
        key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        (self._folder / "accounts.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.TraditionalOpenSSL,
                serialization.NoEncryption(),
            )
        )
        tokens = self._folder / "tokens.csv"
        tokens.write_text(f'{self._token},admin,admin,"system:masters"\n')
        tokens.chmod(0o600)
        help_text = subprocess.run(
            [self._assets / "kube-apiserver", "--help"], capture_output=True, text=True, check=True
        ).stdout
        self.plugins = default_plugins(help_text) | set(_MORE_PLUGINS)
        self._run(
            "etcd",
            f"--data-dir={self._folder / 'etcd'}",
            f"--listen-client-urls=http://127.0.0.1:{etcd}",
            f"--advertise-client-urls=http://127.0.0.1:{etcd}",
            f"--listen-peer-urls=http://127.0.0.1:{peers}",
        )
        self._run(
            "kube-apiserver",
            f"--etcd-servers=http://127.0.0.1:{etcd}",
            "--bind-address=127.0.0.1",
            "--advertise-address=127.0.0.1",
            "--endpoint-reconciler-type=none",
            f"--secure-port={secure}",
            f"--cert-dir={self._certificates}",
            "--service-cluster-ip-range=10.0.0.0/24",
            f"--token-auth-file={tokens}",
            "--authorization-mode=RBAC",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={self._folder / 'accounts.key'}",
            f"--service-account-signing-key-file={self._folder / 'accounts.key'}",
            f"--enable-admission-plugins={','.join(_MORE_PLUGINS)}",
        )
        self.url = f"https://127.0.0.1:{secure}"
        self._wait()

    def _run(self, program: str, *arguments: str) -> None:
        with (self._folder / f"{program}.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(
                    [self._assets / program, *arguments],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                )
            )

    def _wait(self) -> None:
        certificate = self._certificates / _SERVER_TLS["certificate"]
        deadline = time.monotonic() + _START_SECONDS
        while True:
            for program, process in zip(PROGRAMS, self._processes, strict=True):
                if process.poll() is not None:
                    raise AssertionError(
                        f"{program} has exited with {process.returncode}; the end of its log:\n"
                        f"{self._log(program)}"
                    )
            if certificate.exists():
                self._tls = ssl.create_default_context(cafile=certificate)
                try:
                    if self.call("GET", "/readyz")[0] == 200:
                        break
                except OSError:
                    pass  # not listening yet
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"kube-apiserver was not ready within {_START_SECONDS:.0f} seconds; the end of "
                    f"its log:\n{self._log('kube-apiserver')}"
                )
            time.sleep(0.2)
        self.version = str(self.call("GET", "/version")[1]["gitVersion"])

    def _log(self, program: str) -> str:
        text = (self._folder / f"{program}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-20:])


def _group_path(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


def _message(response: Any) -> str:
    return str(response.get("message") if isinstance(response, dict) else response)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
