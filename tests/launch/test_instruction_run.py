"""Instruction tuning end to end on embedded data, tiny weights: mix, training, sets, report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evaluation.prepare import read_rows
from tests.waiting import HANG_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.all_cores]
ROOT = Path(__file__).resolve().parent.parent.parent
PAIRS = [
    {"prompt": f"Say the word number {n}.", "completion": f"word {n}"} for n in "one two".split()
]
COMMAND = [
    "+exp=instruction",
    "model=tiny",
    "run.name=r",
    "tracking=none",
    "~method@arms.lora",
    "arms.instruction.sources.mine.path=pairs.json",
    "arms.instruction.mix_size=40",
    "task.limit.train=12",
    "task.limit.validation=8",
    "task.limit.test=10",
    "trainer.epochs=1.5",
    "trainer.num_points=1",
    "engine.latency_requests=0",
    "general.items=0",
    "general.instruction_items=11",
]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", params=["lora", "full"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mix")
    (root / "pairs.json").write_text(json.dumps(PAIRS))
    command = [sys.executable, str(ROOT / "launch.py"), f"run.root={root}", *COMMAND]
    command.append(f"arms.instruction.tunes={request.param}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "r"


def test_counts_of_the_mix_are_those_of_the_training(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    sources = {s["source"]: s for s in results["arms"]["instruction"]["train"]["sources"]}
    # Weights 3, 3, 2, 1, 2 of 40 rows; two pairs come at most four times each.
    assert sources["mine"]["num_rows"] == 7
    assert sum(s["num_rows"] for s in sources.values()) == 40
    assert sources["sms_spam"]["note"] == "it is the target task"
    (summary,) = [e["data"] for e in lines(run / "journal.jsonl") if e["event"] == "train_summary"]
    steps = lines(run / "arms/instruction/train.jsonl")
    trained = sum(s["trained_target_tokens"] for s in sources.values())
    assert trained == summary["target_tokens"] == sum(s["target_tokens"] for s in steps)
    assert sum(s["trained_rows"] for s in sources.values()) == sum(s["examples"] for s in steps)
    assert results["arms"]["instruction"]["kind"] == "instruction"
    assert results["arms"]["instruction"]["status"] == "done"


def test_no_item_that_judges_is_trained(run: Path) -> None:
    items = {i["id"]: i["split"] for i in lines(run / "items.jsonl")}
    (path,) = run.parent.glob(".cache/jobs/*/rows.jsonl")
    ids = {row.item_id.split(":")[1] for row in read_rows(path)}
    assert {items.get(i) for i in ids} == {"train", None}  # None: items of other sources
    assert set(items.values()) >= {"train", "validation", "test", "instructions", "steering"}


def test_base_and_tuned_weights_are_asked_the_requests(run: Path) -> None:
    results = json.loads((run / "results.json").read_text())
    (row,) = results["instructions"]
    assert row["arm"] == "instruction" and row["base"]["n"] == row["tuned"]["n"] == 11
    assert set(row["by_kind"]) == {"kinds of the mix", "new kinds"}
    samples = lines(run / "arms/instruction/samples.jsonl")
    asked = [s for s in samples if s["set"] == "instructions"]
    assert sorted(s["step"] is None for s in asked) == [False] * 11 + [True] * 11
    for file in ("report.md", "report.html"):
        text = (run / file).read_text()
        assert "Obeying instructions" in text and "kinds of the mix" in text
        assert "it is the target task" in text
