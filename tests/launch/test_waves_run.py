"""Waves with the real command, real Ray and a driver that is really killed; scripted answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from evaluation.records.run_records import read_run
from tests.waiting import HANG_SECONDS

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent


def command(root: Path) -> list[str]:
    return [
        *(sys.executable, str(ROOT / "launch.py"), "+exp=smoke", f"run.root={root}", "run.name=r"),
        *("decision.stop_early=true", "task.limit.test=160"),
        *("engine.script=constant+sleep:0.02", "arms.few_shot.engine.script=oracle+sleep:0.02"),
        "engine.latency_requests=0",  # no cost, which is never measured twice alike
    ]


def journal(root: Path, event: str) -> list[dict[str, Any]]:
    path = root / "r/journal.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if line["event"] == event]


def answers(root: Path) -> dict[str, set[tuple[str, str | None]]]:
    arms = read_run(root / "r").arms
    return {
        name: {(s.item_id, s.answer) for s in arm.samples if s.set == "test"}
        for name, arm in arms.items()
    }


def test_a_killed_run_leaves_out_what_a_whole_one_does(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for root in (whole, cut):
        root.mkdir()
    done = subprocess.run(
        command(whole), capture_output=True, text=True, timeout=HANG_SECONDS, cwd=whole
    )
    assert done.returncode == 0, done.stdout + done.stderr
    left_out = {line["job"] for line in journal(whole, "job_cancelled")}
    assert left_out, "the arms are told apart, or cannot be, before the last item"
    process = subprocess.Popen(command(cut), cwd=cut, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + HANG_SECONDS
    while not journal(cut, "wave_judged") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not journal(cut, "run_finished")
    again = subprocess.run(
        command(cut), capture_output=True, text=True, timeout=HANG_SECONDS, cwd=cut
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert {line["job"] for line in journal(cut, "job_cancelled")} == left_out
    assert answers(cut) == answers(whole)
    third = subprocess.run(
        command(cut), capture_output=True, text=True, timeout=HANG_SECONDS, cwd=cut
    )
    assert third.returncode == 0 and "starting Ray" not in third.stdout
