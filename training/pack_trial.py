"""One trial of a pack: its own batches, gradient clipping, AdamW, schedule and totals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from conf.errors import ConfigError, JobFailed, ModelError
from conf.methods import LoraMethod
from conf.records import RenderedExample, TrainRecord, TrainSummary
from training.data import num_targets
from training.estimate import model_size
from training.flops import PassShape, StepCost, train_cost
from training.job import TrainJob
from training.optimizer import RATE_RATIO, parameter_groups
from training.pack_model import Part
from training.packing import Layout, shared_length
from training.schedule import learning_rate_at, num_steps
from training.sharding import Step, plan_steps

MOMENTS = ("exp_avg", "exp_avg_sq")
# What a trial counts, by name of its attribute; a state holds them.
TOTALS = (
    *("step", "examples", "tokens", "target_tokens"),
    *("scored_tokens", "probe_tokens", "redone_tokens", "device_seconds"),
)
# What the trials of a pack may differ in; of all else the pack has one.
OWN_FIELDS = {"method", "trainer", "output_dir", "trial", "num_labels", "shown_row", "arm_name"}


def adapter_name(job: TrainJob) -> str:
    """The name that a trial's adapters have in peft."""
    return f"trial_{job.trial}"


class Trial:
    """A LoRA training that shares its passes with others.

    job: what is trained. step: optimizer steps taken. parameters: its adapters'.
    """

    def __init__(
        self,
        job: TrainJob,
        *,
        rows: Sequence[RenderedExample],
        layout: Layout,
        named: Sequence[tuple[str, nn.Parameter]],
    ) -> None:
        """Begin before the first step.

        Args:
            job: with the number of the trial.
            rows: the pack's training rows.
            layout: how they become parts.
            named: its parameters.
        """
        assert job.trial is not None
        self.job, self.number = job, job.trial
        self.adapter = adapter_name(job)
        self.step = 0
        self.total_steps = num_steps(len(rows), trainer=job.trainer)
        self._named = dict(named)
        self.parameters = list(self._named.values())
        self.device_seconds = 0.0
        self.examples = self.tokens = self.target_tokens = 0
        self.scored_tokens = self.probe_tokens = self.redone_tokens = 0
        self._rows = rows
        self._layout = dataclasses.replace(layout, max_rows=job.max_rows)
        self._cost = _cost_of(job)
        groups = parameter_groups(named, method=job.method, weight_decay=job.trainer.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=job.learning_rate, fused=True)
        self._steps = plan_steps(
            [len(row.input_ids) for row in rows],
            batch_size=job.trainer.batch_size,
            fits=lambda part: self._layout.fits([rows[index] for index in part]),
            world_size=job.world_size,
            seed=job.trainer.seed,
            total_steps=self.total_steps,
        )
        self._now: Step | None = None

    @property
    def is_done(self) -> bool:
        """Whether all its steps are taken."""
        return self.step == self.total_steps

    @property
    def num_parameters(self) -> int:
        """Parameters of its adapters."""
        return sum(parameter.numel() for parameter in self.parameters)

    def next_parts(self) -> list[list[Part]]:
        """The parts of its next step, by worker: the passes that each would take for it alone."""
        self._now = next(self._steps)
        return [
            [Part(self.adapter, [self._rows[index] for index in rows]) for rows in share if rows]
            for share in self._now.shares
        ]

    def update(self, loss: float) -> tuple[float, float, float]:
        """Finish the step: the mean loss, the rate and the gradient norm before clipping.

        Args:
            loss: summed over the step's targets, of all workers; so are the gradients.

        Raises:
            JobFailed: loss or norm is not finite; its weights stay as they are.
        """
        assert self._now is not None
        rows = [self._rows[index] for index in self._now.rows]
        targets = sum(map(num_targets, rows))
        mean = loss / targets
        self._require_finite(mean, "loss")
        grads = [p.grad for p in self.parameters if p.grad is not None]
        torch._foreach_mul_(grads, 1 / targets)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.job.trainer.clip_norm)
        self._require_finite(float(norm), "gradient norm")
        rate = learning_rate_at(
            self.step + 1,
            total_steps=self.total_steps,
            peak=self.job.learning_rate,
            trainer=self.job.trainer,
        )
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group[RATE_RATIO]
        self._optimizer.step()
        self.forget_gradients()
        self.step += 1
        self.examples += len(rows)
        self.target_tokens += targets
        return mean, rate, float(norm)

    def totals(self) -> dict[str, float]:
        """What it counted so far, by name."""
        return {name: getattr(self, name) for name in TOTALS}

    def tensors(self) -> dict[str, Tensor]:
        """Weights and Adam's moments by `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`."""
        found = {}
        for name, parameter in self._named.items():
            found[f"weight/{name}"] = parameter.detach()
            state = self._optimizer.state[parameter]
            found |= {f"{kind}/{name}": state[kind] for kind in MOMENTS if kind in state}
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def go_on(self, totals: Mapping[str, float], tensors: Mapping[str, Tensor]) -> None:
        """Stand where `totals` and `tensors` of an earlier process were taken."""
        for name in TOTALS:
            setattr(self, name, totals[name])
        for name, parameter in self._named.items():
            with torch.no_grad():
                parameter.copy_(tensors[f"weight/{name}"])
            if f"exp_avg/{name}" in tensors:  # it has taken a step
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(self.step)),
                    **{kind: tensors[f"{kind}/{name}"].to(parameter.device) for kind in MOMENTS},
                }
        for _ in range(self.step):
            next(self._steps)

    def forget_gradients(self) -> None:
        """Drop what the passes since the last step left."""
        self._optimizer.zero_grad(set_to_none=True)

    def record(
        self,
        parts: Sequence[Part],
        values: tuple[float, float, float],
        *,
        tokens: int,
        seconds: float,
        peak_memory_bytes: tuple[int, ...],
    ) -> TrainRecord:
        """The record of a step that was taken.

        Args:
            parts: what all workers forwarded for it.
            values: what `update` returned.
            tokens: that it put through the embedding.
            seconds: its share of the pack's step, so that trials add up to the clock.
            peak_memory_bytes: so far, by worker.
        """
        loss, rate, norm = values
        self.tokens += tokens
        self.device_seconds += seconds * self.job.devices
        price = self.job.usd_per_device_second
        rows = [row for part in parts for row in part.rows]
        return TrainRecord(
            arm=self.job.arm_name,
            step=self.step,
            examples=len(rows),
            tokens=tokens,
            target_tokens=sum(map(num_targets, rows)),
            loss=loss,
            learning_rate=rate,
            grad_norm=norm,
            step_seconds=seconds,
            device_seconds=seconds * self.job.devices,
            usd=None if price is None else seconds * self.job.devices * price,
            train_seed=self.job.trainer.seed,
            trial=self.number,
            num_labels=self.job.num_labels,
            flops=self._flops(parts),
            peak_memory_bytes=peak_memory_bytes,
        )

    def summary(
        self, *, base_parameters: int, checkpoint_bytes: int, peak_memory_bytes: int
    ) -> TrainSummary:
        """What it did so far, in the terms of a training of its own."""
        return TrainSummary(
            arm=self.job.arm_name,
            steps=self.step,
            trained_parameters=self.num_parameters,
            total_parameters=base_parameters + self.num_parameters,
            checkpoint_bytes=checkpoint_bytes,
            device_seconds=self.device_seconds,
            peak_memory_bytes=peak_memory_bytes,
            examples=self.examples,
            tokens=self.tokens,
            target_tokens=self.target_tokens,
            padding_tokens=0,
            num_truncated=self.job.num_truncated,
            learning_rate=self.job.learning_rate,
            world_size=self.job.world_size,
            zero_stage=0,
            shown_row=self.job.shown_row,
            redone_tokens=self.redone_tokens,
            probe_tokens=self.probe_tokens,
        )

    def _flops(self, parts: Sequence[Part]) -> int | None:
        if self._cost is None:
            return None
        shapes = [
            PassShape.of(
                [len(row.input_ids) for row in part.rows],
                shared=shared_length(part.rows),
                targets=sum(map(num_targets, part.rows)),
            )
            for part in parts
        ]
        return sum(map(self._cost.flops, shapes))

    def _require_finite(self, value: float, name: str) -> None:
        if not math.isfinite(value):
            assert self._now is not None
            items = ", ".join(self._rows[index].item_id for index in self._now.rows)
            raise JobFailed(
                f"trial {self.number}, step {self.step + 1}: the {name} is {value}, on items "
                f"{items}. Try a smaller trainer.learning_rate."
            )


def _cost_of(job: TrainJob) -> StepCost | None:
    try:
        return train_cost(job.method, size=model_size(Path(job.model_dir)))
    except (ModelError, KeyError):  # a configuration without the counts that are needed
        return None


def check_job(job: TrainJob, *, first: TrainJob, taken: Sequence[int]) -> None:
    """Refuse a job that cannot be a trial of a pack.

    Args:
        job: the job.
        first: a job that is in the pack, or the same.
        taken: numbers of the trials that were ever in it.

    Raises:
        ConfigError: another method than plain LoRA, or another model or rows.
    """
    where = f"arms.{job.arm_name}"
    method = job.method
    if not isinstance(method, LoraMethod):
        raise _refusal(where, found=f"method {method.kind}", expected="LoRA")
    if method.use_dora or method.quantization is not None or method.lora_dropout > 0:
        raise _refusal(
            where,
            found=f"use_dora={method.use_dora} quantization={method.quantization} "
            f"lora_dropout={method.lora_dropout}",
            expected="plain LoRA adapters without dropout over a base that is not quantised",
        )
    if job.trial is None or job.trial in taken:
        raise _refusal("trial", found=str(job.trial), expected=f"a number not in {list(taken)}")
    for field in dataclasses.fields(job):
        own, shared = getattr(job, field.name), getattr(first, field.name)
        if field.name not in OWN_FIELDS and own != shared:
            raise _refusal(field.name, found=str(own), expected=f"{shared}, as in the pack")
    if job.trainer.activation_checkpointing != first.trainer.activation_checkpointing:
        raise _refusal(
            "trainer.activation_checkpointing",
            found=str(job.trainer.activation_checkpointing),
            expected="the same for all trials of a pack",
        )


def _refusal(where: str, *, found: str, expected: str) -> ConfigError:
    return ConfigError(
        where, found=found, expected=expected, remedy="train this trial outside the pack"
    )
