"""A full disk below W&B's files: a warning, and nothing else is different."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.all_cores]
ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_full_disk_for_the_mirror_loses_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "r"
    (run / "wandb").mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(run / "wandb")]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("no mounting here")
    command = [sys.executable, str(ROOT / "launch.py"), "+exp=smoke", "tracking=wandb"]
    command += [f"run.root={tmp_path}", "run.name=r"]
    environment = {k: v for k, v in os.environ.items() if k != "WANDB_API_KEY"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            env=environment,
            cwd=tmp_path,
        )
    finally:
        subprocess.run(["umount", "-l", str(run / "wandb")], check=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bytes free: its files may lack rows" in " ".join(done.stdout.split())
    events = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "run_finished" and events[-1]["data"]["exit_code"] == 0
    results = json.loads((run / "results.json").read_text())
    assert {arm["status"] for arm in results["arms"].values()} == {"done"}
    for arm in ("zero_shot", "few_shot"):
        lines = (run / "arms" / arm / "samples.jsonl").read_text().splitlines()
        tests = [json.loads(line)["item_id"] for line in lines if '"set": "test"' in line]
        assert len(set(tests)) == 40
