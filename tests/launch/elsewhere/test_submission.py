"""A run that is submitted: once, whoever asks how often; real where Ray's own part is at stake."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conf.errors import ClusterError
from launch.elsewhere import submission
from launch.elsewhere.submission import Submission, fetch, last_attempt, submitted
from tests.launch.two_nodes import ROOT, TwoNodes, two_nodes
from tests.waiting import HANG_SECONDS

LAUNCH = str(ROOT / "launch.py")
SMOKE = (LAUNCH, "+exp=smoke")
TO = Submission(run="r", id="r-1", address="http://h:8265", storage="/nowhere")


@dataclass
class Jobs:
    """What a cluster says of its jobs."""

    states: dict[str, str] = field(default_factory=dict)

    def list_jobs(self) -> list[Any]:
        return [
            SimpleNamespace(
                submission_id=name,
                metadata={submission.METADATA_RUN: name.rsplit("-", 1)[0]},
                status=SimpleNamespace(is_terminal=lambda state=state: state != "RUNNING"),
            )
            for name, state in self.states.items()
        ]


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ({}, (0, True)),
        ({"other-3": "RUNNING"}, (0, True)),
        ({"r-1": "FAILED", "r-2": "RUNNING"}, (2, False)),
        ({"r-2": "STOPPED", "r-10": "SUCCEEDED", "r-9": "FAILED"}, (10, True)),
    ],
)
def test_the_newest_attempt_is_found_by_number(states: dict[str, str], expected: tuple[int, bool]):
    assert last_attempt(Jobs(states), "r") == expected


def test_a_submission_is_found_again(tmp_path: Path):
    TO.save(tmp_path)
    assert submitted(tmp_path / "r") == TO
    with pytest.raises(ClusterError, match="not submitted from here"):
        submitted(tmp_path / "other")


def test_files_that_this_machine_does_not_see_are_named(tmp_path: Path):
    with pytest.raises(ClusterError, match=r"scp -r NODE:/nowhere/r"):
        fetch(TO, tmp_path / "r")


@pytest.fixture(scope="module")
def nodes() -> Iterator[TwoNodes]:
    with two_nodes() as found:
        yield found


@pytest.mark.all_cores
def test_a_run_is_submitted_followed_and_fetched(nodes: TwoNodes):
    ran = nodes.launch(*SMOKE, *nodes.overrides)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "3 arms" in ran.stdout
    run = re.search(r"Submitted as (\S+)-1 to", ran.stdout).group(1)
    got = nodes.launch("-m", "launch.fetch", f"outputs/{run}")
    assert got.returncode == 0, got.stderr
    local = nodes.base / "user" / "outputs" / run
    results = json.loads((local / "results.json").read_text())
    assert {arm["status"] for arm in results["arms"].values()} == {"done"}
    assert "python launch.py +exp=smoke cluster=ray" in (local / "report.md").read_text()
    again = nodes.launch(*SMOKE, *nodes.overrides)  # nothing is missing: nothing runs
    assert "0 jobs to run" in again.stdout and again.returncode == 0


@pytest.mark.all_cores
def test_without_the_token_nothing_is_told_or_done(nodes: TwoNodes):
    nodes.environment, kept = nodes.environment | {"RAY_AUTH_TOKEN": "0" * 32}, nodes.environment
    try:
        ran = nodes.launch(*SMOKE, *nodes.overrides)
    finally:
        nodes.environment = kept
    assert ran.returncode == 2 and "RAY_AUTH_TOKEN" in ran.stderr


TRAINING = (
    *(LAUNCH, "+exp=lora", "model=tiny", "trainer.epochs=150", "general.items=0"),
    *("task.limit.train=64", "task.limit.test=40"),
)


@pytest.mark.slow
@pytest.mark.all_cores
def test_a_detached_training_outlives_its_terminal_and_a_node(nodes: TwoNodes):
    terminal = nodes.begin(*TRAINING, *nodes.overrides)
    log = nodes.base / "user.log"
    _until(lambda: re.search(r"train:lora [1-9]\d+/", log.read_text()), "steps")
    terminal.send_signal(signal.SIGINT)
    assert terminal.wait(timeout=HANG_SECONDS) == 130
    run = re.search(r"launch\.attach outputs/(\S+)", log.read_text()).group(1)
    nodes.kill("second")
    attached = nodes.launch("-m", "launch.attach", f"outputs/{run}")
    assert attached.returncode == 0, attached.stdout[-3000:]
    assert "attempt 1 lost" in attached.stdout
    assert _steps(nodes, run) == list(range(1, 1201))  # 150 epochs of 8 steps, each once
    ids = nodes.launch("-c", IDS, str(nodes.dashboard)).stdout.split()
    assert [i for i in ids if i.startswith(run)] == [f"{run}-1"]


@pytest.mark.slow
@pytest.mark.all_cores
def test_a_repeated_submission_attaches_and_a_stopped_one_goes_on(nodes: TwoNodes):
    if "second" not in nodes.processes:
        nodes.add_node("second", 1)
    command = (*TRAINING, "trainer.seed=1", *nodes.overrides)
    first = nodes.begin(*command)
    log = nodes.base / "user.log"
    start = len(log.read_text())
    _until(lambda: re.search(r"train:lora [1-9]\d+/", log.read_text()[start:]), "steps")
    first.kill()  # the client dies; the run does not
    first.wait()
    second = nodes.begin(*command)
    _until(lambda: "goes on there already: attaching" in log.read_text()[start:], "attaching")
    run = re.search(r"Submitted as (\S+)-1 to", log.read_text()[start:]).group(1)
    stopped = nodes.launch("-m", "launch.stop", f"outputs/{run}")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert second.wait(timeout=HANG_SECONDS) == 130
    third = nodes.launch(*command)
    assert third.returncode == 0, third.stdout[-3000:]
    steps = [
        json.loads(t)["step"]
        for t in (nodes.base / "storage" / run / "arms/lora/train.jsonl").open()
    ]
    assert steps == list(range(1, 1201))


IDS = """
import sys
from ray.job_submission import JobSubmissionClient
for job in JobSubmissionClient(f"http://127.0.0.1:{sys.argv[1]}").list_jobs():
    print(job.submission_id)
"""


def _steps(nodes: TwoNodes, run: str) -> list[int]:
    path = nodes.base / "storage" / run / "arms/lora/train.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def _until(happened: Any, what: str) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not happened():
        assert time.monotonic() < deadline, f"no {what}"
        time.sleep(0.5)
