"""Rows of packed trials: 8 LoRA adapters in one pass, against 8 peft runs one after another.

Both sides are in this process, on the same rows, with the same adapters, batches and AdamW; the
peer is peft's model with adapters of its own and the loss of its target rows alone, which is what
TRL computes at best. A step's rows of each adapter are cut to a number of tokens.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conf.choices import Schedule, ZeroStage
from conf.groups import TrainerConfig, ZeroConfig
from conf.methods import LoraMethod
from conf.records import RenderedExample
from kernels.linear import choose_linear, swap_linear
from tests.benchmarks.comparing import Setup
from tests.benchmarks.harness import SETTLE_SECONDS, Result, ratio_of
from tests.benchmarks.parity import Parity
from tests.benchmarks.training_data import banking77
from training.data import num_targets, padded_batch
from training.job import TrainJob
from training.pack_model import PackModel, Part

ADAPTERS = 8
MAX_LOSS_GAP = 1e-4
RATE = 1e-3
PACKS = {"pack_32_tokens": (32, 1.6, 2.2), "pack_64_tokens": (64, 1.3, 1.7)} | {
    "pack_512_tokens": (512, 1.05, 1.2)
}  # tokens of an adapter's step, floor, aim
Rows = Sequence[RenderedExample]


@dataclass(slots=True)
class Packed:
    """Our side: one model, all adapters, a step of each in one pass."""

    model: PackModel
    optimizers: list[torch.optim.Optimizer]

    @classmethod
    def load(cls, setup: Setup) -> Packed:
        """With adapters of rank 16 on all linear layers, seeds 0 to 7."""
        scratch = tempfile.mkdtemp()
        jobs = [_job(setup, trial=trial, output_dir=scratch) for trial in range(ADAPTERS)]
        model = PackModel(jobs[0], adapter="trial_0")
        for job in jobs[1:]:
            model.add(job, adapter=f"trial_{job.trial}")
        optimizers = [
            _adamw([p for _, p in model.named_parameters(f"trial_{trial}")])
            for trial in range(ADAPTERS)
        ]
        return cls(model=model, optimizers=optimizers)

    def step(self, batches: Sequence[Rows]) -> list[float]:
        """One step of every adapter; their mean losses."""
        parts = [Part(f"trial_{trial}", rows) for trial, rows in enumerate(batches)]
        losses: list[float] = []
        for together in self.model.passes(parts, max_tokens=self.model.layout.max_tokens):
            losses += self.model.backward(together)
        means = []
        for optimizer, rows, loss in zip(self.optimizers, batches, losses, strict=True):
            targets = sum(map(num_targets, rows))
            parameters = optimizer.param_groups[0]["params"]
            torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], 1 / targets)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            means.append(loss / targets)
        return means

    def tokens(self, batches: Sequence[Rows]) -> int:
        """Tokens through the embedding in a step."""
        return sum(self.model.layout.num_tokens(rows) for rows in batches)


@dataclass(slots=True)
class Solo:
    """The peer: peft's model, one adapter after another takes its step."""

    model: Any
    optimizers: list[torch.optim.Optimizer]

    @classmethod
    def load(cls, setup: Setup, *, is_swapped: bool = False, adapters: int = ADAPTERS) -> Solo:
        """The same adapters; only the active one is in a pass. is_swapped: our linear products."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(
            setup.model_dir, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
        for trial in range(adapters):
            config = LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            torch.manual_seed(trial)
            if trial == 0:
                model = get_peft_model(model, config, adapter_name="solo_0")
            else:
                model.add_adapter(f"solo_{trial}", config)
        if is_swapped:
            swap_linear(model, is_packed=False)
        optimizers = []
        for trial in range(adapters):
            own = [p for n, p in model.named_parameters() if f".solo_{trial}." in n]
            optimizers.append(_adamw(own))
        return cls(model=model.train(), optimizers=optimizers)

    def step(self, batches: Sequence[Rows]) -> list[float]:
        """One step of every adapter, in turn; their mean losses."""
        return [self._one(trial, rows) for trial, rows in enumerate(batches)]

    def _one(self, trial: int, rows: Rows) -> float:
        self.model.set_adapter(f"solo_{trial}")
        batch = padded_batch(rows, pad_id=0)
        decoder = self.model.get_base_model()
        hidden = decoder.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )[0]
        logits = decoder.lm_head(hidden.flatten(0, 1)[batch.positions])
        loss = nn.functional.cross_entropy(logits, batch.targets)
        torch.autograd.backward(loss)
        optimizer = self.optimizers[trial]
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())


def packed_adapters(setup: Setup, key: str) -> list[Result]:
    """One row: computed tokens per second of both sides on the same batches, in turns."""
    tokens, floor, aim = PACKS[key]
    steps, rounds = setup.cap(4, 7)
    torch.set_num_threads(setup.threads)
    rows = max(1, tokens // 64)  # of 32 to 64 tokens each
    count = ADAPTERS * rows * (steps + 1)
    data = banking77(setup.model_dir, setup.data, rows=count, chunks=rounds)
    chunks = [
        _batches(cut(chunk, longest=min(tokens, 64)), rows_a_batch=rows) for chunk in data.chunks
    ]
    mine, peer = Packed.load(setup), Solo.load(setup)
    parity = _parity(mine.step(chunks[0][0]), peer.step(chunks[0][0]))
    same = Solo.load(setup, is_swapped=choose_linear()[0])
    sides: dict[str, Callable[[Sequence[Rows]], list[float]]] = {
        "ours": mine.step,
        "peer": peer.step,
        "same_linear": same.step,
    }
    seconds = _in_turns(sides, chunks)
    forwarded = sum(len(row.input_ids) for batch in chunks[0][1:] for own in batch for row in own)
    result = Result(
        name=key,
        work=f"{ADAPTERS} LoRA adapters r=16, {rows} rows of at most {min(tokens, 64)} tokens "
        f"an adapter and step ({forwarded / steps / ADAPTERS:.0f} tokens)",
        ours=forwarded / statistics.median(seconds["ours"]),
        peer=forwarded / statistics.median(seconds["peer"]),
        peer_version=f"peft {metadata.version('peft')}, one adapter after another",
        ratio=ratio_of(seconds["ours"], seconds["peer"]),
        floor=floor,
        aim=aim,
        bound=None,
        unit="tokens of rows per second",
        parity=parity,
        more={
            "ratio_same_linear": ratio_of(seconds["ours"], seconds["same_linear"]).median,
            "computed_tokens_a_step": mine.tokens(chunks[0][1]),
            "tokens_a_step": forwarded / steps,
            "seconds": seconds,
            "steps_a_round": steps,
            "rounds": rounds,
            "data": data.source,
        },
    )
    result.judge()
    return [result]


def _in_turns(
    sides: dict[str, Callable[[Sequence[Rows]], list[float]]],
    chunks: Sequence[Sequence[Sequence[Rows]]],
) -> dict[str, list[float]]:
    """Seconds of each side's steps of a round but for the first, which warms up."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for k, chunk in enumerate(chunks):
        order = list(sides.items())
        for side, step in order if k % 2 == 0 else order[::-1]:
            gc.collect()
            time.sleep(SETTLE_SECONDS)
            step(chunk[0])
            started = time.perf_counter()
            for batches in chunk[1:]:
                step(batches)
            seconds[side].append(time.perf_counter() - started)
        line = ", ".join(f"{side} {seconds[side][-1]:.2f} s" for side in sides)
        print(f"  round {k + 1} of {len(chunks)}: {line}", flush=True)
    return seconds


def _batches(rows: Rows, *, rows_a_batch: int) -> list[list[Rows]]:
    """For each step the rows of each adapter."""
    batches = [rows[i : i + rows_a_batch] for i in range(0, len(rows), rows_a_batch)]
    return [batches[i : i + ADAPTERS] for i in range(0, len(batches), ADAPTERS)]


def cut(rows: Rows, *, longest: int) -> list[RenderedExample]:
    """Rows of at most so many tokens: their ends, where the targets are."""
    return [
        RenderedExample(
            item_id=row.item_id,
            input_ids=row.input_ids[-longest:],
            target_mask=row.target_mask[-longest:],
        )
        for row in rows
    ]


def _parity(found: Sequence[float], wanted: Sequence[float]) -> Parity:
    """Each adapter's loss of the first step, of equal weights."""
    worst = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    is_ok = worst <= MAX_LOSS_GAP
    return Parity(checked=len(found), ok=is_ok, worst=worst, why="" if is_ok else f"off by {worst}")


def _adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)


def _job(setup: Setup, *, trial: int, output_dir: str | Path) -> TrainJob:
    return TrainJob(
        arm_name="lora",
        method=LoraMethod(),
        trainer=TrainerConfig(schedule=Schedule.constant, warmup_fraction=0.0, seed=trial),
        zero=ZeroConfig(stage=ZeroStage.zero0),
        model_dir=str(setup.model_dir),
        base_model="",
        base_model_sha256="",
        renderer_sha256="",
        prompt_sha256="",
        rows_path="",
        output_dir=str(output_dir),
        dtype="float32",
        device="cpu",
        threads=setup.threads,
        world_size=1,
        pad_id=0,
        usd_per_device_second=None,
        trial=trial,
    )
