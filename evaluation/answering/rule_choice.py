"""How an arm answers, chosen on validation: by score or by generating, and how scores compare."""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Mapping, Sequence

from conf.choices import AnswerBy, Calibration, Normalisation, TaskKind
from conf.records import AnswerRule, Measured, SampleRecord
from conf.resolve import Arm
from evaluation.answering.asking import Asker, Emitted
from evaluation.answering.calls import Pass
from evaluation.scoring.calibration import (
    Candidate,
    best_label,
    choose,
    content_free_items,
    fit_offsets,
)
from evaluation.scoring.normalisation import mean_logprobs
from evaluation.statistics import wilson
from evaluation.tasks import Task
from evaluation.tasks.defaults import LABEL_KINDS


def ways_to_answer(arm: Arm, task: Task) -> tuple[str, ...]:
    """Ways to try on validation, the simplest first; free and voting answers are generated."""
    method = arm.answering
    is_generated = method.self_consistency or arm.engine.only_generates
    if task.kind not in LABEL_KINDS or is_generated:
        return ("generate",)
    is_open = method.answer_by is AnswerBy.auto
    return ("score", "generate") if is_open else (method.answer_by.name,)


def choose_rule(
    arm: Arm, task: Task, asker: Asker, *, validation: Callable[[str], Pass]
) -> Generator[Emitted, None, AnswerRule]:
    """Answer validation in every way there is; the better way becomes the arm's rule.

    validation: the pass over validation items for a way to answer. Of equal ways the first wins:
    plain sums, then calibrations, then other normalisations, then generating.
    """
    best, tried = yield from compare_ways(arm, task, asker, validation=validation)
    method = arm.answering
    return AnswerRule(
        arm=arm.name,
        answer_by=best.answer_by,
        normalisation=best.normalisation,
        calibration=best.calibration,
        label_offsets=best.offsets,
        is_voted=method.self_consistency,
        validation={candidate.name: candidate.value for candidate in tried},
        draw=method.draw,
    )


def compare_ways(
    arm: Arm, task: Task, asker: Asker, *, validation: Callable[[str], Pass]
) -> Generator[Emitted, None, tuple[Candidate, list[Candidate]]]:
    """Answer validation in every way there is; the way to take, and all that were tried."""
    tried: list[Candidate] = []
    allowed: list[Candidate] = []
    method = arm.answering
    for answer_by in ways_to_answer(arm, task):
        yield from asker.run(validation(answer_by))
        answers = asker.votes if method.self_consistency else asker.finals
        scores = {record.item_id: record.score or 0.0 for record in answers}
        plain = Candidate(answer_by=answer_by, value=_measured(scores.values()), scores=scores)
        others: list[Candidate] = []
        if answer_by == "score" and not arm.engine.winner_only:
            others = yield from _comparisons(arm, task, asker, answers)
        tried += [plain, *others]
        allowed += others if others and _is_forced(arm) else [plain, *others]
    return choose(allowed), tried


def _is_forced(arm: Arm) -> bool:
    """Whether the user has named how scores compare, and not as plain sums."""
    method = arm.answering
    is_calibrated = method.calibration in (Calibration.contextual, Calibration.batch)
    return is_calibrated or method.normalisation not in (Normalisation.auto, Normalisation.sum)


def _comparisons(
    arm: Arm, task: Task, asker: Asker, answers: Sequence[SampleRecord]
) -> Generator[Emitted, None, list[Candidate]]:
    """Candidates other than plain sums, in the order in which ties are broken.

    Offsets are fitted without labels; the candidates' values then need labels.
    """
    names = wanted_comparisons(arm, task)
    scored = [record for record in answers if record.label_logprobs is not None]
    free: list[Mapping[str, float]] = []
    if task.kind is TaskKind.classification and {"contextual", "pmi"} & set(names):
        free = yield from _without_content(task, asker)
    if any(record.first_token_logprobs is None for record in scored) and not _is_forced(arm):
        names = [name for name in names if name != "first_token"]
    candidates = []
    for name in names if scored else ():
        offsets = _offsets(name, free, scored)
        is_calibration = name in ("contextual", "batch")
        is_per_item = name not in ("contextual", "batch", "pmi") or not task.labels
        if offsets is None and not is_per_item:
            continue
        normalisation = "sum" if is_calibration else name
        hits = {record.item_id: 0.0 for record in answers}  # an item that failed counts as wrong
        for record in scored:
            values = asker.records.label_scores(record).by(normalisation)
            hits[record.item_id] = float(best_label(values, offsets) == record.target)
        candidates.append(
            Candidate(
                answer_by="score",
                normalisation=normalisation,
                calibration=name if is_calibration else "none",
                offsets=offsets,
                value=_measured(hits.values()),
                scores=hits,
            )
        )
    return candidates


def wanted_comparisons(arm: Arm, task: Task) -> list[str]:
    """Calibrations, which need labels that all items share, then normalisations.

    What is left to validation costs no calls but the ones without content that contextual
    calibration makes: pmi is tried where they are made, and elsewhere where it is asked for.
    """
    method = arm.answering
    calibration, normalisation = method.calibration, method.normalisation
    is_shared = task.kind is TaskKind.classification
    names: list[str] = []
    if is_shared and normalisation in (Normalisation.auto, Normalisation.sum):
        both = ["contextual", "batch"]
        names = both if calibration is Calibration.auto else [calibration.name]
        names = [name for name in names if name in both]
    if normalisation is Normalisation.auto and not _is_forced(arm):
        names += ["token", "byte", "first_token"] + ["pmi"] * ("contextual" in names)
    elif normalisation not in (Normalisation.auto, Normalisation.sum):
        names.append(normalisation.name)
    return names


def _without_content(
    task: Task, asker: Asker
) -> Generator[Emitted, None, list[Mapping[str, float]]]:
    """Label scores of inputs without content, which are no answers to items of the task."""
    items = content_free_items(task.items["validation"][0])
    work = Pass(set="calibration", purpose="calibration", answer_by="score", items=items)
    for event in asker.run(work):
        if not isinstance(event, SampleRecord):
            yield event
    return [record.label_logprobs for record in asker.finals if record.label_logprobs is not None]


def _offsets(
    name: str, free: Sequence[Mapping[str, float]], scored: Sequence[SampleRecord]
) -> dict[str, float] | None:
    """What a candidate subtracts from every item's scores."""
    match name:
        case "contextual":
            return fit_offsets(free)
        case "batch":
            return fit_offsets([r.label_logprobs for r in scored if r.label_logprobs is not None])
        case "pmi":
            return mean_logprobs(free)
    return None


def _measured(scores: Collection[float]) -> Measured:
    """Mean of scores in [0, 1] with Wilson's interval, conservative for graded scores."""
    return wilson(min(sum(scores), len(scores)), len(scores))
