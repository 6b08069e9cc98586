"""The manifests: valid by Kubernetes's and the operators' published schemas, and at one with each other and us."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor
from text_generation_launcher.cli import all_flags
from text_generation_router.app import ROUTES

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
MANIFESTS = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}
CUSTOM = {"autoscaler-keda": ScaledObject, "service-monitor": ServiceMonitor}
# Beside the drain: the router's and the shards' ends, which the launcher waits for.
CHILDREN_GRACE_S = 10


def container() -> dict[str, Any]:
    (only,) = MANIFESTS["deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def variables() -> dict[str, str]:
    return {variable["name"]: variable.get("value", "") for variable in container()["env"]}


@pytest.mark.parametrize("name", sorted(MANIFESTS.keys() - CUSTOM.keys() - {"kustomization"}))
def test_manifests_follow_kubernetes_schemas(name):
    kubernetes_validate.validate(MANIFESTS[name], "1.31", strict=True)


def test_the_schema_check_finds_mistakes():
    wrong = {**MANIFESTS["service"], "spec": {"ports": [{"prot": 80}]}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.31", strict=True)


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_resources_follow_the_operators_schemas(name):
    resource = CUSTOM[name].model_validate(MANIFESTS[name])
    # What a schema does not know is missing in what it gives back.
    assert resource.model_dump(by_alias=True, exclude_unset=True, mode="json") == MANIFESTS[name]


def test_every_object_is_for_the_same_pods():
    labels = {"app.kubernetes.io/name": "text-generation"}
    deployment = MANIFESTS["deployment"]
    assert deployment["spec"]["template"]["metadata"]["labels"] == labels
    selectors = [MANIFESTS[name]["spec"]["selector"] for name in ("deployment", "disruption-budget", "service-monitor")]
    assert all(selector["matchLabels"] == labels for selector in selectors)
    assert MANIFESTS["service"]["spec"]["selector"] == labels
    assert MANIFESTS["service"]["metadata"]["labels"] == labels, "the monitor looks for the service"
    name = deployment["metadata"]["name"]
    assert MANIFESTS["autoscaler-hpa"]["spec"]["scaleTargetRef"]["name"] == name
    assert MANIFESTS["autoscaler-keda"]["spec"]["scaleTargetRef"]["name"] == name
    claims = [
        v["persistentVolumeClaim"] for v in deployment["spec"]["template"]["spec"]["volumes"] if "persistent" in str(v)
    ]
    assert claims == [{"claimName": MANIFESTS["volume"]["metadata"]["name"]}]


def test_variables_ports_and_paths_are_the_servers():
    known = {flag.variable for flag in all_flags()} | {"HF_TOKEN"}
    assert not variables().keys() - known
    ports = {port["name"]: port["containerPort"] for port in container()["ports"]}
    assert ports == {"http": int(variables()["PORT"]), "metrics": int(variables()["PROMETHEUS_PORT"])}
    assert {port["targetPort"] for port in MANIFESTS["service"]["spec"]["ports"]} == ports.keys()
    service_ports = {port["name"] for port in MANIFESTS["service"]["spec"]["ports"]}
    assert {endpoint["port"] for endpoint in MANIFESTS["service-monitor"]["spec"]["endpoints"]} <= service_ports
    routes = {route.path for route in ROUTES if route.method == "GET" and route.is_open}
    probes = [container()[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    assert all(probe["port"] == "http" for probe in probes)
    assert {probe["path"] for probe in probes} <= routes


def test_a_pod_has_time_for_its_drain():
    grace_s = MANIFESTS["deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    _, pause_s = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert grace_s >= int(pause_s) + int(variables()["GRACEFUL_TERMINATION_TIMEOUT"]) + CHILDREN_GRACE_S


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl")
def test_the_kustomization_holds_what_needs_no_operator():
    built = subprocess.run(["kubectl", "kustomize", str(FOLDER)], check=True, capture_output=True, text=True).stdout
    kinds = sorted(manifest["kind"] for manifest in yaml.safe_load_all(built))
    assert kinds == ["Deployment", "PersistentVolumeClaim", "PodDisruptionBudget", "Service"]
