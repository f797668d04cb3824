"""The prefix forest's plan against sets of prefixes, and its stack against a simulation."""

from __future__ import annotations

import random

import pytest

from evaluation.engines.forest import (
    ROOT,
    SHARED,
    Forest,
    build_forest,
    common_length,
    next_pass,
    passes,
)
from evaluation.engines.forest_bill import ForestBill

Prompt = tuple[int, ...]
Labels = tuple[Prompt, ...]


def random_requests(source: random.Random) -> tuple[list[Prompt], list[Labels]]:
    """Prompts that share beginnings at several levels, some equal, and labels over few tokens."""
    tokens = source.choice([2, 3, 9])

    def text(least: int, most: int) -> Prompt:
        return tuple(source.randrange(tokens) for _ in range(source.randint(least, most)))

    run, wordings = text(0, 12), [text(0, 6) for _ in range(3)]
    prompts = [run + source.choice(wordings) + text(0, 6) for _ in range(source.randint(1, 14))]
    prompts = [prompt or (0,) for prompt in prompts]
    shared_labels = tuple(text(1, 4) for _ in range(source.randint(1, 6)))
    own = source.random() < 0.3
    labels = [tuple(text(1, 4) for _ in range(3)) if own else shared_labels for _ in prompts]
    return prompts, labels


def needed_prefixes(prompts: list[Prompt], labels: list[Labels]) -> set[Prompt]:
    """Every beginning that a row is needed for, counted without any tree."""
    needed = {prompt[:end] for prompt in prompts for end in range(1, len(prompt) + 1)}
    for prompt, of in zip(prompts, labels, strict=True):
        needed |= {prompt + label[:end] for label in of for end in range(1, len(label))}
    return needed


def prefix_of(forest: Forest, row: int) -> Prompt:
    return tuple(int(forest.tokens[r]) for r in [*forest.ancestors(row), row])


@pytest.mark.parametrize("seed", range(1000))
def test_rows_are_the_distinct_needed_prefixes(seed: int) -> None:
    source = random.Random(seed)
    prompts, labels = random_requests(source)
    known = source.choice([(), prompts[0], prompts[0][: len(prompts[0]) // 2], (7, 7)])
    forest = build_forest(prompts, labels, known=known)
    prefixes = [prefix_of(forest, row) for row in range(len(forest.tokens))]
    assert len(prefixes) == len(set(prefixes))
    assert set(prefixes) == needed_prefixes(prompts, labels)
    assert prefixes[: forest.num_known] == [known[:end] for end in range(1, forest.num_known + 1)]
    check_reads(forest, prompts, labels)
    check_owners(forest, prompts, labels)
    keep = common_length(min(prompts), max(prompts))
    check_stack(forest, max_rows=source.choice([1, 2, 5, 16, 1000]), keep=keep)


def check_reads(forest: Forest, prompts: list[Prompt], labels: list[Labels]) -> None:
    """Each label's pieces are its tokens, each read behind the tokens before it."""
    assert list(forest.piece_labels) == sorted(forest.piece_labels)
    pairs = list(zip(forest.read_rows.tolist(), forest.read_tokens.tolist(), strict=True))
    assert len(pairs) == len(set(pairs))
    assert forest.read_rows.tolist() == sorted(forest.read_rows.tolist())
    found: dict[int, list[tuple[Prompt, int, bool]]] = {}
    for read, label, first in zip(
        forest.piece_reads, forest.piece_labels, forest.first_pieces, strict=True
    ):
        row, token = pairs[read]
        assert row >= forest.num_known, "what is on the stack has no hidden state"
        found.setdefault(int(label), []).append((prefix_of(forest, row), token, bool(first)))
    for index, (prompt, of) in enumerate(zip(prompts, labels, strict=True)):
        assert prefix_of(forest, int(forest.prompt_rows[index])) == prompt
        for number, label in enumerate(of, start=int(forest.label_starts[index])):
            wanted = [(prompt + label[:k], token, k == 0) for k, token in enumerate(label)]
            assert sorted(found[number]) == sorted(wanted)


def check_owners(forest: Forest, prompts: list[Prompt], labels: list[Labels]) -> None:
    """A row is owned by the only request that needs it, else shared; the bill adds up."""
    needs = [needed_prefixes([p], [of]) for p, of in zip(prompts, labels, strict=True)]
    for row in range(len(forest.tokens)):
        prefix = prefix_of(forest, row)
        users = [index for index, needed in enumerate(needs) if prefix in needed]
        assert forest.owners[row] == (users[0] if len(users) == 1 else SHARED)
    bill = ForestBill(forest, prompts)
    shared = sum(bill.add(work) for work in passes(forest, max_rows=7))
    owned = [bill.owned(index) for index in range(len(prompts))]
    assert shared == bill.shared
    assert shared + sum(owned) == forest.num_computed
    for index, prompt in enumerate(prompts):
        own = [
            end
            for end in range(1, len(prompt) + 1)
            if sum(prompt[:end] in needed for needed in needs) == 1
        ]
        known = [prefix_of(forest, row) for row in range(forest.num_known)]
        own = [end for end in own if prompt[:end] not in known]
        assert bill.cached(index) == len(prompt) - len(own)
        assert bill.lost(index) == bill.owned(index)


def check_stack(forest: Forest, *, max_rows: int, keep: int) -> None:
    """Play the plan with a list as the stack: each row finds exactly its ancestors."""
    stack = list(range(forest.num_known))
    computed: list[int] = []
    copied: list[int] = []
    for work in passes(forest, max_rows=max_rows, last_path=range(keep)):
        assert work.num_rows <= max_rows
        bounds = [*work.starts, work.high]
        for start, end in zip(bounds, bounds[1:], strict=False):
            for row in range(start, end):
                own = [other for other in range(start, row) if row < forest.ends[other]]
                assert stack[: work.depth] + own == forest.ancestors(row)
        computed += range(work.low, work.high)
        stack = stack[: work.kept] + list(work.pushed)
        copied += work.pushed
    assert len(copied) == len(set(copied)), "one copy of the keys and values of each node"
    assert computed == list(range(forest.num_known, len(forest.tokens)))
    assert stack == list(range(keep))


def test_a_cut_is_made_between_items() -> None:
    """Ten items of 40 rows below a prefix of 10: no pass of up to 100 rows cuts an item."""
    prompts = [(*range(10), 100 + item, *range(39)) for item in range(10)]
    forest = build_forest(prompts)
    done = list(passes(forest, max_rows=100))
    assert [work.num_rows for work in done] == [90, 80, 80, 80, 80]
    assert [len(work.starts) for work in done] == [1, 2, 2, 2, 2]
    assert max(work.depth + work.num_rows for work in done) <= 10 + 90  # rows of KV at any time


def test_a_long_prompt_is_cut_into_full_passes() -> None:
    forest = build_forest([tuple(range(1000))])
    assert [work.num_rows for work in passes(forest, max_rows=300)] == [300, 300, 300, 100]


def test_a_pass_never_leaves_the_subtree_of_its_path() -> None:
    forest = build_forest([(1, 2, 3), (1, 2, 4), (1, 5)])
    low = int(forest.prompt_rows[0])
    work = next_pass(forest, low, max_rows=100)
    assert work.high == forest.ends[forest.parents[low]]


def test_common_length_against_a_loop() -> None:
    source = random.Random(0)
    for _ in range(500):
        a = tuple(source.randrange(2) for _ in range(source.randrange(9)))
        b = tuple(source.randrange(2) for _ in range(source.randrange(9)))
        wanted = 0
        while wanted < min(len(a), len(b)) and a[wanted] == b[wanted]:
            wanted += 1
        assert common_length(a, b) == wanted


def test_the_root_has_no_row() -> None:
    assert build_forest([(3,)]).parents.tolist() == [ROOT]
