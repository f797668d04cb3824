"""The driver's memory against the number of records that pass through it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.jsonl import cut_broken_line, read_lines
from launch.written_prompts import NUM_PLACES, WrittenPrompts
from tests.launch.driver_memory import DriverBench, traced_bytes

MAX_GROWTH = 1.2


def test_what_the_driver_holds_does_not_grow_with_the_records(tmp_path: Path) -> None:
    traced_bytes(tmp_path / "warm", 60)  # caches of types and of regular expressions
    few, many = traced_bytes(tmp_path / "few", 600), traced_bytes(tmp_path / "many", 2400)
    assert few.keys() == many.keys() and len(few) == 3
    growth = {part: many[part] / few[part] for part in few}
    assert max(growth.values()) <= MAX_GROWTH, growth


def test_the_bench_leaves_every_record_once_and_its_bill_told_apart(tmp_path: Path) -> None:
    """Else flat memory would be the memory of a driver that loses records."""
    bench = DriverBench(root=tmp_path, num_records=900)
    run = tmp_path / "r"
    bills = []
    for _ in bench.parts():
        samples = [line["item_id"] for line in read_lines(run / "arms/a/samples.jsonl")]
        assert samples == [f"item-{n}" for n in range(len(samples))]
        prompts = [line["prompt_sha256"] for line in read_lines(run / "prompts.jsonl")]
        assert len(set(prompts)) == len(prompts) == len(samples)
        bills.append((len(samples), *_tokens(run)))
    # An invocation states the whole bill: what earlier ones paid, and what it paid itself.
    assert bills == [(600, 0, 60_000), (900, 60_000, 30_000), (900, 90_000, 0)]


def _tokens(run: Path) -> tuple[int, int]:
    """Reused ones and paid ones, of the last attempt's statement of the last invocation."""
    found = {True: 0, False: 0}
    for line in read_lines(run / "journal.jsonl"):
        if line["event"] in ("run_started", "job_started"):
            found = {True: 0, False: 0}
        elif line["event"] == "ledger":
            found[line["data"]["is_reused"]] += line["data"]["tokens"]
    return found[True], found[False]


@pytest.mark.slow
def test_the_process_stays_as_large(tmp_path: Path) -> None:
    """All memory of the process, Python's and the rest. A million records: see driver_memory.py."""
    few, many = (_process_bytes(number) for number in (1_000, 30_000))
    assert many <= MAX_GROWTH * few, f"{many / few:.2f} times {few:,} bytes"


def _process_bytes(num_records: int) -> int:
    command = [sys.executable, "-m", "tests.launch.driver_memory", str(num_records)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(json.loads(line)["bytes"] for line in told.splitlines())


def test_a_prompt_is_known_until_another_takes_its_place() -> None:
    known = WrittenPrompts()
    assert known.add("a", "1") and not known.add("a", "1")
    assert known.add("b", "1"), "an arm of its own"
    others = sum(known.add("a", f"{n}") for n in range(2, 2 + NUM_PLACES))
    assert others == NUM_PLACES, "none was taken for another"
    again = sum(known.add("a", f"{n}") for n in range(2, 2 + NUM_PLACES))
    assert 0 < again < NUM_PLACES


@pytest.mark.parametrize("text", ["", "a\n", "half", "a\nb\nhalf", "a\n" + "x" * 200_000])
def test_a_broken_last_line_is_cut_and_no_other(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lines"
    path.write_text(text)
    cut_broken_line(path)
    assert path.read_text() == text[: text.rfind("\n") + 1]
