"""Rows of prompt searches: what 20 wordings cost with halving, in costs of one wording.

Both sides answer by our forest, on the same validation items: the peer is what a user without a
search pays, one wording asked about all of them. Rows are counted by a hook on the embedding.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.choices import AnswerBy, TaskKind
from conf.groups import EngineConfig, ModelConfig, TrainerConfig, ZeroConfig
from conf.methods import PromptMethod
from conf.records import AnswerRule, Item
from conf.resolve import Arm
from conf.sweep_records import SweepChoice
from conf.sweeps import HalvingConfig
from evaluation.answering.runner import EvaluateJob, evaluate
from evaluation.engines import build_engine
from evaluation.engines.base import Engine, ScoreRequest
from evaluation.prompts.rendering import Renderer
from evaluation.search.prompt_search import PromptTrial, SearchJob, search_prompts
from evaluation.tasks import Task, TaskFacts
from launch.search.halving import rung_shares
from launch.search.prompt_search import Rules, prompt_halving
from tests.benchmarks import ours
from tests.benchmarks.comparing import Setup
from tests.benchmarks.harness import SETTLE_SECONDS, Result, ratio_of
from tests.benchmarks.parity import Parity
from tests.benchmarks.workloads import WORDINGS, Row, load_rows

SEARCHES = {"wordings_20_halved": 16, "wordings_20_halved_zero_shot": 0}  # shots
# The prefix that an earlier run left is not there any more.
NOTHING_SHARED = ScoreRequest(id="other", prompt_ids=(5, 5), label_ids=((5,),))
MAX_COST, AIMED_COST = 6.0, 4.0  # in costs of one wording


@dataclass(kw_only=True, slots=True, frozen=True)
class Prompts:
    """The wordings as arms, and what answers them."""

    arms: tuple[Arm, ...]
    task: Task
    engine: Engine
    renderer: Renderer

    @classmethod
    def load(cls, setup: Setup, *, items: int, shots: int) -> Prompts:
        """The wordings and messages of the row `wordings_20`, in the model's own chat layout."""
        rows = load_rows("sms_spam", setup.data)
        splits = {"train": rows.train, "validation": rows.test[:items]}
        task = Task(
            name="sms_spam",
            kind=TaskKind.classification,
            scoring="exact",
            instruction=WORDINGS[0],
            labels=rows.labels,
            items={name: _items(name, of) for name, of in splits.items()},
            facts=TaskFacts(source=rows.source, is_synthetic=False),
            sha256="",
        )
        renderer = Renderer.load(setup.model_dir, layout="auto")
        engine = EngineConfig(name=setup.engine)
        built = build_engine(
            engine,
            model_dir=setup.model_dir,
            adapter_dir=None,
            renderer=renderer,
            dtype="float32",
            device="cpu",
            threads=setup.threads,
            task=None,
        )
        arms = tuple(_arm(wording, engine, shots=shots) for wording in WORDINGS)
        return cls(arms=arms, task=task, engine=built, renderer=renderer)

    def alone(self, arm: Arm) -> float:
        """The validation score of one wording, asked about all items."""
        job = EvaluateJob(name="alone", arm=arm, sets=("validation",))
        events = evaluate(job, task=self.task, engine=self.engine, renderer=self.renderer)
        (rule,) = [event for event in events if isinstance(event, AnswerRule)]
        return max(value.value or 0.0 for value in rule.validation.values())

    def searched(self) -> SweepChoice:
        """The search over all wordings with the rules of a run."""
        items = len(self.task.items["validation"])
        halving = prompt_halving(HalvingConfig(), num_items=items)
        trials = tuple(
            PromptTrial(number=k, setting=k, arm=arm, label=arm.answering.instruction or "")
            for k, arm in enumerate(self.arms)
        )
        rules = Rules(
            arm="prompt", settings={t.number: t.setting for t in trials}, halving=halving, caps={}
        )
        with tempfile.TemporaryDirectory() as scratch:
            job = SearchJob(
                name="search",
                arm="prompt",
                trials=trials,
                rungs=rung_shares(halving),
                num_watched=1,
                state_path=Path(scratch) / "answers.jsonl",
            )
            events = list(
                search_prompts(
                    job,
                    task=self.task,
                    engine=self.engine,
                    renderer=self.renderer,
                    judge=rules.judge,
                    choose=rules.choose,
                )
            )
        (choice,) = [event for event in events if isinstance(event, SweepChoice)]
        return choice


@dataclass(slots=True)
class Runs:
    """Seconds and rows of each side by round, and what the searches chose."""

    seconds: dict[str, list[float]]
    rows: dict[str, list[int]]
    choices: list[SweepChoice]

    @property
    def costs(self) -> dict[str, list[float]]:
        """Of the search, in those of one wording."""
        return {
            kind: [a / b for a, b in zip(of["ours"], of["one"], strict=True)]
            for kind, of in (("seconds", self.seconds), ("rows", self.rows))
        }


def halved_wordings(setup: Setup, key: str) -> list[Result]:
    """One row: the search against one wording, another in each round."""
    name, shots = key, SEARCHES[key]
    items, rounds = setup.cap(400, 3)
    prompts = Prompts.load(setup, items=items, shots=shots)
    runs = Runs({"ours": [], "one": []}, {"ours": [], "one": []}, [])
    for k in range(rounds):
        arm = prompts.arms[k * len(prompts.arms) // rounds]
        sides: dict[str, Callable[[], object]] = {
            "one": functools.partial(prompts.alone, arm),
            "ours": lambda: runs.choices.append(prompts.searched()),
        }
        for side in sides if k % 2 == 0 else reversed(sides):
            seconds, rows = _measured(prompts.engine, sides[side])
            runs.seconds[side].append(seconds)
            runs.rows[side].append(rows)
        line = ", ".join(f"{side} {of[-1]:.1f} s" for side, of in runs.seconds.items())
        print(f"  {name}, round {k + 1} of {rounds}: {line}", flush=True)
    return [_judged(name, prompts, runs, shots=shots)]


def _judged(name: str, prompts: Prompts, runs: Runs, *, shots: int) -> Result:
    """The ratio is that of all wordings, each asked about all items, to the search."""
    count, items = len(prompts.arms), len(prompts.task.items["validation"])
    costs = runs.costs
    chosen = runs.choices[0]
    gap = abs((chosen.value.value or 0.0) - prompts.alone(prompts.arms[chosen.setting]))
    is_same = gap == 0 and len({choice.setting for choice in runs.choices}) == 1
    result = Result(
        name=name,
        work=f"{count} wordings with halving, {shots} shots, {items} validation items",
        ours=statistics.median(costs["seconds"]),
        peer=float(count),
        peer_version="every wording asked about all items, as one is",
        ratio=ratio_of(costs["seconds"], [float(count)] * len(costs["seconds"])),
        floor=count / MAX_COST,
        aim=count / AIMED_COST,
        bound=None,
        unit="seconds of one wording",
        parity=Parity(
            checked=len(runs.choices),
            ok=is_same,
            worst=gap,
            why="" if is_same else "the choice does not score as it does alone, or changes",
        ),
        more={
            "cost": {kind: statistics.median(of) for kind, of in costs.items()},
            "rows": runs.rows,
            "seconds": runs.seconds,
            "items": items,
            "rounds": len(runs.choices),
            "chosen": prompts.arms[chosen.setting].answering.instruction,
            "chosen_value": chosen.value.value,
            "data": prompts.task.facts.source,
        },
    )
    result.judge()
    most = max(costs["rows"])
    if most > MAX_COST:
        result.failures.append(f"rows: {most:.3g} times those of a wording")
    return result


def _measured(engine: Engine, run: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and rows through the embedding."""
    list(engine.score([NOTHING_SHARED]))
    gc.collect()
    time.sleep(SETTLE_SECONDS)
    with ours.counting(engine) as counts:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started, counts.rows


def _arm(wording: str, engine: EngineConfig, *, shots: int) -> Arm:
    return Arm(
        name="prompt",
        method=PromptMethod(
            prompt="few_shot" if shots else "zero_shot",
            num_shots=shots,
            instruction=wording,
            answer_by=AnswerBy.score,
        ),
        model=ModelConfig(),
        engine=engine,
        trainer=TrainerConfig(),
        zero=ZeroConfig(),
        is_same_base=True,
    )


def _items(split: str, rows: Sequence[Row]) -> tuple[Item, ...]:
    return tuple(
        Item(
            id=f"{split}-{number}",
            split=split,
            input=row.text,
            sha256=hashlib.sha256(row.text.encode()).hexdigest(),
            label=row.label,
        )
        for number, row in enumerate(rows)
    )
