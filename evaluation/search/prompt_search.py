"""Search an arm's prompts: trials asked together about ever more items, the worse ones left out.

A trial is a complete arm: wording, shots, style, normalisation and what else differs. A rung is a
part of the validation items, in one order for all trials, each part containing those before; what
was computed for one rung is not computed for the next. Requests of all trials go to the engine
together, equal ones once, so that trials that differ in normalisation or calibration alone cost
what one of them costs.

A trial's value at a rung is its score by the best of its own ways to answer on these very items
(answering/rule_choice.py: plain sums, calibrations, normalisations, generating, as the arm allows
them), for that is how the arm will answer. Choosing among so few ways flatters all trials alike.
Where all trials score labels, the mean log-probability of the right ones breaks ties.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import JobFailed
from conf.records import LedgerLine, Progress
from conf.resolve import Arm
from conf.sweep_records import RungDecision, RungRecord, SweepChoice, TrialRecord
from evaluation.answering.bill import Bill
from evaluation.answering.runner import RECORDS_AT_ONCE
from evaluation.engines.base import Engine, GenerateRequest, ScoreRequest
from evaluation.prompts.rendering import Renderer
from evaluation.search.prompt_trial import Standing, TrialPrompt, in_order
from evaluation.search.shared_answers import Answer, Desk, Price, R, Seat, Shelf, Wanted
from evaluation.statistics import mean_interval
from evaluation.tasks import Task
from evaluation.tasks.defaults import LABEL_KINDS

SearchEvent = LedgerLine | Progress | RungRecord | RungDecision | TrialRecord | SweepChoice
Judge = Callable[[Sequence[RungRecord], Sequence[int]], RungDecision]
"""All records up to the rung to decide, and the trials that came to it or failed on their way."""
Choose = Callable[[Sequence[RungRecord]], SweepChoice | None]
"""All records to the best setting; None: all trials failed."""


@dataclass(kw_only=True, slots=True, frozen=True)
class PromptTrial:
    """One prompt to try: its arm, complete, and how the table of trials shows it (TrialRecord)."""

    number: int
    setting: int
    arm: Arm
    label: str
    seed: int = 0
    draw: int = 0
    values: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True, frozen=True)
class SearchJob:
    """What to search.

    name: the job's id on its ledger lines. rungs: shares of the validation items, lowest first; the
    last one is 1. num_watched: rungs at the start that drop nobody: their items are asked together
    with those of the rung after. seed: of the items' order. state_path: where answers are kept
    between attempts; written whenever some have been computed.
    """

    name: str
    arm: str
    trials: tuple[PromptTrial, ...]
    rungs: tuple[float, ...]
    state_path: Path
    num_watched: int = 0
    seed: int = 0
    devices: int = 1
    usd_per_device_second: float | None = None


def search_prompts(
    job: SearchJob,
    *,
    task: Task,
    engine: Engine,
    renderer: Renderer,
    judge: Judge,
    choose: Choose,
    done: Collection[object] = (),
) -> Iterator[SearchEvent]:
    """Ask, judge and choose; yields records in the order in which they should be written.

    A ledger line comes before what it paid for, and their sum is what the engine computed. A
    trial's tokens are its own rows, equal parts of the requests that it shares with others, and of
    the rows that belong to no request a part by its cached tokens; its seconds follow its tokens.
    What a killed attempt had computed and not yet saved is on the bill alone.

    Args:
        job: trials and rungs.
        task: validation items.
        engine: already answering with the arm's model and adapter, which all trials share.
        renderer: the model's.
        judge: decides after a rung.
        choose: chooses at the end.
        done: records of a killed attempt of this very job: they are neither made nor yielded again.

    Raises:
        JobFailed: every trial failed.
    """
    search = _Search(job, task=task, engine=engine, renderer=renderer, done=done)
    rungs = range(len(job.rungs))
    first = min(job.num_watched + 1, len(rungs))
    for group in (rungs[:first], *(rungs[k : k + 1] for k in rungs[first:])):
        if not all(rung in search.decisions for rung in group):
            yield from search.ask(group)
        for rung in group:
            if search.live:
                yield from search.judge(rung, judge)
    yield from search.end(choose)


class _Search:
    """The state of one search. live: trials that go on, by number."""

    def __init__(
        self,
        job: SearchJob,
        *,
        task: Task,
        engine: Engine,
        renderer: Renderer,
        done: Collection[object],
    ) -> None:
        self._job, self._engine = job, engine
        self._bill = Bill(
            job=job.name,
            arm=job.arm,
            engine=engine,
            devices=job.devices,
            usd_per_device_second=job.usd_per_device_second,
        )
        self._shelf = Shelf.read(job.state_path)
        self._items = in_order(task.items["validation"], seed=job.seed)
        self._metric = "accuracy" if task.kind in LABEL_KINDS else task.scoring
        trials = sorted(job.trials, key=lambda trial: trial.number)
        self._prompts = {
            trial.number: TrialPrompt(trial.arm, task=task, renderer=renderer) for trial in trials
        }
        self._has_ties_broken = all(prompt.has_tie_break for prompt in self._prompts.values())
        self._standings: dict[Seat, Standing | str] = {}
        self._records = {(r.rung, r.trial): r for r in done if isinstance(r, RungRecord)}
        self.decisions = {r.rung: r for r in done if isinstance(r, RungDecision)}
        self._told = {r.trial for r in done if isinstance(r, TrialRecord)}
        self.live = [trial.number for trial in trials]
        self._left: dict[int, tuple[str, str]] = {}  # trial -> status and reason

    def ask(self, rungs: Sequence[int]) -> Iterator[LedgerLine | Progress]:
        """Find how all live trials stand at some rungs, all their present calls at a time."""
        seats = [(trial, rung) for trial in self.live for rung in rungs]
        note = f"{len(self.live)} prompts at rung {rungs[-1] + 1} of {len(self._job.rungs)}"
        while seats:
            wanted: dict[str, Wanted] = {}
            waiting: list[Seat] = []
            for trial, rung in seats:
                desk = Desk((trial, rung), self._shelf.answers, wanted)
                items = self._items[: self._num_items(rung)]
                found = self._prompts[trial].standing(items, desk)
                if found is None:
                    waiting.append((trial, rung))
                else:
                    self._standings[trial, rung] = found
            if wanted:
                yield from self._compute(wanted, note=note)
            seats = waiting

    def _num_items(self, rung: int) -> int:
        return max(1, math.ceil(self._job.rungs[rung] * len(self._items) - 1e-9))

    def _compute(
        self, wanted: Mapping[str, Wanted], *, note: str
    ) -> Iterator[LedgerLine | Progress]:
        """Have the engine answer; every line precedes what needs it, and prices are kept."""
        own: dict[Seat, float] = defaultdict(float)
        cached: dict[Seat, float] = defaultdict(float)
        tokens = completion_tokens = 0
        rows, device_seconds = 0, 0.0
        for number, (key, answer) in enumerate(self._answers(wanted), start=1):
            self._shelf.answers[key] = answer
            payers = _payers(wanted[key].seats)
            for seat in payers:
                own[seat] += answer.computed_tokens / len(payers)
                cached[seat] += answer.cached_tokens / len(payers)
            tokens += answer.computed_tokens
            completion_tokens += getattr(answer, "completion_tokens", 0)
            if number % RECORDS_AT_ONCE and number < len(wanted):
                continue
            for line in self._bill.lines(
                "prompt_search", tokens=tokens, completion_tokens=completion_tokens
            ):
                rows += line.tokens
                device_seconds += line.device_seconds
                yield line
            tokens = completion_tokens = 0
            yield Progress(done=number, total=len(wanted), unit="answers", note=note)
        self._charge(own, cached, rows=rows, device_seconds=device_seconds)
        self._shelf.write(self._job.state_path)

    def _answers(self, wanted: Mapping[str, Wanted]) -> Iterator[tuple[str, Answer]]:
        """Keys with the engine's answers, in any order."""
        for is_winner_only in (False, True):
            scores = _by_name(
                (key, want.request)
                for key, want in wanted.items()
                if isinstance(want.request, ScoreRequest) and want.is_winner_only == is_winner_only
            )
            if scores:
                requests = [request for _, request in scores.values()]
                for result in self._engine.score(requests, winner_only=is_winner_only):
                    yield scores[result.id][0], result
        texts = _by_name(
            (key, want.request)
            for key, want in wanted.items()
            if isinstance(want.request, GenerateRequest)
        )
        if texts:
            for text in self._engine.generate([request for _, request in texts.values()]):
                yield texts[text.id][0], text

    def _charge(
        self,
        own: Mapping[Seat, float],
        cached: Mapping[Seat, float],
        *,
        rows: int,
        device_seconds: float,
    ) -> None:
        """Share out what a call to the engine took; whole tokens that add up to its rows."""
        shared = rows - math.fsum(own.values())
        by = cached if any(cached.values()) else dict.fromkeys(own, 1.0)
        total = math.fsum(by.values())
        upto, charged = 0.0, 0
        for seat in sorted(own):
            upto += own[seat] + shared * by[seat] / total
            price = self._shelf.prices.setdefault(seat, Price())
            tokens = round(upto) - charged
            charged += tokens
            price.tokens += tokens
            price.device_seconds += device_seconds * (tokens / rows if rows else 1 / len(own))

    def judge(self, rung: int, judge: Judge) -> Iterator[RungRecord | RungDecision]:
        """Tell how the live trials stand at a rung and who goes on, where it is not told yet."""
        decision = self.decisions.get(rung)
        if decision is None:
            for trial in self.live:
                if (rung, trial) not in self._records:
                    record = self._record(trial, rung)
                    self._records[rung, trial] = record
                    yield record
            known = [r for (at, _), r in sorted(self._records.items()) if at <= rung]
            decision = judge(known, tuple(self.live))
            reasons = {
                str(trial): standing
                for trial in decision.failed
                if isinstance(standing := self._standings.get((trial, rung)), str)
            }
            decision = dataclasses.replace(decision, reasons=decision.reasons | reasons)
            self.decisions[rung] = decision
            yield decision
        for status, trials in (("dropped", decision.drop), ("failed", decision.failed)):
            for trial in trials:
                self._left[trial] = status, decision.reasons.get(str(trial), "")
                self._prompts.pop(trial, None)
        self.live = [trial for trial in self.live if trial in decision.keep]

    def _record(self, trial: int, rung: int) -> RungRecord:
        standing = self._standings[trial, rung]
        known = standing if isinstance(standing, Standing) else Standing(())
        price = self._shelf.prices.get((trial, rung), Price())
        return RungRecord(
            arm=self._job.arm,
            trial=trial,
            rung=rung,
            step=0,
            metric=self._metric,
            value=mean_interval(known.scores, is_share=True),  # unknown where there are none
            per_item=known.scores,
            tie_break=known.tie_break if self._has_ties_broken else None,
            tokens=price.tokens,
            device_seconds=price.device_seconds,
        )

    def end(self, choose: Choose) -> Iterator[TrialRecord | SweepChoice]:
        """Every trial as a row, and the choice."""
        for trial in self._job.trials:
            if trial.number not in self._told:
                yield self._row(trial)
        choice = choose([record for _, record in sorted(self._records.items())])
        if choice is None:
            reasons = "; ".join(
                f"{trial.label}: {self._left[trial.number][1]}" for trial in self._job.trials
            )
            raise JobFailed(f"all {len(self._job.trials)} trials failed: {reasons}")
        yield choice

    def _row(self, trial: PromptTrial) -> TrialRecord:
        own = [record for (_, number), record in self._records.items() if number == trial.number]
        status, reason = self._left.get(trial.number, ("done", ""))
        device_seconds = math.fsum(record.device_seconds for record in own)
        price = self._job.usd_per_device_second
        return TrialRecord(
            arm=self._job.arm,
            trial=trial.number,
            setting=trial.setting,
            seed=trial.seed,
            draw=trial.draw,
            label=trial.label,
            values=trial.values,
            status=status,
            reason=reason,
            rung=max((r.rung for r in own if r.value.value is not None), default=None),
            tokens=sum(record.tokens for record in own),
            device_seconds=device_seconds,
            usd=None if price is None else price * device_seconds,
        )


def _payers(seats: Collection[Seat]) -> list[Seat]:
    """Of each trial the lowest rung that asks."""
    lowest = dict(sorted(seats, reverse=True))
    return list(lowest.items())


def _by_name(requests: Iterable[tuple[str, R]]) -> dict[str, tuple[str, R]]:
    """Requests under ids that no two of them share; the item can still be read off an id."""
    found: dict[str, tuple[str, R]] = {}
    uses = Counter[str]()
    for key, request in requests:
        number = uses[request.id]
        uses[request.id] += 1
        name = f"{request.id}.{number}" if number else request.id
        found[name] = key, dataclasses.replace(request, id=name)
    return found
