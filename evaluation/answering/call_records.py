"""The record of one call: what the engine gave back, read, scored and put beside its item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from conf.choices import Normalisation
from conf.records import AnswerRule, SampleRecord, total
from evaluation.answering.calls import Call, Pass
from evaluation.engines.base import GenerateResult, ScoreResult, Usage
from evaluation.scoring import score
from evaluation.scoring.answers import read_answer
from evaluation.scoring.calibration import best_label
from evaluation.scoring.normalisation import LabelScores, mean_logprobs
from evaluation.tasks import Task


class CallRecords:
    """Makes the records of one job; a talk goes on with what came out of its call."""

    def __init__(
        self, task: Task, *, normalisation: Normalisation, common: Mapping[str, Any]
    ) -> None:
        """normalisation: the method's. common: fields that all the job's records share."""
        self._task = task
        self._normalisation = normalisation
        self._common = dict(common)
        self._num_tokens: dict[str, dict[str, int]] = {}

    def note_lengths(self, call: Call) -> None:
        """Remember how many tokens an item's labels have; records do not hold them."""
        if call.labels:
            self._num_tokens[call.talk.item.id] = call.num_tokens

    def label_scores(self, record: SampleRecord) -> LabelScores:
        """What a scored record of this job knows of its labels."""
        assert record.label_logprobs is not None, "a record with a label distribution"
        return LabelScores(
            sums=record.label_logprobs,
            num_tokens=self._num_tokens[record.item_id],
            num_bytes={
                label: len(self._task.word(label).encode("utf-8"))
                for label in record.label_logprobs
            },
            firsts=record.first_token_logprobs,
            baselines=record.baseline_logprobs,
        )

    def failure(
        self, work: Pass, call: Call, *, error: str, computed_tokens: int = 0
    ) -> SampleRecord:
        """A record without an answer; it ends the talk."""
        call.talk.call = None
        return replace(self._base(work, call), error=error, computed_tokens=computed_tokens)

    def answered(
        self,
        work: Pass,
        call: Call,
        result: ScoreResult | GenerateResult,
        *,
        unconditional: Sequence[SampleRecord] = (),
    ) -> SampleRecord:
        """The record of a call that the engine answered.

        unconditional: records of the same choices without content, which this one pays for.
        """
        base = replace(
            self._base(work, call),
            cached_tokens=result.cached_tokens,
            computed_tokens=result.computed_tokens,
            first_token_seconds=result.first_token_seconds,
            total_seconds=result.total_seconds,
        )
        if isinstance(result, GenerateResult):
            return self._generated(with_usage(base, result.usage), call, result)
        base = with_unconditional(base, unconditional)
        if result.winner is not None:
            return self._won(base, call, result)
        return self._scored(base, call, result, rule=work.rule)

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
            truncated_tokens=call.truncated_tokens,
            target=item.answer_key,
            group=item.group,
            **self._common,
        )

    def _generated(self, base: SampleRecord, call: Call, result: GenerateResult) -> SampleRecord:
        """A generated call: a thought, or the answer when the style is over."""
        count = result.completion_tokens if result.usage is None else base.completion_tokens
        base = replace(base, completion=result.text, completion_tokens=count)
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

    def _won(self, base: SampleRecord, call: Call, result: ScoreResult) -> SampleRecord:
        """A scored call in winner-only mode: an answer without a label distribution."""
        assert result.winner is not None
        base = replace(base, winner_logprob=result.winner_logprob)
        return self._answered(base, call, call.labels[result.winner], calibrated=None)

    def _scored(
        self, base: SampleRecord, call: Call, result: ScoreResult, *, rule: AnswerRule | None
    ) -> SampleRecord:
        """A scored call: the raw answer by sums, the calibrated one by the rule."""
        sums = dict(zip(call.labels, result.label_logprobs, strict=True))
        firsts = None
        if self._are_firsts_needed(call, rule):
            firsts = dict(zip(call.labels, result.first_token_logprobs, strict=True))
        base = replace(base, label_logprobs=sums, first_token_logprobs=firsts)
        calibrated = None
        if rule is not None:
            values = self.label_scores(base).by(rule.normalisation)
            calibrated = best_label(values, rule.label_offsets)
        return self._answered(base, call, best_label(sums), calibrated=calibrated)

    def _answered(
        self, base: SampleRecord, call: Call, answer: str, *, calibrated: str | None
    ) -> SampleRecord:
        """The label is the answer, whatever the style makes of its word."""
        if call.talk.send(self._task.word(calibrated or answer)) is None:
            return base
        item = call.talk.item
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

    def _are_firsts_needed(self, call: Call, rule: AnswerRule | None) -> bool:
        """Whether first tokens decide, or may be chosen to; shared ones are never chosen."""
        if rule is not None:
            return rule.normalisation == "first_token"
        if self._normalisation is Normalisation.auto:
            return call.has_distinct_starts
        return self._normalisation is Normalisation.first_token


def with_usage(record: SampleRecord, usage: Usage | None) -> SampleRecord:
    """A record with an endpoint's own counts, null where it does not tell; else as it is."""
    if usage is None:
        return record
    is_known = usage.prompt_tokens is not None and usage.completion_tokens is not None
    return replace(
        record,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        computed_tokens=record.computed_tokens if is_known else None,
    )


def with_unconditional(record: SampleRecord, others: Sequence[SampleRecord]) -> SampleRecord:
    """A record that also pays for other calls, and holds the mean of their label scores."""
    if not others:
        return record
    scores = [other.label_logprobs for other in others if other.label_logprobs is not None]
    every = (record, *others)

    def seconds(name: str) -> float | None:
        own = getattr(record, name)
        spent = [other.total_seconds for other in others]
        return None if own is None else own + sum(s for s in spent if s is not None)

    return replace(
        record,
        prompt_tokens=total(r.prompt_tokens for r in every),
        cached_tokens=total(r.cached_tokens for r in every),
        computed_tokens=total(r.computed_tokens for r in every),
        completion_tokens=total(r.completion_tokens for r in every),
        first_token_seconds=seconds("first_token_seconds"),
        total_seconds=seconds("total_seconds"),
        baseline_logprobs=mean_logprobs(scores),
    )
