"""The bundle of a company's certificates: every client that a step uses honors its variables."""

from __future__ import annotations

import datetime
import ipaddress
import os
import ssl
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import boto3
import huggingface_hub
import mlflow
import pytest
import requests
from botocore.config import Config
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from canvastune.config.cluster import CA_PATH, ClusterConfig

# What git says of a repository without commits.
_NO_REFS = b"0" * 40 + b" capabilities^{}\0\n"
_REFS = b"001e# service=git-upload-pack\n0000%04x%s0000" % (len(_NO_REFS) + 4, _NO_REFS)
_BUCKETS = (  # of S3
    b'<ListAllMyBucketsResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
    b"<Buckets><Bucket><Name>runs</Name></Bucket></Buckets></ListAllMyBucketsResult>"
)


class Company(NamedTuple):
    """A server with a certificate of an authority that no one else knows."""

    address: str
    bundle: Path


@pytest.fixture(scope="module")
def company(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Company]:
    folder = tmp_path_factory.mktemp("company")
    _write_certificates(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data, kind = b'{"id": "a/b", "_id": "1", "experiments": []}', "application/json"
            if "/info/refs" in self.path:
                data, kind = _REFS, "application/x-git-upload-pack-advertisement"
            elif "Credential=" in self.headers.get("Authorization", ""):
                data, kind = _BUCKETS, "application/xml"
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "server.pem")
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield Company(f"https://127.0.0.1:{server.server_port}", folder / "ca.crt")
    server.shutdown()
    thread.join()
    server.server_close()


def _write_certificates(folder: Path) -> None:
    """Write ca.crt, and server.pem with a certificate of that authority and its key."""
    now = datetime.datetime.now(datetime.UTC)
    authority, key = (
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP256R1()),
    )
    issuer = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Example company")])
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )

    def signed(name: x509.Name, of: ec.EllipticCurvePrivateKey, ca: bool) -> x509.Certificate:
        own = x509.SubjectKeyIdentifier.from_public_key(of.public_key())
        by = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
        signs = x509.KeyUsage(digital_signature=True, key_cert_sign=ca, crl_sign=ca, **usage)
        builder = x509.CertificateBuilder(issuer, name, of.public_key())
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(days=1))
        builder = builder.not_valid_after(now + datetime.timedelta(days=1))
        builder = builder.add_extension(x509.BasicConstraints(ca, None), critical=True)
        builder = builder.add_extension(own, critical=False).add_extension(by, critical=False)
        builder = builder.add_extension(signs, critical=True)
        if not ca:
            host = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([host]), critical=False)
        return builder.sign(authority, hashes.SHA256())

    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(signed(issuer, authority, ca=True).public_bytes(pem))
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "server")])
    private = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "server.pem").write_bytes(private + signed(name, key, ca=False).public_bytes(pem))


def _hub(address: str) -> None:
    huggingface_hub.close_session()  # its client of an earlier call has read the variables
    try:
        assert huggingface_hub.HfApi(endpoint=address).model_info("a/b").id == "a/b"
    finally:
        huggingface_hub.close_session()


def _mlflow(address: str) -> None:
    assert mlflow.MlflowClient(tracking_uri=address).search_experiments() == []


def _s3(address: str) -> None:
    client = boto3.session.Session().client(
        "s3",
        endpoint_url=address,
        region_name="us-east-1",
        aws_access_key_id="id",
        aws_secret_access_key="key",
        config=Config(retries={"total_max_attempts": 1}),
    )
    assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == ["runs"]


def _git(address: str) -> None:
    command = ["git", "ls-remote", f"{address}/a.git"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise OSError(done.stderr)


CLIENTS: dict[str, Callable[[str], object]] = {
    "Python": lambda address: urllib.request.urlopen(address, timeout=20).read(),
    "requests": lambda address: requests.get(address, timeout=20).raise_for_status(),
    "the Hub's client": _hub,
    "MLflow's client": _mlflow,
    "S3's client": _s3,
    "git": _git,
}


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_trusts_the_company_s_authority_by_the_bundle_and_not_without_it(
    company: Company, client: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = ClusterConfig.model_validate({"ca_bundle": {"config_map": "company-ca"}})
    variables = bundle.ca_env()
    for name in (*variables, "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(Exception, match=r"(?i)certificate|SSL"):
        CLIENTS[client](company.address)
    for name, file in variables.items():
        assert file == f"{CA_PATH}/ca.crt"
        monkeypatch.setenv(name, str(company.bundle))
    CLIENTS[client](company.address)
