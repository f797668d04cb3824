"""After each wave of test items: which comparisons are closed, and which arms leave.

The judgement is a function of the scores and costs in the run's records. It is journalled, and a
run that is resumed takes the journalled one where scores and rules are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conf.hashing import sha256_of
from conf.records import from_dict, to_dict
from conf.run_groups import DecisionConfig
from evaluation.decision.closing import Comparison, judge, leaving
from evaluation.decision.rules import total_cost
from evaluation.records.run_records import RunRecords, read_run
from evaluation.results.arm_summary import ArmSummary, Settings, summarise_arm
from evaluation.results.item_intervals import ItemRule
from evaluation.statistics.clusters import sources_of
from launch.jsonl import read_lines
from launch.planned import Job
from launch.preflight import Checked
from launch.store import RunDirectory
from launch.waves import waves_of

JUDGED = "wave_judged"
CLOSED = "comparison_closed"
CANCELLED = "job_cancelled"


@dataclass(kw_only=True, slots=True, frozen=True)
class Judgement:
    """What was found after a wave. left: arms that answer no later wave, of this one or before."""

    wave: int
    inputs_sha256: str
    left: tuple[str, ...]
    comparisons: tuple[Comparison, ...]


@dataclass(kw_only=True, slots=True)
class Judge:
    """Judges the waves of one run, each once.

    Args:
        checked: the run.
        run: its directory, where all records of a wave are when it is judged.
    """

    checked: Checked
    run: RunDirectory
    _judged: dict[int, Judgement] = field(default_factory=dict)

    def cancelled(self, job: Job) -> str | None:
        """Why a job of a later wave is not worth running; None: it is."""
        if not job.wave:
            return None
        before = self._after(job.wave - 1)
        if job.arm not in before.left:
            return None
        return f"{job.arm} left after wave {job.wave}: all its comparisons are closed"

    def _after(self, wave: int) -> Judgement:
        if wave not in self._judged:
            earlier = self._after(wave - 1) if wave else None
            self._judged[wave] = self._judge(wave, earlier)
        return self._judged[wave]

    def _judge(self, wave: int, earlier: Judgement | None) -> Judgement:
        decision = self.checked.config.decision
        seed = self.checked.config.task.seed
        waves = waves_of(self.checked.task.items["test"], seed=seed)
        items = [item.id for own in waves[: wave + 1] for item in own]
        arms = answered(read_run(self.run.path), self.checked)
        scores = {n: {i: a.scores[i] for i in items if i in a.scores} for n, a in arms.items()}
        kept = _frozen(earlier)
        inputs = sha256_of([scores, decision, sorted(self.checked.arms), kept])
        known = _journalled(self.run.path, wave, inputs)
        if known is not None:
            return known
        sources = sources_of(self.checked.task.items["test"])
        rest = [item.id for own in waves[wave + 1 :] for item in own]
        found = judge(
            scores,
            items=items,
            num_left=len(rest if sources is None else {sources[i] for i in rest}),
            num_arms=len(self.checked.arms),
            decision=decision,
            costs={n: total_cost(a.result, decision=decision) for n, a in arms.items()},
            sources=sources,
            largest=ItemRule(confidence=decision.confidence, sources=sources).largest,
            frozen=kept,
        )
        gone = () if earlier is None else earlier.left
        left = (*gone, *leaving(found, [name for name in scores if name not in gone]))
        judgement = Judgement(wave=wave, inputs_sha256=inputs, left=left, comparisons=found)
        self._tell(judgement, known=() if earlier is None else earlier.comparisons)
        return judgement

    def _tell(self, judgement: Judgement, *, known: Sequence[Comparison]) -> None:
        """Journal what is closed now and was not before, and the judgement whole."""
        before = {(p.a, p.b) for p in known if p.is_closed}
        for pair in judgement.comparisons:
            if pair.is_closed and (pair.a, pair.b) not in before:
                self.run.journal(CLOSED, data={"wave": judgement.wave, **to_dict(pair)})
        self.run.journal(JUDGED, data=to_dict(judgement))


def answered(records: RunRecords, checked: Checked) -> dict[str, ArmSummary]:
    """The arms that have answered test items so far and have not failed."""
    settings = Settings(decision=records.decision, pricing=records.pricing)
    found = {}
    for name in checked.arms:
        arm = records.arms[name]
        if arm.status in ("failed", "refused"):
            continue
        now = replace(records, arms={**records.arms, name: replace(arm, status="done")})
        summary = summarise_arm(now, name, settings=settings)
        if summary.scores:
            found[name] = summary
    return found


def _frozen(earlier: Judgement | None) -> tuple[Comparison, ...]:
    """Comparisons of arms that have left: they get no further item."""
    if earlier is None:
        return ()
    return tuple(p for p in earlier.comparisons if {p.a, p.b} & set(earlier.left))


def _journalled(run: Path, wave: int, inputs: str) -> Judgement | None:
    for line in read_lines(run / "journal.jsonl"):
        data = line["data"]
        if line["event"] == JUDGED and (data["wave"], data["inputs_sha256"]) == (wave, inputs):
            return from_dict(Judgement, data)
    return None


def tell_cancelled(checked: Checked, run: RunDirectory, job: Job) -> None:
    """Journal a job that is not run, and what it was found under."""
    facts = {"key": job.key, "decision_sha256": sha256_of(checked.config.decision)}
    run.journal(CANCELLED, job=job.id, arm=job.arm, data=facts)


def cancelled_before(run: Path, jobs: Sequence[Job], decision: DecisionConfig) -> list[Job]:
    """The jobs that the last invocation found not worth running, under the same rules."""
    found: dict[str, Mapping[str, Any]] = {}
    for line in read_lines(run / "journal.jsonl"):
        if line["event"] == "run_started":
            found = {}
        elif line["event"] == CANCELLED:
            found[line["job"]] = line["data"]
    rules = sha256_of(decision)
    return [
        job
        for job in jobs
        if (data := found.get(job.id))
        and (data["key"], data["decision_sha256"]) == (job.key, rules)
    ]
