"""Load a causal language model and put adapters on it: safetensors only, never remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.errors import ModelError
from evaluation.model_facts import facts

if TYPE_CHECKING:
    from peft import PeftModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(model_dir: Path, *, dtype: str, device: str) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Raises:
        ModelError: where the directory is refused by `facts`, or the head is more than a linear
            layer on the last hidden state (this engine computes logits at single positions).
    """
    facts(model_dir)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(model_dir),
        dtype=DTYPES[dtype],
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    torch.nn.Module.to(model, torch.device(device))
    torch.nn.Module.eval(model)
    _check_head(model, model_dir)
    return model


@torch.inference_mode()
def _check_head(model: PreTrainedModel, model_dir: Path) -> None:
    """Compare head(hidden) with the model's own logits, which may be scaled or capped."""
    ids = torch.arange(4, device=model.device)[None]
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    expected = model(input_ids=ids, use_cache=False).logits.float()
    found = head(model)(hidden).float()
    worst = (found - expected).abs().max().item()
    if not worst <= 1e-3 * max(1.0, expected.abs().max().item()):
        raise ModelError(
            str(model_dir),
            found=f"{type(model).__name__}, whose logits are no linear head's: off by {worst:.3g}",
            expected="a causal language model with a plain linear head",
            remedy="type model.path=DIRECTORY of another model",
        )


def head(model: PreTrainedModel) -> torch.nn.Module:
    """The layer from the last hidden state to the logits."""
    module: torch.nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return module


def takes_free_mask(model: PreTrainedModel) -> bool:
    """Whether all layers attend to all earlier tokens, so that trees and gaps can be masked.

    Sliding windows and recurrent layers count tokens by their place in memory, not by position.
    """
    config = model.config.get_text_config(decoder=True)
    layers = getattr(config, "layer_types", None)
    if layers is not None:
        return all(kind == "full_attention" for kind in layers)
    windowed = getattr(config, "sliding_window", None) or getattr(
        config, "attention_chunk_size", None
    )
    return not windowed and not getattr(model, "_is_stateful", False)


def load_adapter(model: PreTrainedModel, path: Path) -> PeftModel:
    """Wrap the model's layers with a peft adapter; `unload()` on the result takes it off again.

    Raises:
        ModelError: for a directory without adapter_config.json and adapter_model.safetensors, and
            for prompt-learning adapters, whose virtual tokens no request could be billed for.
    """
    from peft import PeftModel

    config_file = path / "adapter_config.json"
    if not config_file.is_file() or not (path / "adapter_model.safetensors").is_file():
        raise ModelError(
            str(path),
            found="no adapter_config.json with adapter_model.safetensors",
            expected="a peft checkpoint directory in safetensors",
            remedy="save it with save_pretrained(..., safe_serialization=True)",
        )
    kind = json.loads(config_file.read_text(encoding="utf-8")).get("peft_type")
    if kind in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT"):
        raise ModelError(
            str(path), found=f"peft_type {kind}", expected="an adapter of the layers, e.g. LORA"
        )
    adapted: PeftModel = PeftModel.from_pretrained(
        model, str(path), is_trainable=False, local_files_only=True
    )
    adapted.eval()
    return adapted


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had not enough memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error)
    return "can't allocate memory" in text or "not enough memory" in text
