"""What a tuned model has unlearned: the general set, answered before and after (pure)."""

from __future__ import annotations

from collections.abc import Mapping

from conf.records import Measured
from conf.results import Forgetting
from evaluation.records.run_records import ArmRecords, RunRecords
from evaluation.statistics import paired_difference, wilson

GENERAL = "general"


def all_forgetting(
    records: RunRecords, *, confidence: float = 0.95, set_name: str = GENERAL
) -> tuple[Forgetting, ...]:
    """One row for every arm of which both models have answered the general set, or another."""
    kinds = {
        i: item.slices.get("kind", "")
        for i, item in records.items.items()
        if item.split == set_name
    }
    found = []
    for name, arm in records.arms.items():
        base, tuned = general_scores(arm, set_name=set_name)
        common = sorted(base.keys() & tuned.keys())
        if common:
            found.append(_row(name, base, tuned, common, kinds, confidence=confidence))
    return tuple(found)


def general_scores(
    arm: ArmRecords, *, set_name: str = GENERAL
) -> tuple[dict[str, float], dict[str, float]]:
    """Item -> 1 or 0, of the base model (records without a step) and of the last checkpoint.

    An item that could not be answered is wrong.
    """
    answers = [s for s in arm.samples if s.set == set_name]
    last = max((s.step for s in answers if s.step is not None), default=None)
    base = {s.item_id: float(bool(s.is_correct)) for s in answers if s.step is None}
    tuned = {
        s.item_id: float(bool(s.is_correct))
        for s in answers
        if s.step is not None and s.step == last
    }
    return base, tuned


def _row(
    name: str,
    base: Mapping[str, float],
    tuned: Mapping[str, float],
    common: list[str],
    kinds: Mapping[str, str],
    *,
    confidence: float,
) -> Forgetting:
    def change(ids: list[str]) -> Measured:
        d = paired_difference(
            [tuned[i] for i in ids], [base[i] for i in ids], confidence=confidence
        )
        return Measured(value=d.difference, low=d.low, high=d.high, n=d.n)

    whole = paired_difference(
        [tuned[i] for i in common], [base[i] for i in common], confidence=confidence
    )
    by_kind: dict[str, list[str]] = {}
    for i in common:
        by_kind.setdefault(kinds.get(i, ""), []).append(i)
    return Forgetting(
        arm=name,
        base=wilson(sum(base[i] for i in common), len(common), confidence),
        tuned=wilson(sum(tuned[i] for i in common), len(common), confidence),
        change=Measured(value=whole.difference, low=whole.low, high=whole.high, n=whole.n),
        p_value=whole.p_value,
        lost=whole.losses,
        gained=whole.wins,
        by_kind={kind: change(ids) for kind, ids in sorted(by_kind.items()) if kind},
    )
