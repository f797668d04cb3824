"""What a run that is read holds of each answer: bytes of Python's allocator."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from pathlib import Path

import pytest

from conf.records import SampleRecord, to_dict
from evaluation.records.run_records import read_run

NUM_ANSWERS = 1000


def write_run(root: Path, num_labels: int) -> None:
    labels = [f"card_payment_label_number_{number}" for number in range(num_labels)]
    (root / "arms" / "a").mkdir(parents=True)
    (root / "config.json").write_text(json.dumps({"config": {"arms": {"a": {"kind": "prompt"}}}}))
    with (root / "arms" / "a" / "samples.jsonl").open("w") as stream:
        for number in range(NUM_ANSWERS):
            answer = SampleRecord(
                arm="a",
                item_id=f"test-{number}",
                set="test",
                prompt_sha256=hashlib.sha256(str(number).encode()).hexdigest(),
                prompt_tokens=1000 + number,
                label_logprobs={n: -0.1 * k - number for k, n in enumerate(labels)},
                answer=labels[number % num_labels],
                target=labels[0],
                is_correct=number % num_labels == 0,
                score=1.0,
                total_seconds=0.01 + number,
            )
            stream.write(json.dumps(to_dict(answer)) + "\n")


@pytest.mark.parametrize(("num_labels", "most_bytes"), [(2, 1_100), (77, 5_000)])
def test_names_are_held_once(tmp_path: Path, num_labels: int, most_bytes: int) -> None:
    """With names of its own each answer took 1,470 and 10,400 bytes."""
    write_run(tmp_path, num_labels)
    read_run(tmp_path)  # what is made once
    tracemalloc.start()
    try:
        run = read_run(tmp_path)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(run.arms["a"].samples) == NUM_ANSWERS
    assert held / NUM_ANSWERS <= most_bytes
