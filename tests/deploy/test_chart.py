"""The Helm chart: what it renders fits the newest schemas of Kubernetes, and settings that would lose questions are refused.

Needs the packages helm-python-sdk (240 MB) and kubernetes-validate; the probe is tested against the real server.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from export.checkpoint.files import Checkpoint
from export.repository import repository_from_engines
from serving.contract.limits import Limits
from serving.launcher.server import TritonServer

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "fido"
PROBE = CHART / "files" / "probe.py"
CUSTOM = {"ScaledObject", "ServiceMonitor", "ServingRuntime"}  # kinds of operators, which Kubernetes' schemas do not know
ON = {"enabled": True}
BUCKET = {"source": "bucket", "bucket": {"image": "tools", "command": ["fetch", "/models"], "secretName": "keys"}}


# In a process of its own: Helm is a Go library there, which takes over the signals of its process. In pytest's a broken connection, whose
# SIGPIPE Python ignores, ended the tests that came later.
RENDER = """
import helm_python, json, sys
try:
    print(json.dumps(helm_python.Chart.load(sys.argv[1]).render(json.loads(sys.argv[2]), name="qa", namespace="readers")))
except helm_python.HelmError as error:
    sys.exit(str(error))
"""


class ChartError(RuntimeError):
    """What Helm says of values that it refuses."""


def rendered(**values: Any) -> dict[str, dict[str, Any]]:
    """The chart's objects by kind and name."""
    if importlib.util.find_spec("helm_python") is None:
        pytest.skip("needs helm-python-sdk")
    command = [sys.executable, "-c", RENDER, str(CHART), json.dumps(values)]
    helm = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if helm.returncode:
        raise ChartError(helm.stderr)
    files = json.loads(helm.stdout)
    objects = [item for name, text in files.items() if name.endswith(".yaml") for item in yaml.safe_load_all(text) if item]
    return {f"{item['kind']}/{item['metadata']['name']}": item for item in objects}


@pytest.mark.parametrize(
    ("values", "kinds"),
    [
        ({}, {"ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service"}),
        ({"gpus": 1, "autoscaling": {"kind": "hpa"}, "stream": True, "readers": ["fid", "fido"]}, {"HorizontalPodAutoscaler"}),
        ({"models": {"source": "image", "image": {"reference": "models:1"}}, "autoscaling": {"kind": "keda"}}, {"ScaledObject"}),
        (
            {"models": BUCKET, "serviceMonitor": {"enabled": True}, "servingRuntime": {"enabled": True}},
            {"ServiceMonitor", "ServingRuntime"},
        ),
    ],
)
def test_every_rendered_object_fits_the_newest_schemas(values: dict[str, Any], kinds: set[str]):
    validate = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    objects = rendered(**values)
    assert kinds <= {item["kind"] for item in objects.values()}
    for item in objects.values():
        if item["kind"] not in CUSTOM:
            validate.validate(item, validate.latest_version(), strict=True)


def test_a_pod_gets_one_gpu_memory_for_shm_and_no_rights():
    pod = rendered(gpus=1)["Deployment/qa"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1 and "nvidia.com/gpu" not in server["resources"]["requests"]
    mounted = {mount["mountPath"]: mount["name"] for mount in server["volumeMounts"]}
    shm = next(volume for volume in pod["volumes"] if volume["name"] == mounted["/dev/shm"])
    assert shm["emptyDir"]["medium"] == "Memory"
    assert pod["securityContext"]["runAsNonRoot"] and server["securityContext"]["readOnlyRootFilesystem"]
    assert server["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_an_image_of_models_is_pulled_as_the_servers_is():
    values = {"image": {"pullPolicy": "Never"}, "models": {"source": "image", "image": {"reference": "models:latest"}}}
    pod = rendered(**values)["Deployment/qa"]["spec"]["template"]["spec"]
    assert [each["imagePullPolicy"] for each in pod["initContainers"] + pod["containers"]] == ["Never", "Never"]
    # cp -a sets the times of /models, which is root's, and fails: the init container is another user
    assert pod["initContainers"][0]["command"] == ["cp", "-R", "/models/.", "/models/"]


def test_every_port_names_its_protocol():
    """Helm 4 applies on the server, where ports are told apart by number and protocol: Kubernetes 1.20 refuses a port without one."""
    objects = rendered()
    (server,) = objects["Deployment/qa"]["spec"]["template"]["spec"]["containers"]
    ports = [port for name in ("Service/qa", "Service/qa-headless") for port in objects[name]["spec"]["ports"]] + server["ports"]
    assert [port.get("protocol") for port in ports] == ["TCP"] * 9


def test_an_autoscaled_deployment_leaves_its_replicas_to_the_autoscaler():
    assert "replicas" not in rendered(autoscaling={"kind": "hpa"})["Deployment/qa"]["spec"]
    assert rendered()["Deployment/qa"]["spec"]["replicas"] == 2
    assert rendered()["Service/qa-headless"]["spec"]["clusterIP"] == "None"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preStopSeconds": 3}, "preStopSeconds: wanted more than connections.ageSeconds"),
        ({"terminationGracePeriodSeconds": 18}, "terminationGracePeriodSeconds: wanted more than"),
        ({"models": {"source": "image"}}, "models.image.reference: wanted an image"),
        ({"gpus": 2}, "gpus"),
        ({"replica": 2}, "replica"),
    ],
)
def test_values_that_cannot_work_are_refused_by_name(values: dict[str, Any], message: str):
    with pytest.raises(ChartError, match=message):
        rendered(**values)


def test_helm_leaves_the_signals_of_this_process_alone():
    rendered()
    (ignored,) = (line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("SigIgn"))
    assert int(ignored, 16) >> (signal.SIGPIPE - 1) & 1


def probed(port: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROBE), str(port)], capture_output=True, text=True, timeout=60)


@pytest.mark.server
def test_the_probe_notices_a_dead_model_that_triton_calls_ready(engines: dict[str, tuple[Checkpoint, Path]], tmp_path: Path):
    repository_from_engines(engines["fido"][1], tmp_path / "repository", "fido", Limits())
    with TritonServer(["fido_encoder", "fido"], tmp_path / "repository") as server:
        port = server.http_port
        alive = probed(port)
        assert alive.returncode == 0, alive.stderr
        os.kill(server.model_processes()["fido"], signal.SIGKILL)
        dead = probed(port)
        with urllib.request.urlopen(f"{server.http_url}/v2/health/ready", timeout=5) as ready:
            assert ready.status == 200
        assert dead.returncode == 1 and "fido" in dead.stderr
    assert probed(port).returncode == 1
