"""peft's LoRA layers with our forward: which are swapped, and that they compute what peft's do."""

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, LlamaConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from conf.groups import TrainerConfig, ZeroConfig
from conf.methods import FullMethod, LoraMethod
from kernels.linear import Linear, swap_linear
from training.job import TrainJob
from training.lora import LoraLayer, swap_lora, use_lora_kernel

LLAMA = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    attention_bias=True,
)
GPT2 = GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=64)
LAYERS = 2 * 7


def adapted(config=LLAMA, **changes):
    """A model whose adapters are not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    values = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    model = get_peft_model(model, LoraConfig(**(values | changes)), autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def logits_and_gradients(model, *, rows=1, length=40):
    model.zero_grad()
    ids = torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(1))
    logits = model(input_ids=ids, use_cache=False).logits
    logits.logsumexp(-1).sum().backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    return logits.detach(), trained


@pytest.mark.parametrize("length", [3, 40])  # below and above where products are merged
@pytest.mark.parametrize("is_onednn", [False, True])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"r": 1}])
def test_a_swapped_model_computes_what_pefts_does(changes, is_onednn, length):
    plain = adapted(**changes)
    ours = copy.deepcopy(plain)
    if is_onednn:
        swap_linear(ours, is_packed=False)
    assert swap_lora(ours, impl="auto") == LAYERS
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert list(ours.state_dict()) == list(plain.state_dict())
    (found, gradients), (wanted, truths) = (
        logits_and_gradients(model, length=length) for model in (ours, plain)
    )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == truths.keys() and len(gradients) == 2 * LAYERS
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, truths[name], atol=2e-5, rtol=1e-4)


def test_our_forward_runs_in_every_swapped_layer(monkeypatch):
    model = adapted()
    swap_lora(model, impl="auto")
    calls = []
    right = LoraLayer.forward.__globals__["lora_linear"]
    monkeypatch.setitem(
        LoraLayer.forward.__globals__,
        "lora_linear",
        lambda *args, **kwargs: calls.append(kwargs["impl"]) or right(*args, **kwargs),
    )
    logits_and_gradients(model)
    assert calls == ["auto"] * LAYERS
    calls.clear()
    with model.disable_adapter():
        model(input_ids=torch.arange(5)[None])
    assert calls == []


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"lora_dropout": 0.1},
        {"lora_bias": True},
        {"alora_invocation_tokens": [3]},
    ],
)
def test_other_layers_keep_pefts(changes):
    model = adapted(**changes)
    assert swap_lora(model, impl="auto") == 0
    assert not any(isinstance(m, LoraLayer) for m in model.modules())


def test_layers_that_are_not_linear_keep_pefts():
    assert swap_lora(adapted(GPT2), impl="auto") == 0  # Conv1D


def test_two_adapters_and_merged_ones_take_pefts_way():
    plain = adapted()
    ours = copy.deepcopy(plain)
    swap_lora(ours, impl="auto")
    ids = torch.arange(30)[None]
    with torch.no_grad():
        for model in (plain, ours):
            torch.manual_seed(3)
            names = ["q_proj", "up_proj"]
            other = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
            model.add_adapter("other", other)
            model.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(ours(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
        for model in (plain, ours):
            model.base_model.set_adapter("other")
        torch.testing.assert_close(ours(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
        for model in (plain, ours):
            model.merge_adapter()
        torch.testing.assert_close(ours(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
        unloaded = ours.unload()
        assert not any(isinstance(m, LoraLayer) for m in unloaded.modules())


def make_job(**values):
    defaults = {
        "arm_name": "tuned", "method": LoraMethod(), "trainer": TrainerConfig(),
        "zero": ZeroConfig(), "model_dir": "", "base_model": "tiny", "base_model_sha256": "b",
        "renderer_sha256": "r", "prompt_sha256": "p", "rows_path": "", "output_dir": "",
        "dtype": "float32", "device": "cpu", "threads": 1, "world_size": 1, "pad_id": 0,
        "usd_per_device_second": None,
    }  # fmt: skip
    return TrainJob(**(defaults | values))


@pytest.mark.parametrize(
    ("values", "stage", "said"),
    [
        ({}, 0, f"lora_linear in {LAYERS} layers (cpu: the device is cpu)"),
        ({}, 2, f"lora_linear in {LAYERS} layers (cpu: the device is cpu)"),
        ({}, 3, "peft's LoRA layers (ZeRO-3 shards the weights)"),
        ({"kernels_impl": "reference"}, 0, "peft's LoRA layers (asked for)"),
    ],
)
def test_where_a_job_takes_the_kernel(values, stage, said):
    model = adapted()
    assert use_lora_kernel(model, make_job(**values), stage=stage) == said
    swapped = sum(isinstance(m, LoraLayer) for m in model.modules())
    assert swapped == (LAYERS if "lora_linear" in said else 0)


def test_models_without_lora_say_nothing():
    model = AutoModelForCausalLM.from_config(LLAMA)
    assert use_lora_kernel(model, make_job(method=FullMethod()), stage=0) == ""
    other = get_peft_model(model, IA3Config(task_type="CAUSAL_LM"))
    assert use_lora_kernel(other, make_job(), stage=0) == ""


def test_a_wrong_kernel_is_not_taken(monkeypatch):
    import kernels.lora_linear as module

    right = module._lora_linear_cpu
    monkeypatch.setattr(module, "_lora_linear_cpu", lambda *args: right(*args) * 1.001)
    model = adapted()
    assert "peft's LoRA layers (cpu off by" in use_lora_kernel(model, make_job(), stage=0)
    assert not any(isinstance(m, (LoraLayer, Linear)) for m in model.modules())
