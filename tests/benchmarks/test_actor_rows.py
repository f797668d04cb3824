"""What the row on engine processes reads of a run, on made records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.actor_rows import NUM_WINDOWS, read_evaluation


def write_records(root: Path, items: list[int], *, seconds: float) -> None:
    directory = root / ".cache" / "jobs" / "k"
    directory.mkdir(parents=True)
    made = [
        {
            "type": "SampleRecord", "set": "test", "arm": "zero_shot", "item_id": f"test-{n}",
            "is_correct": True, "time": 100.0 + seconds * (place + 1),
        }
        for place, n in enumerate(items)
    ]  # fmt: skip
    others = [
        {"type": "LedgerLine", "time": 100.0},
        {**made[0], "set": "validation", "time": 99.0},
        {**made[0], "arm": "tfidf", "time": 98.0},
    ]
    lines = [json.dumps(line) for line in [*others, *made]]
    (directory / "records.jsonl").write_text("\n".join(lines) + "\n")


def test_seconds_are_of_equal_parts_from_the_start_on(tmp_path: Path) -> None:
    write_records(tmp_path, list(range(200)), seconds=0.5)
    found = read_evaluation(tmp_path, began=98.0)
    assert found.answered == 200 and len(found.seconds) == NUM_WINDOWS
    assert found.seconds[0] == pytest.approx((2.0 + 20 * 0.5) / 20)
    assert found.seconds[1:] == pytest.approx([0.5] * (NUM_WINDOWS - 1))


def test_an_answer_that_comes_twice_is_no_answer(tmp_path: Path) -> None:
    write_records(tmp_path, [*range(199), 0], seconds=0.5)
    assert read_evaluation(tmp_path, began=98.0).answered == 0
