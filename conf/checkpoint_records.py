"""What a checkpoint directory says of itself, and what its loader checks it by."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True, frozen=True)
class ProbeItem:
    """One row as the trained model saw it: log p(target_ids | prompt_ids), summed, natural log.

    An engine that has loaded the checkpoint must find the same (evaluation/answering/agreement.py).
    """

    item_id: str
    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    logprob: float


@dataclass(kw_only=True, slots=True, frozen=True)
class CheckpointRecord:
    """checkpoint.json: what a checkpoint directory is, and the hashes that prove it whole.

    renderer_sha256 covers tokenizer, chat template and special tokens: it must agree when the
    checkpoint is loaded. prompt_sha256 is the training prompt's: differing is shown, not refused.
    files: file name -> sha256. probe: what the model as trained, in `dtype`, says of some rows.
    """

    arm: str
    kind: str  # full | lora
    step: int
    tokens: int
    base_model: str
    base_model_sha256: str
    renderer_sha256: str
    prompt_sha256: str
    files: dict[str, str]
    trained_parameters: int
    train_seed: int = 0
    dtype: str = "float32"
    probe: tuple[ProbeItem, ...] = ()
