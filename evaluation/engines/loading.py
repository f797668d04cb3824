"""Load a causal language model and put adapters on it: safetensors only, never remote code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.choices import NF4_ARGUMENTS
from conf.errors import ModelError
from conf.row_meter import watch
from evaluation.models.facts import facts

if TYPE_CHECKING:
    from peft import PeftModel

VIRTUAL_TOKENS = (
    "PROMPT_TUNING",
    "PREFIX_TUNING",
    "P_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "CPT",
    "CARTRIDGE",
)
KEEP_THE_BASE = (None, "gaussian", "orthogonal", "eva")  # ways to start LoRA, beside true and false
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "nf4": torch.bfloat16}


def load_model(model_dir: Path, *, dtype: str, device: str) -> PreTrainedModel:
    """A causal language model in evaluation mode; dtype nf4: weights in 4 bits, sums in bfloat16.

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
        **(_four_bits(device) if dtype == "nf4" else {}),
    )
    watch(model.get_input_embeddings())
    torch.nn.Module.to(model, torch.device(device))
    torch.nn.Module.eval(model)
    _check_head(model, model_dir)
    return model


def _four_bits(device: str) -> dict[str, Any]:
    """What loads a base as QLoRA trained on it; not yet run on a GPU."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        **NF4_ARGUMENTS, bnb_4bit_compute_dtype=DTYPES["nf4"]
    )
    return {"quantization_config": config, "device_map": {"": device}}


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
    """Wrap the model's layers with a peft adapter; `unload_adapter` takes it off again.

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
    config = json.loads(config_file.read_text(encoding="utf-8"))
    kind, start = config.get("peft_type"), config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in KEEP_THE_BASE:
        raise ModelError(
            str(path),
            found=f"init_lora_weights={start}, which writes into the base model",
            expected="an adapter beside an unchanged base",
            remedy="convert it: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )
    if kind in VIRTUAL_TOKENS:
        raise ModelError(
            str(path), found=f"peft_type {kind}", expected="an adapter of the layers, e.g. LORA"
        )
    adapted: PeftModel = PeftModel.from_pretrained(
        model, str(path), is_trainable=False, local_files_only=True
    )
    adapted.eval()
    return adapted


def unload_adapter(
    model: PreTrainedModel, adapted: PeftModel, *, modules: Mapping[str, torch.nn.Module]
) -> None:
    """Take an adapter off; modules: all of the model's by name, from before it was put on.

    peft's own `unload` leaves the trained copies of modules_to_save in the model.
    """
    adapted.unload()
    for name, module in modules.items():
        if name and model.get_submodule(name) is not module:
            model.set_submodule(name, module)
