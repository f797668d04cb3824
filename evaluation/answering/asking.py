"""Ask an arm's prompts about items: all items' calls of one step go to the engine together."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from conf.choices import Normalisation
from conf.errors import JobFailed
from conf.records import AnswerRule, Item, LedgerLine, Progress, PromptText, SampleRecord
from evaluation.answering.bill import Bill
from evaluation.answering.call_records import CallRecords, with_unconditional
from evaluation.answering.calls import Call, CallMaker, Pass, Talk
from evaluation.engines.base import (
    Engine,
    GenerateRequest,
    GenerateResult,
    ScoreRequest,
    ScoreResult,
)
from evaluation.scoring.calibration import content_free_items
from evaluation.scoring.voting import ballot, further, majority
from evaluation.tasks import Task
from evaluation.tasks.defaults import LABEL_KINDS

MAX_FAILED_SHARE = 0.1

Emitted = SampleRecord | AnswerRule | LedgerLine | PromptText | Progress
_Key = tuple[str, str, int, int, bool, str]


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
        normalisation: Normalisation = Normalisation.sum,
        is_winner_only: bool = False,
        done: Collection[SampleRecord] = (),
    ) -> None:
        """Start without answers.

        Args:
            calls: makes the arm's calls.
            task: what is asked about.
            engine: answers.
            bill: where rows are billed.
            batch_size: records that are written, and billed, together.
            common: fields that all the job's records share.
            normalisation: the method's.
            is_winner_only: labels are scored without a label distribution.
            done: an earlier attempt's records.
        """
        self._calls = calls
        self._task = task
        self._engine = engine
        self._bill = bill
        self._batch_size = batch_size
        self._is_winner_only = is_winner_only
        self._arm = str(common["arm"])
        self.records = CallRecords(task, normalisation=normalisation, common=common)
        self._known = {_record_key(record): record for record in done if record.error is None}
        self._written = {record.prompt_sha256 for record in done}
        self._unconditional: dict[str, list[SampleRecord]] = {}
        self.finals: list[SampleRecord] = []  # the last pass's answers, one per item and repeat

    def run(self, work: Pass) -> Iterator[Emitted]:
        """Ask all items; yields prompts when new, and bill lines before what they paid for.

        Raises:
            JobFailed: over 10% of the items cannot be answered.
        """
        self.finals = []
        if work.is_pmi:
            yield from self._ask_without_content(work)
        while talks := self._next_repeats(work):
            yield from self._talk(work, talks)

    def _next_repeats(self, work: Pass) -> list[Talk]:
        """The repeats to ask now, repeat by repeat; none where all items are settled."""
        given = {records[0].item_id: self._ballots(records) for records in self._by_item()}
        asked = []
        for item in work.items:
            ballots = given.get(item.id, [])
            more = further(ballots, repeats=work.repeats, stopping=work.stopping)
            asked += [(len(ballots) + k, item) for k in range(more)]
        asked.sort(key=lambda pair: pair[0])  # stable: items keep their order
        return [self._calls.start(item, repeat=repeat) for repeat, item in asked]

    @property
    def votes(self) -> list[SampleRecord]:
        """Of each item of the last pass, the first record that gives the answer of most repeats."""
        return [records[majority(self._ballots(records)) or 0] for records in self._by_item()]

    def _by_item(self) -> list[list[SampleRecord]]:
        """The last pass's answers by item, in the order of their repeats."""
        found: dict[str, list[SampleRecord]] = {}
        for record in sorted(self.finals, key=lambda record: record.repeat):
            found.setdefault(record.item_id, []).append(record)
        return list(found.values())

    def _ballots(self, records: Sequence[SampleRecord]) -> list[str | None]:
        is_label = self._task.kind in LABEL_KINDS
        return [ballot(record.answer, is_label=is_label) for record in records]

    def _ask_without_content(self, work: Pass) -> Iterator[Emitted]:
        """Score each item's own choices under inputs without content.

        The rows are billed to the pass, and the items' own records pay for them: these are not
        kept as records, so that an item stays one request.
        """
        known = {key[0] for key, r in self._known.items() if key[1] == work.set and r.answer}
        self._unconditional = {}
        copies: dict[str, str] = {}
        items: list[Item] = []
        for item in (item for item in work.items if item.id not in known):
            for copy in content_free_items(item, suffix=f"-{item.id}"):
                copies[copy.id] = item.id
                items.append(copy)
        free = replace(work, set="calibration", items=items, rule=None, is_pmi=False)
        for event in self._talk(free, [self._calls.start(item, repeat=0) for item in items]):
            if isinstance(event, SampleRecord):
                self._unconditional.setdefault(copies[event.item_id], []).append(event)
            else:
                yield event
        self.finals = []

    def _talk(self, work: Pass, talks: Sequence[Talk]) -> Iterator[Emitted]:
        """Carry talks on to their ends, all talks' present calls at a time."""
        live = list(talks)
        total = len(self.finals) + len(live)
        while live:
            ready: list[Call] = []
            for talk in live:
                call = self._calls.make(talk, answer_by=work.answer_by)
                self.records.note_lengths(call)
                if call.sha256 not in self._written:
                    self._written.add(call.sha256)
                    yield PromptText(prompt_sha256=call.sha256, arm=self._arm, text=call.text)
                known = self._known.get(_call_key(work, call))
                if known is not None:
                    self._reuse(known, talk)
                elif call.error is not None:
                    yield self._fail(work, call, error=call.error)
                else:
                    ready.append(call)
            self._check_failures(work, total)
            yield from self._ask(work, ready, total=total)
            self._check_failures(work, total)
            live = [talk for talk in live if talk.call is not None]

    def _ask(self, work: Pass, calls: Sequence[Call], *, total: int) -> Iterator[Emitted]:
        """Put calls to the engine; each batch of records follows the lines that pay for it."""
        by_id = {call.request.id: call for call in calls}
        waiting: list[SampleRecord] = []
        tokens = completion_tokens = 0
        for result in self._results(calls, is_timed=work.is_timed):
            call = by_id.pop(result.id)
            waiting.append(self._record(work, call, result))
            tokens += result.computed_tokens
            if isinstance(result, GenerateResult):
                completion_tokens += result.completion_tokens
            if len(waiting) >= self._batch_size or not by_id:
                yield from self._bill.lines(
                    work.purpose, tokens=tokens, completion_tokens=completion_tokens
                )
                yield from waiting
                waiting, tokens, completion_tokens = [], 0, 0
                yield self._progress(work, total)
        assert not by_id, "an engine answers every request"

    def _progress(self, work: Pass, total: int) -> Progress:
        note = f"{work.set} by {work.answer_by}"
        num_cut = sum(record.truncated_tokens > 0 for record in self.finals)
        if num_cut:
            note += f", {num_cut} truncated"
        return Progress(done=len(self.finals), total=total, unit="answers", note=note)

    def _results(
        self, calls: Sequence[Call], *, is_timed: bool
    ) -> Iterator[ScoreResult | GenerateResult]:
        requests = [call.request for call in calls]
        scores = [request for request in requests if isinstance(request, ScoreRequest)]
        if scores:
            yield from self._engine.score(scores, timed=is_timed, winner_only=self._is_winner_only)
        generations = [request for request in requests if isinstance(request, GenerateRequest)]
        if generations:
            yield from self._engine.generate(generations, timed=is_timed)

    def _record(self, work: Pass, call: Call, result: ScoreResult | GenerateResult) -> SampleRecord:
        """The record of one call, kept where a later call or pass needs it."""
        if result.error is not None:
            return self._fail(work, call, error=result.error, computed=result.computed_tokens)
        free = self._free(work, call)
        broken = next((record.error for record in free if record.error is not None), None)
        if broken is not None:
            error = f"its choices without content: {broken}"
            return self._fail(work, call, error=error, computed=result.computed_tokens)
        record = self.records.answered(work, call, result, unconditional=free)
        if call.talk.call is None:
            self.finals.append(record)
        else:
            self._known[_record_key(record)] = record
        return record

    def _free(self, work: Pass, call: Call) -> list[SampleRecord]:
        """What was asked without content for the call's item in this pass."""
        return self._unconditional.get(call.talk.item.id, []) if work.is_pmi else []

    def _fail(self, work: Pass, call: Call, *, error: str, computed: int = 0) -> SampleRecord:
        """A record without an answer; it ends the talk."""
        record = self.records.failure(work, call, error=error, computed_tokens=computed)
        record = with_unconditional(record, self._free(work, call))
        self.finals.append(record)
        return record

    def _reuse(self, known: SampleRecord, talk: Talk) -> None:
        """Go on with what is already computed and recorded."""
        text = known.completion
        if text is None:
            text = self._task.word(known.calibrated_answer or known.answer or "")
        if talk.send(text) is not None:
            self.finals.append(known)

    def _check_failures(self, work: Pass, total: int) -> None:
        """Stop where so many items fail that arms cannot be compared on them.

        A sample may have two standard errors more of them than the set may.
        """
        failed = [record for record in self.finals if record.error is not None]
        limit = MAX_FAILED_SHARE * total
        if work.is_sample:
            limit += 2 * math.sqrt(limit * (1 - MAX_FAILED_SHARE))
        if len(failed) > limit:
            lengths = sorted(record.prompt_tokens or 0 for record in failed)
            raise JobFailed(
                f"{self._arm}: {len(failed)} of {total} {work.set} items cannot be "
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
        record.completion is None,  # scored
        record.prompt_sha256,
    )


def _call_key(work: Pass, call: Call) -> _Key:
    is_scored = isinstance(call.request, ScoreRequest)
    talk = call.talk
    return (talk.item.id, work.set, talk.repeat, talk.index, is_scored, call.sha256)
