"""DeepSpeed behind three calls: start, pass, step. The only module that starts DeepSpeed."""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from training import zero
from training.agree import number_from_rank_0
from training.job import TrainJob
from training.model import Trainee, build, linear_choice, linear_obstacle
from training.optimizer import RATE_RATIO, parameter_groups
from training.optimizer_state import adam_steps, gathered, load_weights, restore
from training.state import SavedState

if TYPE_CHECKING:
    from training.data import Batch


class Engine:
    """A trainee on DeepSpeed. Every method is a collective operation: all workers call it."""

    def __init__(
        self,
        *,
        trainee: Trainee,
        deepspeed_engine: Any,
        clip_norm: float | None,
        is_linear_swapped: bool = False,
    ) -> None:
        self.trainee = trainee
        self.is_linear_swapped = is_linear_swapped
        self._engine = deepspeed_engine
        self._optimizer: torch.optim.Optimizer = deepspeed_engine.basic_optimizer
        self._clip_norm = clip_norm  # None: DeepSpeed clips
        self.device = str(deepspeed_engine.device)
        # Stages 2 and 3 reduce while they go, and so does stage 1 where it overlaps with backward.
        stage = deepspeed_engine.zero_optimization_stage()
        overlaps = stage == 1 and getattr(deepspeed_engine.optimizer, "overlap_comm", False)
        self.reduces_late = stage <= 1 and not overlaps
        self.is_reduced: bool = deepspeed_engine.enable_backward_allreduce
        if self.reduces_late:
            deepspeed_engine.enable_backward_allreduce = False

    def run_pass(self, batch: Batch, *, scale: float, is_last: bool) -> Tensor:
        """Forward and backward of one pass: the sum of its losses, (), unscaled.

        Gradients of loss x scale add up. They are averaged over workers in the last pass of a step,
        or where `reduces_late` holds in `reduce`, so that a pass waits for no other worker.
        """
        self._engine.set_gradient_accumulation_boundary(is_last and not self.reduces_late)
        loss: Tensor = self._engine(batch)
        self._engine.backward(loss * scale, scale_wrt_gas=False)
        return loss.detach()

    def reduce(self) -> None:
        """Average the gradients of a step's passes, unless the passes did."""
        self._engine.set_gradient_accumulation_boundary(True)
        if self.reduces_late and self.is_reduced:
            self._engine.allreduce_gradients()

    def forget_gradients(self) -> None:
        """Drop what the passes since the last step left, as if they had not been."""
        assert self.reduces_late, "other workers may be inside a reduction"
        self._engine.zero_grad()
        sharding = self._engine.optimizer
        if sharding is not self._optimizer:
            sharding.zero_grad(set_to_none=True)
        if hasattr(sharding, "_backward_active_depth"):
            sharding._backward_active_depth = 0  # an interrupted backward leaves it at 1

    def state_tensors(self, *, keep: bool) -> Iterator[tuple[str, Tensor]]:
        """What a training state holds, see training/optimizer_state.py."""
        return gathered(self.trainee.model, self._engine, keep=keep)

    def adam_steps(self) -> int:
        """Updates that the optimizer has counted."""
        return adam_steps(self._engine)

    def evaluate_pass(self, batch: Batch, *, reduction: str = "sum") -> Tensor:
        """The sum of a pass's losses, (), without gradients; the caller sets evaluation mode.

        reduction: "none" gives the loss of each target, (N,).
        """
        with torch.no_grad():
            loss: Tensor = self._engine(batch, reduction=reduction)
        return loss.detach()

    def step(self, *, learning_rate: float) -> float | None:
        """Clip and update; the global gradient norm before clipping, or None if it is not known."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group[RATE_RATIO]
        norm: Tensor | float | None = None
        if self._clip_norm is not None:
            trained = [p for p in self.trainee.model.parameters() if p.requires_grad]
            norm = torch.nn.utils.clip_grad_norm_(trained, self._clip_norm)
        self._engine.step()
        if self._clip_norm is None:
            norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)


@contextmanager
def started(
    job: TrainJob, *, stage: int, local_rank: int, saved: SavedState | None = None
) -> Iterator[Engine]:
    """Build the model and start DeepSpeed on it, as it was when `saved` was saved.

    torch.distributed must be initialised.

    Needs no compiler: torch's AdamW, and on CPU gloo instead of DeepSpeed's own operation.
    """
    deepspeed = _import_deepspeed(job)
    config = zero.deepspeed_config(
        job.trainer,
        stage=stage,
        offload=job.zero.offload,
        nvme_path=job.zero.nvme_path,
        dtype=job.dtype,
        device=job.device,
        world_size=job.world_size,
    )
    # Otherwise a model that is born sharded takes the group for one worker, in the first training
    # of a process.
    deepspeed.init_distributed(
        dist_backend="gloo" if job.device == "cpu" else "nccl", auto_mpi_discovery=False
    )
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    if job.device == "cuda":
        torch.cuda.set_device(local_rank)
    linear = _linear(job, stage=stage, saved=saved)
    # transformers holds it by a weak reference: it must live until the model is built.
    keep = HfDeepSpeedConfig(config) if stage == 3 else None  # type: ignore[no-untyped-call]
    try:
        with _groups_as_patient_as_the_first(job):
            trainee = build(job, stage=stage, linear=linear)
    finally:
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        del keep
    if saved is not None:
        load_weights(trainee.model, saved)
    groups = parameter_groups(
        trainee.model.named_parameters(),
        method=job.method,
        weight_decay=job.trainer.weight_decay,
    )
    optimizer = torch.optim.AdamW(groups, lr=job.learning_rate, fused=True)
    with _groups_as_patient_as_the_first(job):
        engine, *_ = deepspeed.initialize(model=trainee.loss, optimizer=optimizer, config=config)
    if stage == 0:
        # In bf16 DeepSpeed took a step on zero gradients to allocate the moments, which would make
        # Adam's bias correction start at step 2 and the first updates a quarter too small.
        optimizer.state.clear()
        if job.world_size == 1:
            # It would copy all gradients into one buffer and back, to average them over one worker.
            engine.enable_backward_allreduce = False
    if saved is not None:
        restore(trainee.model, engine, saved)
    is_clipped_here = zero.clips_in_loop(stage=stage, dtype=job.dtype)
    try:
        yield Engine(
            trainee=trainee,
            is_linear_swapped=linear[0],
            deepspeed_engine=engine,
            clip_norm=job.trainer.clip_norm if is_clipped_here else None,
        )
    finally:
        engine.destroy()


@contextmanager
def _groups_as_patient_as_the_first(job: TrainJob) -> Iterator[None]:
    """Groups of workers that are made here wait as long as the default group, then fail.

    DeepSpeed names no timeout for its groups, and torch takes 30 minutes then: under ZeRO 1 and 2 a
    worker that did not come to a collective was waited for that long, whatever was configured.
    """
    group = dist.distributed_c10d._get_default_group()
    timeout = group._get_backend(torch.device(job.device)).options._timeout
    new_group = dist.new_group
    dist.new_group = functools.partial(new_group, timeout=timeout)
    try:
        yield
    finally:
        dist.new_group = new_group


def _linear(job: TrainJob, *, stage: int, saved: SavedState | None) -> tuple[bool, str]:
    """Which linear product runs, the same on all workers and in all attempts.

    Two products round differently, so a choice by measurement would end exact resumption.
    """
    obstacle = linear_obstacle(job, stage=stage)
    if obstacle is not None:
        return False, obstacle
    if saved is not None:
        return saved.is_linear_swapped, "as the attempt before"
    is_swapped, reason = linear_choice(job, stage=stage)
    return bool(number_from_rank_0(int(is_swapped), device=job.device)), reason


def _import_deepspeed(job: TrainJob) -> Any:
    """DeepSpeed, imported late: it looks for an accelerator when it is imported."""
    if job.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from transformers.utils import logging as transformers_logging

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it logs warnings to stdout
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    # DeepSpeed calls names that torch 2.13 renamed, once per collective.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    if job.device == "cpu":
        # Otherwise initialize compiles an operation with g++ and ninja. Set whole rather than by
        # key: reading the attribute would probe every operation.
        deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed
