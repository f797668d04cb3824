"""DeepSpeed behind three calls: start, pass, step. The only module that starts DeepSpeed."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training import zero
from training.job import TrainJob
from training.model import Trainee, build

if TYPE_CHECKING:
    from training.data import Batch


class Engine:
    """A trainee on DeepSpeed. Every method is a collective operation: all workers call it."""

    def __init__(self, *, trainee: Trainee, deepspeed_engine: Any, clip_norm: float | None) -> None:
        self.trainee = trainee
        self._engine = deepspeed_engine
        self._optimizer: torch.optim.Optimizer = deepspeed_engine.basic_optimizer
        self._clip_norm = clip_norm  # None: DeepSpeed clips
        self.device = str(deepspeed_engine.device)

    def run_pass(self, batch: Batch, *, scale: float, is_last: bool) -> Tensor:
        """Forward and backward of one pass: the sum of its losses, (), unscaled.

        Gradients of loss x scale add up and are averaged over workers in the last pass of a step.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        loss: Tensor = self._engine(batch)
        self._engine.backward(loss * scale, scale_wrt_gas=False)
        return loss.detach()

    def step(self, *, learning_rate: float) -> float | None:
        """Clip and update; the global gradient norm before clipping, or None if it is not known."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm: Tensor | float | None = None
        if self._clip_norm is not None:
            trained = [p for p in self.trainee.model.parameters() if p.requires_grad]
            norm = torch.nn.utils.clip_grad_norm_(trained, self._clip_norm)
        self._engine.step()
        if self._clip_norm is None:
            norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)


@contextmanager
def started(job: TrainJob, *, stage: int, local_rank: int) -> Iterator[Engine]:
    """Build the model and start DeepSpeed on it; torch.distributed must be initialised.

    Needs no compiler: torch's AdamW, and on CPU gloo instead of DeepSpeed's own operation.
    """
    deepspeed = _import_deepspeed(job)
    config = zero.deepspeed_config(
        job.trainer,
        stage=stage,
        offload=job.zero.offload,
        dtype=job.dtype,
        device=job.device,
        world_size=job.world_size,
    )
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    if job.device == "cuda":
        torch.cuda.set_device(local_rank)
    # transformers holds it by a weak reference: it must live until the model is built.
    keep = HfDeepSpeedConfig(config) if stage == 3 else None  # type: ignore[no-untyped-call]
    try:
        trainee = build(job, stage=stage)
    finally:
        unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]
        del keep
    trained = [p for p in trainee.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=job.learning_rate, weight_decay=job.trainer.weight_decay, fused=True
    )
    engine, *_ = deepspeed.initialize(model=trainee.loss, optimizer=optimizer, config=config)
    if stage == 0:
        # In bf16 DeepSpeed took a step on zero gradients to allocate the moments, which would make
        # Adam's bias correction start at step 2 and the first updates a quarter too small.
        optimizer.state.clear()
        if job.world_size == 1:
            # It would copy all gradients into one buffer and back, to average them over one worker.
            engine.enable_backward_allreduce = False
    is_clipped_here = zero.clips_in_loop(stage=stage, dtype=job.dtype)
    try:
        yield Engine(
            trainee=trainee,
            deepspeed_engine=engine,
            clip_norm=job.trainer.clip_norm if is_clipped_here else None,
        )
    finally:
        engine.destroy()


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
