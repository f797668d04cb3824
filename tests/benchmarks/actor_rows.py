"""A row on engine processes: an evaluation over two of them against one, with an engine that waits.

The engine sleeps for each request and computes nothing, so that what is measured is ours: how
requests are split, and how fast answers come back, are recorded and shown.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from launch.jsonl import read_lines
from tests.benchmarks.comparing import Setup
from tests.benchmarks.harness import ROOT, Result, ratio_of
from tests.benchmarks.parity import Parity

NUM_ITEMS = 100_000
WAIT_SECONDS = 0.01  # for each request
NUM_WINDOWS = 10
FLOOR = 1.9  # within 5% of twice the rate of one
LABELS = ("no", "yes")
JOB = "evaluate:zero_shot"
TYPED = (
    *("+exp=zero_shot", "run.name=run", "tracking=none", "general.items=0"),
    *("engine=scripted", f"engine.script=oracle+sleep:{WAIT_SECONDS}", "engine.latency_requests=0"),
    *("probes.bias.items=0", "probes.abstain.items=0", "probes.steering.items=0"),
    *("task=file", "task.name=made", "task.limit.train=40", "task.limit.validation=20"),
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Evaluation:
    """What a run left. seconds: per test item, in so many equal parts of the job, start included.

    answered: test items with their answers right, each once.
    """

    seconds: tuple[float, ...]
    answered: int


def two_actors(setup: Setup) -> list[Result]:
    """All items over two engine processes, and half of them over one."""
    items, _ = setup.cap(NUM_ITEMS, 1)
    with tempfile.TemporaryDirectory() as scratch:
        two = evaluated(setup, Path(scratch), actors=2, items=items)
        one = evaluated(setup, Path(scratch), actors=1, items=items // 2)
    checked = two.answered + one.answered
    is_whole = checked == items + items // 2
    result = Result(
        name="two_actors",
        work=f"an evaluation of {items:,} items over two engine processes against one, "
        f"an engine that waits {WAIT_SECONDS} s for each request",
        ours=float(np.median(two.seconds)),
        peer=float(np.median(one.seconds)),
        peer_version="one engine process",
        ratio=ratio_of(two.seconds, one.seconds),
        floor=FLOOR,
        aim=None,
        bound=2.0,
        unit="seconds an item",
        parity=Parity(
            checked=checked, ok=is_whole, worst=0.0, why="" if is_whole else "answers are missing"
        ),
        more={"wait_seconds": WAIT_SECONDS, "items": {"two": items, "one": items // 2}},
    )
    result.judge()
    return [result]


def evaluated(setup: Setup, scratch: Path, *, actors: int, items: int) -> Evaluation:
    """Type the command on made items, and read its records."""
    data, root = scratch / f"data-{items}", scratch / f"runs-{actors}"
    write_task(data, items)
    root.mkdir()
    typed = [*TYPED, f"engine.actors={actors}", f"task.path={data}", f"task.limit.test={items}"]
    model = ["model=hub", f"model.path={setup.model_dir}"]
    command = [sys.executable, "launch.py", *typed, *model, f"run.root={root}"]
    with (root / "log.txt").open("wb") as log:
        code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        raise RuntimeError(f"exit code {code}: {(root / 'log.txt').read_text()[-2000:]}")
    journal = list(read_lines(root / "run" / "journal.jsonl"))
    starts = [e["time"] for e in journal if e["event"] == "job_started" and e["job"] == JOB]
    return read_evaluation(root, began=starts[0])


def write_task(directory: Path, items: int) -> None:
    """Files of a task whose texts are all different."""
    directory.mkdir()
    for name, count in (("train", 40), ("validation", 20), ("test", items)):
        rows = (
            {"id": f"{name}-{n}", "input": f"{name} {n}: is it odd?", "label": LABELS[n % 2]}
            for n in range(count)
        )
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def read_evaluation(root: Path, *, began: float) -> Evaluation:
    """From the job's records: when each test item was recorded, and what was answered."""
    times, right = [], set()
    for path in (root / ".cache" / "jobs").glob("*/records.jsonl"):
        for line in read_lines(path):
            if _is_test_answer(line):
                times.append(line["time"])
                right |= {line["item_id"]} if line["is_correct"] else set()
    ends = np.asarray(sorted(times))[len(times) // NUM_WINDOWS - 1 :: len(times) // NUM_WINDOWS]
    parts = np.diff(np.concatenate([[began], ends[:NUM_WINDOWS]]))
    per_item = parts / (len(times) // NUM_WINDOWS)
    answered = len(right) if len(right) == len(times) else 0
    return Evaluation(seconds=tuple(map(float, per_item)), answered=answered)


def _is_test_answer(line: dict[str, Any]) -> bool:
    is_sample = line["type"] == "SampleRecord" and line["set"] == "test"
    return is_sample and line["arm"] == "zero_shot"
