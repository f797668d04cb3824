"""Adapters on packed layers against peft's own wrapper; the base model is never written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from conf.errors import ModelError
from evaluation.engines.adapters import Adapters, weight_and_bias
from kernels.linear import Linear, swap_linear

IDS = torch.arange(3, 30).reshape(3, 9)


def fresh(model_dir: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(model_dir))
    torch.nn.Module.eval(model)
    return model


@torch.no_grad()
def hidden(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def save(model_dir: Path, path: Path, config: peft.PeftConfig) -> Any:
    """A peft checkpoint with random weights; returns the wrapped model as it was saved."""
    torch.manual_seed(1)
    model = peft.get_peft_model(fresh(model_dir), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(str(path), save_embedding_layers=False)
    return model.eval()


LINEAR = {"target_modules": "all-linear"}
MERGED = {
    "lora": peft.LoraConfig(r=3, **LINEAR),
    "rslora": peft.LoraConfig(r=3, use_rslora=True, **LINEAR),
    "dora": peft.LoraConfig(r=3, use_dora=True, **LINEAR),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "vera": peft.VeraConfig(r=4, **LINEAR),
    "oft": peft.OFTConfig(oft_block_size=8, **LINEAR),
    "loha": peft.LoHaConfig(r=2, **LINEAR),
    "glora": peft.GloraConfig(target_modules=["q_proj", "v_proj"]),  # takes torch's Linear alone
}
WRAPPED = {
    "bias": peft.LoraConfig(r=3, lora_bias=True, **LINEAR),
    "norms": peft.LNTuningConfig(),
    "bias of nothing": peft.BeftConfig(target_modules=["v_proj"]),
    "an embedding beside": peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]),
    "another module": peft.LoraConfig(r=2, modules_to_save=["input_layernorm"], **LINEAR),
}


def packed(model_dir: Path) -> PreTrainedModel:
    model = fresh(model_dir)
    swap_linear(model.base_model, is_packed=True)
    return model


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [*MERGED, *WRAPPED])
def test_the_same_as_peft_and_the_base_is_untouched(
    name: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    reference = save(tiny_model_dir, tmp_path, (MERGED | WRAPPED)[name])
    model = packed(tiny_model_dir)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    base = hidden(model)
    adapters = Adapters(model)
    adapters.set(tmp_path)
    is_merged = not any("tuners" in type(m).__module__ for m in model.modules())
    assert is_merged == (name in MERGED)
    expected = hidden(reference.base_model.model)
    assert (base - expected).abs().max() > 1e-2
    torch.testing.assert_close(hidden(model), expected, atol=2e-5, rtol=1e-4)
    adapters.set(None)
    assert torch.equal(hidden(model), base)
    assert {n for n, p in model.named_parameters() if torch.equal(p, weights[n])} == set(weights)
    assert sum(type(m) is Linear for m in model.modules()) == 14


def test_a_merge_that_computes_something_else_is_not_used(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = save(tiny_model_dir, tmp_path, MERGED["lora"])
    real = peft.tuners.lora.Linear.get_delta_weight
    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", lambda *a: 1.5 * real(*a))
    model = packed(tiny_model_dir)
    Adapters(model).set(tmp_path)
    assert any("tuners" in type(m).__module__ for m in model.modules()), "left as peft wraps it"
    torch.testing.assert_close(
        hidden(model), hidden(reference.base_model.model), atol=2e-5, rtol=1e-4
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=str)
def test_an_adapter_on_the_head(
    options: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], **options)
    reference = save(tiny_model_dir, tmp_path, config)
    model = packed(tiny_model_dir)
    Adapters(model).set(tmp_path)
    weight, bias = weight_and_bias(model.get_output_embeddings())
    found = torch.nn.functional.linear(hidden(model), weight, bias)
    torch.testing.assert_close(found, logits(reference), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(logits(model), logits(reference), atol=2e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_head_without_a_single_weight_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], lora_bias=True)
    save(tiny_model_dir, tmp_path, config)
    model = packed(tiny_model_dir)
    Adapters(model).set(tmp_path)
    with pytest.raises(ModelError, match="output head"):
        weight_and_bias(model.get_output_embeddings())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_whole_head_beside_the_adapters(tiny_model_dir: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    reference = save(tiny_model_dir, tmp_path, config)
    model = packed(tiny_model_dir)
    Adapters(model).set(tmp_path)
    weight, bias = weight_and_bias(model.get_output_embeddings())
    found = torch.nn.functional.linear(hidden(model), weight, bias)
    torch.testing.assert_close(found, logits(reference), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"init_lora_weights": "pissa"}, "writes into the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "writes into the base"),
        ({"init_lora_weights": "olora"}, "writes into the base"),
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING"),
        ({"peft_type": "CARTRIDGE"}, "CARTRIDGE"),
    ],
    ids=str,
)
def test_adapters_that_cannot_stand_on_a_shared_base_are_refused(
    change: dict[str, Any], found: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    save(tiny_model_dir, tmp_path, MERGED["lora"])
    config_file = tmp_path / "adapter_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | change))
    with pytest.raises(ModelError, match=found):
        Adapters(packed(tiny_model_dir)).set(tmp_path)
