"""Parameters worked out from a configuration against models that transformers builds."""

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from conf.errors import ModelError
from training.shapes import FAMILIES, is_vocabulary_layer, parameter_shapes, size_of

SMALL = {
    "vocab_size": 310,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CASES = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied, wide heads": ("Llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"attention_bias": True}),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma2", {"head_dim": 8}),
    "phi3": ("Phi3", {}),
    "smollm3": ("SmolLM3", {}),
    "gpt2": ("GPT2", {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 64}),
    "gpt2, own width": ("GPT2", {"n_embd": 40, "n_layer": 1, "n_head": 4, "n_inner": 56}),
}


def config_of(case):
    name, extra = CASES[case]
    common = {"vocab_size": 310} if name == "GPT2" else SMALL
    return getattr(transformers, f"{name}Config")(**(common | extra))


def built(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_the_name_and_shape_that_transformers_gives(case):
    config = config_of(case)
    model = built(config)
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    text = config.to_dict()
    size = size_of(text)
    found = parameter_shapes(text, family=size.family, is_tied=size.is_tied)
    assert found == wanted
    assert size.num_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_linear_layers_are_the_modules_that_adapters_would_wrap(case):
    config = config_of(case)
    wanted = {}
    for name, module in built(config).named_modules():
        if isinstance(module, nn.Linear) and not is_vocabulary_layer(name):
            wanted[name] = (module.out_features, module.in_features)
        elif type(module).__name__ == "Conv1D":
            wanted[name] = (module.nf, module.nx)
    assert size_of(config.to_dict()).linear_shapes == wanted


@pytest.mark.parametrize("case", ["qwen3", "gemma", "gpt2"])
def test_what_an_older_configuration_leaves_out_is_its_classs_default(case):
    """A hub's file often holds only what differs from the defaults."""
    config = config_of(case)
    full = config.to_dict()
    for key in ("head_dim", "tie_word_embeddings", "n_inner"):
        if key in full and getattr(type(config)(), key, None) == full[key]:
            del full[key]
    assert size_of(full).num_parameters == sum(p.numel() for p in built(config).parameters())


def test_published_models_have_their_published_counts():
    """Counts on the model cards: 8.03e9, 1.24e9 (tied), 0.494e9 (tied), 7.24e9, 0.124e9."""
    llama = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8}
    llama |= {"vocab_size": 128_256}
    cases = {
        8_030_261_248: llama
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        1_235_814_400: llama
        | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
        | {"tie_word_embeddings": True},
        494_032_768: {
            "model_type": "qwen2",
            "vocab_size": 151_936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        124_439_808: {
            "model_type": "gpt2",
            "vocab_size": 50_257,
            "n_embd": 768,
            "n_layer": 12,
            "n_head": 12,
            "n_positions": 1024,
        },
    }
    assert {count: size_of(config).num_parameters for count, config in cases.items()} == {
        count: count for count in cases
    }


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(ModelError, match="mamba") as caught:
        size_of({"model_type": "mamba", "vocab_size": 9})
    assert all(family in str(caught.value) for family in FAMILIES)


def test_a_missing_count_is_refused():
    config = {"model_type": "llama", "vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1}
    with pytest.raises(ModelError, match="num_attention_heads|intermediate_size"):
        size_of(config)
