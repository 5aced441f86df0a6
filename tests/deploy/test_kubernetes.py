"""The manifests against a closed form of what they may hold, KubeRay's own schemas, and what they promise."""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path
from typing import Annotated, Any

import jsonschema
import pytest
import yaml
from pydantic import Field, TypeAdapter, ValidationError

import manifests
from cranium import __version__

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kubernetes"
SCHEMA = TypeAdapter(Annotated[manifests.Manifest, Field(discriminator="kind")])
FILES = sorted(FOLDER.glob("*.yaml"))


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


EVERY = [
    pytest.param(d, id=f"{p.stem}:{d['kind']}/{d['metadata']['name']}") for p in FILES for d in documents(p)
]


def cluster() -> dict[str, Any]:
    return copy.deepcopy(documents(FOLDER / "cluster.yaml")[0]["spec"])


def job() -> dict[str, Any]:
    return copy.deepcopy(documents(FOLDER / "job.yaml")[0]["spec"])


def groups(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pod templates by name, the head's among them."""
    workers = {group["groupName"]: group["template"] for group in spec["workerGroupSpecs"]}
    return {"head": spec["headGroupSpec"]["template"], **workers}


PODS = [
    pytest.param(template, id=f"{name}-{group}")
    for name, spec in (("cluster", cluster()), ("job", job()["rayClusterSpec"]))
    for group, template in groups(spec).items()
]


@pytest.mark.parametrize("document", EVERY)
def test_only_known_fields(document: dict[str, Any]) -> None:
    SCHEMA.validate_python(document)


def test_a_misspelt_field_is_found() -> None:
    document = documents(FOLDER / "cluster.yaml")[0]
    pod = document["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    pod["terminationGracePeriodSecond"] = pod.pop("terminationGracePeriodSeconds")
    with pytest.raises(ValidationError, match="terminationGracePeriodSecond"):
        SCHEMA.validate_python(document)


def closed(schema: Any) -> Any:
    """The schema of a CRD with unknown fields refused, where Kubernetes would drop them."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: closed(value) for key, value in schema.items()}
    keeps = {"additionalProperties", "x-kubernetes-preserve-unknown-fields"} & schema.keys()
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not keeps:
        made["additionalProperties"] = False
    return made


@pytest.mark.parametrize("name", ["cluster", "job"])
def test_kuberays_own_schema_takes_it(name: str) -> None:
    """With the CRDs of KubeRay (ray-operator/config/crd/bases) in $CRANIUM_TEST_DATA/kuberay."""
    folder = Path(os.environ.get("CRANIUM_TEST_DATA", "-")) / "kuberay"
    path = folder / f"ray.io_ray{name}s.yaml"
    if not path.is_file():
        pytest.skip(f"needs {path.name} of KubeRay in $CRANIUM_TEST_DATA/kuberay")
    versions = yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]["versions"]
    schema = next(v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1")
    schema["properties"]["metadata"]["additionalProperties"] = (
        True  # any object's, which a CRD does not repeat
    )
    validator = jsonschema.Draft202012Validator(closed(schema))
    document = documents(FOLDER / f"{name}.yaml")[0]
    assert [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)] == []
    document["spec"]["authOption"] = {}
    assert not validator.is_valid(document), "or the schema is not closed"


def test_the_head_takes_no_work_and_workers_are_for_gpus_and_for_data() -> None:
    for spec in (cluster(), job()["rayClusterSpec"]):
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        gpus = {
            name: template["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
            for name, template in groups(spec).items()
        }
        assert gpus == {"head": None, "gpu": "1", "data": None}


def test_versions_are_those_of_the_lock_file_and_of_the_package() -> None:
    ray = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    for spec in (cluster(), job()["rayClusterSpec"]):
        assert ray and spec["rayVersion"] == ray[1]
        images = {template["spec"]["containers"][0]["image"] for template in groups(spec).values()}
        assert images == {f"registry.example.org/cranium:{__version__}"}


@pytest.mark.parametrize("template", PODS)
def test_a_pod_is_locked_down(template: dict[str, Any]) -> None:
    """The `restricted` level of the Pod Security Standards, and what Ray needs."""
    pod, container = template["spec"], template["spec"]["containers"][0]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] >= 10000
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert template["metadata"]["labels"]["app.kubernetes.io/part-of"] == "cranium", (
        "or no NetworkPolicy holds"
    )
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    shm = next(volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm")
    memory = int(container["resources"]["limits"]["memory"].removesuffix("Gi"))
    assert shm["medium"] == "Memory" and int(shm["sizeLimit"].removesuffix("Gi")) <= 0.35 * memory


@pytest.mark.parametrize("template", [p for p in PODS if "head" not in str(p.id)])
def test_a_worker_tells_ray_before_it_goes(template: dict[str, Any]) -> None:
    pod = template["spec"]
    script = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
    assert script.startswith("ray drain-node ") and "PREEMPTION" in script and "--node-id" in script
    left = int(re.search(r"--deadline-remaining-seconds (\d+)", script)[1])  # type: ignore[index]
    assert f"sleep {left}" in script and pod["terminationGracePeriodSeconds"] > left
    assert pod["automountServiceAccountToken"] is False


def test_a_jobs_pods_are_those_of_the_cluster() -> None:
    """The two files repeat each other; this is what keeps them alike."""
    ours, theirs = groups(job()["rayClusterSpec"]), groups(cluster())
    for name in theirs:
        for template in (ours[name], theirs[name]):
            for key in ("restartPolicy", "automountServiceAccountToken"):  # the autoscaler's needs
                template["spec"].pop(key, None)
    experiment = {"name": "experiment", "mountPath": "/etc/cranium", "readOnly": True}
    ours["head"]["spec"]["containers"][0]["volumeMounts"].remove(experiment)
    ours["head"]["spec"]["volumes"].remove(
        {"name": "experiment", "configMap": {"name": "cranium-experiment"}}
    )
    assert ours == theirs


def test_secrets_are_named_and_never_given() -> None:
    texts = "\n".join(path.read_text() for path in FILES)
    assert not re.search(r"kind: Secret\b|stringData|(PASSWORD|SECRET_ACCESS_KEY|TOKEN): \S", texts)


def test_nobody_from_outside_reaches_a_pod() -> None:
    policies = {
        d["metadata"]["name"]: d["spec"]
        for d in documents(FOLDER / "setup.yaml")
        if d["kind"] == "NetworkPolicy"
    }
    assert policies["cranium"]["policyTypes"] == ["Ingress", "Egress"], "what is not allowed is denied"
    for rule in policies["cranium"]["ingress"]:
        peers = [peer for peer in rule["from"] if "ipBlock" not in peer]
        assert peers and len(peers) == len(rule["from"])
        assert all(any(selector.get("matchLabels") for selector in peer.values()) for peer in peers), (
            "no empty selector"
        )


def test_the_environment_holds_only_names_that_somebody_reads() -> None:
    given = next(d for d in documents(FOLDER / "setup.yaml") if d["kind"] == "ConfigMap")["data"]
    from cranium import cluster as stage
    from cranium.config import Machine

    fields = {f"CRANIUM_{name.upper()}" for name in Machine.model_fields}
    known = fields | set(stage.ENVIRONMENT) | {"DO_NOT_TRACK", "MLFLOW_DISABLE_TELEMETRY"}
    assert set(given) <= known
    assert given["RAY_USAGE_STATS_ENABLED"] == "0" and given["MLFLOW_DISABLE_TELEMETRY"] == "true"
