"""Which legs are not worth running any more, asked when all legs of the rung before are over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from conf.records import to_dict
from conf.sweep_records import SEARCH_EVENTS, RungDecision
from launch.job_context import JobContext
from launch.planned import LEG, Job
from launch.search.leg_search import decided
from launch.store import RunDirectory


@dataclass(kw_only=True, slots=True)
class LegJudge:
    """Decides the rungs of one run's legs, and journals each decision once.

    Args:
        context: the run as its jobs see it.
        run: its directory.
    """

    context: JobContext
    run: RunDirectory
    _told: set[tuple[str, int]] = field(default_factory=set)

    def cancelled(self, job: Job) -> str | None:
        """Why a leg is not worth running; None: it is, or a leg before was stopped."""
        if job.kind != LEG or not job.rung:
            return None
        assert job.arm is not None and job.trial is not None, "legs are of trials of an arm"
        search = self.context.leg_search(job.arm)
        events_of = self.context.leg_events(job.arm)
        decisions = decided(search, events_of, upto=job.rung - 1)
        for decision in decisions:
            self._tell(decision)
        reasons = {t: why for d in decisions for t, why in d.reasons.items()}
        if (reason := reasons.get(str(job.trial))) is not None:
            return f"{job.arm}, trial {job.trial}: {reason}"
        return None

    def _tell(self, decision: RungDecision) -> None:
        if (decision.arm, decision.rung) not in self._told:
            self._told.add((decision.arm, decision.rung))
            event = SEARCH_EVENTS[RungDecision]
            job = f"search:{decision.arm}"
            self.run.journal(event, job=job, arm=decision.arm, data=to_dict(decision))


def first_reason(*judges: Callable[[Job], str | None]) -> Callable[[Job], str | None]:
    """What the first of several judges says that says anything."""

    def judge(job: Job) -> str | None:
        return next((why for of in judges if (why := of(job)) is not None), None)

    return judge
