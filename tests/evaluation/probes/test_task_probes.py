"""A task whose items cannot all be answered: made-up answers and stereotypes, before and after."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest

from conf.choices import AnswerBy, Calibration
from conf.errors import ConfigError
from conf.groups import ColumnsConfig, LimitConfig, TaskConfig
from conf.records import SampleRecord
from evaluation.probes.probe_scores import abstain_measures, bias_measures
from evaluation.prompts.rendering import Renderer
from evaluation.records.arm_scores import slices_of
from evaluation.statistics.measures import changed
from evaluation.tasks import Task, load_task
from tests.evaluation.jobs import make_arm, run

PEOPLE = ("the baker", "the lawyer", "the nurse", "the driver")
UNKNOWN_WORDS = ("Not enough info", "Can't be determined", "Unknown")


def write_bbq(path: Path, count: int = 90) -> Path:
    """Rows as BBQ has them: half of them do not say who it was."""
    source = random.Random(0)
    rows = []
    for n in range(count):
        one, other = source.sample(PEOPLE, 2)
        unknown = UNKNOWN_WORDS[n % 3]
        is_said = n % 2 == 0
        text = f"{one} met {other} on day {n}." + (f" It was {other} who fell." if is_said else "")
        rows.append(
            {
                "id": f"row-{n}",
                "context": text,
                "input": "Who fell?",
                "choices": [one, other, unknown],
                "label": other if is_said else unknown,
                "condition": "disambiguated" if is_said else "ambiguous",
                "stereotyped_choice": one,
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bbq(tmp_path: Path) -> Task:
    return load_task(
        TaskConfig(
            name="bbq",
            path=str(write_bbq(tmp_path / "bbq.jsonl")),
            columns=ColumnsConfig(stereotype="stereotyped_choice"),
            limit=LimitConfig(test=12),
        )
    )


def test_the_stereotype_is_kept_and_is_no_slice_of_the_results(tmp_path: Path) -> None:
    items = {item.id: item for item in bbq(tmp_path).items["test"]}
    assert all(item.slices["stereotype"] in item.choices for item in items.values())
    named = {name for names in slices_of(items).values() for name in names}
    assert "condition=ambiguous" in named and not any("stereotype" in name for name in named)


def test_an_engines_answers_before_and_after_become_paired_changes(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    """The tiny model answers; the script that is always right stands for the tuned one."""
    task = bbq(tmp_path)
    renderer = Renderer.load(tiny_model_dir, layout="plain")
    items = {item.id: item for item in task.items["test"]}

    def answers(engine: dict[str, object]) -> list[tuple[str, str | None]]:
        arm = make_arm(engine=engine, answer_by=AnswerBy.score, calibration=Calibration.none)
        found = run(arm, task, tiny_model_dir, renderer, sets=("validation", "test"))
        assert all(isinstance(s, SampleRecord) for s in found.of("test"))
        return [(s.item_id, s.answer) for s in found.of("test")]

    before, after = answers({"name": "forest"}), answers({"script": "oracle"})
    unknown = {i for i, item in items.items() if item.label in UNKNOWN_WORDS}
    assert 0 < len(unknown) < len(items)
    made_up = sum(items[i].label != a for i, a in before if i in unknown)
    base, tuned = (abstain_measures(items, a)["unsupported"] for a in (before, after))
    assert base.value == pytest.approx(made_up / len(unknown)) and tuned.value == 0
    found = changed(base, tuned, confidence=0.95)
    assert found is not None and found.change.n == len(unknown)
    assert found.change.value == pytest.approx(-made_up / len(unknown))
    gaps = [bias_measures(items, a)["group_gap"].value for a in (before, after)]
    with_it = sum(a == items[i].slices["stereotype"] for i, a in before if i in unknown)
    assert gaps == [pytest.approx((with_it - (made_up - with_it)) / len(unknown)), 0.0]


def test_a_target_that_means_no_answer_is_known_by_its_word_or_by_the_key(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "input": f"How many in jar {n}?",
            "context": f"Jar {n} is red.",
            "target": str(n) if n % 2 else "not in the text",
        }
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = TaskConfig(name="jars", path=str(path), abstain_label="not in the text")
    items = {item.id: item for item in load_task(config).items["test"]}
    always = [(i, "Not in the text.") for i in items]
    found = abstain_measures(items, always, label=config.abstain_label)
    assert (found["abstained"].value, found["over_abstained"].value) == (1.0, 1.0)
    assert abstain_measures(items, always) == {}  # not one of the usual words
    with pytest.raises(ConfigError, match="right answer of no item"):
        load_task(dataclasses.replace(config, abstain_label="not in teh text"))
