"""The command itself, killed or interrupted in mid-training, and typed again."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.hashing import sha256_of_file
from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).resolve().parent.parent.parent
COMMAND = [
    # 120 steps take some 8 s: with 40 a busy machine had ended before the kill reached it.
    *("+exp=lora", "run.name=r", "model=tiny", "tracking.wandb=off"),
    *("task.limit.train=160", "task.limit.validation=14", "task.limit.test=14"),
    *("trainer.epochs=6", "trainer.state_every_steps=1", "engine.latency_requests=0"),
]
TIMES = ("step_seconds", "device_seconds", "usd", "flops_share", "peak_memory_bytes")
pytestmark = [pytest.mark.slow, pytest.mark.all_cores]


def start(root: Path, *further: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), f"run.root={root}", *COMMAND, *further],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=root,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(root: Path, *further: str) -> tuple[int, str]:
    process = start(root, *further)
    text = process.communicate(timeout=HANG_SECONDS)[0]
    return process.returncode, text


def steps(root: Path) -> list[dict[str, Any]]:
    path = root / "r/arms/lora/train.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_steps(process: subprocess.Popen[str], root: Path, count: int) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while len(steps(root)) < count:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(process.communicate()[0])
        time.sleep(0.02)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a training must leave, whatever happened on the way."""

    steps: list[dict[str, Any]]
    weights: str

    @classmethod
    def of(cls, root: Path) -> Trained:
        kept = [{k: v for k, v in s.items() if k not in TIMES} for s in steps(root)]
        final = root / "r/arms/lora/final/checkpoint/adapter_model.safetensors"
        return cls(steps=kept, weights=sha256_of_file(final))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("plain")
    code, text = finish(root)
    assert code == 0, text
    return Trained.of(root)


def test_a_driver_killed_in_mid_training_goes_on_from_the_state(
    plain: Trained, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    process = start(tmp_path)
    wait_for_steps(process, tmp_path, 8)
    process.kill()
    process.communicate()
    code, text = finish(tmp_path)
    assert code == 0, text
    assert Trained.of(tmp_path) == plain
    log = (tmp_path / "r/logs/train-lora/0.log").read_text()
    assert "resumed at step" in log
    resumed = int(log.rpartition("resumed at step ")[2].split()[0])
    assert resumed >= 7
    record_property("what", f"resumed after step {resumed}, records and weights equal")


def test_ctrl_c_saves_and_stops_with_130_and_the_second_would_end_at_once(
    plain: Trained, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    process = start(tmp_path, "trainer.state_every_steps=1000")
    wait_for_steps(process, tmp_path, 5)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 130, text
    assert "saves its state" in text and "The same command goes on from here" in text
    done = len(steps(tmp_path))
    code, text = finish(tmp_path, "trainer.state_every_steps=1000")
    assert code == 0, text
    assert Trained.of(tmp_path) == plain
    log = (tmp_path / "r/logs/train-lora/0.log").read_text()
    assert f"resumed at step {done}" in log
    record_property("what", f"exit code 130, resumed after step {done}, records and weights equal")


def test_sigterm_to_the_driver_saves_and_stops(
    plain: Trained, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    process = start(tmp_path, "trainer.state_every_steps=1000")
    wait_for_steps(process, tmp_path, 5)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=HANG_SECONDS)[0]
    assert process.returncode == 130, text
    done = len(steps(tmp_path))
    code, text = finish(tmp_path, "cluster.workers=1")
    assert code == 0, text
    assert Trained.of(tmp_path) == plain
    assert f"resumed at step {done}" in (tmp_path / "r/logs/train-lora/0.log").read_text()
    record_property("what", f"resumed after step {done}, records and weights equal")


def test_two_hard_interrupts_end_at_once_and_cost_only_steps(
    plain: Trained, tmp_path: Path
) -> None:
    process = start(tmp_path)
    wait_for_steps(process, tmp_path, 5)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=HANG_SECONDS)
    assert process.returncode == 130
    code, text = finish(tmp_path)
    assert code == 0, text
    assert Trained.of(tmp_path) == plain
    assert os.path.exists(tmp_path / "r/report.html")
