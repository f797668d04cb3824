"""TRL's SFTTrainer on the same prepared rows, at the best of its settings."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch

from conf.records import RenderedExample
from tests.benchmarks.training_data import BATCH

# TRL's loss is chunked over target rows since 1.16 (what "chunked_nll" was). Gradient
# checkpointing, on by default, computes every forward twice and is off here.
SETTINGS: tuple[dict[str, Any], ...] = (
    {"train_sampling_strategy": "random", "per_device_train_batch_size": 8},
    {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 8},
    {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4},
)


def has_trl() -> bool:
    """Whether TRL is installed here."""
    return util.find_spec("trl") is not None


@dataclass(kw_only=True, slots=True)
class Trl:
    """SFTTrainer on one model; each call of `seconds` is a training of its own."""

    model: Any
    tokenizer: Any
    settings: dict[str, Any]
    losses: list[float] = field(default_factory=list)
    real_tokens: int = 0

    @property
    def version(self) -> str:
        """Name and version."""
        return f"trl {metadata.version('trl')} SFTTrainer"

    def seconds(self, rows: Sequence[RenderedExample]) -> float:
        """Wall seconds of all steps but the first; real_tokens is what they trained on."""
        seen: list[tuple[float, int]] = []  # after each step: time, real tokens so far
        counted = 0
        trainer = self._trainer(rows)
        plain = trainer.training_step

        def training_step(model: Any, inputs: dict[str, Any], *more: Any) -> Any:
            nonlocal counted
            counted += int(inputs["attention_mask"].sum())
            return plain(model, inputs, *more)

        trainer.training_step = training_step
        trainer.add_callback(_clock(lambda: seen.append((time.perf_counter(), counted))))
        trainer.train()
        (first, before), (last, after) = seen[0], seen[-1]
        self.real_tokens = after - before
        return last - first

    def loss_and_norm(self, rows: Sequence[RenderedExample]) -> tuple[float, float]:
        """Mean loss of one batch and the norm of its gradients; the weights stay."""
        trainer = self._trainer(rows)
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        self.model.train()
        loss = trainer.compute_loss(self.model, inputs)
        loss.backward()
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        self.model.zero_grad(set_to_none=True)
        return float(loss.detach()), float(norm)

    def _trainer(self, rows: Sequence[RenderedExample]) -> Any:
        from datasets import Dataset  # type: ignore[import-untyped]
        from transformers import PrinterCallback
        from trl import SFTConfig, SFTTrainer  # type: ignore[import-not-found]

        size = self.settings["per_device_train_batch_size"]
        config = SFTConfig(
            output_dir=tempfile.mkdtemp(),
            num_train_epochs=1,
            gradient_accumulation_steps=BATCH // size,
            gradient_checkpointing=False,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            completion_only_loss=True,
            max_length=None,
            seed=0,
            **self.settings,
        )
        data = Dataset.from_dict(
            {
                "input_ids": [list(row.input_ids) for row in rows],
                "completion_mask": [list(row.target_mask) for row in rows],
            }
        )
        trainer = SFTTrainer(
            model=self.model, args=config, train_dataset=data, processing_class=self.tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def _clock(mark: Any) -> Any:
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        """Marks the end of each optimizer step."""

        def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
            mark()

    return Clock()


def trl_model(model_dir: Path, *, kind: str) -> tuple[Any, Any]:
    """The model in fp32, with peft's adapters of rank 16 for LoRA, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    if kind == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear",
            task_type="CAUSAL_LM",
        )  # fmt: skip
        model = get_peft_model(model, config)
    return model, AutoTokenizer.from_pretrained(model_dir, local_files_only=True)


def share_adapters(peer: Any, ours: Any) -> None:
    """Give both models the same adapters, with B of the size of A instead of zero."""
    draw = torch.Generator().manual_seed(0)
    targets = dict(ours.named_parameters())
    with torch.no_grad():
        for name, value in peer.named_parameters():
            if "lora_" in name:
                scale = 0.02 if "lora_B" in name else value.std()
                value.copy_(torch.randn(value.shape, generator=draw) * scale)
                targets[name].copy_(value)
