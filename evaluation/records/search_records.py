"""What the search of one arm left in a run's journal (reads events, computes nothing)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from conf.records import JournalEvent, TrainRecord, from_dict
from conf.sweep_records import (
    SEARCH_EVENTS,
    RungDecision,
    RungRecord,
    SweepChoice,
    TrialRecord,
)

T = TypeVar("T")


@dataclass(kw_only=True, slots=True, frozen=True)
class SearchRecords:
    """One arm's search. A record that came twice, since an attempt was lost, counts once.

    rungs: by trial and rung. decisions: in order. trials: the last row of each. choice: None where
    the search did not end. steps: optimizer steps of all trials.
    """

    rungs: tuple[RungRecord, ...] = ()
    decisions: tuple[RungDecision, ...] = ()
    trials: tuple[TrialRecord, ...] = ()
    choice: SweepChoice | None = None
    steps: tuple[TrainRecord, ...] = ()

    def chosen_values(self) -> dict[str, Any]:
        """Field -> value of the chosen setting; empty while there is none."""
        if self.choice is None:
            return {}
        first = self.choice.trials[0]
        return next((dict(t.values) for t in self.trials if t.trial == first), {})


def search_records(
    events: Iterable[JournalEvent], *, steps: Iterable[TrainRecord]
) -> SearchRecords | None:
    """The search that an arm's events tell of; None: the arm was not searched.

    Args:
        events: the arm's, of the last command.
        steps: the arm's training records; those of trials count.
    """
    events = list(events)
    rungs = {(r.trial, r.rung): r for r in _of(RungRecord, events)}
    decisions = {d.rung: d for d in _of(RungDecision, events)}
    trials = {t.trial: t for t in _of(TrialRecord, events)}
    choices = _of(SweepChoice, events)
    if not (rungs or trials or choices):
        return None
    return SearchRecords(
        rungs=tuple(rungs[key] for key in sorted(rungs)),
        decisions=tuple(decisions[rung] for rung in sorted(decisions)),
        trials=tuple(trials[number] for number in sorted(trials)),
        choice=choices[-1] if choices else None,
        steps=tuple(step for step in steps if step.trial is not None),
    )


def _of(cls: type[T], events: Iterable[JournalEvent]) -> list[T]:
    name = SEARCH_EVENTS[cls]
    return [from_dict(cls, event.data) for event in events if event.event == name]
