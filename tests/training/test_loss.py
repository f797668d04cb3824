"""The loss by the kernel against the model's own logits; where it must not be used, it is not."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    OPTConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from conf.groups import TrainerConfig, ZeroConfig
from conf.methods import LoraMethod
from conf.records import RenderedExample
from kernels.linear import swap_linear
from kernels.linear_cross_entropy import Shaping
from training.data import packed_batch, padded_batch
from training.job import TrainJob
from training.loss import target_loss
from training.model import build

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
TINY = SMALL | {"intermediate_size": 48, "num_key_value_heads": 1}
GEMMA = TINY | {"head_dim": 16, "query_pre_attn_scalar": 16, "pad_token_id": 0}
CONFIGS = {
    "llama": (LlamaConfig(**TINY), Shaping()),
    "tied": (LlamaConfig(**TINY, tie_word_embeddings=True), Shaping()),
    "granite": (GraniteConfig(**TINY, logits_scaling=8.0), Shaping(scale=1 / 8)),
    "cohere": (CohereConfig(**TINY, logit_scale=0.0625), Shaping(scale=0.0625)),
    "gemma2": (Gemma2Config(**GEMMA, final_logit_softcapping=30.0), Shaping(soft_cap=30.0)),
    "gpt2": (GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2, n_positions=64), Shaping()),
    "opt": (OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16, dropout=0.0), Shaping()),
    "falcon": (FalconConfig(**SMALL), Shaping()),
}


def new_model(name="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name][0])


def make_job(**values):
    defaults = {
        "arm_name": "tuned", "method": LoraMethod(), "trainer": TrainerConfig(),
        "zero": ZeroConfig(), "model_dir": "", "base_model": "tiny", "base_model_sha256": "b",
        "renderer_sha256": "r", "prompt_sha256": "p", "rows_path": "", "output_dir": "",
        "dtype": "float32", "device": "cpu", "threads": 1, "world_size": 1, "pad_id": 0,
        "usd_per_device_second": None,
    }  # fmt: skip
    return TrainJob(**(defaults | values))


def make_rows(count, seed=0):
    source = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = int(torch.randint(2, 12, (), generator=source))
        ids = tuple(torch.randint(1, 50, (length,), generator=source).tolist())
        mask = (0,) + tuple(torch.randint(0, 2, (length - 1,), generator=source).tolist())
        mask = mask if any(mask) else (*mask[:-1], 1)
        rows.append(RenderedExample(item_id=str(index), input_ids=ids, target_mask=mask))
    return rows


def chosen(model, *, stage=0, **values):
    head = model.get_output_embeddings()
    return target_loss(model, head=head, job=make_job(**values), stage=stage)


def loss_and_gradients(loss, batch):
    loss.zero_grad()
    value = loss(batch)
    value.backward()
    grads = {n: p.grad.clone() for n, p in loss.named_parameters() if p.grad is not None}
    return float(value.detach()), grads


@pytest.mark.parametrize("name", CONFIGS)
def test_the_kernel_computes_what_the_model_does(name):
    model = new_model(name).eval()  # GPT-2 drops out while it trains
    loss = chosen(model)
    assert loss.choice.impl == "cpu" and loss.choice.reason == "the device is cpu"
    assert loss._shaping == CONFIGS[name][1]
    assert not model.get_output_embeddings()._forward_hooks
    assert not model.training
    batch = padded_batch(make_rows(4), pad_id=0)
    plain = chosen(copy.deepcopy(model), kernels_impl="reference")
    assert plain.choice.reason == "asked for"
    found, gradients = loss_and_gradients(loss, batch)
    wanted, truths = loss_and_gradients(plain, batch)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert gradients.keys() == truths.keys()
    for key, truth in truths.items():
        torch.testing.assert_close(gradients[key], truth, atol=2e-5, rtol=1e-4)
    assert list(loss.state_dict()) == list(plain.state_dict())


@settings(max_examples=15, deadline=None)
@given(count=st.integers(0, 6), seed=st.integers(0, 99), is_packed=st.booleans())
def test_any_batch(count, seed, is_packed):
    rows = make_rows(count, seed=seed) if count else []
    model = new_model("tied")
    loss = chosen(model)
    if not rows:  # a stand-in without targets
        nothing = RenderedExample(item_id="", input_ids=(0, 0), target_mask=(0, 0))
        value, gradients = loss_and_gradients(loss, padded_batch([nothing], pad_id=0))
        assert value == 0.0 and all((g == 0).all() for g in gradients.values())
        return
    make = packed_batch if is_packed else padded_batch
    batch = make(rows, **({"shares_prefix": True} if is_packed else {"pad_id": 0}))
    value, _ = loss_and_gradients(loss, batch)
    truth = 0.0
    for row in rows:
        logprobs = model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        for place in range(1, len(row.input_ids)):
            if row.target_mask[place]:
                truth -= float(logprobs[place - 1, row.input_ids[place]].detach())
    assert value == pytest.approx(truth, rel=1e-5)


def test_only_target_rows_meet_the_head_and_it_does_not_run(monkeypatch):
    model = new_model()
    loss = chosen(model)
    seen = []
    right = loss.forward.__globals__["linear_cross_entropy"]
    monkeypatch.setitem(
        loss.forward.__globals__,
        "linear_cross_entropy",
        lambda hidden, *args, **kwargs: seen.append(len(hidden)) or right(hidden, *args, **kwargs),
    )
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    batch = padded_batch(make_rows(4), pad_id=0)
    loss(batch)
    assert seen == [len(batch.targets)]


class Louder(nn.Module):
    """A head of another class, which computes what a plain one does."""

    def __init__(self, head):
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight)


def adapted(**changes):
    config = LoraConfig(r=2, task_type="CAUSAL_LM", **changes)
    return get_peft_model(new_model(), config)


def altered(change):
    """A model whose own forward does something after its head, on logits far below 1."""
    model = new_model()
    right = model.forward

    def forward(*args, **kwargs):
        out = right(*args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = forward
    return model


UNKNOWN = "the model does something unknown after its head"
ELSEWHERE = {
    "a factor": (lambda: altered(lambda z: z * 1.001), UNKNOWN),
    "a cap": (lambda: altered(lambda z: 50 * torch.tanh(z / 50)), UNKNOWN),
    "a ban": (lambda: altered(lambda z: z.index_fill(-1, torch.tensor(3), -1e9)), UNKNOWN),
    "adapter on the head": (lambda: adapted(target_modules=["lm_head"]), "the head is a Linear"),
    "saved head": (
        lambda: adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "the head is a ModulesToSaveWrapper",
    ),
    "virtual tokens": (
        lambda: get_peft_model(
            new_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        ),
        "the head does not take the decoder's last rows",
    ),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_the_kernel_does_not_know_stays_with_the_model(name):
    make, reason = ELSEWHERE[name]
    loss = chosen(make())
    assert (loss.choice.impl, loss.choice.reason) == ("reference", reason)
    assert loss._shaping is None


def test_another_head_class_and_zero_3_stay_with_the_model():
    model = new_model()
    head = Louder(model.lm_head)
    loss = target_loss(model, head=head, job=make_job(), stage=0)
    assert loss.choice.reason == "the head is a Louder"
    assert chosen(new_model(), stage=3).choice.reason == "ZeRO-3 shards the head"
    assert chosen(new_model(), stage=2).choice.impl == "cpu"


@pytest.mark.parametrize("make_config", [lambda: LoraConfig(r=2), lambda: IA3Config()])
def test_adapters_train_through_the_kernel(make_config):
    config = make_config()
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(new_model(), config)
    swap_linear(model, is_packed=False)  # the head too: still plain
    loss = chosen(model)
    assert loss.choice.impl == "cpu"
    _, gradients = loss_and_gradients(loss, padded_batch(make_rows(3), pad_id=0))
    trained = {f"model.{n}" for n, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained


def test_a_head_with_a_bias():
    model = new_model()
    model.lm_head.bias = nn.Parameter(torch.randn(50))
    plain = chosen(copy.deepcopy(model), kernels_impl="reference")
    batch = padded_batch(make_rows(4), pad_id=0)
    found, gradients = loss_and_gradients(chosen(model), batch)
    wanted, truths = loss_and_gradients(plain, batch)
    assert found == pytest.approx(wanted, rel=1e-5)
    name = "model.lm_head.bias"
    torch.testing.assert_close(gradients[name], truths[name], atol=1e-5, rtol=1e-4)


def test_bf16():
    model = new_model().bfloat16()
    loss = chosen(model, dtype="bfloat16")
    assert loss.choice.impl == "cpu"
    batch = padded_batch(make_rows(4), pad_id=0)
    found, gradients = loss_and_gradients(loss, batch)
    wanted, _ = loss_and_gradients(chosen(new_model()), batch)
    assert found == pytest.approx(wanted, rel=5e-3)
    assert {g.dtype for g in gradients.values()} == {torch.bfloat16}


def test_a_wrong_kernel_is_not_taken(monkeypatch):
    import kernels.linear_cross_entropy as module

    right = module._linear_cross_entropy_cpu

    def wrong(*args):
        found = right(*args)
        if found.hidden is not None:
            found.hidden *= 1.001
        return found

    monkeypatch.setattr(module, "_linear_cross_entropy_cpu", wrong)
    assert chosen(new_model()).choice.reason.startswith("cpu off by")


@pytest.mark.parametrize("is_training", [False, True])
def test_the_probe_leaves_no_trace(is_training):
    model = new_model("gpt2").train(is_training)
    chosen(model)
    assert model.training == is_training
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def test_a_built_trainee_says_what_it_takes(base_dir):
    trainee = build(make_job(model_dir=str(base_dir), method=LoraMethod(lora_rank=2)))
    assert trainee.loss.choice.impl == "cpu"
    assert "lora_linear in 14 layers (cpu" in trainee.linear
    plain = build(make_job(model_dir=str(base_dir), kernels_impl="reference"))
    assert plain.loss.choice.impl == "reference"
    assert "peft's LoRA layers (asked for)" in plain.linear
