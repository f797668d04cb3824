"""Forgetting: base and tuned model on the same items, against a count by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from conf.hashing import plain
from conf.records import SampleRecord
from evaluation.probes.general_set import general_items
from evaluation.records.run_records import RunRecords, read_run
from evaluation.report.files import write_report
from evaluation.results.forgetting import all_forgetting
from evaluation.results.summary import summarise
from evaluation.statistics import paired_difference, wilson
from tests.evaluation import fake_run

ITEMS = general_items(40)
# 30 stay right, 6 are lost, 1 is gained, 3 stay wrong
BASE = [True] * 36 + [False] * 4
TUNED = [True] * 30 + [False] * 6 + [True] + [False] * 3


def answers(arm: str, right: list[bool], *, step: int | None) -> list[SampleRecord]:
    return [
        SampleRecord(
            arm=arm, item_id=item.id, set="general", step=step, answer="x", is_correct=is_right
        )
        for item, is_right in zip(ITEMS, right, strict=True)
    ]


def with_general(root: Path, arm: str, samples: list[SampleRecord]) -> None:
    with (root / f"arms/{arm}/samples.jsonl").open("a") as stream:
        stream.writelines(json.dumps(plain(s)) + "\n" for s in samples)
    with (root / "items.jsonl").open("a") as stream:
        stream.writelines(json.dumps(plain(i)) + "\n" for i in ITEMS)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> RunRecords:
    root = tmp_path_factory.mktemp("run")
    fake_run.write_spam_run(root, num_test=40)
    early = answers("lora", [False] * 40, step=30)  # an earlier checkpoint: not the one that counts
    with_general(
        root,
        "lora",
        [*answers("lora", BASE, step=None), *early, *answers("lora", TUNED, step=60)],
    )
    return read_run(root)


def test_the_change_is_paired_by_item(records: RunRecords) -> None:
    (found,) = all_forgetting(records)
    assert (found.arm, found.lost, found.gained) == ("lora", 6, 1)
    assert found.base == wilson(36, 40) and found.tuned == wilson(31, 40)
    assert found.change.value == pytest.approx(-5 / 40) and found.change.n == 40
    expected = paired_difference([float(t) for t in TUNED], [float(b) for b in BASE])
    assert (found.change.low, found.change.high) == (expected.low, expected.high)
    assert found.p_value == pytest.approx(2 * (1 + 7) / 2**7)  # exact McNemar, 1 of 7 discordant
    assert set(found.by_kind) == {"knowledge", "arithmetic", "copying", "words"}
    change = sum((m.value or 0.0) * (m.n or 0) for m in found.by_kind.values())
    assert change == pytest.approx(-5)


def test_an_arm_whose_base_was_not_asked_has_no_row(records: RunRecords) -> None:
    lora = records.arms["lora"]
    tuned_only = tuple(s for s in lora.samples if s.set != "general" or s.step is not None)
    arms = {**records.arms, "lora": dataclasses.replace(lora, samples=tuned_only)}
    assert all_forgetting(dataclasses.replace(records, arms=arms)) == ()


def test_the_arms_own_numbers_do_not_move(records: RunRecords, tmp_path: Path) -> None:
    fake_run.write_spam_run(tmp_path, num_test=40)
    before = summarise(read_run(tmp_path)).arms["lora"]
    assert summarise(records).arms["lora"] == before


def test_report_and_results_show_it(records: RunRecords, tmp_path: Path) -> None:
    paths = write_report(summarise(records), records, tmp_path)
    row = json.loads(paths.results_json.read_text())["forgetting"][0]
    assert row["arm"] == "lora" and row["change"]["value"] == pytest.approx(-0.125)
    text = paths.markdown.read_text()
    assert "## Forgetting" in text and "-12.5" in text and "6 / 1" in text
    assert 'id="forgetting"' in paths.html.read_text()
