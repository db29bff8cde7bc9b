"""Writes values.schema.json: the chart's own values, and the configuration tree as its dataclasses describe it.

Run after changing either: ``.venv/bin/python helm/generate_schema.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cluster.config import json_schema

SCHEMA = Path(__file__).with_name("values.schema.json")

Schema = dict[str, Any]


def closed(description: str, required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    """An object that refuses what it does not know."""
    schema: Schema = {"type": "object", "additionalProperties": False, "description": description}
    if required:
        schema["required"] = list(required)
    return {**schema, "properties": properties}


def kubernetes(kind: str, description: str) -> Schema:
    """A part that is handed to Kubernetes as it is, and checked there."""
    return {"type": kind, "description": description} | ({"items": {"type": "object"}} if kind == "array" else {})


def text(description: str, **more: Any) -> Schema:
    return {"type": "string", "description": description, **more}


def number(description: str, minimum: int) -> Schema:
    return {"type": "integer", "description": description, "minimum": minimum}


# Names become parts of pod names.
DNS_LABEL = "^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$"
PLACEMENT: dict[str, Schema] = {
    "resources": closed(
        "CPU and memory of a pod.",
        required=("requests", "limits"),
        requests=kubernetes("object", "What the scheduler sets aside."),
        limits=kubernetes("object", "What the pod may take; Ray counts its CPUs and memory by it."),
    ),
    "nodeSelector": kubernetes("object", "Nodes that may run the pod."),
    "tolerations": kubernetes("array", "Taints that the pod tolerates."),
}


def values_schema() -> Schema:
    """The schema of values.yaml. The tree's definitions move to the root, where its references point."""
    tree = json_schema()
    definitions = tree.pop("$defs", {})
    worker_group = closed(
        "Pods that run replicas.",
        required=("name", "replicas", "gpus", "resources"),
        name=text("Name of the group.", pattern=DNS_LABEL, **{"not": {"const": "gateway"}}),
        replicas=number("Pods.", 0),
        gpus=number("NVIDIA GPUs per pod.", 0),
        **PLACEMENT,
    )
    root = closed(
        "Values of the chart.",
        required=("cluster", "workerGroups"),
        **{
            "global": kubernetes("object", "Helm passes it to every chart; unused."),
            "image": closed(
                "The image of every pod.",
                repository=text("Registry and name.", minLength=1),
                tag=text("Unset: the chart's appVersion."),
                pullPolicy=text("When nodes pull it.", enum=["Always", "IfNotPresent", "Never"]),
            ),
            "imagePullSecrets": kubernetes("array", "Registry credentials."),
            "auth": closed("Ray's token.", existingSecret=text("A Secret whose key auth_token holds it.")),
            "cluster": tree,
            "head": closed("The head pod.", required=("resources",), **PLACEMENT),
            "gateway": closed("The gateway's pod.", required=("resources",), **PLACEMENT),
            "workerGroups": {
                "type": "array",
                "description": "Groups of pods that run replicas.",
                "items": worker_group,
            },
            "shmSize": text("Size of /dev/shm in every pod.", pattern="^[0-9]+(Ki|Mi|Gi)$"),
            "terminationGracePeriodSeconds": number("Time for a pod to drain.", 1),
            "env": kubernetes("array", "Environment of every pod."),
            "envFrom": kubernetes("array", "Secrets and ConfigMaps that become environment of every pod."),
            "volumes": kubernetes("array", "Volumes of every pod."),
            "volumeMounts": kubernetes("array", "Where they are mounted."),
        },
    )
    return {"$schema": "http://json-schema.org/draft-07/schema#", **root, "$defs": definitions}


def main() -> None:
    SCHEMA.write_text(json.dumps(values_schema(), indent=2) + "\n")


if __name__ == "__main__":
    main()
