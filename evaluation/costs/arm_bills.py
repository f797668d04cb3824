"""What stands on an arm's bill beside its own computing: people's hours, idle hosting (pure)."""

from __future__ import annotations

from conf.run_groups import DecisionConfig
from evaluation.records.run_records import RunRecords

NOBODY = ("given", "tfidf", "linear_probe")  # what people spent on a reference is not asked


def people_hours(records: RunRecords, name: str, *, decision: DecisionConfig) -> float | None:
    """Hours of people on an arm and the arms it stands on; None where none were given."""
    by_kind = {True: decision.prompting_hours, False: decision.tuning_hours}
    methods = [records.arm_specs[arm].method for arm in records.base_arms(name)]
    hours = sum(by_kind[method == "prompt"] for method in methods if method not in NOBODY)
    return hours or None


def is_base_shared(records: RunRecords, name: str) -> bool:
    """Whether other tasks can be served from the same weights: the run's base, adapters apart."""
    size = records.model.get("num_parameters")
    trained = [
        summary.trained_parameters
        for arm in records.base_arms(name)
        if (summary := records.arms[arm].train_summary) is not None
    ]
    is_whole = isinstance(size, int) and all(count < size for count in trained)
    return is_whole and not records.arm_specs[name].base
