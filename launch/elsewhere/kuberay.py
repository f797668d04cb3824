"""`cluster=kuberay`: a RayJob for Kubernetes, written, checked and handed to `kubectl`.

The operator pastes a job's entrypoint into a shell of its own, and Ray into another, so what was
typed crosses as base64 of JSON, which no shell changes (launch/typed_elsewhere.py reads it). It is
readable in an annotation. Everything else is a value of YAML that a library writes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from conf.clusters import TOLERATION, ClusterConfig, KubeRayConfig
from conf.errors import EXIT_DONE, ClusterError
from launch.elsewhere.archive import named_files
from launch.elsewhere.shared import arguments_there, check_tool, output_of
from launch.elsewhere.submission import NOTES
from launch.preflight import Checked

RAY_VERSION = "2.60.0"
KEPT_SECONDS = 600  # a finished RayJob stays so long, for `kubectl describe`
OVER = ("Complete", "Failed")
SUBMITTER = {"cpu": "500m", "memory": "1Gi"}  # it hands the job to the head and follows its log
REMEDY = "change cluster.kuberay.* as it says; the KubeRay operator must be installed"
JSON = dict[str, Any]


@dataclass(kw_only=True, slots=True, frozen=True)
class RayJob:
    """What a manifest is rendered from. arguments: of launch.py on the head."""

    run: str
    arguments: tuple[str, ...]
    cluster: ClusterConfig

    @property
    def name(self) -> str:
        """A name that the operator takes, and no other run's.

        It wants a DNS-1035 label, which begins with a letter, of at most 47 characters.
        """
        slug = re.sub(r"[^a-z0-9]+", "-", self.run.lower()).strip("-")
        slug = slug if slug[:1].isalpha() else f"run-{slug}"
        slug = slug[:38].strip("-")
        return f"{slug}-{hashlib.sha256(self.run.encode()).hexdigest()[:8]}"

    @property
    def entrypoint(self) -> str:
        """What Ray runs on the head: characters that no shell changes."""
        kuberay, python = self.cluster.kuberay, self.cluster.python
        packed = base64.b64encode(json.dumps(self.arguments).encode()).decode()
        return f"{python} {kuberay.code}/launch/typed_elsewhere.py {packed}"


def rayjob_of(checked: Checked) -> RayJob:
    """The job that runs what was typed, with its run on the volume."""
    arguments = arguments_there(checked, root=checked.config.cluster.storage or "")
    return RayJob(run=checked.name, arguments=arguments, cluster=checked.config.cluster)


def manifest(job: RayJob) -> JSON:
    """The RayJob (pure): all workers or none, deadlines for waiting and for running, no retries."""
    kuberay = job.cluster.kuberay
    labels = {"app.kubernetes.io/name": "crossover"}
    if kuberay.queue is not None:
        labels["kueue.x-k8s.io/queue-name"] = kuberay.queue
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {
            "name": job.name,
            "namespace": kuberay.namespace,
            "labels": labels,
            "annotations": {"crossover/run": job.run, "crossover/typed": shlex.join(job.arguments)},
        },
        "spec": {
            "entrypoint": job.entrypoint,
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": KEPT_SECONDS,
            "activeDeadlineSeconds": kuberay.max_seconds,
            "preRunningDeadlineSeconds": kuberay.wait_seconds,
            "backoffLimit": 0,
            "submitterPodTemplate": _submitter(job),
            "rayClusterSpec": {
                "rayVersion": RAY_VERSION,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
                    "template": _ray_pod(job, "ray-head", _head_resources(kuberay)),
                },
                "workerGroupSpecs": [_workers(job)],
            },
        },
    }


def _workers(job: RayJob) -> JSON:
    nodes = job.cluster.nodes
    return {
        "groupName": "workers",
        **{key: nodes for key in ("replicas", "minReplicas", "maxReplicas")},
        "rayStartParams": {},
        "template": _ray_pod(job, "ray-worker", _worker_resources(job.cluster)),
    }


def _head_resources(kuberay: KubeRayConfig) -> dict[str, str]:
    return {"cpu": str(kuberay.head_cpus), "memory": kuberay.head_memory}


def _worker_resources(cluster: ClusterConfig) -> dict[str, str]:
    kind = "cpu" if cluster.device.name == "cpu" else "nvidia.com/gpu"
    found = {kind: str(cluster.devices_per_node)}
    if cluster.kuberay.memory is not None:
        found["memory"] = cluster.kuberay.memory
    return found


def _container(job: RayJob, name: str, resources: dict[str, str]) -> JSON:
    return {
        "name": name,
        "image": job.cluster.kuberay.image,
        "resources": {"limits": resources, "requests": resources},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        },
    }


def _pod(kuberay: KubeRayConfig, container: JSON) -> JSON:
    """What every pod of the job has: nobody's root, where it may be, what may pull its image."""
    spec: JSON = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": kuberay.user_id,
            "fsGroup": kuberay.user_id,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
    }
    if kuberay.service_account is not None:
        spec["serviceAccountName"] = kuberay.service_account
    if kuberay.pull_secrets:
        spec["imagePullSecrets"] = [{"name": secret} for secret in kuberay.pull_secrets]
    if kuberay.node_selector:
        spec["nodeSelector"] = dict(kuberay.node_selector)
    if kuberay.tolerations:
        spec["tolerations"] = [_toleration(text) for text in kuberay.tolerations]
    return spec


def _ray_pod(job: RayJob, name: str, resources: dict[str, str]) -> JSON:
    """A node of the Ray cluster: it sees the volume, and has the variables of the Secret."""
    kuberay = job.cluster.kuberay
    container = _container(job, name, resources)
    container["workingDir"] = kuberay.code
    container["volumeMounts"] = [{"name": "storage", "mountPath": job.cluster.storage}]
    if kuberay.env_from is not None:
        container["envFrom"] = [{"secretRef": {"name": kuberay.env_from}}]
    claim = {"claimName": kuberay.volume_claim}
    spec = _pod(kuberay, container)
    spec["volumes"] = [{"name": "storage", "persistentVolumeClaim": claim}]
    return {"spec": spec}


def _submitter(job: RayJob) -> JSON:
    """The pod that submits; the operator adds its command and the token.

    Its own one has neither a security context, which a namespace of the `restricted` standard
    refuses, nor the names that pull a private image.
    """
    container = _container(job, "ray-job-submitter", SUBMITTER)
    return {"spec": {"restartPolicy": "Never", **_pod(job.cluster.kuberay, container)}}


def _toleration(text: str) -> dict[str, str]:
    found = TOLERATION.fullmatch(text)
    assert found is not None, "checked with the configuration"
    value = found["value"]
    how = {"operator": "Exists"} if value is None else {"operator": "Equal", "value": value}
    return {"key": found["key"], **how, "effect": found["effect"]}


def check_files(checked: Checked, *, here: Path) -> None:
    """Refuse files of this machine that no pod sees.

    Raises:
        ClusterError: with the key and the file.
    """
    storage = Path(checked.config.cluster.storage or "/")
    for key, path in named_files(checked.config, here=here):
        if not Path(os.path.abspath(path)).is_relative_to(storage):  # `..` counted
            raise ClusterError(
                key,
                found=f"{path}, which no pod sees",
                expected=f"a file on the volume, below {storage}",
                remedy="copy it there, submit from a machine that sees the volume at the same"
                " path, and write that path",
            )


def submit(checked: Checked, *, here: Path) -> int:
    """Write the manifest, and create the RayJob unless it waits or runs already.

    Raises:
        ClusterError: a file that no pod sees; `kubectl` is not here, or it refuses.
    """
    check_files(checked, here=here)
    job = rayjob_of(checked)
    path = Path(checked.config.run.root) / NOTES / f"{checked.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(manifest(job), sort_keys=False), encoding="utf-8")
    create = ["kubectl", "create", "-f", str(path)]
    if not checked.config.cluster.submit:
        print(f"Written: {path}\nCreate it with: {shlex.join(create)}")
        return EXIT_DONE
    check_tool("kubectl", cluster="kuberay", where="a machine that may create RayJobs")
    tell = partial(output_of, cluster="kuberay", remedy=REMEDY)
    named = [f"rayjob/{job.name}", "-n", job.cluster.kuberay.namespace]
    asked = ["kubectl", "get", *named, "--ignore-not-found"]
    status = tell([*asked, "-o", "jsonpath={.metadata.name}/{.status.jobDeploymentStatus}"])
    name, _, state = status.strip().partition("/")
    if name and state not in OVER:
        print(f"RayJob {job.name} does this already.")
    else:
        if name:
            tell(["kubectl", "delete", *named, "--wait"])
        tell(create)
        print(f"Created RayJob {job.name}.")
    print(
        f"See it: kubectl describe {shlex.join(named)}\nStop it: kubectl delete {shlex.join(named)}"
    )
    return EXIT_DONE
