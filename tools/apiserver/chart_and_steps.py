"""Claims about the objects of the chart, and about every pod that comes of it."""

from __future__ import annotations

from tests.support.api_server import ApiServer
from tests.support.every_pod import every_pod
from tests.support.rendered_chart import FILES, of_kind, render
from tools.apiserver.objects import (
    LIMIT_RANGE,
    QUOTA,
    add_limit_range,
    add_quota,
    make_namespace,
    object_of,
    refusal_of,
)
from tools.image_builds import Refused
from tools.images import Report


def check_chart(server: ApiServer, report: Report) -> None:
    """Send every object of every values file, and every pod that comes of them."""
    unknown, classes = set[str](), set[str]()
    for name, values in FILES.items():
        namespace = f"chart-{name}"
        documents = render(values, namespace=namespace)
        with report.claim(f"chart, {name}: every object is accepted, with strict validation"):
            make_namespace(server, namespace)
            for document in of_kind(documents, "ServiceAccount"):
                server.must_create(document, namespace)
            for document in documents:
                if server.path(document, namespace) is None:
                    unknown.add(f"{document['kind']} ({document['apiVersion']})")
                    continue
                status, answer = server.create(document, namespace, dry_run=True)
                known = document["kind"] == "ServiceAccount" and status == 409
                assert status == 201 or known, f"{document['kind']}: {answer['message']}"
        with report.claim(
            f"chart, {name}: every pod of the chart, the steps, training and the evaluation is "
            "admitted with a quota on all four of CPU and memory, a LimitRange"
            f"{' and PodSecurity restricted' if 'PodSecurity' in server.plugins else ''}"
        ):
            add_quota(server, namespace, QUOTA)
            add_limit_range(server, namespace, LIMIT_RANGE)
            refusals = []
            for where, pod in every_pod(documents):
                priority = pod.get("priorityClassName")
                if priority and priority not in classes:
                    server.must_create(_priority_class(priority))
                    classes.add(priority)
                if (answer := refusal_of(server, namespace, pod)) is not None:
                    refusals.append(f"{where}: {answer['message']}")
            assert not refusals, "\n".join(refusals)
    for kind in sorted(unknown):
        with report.claim(f"chart: {kind}"):
            raise Refused("this server has no such kind, and no CRD of it was given")


def _priority_class(name: str) -> dict[str, object]:
    return {**object_of("scheduling.k8s.io/v1", "PriorityClass", name), "value": 1}
