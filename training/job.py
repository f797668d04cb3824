"""What one training job is: the message that a worker receives, and where it leaves its results.

Light: no torch. A job is plain data, so it can be pickled, hashed and sent to another machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from conf.errors import CrossoverError
from conf.groups import TrainerConfig, ZeroConfig
from conf.methods import FullMethod, LoraMethod, PeftMethod
from conf.records import Progress, TrainRecord

CPU_ROWS_PER_PASS = 4
# Tokens of a packed pass. On a CPU attention is linear in them, and a longer pass computes a shared
# prefix for more rows: a batch of 8 rows of 300 tokens is one pass. On a GPU, where nothing is
# measured yet: a mask of 32 MB in bf16.
PASS_TOKENS = {"cpu": 2560, "cuda": 4096}
# The same where a pass needs a T x T mask. On 2 cores products of 256 rows run as fast as longer
# ones, and attention under a mask is a quarter of a LoRA pass at 384 tokens, a third at 611.
MASKED_PASS_TOKENS = {"cpu": 512, "cuda": 4096}
FINAL = "final"
CHECKPOINT_DIRECTORY = "checkpoint"
CHECKPOINT_FILE = "checkpoint.json"

# Peak rates of AdamW where trainer.learning_rate is null. LoRA wants about ten times the rate of
# full fine-tuning, at any rank ("LoRA Without Regret", Schulman et al., Thinking Machines, 2025).
# Its fit for Llama, 5e-5 x 10 x (2000 / hidden)^0.781, gives 1.3e-3 for LoRA at hidden 576.
DEFAULT_LEARNING_RATES = {"full": 1e-4, "lora": 1e-3}
# Other peft methods take LoRA's, except where their paper says otherwise: 3e-3 for IA3 (Liu et al.
# 2022, arXiv 2205.05638), ten times LoRA's for VeRA (Kopiczko et al. 2023, arXiv 2310.11454).
PEFT_LEARNING_RATES = {"IA3": 3e-3, "VERA": 1e-2}


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainJob:
    """One training of one arm.

    rows_path: JSONL of RenderedExample. model_dir: a local transformers directory. dtype: float32
    or bfloat16. device: cpu or cuda. threads: torch threads per worker. num_truncated and shown_row
    are the prepare job's and pass through to the summary. device_memory_bytes: what one worker may
    fill, for zero.stage=auto; None: unknown, so stage 0. kernels_impl: the name of a KernelImpl.
    """

    arm_name: str
    method: FullMethod | LoraMethod | PeftMethod
    trainer: TrainerConfig
    zero: ZeroConfig
    model_dir: str
    base_model: str
    base_model_sha256: str
    renderer_sha256: str
    prompt_sha256: str
    rows_path: str
    output_dir: str
    dtype: str
    device: str
    threads: int
    world_size: int
    pad_id: int
    usd_per_device_second: float | None
    num_truncated: int = 0
    shown_row: str = ""
    num_labels: int | None = None
    trial: int | None = None
    device_memory_bytes: int | None = None
    kernels_impl: str = "auto"

    @property
    def max_rows(self) -> int:
        """Most rows that a worker forwards together: the user's, or its whole share of a batch."""
        share = -(-self.trainer.batch_size // self.world_size)
        return self.trainer.micro_batch_size or share

    @property
    def padded_rows(self) -> int:
        """Most rows of a pass that is padded.

        On CPU at most 4: rows are sorted within a batch, so short passes pad less (8% instead of
        17% of 68-token rows), and LoRA did 261 instead of 223 tokens/s in 2.0 instead of 2.9 GB.
        """
        if self.trainer.micro_batch_size is not None or self.device != "cpu":
            return self.max_rows
        return min(self.max_rows, CPU_ROWS_PER_PASS)

    def tokens_per_pass(self, longest_row: int) -> int:
        """Most tokens that a pass forwards, padded or packed; the model decides which."""
        packed = max(longest_row, min(self.max_rows * longest_row, PASS_TOKENS[self.device]))
        return max(self.padded_rows * longest_row, packed)

    @property
    def devices(self) -> int:
        """Devices reserved by the whole job: CPU cores (threads of all workers) or accelerators."""
        return self.world_size * (self.threads if self.device == "cpu" else 1)

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: the user's, or the method's default."""
        given = self.trainer.learning_rate
        return default_learning_rate(self.method) if given is None else given

    @property
    def has_adapters(self) -> bool:
        """Whether the base stays frozen under adapters, which alone are saved."""
        return not isinstance(self.method, FullMethod)


def default_learning_rate(method: FullMethod | LoraMethod | PeftMethod) -> float:
    """The peak rate of a method where none is given; with LoRA+ it is the rate of A.

    LoRA+ (arXiv 2402.12354) puts the rates of A and B around LoRA's, at width^-1 and 1 where LoRA
    needs width^-1/2: here at equal factors below and above it.
    """
    if isinstance(method, PeftMethod):
        return PEFT_LEARNING_RATES.get(method.peft_type, DEFAULT_LEARNING_RATES["lora"])
    rate = DEFAULT_LEARNING_RATES[method.kind]
    ratio = method.lora_plus_ratio if isinstance(method, LoraMethod) else None
    return rate / math.sqrt(ratio) if ratio else rate


class TrainingStopped(CrossoverError):
    """Training stopped because its runtime asked for it; the same job goes on where it stopped.

    Raised on all workers. step: the last step that the newest state holds, 0 if there is none.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(step)

    def __str__(self) -> str:
        """One line."""
        return f"training stopped; its state holds {self.step} steps"


class WorkerLost(CrossoverError):
    """This attempt cannot go on, and a new one can: it resumes from the newest state.

    A worker that was killed, hangs or is cut off, or one that ran out of memory where the others
    could not be told; the next attempt then takes smaller passes.
    """


class PeerLost(WorkerLost):
    """This worker waited in vain for another, whose own words, if it has any, tell why."""


class Runtime(Protocol):
    """What a worker is told about its place, and how it reports.

    `report` is called by global rank 0 only: a TrainRecord and a Progress per optimizer step.
    """

    @property
    def global_rank(self) -> int:
        """This worker's number, 0 to world_size - 1."""

    @property
    def local_rank(self) -> int:
        """This worker's number on its machine: the accelerator it uses."""

    @property
    def world_size(self) -> int:
        """How many workers train together."""

    def report(self, record: TrainRecord | Progress) -> None:
        """Pass a record on to the run's store."""

    def should_save(self) -> bool:
        """Whether to save the state and stop now; asked after each step, on global rank 0 alone."""


def point_name(step: int, *, total_steps: int) -> str:
    """The directory of a checkpoint below output_dir: `step-000013`, and `final` for the last."""
    return FINAL if step == total_steps else f"step-{step:06d}"


def checkpoint_directory(output_dir: str | Path, name: str) -> Path:
    """Where a checkpoint lies: <output_dir>/<step-000013 | final>/checkpoint."""
    return Path(output_dir) / name / CHECKPOINT_DIRECTORY
