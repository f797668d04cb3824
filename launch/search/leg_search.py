"""The search of trials that train one by one: who goes on after a rung, and what is chosen at last.

All of it is a function of what the legs left, so that a driver that was killed decides again as it
did. The rules are those of a pack (halving.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conf.records import LedgerLine, TrainRecord, TrainSummary
from conf.sweep_records import RungDecision, RungRecord, SweepChoice, TrialRecord
from conf.sweeps import HalvingConfig, SweepBudgetConfig
from launch.search.budget import affordable_settings, caps_of
from launch.search.halving import choose, decide, limited, rung_shares
from launch.search.messages import facts_of
from launch.search.trials import Trial

Events = Sequence[Any]
EventsOf = Callable[[int, int], Events | None]
"""Trial, rung -> the records of that leg; empty where it failed; None: it is not over."""


@dataclass(kw_only=True, slots=True, frozen=True)
class LegSearch:
    """The search of one arm."""

    arm: str
    trials: tuple[Trial, ...]
    halving: HalvingConfig
    budget: SweepBudgetConfig
    usd_per_device_second: float | None

    @property
    def settings(self) -> dict[int, int]:
        """Trial -> setting."""
        return {trial.number: trial.setting for trial in self.trials}


def decided(
    search: LegSearch, events_of: EventsOf, *, upto: int | None = None
) -> list[RungDecision]:
    """The decisions of all rungs up to one, or to the last; fewer where a leg is not over.

    Nobody comes to a rung after one that nobody passed.
    """
    shares = rung_shares(search.halving)
    last = len(shares) - 1 if upto is None else upto
    decisions: list[RungDecision] = []
    members = search.settings
    scores: list[dict[int, tuple[float, ...] | None]] = []
    legs: dict[int, list[Any]] = {number: [] for number in members}
    for rung in range(last + 1):
        scores.append({})
        for trial in members:
            events = events_of(trial, rung)
            if events is None:
                return decisions
            legs[trial] += events
            for record in events:
                if isinstance(record, RungRecord):
                    scores[rung][trial] = record.ranked
        decision = decide(search.arm, scores, members=members, halving=search.halving)
        affordable = _affordable(search, decision, legs)
        if affordable is not None:
            reason = f"rung {rung}: sweep.budget pays for {affordable} more"
            decision = limited(decision, scores, members=members, limit=affordable, reason=reason)
        decisions.append(decision)
        members = {trial: members[trial] for trial in decision.keep}
        if not members:
            break
    return decisions


def _affordable(
    search: LegSearch, decision: RungDecision, legs: Mapping[int, Events]
) -> int | None:
    """How many settings of a decision go on by the budget; None: no cap, or nobody goes on."""
    caps = caps_of(search.budget, usd_per_device_second=search.usd_per_device_second)
    settings = {search.settings[trial] for trial in decision.keep}
    if not caps or not settings:
        return None
    spent = {trial: _spent(events) for trial, events in legs.items()}
    shares = rung_shares(search.halving)
    return affordable_settings(
        caps,
        spent={kind: math.fsum(s[kind] for s in spent.values()) for kind in caps},
        kept={kind: math.fsum(spent[t][kind] for t in decision.keep) for kind in caps},
        num_settings=len(settings),
        share=shares[decision.rung],
        following=shares[min(decision.rung + 1, len(shares) - 1)],
    )


def _spent(events: Events) -> dict[str, float]:
    """Tokens and device-seconds of a trial's legs: steps, rungs, and what neither counts."""
    records = [e for e in events if isinstance(e, TrainRecord | RungRecord) or _is_extra(e)]
    return {
        "tokens": sum(e.tokens for e in records),
        "device_seconds": math.fsum(e.device_seconds for e in records),
    }


def _is_extra(event: object) -> bool:
    """Whether a line is not the sum of steps and rungs that the recorder states."""
    return isinstance(event, LedgerLine) and (event.purpose != "sweep" or not event.tokens)


def trial_row(
    search: LegSearch,
    number: int,
    events: Events,
    *,
    status: str,
    reason: str = "",
    summary: TrainSummary | None,
) -> TrialRecord:
    """A trial as a row of its search's table, by the records of all its legs so far."""
    facts = facts_of(next(trial for trial in search.trials if trial.number == number))
    spent, price = _spent(events), search.usd_per_device_second
    return TrialRecord(
        arm=search.arm,
        trial=number,
        setting=facts.setting,
        seed=facts.seed,
        draw=facts.draw,
        label=facts.label,
        values=facts.values,
        status=status,
        reason=reason,
        rung=max((e.rung for e in events if isinstance(e, RungRecord)), default=None),
        steps=max((e.step for e in events if isinstance(e, TrainRecord)), default=0),
        tokens=int(spent["tokens"]),
        device_seconds=spent["device_seconds"],
        usd=None if price is None else spent["device_seconds"] * price,
        trained_parameters=None if summary is None else summary.trained_parameters,
    )


def reason_of_failure(events: Events) -> str:
    """What a trial said when it failed; empty where it did not."""
    rows = [e for e in events if isinstance(e, TrialRecord) and e.status == "failed"]
    return rows[-1].reason if rows else ""


def last_rows(
    search: LegSearch,
    decisions: Sequence[RungDecision],
    legs: Mapping[int, Events],
    summaries: Mapping[int, TrainSummary],
) -> list[TrialRecord]:
    """How each trial left.

    Args:
        search: of one arm.
        decisions: of all rungs.
        legs: by trial, the records of its legs.
        summaries: by trial, of its last leg, where there is one.
    """
    reasons = {int(t): why for decision in decisions for t, why in decision.reasons.items()}
    failed = {trial for decision in decisions for trial in decision.failed}
    rows = []
    for trial in search.settings:
        events = legs[trial]
        status = "failed" if trial in failed else "dropped" if trial in reasons else "done"
        reason = reason_of_failure(events) or reasons.get(trial, "")
        summary = summaries.get(trial)
        rows.append(trial_row(search, trial, events, status=status, reason=reason, summary=summary))
    return rows


def choice_of(
    search: LegSearch, rows: Sequence[TrialRecord], legs: Mapping[int, Events]
) -> SweepChoice | None:
    """The best setting of those that went all the way."""
    done = {row.trial for row in rows if row.status == "done"}
    records = [e for trial in done for e in legs[trial] if isinstance(e, RungRecord)]
    parameters = {row.setting: row.trained_parameters or 0 for row in rows if row.trial in done}
    return choose(search.arm, records, members=search.settings, parameters=parameters)


def whole_summary(summary: TrainSummary, row: TrialRecord) -> TrainSummary:
    """The summary of a trial's last leg with the seconds of all of them."""
    return dataclasses.replace(summary, device_seconds=row.device_seconds)
