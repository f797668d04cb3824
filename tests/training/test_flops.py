"""Operations by shapes against torch's own counter on the model that trains."""

from itertools import product

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from conf.methods import FullMethod, LoraMethod
from training.flops import PassShape, forward_cost, train_cost, triangle
from training.shapes import size_of

COMMON = {
    "vocab_size": 310,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": ("LlamaConfig", COMMON),
    "qwen2": ("Qwen2Config", COMMON),
    "phi3": ("Phi3Config", COMMON | {"pad_token_id": 0}),
    "gpt2": ("GPT2Config", {"vocab_size": 310, "n_embd": 48, "n_layer": 3, "n_head": 6}),
}
TARGETS = {"llama": ([], ["down_proj"], ["o_proj"], ["q_proj", "v_proj"]), "phi3": ([],)}
TARGETS |= {"qwen2": (["up_proj"],), "gpt2": ([],)}
TOKENS = 37


def counted(config, method):
    """Operations of forward and backward that torch sees, of one row with a target at every token.

    Eager attention multiplies all pairs of tokens, masked or not.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if isinstance(method, LoraMethod):
        from peft import LoraConfig, get_peft_model

        targets = list(method.target_modules) or "all-linear"
        model = get_peft_model(
            model, LoraConfig(r=method.lora_rank, target_modules=targets, task_type="CAUSAL_LM")
        )
    ids = torch.randint(3, 300, (1, TOKENS))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.logsumexp(-1).sum().backward()
    return counter.get_total_flops()


CASES = [(name, FullMethod()) for name in CONFIGS] + [
    (name, LoraMethod(lora_rank=5, target_modules=targets))
    for name in CONFIGS
    for targets in TARGETS[name]
]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_counts_equal_those_of_torch(family, method):
    name, values = CONFIGS[family]
    config = getattr(transformers, name)(**values)
    shape = PassShape(tokens=TOKENS, pairs=TOKENS**2, targets=TOKENS)
    cost = train_cost(method, size=size_of(config.to_dict()))
    # Torch also counts the rotations' outer product; and where only queries and values of the
    # first block have adapters it skips the gradient of its keys, which fused attention computes.
    assert cost.flops(shape) == pytest.approx(counted(config, method), rel=0.01)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_forward_pass_alone_equals_torchs_count(family):
    name, values = CONFIGS[family]
    config = getattr(transformers, name)(**values)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(3, 300, (1, TOKENS)))
    shape = PassShape(tokens=TOKENS, pairs=TOKENS**2, targets=TOKENS)
    found = forward_cost(size_of(config.to_dict())).flops(shape)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=6), data=st.data())
def test_pairs_by_brute_force(lengths, data):
    shared = data.draw(st.integers(0, min(lengths) - 1)) if len(lengths) > 1 else 0
    shape = PassShape.of(lengths, shared=shared, targets=1)
    places = [(0, depth) for depth in range(shared)]
    places += [(k, d) for k, length in enumerate(lengths, 1) for d in range(shared, length)]
    pairs = sum(
        other <= depth and segment in (0, row)
        for (row, depth), (segment, other) in product(places, places)
    )
    assert (shape.tokens, shape.pairs) == (len(places), pairs)


def test_recomputing_costs_another_forward_of_the_blocks():
    size = size_of({"model_type": "llama", **COMMON})
    plain, again = (
        train_cost(FullMethod(), size=size, recomputes=recomputes) for recomputes in (False, True)
    )
    assert again.per_token - plain.per_token == 2 * size.body
    assert again.per_target == plain.per_target
    assert triangle(3) == 6


def test_lora_needs_two_thirds_of_full():
    """ "LoRA Without Regret": about two thirds, for wide layers and small ranks."""
    wide = COMMON | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 30}
    size = size_of({"model_type": "llama", **wide})
    shape = PassShape.of([256], shared=0, targets=4)
    costs = [train_cost(m, size=size).flops(shape) for m in (LoraMethod(lora_rank=1), FullMethod())]
    assert 0.64 < costs[0] / costs[1] < 0.70
