"""A search of full fine-tuning as it is typed: real Ray, tiny weights, a killed driver."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conf.hashing import plain
from evaluation.records.run_records import RunRecords, read_run
from evaluation.records.search_records import SearchRecords
from tests.waiting import HANG_SECONDS

pytestmark = [pytest.mark.all_cores, pytest.mark.slow, pytest.mark.faults]

ROOT = Path(__file__).resolve().parents[3]
TYPED = [
    *("+exp=full", "~method@arms.zero_shot", "model=tiny", "run.name=r", "general.items=0"),
    *("task.limit.train=48", "task.limit.validation=16", "task.limit.test=16"),
    *("trainer.epochs=2", "engine.latency_requests=0", "tracking=none"),
]
SEARCH = [
    *("sweep=random", "sweep.trials=4", "sweep.halving.first_rung=0.4"),
    "sweep.space.full.trainer.learning_rate={log_uniform:[1e-4,3e-2]}",
]


def command(root: Path, *overrides: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), f"run.root={root}", *TYPED, *overrides]


def launch(root: Path, *overrides: str) -> str:
    done = subprocess.run(
        command(root, *overrides), capture_output=True, text=True, timeout=HANG_SECONDS, cwd=root
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def journal(run: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal."""
    path = run / "journal.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def search_of(records: RunRecords) -> SearchRecords:
    search = records.arms["full"].search
    assert search is not None and search.choice is not None
    return search


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search whose driver was killed after its first rung, and whose command came again."""
    root = tmp_path_factory.mktemp("legs")
    process = subprocess.Popen(command(root, *SEARCH), stdout=subprocess.DEVNULL, cwd=root)
    deadline = time.monotonic() + HANG_SECONDS
    while not any(line["event"] == "rung_decided" for line in journal(root / "r")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    launch(root, *SEARCH)
    return root


@pytest.fixture(scope="module")
def records(root: Path) -> RunRecords:
    return read_run(root / "r")


def test_the_survivor_learned_as_a_training_that_nobody_cut(
    root: Path, records: RunRecords
) -> None:
    search = search_of(records)
    rate = search.chosen_values()["trainer.learning_rate"]
    launch(root, f"arms.full.trainer.learning_rate={rate!r}", "run.name=alone")
    alone, legs = read_run(root / "alone").arms["full"].train, records.arms["full"].train
    assert [s.step for s in legs] == [s.step for s in alone] and len(alone) == 12
    assert [s.loss for s in legs] == pytest.approx([s.loss for s in alone], abs=1e-6)
    first, second = (
        (root / name / "arms/full/final/checkpoint/model.safetensors").read_bytes()
        for name in ("r", "alone")
    )
    assert first == second


def test_a_killed_driver_runs_what_is_missing_and_decides_alike(
    root: Path, records: RunRecords, tmp_path: Path
) -> None:
    started = [line["job"] for line in journal(root / "r") if line["event"] == "job_started"]
    legs = [job for job in started if job.startswith("leg:")]
    assert len([job for job in legs if job.endswith(":0")]) == 4  # none of a decided rung again
    launch(tmp_path, *SEARCH)
    found, wanted = search_of(records), search_of(read_run(tmp_path / "r"))
    assert plain(found.decisions) == plain(wanted.decisions)
    assert plain(found.choice) == plain(wanted.choice)
    assert [(r.trial, r.rung, r.per_item) for r in found.rungs] == [
        (r.trial, r.rung, r.per_item) for r in wanted.rungs
    ]


def test_every_leg_is_on_the_bill_and_each_step_once(root: Path, records: RunRecords) -> None:
    search = search_of(records)
    steps = [(s.trial, s.step) for s in search.steps]
    assert len(set(steps)) == len(steps)
    for trial in search.trials:
        assert sum(number == trial.trial for number, _ in steps) == trial.steps
    assert {t.status for t in search.trials} == {"done", "dropped"}
    mine = [line for line in records.ledger if line.job.startswith(("leg:full", "search:full"))]
    assert sum(line.tokens for line in mine) == sum(t.tokens for t in search.trials)
    seconds = sum(line.device_seconds for line in mine)
    assert seconds == pytest.approx(sum(t.device_seconds for t in search.trials))
    results = json.loads((root / "r/results.json").read_text())
    assert results["arms"]["full"]["cost"]["fixed_device_seconds"] >= seconds > 0


def test_the_same_command_again_starts_nothing(root: Path, records: RunRecords) -> None:
    assert "0 jobs to run" in launch(root, *SEARCH)
    assert plain(search_of(read_run(root / "r")).decisions) == plain(search_of(records).decisions)
    assert "learning_rate" in (root / "r/report.md").read_text()
