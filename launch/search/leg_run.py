"""One leg of a trial, as its training workers run it: from the state before to the rung, scored.

Everything goes to the leg's own directory: its state, at the last rung the checkpoint, and
`summary.json` of the training so far. The leg before lends its state by hard links. Where that
state is gone, since the search that made it has ended, the trial trains from its first step, and
what other legs have in their records already is `redone`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from conf.records import LedgerLine, Progress, TrainRecord, TrainSummary, from_dict
from launch.search.halving import recorded
from launch.search.pack_search import Teller, put_whole
from launch.store import write_json
from training.job import TrainJob
from training.state import states_directory

SUMMARY = "summary.json"
# Rows that no record of a step counts; a summary has their sums since the first step.
OTHER_TOKENS = {
    "padding": "padding_tokens",
    "agreement": "probe_tokens",
    "redone": "redone_tokens",
}


@dataclass(kw_only=True, slots=True, frozen=True)
class Leg:
    """What crosses to the workers beside the training job.

    share: of the trial's steps, where it ends; share_before: where the leg before did, 0 for none.
    previous: that leg's output directory, or empty. rung_rows_path: the validation items.
    """

    rung: int
    share: float
    share_before: float
    previous: str
    rung_rows_path: str


def step_at(share: float, *, total_steps: int) -> int:
    """The step at which a rung lies, as in a pack: 0.1 of 30 steps is the third one."""
    return max(1, math.ceil(share * total_steps - 1e-9)) if share else 0


def run_leg(leg: Leg, job: TrainJob, runtime: Teller) -> None:
    """Train to the rung and tell the score; the rung's record is the last one told.

    Raises:
        JobFailed: the trial failed.
        TrainingStopped: asked to stop; the same call goes on from there.
    """
    from training.data import read_rows
    from training.engine import Engine
    from training.loop import train
    from training.rung import score_rung
    from training.schedule import num_steps

    started = time.perf_counter()
    points, is_teller = Path(job.output_dir), runtime.global_rank == 0
    total = num_steps(len(read_rows(Path(job.rows_path))), trainer=job.trainer)
    step = step_at(leg.share, total_steps=total)
    before = None
    if is_teller:
        before = _state_of(leg, points)
    known = step_at(leg.share_before, total_steps=total)
    told = _OwnSteps(runtime, known=known)
    scores = []

    def judge(engine: Engine) -> None:
        rows = Path(leg.rung_rows_path)
        scores.append(score_rung(engine, job, rows=rows, rung=leg.rung, step=step))

    summary = train(job, told, until=step, judge=judge)
    if not is_teller:
        return
    write_json(points / SUMMARY, summary)
    (score,) = scores
    for purpose, name in OTHER_TOKENS.items():
        tokens = getattr(summary, name) - (getattr(before, name) if before else 0)
        if tokens:
            runtime.report(LedgerLine(job="", arm=job.arm_name, purpose=purpose, tokens=tokens))
    seconds = (time.perf_counter() - started) * job.devices
    rest = max(0.0, seconds - told.device_seconds - score.device_seconds)
    # Loading and saving, which each leg does anew: a search in legs pays for it.
    runtime.report(LedgerLine(job="", arm=job.arm_name, purpose="sweep", device_seconds=rest))
    runtime.report(recorded(score, arm=job.arm_name))


def summary_of(points: Path) -> TrainSummary | None:
    """The summary of a trial up to a leg's end, all legs before included; None: not there."""
    path = points / SUMMARY
    if not path.is_file():
        return None
    found: TrainSummary = from_dict(TrainSummary, json.loads(path.read_text(encoding="utf-8")))
    return found


def _state_of(leg: Leg, points: Path) -> TrainSummary | None:
    """Take over the state of the leg before; its summary, None where training starts anew."""
    if not leg.previous:
        return None
    own, lent = states_directory(points), states_directory(leg.previous)
    if not own.is_dir() and lent.is_dir():
        put_whole(lent, own)
    return summary_of(Path(leg.previous)) if own.is_dir() else None


class _OwnSteps:
    """A runtime that tells the steps of this leg alone; steps that others told are `redone`."""

    def __init__(self, runtime: Teller, *, known: int) -> None:
        self.global_rank = runtime.global_rank
        self.local_rank = runtime.local_rank
        self.world_size = runtime.world_size
        self.device_seconds = 0.0
        self._runtime, self._known = runtime, known

    def report(self, record: TrainRecord | Progress) -> None:
        """Pass a record on."""
        if isinstance(record, TrainRecord):
            self.device_seconds += record.device_seconds
            if record.step <= self._known:
                self._runtime.report(_redone(record))
                return
        self._runtime.report(record)

    def should_save(self) -> bool:
        """As the runtime says."""
        return self._runtime.should_save()


def _redone(record: TrainRecord) -> LedgerLine:
    return LedgerLine(
        job="",
        arm=record.arm,
        purpose="redone",
        tokens=record.tokens,
        device_seconds=record.device_seconds,
    )


def as_leg(job: TrainJob, *, trial: int) -> TrainJob:
    """A trial's training without points between its rungs, whose checkpoints nobody would read."""
    trainer = dataclasses.replace(job.trainer, num_points=1)
    return dataclasses.replace(job, trainer=trainer, trial=trial)
