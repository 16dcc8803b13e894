"""Check with the API server that this service account may run training jobs in a namespace."""

import sys

from kubernetes import client, config

namespace, jobs = sys.argv[1:]
config.load_incluster_config()
wanted = [(verb, jobs) for verb in ("create", "get", "list", "watch", "patch", "delete")]
wanted += [
    ("list", "/pods"),
    ("get", "/pods/log"),
    ("list", "/events"),
    ("get", "argoproj.io/workflows"),
    ("list", "jobset.x-k8s.io/jobsets"),
    ("list", "batch/jobs"),
    ("list", "kueue.x-k8s.io/workloads"),
]
missing = []
for verb, name in wanted:
    group, resource, *subresource = name.split("/")
    asked = client.V1ResourceAttributes(
        namespace=namespace,
        verb=verb,
        group=group,
        resource=resource,
        subresource=subresource[0] if subresource else None,
    )
    review = client.V1SelfSubjectAccessReview(
        spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=asked)
    )
    allowed = client.AuthorizationV1Api().create_self_subject_access_review(review).status.allowed
    print("yes" if allowed else "no", verb, name.lstrip("/"))
    missing += [] if allowed else [f"{verb} {name.lstrip('/')}"]
sys.exit(f"this account may not {', '.join(missing)} in namespace {namespace}" if missing else 0)
