"""What was asked besides the task, and what the task's own answers show of it, by arm (pure).

The probes for bias and made-up answers are asked of weights: an arm without weights of its own
shows what its base, or the arm that it stands on, answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from conf.probe_results import ProbeChange, ProbeResult
from conf.records import Measured, SampleRecord
from evaluation.probes.instructions import KIND
from evaluation.probes.probe_scores import (
    Answer,
    abstain_measures,
    bias_measures,
    metric_gap,
    preference_measure,
    wording_measures,
)
from evaluation.probes.probe_sets import ABSTAIN, BIAS
from evaluation.probes.steering import STEERING
from evaluation.probes.wordings import WORDING
from evaluation.records.arm_scores import Request, by_item
from evaluation.records.run_records import RunRecords
from evaluation.results.arm_summary import answered_requests, is_calibrated, test_scores
from evaluation.statistics.expected_calibration import calibration_error, stated_probability
from evaluation.statistics.measures import Measure, changed, item_measure

MAX_GROUPS = 20  # more are sources of items, not groups that one compares
CALIBRATION = "calibration"
TASK_BIAS, TASK_ABSTAIN = "task_bias", "task_abstain"


@dataclass(kw_only=True, slots=True, frozen=True)
class Probed:
    """One probe of one arm, by item; see conf.probe_results.ProbeResult for the fields."""

    source: str
    asked_of: str
    measures: dict[str, Measure]
    kinds: dict[str, str] = field(default_factory=dict)  # item id -> its kind
    base: dict[str, Measure] = field(default_factory=dict)  # what its untuned weights answered

    def by_kind(self, confidence: float) -> dict[str, Measured]:
        """Kind of item -> the first measure."""
        first = next(iter(self.measures.values()))
        found: dict[str, list[str]] = {}
        for item_id in first.ids:
            if item_id in self.kinds:
                found.setdefault(self.kinds[item_id], []).append(item_id)
        return {k: first.of(ids).interval(confidence) for k, ids in sorted(found.items())}


def all_probes(records: RunRecords) -> dict[str, dict[str, Probed]]:
    """Arm -> probe -> what it showed; arms and probes without answers are left out."""
    found: dict[str, dict[str, Probed]] = {}
    for name, arm in records.arms.items():
        if arm.status != "done":
            continue
        mine = {
            BIAS: _of_weights(records, name, BIAS),
            ABSTAIN: _of_weights(records, name, ABSTAIN),
            STEERING: _steering(records, name),
            WORDING: _wording(records, name),
            TASK_BIAS: _task_bias(records, name),
            TASK_ABSTAIN: _task_abstain(records, name),
            CALIBRATION: _calibration(records, name),
        }
        found[name] = {probe: one for probe, one in mine.items() if one is not None}
    return found


def results_of(probed: Mapping[str, Probed], *, confidence: float) -> dict[str, ProbeResult]:
    """An arm's probes with their intervals."""
    return {
        probe: ProbeResult(
            probe=probe,
            source=one.source,
            asked_of=one.asked_of,
            measures={name: m.interval(confidence) for name, m in one.measures.items()},
            by_kind=one.by_kind(confidence) if one.kinds else {},
            note=_note(one),
        )
        for probe, one in probed.items()
    }


def _note(probed: Probed) -> str:
    count = len({i for m in probed.measures.values() for i in m.ids})
    return f"small: {count} items" if probed.source != "task" or count < 30 else ""


def all_changes(
    records: RunRecords, probed: Mapping[str, Mapping[str, Probed]], *, confidence: float
) -> tuple[ProbeChange, ...]:
    """Every measure of every arm with tuned weights against what it was without the tuning."""
    return tuple(
        change
        for name, probes in probed.items()
        if _is_tuned(records, name)
        for probe, after in probes.items()
        if after.asked_of == name  # weights that arms share are compared once
        for change in _changes(records, probed, name, probe, confidence=confidence)
    )


def _changes(
    records: RunRecords,
    probed: Mapping[str, Mapping[str, Probed]],
    name: str,
    probe: str,
    *,
    confidence: float,
) -> Iterator[ProbeChange]:
    """The measures of one probe of one arm against those without its tuning."""
    after = probed[name][probe]
    base = name if after.base else _untuned(records, probed, name, probe)
    if base is None:
        return
    before = after.base or probed[base][probe].measures
    for measure in (m for m in after.measures if m in before):
        one = changed(before[measure], after.measures[measure], confidence=confidence)
        if one is not None:
            yield ProbeChange(
                arm=name,
                base=base,
                probe=probe,
                measure=measure,
                before=one.before,
                after=one.after,
                change=one.change,
                p_value=one.p_value,
            )


def _is_tuned(records: RunRecords, name: str) -> bool:
    specs = [records.arm_specs[n] for n in records.base_arms(name)]
    return specs[-1].on is not None or any(s.method not in _WITHOUT_TUNING for s in specs)


_WITHOUT_TUNING = ("prompt", "tfidf", "given", "linear_probe")


def _untuned(
    records: RunRecords, probed: Mapping[str, Mapping[str, Probed]], name: str, probe: str
) -> str | None:
    """The arm that prompts the same base without the tuning: with the same prompt, if there is."""
    spec = records.arm_specs[name]
    others = [
        other
        for other, s in records.arm_specs.items()
        if s.method == "prompt"
        and s.on is None
        and s.is_same_base == spec.is_same_base
        and probe in probed.get(other, {})
    ]

    def distance(other: str) -> tuple[bool, bool]:
        s = records.arm_specs[other]
        return (s.prompt != spec.prompt, s.num_shots != spec.num_shots)

    return min(others, key=distance) if others else None


def _asked(records: RunRecords, name: str, probe: str, *, is_base: bool) -> list[SampleRecord]:
    """An arm's answers to a probe: of its base (records without a step), or of its checkpoint."""
    arm = records.arms[name]
    mine = [
        s for s in arm.samples if s.set == probe and s.error is None and s.item_id in records.items
    ]
    if is_base:
        return [s for s in mine if s.step is None]
    steps = [s.step for s in mine if s.step is not None]
    last = max(steps, default=None) if arm.checkpoint is None else arm.checkpoint.step
    return [s for s in mine if s.step is not None and s.step == last]


def _measured(
    records: RunRecords, probe: str, samples: Sequence[SampleRecord]
) -> dict[str, Measure]:
    """The measures of a probe of weights, from its answers."""
    answers = [(s.item_id, s.answer) for s in samples]
    if probe == ABSTAIN:
        return abstain_measures(records.items, answers)
    scored = [(s.item_id, s.label_logprobs) for s in samples]
    return {
        **bias_measures(records.items, answers),
        **preference_measure(records.items, scored),
    }


def _of_weights(records: RunRecords, name: str, probe: str) -> Probed | None:
    """A probe of the weights that an arm answers with, and who asked them."""
    is_tuned = _is_tuned(records, name)
    source = "file" if _probe_path(records, probe) else "embedded"
    kinds = {
        i: item.slices["kind"]
        for i, item in records.items.items()
        if item.split == probe and "kind" in item.slices
    }
    for other in records.base_arms(name) if is_tuned else _askers(records, name):
        answers = _asked(records, other, probe, is_base=not is_tuned)
        if measures := _measured(records, probe, answers):
            base = _asked(records, other, probe, is_base=True) if is_tuned else ()
            before = _measured(records, probe, base)
            return Probed(
                source=source, asked_of=other, measures=measures, kinds=kinds, base=before
            )
    return None


def _askers(records: RunRecords, name: str) -> Iterable[str]:
    """Arms whose jobs may have asked the same base weights: the arm itself first."""
    spec = records.arm_specs[name]
    if spec.method != "prompt":
        return ()
    same = [n for n, s in records.arm_specs.items() if s.is_same_base and s.on is None]
    return (name, *(same if spec.is_same_base else ()))


def _probe_path(records: RunRecords, probe: str) -> str | None:
    probes = records.config.get("probes") or {}
    return (probes.get(probe) or {}).get("path")


def _steering(records: RunRecords, name: str) -> Probed | None:
    """The answers to requests: a style's thoughts before them are no answers."""
    right = {
        s.item_id: float(s.is_correct)
        for s in _asked(records, name, STEERING, is_base=not _is_tuned(records, name))
        if s.is_correct is not None
    }
    if not right:
        return None
    kinds = {i: records.items[i].slices.get(KIND, "") for i in right}
    return Probed(
        source="task", asked_of=name, measures={"obeyed": item_measure(right)}, kinds=kinds
    )


def _wording(records: RunRecords, name: str) -> Probed | None:
    """The wordings' own answers beside those that the test gave to the same items."""
    by_number: dict[int, list[Request]] = {}
    for request in answered_requests(records, name, set_name=WORDING):
        by_number.setdefault(request.final.paraphrase, []).append(request)
    asked = {r.final.item_id for requests in by_number.values() for r in requests}
    if not asked:
        return None
    tests = answered_requests(records, name, set_name="test")
    draw = min((r.final.draw for r in tests), default=0)
    by_number[0] = [
        r for r in tests if r.final.item_id in asked and r.final.draw == draw and not r.final.repeat
    ]
    answers = {
        number: {r.final.item_id: _answer(records, name, r.final) for r in requests}
        for number, requests in by_number.items()
    }
    scores = {n: test_scores(records, name, requests) for n, requests in by_number.items()}
    measures = wording_measures(answers, scores)
    return Probed(source="task", asked_of=name, measures=measures) if measures else None


def _answer(records: RunRecords, name: str, sample: SampleRecord) -> str | None:
    """What the arm answers by its rule."""
    return sample.calibrated_answer if is_calibrated(records, name) else sample.answer


def _test_answers(records: RunRecords, name: str) -> list[Answer]:
    finals = [r.final for r in answered_requests(records, name, set_name="test")]
    return [
        (s.item_id, _answer(records, name, s))
        for s in finals
        if s.error is None and s.item_id in records.items
    ]


def _abstain_label(records: RunRecords) -> str | None:
    label = (records.config.get("task") or {}).get("abstain_label")
    return None if label is None else str(label)


def _task_abstain(records: RunRecords, name: str) -> Probed | None:
    measures = abstain_measures(
        records.items, _test_answers(records, name), label=_abstain_label(records)
    )
    return Probed(source="task", asked_of=name, measures=measures) if measures else None


def _task_bias(records: RunRecords, name: str) -> Probed | None:
    """The gap between stereotypes, where the data name them, and between the user's groups."""
    label = _abstain_label(records)
    finals = [r.final for r in answered_requests(records, name, set_name="test")]
    scored = [(s.item_id, s.label_logprobs) for s in finals if s.item_id in records.items]
    measures = {
        **bias_measures(records.items, _test_answers(records, name), label=label),
        **preference_measure(records.items, scored, label=label),
    }
    groups = {i: item.group for i, item in records.items.items() if item.group is not None}
    tests = answered_requests(records, name, set_name="test")
    if 2 <= len(set(groups.values())) <= MAX_GROUPS:
        gap = metric_gap(test_scores(records, name, tests), groups)
        measures |= {} if gap is None else {"metric_gap": gap}
    return Probed(source="task", asked_of=name, measures=measures) if measures else None


def _calibration(records: RunRecords, name: str) -> Probed | None:
    """Stated probabilities against right answers, of scored label answers."""
    rule = records.arms[name].rule
    stated: list[tuple[str, float | None]] = []
    right: list[tuple[str, float | None]] = []
    for request in answered_requests(records, name, set_name="test"):
        final = request.final
        probability = stated_probability(final, rule)
        is_right = _answer(records, name, final) == final.target
        if probability is not None:
            stated.append((final.item_id, probability))
            right.append((final.item_id, float(is_right)))
    confidence, hits = by_item(stated), by_item(right)
    if len(confidence) < 2:
        return None
    values = np.array([[confidence[i], hits[i]] for i in confidence], dtype=np.float64)
    ece = Measure(ids=tuple(confidence), values=values, statistic=calibration_error)
    return Probed(source="task", asked_of=name, measures={"ece": ece})
