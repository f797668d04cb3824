"""Checkpoints that plain transformers and peft load: safetensors, a hash per file, all or nothing.

DeepSpeed's own checkpoints are never written: they are pickles, and their `latest` is written
before the workers agree.
"""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from conf.checkpoint_records import CheckpointRecord, ProbeItem
from conf.records import from_dict, to_dict
from training.commit import commit
from training.job import CHECKPOINT_FILE, TrainJob

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

# What a tokenizer may consist of; copied unchanged, so a checkpoint renders as its base does.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def gathered_state(
    model: PreTrainedModel | PeftModel, *, names: frozenset[str] | None, keep: bool
) -> dict[str, Tensor]:
    """Whole tensors by name, on CPU. All workers call it; only those with `keep` get tensors.

    Under ZeRO-3 one parameter at a time is gathered: a plain state_dict would hold empty tensors.
    A tied parameter is gathered once and appears under both names as one tensor.
    """
    state: dict[str, Tensor] = {}
    first_name: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if names is not None and name not in names:
            continue
        if id(tensor) in first_name:
            if keep:
                state[name] = state[first_name[id(tensor)]]
            continue
        first_name[id(tensor)] = name
        with _whole(tensor):
            if keep:
                # What is gathered vanishes when the context ends, so it is copied.
                whole = tensor.detach().clone() if _is_sharded(tensor) else tensor.detach()
                state[name] = whole.cpu()
    return state


def _is_sharded(tensor: Tensor) -> bool:
    """Whether ZeRO-3 holds this parameter."""
    return hasattr(tensor, "ds_id")


def _whole(tensor: Tensor) -> nullcontext[None]:
    """A context in which a tensor that ZeRO-3 sharded is whole."""
    if not _is_sharded(tensor):
        return nullcontext()
    import deepspeed

    context: nullcontext[None] = deepspeed.zero.GatheredParameters([tensor])
    return context


def write_checkpoint(
    directory: Path,
    *,
    job: TrainJob,
    model: PreTrainedModel | PeftModel,
    state: dict[str, Tensor],
    step: int,
    tokens: int,
    trained_parameters: int,
    probe: tuple[ProbeItem, ...] = (),
    adapter: str = "default",
) -> CheckpointRecord:
    """Write one checkpoint directory, whole or not at all, over an older one of an earlier attempt.

    Called by one worker. checkpoint.json is its manifest (training/commit.py). adapter: peft's name
    for what is saved, of a model that may have others; its state's names have it in them.

    Raises:
        OSError, SafetensorError: no space, no permission; the older directory is still there.
    """
    record = CheckpointRecord(
        arm=job.arm_name,
        kind=job.method.kind,
        step=step,
        tokens=tokens,
        base_model=job.base_model,
        base_model_sha256=job.base_model_sha256,
        renderer_sha256=job.renderer_sha256,
        prompt_sha256=job.prompt_sha256,
        files={},  # the commit names them
        trained_parameters=trained_parameters,
        train_seed=job.trainer.seed,
        dtype=job.dtype,
        probe=probe,
    )
    body = commit(
        directory,
        write=lambda building: _write_weights(
            building, job=job, model=model, state=state, adapter=adapter
        ),
        meta=to_dict(record),
        manifest=CHECKPOINT_FILE,
    )
    return from_dict(CheckpointRecord, body)


def _write_weights(
    directory: Path,
    *,
    job: TrainJob,
    model: PreTrainedModel | PeftModel,
    state: dict[str, Tensor],
    adapter: str,
) -> None:
    if job.has_adapters:
        # save_embedding_layers would ask the hub about the base model.
        model.save_pretrained(
            str(directory),
            state_dict=state,
            save_embedding_layers=False,
            selected_adapters=[adapter],
        )
        (directory / "README.md").unlink(missing_ok=True)  # peft's empty model card
        named = directory / adapter  # peft gives every name but its default a directory
        if named.is_dir():
            for file in named.iterdir():
                file.rename(directory / file.name)
            named.rmdir()
        return
    model.save_pretrained(str(directory), state_dict=state)
    for name in TOKENIZER_FILES:
        source = Path(job.model_dir) / name
        if source.exists():
            shutil.copyfile(source, directory / name)


def directory_bytes(directory: Path) -> int:
    """The size of all files of a checkpoint."""
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
