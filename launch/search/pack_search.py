"""The search of an arm whose trials pack, as its training workers run it: all alike, one tells.

The trials train in one base model (training/pack.py); after each rung halving.py says who
goes on. What happens is told in records: steps, rungs, decisions, every trial as a row when it
leaves, and at the end the setting that is chosen, and the summary of its training. Those that go on
after a rung are rows too, so that a search that is stopped or killed has its table.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from conf.errors import JobFailed
from conf.records import LedgerLine
from conf.sweep_records import UNFINISHED, RungDecision, RungRecord, SweepChoice, TrialRecord
from conf.sweeps import HalvingConfig, SweepBudgetConfig
from conf.trial_records import TrialOutcome
from launch.search.budget import affordable_settings, caps_of
from launch.search.halving import choose, decide, limited, recorded, rung_shares
from training.job import FINAL, Runtime, TrainJob, checkpoint_directory

if TYPE_CHECKING:
    from training.pack import Pack
    from training.pack_trial import Trial


class Teller(Runtime, Protocol):
    """A runtime that passes on any record."""

    def report(self, record: object) -> None:
        """Pass a record on to the run's store."""


@dataclass(kw_only=True, slots=True, frozen=True)
class TrialFacts:
    """A trial as its table shows it."""

    setting: int
    seed: int
    draw: int
    label: str
    values: dict[str, Any]


@dataclass(kw_only=True, slots=True, frozen=True)
class PackSearch:
    """The search of one arm: what crosses to the worker.

    jobs: one for each trial, alike but for method and trainer. trials: by number. rung_rows_path:
    the validation items.
    """

    jobs: tuple[TrainJob, ...]
    trials: Mapping[int, TrialFacts]
    rung_rows_path: str
    halving: HalvingConfig
    budget: SweepBudgetConfig

    @property
    def settings(self) -> dict[int, int]:
        """Trial -> setting."""
        return {number: facts.setting for number, facts in self.trials.items()}


def run_search(search: PackSearch, runtime: Teller) -> None:
    """Train, judge and choose; the winner's weights end in <output_dir>/final/checkpoint.

    Every worker makes this call: what they decide follows from scores that all of them have.

    Raises:
        JobFailed: every trial failed.
        TrainingStopped: asked to stop; the same call goes on from there.
    """
    from training.train_pack import train_pack

    judge = _Judge(search, runtime)
    outcomes = train_pack(
        search.jobs,
        runtime,
        rung_rows_path=Path(search.rung_rows_path),
        rungs=rung_shares(search.halving),
        judge=judge,
    )
    by_trial = {outcome.trial: outcome for outcome in outcomes}
    judge.tell(by_trial)
    choice = _choice(search, outcomes)
    if choice is None:
        reasons = "; ".join(f"{search.trials[o.trial].label}: {o.reason}" for o in outcomes)
        raise JobFailed(f"all {len(outcomes)} trials failed: {reasons}")
    if runtime.global_rank == 0:
        winner = by_trial[choice.trials[0]]
        _tell_end(search, runtime, choice, by_trial)
        put_whole(Path(winner.checkpoint), checkpoint_directory(search.jobs[0].output_dir, FINAL))
        runtime.report(winner.summary)


def _tell_end(
    search: PackSearch,
    runtime: Teller,
    choice: SweepChoice,
    outcomes: Mapping[int, TrialOutcome],
) -> None:
    """The choice, and what all trials took beside their steps."""
    runtime.report(choice)
    arm = search.jobs[0].arm_name
    summaries = [outcome.summary for outcome in outcomes.values()]
    probes, again = (
        sum(getattr(summary, name) for summary in summaries)
        for name in ("probe_tokens", "redone_tokens")
    )
    runtime.report(LedgerLine(job="", arm=arm, purpose="agreement", tokens=probes))
    runtime.report(LedgerLine(job="", arm=arm, purpose="redone", tokens=again))


@dataclass(slots=True, frozen=True)
class _Judge:
    """Decides after a rung, once every trial that can come to it has."""

    search: PackSearch
    runtime: Teller
    _told: set[int] = field(default_factory=set)  # trials whose end was told

    def report(self, record: object) -> None:
        """Tell a record, once over all workers."""
        if self.runtime.global_rank == 0:
            self.runtime.report(record)

    def tell(self, outcomes: Mapping[int, TrialOutcome]) -> None:
        """The rows of trials that left and were not told yet."""
        for number in sorted(outcomes.keys() - self._told):
            self._told.add(number)
            self.report(trial_record(self.search, outcomes[number]))

    def __call__(self, pack: Pack, rung: int) -> None:
        """Tell the rung's scores; decide and drop, unless others are still on their way to it."""
        search, arm = self.search, self.search.jobs[0].arm_name
        for trial, score in pack.scores[rung].items():
            if trial in pack.live and score.step == pack.live[trial].step:
                self.report(recorded(score, arm=arm))
        members = self._members(pack, rung)
        if any(trial not in pack.scores[rung] for trial in members if trial in pack.live):
            return
        scores = [{t: s.ranked for t, s in pack.scores[r].items()} for r in range(rung + 1)]
        decision = decide(arm, scores, members=members, halving=search.halving)
        affordable = _affordable(search, pack, decision)
        if affordable is not None:
            reason = f"rung {rung}: sweep.budget pays for {affordable} more"
            decision = limited(decision, scores, members=members, limit=affordable, reason=reason)
        self.report(decision)
        for trial in decision.drop:
            pack.drop(trial, reason=decision.reasons[str(trial)])
        self.tell(pack.outcomes)
        for number, live in pack.live.items():
            last = max(r for r, scores in pack.scores.items() if number in scores)
            self.report(_record_so_far(search, live, rung=last))

    def _members(self, pack: Pack, rung: int) -> dict[int, int]:
        """The trials that came to a rung or failed on their way to it, from the one before."""
        settings = self.search.settings
        if rung == 0:
            return settings
        left = {number for number, o in pack.outcomes.items() if o.status == "dropped"}
        return {t: s for t, s in settings.items() if t in pack.scores[rung - 1] and t not in left}


def _affordable(search: PackSearch, pack: Pack, decision: RungDecision) -> int | None:
    """How many settings of a decision go on by the budget; None: no cap, or nobody goes on."""
    caps = caps_of(search.budget, usd_per_device_second=search.jobs[0].usd_per_device_second)
    settings = {search.settings[trial] for trial in decision.keep}
    if not caps or not settings:
        return None
    totals = {number: trial.totals() for number, trial in pack.live.items()}
    left = pack.outcomes.values()
    shares = rung_shares(search.halving)
    return affordable_settings(
        caps,
        spent={
            kind: sum(_spent(t, kind) for t in totals.values())
            + sum(_outcome_spent(outcome, kind) for outcome in left)
            for kind in caps
        },
        kept={k: sum(_spent(totals[t], k) for t in decision.keep if t in totals) for k in caps},
        num_settings=len(settings),
        share=shares[decision.rung],
        following=shares[min(decision.rung + 1, len(shares) - 1)],
    )


def _spent(totals: Mapping[str, float], kind: str) -> float:
    if kind == "device_seconds":
        return totals["device_seconds"]
    return sum(totals[f"{part}tokens"] for part in ("", "scored_", "redone_", "probe_"))


def _outcome_spent(outcome: TrialOutcome, kind: str) -> float:
    summary = outcome.summary
    if kind == "device_seconds":
        return summary.device_seconds
    return summary.tokens + outcome.scored_tokens + summary.redone_tokens + summary.probe_tokens


def trial_record(search: PackSearch, outcome: TrialOutcome) -> TrialRecord:
    """How a trial left, as a row of its search's table."""
    summary = outcome.summary
    return dataclasses.replace(
        _row(search, outcome.trial, device_seconds=summary.device_seconds),
        status=outcome.status,
        reason=outcome.reason,
        rung=max((score.rung for score in outcome.scores), default=None),
        steps=summary.steps,
        tokens=int(_outcome_spent(outcome, "tokens")),
        trained_parameters=summary.trained_parameters,
    )


def _record_so_far(search: PackSearch, trial: Trial, *, rung: int) -> TrialRecord:
    """A trial that goes on after a rung, as a row."""
    totals = trial.totals()
    return dataclasses.replace(
        _row(search, trial.number, device_seconds=totals["device_seconds"]),
        status=UNFINISHED,
        rung=rung,
        steps=trial.step,
        tokens=int(_spent(totals, "tokens")),
        trained_parameters=trial.num_parameters,
    )


def _row(search: PackSearch, number: int, *, device_seconds: float) -> TrialRecord:
    """What a trial is, and the price of its seconds."""
    facts, price = search.trials[number], search.jobs[0].usd_per_device_second
    return TrialRecord(
        arm=search.jobs[0].arm_name,
        trial=number,
        setting=facts.setting,
        seed=facts.seed,
        draw=facts.draw,
        label=facts.label,
        values=facts.values,
        device_seconds=device_seconds,
        usd=None if price is None else device_seconds * price,
    )


def _choice(search: PackSearch, outcomes: Sequence[TrialOutcome]) -> SweepChoice | None:
    """The best setting of those that were trained to the end and saved."""
    arm, settings = search.jobs[0].arm_name, search.settings
    done = {outcome.trial for outcome in outcomes if outcome.status == "done"}
    records: list[RungRecord] = [
        recorded(score, arm=arm)
        for outcome in outcomes
        for score in outcome.scores
        if outcome.trial in done
    ]
    parameters = {settings[o.trial]: o.summary.trained_parameters for o in outcomes}
    return choose(arm, records, members=settings, parameters=parameters)


def put_whole(source: Path, target: Path) -> None:
    """Put a directory in a second place, whole or not at all, without a second copy if possible."""
    building = target.with_name(f".{target.name}.partial")
    shutil.rmtree(building, ignore_errors=True)
    building.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, building, copy_function=_link_or_copy)
    shutil.rmtree(target, ignore_errors=True)
    building.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        Path(target).hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
