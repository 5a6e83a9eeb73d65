"""The schema of what KubeRay reads, made of two sources:

pip install kubernetes==33.1.0
python tests/tools/cluster_files/kuberay_schema.py

KUBERAY below are the fields of KubeRay's own objects, by name and type, as its API reference has
them (https://docs.ray.io/en/master/kuberay/references/api.html), those of alpha features and of the
autoscaler left out. Its CRD embeds the objects of Kubernetes, here V1…: they come from the models
of Kubernetes's Python client (Apache License 2.0), of a release that is not newer than KubeRay 1.6,
without their descriptions. Kubernetes drops what a CRD does not know without a word; so nothing but
what is listed is allowed here, at any depth.
"""

import inspect
import json
import re
from pathlib import Path

FILE = Path(__file__).with_name("kuberay_schema.json")
# Kubernetes's own: a decimal number, with a suffix of the binary or decimal SI or an exponent
QUANTITY = r"^[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?$"
AMOUNTS = {"type": "object", "additionalProperties": {"$ref": "#/$defs/Quantity"}}
# types in the words of Kubernetes's client, or "=" what is allowed; "!" marks what must be there
KUBERAY = {
    "RayJob": {
        "apiVersion!": "=ray.io/v1",
        "kind!": "=RayJob",
        "metadata!": "V1ObjectMeta",
        "spec!": "RayJobSpec",
    },
    "RayJobSpec": {
        "activeDeadlineSeconds": "int",
        "backoffLimit": "int",
        "clusterSelector": "dict(str, str)",
        "entrypoint": "str",
        "entrypointNumCpus": "float",
        "entrypointNumGpus": "float",
        "entrypointResources": "str",
        "jobId": "str",
        "managedBy": "str",
        "metadata": "dict(str, str)",
        "rayClusterSpec": "RayClusterSpec",
        "runtimeEnvYAML": "str",
        "shutdownAfterJobFinishes": "bool",
        "submissionMode": "str",
        "submitterConfig": "SubmitterConfig",
        "submitterPodTemplate": "V1PodTemplateSpec",
        "suspend": "bool",
        "ttlSecondsAfterFinished": "int",
    },
    "SubmitterConfig": {"backoffLimit": "int"},
    "RayClusterSpec": {
        "authOptions": "AuthOptions",
        "enableInTreeAutoscaling": "bool",
        "headGroupSpec!": "HeadGroupSpec",
        "headServiceAnnotations": "dict(str, str)",
        "managedBy": "str",
        "rayVersion": "str",
        "suspend": "bool",
        "workerGroupSpecs": "list[WorkerGroupSpec]",
    },
    "AuthOptions": {"mode": "=disabled|token", "secretName": "str"},
    "HeadGroupSpec": {
        "enableIngress": "bool",
        "headService": "V1Service",
        "labels": "dict(str, str)",
        "rayStartParams": "dict(str, str)",
        "resources": "dict(str, str)",
        "serviceType": "str",
        "template!": "V1PodTemplateSpec",
    },
    "WorkerGroupSpec": {
        "groupName!": "str",
        "idleTimeoutSeconds": "int",
        "labels": "dict(str, str)",
        "maxReplicas!": "int",
        "minReplicas!": "int",
        "numOfHosts": "int",
        "rayStartParams": "dict(str, str)",
        "replicas": "int",
        "resources": "dict(str, str)",
        "scaleStrategy": "ScaleStrategy",
        "suspend": "bool",
        "template!": "V1PodTemplateSpec",
    },
    "ScaleStrategy": {"workersToDelete": "list[str]"},
}
PLAIN = {
    "str": {"type": "string"},
    "datetime": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "object": {},
}


def schema(kind: str) -> dict:
    """The JSON schema of a type."""
    if kind in PLAIN:
        return PLAIN[kind]
    if of := re.fullmatch(r"list\[(.*)\]", kind):
        return {"type": "array", "items": schema(of[1])}
    if of := re.fullmatch(r"dict\(str, (.*)\)", kind):
        return {"type": "object", "additionalProperties": schema(of[1])}
    if kind.startswith("="):
        return {"enum": kind[1:].split("|")}
    return {"$ref": f"#/$defs/{kind}"}


def model(kind: str) -> dict[str, str]:
    """The fields of one of Kubernetes's objects, marked as those of KUBERAY."""
    from kubernetes.client import models

    of = getattr(models, kind)
    fields = {}
    for name, field in of.attribute_map.items():
        needed = "must not be `None`" in inspect.getsource(getattr(of, name).fset)
        fields[f"{field}{'!' * needed}"] = of.openapi_types[name]
    return fields


def definition(kind: str) -> dict:
    """The JSON schema of an object: nothing but its fields."""
    fields = KUBERAY.get(kind) or model(kind)
    amounts = {"dict(str, str)": AMOUNTS} if kind == "V1ResourceRequirements" else {}
    properties = {name.rstrip("!"): amounts.get(of) or schema(of) for name, of in fields.items()}
    required = [name.rstrip("!") for name in fields if name.endswith("!")]
    needs = {"required": required} if required else {}
    return {"type": "object", "additionalProperties": False, "properties": properties} | needs


def definitions() -> dict[str, dict]:
    """Every object that a RayJob, or the ConfigMap beside it, can hold."""
    made = {"Quantity": {"type": ["string", "integer"], "pattern": QUANTITY}}
    coming = ["RayJob", "V1ConfigMap"]
    while coming:
        kind = coming.pop()
        if kind not in made:
            made[kind] = definition(kind)
            coming += re.findall(r"#/\$defs/(\w+)", json.dumps(made[kind]))
    return dict(sorted(made.items()))


if __name__ == "__main__":
    lines = [f"  {json.dumps(kind)}: {json.dumps(made)}" for kind, made in definitions().items()]
    FILE.write_text('{"$defs": {\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
