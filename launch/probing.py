"""Jobs that ask an arm, or its weights, what its task alone does not show (pure).

control: the arm with its own prompt, under other wordings and with instructions on single items.
probes, probes_base: its weights with a plain prompt, on the probes for bias and made-up answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from conf.hashing import sha256_of
from conf.records import Item
from conf.resolve import Arm
from conf.schema import RunConfig
from evaluation.probes.general_set import general_arm, general_items, general_task
from evaluation.probes.instructions import instruction_arm, instruction_task, requests
from evaluation.probes.probe_sets import probe_items, probe_task
from evaluation.probes.steering import STEERING, steering_items
from evaluation.probes.wordings import WORDING, further_wordings
from evaluation.tasks import Task
from evaluation.tasks.splits import sampled
from launch.planned import Job, Plan, TaskFacts

# Engines that only generate: what is answered by the probability of a choice is not asked of them.
GENERATING_ENGINES = ("openai", "vllm")


def control_job(
    evaluate: Job, *, arm: Arm, arms: Mapping[str, Arm], config: RunConfig, task: TaskFacts
) -> Job | None:
    """The job that asks an arm about some test items again; None where nothing is asked."""
    wording = [config.probes.wording.items, task.wordings] if _has_wordings(config, task) else None
    steering = config.probes.steering.items if is_steered(arm, arms) else 0
    if wording is None and not steering:
        return None
    asked = {"evaluate": evaluate.key, "wording": wording, "steering": steering}
    return Job(
        id=f"control:{arm.name}",
        kind="control",
        arm=arm.name,
        key=sha256_of({"kind": "control", **asked}),
        depends_on=(evaluate.id,),
        devices=evaluate.devices,
    )


def _has_wordings(config: RunConfig, task: TaskFacts) -> bool:
    return bool(config.probes.wording.items and task.wordings)


def is_steered(arm: Arm, arms: Mapping[str, Arm]) -> bool:
    """Tuned arms, prompts on top of them, and of each base model the first arm that prompts it."""
    if arm.is_tuned or arm.on is not None:
        return True
    return arm.name == next(n for n, other in arms.items() if _prompts_like(other, arm))


def _prompts_like(other: Arm, arm: Arm) -> bool:
    return other.kind == "prompt" and other.on is None and other.model == arm.model


def asks_probes(arm: Arm, arms: Mapping[str, Arm]) -> bool:
    """Whether an arm's job asks the probes of its weights.

    Tuned arms do, which ask their base too; a base that none is tuned from is asked by the first
    arm that prompts it.
    """
    if arm.engine.name in GENERATING_ENGINES:
        return False
    if arm.is_tuned:
        return True
    is_asked = any(other.is_tuned and other.model == arm.model for other in arms.values())
    is_prompt = arm.kind == "prompt" and arm.on is None
    return is_prompt and not is_asked and is_steered(arm, arms)


def wordings_of(task: Task, config: RunConfig) -> tuple[str, ...]:
    """The further wordings that arms are asked under."""
    return further_wordings(task, config.probes.wording.wordings - 1)


def asked(kind: str, *, arm: Arm, arms: Mapping[str, Arm], task: Task, config: RunConfig) -> Asked:
    """Whom a job of this kind asks, and what: the arm and the task, or others in their place."""
    match kind:
        case "general" | "general_base":
            return Asked(general_arm(arm), general_task(config.general.items))
        case "instructions" | "instructions_base":
            return Asked(instruction_arm(arm), instruction_task(config.general.instruction_items))
        case "probes" | "probes_base":
            return Asked(general_arm(arm), probe_task(config.probes))
        case "control":
            return Asked(arm, _control_task(task, config, is_steered=is_steered(arm, arms)))
    return Asked(arm, task)


def num_asked(kind: str, config: RunConfig) -> int:
    """Items that a job of this kind asks besides those of the task, at most."""
    probes = config.probes
    match kind.removesuffix("_base"):
        case "general":
            return config.general.items
        case "probes":
            return probes.bias.items + probes.abstain.items
        case "control":
            return probes.steering.items + probes.wording.items * (probes.wording.wordings - 1)
    return 0


@dataclasses.dataclass(slots=True, frozen=True)
class Asked:
    """Who answers what."""

    arm: Arm
    task: Task


def _control_task(task: Task, config: RunConfig, *, is_steered: bool) -> Task:
    tests = task.items["test"]
    items = {
        **task.items,
        WORDING: sampled(tests, config.probes.wording.items),
        STEERING: _steering(task, config) if is_steered else (),
    }
    return dataclasses.replace(task, items=items, instructions=wordings_of(task, config))


def _steering(task: Task, config: RunConfig) -> tuple[Item, ...]:
    return steering_items(task, sampled(task.items["test"], config.probes.steering.items))


def further_items(task: Task, plan: Plan, config: RunConfig) -> list[Item]:
    """Items that are no task items, which the jobs of a plan ask."""
    kinds = {job.kind for job in plan.jobs}
    items: list[Item] = []
    if "general" in kinds:
        items += general_items(config.general.items)
    if "instructions" in kinds:
        items += requests(is_test=True)[: config.general.instruction_items]
    if "probes_base" in kinds:
        items += [item for found in probe_items(config.probes).values() for item in found]
    if "control" in kinds:
        items += _steering(task, config)
    return items
