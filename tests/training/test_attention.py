"""Packed passes without a T x T mask: the same numbers as single rows, and as under the mask."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from conf.groups import TrainerConfig, ZeroConfig
from conf.methods import FullMethod, LoraMethod
from conf.records import RenderedExample
from kernels.dispatch import Choice
from training import attention
from training import layout as layouts
from training.attention import ATTENTION, PackedPass, attach, passes_of, seeing
from training.data import joined_batch, make_batch, packed_batch, padded_batch, visibility
from training.job import MASKED_PASS_TOKENS, PASS_TOKENS, TrainJob
from training.layout import choose_layout
from training.model import build
from training.packing import Layout

INSTRUCTION = (40, 41, 42, 43, 44)
TINY = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
GPT2 |= {"embd_pdrop": 0.0, "resid_pdrop": 0.0}
OPT = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
CONFIGS = {
    "llama": LlamaConfig(**TINY),
    "tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**TINY),
    "gpt2": GPT2Config(**GPT2, attn_pdrop=0.0),
    "opt": OPTConfig(**OPT),
}


def new_model(config, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), **options)  # it is written to


def new_job(**values):
    names = "arm_name model_dir base_model base_model_sha256 renderer_sha256 prompt_sha256"
    fixed = dict.fromkeys([*names.split(), "rows_path", "output_dir"], "")
    fixed |= {"method": FullMethod(), "trainer": TrainerConfig(), "zero": ZeroConfig()}
    fixed |= {"dtype": "float32", "device": "cpu", "threads": 1, "world_size": 1, "pad_id": 0}
    return TrainJob(**(fixed | {"usd_per_device_second": None} | values))


def make_row(own, *, targets=1, first=7):
    """The instruction, so many other tokens, and targets."""
    ids = (*INSTRUCTION, *((first * n + 3) % 40 for n in range(own + targets)))
    mask = (0,) * (len(INSTRUCTION) + own) + (1,) * targets
    return RenderedExample(item_id="", input_ids=ids, target_mask=mask)


def odd_rows():
    """Rows that make several runs of segments, of one row and of more."""
    return [make_row(own, targets=1 + own % 3, first=own + 2) for own in (25, 25, 24, 13, 7, 7, 1)]


def hidden_of(model, batch):
    with seeing(batch, model=model) as view:
        return model.base_model(input_ids=batch.input_ids, **view).last_hidden_state.flatten(0, 1)


def gradients(model, batches):
    """The summed loss of batches, its gradients by name, and the tokens that were embedded."""
    embedded = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: embedded.append(inputs[0].numel())
    )
    total = torch.zeros(())
    for batch in batches:
        logits = model.get_output_embeddings()(hidden_of(model, batch)[batch.positions])
        total = total + nn.functional.cross_entropy(logits, batch.targets, reduction="sum")
    total.backward()
    hook.remove()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float(total.detach()), found, sum(embedded)


def worst_difference(found, wanted):
    """The largest difference of any gradient, relative to its parameter's largest value."""
    assert found.keys() == wanted.keys() and found
    return max(
        float((found[name] - wanted[name]).abs().max() / wanted[name].abs().max().clamp(min=1e-3))
        for name in wanted
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shares", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_gradients_are_those_of_single_rows(name, shares, dtype):
    rows, model = odd_rows(), new_model(CONFIGS[name]).to(dtype)
    wanted_loss, wanted, whole = gradients(model, [padded_batch([r], pad_id=0) for r in rows])
    assert attach(model, is_whole=True) == ""
    loss, found, tokens = gradients(model, [packed_batch(rows, shares_prefix=shares)])
    # Llama's norms compute in fp32 whatever the dtype.
    has_fp64 = dtype == torch.float64 and name in ("gpt2", "opt")
    assert loss == pytest.approx(wanted_loss, rel=1e-12 if has_fp64 else 1e-6)
    assert worst_difference(found, wanted) < (1e-9 if has_fp64 else 1e-5)
    assert whole == sum(len(row.input_ids) for row in rows)
    assert whole - tokens == (len(rows) - 1) * len(INSTRUCTION) * shares


@pytest.mark.parametrize("name", CONFIGS)
def test_no_row_sees_another(name):
    """Other tokens in one row leave the hidden states of all others as they were, to the bit."""
    model = new_model(CONFIGS[name])
    assert attach(model, is_whole=True) == ""
    rows = odd_rows()
    batch = packed_batch(rows, shares_prefix=True)
    before = hidden_of(model, batch)
    for number, row in enumerate(rows, start=1):
        rest = ((token + 1) % 40 for token in row.input_ids[len(INSTRUCTION) :])
        changed = dataclasses.replace(row, input_ids=(*INSTRUCTION, *rest))
        other = packed_batch([*rows[: number - 1], changed, *rows[number:]], shares_prefix=True)
        assert torch.equal(other.segments, batch.segments)
        after, is_other = hidden_of(model, other), batch.segments != number
        assert torch.equal(before[is_other], after[is_other])
        assert not torch.equal(before[~is_other], after[~is_other])


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7), prefix=st.integers(0, 5))
def test_a_pass_is_what_the_mask_says(lengths, prefix):
    numbers = torch.tensor([0] * prefix + [i for i, n in enumerate(lengths, 1) for _ in range(n)])
    work = PackedPass(numbers)
    query, key, value = (torch.randn(heads, len(numbers), 8).double() for heads in (4, 2, 2))
    mask = visibility(numbers, dtype=torch.float64)[0, 0]
    wanted = nn.functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 0), value.repeat_interleave(2, 0), mask, scale=0.3
    )
    assert (work.attend(query, key, value, 0.3) - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("method", [FullMethod(), LoraMethod(lora_rank=3)])
def test_checkpointed_layers_see_again_what_they_saw(method, base_dir):
    """Two different passes and a single row go forward before the first goes backward."""
    rows, found = odd_rows(), []
    for is_checkpointed in (False, True):
        trainer = TrainerConfig(activation_checkpointing=is_checkpointed)
        trainee = build(new_job(model_dir=str(base_dir), method=method, trainer=trainer))
        for name, parameter in trainee.model.named_parameters():
            if "lora_B" in name:  # zero at first: A would get no gradient
                torch.manual_seed(len(name))
                nn.init.normal_(parameter, std=0.1)
        parts = (rows[:4], rows[4:6], rows[6:])
        batches = [make_batch(part, layout=trainee.layout, pad_id=0) for part in parts]
        sum(trainee.loss(batch) for batch in batches).backward()
        found.append({n: p.grad for n, p in trainee.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_trained_pass_forms_no_mask(base_dir, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a T x T mask")

    trainee = build(new_job(model_dir=str(base_dir)))
    monkeypatch.setattr(attention, "visibility", refuse)
    assert "row by row" in trainee.layout.reason
    trainee.loss(make_batch(odd_rows(), layout=trainee.layout, pad_id=0)).backward()


@pytest.mark.parametrize(
    ("config", "options", "reason"),
    [
        (LlamaConfig(**TINY), {"attn_implementation": "eager"}, "a way of its own"),
        (FalconConfig(**OPT, alibi=False), {}, "a way of its own"),
        (LlamaConfig(**TINY, attention_dropout=0.1), {}, "are dropped"),
        (GPT2Config(**GPT2, attn_pdrop=0.1), {}, "are dropped"),
    ],
)
def test_where_the_mask_stays(config, options, reason):
    model = new_model(config, **options)
    assert reason in attach(model, is_whole=True)
    assert model.config._attn_implementation != ATTENTION
    batch = packed_batch(odd_rows(), shares_prefix=True)
    with seeing(batch, model=model) as view:
        assert view["attention_mask"].shape == (1, 1, *batch.segments.shape * 2)


def test_where_the_kernel_may_not_run(monkeypatch):
    model = new_model(CONFIGS["llama"])
    layout = choose_layout(new_job(device="cuda"), model=model, trainee=model)
    assert layout.is_packed and layout.reason.endswith("under a mask, the device is cuda")
    wrong = Choice(impl="reference", reason="cpu off by 3.1e-01, 1.0e-05 allowed")
    monkeypatch.setattr(layouts, "usable", lambda kernel, job: wrong)
    layout = choose_layout(new_job(), model=model, trainee=model)
    assert layout.is_packed and "off by 3.1e-01" in layout.reason
    assert layout.max_tokens == MASKED_PASS_TOKENS["cpu"]
    assert model.config._attn_implementation != ATTENTION


def test_a_model_that_ignores_our_attention_is_found_out(monkeypatch):
    model = new_model(CONFIGS["llama"])
    monkeypatch.setattr(model, "set_attn_implementation", lambda name: None)
    assert "a row is off by" in attach(model, is_whole=True)
    assert attach(model, is_whole=False) == ""


def test_the_check_embeds_no_token_and_leaves_the_mode():
    model, embedded = new_model(CONFIGS["llama"]).train(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda *seen: embedded.append(seen))
    assert attach(model, is_whole=True) == ""
    assert not embedded and model.training


def test_what_our_attention_has_not_runs_under_a_mask():
    """Dropout that no configuration told of: the same tokens are seen, by torch's attention."""
    numbers = torch.tensor([0, 0, 1, 1, 1, 2])
    query, key, value = (torch.randn(1, 2, 6, 8) for _ in range(3))
    with attention._attending(PackedPass(numbers)):
        wanted, _ = attention._attention(nn.Module(), query, key, value, None)
        found, _ = attention._attention(nn.Module(), query, key, value, None, dropout=1e-7)
    assert found.shape == (1, 6, 2, 8) and (found - wanted).abs().max() < 1e-5


def test_a_usual_batch_is_one_pass():
    """8 rows of 300 tokens without a common prefix; under a mask they are several."""
    rows = [
        RenderedExample(item_id="", input_ids=(i,) * 300, target_mask=(0,) * 299 + (1,))
        for i in range(8)
    ]
    fixed = {"is_packed": True, "shares_prefix": True, "max_rows": 8, "reason": ""}
    assert Layout(**fixed, max_tokens=PASS_TOKENS["cpu"]).fits(rows)
    assert not Layout(**fixed, max_tokens=MASKED_PASS_TOKENS["cpu"]).fits(rows)


def test_a_joined_pass_is_its_parts_one_by_one():
    """Prefixes of their own, and a part of nan that reaches nobody."""

    def example(ids, mask):
        return RenderedExample(item_id="", input_ids=tuple(ids), target_mask=tuple(mask))

    rows = [
        [example([5, 6, 7, 8], [0, 0, 0, 1]), example([5, 6, 9, 3], [0, 0, 0, 1])],
        [example([5, 6, 7, 8, 4], [0, 0, 0, 0, 1])],
        [example([1, 2, 3], [0, 0, 1]), example([1, 2, 4, 7], [0, 0, 0, 1])],
    ]
    batch = joined_batch(rows, shares_prefix=True)
    assert batch.parts == (6, 5, 6) and batch.segments.tolist()[:6] == [0, 0, 1, 1, 2, 2]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 1, 2, 3]]
    assert batch.targets.tolist() == [8, 3, 4, 3, 7]
    assert batch.positions.tolist() == [2, 4, 9, 12, 15]
    tensors = [torch.randn(1, heads, 17, 8) for heads in (2, 2, 2)]
    for tensor in tensors:
        tensor[:, :, 6:11] = torch.nan
    leaves = [tensor.requires_grad_() for tensor in tensors]
    for dropout in (0.0, 1e-7):  # ours, and torch's own under a mask
        with attention._attending(passes_of(batch)):
            found, _ = attention._attention(nn.Module(), *leaves, None, dropout=dropout)
        found[:, :6].sum().backward()
        for start, end, part in ((0, 6, rows[0]), (11, 17, rows[2])):
            alone = packed_batch(part, shares_prefix=True)
            with attention._attending(passes_of(alone)):
                cut = [leaf[:, :, start:end] for leaf in leaves]
                wanted, _ = attention._attention(nn.Module(), *cut, None)
            torch.testing.assert_close(found[:, start:end], wanted, atol=1e-5, rtol=1e-5)
        assert leaves[0].grad[:, :, :6].isfinite().all()
