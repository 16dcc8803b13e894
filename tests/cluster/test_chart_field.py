"""Values as teams write them: each gives what is right, or is refused with the form that is right."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePath
from typing import Any

import helm_python
import pytest
import yaml

from canvastune.config import parse_config
from canvastune.config.cluster import ClusterConfig
from components.jobs.backends import JobContext, manifest
from pipelines.submit import compile_pipeline
from tests.support.cluster_rules import pod_specs
from tests.support.every_pod import every_pod
from tests.support.rendered_chart import (
    ALL,
    FILES,
    FROM,
    PROXY,
    SIDECAR,
    ci_values,
    cluster,
    env_of,
    flag,
    named,
    of_kind,
    render,
    server,
    texts,
)
from tools.chart_table import CHART


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises((helm_python.HelmValuesError, helm_python.HelmError)) as refused:
        render(values)
    return str(refused.value)


def steps(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the settings of the steps, as the upload job gets them."""
    text = named(documents, "ConfigMap", "canvastune-training")["data"]["steps.json"]
    return dict(json.loads(text))


# --- values that are taken


def test_a_claim_takes_annotations_of_argo_cd() -> None:
    annotations = {
        "argocd.argoproj.io/sync-wave": "1",
        "argocd.argoproj.io/sync-options": "Prune=false",
    }
    documents = render({"workspace": {"annotations": annotations}})
    claim = named(documents, "PersistentVolumeClaim", "canvastune-workspace")
    assert claim["metadata"]["annotations"] == {**annotations, "helm.sh/resource-policy": "keep"}


@pytest.mark.parametrize(
    ("training", "limit"),
    [
        ({}, "32"),
        ({"cpu": "32", "resources": {"limits": {"cpu": "32", "memory": "512Gi"}}}, "32"),
        ({"cpu": "16"}, "16"),
        ({"resources": {"limits": {"cpu": "64"}}}, "64"),
        ({"cpuLimit": False}, None),
    ],
)
def test_training_pods_have_a_limit_of_cpu(training: dict[str, Any], limit: str | None) -> None:
    section = cluster(render({"training": training}))
    config = parse_config({"name": "run", "data": {"source": "x"}, "cluster": section})
    job = manifest(config, JobContext("id", PurePath("/workspace/runs/a"), ("m",)))
    (_, pod), *_ = pod_specs(job)
    assert pod["containers"][0]["resources"]["limits"].get("cpu") == limit


def test_a_company_s_authority_reaches_mlflow() -> None:
    documents = render(
        {
            "mlflow": {
                "artifacts": {
                    "destination": "s3://mlflow/artifacts",
                    "s3": {
                        "endpoint": "https://minio.storage.svc:9000",
                        "existingSecret": {"name": "mlflow-s3"},
                    },
                },
                "env": {"AWS_CA_BUNDLE": "/etc/company-ca/ca.crt"},
                "extraVolumes": [{"name": "ca", "configMap": {"name": "company-ca"}}],
                "extraVolumeMounts": [{"name": "ca", "mountPath": "/etc/company-ca"}],
            }
        }
    )
    pod = server(documents)
    for container in [*pod["initContainers"], *pod["containers"]]:
        assert env_of(container)["AWS_CA_BUNDLE"] == "/etc/company-ca/ca.crt"
        assert "/etc/company-ca" in [mount["mountPath"] for mount in container["volumeMounts"]]
    assert {"name": "ca", "configMap": {"name": "company-ca"}} in pod["volumes"]


def test_an_mlflow_that_exists_takes_the_place_of_the_charts() -> None:
    values = ci_values("external-mlflow")
    documents = render(values)
    of_mlflow = [
        each["kind"]
        for each in documents
        if each["metadata"]["name"] == "canvastune-mlflow" and each["kind"] != "ServiceAccount"
    ]
    assert of_mlflow == [], "objects of a server that nothing uses"
    uri = values["mlflow"]["existingUri"]
    assert cluster(documents)["env"]["MLFLOW_TRACKING_URI"] == uri
    tested = named(documents, "Pod", "canvastune-test-mlflow")["spec"]["containers"][0]
    assert tested["args"] == [uri]
    assert uri in texts(values)["canvastune/templates/NOTES.txt"]
    assert "existingUri" in refusal({"mlflow": {"existingUri": "https://user:word@example.com"}})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("workers", 3),
        ("autoscaling", {"maxReplicas": 3}),
        ("resources", {"limits": {"memory": "9Gi"}}),
        ("pathPrefix", "/mlflow"),
        ("env", {"A": "word"}),
        ("podLabels", {"team": "a"}),
        ("extraArgs", ["--x"]),
        ("service", {"port": 80}),
        ("database", {"existingSecret": {"name": "database"}}),
        ("artifacts", {"destination": "s3://bucket/mlflow"}),
        ("persistence", {"size": "9Gi"}),
        ("metrics", {"enabled": True}),
        ("auth", {"enabled": True, "existingSecret": {"name": "mlflow-auth"}}),
    ],
)
def test_settings_of_a_server_that_is_not_installed_are_refused(key: str, value: Any) -> None:
    told = refusal({"mlflow": {"existingUri": "https://mlflow.example.com", key: value}})
    assert f"mlflow.{key}:" in told
    assert "word" not in told, "a value may be a secret"


def test_the_defaults_of_the_servers_settings_are_those_of_the_values() -> None:
    """Templates cannot read values.yaml."""
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))["mlflow"]
    del values["existingUri"], values["serviceAccount"]
    del values["metrics"]["prometheusRule"], values["metrics"]["grafanaDashboard"]
    del values["service"]["nodePort"]  # null, which is no value to Helm
    assert json.loads((CHART / "files" / "mlflow_defaults.json").read_text()) == values


def test_a_variable_can_come_from_a_secret() -> None:
    source = {"secretKeyRef": {"name": "aws", "key": "token"}}
    values = {"mlflow": {"env": {"A": "true", "AWS_SESSION_TOKEN": {"valueFrom": source}}}}
    given = env_of(server(render(values))["containers"][0])
    assert (given["A"], given["AWS_SESSION_TOKEN"]) == ("true", source)


def test_pull_secrets_are_taken_in_both_forms_for_every_pod() -> None:
    documents = render(
        {
            "images": {
                "registry": "registry.example.com/ml",
                "pullSecrets": [{"name": "regcred"}, "other"],
            },
            "training": {"pullSecrets": ["gpu"]},
        }
    )
    names = ["regcred", "other"]
    for document in documents:
        for _, pod in pod_specs(document):
            assert pod["imagePullSecrets"] == [{"name": name} for name in names]
    assert cluster(documents)["pull_secrets"] == [*names, "gpu"]
    assert steps(documents)["pull_secrets"] == names


def test_a_proxy_for_training_does_not_replace_mlflow_s_address() -> None:
    given = cluster(render({"training": {"env": PROXY}}))["env"]
    assert PROXY.items() < given.items()
    assert given["MLFLOW_TRACKING_URI"].startswith("http://canvastune-mlflow.team-a")


def test_a_folder_of_a_shared_claim_is_mounted_everywhere(tmp_path: Path) -> None:
    values = {
        "workspace": {"existingClaim": "team-share", "subPath": "canvastune"},
        "training": {"backend": "trainjob"},
    }
    documents = render(values)
    section = cluster(documents)
    assert (section["claim"], section["sub_path"]) == ("team-share", "canvastune")
    compile_pipeline(tmp_path / "a.yaml", {"cluster": json.dumps(section)})
    assert (tmp_path / "a.yaml").read_text().count("subPath: canvastune") >= 8
    (_, pod), *_ = pod_specs(of_kind(documents, "TrainingRuntime")[0])
    assert [m.get("subPath") for m in pod["containers"][0]["volumeMounts"]] == [
        None,
        None,
        "canvastune",
    ]


def test_an_external_secret_can_be_installed_with_the_chart_and_is_referenced() -> None:
    """Of the External Secrets Operator, for a database whose password is in a vault."""
    secret = {
        "apiVersion": "external-secrets.io/v1",
        "kind": "ExternalSecret",
        "metadata": {"name": "mlflow-database"},
        "spec": {"secretStoreRef": {"name": "vault"}, "dataFrom": [{"extract": {"key": "mlflow"}}]},
    }
    documents = render(
        {
            "mlflow": {"database": {"existingSecret": {"name": "mlflow-database"}}},
            "extraObjects": [secret],
        }
    )
    (made,) = of_kind(documents, "ExternalSecret")
    assert made["spec"] == secret["spec"]
    address = env_of(server(documents)["containers"][0])["MLFLOW_BACKEND_STORE_URI"]
    assert address["secretKeyRef"] == {"name": "mlflow-database", "key": "uri"}


def test_mlflow_takes_a_priority_and_is_placed() -> None:
    mlflow = {
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "high",
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
    }
    pod = server(render({"mlflow": mlflow}))
    assert {key: pod[key] for key in mlflow} == mlflow
    assert "affinity" not in server(render({"mlflow": {"affinity": {}}}))


def test_the_steps_get_what_the_chart_is_given_and_so_do_its_own_jobs() -> None:
    documents = render(ALL)
    given = steps(documents)
    assert given["env"] == PROXY
    assert given["ca_bundle"] == {"config_map": "company-ca", "secret": None, "key": "ca.crt"}
    assert cluster(documents)["ca_bundle"]["secret"] == "company-ca"
    pod = named(documents, "Job", "canvastune-upload")["spec"]["template"]["spec"]
    bundle = ClusterConfig.model_validate({"ca_bundle": {"config_map": "company-ca"}}).ca_env()
    jobs = of_kind(documents, "Job")
    jobs.remove(named(jobs, "Job", "canvastune-mlflow-snapshot"))  # calls only the API server
    for job in jobs:
        own = env_of(job["spec"]["template"]["spec"]["containers"][0])
        assert bundle.items() <= own.items(), job["metadata"]["name"]
    assert env_of(pod["containers"][0])["HTTPS_PROXY"] == PROXY["HTTPS_PROXY"]
    assert pod["nodeSelector"] == {"pool": "cpu"}
    assert {"name": "ca-bundle", "configMap": {"name": "company-ca"}} in pod["volumes"]


def test_mlflow_takes_more_containers_and_options_and_keeps_its_own() -> None:
    pod = server(render(ALL))
    assert [one["name"] for one in pod["initContainers"]] == [
        "database-proxy",
        "migrate",
        "migrate-auth",
    ], "the proxy must run before the database is migrated"
    own, sidecar = pod["containers"]
    assert (own["name"], sidecar) == ("mlflow", SIDECAR)
    assert "--x-frame-options=NONE" in own["args"]
    for option in ("--workers=8", "-w", "--allowed-hosts=*", "--static-prefix", "--app-name=x"):
        assert "extraAllowedHosts" in refusal({"mlflow": {"extraArgs": [option]}}), option
    for option in ("--gunicorn-opts=--timeout=300", "--disable-security-middleware", "--dev"):
        assert "--uvicorn-opts" in refusal({"mlflow": {"extraArgs": [option]}}), option


# --- a path of a shared host


@pytest.mark.parametrize(
    "hosts",
    [
        ["tools.example.com"],
        [{"host": "tools.example.com", "paths": [{"path": "/mlflow", "pathType": "Prefix"}]}],
        [{"host": "tools.example.com", "paths": ["/mlflow"]}],
    ],
)
def test_one_value_moves_everything_below_a_path(hosts: list[Any]) -> None:
    values = {
        "mlflow": {"pathPrefix": "/mlflow"},
        "ingress": {"enabled": True, "className": "nginx", "hosts": hosts},
        "networkPolicy": {"from": FROM},
    }
    documents = render(values)
    container = server(documents)["containers"][0]
    assert flag(container, "static-prefix") == ["/mlflow"]
    assert "tools.example.com" in flag(container, "allowed-hosts")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] == "/mlflow/health"
    assert cluster(documents)["env"]["MLFLOW_TRACKING_URI"].endswith(":5000/mlflow")
    (rule,) = of_kind(documents, "Ingress")[0]["spec"]["rules"]
    assert (rule["host"], rule["http"]["paths"][0]["path"]) == ("tools.example.com", "/mlflow")
    test = named(documents, "Pod", "canvastune-test-mlflow")["spec"]["containers"][0]
    assert all(address.endswith(":5000/mlflow") for address in test["args"])
    notes = texts(values)["canvastune/templates/NOTES.txt"]
    assert "http://tools.example.com/mlflow" in notes


def test_a_path_of_the_ingress_that_mlflow_does_not_serve_is_refused() -> None:
    hosts = [{"host": "tools.example.com", "paths": [{"path": "/mlflow", "pathType": "Prefix"}]}]
    values: dict[str, Any] = {"ingress": {"enabled": True, "hosts": hosts}}
    assert "networkPolicy.enabled" in refusal(values)
    values["networkPolicy"] = {"from": FROM}
    assert re.search(r" /mlflow, .* /(?!\w)", refusal(values))
    assert "mlflow.pathPrefix: /mlflow" in refusal(values)


def test_a_gateway_routes_to_the_same_path() -> None:
    (route,) = of_kind(render(ALL), "HTTPRoute")
    (rule,) = route["spec"]["rules"]
    assert rule["matches"][0]["path"] == {"type": "PathPrefix", "value": "/mlflow"}
    assert rule["backendRefs"] == [{"name": "canvastune-mlflow", "port": 5000}]
    hosts = flag(server(render(ALL))["containers"][0], "allowed-hosts")
    assert {"gateway.example.com", "tools.example.com"} <= set(hosts)


def test_sign_in_by_a_proxy_is_asked_by_the_ingress_and_not_by_the_service() -> None:
    documents = render(ci_values("oidc"))
    (ingress,) = of_kind(documents, "Ingress")
    annotations = ingress["metadata"]["annotations"]
    assert annotations["nginx.ingress.kubernetes.io/auth-url"].endswith("/oauth2/auth")
    assert "$escaped_request_uri" in annotations["nginx.ingress.kubernetes.io/auth-signin"]
    assert "annotations" not in of_kind(documents, "Service")[0]["metadata"]
    assert "mlflow.example.com" in flag(server(documents)["containers"][0], "allowed-hosts")


def test_a_profile_s_people_reach_mlflow_through_kubeflow_s_gateway_and_runs_by_its_service() -> (
    None
):
    documents = render(ci_values("profile"))
    (service,), (route,) = (of_kind(documents, kind) for kind in ("Service", "VirtualService"))
    (rule,) = route["spec"]["http"]
    destination = rule["route"][0]["destination"]
    assert destination["host"] == f"{service['metadata']['name']}.team-a.svc.cluster.local"
    assert destination["port"]["number"] in [port["port"] for port in service["spec"]["ports"]]
    assert rule["match"] == [{"uri": {"prefix": "/mlflow/team-a/"}}]
    assert flag(server(documents)["containers"][0], "static-prefix") == ["/mlflow/team-a"]
    assert "kubeflow.example.com" in flag(server(documents)["containers"][0], "allowed-hosts")
    (policy,) = of_kind(documents, "AuthorizationPolicy")
    (deployment,) = of_kind(documents, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert policy["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert labels["sidecar.istio.io/inject"] == "true", "without a sidecar, no policy applies"
    people, pods = policy["spec"]["rules"]
    assert "istio-ingressgateway" in people["from"][0]["source"]["principals"][0]
    assert people["when"][0]["key"] == pods["when"][0]["key"] == "request.headers[kubeflow-userid]"
    assert pods["when"][0]["notValues"] == ["*"], "pods of runs have no identity and no such header"
    peers = of_kind(documents, "NetworkPolicy")[0]["spec"]["ingress"][0]["from"]
    assert peers[0] == {"podSelector": {}}, "others would get in without that header"
    assert peers[1]["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": "istio-system"
    }


def test_a_wildcard_host_is_allowed_and_not_shown_as_an_address() -> None:
    values = {
        "ingress": {"enabled": True, "hosts": ["*.apps.example.com"]},
        "networkPolicy": {"enabled": False},
    }
    assert "*.apps.example.com" in flag(server(render(values))["containers"][0], "allowed-hosts")
    notes = texts(values)["canvastune/templates/NOTES.txt"]
    assert re.search(r"MLflow at .*\bname\b.*:\n\n +http://\*\.apps\.example\.com\n", notes)


# --- values that are refused, with the form that is right

_SEVERAL = {  # what several servers need
    "database": {"existingSecret": {"name": "database"}},
    "artifacts": {"destination": "s3://bucket/mlflow"},
}
_CLAIM = {"kind": "PersistentVolumeClaim"}
_SCALED = {"autoscaling": {"enabled": True}}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"pipeline": {"env": PROXY}, "training": {"env": PROXY}},
            " steps.env",
        ),
        ({"mlflow": {"service": {"type": "LoadBalancer", "port": 80}}}, "reached from outside"),
        ({"mlflow": {"service": {"type": "LoadBalancer", "port": 80}}}, "ipBlock: {cidr:"),
        (
            {
                "mlflow": {
                    "database": {"existingSecret": {"name": "pg-app"}},
                    "artifacts": {"destination": "mlflow-artifacts:/"},
                }
            },
            " s3://bucket/prefix",
        ),
        (
            {
                "mlflow": {
                    "persistence": {"storageClass": "nfs-client", "accessMode": "ReadWriteMany"},
                    "workers": 4,
                }
            },
            "set mlflow.database.existingSecret.name",
        ),
        (
            {
                "mlflow": {"env": {"MLFLOW_STATIC_PREFIX": "/mlflow"}},
                "ingress": {"enabled": True, "hosts": ["tools.example.com"]},
                "networkPolicy": {"from": FROM},
            },
            "mlflow.pathPrefix",
        ),
        ({"training": {"env": {"NCCL_IB_DISABLE": 1}}}, '"1"'),
        ({"training": {"env": {"NCCL_P2P_DISABLE": True}}}, '"1"'),
        ({"mlflow": {"env": {"MLFLOW_S3_IGNORE_TLS": True}}}, '"1"'),
        (
            {
                "mlflow": {
                    "database": {"existingSecret": {"name": "pg"}},
                    "backup": {"enabled": True},
                }
            },
            "SQLite",
        ),
        (
            {"mlflow": {"metrics": {"serviceMonitor": {"enabled": True}}}},
            "mlflow.metrics.enabled: ",
        ),
        (
            {"mlflow": {"metrics": {"enabled": True, "serviceMonitor": {"enabled": True}}}},
            "networkPolicy.from: ",
        ),
        (
            {
                "mlflow": {
                    "metrics": {"enabled": True, "serviceMonitor": {"enabled": True}},
                    "auth": {"enabled": True, "existingSecret": {"name": "a"}},
                },
                "networkPolicy": {"from": FROM},
            },
            "mlflow.metrics.serviceMonitor.basicAuth.existingSecret.name: ",
        ),
        (
            {"mlflow": {**_SEVERAL, "persistence": {"snapshot": {"enabled": True}}}},
            "mlflow.persistence.snapshot.enabled: found true",
        ),
        (
            {"mlflow": {**_SEVERAL, "persistence": {"dataSource": {"name": "before"}}}},
            "mlflow.persistence.dataSource.name: found before",
        ),
        (
            {"mlflow": {"persistence": {"existingClaim": "a", "dataSource": {"name": "before"}}}},
            "mlflow.persistence.existingClaim",
        ),
        (
            {"mlflow": {"persistence": {"dataSource": {**_CLAIM, "name": "canvastune-mlflow"}}}},
            "the claim itself",
        ),
        (
            {"mlflow": {**_SEVERAL, "autoscaling": {"enabled": True, "minReplicas": 5}}},
            "mlflow.autoscaling.minReplicas: ",
        ),
        (
            {
                "mlflow": {
                    **_SEVERAL,
                    **_SCALED,
                    "resources": {"requests": {"cpu": None}, "limits": {"cpu": None}},
                }
            },
            "mlflow.resources: found no CPU request",
        ),
        (
            {"mlflow": {**_SEVERAL, **_SCALED, "extraContainers": [{**SIDECAR, "resources": {}}]}},
            "resources of sidecar in mlflow.extraContainers",
        ),
        (
            {
                "serving": {
                    **{"enabled": True, "model": "runs/a/model", "kserve": True},
                    "service": {"annotations": {"team": "a"}},
                }
            },
            "KServe",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_with_the_form_that_is(
    values: dict[str, Any], words: str
) -> None:
    assert words in refusal(values)


def test_a_load_balancer_is_taken_with_what_it_needs() -> None:
    values = {
        "mlflow": {
            "service": {"type": "LoadBalancer", "port": 80},
            "extraAllowedHosts": ["mlflow.corp.example"],
        },
        "networkPolicy": {"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]},
    }
    assert of_kind(render(values), "Service")[0]["spec"]["type"] == "LoadBalancer"
    notes = texts(values)["canvastune/templates/NOTES.txt"]
    assert "   http://mlflow.corp.example\n" in notes
    assert "service/canvastune-mlflow" not in notes, "a port-forward to what has an address"


def test_the_fetch_job_has_a_recipe_and_another_name_for_another_model() -> None:
    def rendered(**fetch: Any) -> tuple[str, dict[str, Any]]:
        given = {"enabled": True, "data": {"source": "openai/gsm8k"}, **fetch}
        documents = render({"workspace": {"subPath": "a", "fetch": given}})
        (job,) = [one for one in of_kind(documents, "Job") if "fetch" in one["metadata"]["name"]]
        name = job["metadata"]["name"]
        recipe = yaml.safe_load(named(documents, "ConfigMap", name)["data"]["recipe.yaml"])
        pod = job["spec"]["template"]["spec"]
        assert pod["containers"][0]["volumeMounts"][2]["subPath"] == "a"
        assert env_of(pod["containers"][0])["HF_HOME"] == "/workspace/huggingface"
        return name, recipe

    (name, recipe), (other, _) = rendered(), rendered(model={"id": "a/b"})
    assert parse_config(recipe).data.source == "openai/gsm8k"
    assert name != other, "Kubernetes refuses to change a job"
    assert "minProperties" in refusal({"workspace": {"fetch": {"enabled": True}}})


# --- objects and annotations


def test_common_labels_and_annotations_are_on_every_object_and_own_ones_stay() -> None:
    for document in render(ALL):
        assert document["metadata"]["annotations"]["team"] == "a", document["kind"]
        assert document["metadata"]["labels"]["example.com/team"] == "a", document["kind"]
    job = named(render(ALL), "Job", "canvastune-upload")
    assert job["metadata"]["annotations"]["helm.sh/hook"] == "post-install,post-upgrade"


@pytest.mark.parametrize("backend", ["pytorchjob", "trainjob"])
def test_openshift_s_restricted_v2_chooses_every_user_and_group(backend: str) -> None:
    """That constraint refuses a pod that names its own; the rest of it is PodSecurity restricted."""
    values = {**FILES["openshift"], "training": {"backend": backend}}
    for where, pod in every_pod(render(values)):
        for context in (
            pod.get("securityContext") or {},
            *(
                one["securityContext"]
                for one in [*pod.get("initContainers", []), *pod["containers"]]
            ),
        ):
            chosen = {"runAsUser", "runAsGroup", "fsGroup", "supplementalGroups", "seLinuxOptions"}
            assert not chosen & set(context), where


def test_artifact_hub_shows_the_images_of_the_values() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    images = helm_python.values_from_yaml((CHART / "values.yaml").read_text())["images"]
    assert {
        one["name"]: one["image"]
        for one in yaml.safe_load(chart["annotations"]["artifacthub.io/images"])
    } == {
        name: f"{image['repository']}:{image['tag'] or chart['appVersion']}"
        for name, image in images.items()
        if isinstance(image, dict)
    }
    links = yaml.safe_load(chart["annotations"]["artifacthub.io/links"])
    assert all(one["url"].startswith("https://") for one in links)


@pytest.mark.parametrize("name", ["default", "all"])
def test_rendering_without_a_cluster_gives_the_same_twice(name: str) -> None:
    """As Argo CD and Flux do: `helm template`, which looks nothing up; a difference is a change."""
    first, again = texts(FILES[name]), texts(FILES[name], revision=9)
    assert first == again
    for path in (CHART / "templates").rglob("*"):
        if path.is_file():
            words = path.read_text(encoding="utf-8")
            assert not any(f in words for f in ("lookup ", "randAlpha", "now |", "genCA")), path


def test_argo_cd_uploads_without_waiting_for_a_claim_that_waits_for_its_first_pod() -> None:
    (job,) = of_kind(render({}), "Job")
    assert job["metadata"]["annotations"]["argocd.argoproj.io/hook"] == "Sync"
    other = {"argocd.argoproj.io/hook": "Skip"}
    (job,) = of_kind(render({"pipeline": {"upload": {"annotations": other}}}), "Job")
    assert job["metadata"]["annotations"]["argocd.argoproj.io/hook"] == "Skip"
