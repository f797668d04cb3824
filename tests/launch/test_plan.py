"""The plan is pure: which jobs, after what, and which keys change with what."""

from __future__ import annotations

import functools

import pytest

from conf.choices import TaskKind
from conf.errors import ConfigError
from conf.resolve import resolve_arms
from launch.compose import compose_config
from launch.placement import Machine
from launch.plan import build_plan, with_reference
from launch.planned import ModelSource, Plan, TaskFacts

CPU = Machine(devices=2, devices_per_node=2, device="cpu", name="2 x test")
TASK = TaskFacts(sha256="t", kind=TaskKind.classification)


@functools.cache
def plan(*overrides: str, task: TaskFacts = TASK, machine: Machine = CPU, model: str = "m") -> Plan:
    config = with_reference(compose_config(list(overrides)), task)
    arms = resolve_arms(config)
    models = {n: ModelSource(key=model, is_ready=True) for n in arms if n != "tfidf"}
    return build_plan(config, arms, task=task, models=models, plugins=(), machine=machine)


def keys(found: Plan) -> dict[str, str]:
    return {j.id: j.key for j in found.jobs}


def changed(*overrides: str, base: tuple[str, ...] = ("+exp=compare",)) -> set[str]:
    before, after = keys(plan(*base)), keys(plan(*base, *overrides))
    assert before.keys() == after.keys()
    return {n for n in before if before[n] != after[n]}


def test_compare_has_every_job_once_after_what_it_needs() -> None:
    found = plan("+exp=compare")
    seen: set[str] = set()
    for job in found.jobs:
        assert set(job.depends_on) <= seen, f"{job.id} stands before what it needs"
        seen.add(job.id)
    assert len(seen) == len(found.jobs)
    assert {"evaluate:few_shot_on_lora", "train:lora", "reference:tfidf"} <= seen
    assert found.job("evaluate:few_shot_on_lora").depends_on == ("train:lora",)
    assert all(j.is_exclusive == (j.kind == "latency") for j in found.jobs)


def test_the_same_command_has_the_same_keys() -> None:
    assert keys(plan("+exp=compare")) == keys(plan("+exp=compare"))


def test_keys_change_with_what_determines_records_and_nothing_else() -> None:
    lora = {"train:lora", "curve:lora:0", "evaluate:lora", "latency:lora", "control:lora"}
    on_lora = {f"{kind}:few_shot_on_lora" for kind in ("evaluate", "latency", "control")}
    general = {"general:lora", "probes:lora"}
    assert changed("arms.lora.trainer.learning_rate=1e-5") == lora | on_lora | general
    assert changed("arms.few_shot.draw=1") == {"evaluate:few_shot", "latency:few_shot"}
    assert changed("arms.lora.calibration=none") == lora - {"train:lora"}
    for nothing in (
        "decision.requests_per_month=1",
        "pricing=h100_hour",
        "run.name=x",
        "report.text=none",
        "tracking=none",
        "budget.max_usd=1",
    ):
        assert changed(nothing) == set()


def test_the_best_checkpoint_is_another_one_to_answer_with_but_no_other_training() -> None:
    base = ("+exp=compare", "trainer.num_points=3")
    before, after = plan(*base), plan(*base, "arms.lora.trainer.keep=best")
    old, new = keys(before), keys(after)
    answers = ("evaluate", "latency", "control")
    expected = {f"{k}:{a}" for k in answers for a in ("lora", "few_shot_on_lora")}
    expected |= {"general:lora", "probes:lora"}
    assert {n for n in old if old[n] != new[n]} == expected
    # The last checkpoint is scored before one is chosen; who answers with it waits for that.
    assert new.keys() - old.keys() == {"curve:lora:2"}
    judges = {f"curve:lora:{n}" for n in range(3)}
    for name in ("evaluate:lora", "evaluate:few_shot_on_lora", "general:lora"):
        assert judges | {"train:lora"} <= set(after.job(name).depends_on)
        assert not judges & set(before.job(name).depends_on)
    assert not any(n.startswith("curve:lora") for n in after.job("evaluate:full").depends_on)
    seen: set[str] = set()
    for job in after.jobs:
        assert set(job.depends_on) <= seen, f"{job.id} stands before what it needs"
        seen.add(job.id)


def test_what_decides_between_checkpoints_is_in_the_key_of_what_stands_on_the_best() -> None:
    base = ("+exp=compare", "trainer.keep=best")
    on_lora = {"evaluate:few_shot_on_lora", "latency:few_shot_on_lora"}
    # Another prompt of the tuned arm's own scores its checkpoints in another way.
    assert on_lora <= changed("arms.lora.calibration=none", base=base)
    assert not on_lora & changed("arms.lora.calibration=none")


def test_how_states_are_kept_changes_no_key() -> None:
    for key in ("keep_states=3", "state_every_steps=5"):
        assert changed(f"trainer.{key}") == set()
        assert changed(f"arms.lora.trainer.{key}") == set()


def test_equal_arms_share_their_jobs_under_other_names() -> None:
    base = ("+exp=zero_shot", "+method@arms.again=zero_shot")
    found = keys(plan(*base))
    assert found["evaluate:again"] == found["evaluate:zero_shot"]
    assert "evaluate:zero_shot" in plan(*base).job("evaluate:again").depends_on


def test_another_task_or_model_shares_nothing() -> None:
    base = keys(plan("+exp=lora"))
    other_task = keys(plan("+exp=lora", task=TaskFacts(sha256="u", kind=TaskKind.classification)))
    other_model = keys(plan("+exp=lora", model="n"))
    # The general set is another question than the task: a base model is asked it once for all.
    same = {n for n in base if base[n] == other_task[n]}
    assert same == {"general_base:lora", "probes_base:lora"}
    assert {n for n in base if base[n] == other_model[n]} == {"reference:tfidf"}


def test_latency_alone_depends_on_the_machine() -> None:
    other = Machine(devices=2, devices_per_node=2, device="cpu", name="2 x other")
    before, after = keys(plan("+exp=zero_shot")), keys(plan("+exp=zero_shot", machine=other))
    assert {n for n in before if before[n] != after[n]} == {"latency:zero_shot"}


def test_a_model_that_is_not_ready_is_made_first_and_once() -> None:
    config = compose_config(["+exp=compare"])
    arms = resolve_arms(config)
    models = {n: ModelSource(key="m" * 64, is_ready=False) for n in arms}
    found = build_plan(config, arms, task=TASK, models=models, plugins=(), machine=CPU)
    assert [j.id for j in found.jobs if j.kind == "model"] == ["model:mmmmmmmm"]
    assert all(
        "model:mmmmmmmm" in j.depends_on
        for j in found.jobs
        if j.kind in ("rows", "train", "evaluate", "curve")
    )


def test_tfidf_stands_beside_every_classification_and_nowhere_else() -> None:
    generation = TaskFacts(sha256="t", kind=TaskKind.generation)
    assert "reference:tfidf" in keys(plan("+exp=zero_shot"))
    assert "reference:tfidf" not in keys(plan("+exp=zero_shot", task=generation))


@pytest.mark.parametrize(
    ("machine", "override", "devices"),
    [
        (CPU, "trainer.seed=0", 2),
        (CPU, "cluster.workers=2", 2),
        (Machine(devices=8, devices_per_node=8, device="cuda", name="g"), "trainer.seed=0", 8),
        (Machine(devices=8, devices_per_node=8, device="cuda", name="g"), "cluster.workers=4", 4),
    ],
)
def test_a_training_reserves_what_its_workers_use(
    machine: Machine, override: str, devices: int
) -> None:
    assert plan("+exp=lora", override, machine=machine).job("train:lora").devices == devices


def test_an_arm_on_a_prompted_arm_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"arms\.x\.on"):
        resolve_arms(
            compose_config(["+exp=zero_shot", "+method@arms.x=few_shot", "arms.x.on=zero_shot"])
        )


def test_another_mix_is_another_training_and_nothing_else() -> None:
    config = compose_config(["+exp=instruction"])
    arms = resolve_arms(config)
    models = {n: ModelSource(key="m" * 64, is_ready=True) for n in arms}

    def keys_of(sha256: str) -> dict[str, str]:
        mixes = {"instruction": sha256}
        return keys(
            build_plan(config, arms, task=TASK, models=models, plugins=(), machine=CPU, mixes=mixes)
        )

    one, other = keys_of("a"), keys_of("b")
    changes = {name for name in one if one[name] != other[name]}
    assert {"rows:instruction", "train:instruction", "evaluate:instruction"} <= changes
    assert all(name.endswith(":instruction") or ":instruction:" in name for name in changes)
    assert not {name for name in changes if name.startswith(("general_base", "instructions_base"))}
    assert one["instructions_base:lora"] == one["instructions_base:instruction"]


def test_each_tuned_model_and_its_base_are_asked_the_general_set() -> None:
    found = plan("+exp=compare")
    asked = {j.id for j in found.jobs if j.kind in ("general", "general_base")}
    assert asked == {f"{k}:{a}" for k in ("general", "general_base") for a in ("lora", "full")}
    assert found.job("general:full").depends_on == ("train:full",)
    base, again = found.job("general_base:lora"), found.job("general_base:full")
    assert base.key == again.key and again.depends_on == (base.id,)
    assert found.job("general:lora").key != base.key


def test_the_general_set_can_be_left_out_and_its_size_is_in_the_key() -> None:
    without = plan("+exp=lora", "general.items=0")
    assert not [j for j in without.jobs if j.kind.startswith("general")]
    small, large = (plan("+exp=lora", f"general.items={n}") for n in (20, 40))
    assert small.job("general_base:lora").key != large.job("general_base:lora").key
    assert small.job("evaluate:lora").key == large.job("evaluate:lora").key
    with pytest.raises(ConfigError, match="general.items"):
        compose_config(["+exp=lora", "general.items=121"])
