"""What the tests of packed trials share: mixed settings, and a plain peft loop for each of them."""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from conf.choices import Schedule
from conf.groups import TrainerConfig, ZeroConfig
from conf.methods import LoraMethod
from conf.records import TrainRecord
from training.job import TrainJob
from training.pack_model import PackModel
from training.sharding import epoch_order

LABELS = 7
SETTINGS = [  # rank, alpha, rate, targets, seed, batch, LoRA+ ratio, schedule
    (4, 8.0, 1e-2, [], 0, 6, None, Schedule.linear),
    (1, 32.0, 3e-3, ["q_proj", "down_proj"], 1, 4, None, Schedule.cosine),
    (16, 16.0, 1e-3, ["layers.1.mlp.up_proj"], 2, 9, 4.0, Schedule.constant),
    (8, 4.0, 2e-2, ["v_proj", "o_proj"], 3, 6, None, Schedule.linear),
]


class Told:
    """A Runtime of one worker that keeps what it is told."""

    global_rank = local_rank = 0
    world_size = 1

    def __init__(self, stop_after=math.inf):
        self.records, self.notes, self.asked, self.stop_after = [], [], 0, stop_after

    def report(self, record):
        kept = self.records if isinstance(record, TrainRecord) else self.notes
        kept.append(record)

    def should_save(self):
        self.asked += 1
        return self.asked > self.stop_after

    def losses(self, trial):
        return [r.loss for r in self.records if r.trial == trial]


def exact_norm(norm, x):
    """LlamaRMSNorm.forward in the precision of its input."""
    mean = x.square().mean(-1, keepdim=True)
    return norm.weight * x * torch.rsqrt(mean + norm.variance_epsilon)


def with_memory_for(most_parts):
    """PackModel.backward on a machine that has no memory for more parts in a pass."""
    backward = PackModel.backward

    def starved(model, parts):
        if len(parts) > most_parts:
            backward(model, parts[:1])  # gradients that must be forgotten
            raise RuntimeError("DefaultCPUAllocator: not enough memory")
        return backward(model, parts)

    return starved


def trial_job(
    number, setting=None, *, base_dir, rows_path, output_dir, steps=6, dtype="float64", **changes
):
    """The job of one trial, of SETTINGS or another setting."""
    rank, alpha, rate, targets, seed, batch, ratio, schedule = setting or SETTINGS[number]
    return TrainJob(
        **{
            "arm_name": "lora",
            "method": LoraMethod(
                lora_rank=rank,
                lora_alpha=alpha,
                target_modules=list(targets),
                lora_plus_ratio=ratio,
            ),
            "trainer": TrainerConfig(
                epochs=9,
                max_steps=steps,
                batch_size=batch,
                learning_rate=rate,
                schedule=schedule,
                seed=seed,
                weight_decay=0.1,
                clip_norm=0.5,
            ),
            "zero": ZeroConfig(),
            "model_dir": str(base_dir),
            "base_model": "tiny",
            "base_model_sha256": "a" * 64,
            "renderer_sha256": "b" * 64,
            "prompt_sha256": "c" * 64,
            "rows_path": str(rows_path),
            "output_dir": str(output_dir),
            "dtype": dtype,
            "device": "cpu",
            "threads": 1,
            "world_size": 1,
            "pad_id": 0,
            "usd_per_device_second": 0.5,
            "trial": number,
        }
        | changes
    )


def plain_batches(job, count):
    """The row indices of each step, written independently of the planner."""
    found, epoch, size = [], 0, job.trainer.batch_size
    while len(found) < job.trainer.max_steps:
        order = epoch_order(count, seed=job.trainer.seed, epoch=epoch)
        found += [order[start : start + size] for start in range(0, count, size)]
        epoch += 1
    return found[: job.trainer.max_steps]


def plain_rate(job, step):
    total, peak = job.trainer.max_steps, job.learning_rate
    warm = max(1, math.ceil(total / 10))
    if step < warm:
        return peak * step / warm
    past = (step - warm) / (total - warm + 1)
    shape = {"linear": 1 - past, "cosine": (1 + math.cos(math.pi * past)) / 2, "constant": 1.0}
    return peak * shape[job.trainer.schedule.name]


def row_loss(model, row):
    """The summed loss of one row's targets, from all its logits."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    logprobs = logits.log_softmax(-1)
    hits = [t for t in range(1, len(row["input_ids"])) if row["target_mask"][t]]
    return -sum(logprobs[t - 1, row["input_ids"][t]] for t in hits), len(hits)


def plain_training(job):
    """(losses, norms, model) of one trial in plain torch and peft, a row at a time."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    rows = [json.loads(line) for line in Path(job.rows_path).read_text().splitlines()]
    dtype = getattr(torch, job.dtype)
    model = AutoModelForCausalLM.from_pretrained(job.model_dir, dtype=dtype)
    torch.manual_seed(job.trainer.seed)
    config = LoraConfig(
        r=job.method.lora_rank,
        lora_alpha=job.method.lora_alpha,
        target_modules=list(job.method.target_modules) or "all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    ratio = job.method.lora_plus_ratio or 1.0
    sides = [[p for n, p in trained.items() if f"lora_{side}" in n] for side in "AB"]
    optimizer = torch.optim.AdamW([{"params": side} for side in sides], weight_decay=0.1)
    losses, norms = [], []
    for step, indices in enumerate(plain_batches(job, len(rows)), start=1):
        for group, factor in zip(optimizer.param_groups, (1.0, ratio), strict=True):
            group["lr"] = plain_rate(job, step) * factor
        optimizer.zero_grad()
        parts = [row_loss(model, rows[index]) for index in indices]
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms, model


def plain_weights(model):
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def saved_weights(outcome):
    return load_file(Path(outcome.checkpoint) / "adapter_model.safetensors")


def worst_gap(found, wanted):
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


def load_adapter(directory):
    return load_file(directory / "adapter_model.safetensors")
