"""`search=true`: what is searched of each arm that has no space of its own (pure)."""

from __future__ import annotations

import dataclasses
from typing import Any

from conf.choices import TaskKind
from conf.methods import (
    AnsweringMethod,
    FullMethod,
    InstructionMethod,
    LoraMethod,
    Method,
    PromptMethod,
)
from conf.schema import RunConfig
from evaluation.prepare import STYLES_WITHOUT_SHOTS
from evaluation.tasks import Task

# Around the defaults of training/job.py, half an order of magnitude and more to both sides.
LORA_RATES = [2e-4, 5e-3]
FULL_RATES = [2e-5, 5e-4]  # a tenth of LoRA's ("LoRA Without Regret", see training/job.py)
RANKS = [8, 16, 32]
SHOTS = [2, 4, 8, 16]
MAX_LABELS = 20  # in a wording; more of them are left to the task's own instruction


def with_default_spaces(config: RunConfig, task: Task) -> RunConfig:
    """The configuration with a random search of every arm that can be searched.

    A space that was typed stands as it is. Methods other than full fine-tuning and LoRA,
    checkpoints that other arms train and references are left as they are.
    """
    if not config.search:
        return config
    found = {
        name: space
        for name, method in config.arms.items()
        if name not in config.sweep.space and (space := default_space(method, task))
    }
    name = "random" if config.sweep.name == "none" else config.sweep.name
    sweep = dataclasses.replace(config.sweep, name=name, space={**found, **config.sweep.space})
    return dataclasses.replace(config, sweep=sweep)


def default_space(method: Method, task: Task) -> dict[str, Any]:
    """What is searched of one method on a task; empty: nothing."""
    if isinstance(method, LoraMethod) and not isinstance(method, InstructionMethod):
        return {"trainer.learning_rate": {"log_uniform": LORA_RATES}, "lora_rank": RANKS}
    if isinstance(method, FullMethod):
        return {"trainer.learning_rate": {"log_uniform": FULL_RATES}}
    if not isinstance(method, PromptMethod):
        return {}
    space: dict[str, Any] = {}
    instructions = wordings(method, task)
    if len(instructions) > 1:
        space["instruction"] = instructions
    shots = [count for count in SHOTS if count <= len(task.items["train"])]
    if method.num_shots and method.prompt not in STYLES_WITHOUT_SHOTS and len(shots) > 1:
        space["num_shots"] = shots
    return space


def wordings(method: AnsweringMethod, task: Task) -> list[str]:
    """The arm's own instruction and, where labels are chosen, others that name them."""
    own = method.instruction or task.instruction
    if task.kind is not TaskKind.classification or len(task.labels) > MAX_LABELS:
        return [own]
    labels = ", ".join(task.word(label) for label in task.labels)
    others = [
        f"{own} Answer with one of: {labels}.",
        f"Classify the text as one of: {labels}.",
        f"Read the text and choose the label that fits best. The labels are: {labels}.",
        f"{own} Think of what the text is for, then name the label: {labels}.",
    ]
    return list(dict.fromkeys([own, *others]))
