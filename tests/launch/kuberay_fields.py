"""Which fields KubeRay 1.5 (ray.io/v1) and Kubernetes (v1, networking.k8s.io/v1) know where configs/cluster/kuberay.yaml writes: a JSON
schema without fields that are none of theirs. An API server refuses or drops what is misspelt; this finds it here.

Names and types are those of ray-operator/apis/ray/v1/rayjob_types.go and raycluster_types.go, and of Kubernetes' API reference.
"""

from __future__ import annotations

from typing import Any

TEXT, WHOLE, YES_OR_NO = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
TEXTS: dict[str, Any] = {"type": "object", "additionalProperties": TEXT}
ANY: dict[str, Any] = {}


def some(needed: str = "", **known: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "properties": known, "required": needed.split(), "additionalProperties": False}


def many(one: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": one, "minItems": 1}


METADATA = some(name=TEXT, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
QUANTITIES = {"type": "object", "additionalProperties": {"type": ["string", "integer"], "pattern": r"^\d+(m|[KMGT]i?)?$"}}
CONTAINER = some(
    "name image", name=TEXT, image=TEXT, imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]}, command=many(TEXT), args=many(TEXT),
    workingDir=TEXT, env=many(some("name", name=TEXT, value=TEXT, valueFrom=ANY)), envFrom=many(ANY), ports=many(ANY),
    resources=some(limits=QUANTITIES, requests=QUANTITIES, claims=many(ANY)), securityContext=ANY, lifecycle=ANY, livenessProbe=ANY,
    readinessProbe=ANY, startupProbe=ANY,
    volumeMounts=many(some("name mountPath", name=TEXT, mountPath=TEXT, subPath=TEXT, readOnly=YES_OR_NO)),
)  # fmt: skip
VOLUME = some(
    "name", name=TEXT, persistentVolumeClaim=some("claimName", claimName=TEXT, readOnly=YES_OR_NO), hostPath=ANY, nfs=ANY, configMap=ANY,
    secret=ANY, emptyDir=some(medium={"enum": ["", "Memory"]}, sizeLimit={"type": "string", "pattern": r"^\d+[KMGT]i$"}),
)  # fmt: skip
POD = some(
    "containers", containers=many(CONTAINER), initContainers=many(CONTAINER), volumes=many(VOLUME), serviceAccountName=TEXT,
    restartPolicy={"enum": ["Always", "OnFailure", "Never"]}, terminationGracePeriodSeconds=WHOLE, nodeSelector=TEXTS, affinity=ANY,
    tolerations=many(ANY), hostNetwork=YES_OR_NO, dnsPolicy=TEXT, priorityClassName=TEXT, runtimeClassName=TEXT, schedulerName=TEXT,
    imagePullSecrets=many(ANY), topologySpreadConstraints=many(ANY),
    securityContext=some(fsGroup=WHOLE, runAsUser=WHOLE, runAsGroup=WHOLE, runAsNonRoot=YES_OR_NO, supplementalGroups=many(WHOLE)),
)  # fmt: skip
TEMPLATE = some("spec", metadata=METADATA, spec=POD)
HEAD = some(
    "template", serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"]}, headService=ANY, enableIngress=YES_OR_NO,
    rayStartParams=TEXTS, template=TEMPLATE, resources=TEXTS, labels=TEXTS,
)  # fmt: skip
WORKERS = some(
    "groupName template", groupName=TEXT, replicas=WHOLE, minReplicas=WHOLE, maxReplicas=WHOLE, numOfHosts=WHOLE, suspend=YES_OR_NO,
    idleTimeoutSeconds=WHOLE, rayStartParams=TEXTS, template=TEMPLATE, scaleStrategy=ANY, resources=TEXTS, labels=TEXTS,
)  # fmt: skip
CLUSTER = some(
    "headGroupSpec", headGroupSpec=HEAD, workerGroupSpecs=many(WORKERS), rayVersion=TEXT, enableInTreeAutoscaling=YES_OR_NO,
    autoscalerOptions=ANY, headServiceAnnotations=TEXTS, suspend=YES_OR_NO, gcsFaultToleranceOptions=ANY, upgradeStrategy=ANY,
    managedBy=TEXT, authOptions=some(mode={"enum": ["disabled", "token"]}),
)  # fmt: skip
JOB = some(
    "rayClusterSpec entrypoint", rayClusterSpec=CLUSTER, entrypoint=TEXT, submitterPodTemplate=TEMPLATE, runtimeEnvYAML=TEXT, jobId=TEXT,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]}, backoffLimit=WHOLE, activeDeadlineSeconds=WHOLE,
    submitterConfig=some(backoffLimit=WHOLE), ttlSecondsAfterFinished=WHOLE, shutdownAfterJobFinishes=YES_OR_NO, suspend=YES_OR_NO,
    metadata=TEXTS, clusterSelector=TEXTS, managedBy=TEXT, deletionStrategy=ANY, entrypointNumCpus={"type": "number"},
    entrypointNumGpus={"type": "number"}, entrypointResources=TEXT,
)  # fmt: skip
SELECTOR = some(matchLabels=TEXTS, matchExpressions=many(ANY))
PEERS = many(some(podSelector=SELECTOR, namespaceSelector=SELECTOR, ipBlock=ANY))
POLICY = some(
    "podSelector", podSelector=SELECTOR, policyTypes=many({"enum": ["Ingress", "Egress"]}),
    ingress=many(some(**{"from": PEERS, "ports": many(ANY)})), egress=many(ANY),
)  # fmt: skip


def of(kind: str) -> dict[str, Any]:
    """The schema of a document of this kind."""
    spec, version = {"RayJob": (JOB, "ray.io/v1"), "NetworkPolicy": (POLICY, "networking.k8s.io/v1")}[kind]
    return some("apiVersion kind metadata spec", apiVersion={"const": version}, kind={"const": kind}, metadata=METADATA, spec=spec)
