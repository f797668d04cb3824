"""Packed LoRA trials: many settings train inside one base model, and bad ones leave early.

Each trial has its own adapter, batches, clipping, AdamW and schedule; a step of the pack is one
step of every trial, whose rows go through the base together (training/pack_model.py). What a trial
computes is what it computes alone, to rounding, whoever is beside it. A trial whose loss or
gradient norm is not finite fails and leaves; nobody else is touched. At a rung, a share of a
trial's steps, it is scored on the validation items, and a judge says who is dropped.

Several workers share each trial's batch as those of any training do (training/sharding.py), and
score parts of a rung's items: see training/pack_workers.py. The base is whole on each of them.
After each rung, and when it is asked to stop, the pack saves its state and goes on from it, on any
number of workers.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import SafetensorError

from conf.checkpoint_records import ProbeItem
from conf.errors import JobFailed, MachineFailed
from conf.records import Progress, TrainRecord
from conf.trial_records import RungScore, TrialOutcome
from training.checkpoint import directory_bytes, gathered_state, write_checkpoint
from training.data import read_rows
from training.item_trees import ItemTrees
from training.job import Runtime, TrainJob, checkpoint_directory, point_name
from training.model import linear_choice
from training.pack_model import PackModel, Part
from training.pack_passes import PackPasses, TrialStep
from training.pack_scores import read_items, score_items
from training.pack_state import PackState, pack_sha256, read_pack_state, write_pack_state
from training.pack_trial import Trial, adapter_name, check_job
from training.pack_workers import Workers
from training.probe import PROBE_ROWS, continued, probe_item
from training.telemetry import peak_memory_bytes

DONE, DROPPED, FAILED = "done", "dropped", "failed"


class Pack:
    """The trials that train together. scores: rung -> trial -> score, of all that ever reached it.

    live: by number, those that train. outcomes: by number, those that left.
    """

    def __init__(
        self,
        jobs: Sequence[TrainJob],
        runtime: Runtime,
        *,
        rung_rows_path: Path,
        rungs: Sequence[float],
    ) -> None:
        """Load the base model with the adapters of some jobs, as they stand in a state if any.

        Raises:
            DataError: rows that cannot be trained on or scored.
            ConfigError, ModelError: a job, model or target_modules that cannot be packed.
            JobFailed: the state is damaged.
        """
        assert all(0 < share <= 1 for share in rungs), f"rungs are shares of the steps: {rungs}"
        for number, job in enumerate(jobs):
            taken = [before.trial for before in jobs[:number] if before.trial is not None]
            check_job(job, first=jobs[0], taken=taken)
        self.live: dict[int, Trial] = {}
        self.outcomes: dict[int, TrialOutcome] = {}
        self.scores: dict[int, dict[int, RungScore]] = {rung: {} for rung in range(len(rungs))}
        self._first, self._runtime, self._rungs = jobs[0], runtime, tuple(rungs)
        self.workers = Workers(runtime, device=jobs[0].device)
        self._rows = read_rows(Path(jobs[0].rows_path))
        self._items = read_items(rung_rows_path)
        self._trees = ItemTrees.of(self._items)
        self._sha256 = pack_sha256(jobs, rung_rows_path=rung_rows_path, rungs=rungs)
        state = self._newest_state()
        jobs = [job for job in jobs if state is None or job.trial in state.totals]
        self._model = PackModel(jobs[0], adapter=adapter_name(jobs[0]), linear=self._linear(state))
        self._passes = PackPasses(
            self._model, workers=self.workers, device=jobs[0].device, note=self._note
        )
        self._enter(jobs[0])
        for job in jobs[1:]:
            self.add(job)
        if state is not None:
            self._go_on(state)
        self._note(f"{len(jobs)} trials; linear: {self._model.reason}")

    def _newest_state(self) -> PackState | None:
        """On all workers; the first one tidies up behind a process that died while it saved."""

        def read() -> PackState | None:
            return read_pack_state(self._first.output_dir, pack=self._sha256)

        if not self.workers.is_alone:
            self.workers.first_does(read)
        return read()

    def _linear(self, state: PackState | None) -> tuple[bool, str]:
        """Which linear product all attempts and workers take: they round differently."""
        if state is not None:
            return state.is_linear_swapped, "as the attempt before"
        is_swapped, reason = linear_choice(self._first, stage=0)
        return bool(self.workers.number_of_first(int(is_swapped))), reason

    def _go_on(self, state: PackState) -> None:
        self.outcomes = {outcome.trial: outcome for outcome in state.outcomes}
        for score in state.scores:
            self.scores[score.rung][score.trial] = score
        for number, trial in self.live.items():
            trial.go_on(state.totals[number], state.tensors(number))
        self._passes.max_tokens = state.max_tokens

    def save_state(self) -> None:
        """Write where all trials are, so that another process can go on from here.

        Raises:
            MachineFailed: no room; the state before is still there.
        """
        self.workers.first_does(self._write_state)

    def _write_state(self) -> None:
        try:
            write_pack_state(
                self._first.output_dir,
                pack=self._sha256,
                trials=self.live.values(),
                outcomes=self.outcomes.values(),
                scores=[score for of in self.scores.values() for score in of.values()],
                is_linear_swapped=self._model.is_linear_swapped,
                max_tokens=self._passes.max_tokens,
            )
        except (OSError, SafetensorError) as error:
            raise MachineFailed(f"the state of the search was not saved: {error}") from error

    def add(self, job: TrainJob) -> None:
        """A trial that enters, with its first step still to come.

        Raises:
            ConfigError, ModelError: a job that does not fit into this pack.
        """
        taken = [*self.live, *self.outcomes]
        check_job(job, first=self._first, taken=taken)
        self._model.add(job, adapter=adapter_name(job))
        self._enter(job)

    def _enter(self, job: TrainJob) -> None:
        trial = Trial(
            job,
            rows=self._rows,
            layout=self._model.layout,
            named=self._model.named_parameters(adapter_name(job)),
        )
        self.live[trial.number] = trial

    def drop(self, trial: int, *, reason: str = "dropped at a rung") -> None:
        """A live trial leaves before its end; its weights are gone."""
        self._leave(self.live[trial], status=DROPPED, reason=reason)

    def save(self, trial: int) -> Path:
        """Write a live trial's adapters as a peft directory and return where they lie.

        Raises:
            JobFailed: the model's answers are not finite.
            MachineFailed: no room.
        """
        own = self.live[trial]
        rows = [continued(row) for row in self._rows[:PROBE_ROWS]]
        parts = [Part(own.adapter, [row]) for row in rows]
        own.probe_tokens += sum(map(self._model.num_tokens, parts))
        directory = checkpoint_directory(
            Path(own.job.output_dir) / "trials" / str(trial),
            point_name(own.step, total_steps=own.total_steps),
        )
        self.workers.first_does(lambda: self._write(own, directory, probe=self._probe(parts)))
        return directory

    def _write(self, own: Trial, directory: Path, *, probe: tuple[ProbeItem, ...]) -> None:
        names = frozenset(name for name, _ in self._model.named_parameters(own.adapter))
        try:
            write_checkpoint(
                directory,
                job=own.job,
                model=self._model.model,
                state=gathered_state(self._model.model, names=names, keep=True),
                step=own.step,
                tokens=own.tokens,
                trained_parameters=own.num_parameters,
                probe=probe,
                adapter=own.adapter,
            )
        except (OSError, SafetensorError) as error:
            raise MachineFailed(f"{directory} was not saved: {error}") from error

    def step(self) -> None:
        """One optimizer step of every live trial, and their records.

        Raises:
            JobFailed, PeerLost: see `PackPasses.backward`.
        """
        started_ns = time.perf_counter_ns()
        steps = self._passes.backward(self.live.values())
        reasons = {step.trial.number: _update(step) for step in steps}
        seconds = self.workers.seconds_since(started_ns)
        total = sum(step.tokens for step in steps)
        for step in steps:
            step.trial.redone_tokens += step.redone_tokens
            share = seconds * step.tokens / total
            if step.values is None:
                step.trial.redone_tokens += step.tokens
                step.trial.device_seconds += share * self._first.devices
                reason = reasons[step.trial.number]
                self._leave(step.trial, status=FAILED, reason=reason)
                continue
            record = step.trial.record(
                step.parts,
                step.values,
                tokens=step.tokens,
                seconds=share,
                peak_memory_bytes=self._passes.peaks,
            )
            self._report(record)
        self._note(f"{len(self.live)} trials train")

    def reached(self) -> Iterator[int]:
        """The rungs that some trial has come to with its last step, lowest first, scored."""
        for rung, share in enumerate(self._rungs):
            # The small term keeps 0.1 * 30 = 3.0000000000000004 at 3 steps.
            here = [
                trial
                for trial in self.live.values()
                if trial.step == max(1, math.ceil(share * trial.total_steps - 1e-9))
                and trial.number not in self.scores[rung]
            ]
            for trial in here:
                self._score(trial, rung)
            if here:
                yield rung

    def finish(self) -> None:
        """Save and let go the trials that have taken all their steps."""
        for trial in [trial for trial in self.live.values() if trial.is_done]:
            try:
                directory = self.save(trial.number)
            except MachineFailed:
                raise
            except JobFailed as error:
                self._leave(trial, status=FAILED, reason=str(error))
            else:
                self._leave(trial, status=DONE, checkpoint=directory)

    def _score(self, trial: Trial, rung: int) -> None:
        """Score a trial at a rung; once where rungs fall on the same step. It may fail by it."""
        number = trial.number
        same = [of for of in self.scores.values() if number in of and of[number].step == trial.step]
        if same:
            before = dataclasses.replace(same[0][number], rung=rung, tokens=0, device_seconds=0.0)
            self.scores[rung][number] = before
            return
        self._note(f"rung {rung}: trial {number} is scored")
        started_ns = time.perf_counter_ns()
        tokens = self._trees.num_tokens(max_tokens=self._passes.max_tokens)
        logprobs = self._item_logprobs(trial)
        seconds = self.workers.seconds_since(started_ns) * self._first.devices
        trial.scored_tokens += tokens
        trial.device_seconds += seconds
        try:
            found = score_items(self._items, logprobs)
        except JobFailed as error:
            self._leave(trial, status=FAILED, reason=f"rung {rung}: {error}")
            return
        self.scores[rung][number] = RungScore(
            trial=number,
            rung=rung,
            step=trial.step,
            metric=found.metric,
            per_item=found.per_item,
            tie_break=found.tie_break,
            tokens=tokens,
            device_seconds=seconds,
        )

    def _item_logprobs(self, trial: Trial) -> list[list[float]]:
        """Log p of each row of each item under a trial, whose passes are dealt out to the workers.

        What another worker computes is 0 here, and all are summed.
        """
        found: list[list[float]] = []
        for number, passed in enumerate(self._trees.passes(max_tokens=self._passes.max_tokens)):
            if number % self.workers.count == self.workers.global_rank:
                found += self._model.item_logprobs(trial.adapter, self._trees, passed)
            else:
                found += [[0.0] * len(tree.row_targets) for tree in passed]
        return self.workers.summed_rows(found)

    def _probe(self, parts: Sequence[Part]) -> tuple[ProbeItem, ...]:
        """What the trained model says of the first training rows, as training/probe.py."""
        found: list[list[float]] = []
        for together in self._model.passes(parts, max_tokens=self._passes.max_tokens):
            found += self._model.logprobs(together)
        pairs = zip(self._rows[:PROBE_ROWS], found, strict=True)
        return tuple(probe_item(row, logprob=logprob) for row, (logprob,) in pairs)

    def _leave(
        self, trial: Trial, *, status: str, reason: str = "", checkpoint: Path | None = None
    ) -> None:
        number = trial.number
        written = 0
        if checkpoint is not None and self.workers.is_first:
            written = directory_bytes(checkpoint)
        self.outcomes[number] = TrialOutcome(
            trial=number,
            status=status,
            reason=reason,
            checkpoint="" if checkpoint is None else str(checkpoint),
            scores=tuple(of[number] for of in self.scores.values() if number in of),
            scored_tokens=trial.scored_tokens,
            summary=trial.summary(
                base_parameters=self._model.total_parameters,
                checkpoint_bytes=written,
                peak_memory_bytes=max(peak_memory_bytes(self._first.device), *self._passes.peaks),
            ),
        )
        del self.live[number]
        self._model.remove(trial.adapter)
        if status != DONE:
            self._note(f"trial {number} {status}: {reason}")

    def _note(self, note: str) -> None:
        """Tell how far the pack is; a trial that left will take no more steps."""
        taken = sum(outcome.summary.steps for outcome in self.outcomes.values())
        done = taken + sum(trial.step for trial in self.live.values())
        total = taken + sum(trial.total_steps for trial in self.live.values())
        self._report(Progress(done=done, total=total, unit="steps", note=note))

    def _report(self, record: TrainRecord | Progress) -> None:
        if self.workers.is_first:
            self._runtime.report(record)


def _update(step: TrialStep) -> str:
    """Finish a trial's step; why it failed, or empty."""
    try:
        step.values = step.trial.update(step.loss)
    except JobFailed as error:
        return str(error)
    return ""
