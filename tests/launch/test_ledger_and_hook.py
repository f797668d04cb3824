"""Tokens billed are the rows that a hook on the embedding counts, in whole runs and killed ones."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.launch.embedding_hook import billed, hooked, passes, processes_of
from tests.waiting import HANG_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.faults, pytest.mark.all_cores]  # a minute a run

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = (
    *("+exp=zero_shot", "model=tiny", "run.name=r", "tracking=none", "engine.latency_requests=2"),
    *("task.limit.train=48", "task.limit.validation=16", "task.limit.test=16"),
    *("trainer.epochs=2", "general.items=0"),
    *("probes.bias.items=0", "probes.abstain.items=0", "probes.steering.items=0"),
)
ARMS = ("zero_shot", "few_shot", "chain_of_thought", "lora", "full", "few_shot_on_lora", "search")
NUM_RUNS = 20  # every second one is killed


def overrides(arms: Sequence[str]) -> list[str]:
    """A run of these arms; `search` has every arm that can be searched, searched."""
    named = {"zero_shot", *arms} - {"search"}
    if "few_shot_on_lora" in named:
        named.add("lora")
    found = [f"+method@arms.{name}={name}" for name in sorted(named - {"zero_shot"})]
    found += [f"arms.{n}.num_shots=2" for n in sorted(named) if n.startswith("few_shot")]
    return [*found, *(("search=true", "sweep.trials=4") if "search" in arms else ())]


def start(root: Path, environment: dict[str, str], *typed: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "launch.py"), f"run.root={root}", *SMALL, *typed]
    with (root / "out.txt").open("ab") as out:
        return subprocess.Popen(
            command, stdout=out, stderr=out, cwd=root, env=environment, start_new_session=True
        )


def finish(root: Path, process: subprocess.Popen[bytes]) -> None:
    assert process.wait(timeout=HANG_SECONDS) == 0, (root / "out.txt").read_text()[-4000:]


def kill(root: Path, process: subprocess.Popen[bytes]) -> None:
    """End the driver's group and every process that it started, wherever Ray put it."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    while left := processes_of(root):
        for number in left:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def wait_for_rows(root: Path, process: subprocess.Popen[bytes], rows: int) -> bool:
    """Until so many rows are computed; False where the run ends before."""
    while process.poll() is None:
        if sum(passes(root)) >= rows:
            return True
        time.sleep(0.005)
    return False


@pytest.mark.parametrize("number", range(NUM_RUNS))
def test_random_runs_bill_what_the_hook_counts(tmp_path: Path, number: int) -> None:
    source = random.Random(number)
    typed = overrides(source.sample(ARMS, source.randint(1, 3)))
    environment = hooked(tmp_path)
    process = start(tmp_path, environment, *typed)
    if number % 2:
        # zero_shot alone computes 3,500 rows, a training 15,000 and more.
        trains = any(word in " ".join(typed) for word in ("lora", "full", "search"))
        rows = round(10 ** source.uniform(1.5, 4.0 if trains else 3.4))
        assert wait_for_rows(tmp_path, process, rows)
        time.sleep(source.uniform(0, 0.5))  # most of the time goes by between passes
        assert process.poll() is None, "the run ended before it could be killed"
        kill(tmp_path, process)
        process = start(tmp_path, environment, *typed)
    finish(tmp_path, process)
    assert billed(tmp_path / "r") == sum(passes(tmp_path)) > 1_000
