"""Packed passes: the same loss and gradients as rows one by one, with fewer tokens computed."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from conf.groups import TrainerConfig, ZeroConfig
from conf.methods import FullMethod, LoraMethod
from conf.records import RenderedExample
from training import layout as layouts
from training import model as models
from training.data import make_batch, packed_batch, padded_batch, visibility
from training.job import TrainJob
from training.layout import choose_layout
from training.model import TargetLoss, build, linear_choice
from training.packing import Layout, pack, shared_length
from training.sharding import split_batch

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
SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NO_DROPOUT = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
GPT2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


def make_layout(**values):
    fixed = {"is_packed": True, "shares_prefix": True, "max_rows": 99, "max_tokens": 512}
    return Layout(**(fixed | {"reason": ""} | values))


def make_job(**values):
    names = "arm_name model_dir base_model base_model_sha256 renderer_sha256 prompt_sha256"
    fixed = dict.fromkeys([*names.split(), "rows_path", "output_dir"], "")
    fixed |= {"method": FullMethod(), "trainer": TrainerConfig(), "zero": ZeroConfig()}
    fixed |= {"dtype": "float32", "device": "cpu", "threads": 1, "world_size": 1, "pad_id": 0}
    return TrainJob(**(fixed | {"usd_per_device_second": None} | values))


@st.composite
def examples(draw):
    """A row of few different ids, so that beginnings agree; targets anywhere after the first."""
    ids = draw(st.lists(st.integers(1, 2), min_size=2, max_size=11))
    mask = draw(st.lists(st.sampled_from([0, 0, 0, 1]), min_size=len(ids), max_size=len(ids)))
    mask[draw(st.integers(1, len(ids) - 1))] = 1
    return RenderedExample(item_id="", input_ids=tuple(ids), target_mask=tuple(mask))


rows_lists = st.lists(examples(), min_size=1, max_size=9)


@given(rows=rows_lists, shares=st.booleans())
def test_each_row_is_whole_for_those_who_see_it(rows, shares):
    """Prefix and rest, put together, are the row, with its depths and its targets."""
    packed = pack(rows, shares_prefix=shares)
    for number, row in enumerate(rows, start=1):
        places = [p for p, segment in enumerate(packed.segments) if segment in (0, number)]
        assert tuple(packed.input_ids[p] for p in places) == row.input_ids
        assert [packed.depths[p] for p in places] == list(range(len(places)))
        own = [
            (packed.depths[source] + 1, target)
            for source, target in zip(packed.sources, packed.targets, strict=True)
            if packed.segments[source] == number
        ]
        hits = [t for t in range(1, len(row.input_ids)) if row.target_mask[t]]
        assert own == [(t, row.input_ids[t]) for t in hits]
    assert all(packed.segments[source] > 0 for source in packed.sources)


@given(rows=rows_lists)
def test_the_shared_prefix_is_the_longest_allowed(rows):
    def is_shareable(length):
        return len(rows) > 1 and all(
            row.input_ids[:length] == rows[0].input_ids[:length]
            and len(row.input_ids) > length
            and not any(row.target_mask[1 : length + 1])  # what the prefix predicts
            for row in rows
        )

    found = shared_length(rows)
    assert found == max((n for n in range(12) if is_shareable(n)), default=0)


@given(rows=rows_lists, shares=st.booleans())
def test_tokens_and_padding_are_those_of_the_batch(rows, shares):
    for is_packed in (True, False):
        layout = make_layout(is_packed=is_packed, shares_prefix=shares)
        batch = make_batch(rows, layout=layout, pad_id=0)
        assert batch.input_ids.numel() == layout.num_tokens(rows) + layout.num_padding(rows)
        assert layout.num_padding(rows) == (batch.input_ids == 0).sum()
    assert make_batch([], layout=layout, pad_id=0).input_ids.numel() == layout.num_padding([])


@given(
    rows=st.lists(examples(), min_size=1, max_size=20),
    world_size=st.integers(1, 3),
    max_rows=st.integers(1, 6),
    max_tokens=st.integers(1, 60),
)
def test_passes_keep_their_limits(rows, world_size, max_rows, max_tokens):
    layout = make_layout(max_rows=max_rows, max_tokens=max_tokens)
    shares = split_batch(
        range(len(rows)),
        lengths=[len(row.input_ids) for row in rows],
        world_size=world_size,
        fits=lambda part: layout.fits([rows[index] for index in part]),
    )
    passes = [part for share in shares for part in share]
    assert Counter(index for part in passes for index in part) == Counter(range(len(rows)))
    for part in passes:
        if len(part) > 1:
            packed = pack([rows[index] for index in part], shares_prefix=True)
            assert len(packed.input_ids) <= max_tokens and len(part) <= max_rows


@given(segments=st.lists(st.integers(0, 3), min_size=1, max_size=12).map(sorted))
def test_a_token_sees_the_prefix_and_its_own_row(segments):
    mask = visibility(torch.tensor(segments), dtype=torch.float32)
    assert mask.shape == (1, 1, len(segments), len(segments))
    for query, own in enumerate(segments):
        for key, other in enumerate(segments):
            is_seen = key <= query and other in (0, own)
            assert (mask[0, 0, query, key] == 0) == is_seen


CONFIGS = {
    "llama": LlamaConfig(**TINY),
    "tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "gpt2": GPT2Config(**GPT2, **NO_DROPOUT),
    "opt": OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "rotary_falcon": FalconConfig(**SMALL, alibi=False),
}


def make_rows(count, *, seed=0):
    """Rows of odd lengths: the instruction, 1 to 14 other tokens, 1 to 3 targets."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        own, hits = rng.randrange(1, 15), rng.randrange(1, 4)
        ids = (*INSTRUCTION, *(rng.randrange(1, 40) for _ in range(own + hits)))
        mask = (0,) * (len(INSTRUCTION) + own) + (1,) * hits
        rows.append(RenderedExample(item_id="", input_ids=ids, target_mask=mask))
    return rows


def new_loss(name, **config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], **config)
    return TargetLoss(model, head=model.get_output_embeddings()).train()


def gradients(loss, batches):
    """The summed loss of batches, its gradients by name, and the tokens that were embedded."""
    model, embedded = loss.model, []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: embedded.append(inputs[0].numel())
    )
    total = sum(loss(batch) for batch in batches)
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
def test_packed_gradients_are_those_of_single_rows(name, shares):
    rows = make_rows(7)
    model = new_loss(name).double()
    assert layouts._obstacle(model.model) is None
    singles = [padded_batch([row], pad_id=0) for row in rows]
    packed = packed_batch(rows, shares_prefix=shares)
    loss, found, tokens = gradients(model, [packed])
    wanted_loss, wanted, whole = gradients(model, singles)
    assert loss == pytest.approx(wanted_loss, rel=1e-12)
    # In fp64, except that Llama's norms compute in fp32 whatever the dtype.
    assert worst_difference(found, wanted) < (1e-6 if name in ("llama", "tied") else 1e-9)
    assert whole - tokens == (len(rows) - 1) * len(INSTRUCTION) * shares


@pytest.mark.parametrize("seed", range(3))
def test_packed_gradients_are_those_of_padded_passes_in_fp32(seed):
    rows = make_rows(9, seed=seed)
    model = new_loss("llama")
    loss, found, _ = gradients(model, [packed_batch(rows, shares_prefix=True)])
    padded = [padded_batch(rows[:4], pad_id=0), padded_batch(rows[4:], pad_id=0)]
    wanted_loss, wanted, _ = gradients(model, padded)
    assert loss == pytest.approx(wanted_loss, rel=1e-6)
    assert worst_difference(found, wanted) < 1e-5


def test_eager_attention_takes_the_mask_too():
    rows = make_rows(5)
    wanted = gradients(new_loss("llama"), [packed_batch(rows, shares_prefix=True)])
    eager = new_loss("llama", attn_implementation="eager")
    loss, found, _ = gradients(eager, [packed_batch(rows, shares_prefix=True)])
    assert loss == pytest.approx(wanted[0], rel=1e-6)
    assert worst_difference(found, wanted[1]) < 1e-5


def test_no_row_sees_another():
    """Another second row leaves the hidden states of the others as they were, to the bit."""
    rows = make_rows(3)
    model = new_loss("tied").model.base_model
    length = len(rows[1].input_ids)
    others = [rows[0], make_row_of(length, rows[1].target_mask), rows[2]]
    seen = []
    for three in (rows, others):
        batch = packed_batch(three, shares_prefix=True)
        mask = visibility(batch.segments, dtype=torch.float32)
        hidden = model(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids
        ).last_hidden_state[0]
        seen.append(hidden[batch.segments != 2])
    assert torch.equal(*seen)


def make_row_of(length, mask):
    ids = (*INSTRUCTION, *([7] * (length - len(INSTRUCTION))))
    return RenderedExample(item_id="", input_ids=ids, target_mask=mask)


@pytest.mark.parametrize("is_packed", (True, False))
def test_a_pass_without_rows_has_zero_loss_and_zero_gradients(is_packed):
    model = new_loss("llama")
    batch = make_batch([], layout=make_layout(is_packed=is_packed), pad_id=0)
    loss, found, tokens = gradients(model, [batch])
    assert (loss, tokens) == (0.0, 1)
    # None missing, or a worker would miss a collective operation.
    assert found.keys() == {name for name, _ in model.model.named_parameters()}
    assert not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize(
    ("config", "obstacle"),
    [
        (Gemma2Config(**TINY, head_dim=8), "other than full attention"),
        (MistralConfig(**TINY, sliding_window=8), "other than full attention"),
        (BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4), "no position ids"),
        (FalconConfig(**SMALL, alibi=True), "no position ids"),
        (MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1), "full attention"),
    ],
)
def test_models_that_count_places_are_padded(config, obstacle):
    model = AutoModelForCausalLM.from_config(config)
    layout = choose_layout(make_job(), model=model, trainee=model)
    assert not layout.is_packed and obstacle in layout.reason
    assert layout.max_rows == 4


def test_an_unused_window_is_no_obstacle():
    config = Qwen2Config(**TINY, use_sliding_window=False, sliding_window=8)
    config.sliding_window = 8
    assert layouts._obstacle(AutoModelForCausalLM.from_config(config)) is None


def test_dropout_shares_no_prefix(base_dir):
    """A token computed once would be dropped out alike for all rows."""
    model = AutoModelForCausalLM.from_config(GPT2Config(**GPT2))
    assert not choose_layout(make_job(), model=model, trainee=model).shares_prefix
    dropping = LlamaConfig(**TINY, attention_dropout=0.1)
    model = AutoModelForCausalLM.from_config(dropping)
    assert not choose_layout(make_job(), model=model, trainee=model).shares_prefix
    for dropout in (0.0, 0.1):
        job = make_job(model_dir=str(base_dir), method=LoraMethod(lora_dropout=dropout))
        layout = build(job).layout
        assert layout.is_packed and layout.shares_prefix == (dropout == 0.0)


def test_reference_means_plain_torch(base_dir):
    job = make_job(model_dir=str(base_dir), kernels_impl="reference")
    trainee = build(job)
    assert not trainee.layout.is_packed
    assert trainee.linear == "torch (kernels.impl=reference)"
    linear = [m for m in trainee.model.modules() if isinstance(m, nn.Linear)]
    assert linear and all(type(m) is nn.Linear for m in linear)


@pytest.mark.parametrize(
    ("values", "stage", "is_asked"),
    [
        ({}, 0, True),
        ({}, 2, True),
        ({"kernels_impl": "cpu"}, 0, True),
        ({}, 3, False),  # weights come and go
        ({"kernels_impl": "reference"}, 0, False),
        ({"device": "cuda"}, 0, False),
        ({"dtype": "bfloat16"}, 0, False),
    ],
)
def test_where_our_linear_product_may_run(values, stage, is_asked, monkeypatch):
    for answer in (True, False):
        monkeypatch.setattr(models, "choose_linear", lambda answer=answer: (answer, "measured"))
        is_taken, reason = linear_choice(make_job(**values), stage=stage)
        assert is_taken == (answer and is_asked)
        assert (reason == "measured") == is_asked


@pytest.mark.parametrize("method", [FullMethod(), LoraMethod(lora_rank=3)])
@pytest.mark.parametrize("is_checkpointed", (False, True))
def test_swapped_packed_passes_equal_plain_ones(method, is_checkpointed, base_dir, monkeypatch):
    """All of it together: adapters, our product, packing and checkpointing, against none of it."""
    monkeypatch.setattr(models, "choose_linear", lambda: (True, "for the test"))
    trainer = TrainerConfig(activation_checkpointing=is_checkpointed)
    rows = make_rows(6)
    found = {}
    for impl, checkpointed in (("auto", trainer), ("reference", TrainerConfig())):
        trainee = build(
            make_job(
                model_dir=str(base_dir), method=method, trainer=checkpointed, kernels_impl=impl
            )
        )
        for name, parameter in trainee.model.named_parameters():
            if "lora_B" in name:  # zero at first: A would get no gradient
                torch.manual_seed(len(name))
                nn.init.normal_(parameter, std=0.1)
        batch = make_batch(rows, layout=trainee.layout, pad_id=0)
        loss = trainee.loss(batch)
        loss.backward()
        grads = {n: p.grad for n, p in trainee.model.named_parameters() if p.requires_grad}
        found[impl] = (float(loss.detach()), grads)
    assert found["auto"][0] == pytest.approx(found["reference"][0], rel=1e-6)
    # Both sum in fp32, each in an order of its own.
    assert worst_difference(found["auto"][1], found["reference"][1]) < 1e-4
