"""Make a VolumeSnapshot of a claim, wait until its data is cut off, and delete the oldest ones.

Arguments: the claim, the VolumeSnapshotClass or "", how many snapshots to keep, the seconds to wait,
and the snapshot's labels as JSON.
"""

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"
claim, of_class, keep, seconds, labels = sys.argv[1:]
host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
with open(f"{ACCOUNT}/namespace") as file:
    namespace = file.read()
with open(f"{ACCOUNT}/token") as file:
    headers = {"Authorization": f"Bearer {file.read().strip()}", "Content-Type": "application/json"}
context = ssl.create_default_context(cafile=f"{ACCOUNT}/ca.crt")
CLAIMS = f"/api/v1/namespaces/{namespace}/persistentvolumeclaims"
SNAPSHOTS = f"/apis/snapshot.storage.k8s.io/v1/namespaces/{namespace}/volumesnapshots"


def call(method, path, body=None):
    """Return the response, or None if there is no such object or kind."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20, context=context) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        sys.exit(f"{method} {path}: found {error.code}: {error.read().decode()[:500]}")


if call("GET", f"{CLAIMS}/{claim}") is None:
    print(f"{claim}: there is no such claim yet, so there is nothing to snapshot")
    sys.exit()
spec = {"source": {"persistentVolumeClaimName": claim}}
if of_class:
    spec["volumeSnapshotClassName"] = of_class
name = f"{claim}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
snapshot = {
    "apiVersion": "snapshot.storage.k8s.io/v1",
    "kind": "VolumeSnapshot",
    "metadata": {"name": name, "labels": json.loads(labels)},
    "spec": spec,
}
if call("POST", SNAPSHOTS, snapshot) is None:
    sys.exit(
        "snapshot.storage.k8s.io/v1: the cluster has no VolumeSnapshots. Install the snapshot controller and its CRDs "
        "for a CSI driver that supports them, or set mlflow.persistence.snapshot.enabled to false"
    )
until = time.monotonic() + int(seconds)
while True:
    status = (call("GET", f"{SNAPSHOTS}/{name}") or {}).get("status") or {}
    if status.get("creationTime"):
        break
    if time.monotonic() > until:
        reason = (status.get("error") or {}).get("message", "its controller has not answered")
        sys.exit(f"VolumeSnapshot {name}: not made after {seconds} s: {reason}")
    time.sleep(1)
print(f"VolumeSnapshot {name}: has the data of {status['creationTime']}")

selector = urllib.parse.quote(
    ",".join(f"{key}={value}" for key, value in json.loads(labels).items())
)
made = call("GET", f"{SNAPSHOTS}?labelSelector={selector}")["items"]
own = sorted(
    one["metadata"]["name"] for one in made if one["metadata"]["name"].startswith(f"{claim}-")
)
for old in own[: -int(keep)]:
    call("DELETE", f"{SNAPSHOTS}/{old}")
    print(f"VolumeSnapshot {old}: removed")
