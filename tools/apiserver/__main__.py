"""The command `python -m tools.apiserver`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.support.api_server import ApiServer, find_assets
from tests.support.cluster_rules import CRDS
from tools import apiserver
from tools.apiserver.chart_and_steps import check_chart
from tools.apiserver.crds import Crd, read_crds
from tools.apiserver.launcher import check_launcher, check_pruning, check_queue
from tools.image_builds import Refused
from tools.images import Report

PLUGINS = ("LimitRanger", "PodSecurity", "Priority", "ResourceQuota", "ServiceAccount")
WANTED = {  # the name of a CRD, and what is checked with it
    "pytorchjobs.kubeflow.org": "PyTorchJobs",
    "trainjobs.trainer.kubeflow.org": "TrainJobs",
    "trainingruntimes.trainer.kubeflow.org": "the chart's TrainingRuntime",
    "jobsets.jobset.x-k8s.io": "events on what lies between a TrainJob and its pods",
    "workloads.kueue.x-k8s.io": "places in Kueue's queue",
    "httproutes.gateway.networking.k8s.io": "the chart's HTTPRoute",
    "servicemonitors.monitoring.coreos.com": "the chart's ServiceMonitor",
    "prometheusrules.monitoring.coreos.com": "the chart's PrometheusRule",
    "inferenceservices.serving.kserve.io": "the chart's InferenceService",
    "virtualservices.networking.istio.io": "a profile's VirtualService",
    "authorizationpolicies.security.istio.io": "a profile's AuthorizationPolicy",
}


def check(server: ApiServer, report: Report, crds: Mapping[str, list[Crd]]) -> None:
    """Check every claim for which the server has what it needs."""
    for plugin in PLUGINS:
        if plugin not in server.plugins:
            with report.claim(f"admission by {plugin}"):
                raise Refused(f"Kubernetes {server.version} does not have it")
    for name, what in WANTED.items():
        if name in crds:
            server.install_crd(crds[name][-1].document)
        else:
            with report.claim(what):
                raise Refused(f"no CRD {name} was given; --crds FOLDER")
    for name in sorted(set(crds) - set(WANTED)):
        server.install_crd(crds[name][-1].document)
    check_chart(server, report)
    check_launcher(server, report, crds)
    if "trainjobs.trainer.kubeflow.org" in crds:
        check_pruning(server, report, crds["trainjobs.trainer.kubeflow.org"])
    if "workloads.kueue.x-k8s.io" in crds and "pytorchjobs.kubeflow.org" in crds:
        check_queue(server, report)


def main() -> int:
    """Check every claim; return 1 if one failed or the programs are not there."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.apiserver", description=apiserver.__doc__
    )
    parser.add_argument(
        "--crds",
        type=Path,
        default=CRDS,
        metavar="FOLDER",
        help="CRDs as GROUP_PLURAL.vVERSION.yaml, of one version or several (default: %(default)s)",
    )
    options, report = parser.parse_args(), Report()
    try:
        assets = find_assets()
        crds = read_crds(options.crds)
        with (
            tempfile.TemporaryDirectory(prefix="canvastune-apiserver-") as folder,
            ApiServer(assets, Path(folder) / "server") as server,
        ):
            print(f"Kubernetes {server.version}; admission: {', '.join(sorted(server.plugins))}")
            versions = [
                f"{name} {', '.join(c.text for c in found)}" for name, found in crds.items()
            ]
            print(f"CRDs: {'; '.join(versions) or 'none'}", flush=True)
            check(server, report, crds)
    except Refused as error:
        print(f"REFUSED  {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
