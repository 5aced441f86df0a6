"""What may stand in a Kubernetes manifest of ours: closed, because a cluster drops a misspelt field without a word.

Written after `ray.io/v1` of KubeRay 1.7.0 and the API of Kubernetes 1.30, for the fields that are used and no others.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict


class Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _quantity(text: str) -> str:
    assert re.fullmatch(r"\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?", text), f"{text} is no quantity"
    return text


Quantity = Annotated[str, AfterValidator(_quantity)]
Text = dict[str, str]


class Named(Closed):
    name: str


class Metadata(Closed):
    name: str
    labels: Text = {}


# ---- pods -----------------------------------------------------------------------------------------------------------


class Reference(Closed):
    name: str
    optional: bool = False


class EnvironmentFrom(Closed):
    configMapRef: Reference | None = None
    secretRef: Reference | None = None


class Resources(Closed):
    requests: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]
    limits: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity]


class Capabilities(Closed):
    drop: list[str]


class Seccomp(Closed):
    type: Literal["RuntimeDefault"]


class ContainerSecurity(Closed):
    allowPrivilegeEscalation: bool
    capabilities: Capabilities
    runAsNonRoot: bool
    seccompProfile: Seccomp


class PodSecurity(Closed):
    runAsNonRoot: bool
    runAsUser: int
    runAsGroup: int
    fsGroup: int
    fsGroupChangePolicy: Literal["OnRootMismatch", "Always"]
    seccompProfile: Seccomp


class Get(Closed):
    path: str
    port: int


class Probe(Closed):
    httpGet: Get
    initialDelaySeconds: int = 0
    periodSeconds: int
    timeoutSeconds: int
    failureThreshold: int


class Exec(Closed):
    command: list[str]


class Hook(Closed):
    exec: Exec


class Lifecycle(Closed):
    preStop: Hook


class Port(Closed):
    name: str
    containerPort: int


class Mount(Closed):
    name: str
    mountPath: str
    readOnly: bool = False


class Container(Closed):
    name: str
    image: str
    ports: list[Port] = []
    envFrom: list[EnvironmentFrom]
    resources: Resources
    securityContext: ContainerSecurity
    readinessProbe: Probe
    livenessProbe: Probe
    lifecycle: Lifecycle | None = None
    volumeMounts: list[Mount]


class EmptyDir(Closed):
    medium: Literal["Memory"] | None = None
    sizeLimit: Quantity


class Claim(Closed):
    claimName: str


class Volume(Closed):
    name: str
    emptyDir: EmptyDir | None = None
    persistentVolumeClaim: Claim | None = None
    configMap: Named | None = None


class Toleration(Closed):
    key: str
    operator: Literal["Exists"]
    effect: Literal["NoSchedule"]


class Pod(Closed):
    restartPolicy: Literal["Never"] | None = None
    automountServiceAccountToken: bool = True
    terminationGracePeriodSeconds: int
    securityContext: PodSecurity
    tolerations: list[Toleration] = []
    containers: list[Container]
    volumes: list[Volume]


class Labels(Closed):
    labels: Text


class Template(Closed):
    metadata: Labels
    spec: Pod


# ---- Ray ------------------------------------------------------------------------------------------------------------


class Auth(Closed):
    mode: Literal["token"]


class Autoscaler(Closed):
    version: Literal["v2"]
    idleTimeoutSeconds: int
    resources: Resources
    securityContext: ContainerSecurity


class Head(Closed):
    rayStartParams: Text
    template: Template


class Group(Closed):
    groupName: str
    replicas: int
    minReplicas: int
    maxReplicas: int
    rayStartParams: Text
    template: Template


class ClusterSpec(Closed):
    rayVersion: str
    authOptions: Auth
    enableInTreeAutoscaling: bool = False
    autoscalerOptions: Autoscaler | None = None
    headGroupSpec: Head
    workerGroupSpecs: list[Group]


class RayCluster(Closed):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class JobSpec(Closed):
    entrypoint: str
    submissionMode: Literal["HTTPMode"]
    backoffLimit: int
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    rayClusterSpec: ClusterSpec


class RayJob(Closed):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


# ---- around it ------------------------------------------------------------------------------------------------------


class ConfigMap(Closed):
    apiVersion: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: Metadata
    data: Text


class Storage(Closed):
    requests: dict[Literal["storage"], Quantity]


class ClaimSpec(Closed):
    accessModes: list[Literal["ReadWriteMany"]]
    resources: Storage


class PersistentVolumeClaim(Closed):
    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


class Selector(Closed):
    matchLabels: Text = {}


class Block(Closed):
    cidr: str


class Peer(Closed):
    podSelector: Selector | None = None
    namespaceSelector: Selector | None = None
    ipBlock: Block | None = None


class PeerPort(Closed):
    port: int
    protocol: Literal["TCP", "UDP"] = "TCP"


Rule = dict[Literal["from", "to", "ports"], list[Peer] | list[PeerPort]]


class PolicySpec(Closed):
    podSelector: Selector
    policyTypes: list[Literal["Ingress", "Egress"]]
    ingress: list[Rule] = []
    egress: list[Rule] = []


class NetworkPolicy(Closed):
    apiVersion: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: PolicySpec


Manifest = RayCluster | RayJob | ConfigMap | PersistentVolumeClaim | NetworkPolicy
