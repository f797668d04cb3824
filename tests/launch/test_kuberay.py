"""The manifest of cluster=kuberay against the operator's schema; its entrypoint, really run."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from conf.choices import Device
from conf.clusters import ClusterConfig, KubeRayConfig
from conf.errors import ConfigError
from launch.kuberay import RayJob, manifest
from launch.typed_elsewhere import arguments_of

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((Path(__file__).parent / "rayjob_schema.json").read_text(encoding="utf-8"))
FULL = {
    "image": "registry.example.org/team/crossover:0.1.0",
    "volume_claim": "shared-runs",
    "namespace": "ml",
    "service_account": "trainer",
    "secret": "wandb",
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
        ("secret", "wandb key"),
        ("pull_secrets", ["a/b"]),
        ("tolerations", ["gpu"]),
        ("memory", "lots"),
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
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (CPU, "cluster.kuberay.image"),
        ((*CPU, *NAMED), "cluster.storage"),
        ((*CPU, *NAMED, "cluster.storage=/storage", "task.path={data}"), "which no pod sees"),
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
def test_the_entrypoint_runs_a_run_to_its_report(tmp_path: Path) -> None:
    """What Ray's shell would run on the head, with our code's path and a private Ray."""
    arguments = ("+exp=smoke", "cluster=local", "tracking=none", f"run.root={tmp_path}")
    made = job(arguments=arguments, kuberay={"code": str(ROOT)})
    made = replace(made, cluster=replace(made.cluster, python=sys.executable))
    entrypoint = manifest(made)["spec"]["entrypoint"]
    outer = shlex.join(["bash", "-c", entrypoint])
    done = subprocess.run(
        ["bash", "-c", outer], cwd="/", capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("*/report.html"))
