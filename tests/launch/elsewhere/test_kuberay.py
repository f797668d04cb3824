"""The manifest of cluster=kuberay against the operator's schema; its entrypoint, really run."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from conf.choices import Device
from conf.clusters import ClusterConfig, KubeRayConfig
from conf.errors import ConfigError
from launch.elsewhere.kuberay import RAY_VERSION, RayJob, manifest
from launch.typed_elsewhere import arguments_of
from tests.launch.two_nodes import two_nodes
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[3]
SCHEMA = json.loads((Path(__file__).parent / "rayjob_schema.json").read_text(encoding="utf-8"))
FULL = {
    "image": "registry.example.org/team/crossover:0.1.0",
    "volume_claim": "shared-runs",
    "namespace": "ml",
    "service_account": "trainer",
    "env_from": "wandb",
    "pull_secrets": ["registry"],
    "node_selector": {"gpu": "h100"},
    "tolerations": ["nvidia.com/gpu:NoSchedule", "team=ml:NoExecute"],
    "queue": "ml-queue",
    "memory": "64Gi",
}


def job(
    run: str = "compare-sms", arguments: tuple[str, ...] = ("+exp=lora",), **more: Any
) -> RayJob:
    options: dict[str, Any] = {"nodes": 4, "devices_per_node": 8, "device": Device.h100}
    kuberay = KubeRayConfig(**{**FULL, **more.pop("kuberay", {})})
    cluster = ClusterConfig(
        name="kuberay", storage="/storage", kuberay=kuberay, **{**options, **more}
    )
    return RayJob(run=run, arguments=arguments, cluster=cluster)


def read_back(made: RayJob) -> dict[str, Any]:
    """What kubectl reads of what is written."""
    return yaml.safe_load(yaml.safe_dump(manifest(made), sort_keys=False))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"device": Device.cpu},
        {
            "kuberay": {
                key: None if not isinstance(value, list | dict) else type(value)()
                for key, value in FULL.items()
                if key not in ("image", "volume_claim", "namespace")
            }
        },
    ],
)
def test_the_operator_takes_it(changes: dict[str, Any]) -> None:
    made = read_back(job(**changes))
    jsonschema.validate(made, SCHEMA)


def test_all_workers_or_none_and_every_pod_alike() -> None:
    spec = read_back(job())["spec"]
    (group,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 4
    head = spec["rayClusterSpec"]["headGroupSpec"]
    for template in (head["template"], group["template"]):
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
        (container,) = pod["containers"]
        assert container["volumeMounts"] == [{"name": "storage", "mountPath": "/storage"}]
        assert container["envFrom"] == [{"secretRef": {"name": "wandb"}}]
        assert container["resources"]["limits"] == container["resources"]["requests"]
    worker = group["template"]["spec"]["containers"][0]
    assert worker["resources"]["limits"] == {"nvidia.com/gpu": "8", "memory": "64Gi"}
    assert head["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}  # no work beside the driver
    assert (spec["backoffLimit"], spec["rayClusterSpec"]["authOptions"]["mode"]) == (0, "token")
    assert group["template"]["spec"]["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "ml", "effect": "NoExecute"},
    ]


def test_the_pod_that_submits_is_as_safe_and_has_no_secret() -> None:
    """The operator's own default has no security context and pulls from public registries only."""
    spec = read_back(job())["spec"]
    pod = spec["submitterPodTemplate"]["spec"]
    head = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    alike = ("securityContext", "imagePullSecrets", "serviceAccountName", "tolerations")
    assert {key: pod[key] for key in alike} == {key: head[key] for key in alike}
    (container,) = pod["containers"]
    for key in ("image", "securityContext"):
        assert container[key] == head["containers"][0][key]
    assert "envFrom" not in container and "volumes" not in pod
    assert "command" not in container  # the operator writes it, and the token beside it
    assert pod["restartPolicy"] == "Never"


def test_the_version_of_ray_is_the_one_that_is_installed() -> None:
    """The operator chooses its probes by it: for Ray before 2.53 they need wget in the image."""
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None and pinned[1] == RAY_VERSION


texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)


@given(arguments=st.lists(texts, max_size=4), selector=st.dictionaries(texts, texts, max_size=2))
def test_no_value_escapes(arguments: list[str], selector: dict[str, str]) -> None:
    """YAML gives back what was put in, and two shells leave the entrypoint as it is."""
    made = job(arguments=tuple(arguments), kuberay={"node_selector": selector})
    found = read_back(made)
    assert found == manifest(made)
    jsonschema.validate(found, SCHEMA)
    words = shlex.split(shlex.join(shlex.split(found["spec"]["entrypoint"])))
    assert words[:2] == ["python", "/app/launch/typed_elsewhere.py"]
    assert arguments_of(words[2]) == arguments


@example(run="2026-trial", other="a")  # a label of DNS-1035 begins with a letter
@example(run="_.-", other="run")
@given(run=st.text("abcXYZ019._-", min_size=1, max_size=120), other=st.text("a._-", min_size=1))
def test_names_are_kubernetes_own_and_no_other_runs(run: str, other: str) -> None:
    name = job(run=run).name
    jsonschema.validate(name, SCHEMA["properties"]["metadata"]["properties"]["name"])
    assert (job(run=other).name == name) == (run == other)


def test_no_secret_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-4711")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "canary-4712")
    assert "canary" not in json.dumps(manifest(job()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image", "a b"),
        ("code", "/app; id"),
        ("namespace", "Ml"),
        ("namespace", "a.b"),
        ("env_from", "wandb key"),
        ("pull_secrets", ["a/b"]),
        ("tolerations", ["gpu"]),
        ("memory", "lots"),
        ("memory", "\u0666Gi"),  # a digit, and no quantity
        ("user_id", 0),
        ("wait_seconds", 0),
    ],
)
def test_what_kubernetes_would_not_take_is_refused(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"cluster.kuberay.{key}"):
        KubeRayConfig(**{key: value})


CPU = ("cluster=kuberay", "cluster.device=cpu", "cluster.devices_per_node=2")
NAMED = ("cluster.kuberay.image=crossover:1", "cluster.kuberay.volume_claim=runs")


def launched(
    *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch.py", "+exp=smoke", *arguments],
        cwd=ROOT,
        env=env or dict(os.environ),
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (CPU, "cluster.kuberay.image"),
        ((*CPU, *NAMED), "cluster.storage"),
        ((*CPU, *NAMED, "cluster.storage=/storage", "task.path={data}"), "which no pod sees"),
        ((*CPU, *NAMED, "cluster.storage=/usr", "task.path=/usr/..{data}"), "no pod sees"),
        ((*CPU, *NAMED, "cluster.storage=/storage"), "no kubectl"),
    ],
)
def test_refused_before_anything_is_created(
    tmp_path: Path, arguments: tuple[str, ...], found: str
) -> None:
    data = tmp_path / "mine.jsonl"
    rows = [{"input": f"text {i}", "label": "ab"[i % 2]} for i in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    env = {**os.environ, "PATH": str(tmp_path)}
    filled = [a.format(data=data) for a in arguments]
    done = launched(*filled, f"run.root={tmp_path}", env=env)
    assert done.returncode == 2 and found in done.stdout + done.stderr


KUBECTL = """\
#!/bin/bash
echo "$@" >> "$FAKE_LOG"
if [ "$1" = get ]; then cat "$FAKE_STATE" 2>/dev/null || true; fi
"""


def test_a_repeated_command_creates_one_job_until_it_is_over(tmp_path: Path) -> None:
    tool, log, state = tmp_path / "kubectl", tmp_path / "log", tmp_path / "state"
    tool.write_text(KUBECTL)
    tool.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "FAKE_LOG": str(log),
        "FAKE_STATE": str(state),
    }
    typed = (*CPU, *NAMED, "cluster.storage=/storage", f"run.root={tmp_path}")
    typed = (*typed, "cluster.kuberay.env_from=wandb")
    verbs = []
    for found in ("", "name/Running", "name/Failed"):
        state.write_text(found)
        done = launched(*typed, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        verbs.append([line.split()[0] for line in log.read_text().splitlines()])
        log.write_text("")
    assert verbs == [["get", "create"], ["get"], ["get", "delete", "create"]]
    (path,) = (tmp_path / ".submitted").glob("*.yaml")
    written = yaml.safe_load(path.read_text())
    jsonschema.validate(written, SCHEMA)
    arguments = arguments_of(written["spec"]["entrypoint"].split()[-1])
    assert arguments[0] == "+exp=smoke" and "cluster=ray" in arguments
    assert "run.root=/storage" in arguments and "cluster=kuberay" not in arguments


@pytest.mark.slow
def test_the_entrypoint_runs_on_a_cluster_to_its_report(tmp_path: Path) -> None:
    """What is written, as the operator and Ray run it: two shells, on a node, the volume there.

    Only the volume's path and the code's are this machine's.
    """
    with two_nodes() as cluster:
        storage = cluster.base / "storage"
        typed = (
            *("cluster=kuberay", "cluster.device=cpu", "cluster.nodes=2"),
            *("cluster.devices_per_node=1", *NAMED, f"cluster.kuberay.code={ROOT}"),
            *(f"cluster.storage={storage}", f"cluster.python={sys.executable}"),
            *("tracking=none", "cluster.submit=false", f"run.root={tmp_path}"),
        )
        wrote = launched(*typed)
        assert wrote.returncode == 0, wrote.stdout + wrote.stderr
        (path,) = (tmp_path / ".submitted").glob("*.yaml")
        entrypoint = yaml.safe_load(path.read_text())["spec"]["entrypoint"]
        done = subprocess.run(
            ["bash", "-c", shlex.join(["bash", "-c", entrypoint])],
            cwd="/",
            env=cluster.environment | {"RAY_ADDRESS": cluster.gcs},  # Ray tells a job's driver
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (storage / path.stem / "report.html").is_file()
