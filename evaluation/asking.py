"""Ask an arm's prompts about items: all items' calls of one step go to the engine together."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from conf.choices import TaskKind
from conf.errors import JobFailed
from conf.records import AnswerRule, Item, LedgerLine, Progress, PromptText, SampleRecord
from evaluation.answers import read_answer
from evaluation.bill import Bill
from evaluation.calibration import best_label
from evaluation.calls import Call, CallMaker, Talk
from evaluation.engines.base import (
    Engine,
    GenerateRequest,
    GenerateResult,
    ScoreRequest,
    ScoreResult,
)
from evaluation.scoring import score
from evaluation.tasks import Task

MAX_FAILED_SHARE = 0.1

Emitted = SampleRecord | AnswerRule | LedgerLine | PromptText | Progress
_Key = tuple[str, str, int, int, bool, str]


@dataclass(kw_only=True, slots=True, frozen=True)
class Pass:
    """One pass over items. rule: how scores become calibrated answers; None: they do not yet."""

    set: str
    purpose: str
    answer_by: str
    items: Sequence[Item]
    rule: AnswerRule | None = None
    repeats: int = 1
    is_timed: bool = False


class Asker:
    """Answers the passes of one job.

    What an earlier attempt has recorded is taken from there instead of computed and recorded
    again; so is a thought that an earlier pass has had about the same item and prompt.
    """

    def __init__(
        self,
        calls: CallMaker,
        *,
        task: Task,
        engine: Engine,
        bill: Bill,
        batch_size: int,
        common: Mapping[str, Any],
        done: Collection[SampleRecord] = (),
    ) -> None:
        """common: fields that all the job's records share. done: an earlier attempt's records."""
        self._calls = calls
        self._task = task
        self._engine = engine
        self._bill = bill
        self._batch_size = batch_size
        self._common = dict(common)
        self._known = {_record_key(record): record for record in done if record.error is None}
        self._written = {record.prompt_sha256 for record in done}
        self.finals: list[SampleRecord] = []  # the last pass's answers, one per item and repeat

    def run(self, work: Pass) -> Iterator[Emitted]:
        """Ask all items; yields prompts when new, and bill lines before what they paid for.

        Raises:
            JobFailed: over 10% of the items cannot be answered.
        """
        self.finals = []
        talks = [
            self._calls.start(item, repeat=repeat)
            for repeat in range(work.repeats)
            for item in work.items
        ]
        live = talks
        while live:
            ready: list[Call] = []
            for talk in live:
                call = self._calls.make(talk, answer_by=work.answer_by)
                if call.sha256 not in self._written:
                    self._written.add(call.sha256)
                    arm = str(self._common["arm"])
                    yield PromptText(prompt_sha256=call.sha256, arm=arm, text=call.text)
                known = self._known.get(_call_key(work, call))
                if known is not None:
                    self._reuse(known, talk)
                elif call.error is not None:
                    yield self._failure(work, call, error=call.error)
                else:
                    ready.append(call)
            self._check_failures(work)
            yield from self._ask(work, ready, num_talks=len(talks))
            self._check_failures(work)
            live = [talk for talk in live if talk.call is not None]

    def _ask(self, work: Pass, calls: Sequence[Call], *, num_talks: int) -> Iterator[Emitted]:
        """Put calls to the engine; each batch of records follows the lines that pay for it."""
        by_id = {call.request.id: call for call in calls}
        waiting: list[SampleRecord] = []
        for result in self._results(calls, is_timed=work.is_timed):
            call = by_id.pop(result.id)
            record = self._record(work, call, result)
            if record.error is None and call.talk.call is not None:
                self._known[_record_key(record)] = record
            waiting.append(record)
            if len(waiting) >= self._batch_size or not by_id:
                yield from self._bill.lines(
                    work.purpose,
                    tokens=sum(record.computed_tokens for record in waiting),
                    completion_tokens=sum(record.completion_tokens for record in waiting),
                )
                yield from waiting
                waiting = []
                note = f"{work.set} by {work.answer_by}"
                yield Progress(done=len(self.finals), total=num_talks, unit="answers", note=note)
        assert not by_id, "an engine answers every request"

    def _results(
        self, calls: Sequence[Call], *, is_timed: bool
    ) -> Iterator[ScoreResult | GenerateResult]:
        requests = [call.request for call in calls]
        scores = [request for request in requests if isinstance(request, ScoreRequest)]
        if scores:
            yield from self._engine.score(scores, timed=is_timed)
        generations = [request for request in requests if isinstance(request, GenerateRequest)]
        if generations:
            yield from self._engine.generate(generations, timed=is_timed)

    def _record(self, work: Pass, call: Call, result: ScoreResult | GenerateResult) -> SampleRecord:
        """The record of one call; the talk goes on with what came out of it."""
        if result.error is not None:
            return self._failure(work, call, error=result.error)
        base = replace(
            self._base(work, call),
            cached_tokens=result.cached_tokens,
            computed_tokens=result.computed_tokens,
            first_token_seconds=result.first_token_seconds,
            total_seconds=result.total_seconds,
        )
        if isinstance(result, ScoreResult):
            record = self._scored(base, call, result, rule=work.rule)
        else:
            record = self._generated(base, call, result)
        if call.talk.call is None:
            self.finals.append(record)
        return record

    def _generated(self, base: SampleRecord, call: Call, result: GenerateResult) -> SampleRecord:
        """A generated call: a thought, or the answer when the style is over."""
        base = replace(base, completion=result.text, completion_tokens=result.completion_tokens)
        text = call.talk.send(result.text)
        if text is None:
            return base
        item = call.talk.item
        answer = read_answer(text, item, self._task)
        found = score(answer, item, self._task, completion=text)
        return replace(
            base,
            answer=answer,
            score=found.score,
            is_correct=found.is_correct,
            is_format_valid=found.is_format_valid,
        )

    def _scored(
        self, base: SampleRecord, call: Call, result: ScoreResult, *, rule: AnswerRule | None
    ) -> SampleRecord:
        """A scored call. The label is the answer, whatever the style makes of its word."""
        item, request = call.talk.item, call.request
        assert isinstance(request, ScoreRequest), "scores belong to score requests"
        sums = dict(zip(call.labels, result.label_logprobs, strict=True))
        values = sums
        if self._task.kind is TaskKind.multiple_choice:  # a long choice is not a less likely one
            lengths = [len(ids) for ids in request.label_ids]
            values = {k: v / n for (k, v), n in zip(sums.items(), lengths, strict=True)}
        answer = best_label(values)
        calibrated = best_label(values, rule.label_offsets) if rule else None
        base = replace(base, label_logprobs=sums)
        if call.talk.send(self._task.word(calibrated or answer)) is None:
            return base
        found = score(answer, item, self._task)
        is_right = score(calibrated, item, self._task).is_correct if calibrated else None
        return replace(
            base,
            answer=answer,
            score=found.score,
            is_correct=found.is_correct,
            calibrated_answer=calibrated,
            is_correct_calibrated=is_right,
        )

    def _base(self, work: Pass, call: Call) -> SampleRecord:
        item = call.talk.item
        return SampleRecord(
            item_id=item.id,
            set=work.set,
            repeat=call.talk.repeat,
            call=call.talk.index,
            answer_by=work.answer_by,
            prompt_sha256=call.sha256,
            prompt_tokens=call.prompt_tokens,
            target=item.answer_key,
            group=item.group,
            **self._common,
        )

    def _failure(self, work: Pass, call: Call, *, error: str) -> SampleRecord:
        """A record without an answer; it ends the talk."""
        record = replace(self._base(work, call), error=error)
        call.talk.call = None
        self.finals.append(record)
        return record

    def _reuse(self, known: SampleRecord, talk: Talk) -> None:
        """Go on with what is already computed and recorded."""
        text = known.completion
        if text is None:
            text = self._task.word(known.calibrated_answer or known.answer or "")
        if talk.send(text) is not None:
            self.finals.append(known)

    def _check_failures(self, work: Pass) -> None:
        """Stop where so many items fail that arms cannot be compared on them."""
        failed = [record for record in self.finals if record.error is not None]
        count = len(work.items) * work.repeats
        if len(failed) > MAX_FAILED_SHARE * count:
            lengths = sorted(record.prompt_tokens for record in failed)
            raise JobFailed(
                f"{self._common['arm']}: {len(failed)} of {count} {work.set} items cannot be "
                f"answered, e.g. {failed[0].item_id}: {failed[0].error} "
                f"(their prompts have {lengths[0]} to {lengths[-1]} tokens)"
            )


def _record_key(record: SampleRecord) -> _Key:
    """What makes two calls the same work: a thought is shared by score and generate passes."""
    return (
        record.item_id,
        record.set,
        record.repeat,
        record.call,
        record.label_logprobs is not None,
        record.prompt_sha256,
    )


def _call_key(work: Pass, call: Call) -> _Key:
    is_scored = isinstance(call.request, ScoreRequest)
    talk = call.talk
    return (talk.item.id, work.set, talk.repeat, talk.index, is_scored, call.sha256)
