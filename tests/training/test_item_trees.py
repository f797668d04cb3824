"""Items as trees: each target sees the tokens of its own row, and every token is there once."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.records import RenderedExample
from kernels.shared_prefix_attention import dense_visible
from tests.training.pack_cases import row_loss
from training.attention import passes_of
from training.data import visibility
from training.item_trees import ItemTrees
from training.pack_model import PackModel, Part
from training.pack_trial import adapter_name

TOKENS = st.integers(1, 3)  # so few that rows often begin alike


@st.composite
def items_of(draw):
    """Items of one or more rows: a common start, a prompt, and targets that may have gaps."""
    start = draw(st.lists(TOKENS, max_size=4))
    items = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = [*start, *draw(st.lists(TOKENS, min_size=1, max_size=5))]
        rows = []
        for _ in range(draw(st.integers(1, 5))):
            ids = draw(st.lists(TOKENS, min_size=1, max_size=3))
            mask = draw(st.lists(st.integers(0, 1), min_size=len(ids) - 1, max_size=len(ids) - 1))
            rows.append(example([*prompt, *ids], [0] * len(prompt) + [*mask, 1]))
        items.append(rows)
    return items


def example(ids, mask):
    return RenderedExample(item_id="", input_ids=tuple(ids), target_mask=tuple(mask))


def seen_by(batch):
    """(T, T) whether a token sees another: by the mask, and by what the kernel is told."""
    work = passes_of(batch)
    own = dense_visible(work.segments)
    own[work.prefix :, : work.prefix] = True
    mask = visibility(batch.segments, dtype=torch.float32, ends=batch.ends)[0, 0] == 0
    assert mask.equal(own)
    return mask


@given(items_of(), st.integers(1, 40))
def test_each_target_sees_its_row_and_each_token_is_there_once(items, max_tokens):
    trees = ItemTrees.of(items)
    left, embedded = list(items), 0
    for passed in trees.passes(max_tokens=max_tokens):
        batch = trees.batch(passed)
        here, left = left[: len(passed)], left[len(passed) :]
        assert len(passed) == 1 or batch.input_ids.numel() <= max_tokens
        embedded += batch.input_ids.numel()
        seen, ids, depths = seen_by(batch), batch.input_ids[0], batch.position_ids[0]
        wanted = [(r, t) for rows in here for r in rows for t in hits(r)]
        assert [r.input_ids[t] for r, t in wanted] == batch.targets.tolist()
        for (row, t), source in zip(wanted, batch.positions.tolist(), strict=True):
            assert tuple(ids[seen[source]].tolist()) == row.input_ids[:t]
            assert depths[seen[source]].tolist() == list(range(t))
        assert [n for tree in passed for n in tree.row_targets] == [
            len(hits(row)) for rows in here for row in rows
        ]
        prefix = len(trees.prefix)
        contexts = {
            (number if end > prefix else -1, row.input_ids[:end])
            for number, rows in enumerate(here)
            for row in rows
            for end in range(1, len(row.input_ids))
        }
        assert batch.input_ids.numel() == len(contexts)
    assert not left and embedded == trees.num_tokens(max_tokens=max_tokens)


def hits(row):
    return [t for t in range(1, len(row.input_ids)) if row.target_mask[t]]


def test_the_prefix_is_what_all_rows_begin_with():
    items = [[example((1, 2, 3, k, 9, k), (0, 0, 0, 0, 0, 1)) for k in (4, 5)] for _ in range(3)]
    assert ItemTrees.of(items).prefix == (1, 2, 3)


def test_a_rung_of_tickets_takes_half_the_tokens():
    """48 items of 7 labels behind an instruction of 40 tokens, 89 rows each by prompt."""
    draw = random.Random(0)
    start = [draw.randrange(90) for _ in range(40)]
    items = []
    for _ in range(48):
        prompt = [*start, *(draw.randrange(90) for _ in range(36))]
        mask = [0] * len(prompt) + [1]
        items.append([example([*prompt, 90 + label], mask) for label in range(7)])
    by_prompt = sum(len(rows[0].input_ids) - 2 + 2 * len(rows) for rows in items)
    trees = ItemTrees.of(items)
    assert by_prompt == 48 * 89 == 4272
    assert trees.num_tokens(max_tokens=2560) == 40 + 48 * 36 == 1768
    assert trees.num_tokens(max_tokens=1000) == 2 * 40 + 48 * 36


@pytest.mark.parametrize(("dtype", "within"), [("float32", 1e-5), ("float64", 1e-6)])
@pytest.mark.parametrize("max_tokens", [1, 60, 2560])
def test_scores_are_those_of_each_row_alone(
    dtype, within, max_tokens, make_trial, label_rows_path, base_dir, request
):
    """Two adapters in the model, one of which is asked; before, each item was a part of its own."""
    from training.pack_scores import read_items

    if dtype == "float64":
        request.getfixturevalue("exact_norms")
    jobs = [make_trial(trial, dtype=dtype) for trial in (0, 2)]
    model = PackModel(jobs[0], adapter=adapter_name(jobs[0]))
    model.add(jobs[1], adapter=adapter_name(jobs[1]))
    torch.manual_seed(1)
    with torch.no_grad():
        for job in jobs:
            for _, weight in model.named_parameters(adapter_name(job)):
                weight.normal_(std=0.3)
    asked = adapter_name(jobs[1])
    items = read_items(label_rows_path)
    trees = ItemTrees.of(items)
    found = []
    for passed in trees.passes(max_tokens=max_tokens):
        found += model.item_logprobs(asked, trees, passed)
    parts = [[Part(asked, rows)] for rows in items]
    unshared = [sums for part in parts for sums in model.logprobs(part)]
    alone = [[model.logprobs([Part(asked, [row])])[0][0] for row in rows] for rows in items]
    for sums, others, single in zip(found, unshared, alone, strict=True):
        assert sums == pytest.approx(others, abs=within)
        assert sums == pytest.approx(single, abs=within)
    assert max(map(max, found)) - min(map(min, found)) > 1, "the adapter says something"


def test_row_loss_agrees_where_no_adapter_answers(make_trial, label_rows_path, base_dir):
    """A fresh adapter adds nothing: plain transformers gives the same."""
    from transformers import AutoModelForCausalLM

    from training.pack_scores import read_items

    job = make_trial(0, dtype="float32")
    model = PackModel(job, adapter=adapter_name(job))
    plain = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    items = read_items(label_rows_path)
    trees = ItemTrees.of(items)
    (passed,) = trees.passes(max_tokens=2560)
    found = model.item_logprobs(adapter_name(job), trees, passed)
    for rows, sums in zip(items, found, strict=True):
        for row, total in zip(rows, sums, strict=True):
            body = {"input_ids": list(row.input_ids), "target_mask": row.target_mask}
            with torch.no_grad():
                loss, _ = row_loss(plain, body)
            assert total == pytest.approx(-float(loss), abs=1e-5)
