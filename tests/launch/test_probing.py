"""Probes in the plan: which arms are asked what, after what, and what their keys hang on."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import pytest

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from conf.resolve import resolve_arms
from evaluation.probes.probe_sets import probe_items
from launch.compose import compose_config
from launch.placement import Machine
from launch.plan import build_plan, with_reference
from launch.planned import ModelSource, Plan, TaskFacts
from launch.probing import num_asked

CPU = Machine(devices=2, devices_per_node=2, device="cpu", name="2 x test")
TASK = TaskFacts(sha256="t", kind=TaskKind.classification, wordings=("one", "two"))


@functools.cache
def plan(*overrides: str, task: TaskFacts = TASK) -> Plan:
    config = with_reference(compose_config(list(overrides)), task)
    arms = resolve_arms(config)
    models = {n: ModelSource(key="m", is_ready=True) for n in arms if n != "tfidf"}
    return build_plan(config, arms, task=task, models=models, plugins=(), machine=CPU)


def ids(found: Plan, kind: str) -> set[str]:
    return {job.arm or "" for job in found.jobs if job.kind == kind}


def test_every_arm_is_asked_under_other_wordings_and_each_weights_once_for_the_probes() -> None:
    found = plan("+exp=compare")
    prompted = {"zero_shot", "few_shot", "chain_of_thought", "role_play"}
    assert ids(found, "control") == prompted | {"lora", "full", "few_shot_on_lora"}
    assert ids(found, "probes") == ids(found, "probes_base") == {"lora", "full"}
    assert found.job("control:lora").depends_on == ("evaluate:lora",)
    base = found.job("probes_base:lora")
    assert found.job("probes_base:full").key == base.key != found.job("probes:lora").key


def test_without_other_wordings_only_the_steered_arms_are_asked_again() -> None:
    task = dataclasses.replace(TASK, wordings=())
    found = plan("+exp=compare", task=task)
    assert ids(found, "control") == {"zero_shot", "lora", "full", "few_shot_on_lora"}
    none = plan("+exp=compare", "probes.steering.items=0", task=task)
    assert ids(none, "control") == set()


def test_a_base_that_nothing_is_tuned_from_is_probed_by_the_first_that_prompts_it() -> None:
    found = plan("+exp=few_shot")
    assert ids(found, "probes_base") == {"zero_shot"} and not ids(found, "probes")


def test_keys_hang_on_what_is_asked() -> None:
    def changed(*overrides: str, task: TaskFacts = TASK) -> set[str]:
        before, after = plan("+exp=lora"), plan("+exp=lora", *overrides, task=task)
        assert [j.id for j in before.jobs] == [j.id for j in after.jobs]
        return {a.kind for a, b in zip(before.jobs, after.jobs, strict=True) if a.key != b.key}

    assert changed("probes.bias.items=4") == changed("probes.abstain.items=4")
    assert changed("probes.bias.items=4") == {"probes", "probes_base"}
    assert changed("probes.steering.items=4") == changed("probes.wording.items=5") == {"control"}
    assert changed(task=dataclasses.replace(TASK, wordings=("one",))) == {"control"}
    without = plan("+exp=lora", "probes.bias.items=0", "probes.abstain.items=0")
    assert not ids(without, "probes") and not ids(without, "probes_base")


def test_a_users_file_is_asked_and_its_content_is_in_the_key(tmp_path: Path) -> None:
    path = tmp_path / "bias.jsonl"
    rows = [
        {
            "input": f"Who was late ({i})?",
            "context": "A cook and a judge met.",
            "choices": ["cook", "judge", "unknown"],
            "label": "unknown",
            "stereotyped_choice": "cook",
            "text": f"a further column {i}",
        }
        for i in range(10)
    ]

    def keyed() -> str:
        plan.cache_clear()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return plan("+exp=lora", f"probes.bias.path={path}").job("probes:lora").key

    before = keyed()
    rows[3]["label"] = "judge"
    assert keyed() != before
    config = compose_config(["+exp=lora", f"probes.bias.path={path}", "probes.bias.items=4"])
    items = probe_items(config.probes)["bias"]
    assert len(items) == 4 and len({i.id for i in items} | {i.input for i in items}) == 8
    every = compose_config(["+exp=lora", f"probes.bias.path={path}"]).probes
    assert [i for i in probe_items(every)["bias"] if i in items] == list(items)
    assert {(i.split, i.slices["stereotype"]) for i in items} == {("bias", "cook")}


def test_a_file_without_stereotypes_and_one_that_is_not_there_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "bias.csv"
    path.write_text("input,label\nWho?,nobody\n")
    config = compose_config(["+exp=lora", f"probes.bias.path={path}"])
    with pytest.raises(DataError, match="stereotype"):
        probe_items(config.probes)
    missing = f"probes.abstain.path={tmp_path / 'no.csv'}"
    with pytest.raises(DataError, match="not a file"):
        plan("+exp=lora", missing)
    for bad in ("probes.bias.items=-1", "probes.wording.wordings=1"):
        with pytest.raises(ConfigError, match="probes"):
            compose_config(["+exp=lora", bad])


def test_what_is_asked_is_counted() -> None:
    config = compose_config(["+exp=lora", "probes.wording.wordings=4", "probes.bias.items=5"])
    counts = {k: num_asked(k, config) for k in ("probes", "probes_base", "control", "evaluate")}
    assert counts == {"probes": 21, "probes_base": 21, "control": 8 + 6 * 3, "evaluate": 0}
