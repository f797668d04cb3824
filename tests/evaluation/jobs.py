"""Evaluation jobs for tests: an arm and a task in, records and the engine's count out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.choices import TaskKind
from conf.groups import EngineConfig, ModelConfig, TrainerConfig, ZeroConfig
from conf.methods import PromptMethod
from conf.records import AnswerRule, Item, LedgerLine, Progress, PromptText, SampleRecord
from conf.resolve import Arm
from evaluation.answering.asking import Emitted
from evaluation.answering.runner import EvaluateJob, evaluate
from evaluation.engines import build_engine
from evaluation.engines.base import Engine
from evaluation.prompts.rendering import Renderer
from evaluation.tasks import Task

REAL = {"name": "transformers"}


def make_arm(*, name: str = "arm", engine: dict[str, Any] | None = None, **method: Any) -> Arm:
    return Arm(
        name=name,
        method=PromptMethod(**method),
        model=ModelConfig(name="tiny", source="tiny", layout="plain"),
        engine=EngineConfig(**{"name": "scripted", "batch_size": 4, **(engine or {})}),
        trainer=TrainerConfig(),
        zero=ZeroConfig(),
        is_same_base=True,
    )


def make_engine(arm: Arm, model_dir: Path, renderer: Renderer, task: Task) -> Engine:
    return build_engine(
        arm.engine,
        model_dir=model_dir,
        adapter_dir=None,
        renderer=renderer,
        dtype="float32",
        device="cpu",
        threads=1,
        task=task,
    )


@dataclasses.dataclass
class Outcome:
    events: list[Emitted]
    engine: Engine

    @property
    def samples(self) -> list[SampleRecord]:
        return [e for e in self.events if isinstance(e, SampleRecord)]

    @property
    def rule(self) -> AnswerRule:
        (rule,) = (e for e in self.events if isinstance(e, AnswerRule))
        return rule

    @property
    def lines(self) -> list[LedgerLine]:
        return [e for e in self.events if isinstance(e, LedgerLine)]

    @property
    def prompts(self) -> dict[str, str]:
        return {e.prompt_sha256: e.text for e in self.events if isinstance(e, PromptText)}

    @property
    def notes(self) -> set[str]:
        return {e.note for e in self.events if isinstance(e, Progress)}

    def of(self, name: str) -> list[SampleRecord]:
        return [s for s in self.samples if s.set == name]


def run(
    arm: Arm,
    task: Task,
    model_dir: Path,
    renderer: Renderer,
    *,
    sets: tuple[str, ...] = ("validation", "test", "latency"),
    done: Sequence[SampleRecord] = (),
    **job: Any,
) -> Outcome:
    engine = make_engine(arm, model_dir, renderer, task)
    spec = EvaluateJob(name="job", arm=arm, sets=sets, **job)
    events = list(evaluate(spec, task=task, engine=engine, renderer=renderer, done=done))
    outcome = Outcome(events, engine)
    # The bill equals the engine's count to the token, whatever the job.
    assert sum(line.tokens for line in outcome.lines) == engine.rows_computed
    return outcome


def small(task: Task, *, validation: int = 14, test: int = 10) -> Task:
    counts = {"train": 140, "validation": validation, "test": test}
    return dataclasses.replace(
        task, items={split: items[: counts[split]] for split, items in task.items.items()}
    )


def multiple_choice(task: Task) -> Task:
    def choices(item: Item) -> Item:
        others = [label for label in task.labels if label != item.label]
        return dataclasses.replace(item, choices=(others[0], item.answer_key, others[1]))

    items = {split: tuple(map(choices, rows)) for split, rows in task.items.items()}
    return dataclasses.replace(task, kind=TaskKind.multiple_choice, labels=(), items=items)


def generation(task: Task) -> Task:
    def free(item: Item) -> Item:
        return dataclasses.replace(item, label=None, target=item.label)

    items = {split: tuple(map(free, rows)) for split, rows in task.items.items()}
    return dataclasses.replace(
        task, kind=TaskKind.generation, labels=(), label_words={}, items=items
    )


def long_items(task: Task, count: int) -> Task:
    tests = list(task.items["test"])
    for index in range(count):
        tests[index] = dataclasses.replace(tests[index], input="rain " * 3000)
    return dataclasses.replace(task, items={**task.items, "test": tuple(tests)})
