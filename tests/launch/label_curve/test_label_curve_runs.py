"""A label curve of real trainings: the whole command on a tiny model, killed, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evaluation.records.run_records import read_run
from tests.waiting import HANG_SECONDS

pytestmark = [pytest.mark.all_cores, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[3]
ASKED = (
    *("+exp=label_curve", "model=tiny", "tracking.wandb=off", "run.name=r", "trainer.epochs=2"),
    *("label_curve.sizes=[8,16]", "label_curve.draws=2", "engine.latency_requests=2"),
    *("arms.few_shot.num_shots=8", "arms.few_shot_retrieved.num_shots=4"),
    *("task.limit.test=24", "task.limit.validation=8"),
)


def command(root: Path) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), f"run.root={root}", *ASKED]


def test_a_curve_of_real_trainings_goes_on_after_a_kill(tmp_path: Path) -> None:
    trained = tmp_path / "r/arms/lora@8.d0/train.jsonl"
    with subprocess.Popen(
        command(tmp_path), cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True
    ) as first:
        while not trained.exists() and first.poll() is None:
            time.sleep(0.2)
        assert first.poll() is None, "it ended before it trained"
        os.killpg(first.pid, signal.SIGKILL)
    done = subprocess.run(
        command(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "r/results.json").read_text())
    curve = results["label_curve"]
    points = {(p["arm"], p["num_labels"]): p for p in curve["points"]}
    arms = ("few_shot", "few_shot_retrieved", "lora", "full", "tfidf", "linear_probe")
    assert set(points) == {(arm, size) for arm in arms for size in (8, 16)}
    assert all(p["num_runs"] == 2 and p["num_missing"] == 0 for p in points.values())
    pairs = {(c["prompted"], c["tuned"]) for c in curve["crossings"]}
    prompted = ("zero_shot", "few_shot", "few_shot_retrieved")
    assert pairs == {(a, b) for a in prompted for b in ("lora", "full")}
    records = read_run(tmp_path / "r")
    for arm in ("lora", "full"):
        for place in (p for p in records.label_places if p.arm == arm):
            own = records.arms.get(place.records) or records.label_runs[place.records]
            # Two epochs in batches of 8, each step once, also of the one that was killed.
            assert [t.step for t in own.train] == list(range(1, 2 * place.num_labels // 8 + 1))
            assert {t.num_labels for t in own.train} == {place.num_labels}
            assert {s.num_labels for s in own.samples} == {place.num_labels}
    # More labels of one draw are other weights; another draw has other labels.
    losses = {name: [t.loss for t in own.train] for name, own in records.label_runs.items()}
    assert losses["lora@8.d0"] != losses["lora@8.d1"]
    assert points["linear_probe", 8]["fixed_device_seconds"] > 0
    assert points["lora", 16]["request_usd"]["value"] > 0
    again = subprocess.run(
        command(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert again.returncode == 0 and "0 jobs to run" in again.stdout
