"""The loop over plain layers against transformers' own forward; models it must leave alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from conf.groups import EngineConfig
from evaluation.engines import build_engine
from evaluation.engines.base import GenerateRequest, ScoreRequest
from evaluation.engines.forest_engine import ForestEngine
from evaluation.engines.plain_layers import PlainLayers
from kernels.linear import choose_linear, swap_linear
from tests.evaluation.plain_model import Codec, plain_greedy, plain_logprob

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama with biases": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "wide heads, other rotation": LlamaConfig(
        **SHAPE,
        head_dim=12,
        rms_norm_eps=1e-2,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0},
    ),
    "scaled rotation": LlamaConfig(
        **SHAPE,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
}


def make(config: Any, *, is_packed: bool = True) -> PreTrainedModel:
    """Random weights, those of norms and biases too."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    swap_linear(model.base_model, is_packed=is_packed)
    return model


def causal(_layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Plain causal attention in float64."""
    group = len(query) // len(key)
    keys, values = (x.double().repeat_interleave(group, 0) for x in (key, value))
    scores = scale * query.double() @ keys.mT
    is_later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(is_later, -torch.inf).softmax(-1) @ values).to(query.dtype)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rows", [1, 2, 7, 33])
def test_hidden_states_equal_the_models_own(name: str, rows: int) -> None:
    base = make(CONFIGS[name]).base_model
    layers = PlainLayers.of(base)
    assert layers is not None
    source = torch.Generator().manual_seed(rows)
    tokens = torch.randint(0, 50, (rows,), generator=source)
    places = 37 * (rows % 3) + torch.arange(rows)  # transformers takes a jump for a new text
    with torch.inference_mode():
        found = layers.hidden(tokens, places, causal)
        expected = base(
            input_ids=tokens[None], position_ids=places[None], use_cache=False
        ).last_hidden_state[0]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_what_is_no_plain_model_is_left_alone() -> None:
    assert PlainLayers.of(make(LlamaConfig(**SHAPE)).base_model) is not None
    others = {
        "normed queries": make(Qwen3Config(**SHAPE, head_dim=8)),
        "another activation": make(LlamaConfig(**SHAPE, hidden_act="gelu")),
        "weights not packed": make(LlamaConfig(**SHAPE), is_packed=False),
    }
    for name, model in others.items():
        assert PlainLayers.of(model.base_model) is None, name


def test_a_subclass_is_left_alone() -> None:
    """It may compute anything."""
    base = make(LlamaConfig(**SHAPE)).base_model
    base.__class__ = type("LlamaModel", (type(base),), {})
    assert PlainLayers.of(base) is None


def make_engine(model_dir: Path) -> ForestEngine:
    engine = build_engine(
        EngineConfig(name="forest"),
        model_dir=model_dir,
        adapter_dir=None,
        renderer=Codec(model_dir),
        dtype="float32",
        device="cpu",
        threads=1,
        task=None,
    )
    assert isinstance(engine, ForestEngine)
    return engine


def check_answers(engine: ForestEngine, model: PreTrainedModel) -> None:
    """Scores within 1e-4 and the greedy tokens of plain forwards."""
    prompts = [(5, 6, 7, 8), (5, 6, 9), (5, 6, 7, 10, 11)]
    labels = ((1,), (2, 3), (2, 4, 5))
    wanted = [
        ScoreRequest(id=str(i), prompt_ids=p, label_ids=labels) for i, p in enumerate(prompts)
    ]
    for scored in engine.score(wanted):
        expected = [plain_logprob(model, prompts[int(scored.id)], label) for label in labels]
        assert scored.label_logprobs == pytest.approx(expected, abs=1e-4)
    asked = [
        GenerateRequest(id=str(i), prompt_ids=p, max_new_tokens=6 + i)
        for i, p in enumerate(prompts)
    ]
    for made in engine.generate(asked):
        prompt, count = prompts[int(made.id)], 6 + int(made.id)
        assert list(made.completion_ids) == plain_greedy(model, prompt, count, end=0)


@pytest.fixture(autouse=True)
def onednn_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is faster on this machine."""
    monkeypatch.setattr("evaluation.engines.forest_model.choose_linear", lambda: (True, "a test"))


def test_the_engine_takes_the_loop(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir)).eval()
    engine = make_engine(tiny_model_dir)
    assert engine.kernels["linear"].endswith("plain layers in one loop")
    calls = []
    real = PlainLayers.hidden
    monkeypatch.setattr(
        PlainLayers, "hidden", lambda self, *a: calls.append(len(a[0])) or real(self, *a)
    )
    before = engine.rows_computed
    check_answers(engine, plain)
    assert sum(calls) == engine.rows_computed - before > 0


def test_a_loop_that_is_off_is_not_taken(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of a known class that computes something else keeps its own modules."""
    plain = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir)).eval()
    real = PlainLayers.hidden
    monkeypatch.setattr(PlainLayers, "hidden", lambda self, *a: 1.001 * real(self, *a))
    engine = make_engine(tiny_model_dir)
    assert "plain layers would be off by" in engine.kernels["linear"]
    check_answers(engine, plain)
    engine.set_adapter(None)
    check_answers(engine, plain)


@pytest.mark.parametrize("kind", ["merged", "norms", "head"])
def test_adapters(tiny_model_dir: Path, tmp_path: Path, kind: str) -> None:
    """A merged one runs in the loop; one around other layers, norms too, in the model's modules."""
    from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model

    config = {
        "merged": LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
        "norms": LNTuningConfig(target_modules=["input_layernorm"]),
        "head": LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
    }[kind]
    torch.manual_seed(1)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(str(tiny_model_dir)), config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    tuned.save_pretrained(str(tmp_path))
    plain = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir)).eval()
    engine = make_engine(tiny_model_dir)
    engine.set_adapter(tmp_path)
    assert (engine._model._layers is not None) is (kind == "merged")
    fresh = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir))
    check_answers(engine, PeftModel.from_pretrained(fresh, str(tmp_path)).eval())
    engine.set_adapter(None)
    assert engine._model._layers is not None
    check_answers(engine, plain)


def test_the_product_is_there() -> None:
    """Else every test above has tested nothing but fallbacks."""
    choose_linear.cache_clear()
    assert "no such product" not in choose_linear()[1]
