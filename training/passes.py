"""Forward and backward of one optimizer step, in smaller passes where memory runs out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from conf.errors import JobFailed
from conf.records import RenderedExample
from kernels.memory import is_out_of_memory
from training.agree import number_from_rank_0
from training.data import make_batch
from training.engine import Engine
from training.job import Runtime, TrainJob, WorkerLost
from training.sharding import Step, plan_steps, split_batch
from training.state import states_directory

# What an attempt that ran out of memory leaves for the next one, beside the states.
PASSES_FILE = "passes.json"


class Passes:
    """The passes of a training's steps.

    note: reports a remark on global rank 0. layout: how rows become passes, with as many rows as
    memory was found to hold. redone_tokens: computed in vain, over all workers.
    """

    def __init__(
        self,
        *,
        job: TrainJob,
        runtime: Runtime,
        rows: Sequence[RenderedExample],
        engine: Engine,
        note: Callable[[str], None],
    ) -> None:
        self._job = job
        self._global_rank = runtime.global_rank
        self._rows = rows
        self._lengths = [len(row.input_ids) for row in rows]
        self._engine = engine
        self._note = note
        self.layout = engine.trainee.layout
        self.redone_tokens = 0
        known = number_from_rank_0(_known_rows(job), device=engine.device)
        if 0 < known < self.layout.max_rows:
            self._allow(known)
            note(f"at most {known} rows in a pass: an attempt before ran out of memory")

    def steps(self, *, first: int, last: int) -> Iterator[Step]:
        """The optimizer steps first..last, dealt out to workers and passes."""
        return plan_steps(
            self._lengths,
            batch_size=self._job.trainer.batch_size,
            fits=self._fits,
            world_size=self._job.world_size,
            seed=self._job.trainer.seed,
            first_step=first,
            total_steps=last,
        )

    def backward(self, step: Step, *, target_tokens: int) -> tuple[Step, float]:
        """All passes of a step on all workers, with the gradients averaged over workers.

        Returns the step as it was taken, and the mean loss over the global batch's targets. Where a
        worker runs out of memory all start the step again with half the rows in a pass: batch, loss
        and gradients stay the same.

        Raises:
            JobFailed: one row alone does not fit.
            WorkerLost: out of memory where other workers wait inside a pass; the next attempt
                starts with smaller ones.
        """
        while True:
            loss, num_failed, tokens = self._attempt(step, target_tokens=target_tokens)
            if not num_failed:
                self._engine.reduce()
                return step, loss / target_tokens
            self.redone_tokens += tokens
            step = self._with_smaller_passes(step)

    def _attempt(self, step: Step, *, target_tokens: int) -> tuple[float, int, int]:
        """(loss, workers out of memory, tokens computed), summed over all workers."""
        torch.manual_seed(draw_seed(self._job.trainer.seed, step.step, self._global_rank))
        # DeepSpeed averages gradients over workers; the loss is a sum over the batch's targets.
        scale = self._job.world_size / target_tokens
        device = self._engine.device
        loss = torch.zeros((), dtype=torch.float64, device=device)
        num_failed = tokens = 0
        passes = step.shares[self._global_rank]
        try:
            for number, share in enumerate(passes, start=1):
                rows = [self._rows[index] for index in share]
                tokens += self.layout.num_tokens(rows) + self.layout.num_padding(rows)
                batch = make_batch(rows, layout=self.layout, pad_id=self._job.pad_id).to(device)
                loss += self._engine.run_pass(batch, scale=scale, is_last=number == len(passes))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if not self._engine.reduces_late:
                raise self._given_up(step) from error
            num_failed = 1
        counts = torch.tensor([num_failed, tokens], dtype=torch.float64, device=device)
        told = torch.cat([loss[None], counts])
        dist.all_reduce(told)
        return float(told[0]), int(told[1]), int(told[2])

    def _with_smaller_passes(self, step: Step) -> Step:
        """The step anew in passes of half as many rows; the same on all workers."""
        self._engine.forget_gradients()
        if self._engine.device.startswith("cuda"):
            torch.cuda.empty_cache()
        most = self._halved(step)
        self._allow(most)
        self._note(f"out of memory in step {step.step}: at most {most} rows in a pass from now on")
        shares = split_batch(
            step.rows,
            lengths=self._lengths,
            world_size=self._job.world_size,
            fits=self._fits,
        )
        return dataclasses.replace(step, shares=shares)

    def _given_up(self, step: Step) -> JobFailed | WorkerLost:
        """The end of an attempt in which this worker alone knows that memory ran out."""
        try:
            most = self._halved(step)
        except JobFailed as failure:
            return failure
        directory = states_directory(self._job.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        building = directory / f".{PASSES_FILE}.{self._global_rank}"
        building.write_text(json.dumps({"max_rows": most}), encoding="utf-8")
        os.replace(building, directory / PASSES_FILE)
        return WorkerLost(
            f"worker {self._global_rank} ran out of memory in step {step.step}; the next attempt "
            f"takes at most {most} rows in a pass"
        )

    def _halved(self, step: Step) -> int:
        largest = max(len(rows) for share in step.shares for rows in share)
        if largest <= 1:
            raise JobFailed(
                f"step {step.step}: out of memory with a single row in a pass. Try "
                "trainer.activation_checkpointing=true, zero=3_offload, or a smaller "
                "model.max_length."
            )
        return largest // 2

    def _allow(self, max_rows: int) -> None:
        self.layout = dataclasses.replace(self.layout, max_rows=max_rows)

    def _fits(self, part: Sequence[int]) -> bool:
        return self.layout.fits([self._rows[index] for index in part])


def draw_seed(seed: int, step: int, global_rank: int) -> int:
    """The seed of what a worker draws at random (dropout) in a step.

    With it a resumed training needs no generator's state, and a step that is taken again draws the
    same. Weights are drawn from `seed` itself, equal on all workers.
    """
    digest = hashlib.sha256(f"draws {seed} {step} {global_rank}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _known_rows(job: TrainJob) -> int:
    """Rows of a pass that an earlier attempt found to be too many, halved; 0 where none did."""
    path = states_directory(job.output_dir) / PASSES_FILE
    if not path.is_file():
        return 0
    return int(json.loads(path.read_text(encoding="utf-8"))["max_rows"])
