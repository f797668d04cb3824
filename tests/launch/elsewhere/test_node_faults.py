"""A submitted training while nodes and the network between them fail."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launch.two_hosts import TwoHosts, two_hosts
from tests.launch.two_nodes import ROOT, TwoNodes, two_nodes
from tests.waiting import HANG_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.all_cores]

NUM_STEPS = 400
TRAINING = (
    *(str(ROOT / "launch.py"), "+exp=lora", "model=tiny", "general.items=0"),
    *(f"trainer.max_steps={NUM_STEPS}", "trainer.epochs=1000", "trainer.state_every_steps=5"),
    *("task.limit.train=64", "task.limit.validation=16", "task.limit.test=16"),
    *("engine.latency_requests=0", "cluster.collective_timeout_seconds=20"),
)
Say = Callable[[str, object], None]


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    with two_nodes() as found:
        yield found


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    with two_hosts() as found:
        yield found


@dataclass
class Submitted:
    """A training that was typed, and what is known of it from its files."""

    nodes: TwoNodes
    run: Path
    terminal: subprocess.Popen[Any]

    @property
    def steps(self) -> list[dict[str, Any]]:
        path = self.run / "arms/lora/train.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def lost(self) -> list[dict[str, Any]]:
        """The attempts that were given up."""
        lines = (self.run / "journal.jsonl").read_text().splitlines()
        return [e for e in map(json.loads, lines) if e["event"] == "attempt_lost"]

    def wait_for_steps(self, count: int, *, seconds: float = HANG_SECONDS) -> float:
        """Returns how long it took."""
        began = time.monotonic()
        while len(self.steps) < count:
            assert time.monotonic() - began < seconds, self.said()
            time.sleep(0.1)
        return time.monotonic() - began

    def wait(self) -> None:
        assert self.terminal.wait(timeout=HANG_SECONDS) == 0, self.said()

    def said(self) -> str:
        return (self.nodes.base / "user.log").read_text()[-3000:]


def submit(nodes: TwoNodes, *typed: str, storage: str = "storage") -> Submitted:
    """Type the training, and wait for its name; where nothing is stored nothing is reused."""
    log, deadline = nodes.base / "user.log", time.monotonic() + HANG_SECONDS
    log.touch()
    before = len(log.read_text())
    place = nodes.base / storage
    place.mkdir(exist_ok=True)
    overrides = [o for o in nodes.overrides if not o.startswith("cluster.storage")]
    terminal = nodes.begin(*TRAINING, *overrides, f"cluster.storage={place}", *typed)
    while (found := re.search(r"Submitted as (\S+)-\d+ to", log.read_text()[before:])) is None:
        assert terminal.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)
    return Submitted(nodes=nodes, run=place / found.group(1), terminal=terminal)


def require_each_step_once(training: Submitted) -> None:
    assert [step["step"] for step in training.steps] == list(range(1, NUM_STEPS + 1))
    (final,) = training.run.glob("arms/lora/final/checkpoint/checkpoint.json")
    assert final.is_file()


def test_a_node_that_is_cut_off_for_good(hosts: TwoHosts, record_property: Say) -> None:
    """Its worker lives on behind the cut and shares the storage: it may not write."""
    training = submit(hosts)
    training.wait_for_steps(30)
    hosts.link("down")
    cut = time.monotonic()
    done = len(training.steps)
    training.wait_for_steps(done + 10)
    record_property("recovery_seconds", time.monotonic() - cut)
    training.wait()
    require_each_step_once(training)
    assert len(training.lost) == 1
    assert hosts.num_nodes() == 1


def test_a_link_that_heals_after_five_seconds(hosts: TwoHosts, record_property: Say) -> None:
    whole = submit(hosts, storage="whole")
    whole.wait()
    training = submit(hosts)
    training.wait_for_steps(30)
    hosts.link("down")
    cut = time.monotonic()
    time.sleep(5)
    hosts.link("up")
    done = len(training.steps)
    training.wait_for_steps(done + 10)
    record_property("recovery_seconds", time.monotonic() - cut)
    training.wait()
    require_each_step_once(training)
    assert len(training.lost) <= 1
    assert hosts.num_nodes() == 2
    assert [s["loss"] for s in training.steps] == [s["loss"] for s in whole.steps]


def test_a_node_that_is_to_be_taken_away(nodes: TwoNodes, record_property: Say) -> None:
    """A preemption that is told 20 s before: the state is saved then, and no step is redone."""
    training = submit(nodes, "trainer.state_every_steps=1000")
    training.wait_for_steps(30)
    told = nodes.launch("-c", DRAIN, nodes.gcs, str(nodes.dashboard))
    assert told.returncode == 0, told.stdout + told.stderr
    began, done = time.monotonic(), len(training.steps)
    while time.monotonic() < began + 20:
        time.sleep(0.2)
    nodes.kill("second")
    training.wait_for_steps(done + 30)
    training.wait()
    require_each_step_once(training)
    assert len(training.lost) == 1
    log = (training.run / "logs/train-lora/0.log").read_text()
    assert int(log.rpartition("resumed at step ")[2].split()[0]) >= done
    redone = [e for e in ledger(training) if e["purpose"] == "redone"]
    assert sum(line["tokens"] for line in redone) == 0
    record_property("steps_redone", 0)


DRAIN = """
import subprocess, sys
from ray.util.state import list_nodes
gcs, dashboard = sys.argv[1:]
nodes = list_nodes(address=f"http://127.0.0.1:{dashboard}")
(leaving,) = (n.node_id for n in nodes if not n.is_head_node)
command = ["ray", "drain-node", "--address", gcs, "--node-id", leaving]
command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away"]
command += ["--deadline-remaining-seconds", "20"]
sys.argv = command
from ray.scripts.scripts import main
main()
"""


def ledger(training: Submitted) -> list[dict[str, Any]]:
    """The bill of the run."""
    return list(json.loads((training.run / "results.json").read_text())["ledger"])


def test_a_head_that_dies(nodes: TwoNodes, record_property: Say) -> None:
    """The driver and the jobs' records die with it; the same command on a new cluster goes on."""
    training = submit(nodes)
    training.wait_for_steps(30)
    nodes.kill("head")
    died = time.monotonic()
    nodes.kill("second")
    training.terminal.wait(timeout=HANG_SECONDS)
    done = len(training.steps)
    assert done < NUM_STEPS
    nodes.start_head()
    nodes.add_node("second", 1)
    again = submit(nodes)
    assert again.run == training.run
    again.wait_for_steps(done + 10)
    record_property("recovery_seconds", time.monotonic() - died)
    again.wait()
    require_each_step_once(again)
    log = (again.run / "logs/train-lora/0.log").read_text()
    resumed = int(log.rpartition("resumed at step ")[2].split()[0])
    assert resumed > 0
    record_property("steps_redone", max(0, done - resumed))


def test_a_node_that_dies_before_the_training_starts(nodes: TwoNodes) -> None:
    """Planned for two workers, checked with two nodes, and one is left."""
    training = submit(nodes)
    log, deadline = training.run / "journal.jsonl", time.monotonic() + HANG_SECONDS
    while not log.exists() or '"job_started"' not in log.read_text():  # the checks are over
        assert time.monotonic() < deadline, training.said()
        time.sleep(0.05)
    assert not training.steps
    nodes.kill("second")
    training.wait()
    require_each_step_once(training)


def test_a_node_with_another_version_is_refused(nodes: TwoNodes) -> None:
    """A second peft that Python finds first, on one node alone."""
    fake = nodes.base / "fake" / "peft-0.0.1.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.0.1\n")
    kept = nodes.environment
    nodes.environment = kept | {"PYTHONPATH": f"{fake.parent}:{kept['PYTHONPATH']}"}
    try:
        nodes.add_node("third", 1)
    finally:
        nodes.environment = kept
    done = nodes.launch(*TRAINING, *nodes.overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    told = " ".join((done.stdout + done.stderr).split())
    assert "peft on the nodes" in told and "0.0.1" in told
    assert not list((nodes.base / "storage").glob("*/arms/lora/train.jsonl"))
