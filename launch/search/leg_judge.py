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
    # By arm and rung, once it is decided: a leg that waits for a device is asked about many times.
    _decided: dict[tuple[str, int], list[RungDecision]] = field(default_factory=dict)
    _told: set[tuple[str, int]] = field(default_factory=set)

    def cancelled(self, job: Job) -> str | None:
        """Why a leg is not worth running; None: it is, or a leg before was stopped."""
        if job.kind != LEG or not job.rung:
            return None
        assert job.arm is not None and job.trial is not None, "legs are of trials of an arm"
        decisions = self._upto(job.arm, job.rung - 1)
        reasons = {t: why for d in decisions for t, why in d.reasons.items()}
        if (reason := reasons.get(str(job.trial))) is not None:
            return f"{job.arm}, trial {job.trial}: {reason}"
        return None

    def _upto(self, arm: str, rung: int) -> list[RungDecision]:
        """The decisions of all rungs up to one; fewer where a leg was stopped."""
        if (arm, rung) not in self._decided:
            context = self.context
            found = decided(context.leg_search(arm), context.leg_events(arm), upto=rung)
            for decision in found:
                self._tell(decision)
            if len(found) <= rung and (not found or found[-1].keep):
                return found
            self._decided[arm, rung] = found
        return self._decided[arm, rung]

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
