"""Curves without a server: no key and no network, and a driver killed while it writes them."""

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

from tests.launch.tracking.wandb_log import history
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.all_cores]
TRAINING = (
    *("+exp=lora", "run.name=r", "model=tiny", "tracking=wandb", "engine.latency_requests=0"),
    *("task.limit.train=160", "task.limit.validation=14", "task.limit.test=14"),
    *("trainer.epochs=12", "trainer.state_every_steps=1"),
)


def without_key(root: Path) -> dict[str, str]:
    """An environment without a key, in a home without a file of keys."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return kept | {"HOME": str(root)}


def command(root: Path, *typed: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), *typed, f"run.root={root}", "run.name=r"]


def offline_files(root: Path) -> list[Path]:
    return sorted((root / "r/wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace")
def test_without_key_and_network_a_run_is_whole_and_says_so_once(tmp_path: Path) -> None:
    """A namespace with loopback alone: no address outside can be reached, not even resolved."""
    alone = ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode != 0:
        pytest.skip("no network namespaces here")
    done = subprocess.run(
        [*alone, *command(tmp_path, "+exp=smoke", "tracking=wandb")],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        cwd=tmp_path,
        env=without_key(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("W&B") == 1
    assert f"W&B offline; upload with: wandb sync {tmp_path}/r/wandb/offline-run-*" in done.stdout
    results = json.loads((tmp_path / "r/results.json").read_text())
    assert {arm["status"] for arm in results["arms"].values()} == {"done"}
    assert len(offline_files(tmp_path)) == len(results["arms"]) + 1  # and the summary


def steps(root: Path) -> list[dict[str, Any]]:
    path = root / "r/arms/lora/train.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_two_seconds_of_rows(process: subprocess.Popen[bytes], root: Path) -> None:
    deadline, first = time.monotonic() + HANG_SECONDS, float("inf")
    while time.monotonic() - first < 2:
        assert process.poll() is None and time.monotonic() < deadline
        if losses_sent(root):
            first = min(first, time.monotonic())
        time.sleep(0.05)


def losses_sent(root: Path) -> list[list[float]]:
    """The losses in each of the arm's offline files."""
    rows = [
        [row["train/loss"] for row in history(file) if "train/loss" in row]
        for file in offline_files(root)
    ]
    return [found for found in rows if found]


def test_a_killed_driver_loses_a_second_of_curves_and_no_step(tmp_path: Path) -> None:
    """The file of the killed one misses what was not flushed; the next one's is whole."""
    process = subprocess.Popen(
        command(tmp_path, *TRAINING),
        cwd=tmp_path,
        env=without_key(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for_two_seconds_of_rows(process, tmp_path)
    left = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(left, timeout=HANG_SECONDS)[1]
    recorded = [step["loss"] for step in steps(tmp_path)]
    assert 0 < len(recorded) < 240
    (sent,) = losses_sent(tmp_path)
    assert sent == recorded[: len(sent)]
    assert sum(step["step_seconds"] for step in steps(tmp_path)[len(sent) :]) <= 1
    done = subprocess.run(
        command(tmp_path, *TRAINING),
        cwd=tmp_path,
        env=without_key(tmp_path),
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole = [step["loss"] for step in steps(tmp_path)]
    assert whole[: len(recorded)] == recorded and len(whole) == 240
    assert max(losses_sent(tmp_path), key=len) == whole
