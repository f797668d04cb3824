"""A search of prompts against each prompt asked alone, sets of prefixes, and the hook's rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch

from conf.choices import AnswerBy, Calibration, Normalisation
from conf.errors import DataError, JobFailed
from conf.records import LedgerLine, Measured, SampleRecord
from conf.resolve import Arm
from conf.sweep_records import RungDecision, RungRecord, SweepChoice, TrialRecord
from evaluation.answering.calls import CallMaker
from evaluation.engines.base import GenerateRequest, ScoreRequest
from evaluation.prompts.rendering import Renderer
from evaluation.search.prompt_search import PromptTrial, SearchJob, search_prompts
from evaluation.search.prompt_trial import in_order, right_logprob
from evaluation.search.shared_answers import Desk, Shelf, Wanted, request_key
from evaluation.tasks import Task
from tests.evaluation.jobs import (
    REAL,
    generation,
    make_arm,
    make_engine,
    multiple_choice,
    run,
    small,
)

FOREST = {"name": "forest"}
WORDINGS = ("Name the topic.", "What is this message about?", "Say the topic in one word, please.")
RUNGS = (0.2, 0.5, 1.0)


@pytest.fixture(scope="module")
def renderer(tiny_model_dir: Path) -> Renderer:
    return Renderer.load(tiny_model_dir, layout="plain")


@pytest.fixture(scope="module")
def task(topic_task: Task) -> Task:
    return small(topic_task)


def trials_of(methods: Sequence[dict[str, Any]], **engine: Any) -> tuple[PromptTrial, ...]:
    return tuple(
        PromptTrial(number=k, setting=k, arm=make_arm(engine=engine, **method), label=f"t{k}")
        for k, method in enumerate(methods)
    )


def halve(records: Sequence[RungRecord], trials: Sequence[int]) -> RungDecision:
    """The better half goes on, of all but the first rung; a plain rule of the test's own."""
    rung = max(record.rung for record in records)
    here = {r.trial: r.value.value for r in records if r.rung == rung and r.trial in trials}
    ranked = sorted((t for t in trials if here[t] is not None), key=lambda t: (-(here[t] or 0), t))
    keep = ranked if rung == 0 else ranked[: math.ceil(len(ranked) / 2)]
    return RungDecision(
        arm="arm",
        rung=rung,
        keep=tuple(sorted(keep)),
        drop=tuple(sorted(set(ranked) - set(keep))),
        failed=tuple(t for t in trials if here[t] is None),
        reasons={str(t): "worse" for t in ranked if t not in keep},
    )


def keep_all(records: Sequence[RungRecord], trials: Sequence[int]) -> RungDecision:
    decision = halve([r for r in records if r.rung == records[-1].rung], trials)
    keep = tuple(sorted((*decision.keep, *decision.drop)))
    return dataclasses.replace(decision, keep=keep, drop=(), reasons={})


def best(records: Sequence[RungRecord]) -> SweepChoice | None:
    last = max(r.rung for r in records)
    alive = [r for r in records if r.rung == last and r.value.value is not None]
    if not alive:
        return None
    first = max(alive, key=lambda r: (r.value.value, -r.trial))
    return SweepChoice(
        arm="arm",
        setting=first.trial,
        trials=(first.trial,),
        rung=last,
        metric=first.metric,
        value=first.value,
        trained_parameters=0,
    )


class Watched:
    """An engine whose calls are counted."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.calls: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def score(self, requests: Any, **options: Any) -> Any:
        self.calls.append(("score", len(requests)))
        return self.inner.score(requests, **options)

    def generate(self, requests: Any, **options: Any) -> Any:
        self.calls.append(("generate", len(requests)))
        return self.inner.generate(requests, **options)


@dataclasses.dataclass
class Found:
    events: list[Any]
    engine: Any
    rows: int = 0  # by a hook on the embedding

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    @property
    def rungs(self) -> dict[tuple[int, int], RungRecord]:
        return {(r.rung, r.trial): r for r in self.of(RungRecord)}


@dataclasses.dataclass
class Bench:
    """Runs searches in one directory of state."""

    task: Task
    model_dir: Path
    renderer: Renderer
    state: Path

    def search(
        self,
        trials: tuple[PromptTrial, ...],
        *,
        rungs: tuple[float, ...] = RUNGS,
        judge: Any = halve,
        done: Sequence[Any] = (),
        stop_after: int | None = None,
        num_watched: int = 1,
    ) -> Found:
        engine = Watched(make_engine(trials[0].arm, self.model_dir, self.renderer, self.task))
        job = SearchJob(
            name="search:arm",
            arm="arm",
            trials=trials,
            rungs=rungs,
            num_watched=min(num_watched, len(rungs) - 1),
            state_path=self.state,
            devices=2,
            usd_per_device_second=0.5,
        )
        found = Found([], engine)

        def hook(module: torch.nn.Module, inputs: Any) -> None:
            if isinstance(module, torch.nn.Embedding):
                found.rows += inputs[0].numel()

        handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
        try:
            events = search_prompts(
                job,
                task=self.task,
                engine=engine,
                renderer=self.renderer,
                judge=judge,
                choose=best,
                done=done,
            )
            for event in events:
                found.events.append(event)
                if stop_after is not None and len(found.events) == stop_after:
                    break
        finally:
            handle.remove()
        return found


@pytest.fixture
def bench(task: Task, tiny_model_dir: Path, renderer: Renderer, tmp_path: Path) -> Bench:
    return Bench(task, tiny_model_dir, renderer, tmp_path / "job" / "answers.jsonl")


def alone(bench: Bench, arm: Arm, count: int) -> list[float]:
    """The scores of the first items by the plain runner: it chooses a rule, then answers by it."""
    items = in_order(bench.task.items["validation"], seed=0)[:count]
    task = dataclasses.replace(bench.task, items={**bench.task.items, "validation": items})
    rule = run(arm, task, bench.model_dir, bench.renderer, sets=("validation",)).rule
    samples = run(arm, task, bench.model_dir, bench.renderer, sets=("validation",), rule=rule)
    final = {s.item_id: s for s in samples.of("validation") if s.answer or not s.error}

    def value(sample: SampleRecord) -> float:
        if sample.is_correct_calibrated is not None:
            return float(sample.is_correct_calibrated)
        return float(sample.score or 0.0)

    return [value(final[item.id]) for item in items]


METHODS: dict[str, list[dict[str, Any]]] = {
    "wordings": [{"instruction": text, "answer_by": AnswerBy.score} for text in WORDINGS],
    "shots and draws": [
        {"prompt": "few_shot", "num_shots": 3, "draw": 1},
        {"prompt": "few_shot", "num_shots": 2, "instruction": WORDINGS[1]},
        {},
    ],
    "styles": [
        {"prompt": "chain_of_thought", "max_thought_tokens": 5},
        {"prompt": "role_play"},
        {"answer_by": AnswerBy.generate},
    ],
}


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS.keys())
@pytest.mark.parametrize("engine", [FOREST, REAL], ids=["forest", "transformers"])
def test_a_trial_scores_as_it_does_alone(
    bench: Bench, methods: list[dict[str, Any]], engine: dict[str, Any]
) -> None:
    trials = trials_of(methods, **engine)
    found = bench.search(trials, judge=keep_all)
    sizes = [3, 7, 14]  # of 14 items
    for (rung, number), record in found.rungs.items():
        assert list(record.per_item) == alone(bench, trials[number].arm, sizes[rung])
        assert record.value.value == pytest.approx(fmean(record.per_item))
        assert record.metric == "accuracy" and record.step == 0
    assert len(found.rungs) == 9


@pytest.mark.parametrize("methods", METHODS.values(), ids=METHODS.keys())
def test_the_bill_is_what_a_hook_counts(bench: Bench, methods: list[dict[str, Any]]) -> None:
    found = bench.search(trials_of(methods, **FOREST))
    lines = found.of(LedgerLine)
    assert sum(line.tokens for line in lines) == found.rows == found.engine.rows_computed > 0
    assert {line.purpose for line in lines} <= {"prompt_search", "shared", "padding"}
    rows = found.of(TrialRecord)
    assert sum(row.tokens for row in rows) == found.rows
    seconds = sum(line.device_seconds for line in lines)
    assert sum(row.device_seconds for row in rows) == pytest.approx(seconds)
    assert all(row.usd == pytest.approx(row.device_seconds / 2) for row in rows)
    assert all(row.tokens == sum(r.tokens for (_, t), r in found.rungs.items() if t == row.trial)
               for row in rows)  # fmt: skip


def prefixes(requests: Sequence[ScoreRequest]) -> set[tuple[int, ...]]:
    found = set()
    for request in requests:
        prompt = request.prompt_ids
        found |= {prompt[:end] for end in range(1, len(prompt) + 1)}
        found |= {prompt + label[:end] for label in request.label_ids for end in range(len(label))}
    return found


def test_rows_are_the_distinct_prefixes_of_all_trials(bench: Bench) -> None:
    plain: dict[str, Any] = {"answer_by": AnswerBy.score, "calibration": Calibration.none}
    plain |= {"normalisation": Normalisation.sum}
    methods: list[dict[str, Any]] = [
        {**plain, "instruction": WORDINGS[0]},
        {**plain, "instruction": WORDINGS[0] + " One word."},
        {**plain, "instruction": WORDINGS[0], "prompt": "few_shot", "num_shots": 2},
    ]
    trials = trials_of(methods, **FOREST)
    found = bench.search(trials, rungs=(0.5, 1.0))  # the first is watched: one call for both
    requests = []
    for trial in trials:
        calls = CallMaker(trial.arm, task=bench.task, renderer=bench.renderer)
        for item in bench.task.items["validation"]:
            request = calls.make(calls.start(item, repeat=0), answer_by="score").request
            assert isinstance(request, ScoreRequest)
            requests.append(request)
    assert found.rows == len(prefixes(requests))
    assert found.engine.calls == [("score", len(requests))]


def test_no_rung_computes_what_another_has(bench: Bench) -> None:
    trials = trials_of(METHODS["wordings"], **FOREST)
    found = bench.search(trials)
    # 7 new items of 3 trials with 3 inputs without content each, then 7 of the half that is left.
    assert found.engine.calls == [("score", 3 * (7 + 3)), ("score", 2 * 7)]
    assert [len(d.keep) for d in found.of(RungDecision)] == [3, 2, 1]


def test_generating_and_thinking_trials_ask_together(bench: Bench) -> None:
    methods: list[dict[str, Any]] = [
        {"prompt": "chain_of_thought", "max_thought_tokens": 4},
        {},
        {"prompt": "role_play"},
    ]
    found = bench.search(trials_of(methods, **FOREST), rungs=(1.0,))
    kinds = [kind for kind, _ in found.engine.calls]
    # Scores of all, thoughts with answers that need none, then what thoughts lead to.
    assert kinds.count("score") <= 3 and kinds.count("generate") <= 3


def test_trials_that_compare_labels_otherwise_share_their_rows(bench: Bench) -> None:
    both: list[dict[str, Any]] = [{"answer_by": AnswerBy.score}]
    others = [
        *both,
        {**both[0], "normalisation": Normalisation.token},
        {**both[0], "calibration": Calibration.batch},
        {**both[0], "calibration": Calibration.contextual},
    ]
    one = bench.search(trials_of(both, **FOREST), judge=keep_all)
    bench.state.unlink()
    four = bench.search(trials_of(others, **FOREST), judge=keep_all)
    assert four.rows == one.rows > 0
    assert sum(row.tokens for row in four.of(TrialRecord)) == one.rows
    for trial in trials_of(others, **FOREST):
        assert list(four.rungs[2, trial.number].per_item) == alone(bench, trial.arm, 14)


def told(events: Sequence[Any]) -> list[Any]:
    """Records of a search without what they cost."""
    plain: list[Any] = []
    for event in events:
        if isinstance(event, (RungRecord, TrialRecord)):
            event = dataclasses.replace(event, tokens=0, device_seconds=0.0)
            event = dataclasses.replace(event, usd=0) if isinstance(event, TrialRecord) else event
            plain.append(event)
        elif isinstance(event, (RungDecision, SweepChoice)):
            plain.append(event)
    return plain


@pytest.mark.parametrize("methods", [METHODS["wordings"], METHODS["styles"]])
def test_a_search_killed_anywhere_goes_on(bench: Bench, methods: list[dict[str, Any]]) -> None:
    trials = trials_of(methods, **FOREST)
    whole = bench.search(trials)
    for stop in range(1, len(whole.events), max(1, len(whole.events) // 8)):
        bench.state.unlink(missing_ok=True)
        first = bench.search(trials, stop_after=stop)
        again = bench.search(trials, done=first.events)
        assert told([*first.events, *again.events]) == told(whole.events)
        assert sum(e.tokens for e in again.of(LedgerLine)) == again.rows
        if first.of(RungDecision):  # what a finished rung paid for is there
            new = first.of(RungDecision)[-1].rung == 0
            calls = whole.engine.calls if new else whole.engine.calls[1:]
            assert sum(n for _, n in again.engine.calls) <= sum(n for _, n in calls)
        both = Found([*first.events, *again.events], None)
        spent = sum(row.tokens for row in both.of(TrialRecord))
        assert spent == sum(record.tokens for record in both.of(RungRecord)) >= whole.rows


def test_a_finished_rung_costs_nothing_again(bench: Bench) -> None:
    trials = trials_of(METHODS["wordings"], **FOREST)
    whole = bench.search(trials)
    again = bench.search(trials, done=whole.of(RungDecision) + whole.of(RungRecord))
    assert again.rows == 0 and not again.engine.calls and not again.of(LedgerLine)
    assert again.of(TrialRecord) == whole.of(TrialRecord)
    lost = bench.search(trials)  # records lost, answers there
    assert lost.rows == 0 and told(lost.events) == told(whole.events)
    assert sum(row.tokens for row in lost.of(TrialRecord)) == whole.rows


def test_a_trial_that_cannot_be_asked_is_a_row(bench: Bench) -> None:
    methods: list[dict[str, Any]] = [
        {"instruction": "word " * 3000},
        {"prompt": "few_shot", "num_shots": 10_000},
        {"answer_by": AnswerBy.score},
    ]
    found = bench.search(trials_of(methods, **FOREST))
    rows = {row.trial: row for row in found.of(TrialRecord)}
    assert [rows[k].status for k in range(3)] == ["failed", "failed", "done"]
    assert "do not fit the context" in rows[0].reason and rows[0].rung is None
    assert "num_shots" in rows[1].reason and rows[1].tokens == 0
    assert found.of(SweepChoice)[0].trials == (2,)
    assert found.of(RungDecision)[0].failed == (0, 1)
    assert found.rungs[0, 0].value == Measured(n=0)


def test_all_trials_failing_fails_the_job(bench: Bench) -> None:
    trials = trials_of([{"instruction": "word " * 3000}, {"instruction": "x " * 4000}], **FOREST)
    with pytest.raises(JobFailed, match=r"all 2 trials failed: t0: .*fit.*; t1: .*fit"):
        bench.search(trials)


def test_a_few_long_items_of_a_small_rung_do_not_fail_a_trial(bench: Bench) -> None:
    first = in_order(bench.task.items["validation"], seed=0)[0]
    items = tuple(
        dataclasses.replace(item, input="rain " * 3000) if item.id == first.id else item
        for item in bench.task.items["validation"]
    )
    bench.task = dataclasses.replace(bench.task, items={**bench.task.items, "validation": items})
    found = bench.search(trials_of(METHODS["wordings"], **FOREST), judge=keep_all)
    assert {row.status for row in found.of(TrialRecord)} == {"done"}
    for (_, number), record in found.rungs.items():
        assert record.per_item[0] == 0.0, number


@pytest.mark.parametrize("shape", [multiple_choice, generation], ids=["choices", "generation"])
def test_other_kinds_of_task(bench: Bench, shape: Any) -> None:
    bench.task = shape(bench.task)
    trials = trials_of([{}, {"instruction": WORDINGS[1]}], **FOREST)
    found = bench.search(trials, judge=keep_all)
    assert sum(line.tokens for line in found.of(LedgerLine)) == found.rows
    for number in range(2):
        assert list(found.rungs[2, number].per_item) == alone(bench, trials[number].arm, 14)
    has_labels = shape is multiple_choice
    assert all((r.tie_break is not None) == has_labels for r in found.rungs.values())


def test_choices_without_content_go_with_their_items(bench: Bench) -> None:
    bench.task = multiple_choice(bench.task)
    methods: list[dict[str, Any]] = [
        {"answer_by": AnswerBy.score, "normalisation": Normalisation.pmi}
    ] * 2
    found = bench.search(trials_of(methods, **FOREST), rungs=(1.0,))
    # Both trials are equal: asked once. Of the 14 items' choices, 7 sets differ.
    assert found.engine.calls == [("score", 14 + 3 * 7)]
    assert list(found.rungs[0, 0].per_item) == alone(bench, trials_of(methods, **FOREST)[0].arm, 14)


def test_the_scripted_engine_is_searched_too(bench: Bench) -> None:
    methods: list[dict[str, Any]] = [{"instruction": text} for text in WORDINGS]
    found = bench.search(trials_of(methods, script="oracle"))
    assert {r.value.value for r in found.rungs.values()} == {1.0}
    assert sum(line.tokens for line in found.of(LedgerLine)) == found.engine.rows_computed
    assert found.of(SweepChoice)[0].trials == (0,)


def test_winner_only_has_no_tie_break(bench: Bench) -> None:
    methods: list[dict[str, Any]] = [
        {"instruction": text, "answer_by": AnswerBy.score} for text in WORDINGS[:2]
    ]
    found = bench.search(trials_of(methods, name="forest", winner_only=True), rungs=(1.0,))
    assert all(record.tie_break is None for record in found.rungs.values())
    arms = trials_of(methods, name="forest", winner_only=True)
    assert list(found.rungs[0, 1].per_item) == alone(bench, arms[1].arm, 14)


def record(target: str, sums: dict[str, float] | None) -> SampleRecord:
    return SampleRecord(
        arm="a", item_id="i", set="validation", target=target, label_logprobs=sums, answer="x"
    )


def test_ties_break_by_the_right_labels_share() -> None:
    sums = [{"x": math.log(0.6), "y": math.log(0.2)}, {"x": math.log(0.1), "y": math.log(0.3)}]
    records = [record("x", sums[0]), record("y", sums[1])]
    # Shares 0.75 and 0.25, 0.25 and 0.75: both labels have the mean 0.5, so offsets change nothing.
    assert right_logprob(records, num_items=2) == pytest.approx(math.log(0.75))
    assert right_logprob(records, num_items=3) < -20  # an item without an answer
    assert right_logprob([], num_items=1) < -60


def test_order_is_of_the_items_alone(task: Task) -> None:
    items = task.items["validation"]
    assert in_order(items[::-1], seed=1) == in_order(items, seed=1) != in_order(items, seed=2)
    assert [i for i in in_order(items, seed=1) if i in items[3:]] == list(
        in_order(items[3:], seed=1)
    )


def test_what_follows_from_a_guess_is_not_wanted() -> None:
    def ask(repeat: int, call: int, *prompt: int) -> GenerateRequest:
        return GenerateRequest(id=f"i|{repeat}|{call}", prompt_ids=prompt, max_new_tokens=2)

    wanted: dict[str, Wanted] = {}
    desk = Desk((0, 0), {}, wanted)
    before = desk.is_guessing
    list(desk.generate([ask(0, 0, 1), ask(1, 0, 2)]))  # of one call: neither follows from another
    list(desk.generate([ask(0, 1, 3), ask(2, 0, 4)]))
    assert desk.is_guessing and not before
    assert [want.request.prompt_ids for want in wanted.values()] == [(1,), (2,)]


def test_keys_tell_noise_apart_only_where_there_is_noise() -> None:
    greedy = GenerateRequest(id="a", prompt_ids=(1,), max_new_tokens=2, seed=1)
    assert request_key(greedy) == request_key(dataclasses.replace(greedy, id="b", seed=2))
    hot = dataclasses.replace(greedy, temperature=1.0)
    keys = {request_key(r) for r in (greedy, hot, dataclasses.replace(hot, seed=2))}
    assert len(keys) == 3
    score = ScoreRequest(id="a", prompt_ids=(1,), label_ids=((2,), (3,)))
    others = (
        dataclasses.replace(score, label_ids=((2, 3),)),
        dataclasses.replace(score, prompt_ids=(1, 2)),
    )
    assert (
        len({request_key(r) for r in (score, *others)} | {request_key(score, is_winner_only=True)})
        == 4
    )


def test_a_spoilt_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"seat": [0, 1], "price": {"tokens": 3, "device_seconds": 0.5}}\n{"key": 1}\n')
    with pytest.raises(DataError, match=r"answers\.jsonl:2"):
        Shelf.read(path)
    assert not Shelf.read(tmp_path / "none.jsonl").answers
