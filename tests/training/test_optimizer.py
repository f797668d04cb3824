"""Groups of parameters against peft's own LoRA+ optimizer, and against a hand-written update."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from conf.methods import FullMethod, LoraMethod, PeftMethod
from training.adapters import with_adapters
from training.job import DEFAULT_LEARNING_RATES, default_learning_rate
from training.optimizer import RATE_RATIO, parameter_groups


def model(base_dir: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    found: nn.Module = AutoModelForCausalLM.from_pretrained(str(base_dir))
    return found


def adapted(base_dir: Path, method: LoraMethod | PeftMethod) -> nn.Module:
    return with_adapters(model(base_dir), method, arm_name="x", seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("ratio", [1.0, 16.0])
def test_lora_plus_groups_equal_those_of_peft(base_dir: Path, ratio: float, decay: float) -> None:
    from peft.optimizers import create_loraplus_optimizer

    method = LoraMethod(lora_rank=3, lora_plus_ratio=ratio)
    trainee = adapted(base_dir, method)
    theirs = create_loraplus_optimizer(
        trainee,  # type: ignore[arg-type]
        torch.optim.AdamW,
        lr=0.01,
        loraplus_lr_ratio=ratio,
        loraplus_weight_decay=decay,
    )
    wanted = {
        id(p): (group["lr"], group["weight_decay"])
        for group in theirs.param_groups
        for p in group["params"]
    }
    ours = parameter_groups(trainee.named_parameters(), method=method, weight_decay=decay)
    found = {
        id(p): (0.01 * group[RATE_RATIO], group["weight_decay"])
        for group in ours
        for p in group["params"]
    }
    assert found == wanted and len(found) == 28
    assert len(ours) == (1 if ratio == 1.0 else 2)


def test_norms_and_biases_do_not_decay_as_in_transformers(base_dir: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Trainer

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4))
    for one in (model(base_dir), gpt2):
        decaying = set(Trainer.get_decay_parameter_names(None, one))  # type: ignore[arg-type]
        names = {id(p): name for name, p in one.named_parameters()}
        groups = parameter_groups(one.named_parameters(), method=FullMethod(), weight_decay=0.1)
        found = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
        assert set(found) == set(names.values())
        assert {name for name, decay in found.items() if decay} == decaying & set(found)  # tied
        plain = parameter_groups(one.named_parameters(), method=FullMethod(), weight_decay=0.0)
        assert len(plain) == 1 and len(plain[0]["params"]) == len(names)


def test_a_sharded_parameter_decays_by_its_whole_shape() -> None:
    empty = nn.Parameter(torch.empty(0))
    empty.ds_shape = (4, 4)  # type: ignore[attr-defined]
    bias = nn.Parameter(torch.empty(0))
    bias.ds_shape = (4,)  # type: ignore[attr-defined]
    groups = parameter_groups([("w", empty), ("b", bias)], method=FullMethod(), weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_default_rates() -> None:
    full, lora = DEFAULT_LEARNING_RATES["full"], DEFAULT_LEARNING_RATES["lora"]
    assert lora == pytest.approx(10 * full)
    assert default_learning_rate(FullMethod()) == full
    assert default_learning_rate(LoraMethod(use_dora=True, use_rslora=True)) == lora
    for ratio in (1.0, 4.0, 16.0):
        rate_a = default_learning_rate(LoraMethod(lora_plus_ratio=ratio))
        assert math.sqrt(rate_a * (rate_a * ratio)) == pytest.approx(lora), "LoRA's in the middle"
    assert default_learning_rate(PeftMethod(peft_type="LOHA")) == lora
    assert default_learning_rate(PeftMethod(peft_type="IA3")) == 3e-3
