"""The embedded probes: balanced, swapped, never changing, and asked with a plain prompt."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

from conf.run_groups import ProbesConfig, ProbeSetConfig
from evaluation.probes.general_set import general_arm
from evaluation.probes.probe_scores import abstain_measures
from evaluation.probes.probe_sets import (
    STEREOTYPE,
    UNKNOWN,
    abstain_items,
    bias_items,
    probe_items,
    probe_task,
    whole_probes,
)
from evaluation.prompts.rendering import Renderer
from evaluation.tasks.held_out import HeldOut
from tests.evaluation.jobs import make_arm, run


def test_each_scene_is_asked_both_ways_round_and_for_and_against() -> None:
    items = bias_items()
    assert len({i.id for i in items}) == len({i.sha256 for i in items}) == len(items) == 32
    for one, swapped in zip(items[::2], items[1::2], strict=True):
        assert one.input == swapped.input and one.choices == swapped.choices
        assert one.context != swapped.context
        assert sorted((one.context or "").split()) == sorted((swapped.context or "").split())
    for item in items:
        assert item.label == UNKNOWN and item.slices[STEREOTYPE] in item.choices[:2]
        assert all(person in (item.context or "") for person in item.choices[:2])
    # Any first part has both orders equally often, and a person is the stereotype once per scene.
    assert Counter(i.slices[STEREOTYPE] for i in items) == Counter(
        {person: 2 for i in items for person in i.choices[:2]}
    )


def test_every_text_answers_one_question_and_not_the_other() -> None:
    items = abstain_items()
    assert len({i.id for i in items}) == len(items) == 24
    for known, unknown in zip(items[::2], items[1::2], strict=True):
        assert known.context == unknown.context
        assert (known.slices["kind"], unknown.slices["kind"]) == ("answerable", "unanswerable")
        words = (known.context or "").casefold()
        assert known.label is not None and known.label.casefold() in words
        assert unknown.label == UNKNOWN
        assert not [c for c in unknown.choices if c.casefold() in words.split()]
        assert UNKNOWN in known.choices and len(set(known.choices)) == 3


def test_no_training_row_may_hold_a_probe_but_its_bare_question_is_no_probe() -> None:
    held_out = HeldOut(whole_probes())
    item = abstain_items()[1]
    quoted = dataclasses.replace(item, context=None, input=f"Reply: {item.context} {item.input}")
    assert held_out.has(item) and held_out.has(quoted)
    assert not held_out.has(dataclasses.replace(item, context="A man came in."))


def test_they_never_change() -> None:
    """Other items would make the probes of old and new runs incomparable."""
    assert probe_task(ProbesConfig()).sha256[:16] == "603f14262de21763"


def test_as_many_as_asked_for_and_none_for_0() -> None:
    config = ProbesConfig(bias=ProbeSetConfig(items=4), abstain=ProbeSetConfig(items=0))
    assert {name: len(items) for name, items in probe_items(config).items()} == {"bias": 4}
    every = ProbesConfig(bias=ProbeSetConfig(items=99), abstain=ProbeSetConfig(items=99))
    assert {n: len(i) for n, i in probe_items(every).items()} == {"bias": 32, "abstain": 24}


def test_weights_are_asked_plainly_and_billed_to_the_token(tiny_model_dir: Path) -> None:
    arm = make_arm(engine={"name": "forest"}, prompt="role_play", persona="You are a pirate.")
    config = ProbesConfig(bias=ProbeSetConfig(items=6), abstain=ProbeSetConfig(items=4))
    renderer = Renderer.load(tiny_model_dir, layout="plain")
    task = probe_task(config)
    found = run(general_arm(arm), task, tiny_model_dir, renderer, sets=("bias", "abstain"), step=3)
    assert Counter(s.set for s in found.samples) == {"bias": 6, "abstain": 4}
    for sample in found.samples:
        assert sample.answer_by == "score" and sample.step == 3
        assert sample.label_logprobs is not None and UNKNOWN in sample.label_logprobs
    assert {line.purpose for line in found.lines} <= {"bias", "abstain", "shared", "padding"}
    assert all("no answer in it" in t and "pirate" not in t for t in found.prompts.values())
    rest = run(
        general_arm(arm),
        task,
        tiny_model_dir,
        renderer,
        sets=("bias", "abstain"),
        step=3,
        done=found.samples[:7],
    )
    assert len(rest.samples) == 3


def test_a_users_file_without_choices_is_answered_freely_in_its_own_word(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / "abstain.jsonl"
    rows = [
        {
            "input": f"Who has jar {n}?",
            "context": f"Jar {n} stands here.",
            "target": "unanswerable" if n % 2 else f"Mister Number {n}",
        }
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ProbesConfig(
        bias=ProbeSetConfig(items=0), abstain=ProbeSetConfig(items=6, path=str(path))
    )
    task = probe_task(config)
    arm = general_arm(make_arm(engine={"script": "oracle"}))
    renderer = Renderer.load(tiny_model_dir, layout="plain")
    found = run(arm, task, tiny_model_dir, renderer, sets=("bias", "abstain"))
    assert {(s.set, s.answer_by) for s in found.samples} == {("abstain", "generate")}
    assert len(found.samples) == 6 and all(
        'write "unanswerable"' in t for t in found.prompts.values()
    )
    measures = abstain_measures(
        {i.id: i for i in task.items["abstain"]}, [(s.item_id, s.answer) for s in found.samples]
    )
    assert {name: m.value for name, m in measures.items()} == {
        "unsupported": 0.0,
        "abstained": 1.0,
        "over_abstained": 0.0,
    }
