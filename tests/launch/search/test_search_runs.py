"""Searches as they are typed: the real command, real Ray, tiny weights, real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from conf.hashing import plain
from evaluation.records.run_records import RunRecords, read_run
from evaluation.records.search_records import SearchRecords
from launch.finished import find_arm
from tests.waiting import HANG_SECONDS

pytestmark = pytest.mark.all_cores

ROOT = Path(__file__).resolve().parents[3]
TYPED = [
    *("+exp=lora", "+method@arms.few_shot=few_shot", "arms.few_shot.num_shots=2"),
    *("search=true", "sweep.trials=5", "model=tiny", "run.name=r", "general.items=0"),
    *("task.limit.train=48", "task.limit.validation=16", "task.limit.test=16"),
    *("trainer.epochs=2", "engine.latency_requests=0", "tracking=none"),
]


def command(root: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), f"run.root={root}", *TYPED, *overrides]


def launch(root: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(root, *overrides), capture_output=True, text=True, timeout=HANG_SECONDS, cwd=root
    )


def searches(run: Path) -> dict[str, SearchRecords]:
    arms = read_run(run).arms
    return {name: arm.search for name, arm in arms.items() if arm.search is not None}


def decided(run: Path) -> dict[str, Any]:
    """What the searches of a run decided and chose."""
    found = searches(run)
    return {name: [plain(s.decisions), plain(s.choice)] for name, s in found.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("search")
    done = launch(root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


@pytest.fixture(scope="module")
def records(root: Path) -> RunRecords:
    return read_run(root / "r")


def test_every_arm_is_searched_and_answers_with_its_choice(records: RunRecords) -> None:
    assert set(searches(records.path)) == {"zero_shot", "few_shot", "lora"}
    for name, search in searches(records.path).items():
        assert search.choice is not None and len(search.trials) == 5
        assert {t.status for t in search.trials} == {"done", "dropped"}
        values = search.chosen_values()
        samples = [s for s in records.arms[name].samples if s.set == "test"]
        assert len(samples) == 16 and {s.item_id for s in samples} == {
            i.id for i in records.items.values() if i.split == "test"
        }
        assert {s.num_shots for s in samples} == {values.get("num_shots", 0)}
        if "instruction" in values:
            texts = {p.prompt_sha256: p.text for p in records.prompts}
            assert all(values["instruction"] in texts[s.prompt_sha256] for s in samples)
        arm = find_arm(records.path, name, with_reference=False, usage="").arm
        assert arm.answering.num_shots == values.get("num_shots", 0)


def test_the_engine_finds_on_validation_what_the_last_rung_did(records: RunRecords) -> None:
    lora, few_shot = records.arms["lora"], records.arms["few_shot"]
    for arm in (lora, few_shot):
        assert arm.search is not None and arm.search.choice is not None and arm.rule is not None
        found = arm.search.choice.value
        own = arm.rule.validation
        ways = [own["score/none"], own["score/batch"]]  # what a pack compares
        wanted = max(ways, key=lambda v: v.value or 0) if arm is lora else own[arm.rule.name]
        assert (found.value, found.n) == (wanted.value, wanted.n)


def test_the_checkpoint_is_the_chosen_trials(records: RunRecords) -> None:
    search = records.arms["lora"].search
    assert search is not None and search.choice is not None
    winner = search.choice.trials[0]
    arm = records.path / "arms" / "lora"
    trial = arm / "trials" / str(winner) / "final" / "checkpoint" / "adapter_model.safetensors"
    final = arm / "final" / "checkpoint" / "adapter_model.safetensors"
    assert final.read_bytes() == trial.read_bytes()
    steps = records.arms["lora"].train
    assert steps and {s.trial for s in steps} == {winner}
    assert {s.step for s in records.arms["lora"].curve} > {len(steps)}


def test_the_search_is_on_its_arms_bill(records: RunRecords) -> None:
    results = json.loads((records.path / "results.json").read_text())
    for name, purposes in (("lora", {"sweep", "train"}), ("few_shot", {"prompt_search"})):
        lines = [line for line in records.ledger if line.arm == name]
        mine = [line for line in lines if line.purpose in purposes]
        assert {line.purpose for line in mine} == purposes
        search = records.arms[name].search
        assert search is not None
        if name == "lora":
            mine += [x for x in lines if x.job == "search:lora" and x not in mine]
        else:
            mine += [
                x
                for x in lines
                if x.job == "search:few_shot" and x.purpose in ("shared", "padding")
            ]
        assert sum(line.tokens for line in mine) == sum(t.tokens for t in search.trials)
        seconds = sum(line.device_seconds for line in mine)
        assert results["arms"][name]["cost"]["fixed_device_seconds"] >= seconds > 0


def test_the_same_command_again_starts_nothing(root: Path) -> None:
    before, results = decided(root / "r"), (root / "r/results.json").read_text()
    again = launch(root)
    assert again.returncode == 0 and "0 jobs to run" in again.stdout
    assert decided(root / "r") == before
    old, new = (json.loads(text) for text in (results, (root / "r/results.json").read_text()))
    assert new["recommendation"] == old["recommendation"]
    for name, arm in old["arms"].items():
        assert new["arms"][name]["metric"] == arm["metric"]
        fixed = new["arms"][name]["cost"]["fixed_device_seconds"]
        assert fixed == pytest.approx(arm["cost"]["fixed_device_seconds"])


def rung_of_stream(root: Path) -> int:
    """The last rung that a running search of trainings has decided; -1: none."""
    found = -1
    for path in root.glob(".cache/jobs/*/points/stream-*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n") and '"type": "RungDecision"' in line:
                found = max(found, json.loads(line)["rung"])
    return found


def started_until(root: Path, *overrides: str, rung: int) -> subprocess.Popen[bytes]:
    """The command, running, once its trainings have decided a rung."""
    process = subprocess.Popen(
        command(root, *overrides), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=root
    )
    deadline = time.monotonic() + HANG_SECONDS
    while rung_of_stream(root) < rung and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout and process.stdout.read().decode()
        time.sleep(0.02)
    return process


def check_alike(run: Path, whole: Path) -> None:
    """The same decisions; each step and rung once."""
    assert decided(run) == decided(whole)
    search = searches(run)["lora"]
    scored = [(r.trial, r.rung) for r in search.rungs]
    assert len(scored) == len(set(scored))
    steps = [(s.trial, s.step) for s in search.steps]
    assert len(set(steps)) == len(steps)
    for trial in search.trials:
        assert sum(number == trial.trial for number, _ in steps) == trial.steps


@pytest.mark.slow
@pytest.mark.parametrize("rung", [1, 2])
def test_a_killed_driver_loses_no_rung_and_decides_alike(
    rung: int, root: Path, tmp_path: Path
) -> None:
    process = started_until(tmp_path, rung=rung)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = launch(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    check_alike(tmp_path / "r", root / "r")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_tried_again_and_decides_alike(
    workers: int, root: Path, tmp_path: Path
) -> None:
    process = started_until(tmp_path, f"cluster.workers={workers}", rung=1)
    title = "ray::fit_here" if workers == 1 else "RayTrainWorker"
    own = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if title in " ".join(child.cmdline())
    ]
    assert len(own) == workers
    own[-1].kill()
    text = process.communicate(timeout=HANG_SECONDS)[0].decode()
    assert process.returncode == 0, text
    assert "search:lora: attempt 1 lost" in text
    check_alike(tmp_path / "r", root / "r")
