"""The plain path that engines are compared with: one sequence at a time, no cache, no batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel


class Codec:
    """What an engine needs of a renderer."""

    def __init__(self, model_dir: Path, *, end_ids: tuple[int, ...] = (0,)) -> None:
        self.tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self.end_ids = end_ids

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))


@torch.no_grad()
def plain_logprob(model: PreTrainedModel, prompt: Sequence[int], label: Sequence[int]) -> float:
    ids = torch.tensor([[*prompt, *label]])
    logprobs = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    start = len(prompt) - 1
    return sum(float(logprobs[start + k, token]) for k, token in enumerate(label))


@torch.no_grad()
def plain_greedy(model: PreTrainedModel, prompt: Sequence[int], count: int, end: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == end:
            break
        ids.append(token)
    return ids[len(prompt) :]


def save_adapter(model_dir: Path, path: Path, *, seed: int, **config: object) -> None:
    """A random LoRA of rank 2, as peft saves it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(str(model_dir))
    settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, **config}
    model = get_peft_model(base, LoraConfig(**settings))
    model.save_pretrained(str(path), safe_serialization=True)
