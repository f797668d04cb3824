"""From the answers of one arm to scores per item, requests and label counts (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from conf.records import Item, Measured, SampleRecord, total
from evaluation.records.run_records import ArmRecords, ArmSpec, RunRecords
from evaluation.scoring.voting import ballot, majority
from evaluation.statistics import mean_interval

RequestKey = tuple[str, int, int, int, int | None]


@dataclass(kw_only=True, slots=True, frozen=True)
class Request:
    """One request whole: all its calls added up, and the record that holds its answer."""

    final: SampleRecord
    prompt_tokens: int | None
    cached_tokens: int | None
    computed_tokens: int | None
    completion_tokens: int | None
    truncated_tokens: int
    first_token_seconds: float | None  # until the first token of the answer, after any thinking
    total_seconds: float | None


def requests_of(arm: ArmRecords, *, set_name: str) -> list[Request]:
    """The arm's requests of one set, answered the way its rule says.

    Of several checkpoints the one that the arm answers with counts: the last, or the chosen one.
    """
    samples = [s for s in arm.samples if s.set == set_name and s.num_labels is None]
    samples = samples or [s for s in arm.samples if s.set == set_name]
    if arm.rule is not None:
        samples = [s for s in samples if s.answer_by == arm.rule.answer_by]
    steps = [s.step for s in samples if s.step is not None]
    if steps:
        answering = max(steps) if arm.checkpoint is None else arm.checkpoint.step
        samples = [s for s in samples if s.step == answering]
    calls: dict[RequestKey, list[SampleRecord]] = {}
    for s in samples:
        key = (s.item_id, s.repeat, s.draw, s.paraphrase, s.train_seed)
        calls.setdefault(key, []).append(s)
    return [_request(sorted(group, key=lambda s: s.call)) for group in calls.values()]


def _request(calls: Sequence[SampleRecord]) -> Request:
    final = calls[-1]
    totals = [c.total_seconds for c in calls]
    seconds = [t for t in totals if t is not None]
    is_timed = len(seconds) == len(calls)
    first = final.first_token_seconds
    return Request(
        final=final,
        prompt_tokens=total(c.prompt_tokens for c in calls),
        cached_tokens=total(c.cached_tokens for c in calls),
        computed_tokens=total(c.computed_tokens for c in calls),
        completion_tokens=total(c.completion_tokens for c in calls),
        truncated_tokens=sum(c.truncated_tokens for c in calls),
        first_token_seconds=(sum(seconds[:-1]) + first if first is not None and is_timed else None),
        total_seconds=sum(seconds) if is_timed else None,
    )


def voted(requests: Sequence[Request], *, is_label: bool) -> list[Request]:
    """One request per item whose repeats vote: it costs what all of them cost.

    Its record is the first that gives the majority's answer, and its first token comes with the
    last repeat, since repeats of a timed request are asked one after another.
    """
    groups: dict[tuple[object, ...], list[Request]] = {}
    for r in sorted(requests, key=lambda r: r.final.repeat):
        final = r.final
        key = (final.item_id, final.draw, final.paraphrase, final.train_seed)
        groups.setdefault(key, []).append(r)
    return [_voted(group, is_label=is_label) for group in groups.values()]


def _voted(repeats: Sequence[Request], *, is_label: bool) -> Request:
    place = majority([ballot(r.final.answer, is_label=is_label) for r in repeats])
    seconds = [r.total_seconds for r in repeats if r.total_seconds is not None]
    first = repeats[-1].first_token_seconds
    is_timed = len(seconds) == len(repeats)
    return replace(
        repeats[place or 0],
        prompt_tokens=total(r.prompt_tokens for r in repeats),
        cached_tokens=total(r.cached_tokens for r in repeats),
        computed_tokens=total(r.computed_tokens for r in repeats),
        completion_tokens=total(r.completion_tokens for r in repeats),
        truncated_tokens=sum(r.truncated_tokens for r in repeats),
        first_token_seconds=sum(seconds[:-1]) + first if is_timed and first is not None else None,
        total_seconds=sum(seconds) if is_timed else None,
    )


def is_right(s: SampleRecord, *, is_calibrated: bool) -> float | None:
    """1 or 0; an answer that ended in an error is wrong; None where right is not defined."""
    value = s.is_correct_calibrated if is_calibrated else s.is_correct
    if value is None:
        return 0.0 if s.error is not None else None
    return float(value)


def score_of(s: SampleRecord) -> float | None:
    """The score under the task's rule; an answer that ended in an error scores 0."""
    if s.score is None:
        return 0.0 if s.error is not None else None
    return s.score


def by_item(pairs: Iterable[tuple[str, float | None]]) -> dict[str, float]:
    """Mean per item over draws, repeats and seeds; items without any value are left out."""
    values: dict[str, list[float]] = {}
    for item_id, value in pairs:
        if value is not None:
            values.setdefault(item_id, []).append(value)
    return {item_id: fmean(v) for item_id, v in values.items()}


def item_scores(
    requests: Sequence[Request], *, is_label_task: bool, is_calibrated: bool
) -> dict[str, float]:
    """Item id -> the value that the arm's metric averages."""
    if is_label_task:
        return by_item(
            (r.final.item_id, is_right(r.final, is_calibrated=is_calibrated)) for r in requests
        )
    return by_item((r.final.item_id, score_of(r.final)) for r in requests)


def consistency(requests: Sequence[Request], *, confidence: float) -> Measured | None:
    """Mean over items of the share of pairs of repeats or wordings with equal answers.

    None without at least two answers to an item, and for scored answers, which never vary. Only
    repeats that all items have count: an item whose repeats agree may have stopped early, and its
    missing ones would have agreed less.
    """
    generated = [r.final for r in requests if r.final.answer_by == "generate"]
    repeats: dict[str, set[int]] = {}
    for s in generated:
        repeats.setdefault(s.item_id, set()).add(s.repeat)
    common = set.intersection(*repeats.values()) if repeats else set()
    answers: dict[str, list[str | None]] = {}
    for s in generated:
        if s.repeat in common:
            answers.setdefault(s.item_id, []).append(s.answer)
    shares = []
    for given in answers.values():
        n = len(given)
        if n >= 2:
            agreeing = sum(c * (c - 1) for c in _counts(given).values())
            shares.append(agreeing / (n * (n - 1)))
    return mean_interval(shares, confidence=confidence, is_share=True) if shares else None


def _counts(values: Sequence[str | None]) -> dict[str | None, int]:
    counts: dict[str | None, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def format_validity(requests: Sequence[Request], *, confidence: float) -> Measured | None:
    """Share of generated answers in a valid format; None where no answer was generated."""
    valid = by_item(
        (
            r.final.item_id,
            None if r.final.is_format_valid is None else float(r.final.is_format_valid),
        )
        for r in requests
        if r.final.answer_by == "generate"
    )
    return (
        mean_interval(list(valid.values()), confidence=confidence, is_share=True) if valid else None
    )


def sliced(
    scores: Mapping[str, float], slice_of: Mapping[str, Sequence[str]], *, confidence: float
) -> dict[str, Measured]:
    """The metric on each slice: slice_of maps an item to the names of its slices."""
    values: dict[str, list[float]] = {}
    for item_id, score in scores.items():
        for name in slice_of.get(item_id, ()):
            values.setdefault(name, []).append(score)
    return {
        name: mean_interval(v, confidence=confidence, is_share=True)
        for name, v in sorted(values.items())
    }


def slices_of(items: Mapping[str, Item]) -> dict[str, list[str]]:
    """Item id -> `name=value` of its slices and its group; a stereotype is no slice."""
    named = {}
    for item_id, item in items.items():
        names = [f"{k}={v}" for k, v in item.slices.items() if k != "stereotype"]
        named[item_id] = names + ([f"group={item.group}"] if item.group is not None else [])
    return named


def by_replicate(
    requests: Sequence[Request], values: Sequence[float | None]
) -> dict[tuple[int, int], dict[str, float]]:
    """(draw, training seed) -> item id -> value, the mean over repeats; unknown ones left out."""
    found: dict[tuple[int, int], list[tuple[str, float | None]]] = {}
    for request, value in zip(requests, values, strict=True):
        final = request.final
        own = found.setdefault((final.draw, final.train_seed or 0), [])
        own.append((final.item_id, value))
    return {replicate: by_item(own) for replicate, own in found.items()}


def labels_used(records: RunRecords, name: str) -> int:
    """Labels of every kind: training rows or shots, and validation labels that chose something.

    Shots come out of the training split, so an arm that trained, or stands on one that did, counts
    the split once. Validation labels count where there was more than one way to choose from.
    """
    chain = records.base_arms(name)
    specs = [records.arm_specs[a] for a in chain]
    if any(s.method not in ("prompt", "given") or s.is_retrieved for s in specs):
        labels = _training_rows(records, chain)
    else:
        labels = _shots(records.arm_specs[name], records.arms[name])
    open_arms = [a for a in chain if not records.arm_specs[a].is_rule_fixed]
    rules = [rule for a in open_arms if (rule := records.arms[a].rule) is not None]
    validated = [
        m.n or 0 for rule in rules if len(rule.validation) >= 2 for m in rule.validation.values()
    ]
    return labels + max(validated, default=0)


def _training_rows(records: RunRecords, chain: Sequence[str]) -> int:
    limits = [
        t.num_labels for a in chain for t in records.arms[a].train if t.num_labels is not None
    ]
    if limits:
        return max(limits)
    return sum(item.split == "train" for item in records.items.values())


def _shots(spec: ArmSpec, arm: ArmRecords) -> int:
    """Shots drawn, over all draws that answered test items."""
    draws = {s.draw for s in arm.samples if s.set == "test"}
    return spec.num_shots * max(1, len(draws))
