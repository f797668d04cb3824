"""Near-duplicates against brute force; what is dropped and counted."""

from __future__ import annotations

import random
import time

from hypothesis import given, settings
from hypothesis import strategies as st

from conf.records import Item
from evaluation.tasks.duplicates import (
    content_sha256,
    deduplicate,
    masked,
    near_duplicates,
    normalised,
    num_conflicts,
    overlaps,
)


def item(
    text: str,
    *,
    split: str = "train",
    label: str | None = "a",
    target: str | None = None,
    n: int = 0,
) -> Item:
    return Item(
        id=f"{split}-{text}-{label}-{target}-{n}",
        split=split,
        input=text,
        sha256=content_sha256(text=text, context=None, choices=()),
        label=None if target is not None else label,
        target=target,
    )


def brute_force(texts: list[str], blocks: list[str], threshold: float) -> set[int]:
    """Every text against every kept one, by the definition."""
    kept: list[int] = []
    dropped: set[int] = set()
    for i, text in enumerate(texts):
        tokens = set(masked(text).split())
        for j in kept:
            other = set(masked(texts[j]).split())
            alike = len(tokens & other) / len(tokens | other) if tokens | other else 1.0
            if blocks[i] == blocks[j] and (
                masked(text) == masked(texts[j]) or alike >= threshold - 1e-12
            ):
                dropped.add(i)
                break
        else:
            kept.append(i)
    return dropped


words = st.sampled_from(
    ("a", "b", "c", "d", "e", "f", "go", "now", "call", "12", "777", "won!", "Prize")
)
texts_strategy = st.lists(st.lists(words, max_size=9).map(" ".join), max_size=40)


@settings(max_examples=200, deadline=None)
@given(texts_strategy, st.sampled_from([0.5, 0.75, 0.8, 1.0]), st.randoms())
def test_join_equals_brute_force(texts: list[str], threshold: float, rng: random.Random) -> None:
    blocks = [rng.choice("xy") for _ in texts]
    found = near_duplicates(texts, blocks=blocks, threshold=threshold)
    assert set(found) == brute_force(texts, blocks, threshold)
    for i, j in found.items():
        assert j < i and j not in found and blocks[i] == blocks[j]


def test_near_duplicates_in_longer_texts() -> None:
    rng = random.Random(3)
    base = [" ".join(rng.choices([f"w{i}x" for i in range(60)], k=15)) for _ in range(60)]
    texts = base + [" ".join(t.split()[:-1] + ["new"]) for t in base]
    blocks = [""] * len(texts)
    assert set(near_duplicates(texts, blocks=blocks)) == brute_force(texts, blocks, 0.8)


def test_masking_and_normalising() -> None:
    assert masked("CALL 0900-123 now!!") == masked("call 0911 4 NOW") == "call 0 0 now"
    assert masked(":-)") == ":-)"
    assert normalised("  Caf\u00e9\tA ") == normalised("cafe\u0301 a")
    assert normalised("(a)") != normalised("a")  # brackets can carry meaning


def test_join_is_fast() -> None:
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(3000)]
    texts = [" ".join(rng.choices(vocabulary, k=15)) for _ in range(8000)]
    start = time.thread_time()
    near_duplicates(texts, blocks=[""] * len(texts))
    assert time.thread_time() - start < 3


def test_test_split_keeps_and_pool_loses() -> None:
    items = [
        item("free prize 12 call now", split="train"),
        item("hello", split="train"),
        item("HELLO ", split="test"),
        item("free prize 99 call now!", split="test"),
        item("hello", split="validation"),
    ]
    removed = deduplicate(items, near="remove")
    assert [i.split for i in removed.items] == ["test", "test"]
    assert removed.num_exact_duplicates == 2
    assert removed.num_near_duplicates == 1
    assert (removed.num_removed, removed.num_overlap_removed) == (3, 3)
    counted = deduplicate(items, near="count")
    assert counted.num_near_duplicates == 1 and counted.num_removed == 2
    assert [i.input for i in counted.items] == [items[0].input, "HELLO ", items[3].input]
    assert deduplicate(items, near="skip").num_near_duplicates is None


def test_nothing_alike_is_left_after_removal() -> None:
    rng = random.Random(1)
    items = [
        item(" ".join(rng.choices(["one", "two", "three", "four", "five"], k=4)), split=split, n=i)
        for i, split in enumerate(rng.choices(["train", "validation", "test"], k=200))
    ]
    left = deduplicate(items, near="remove").items
    texts = [i.input for i in left]
    assert not brute_force(texts, [""] * len(texts), 0.8)


def test_conflicting_labels_are_counted_once_a_content() -> None:
    items = [item("x", label="a"), item("X", label="b", n=1), item("x", label="b", n=2), item("y")]
    assert num_conflicts(items) == 1
    assert [i.label for i in deduplicate(items, near="count").items] == ["a", "a"]


def test_further_targets_teach_in_train_and_are_references_in_test() -> None:
    items = [
        item("describe it", target="one"),
        item("describe it", target="two"),
        item("describe it", target="two", n=1),
        item("say it", split="test", target="three"),
        item("Say it", split="test", target="four"),
    ]
    result = deduplicate(items, near="count")
    assert [(i.split, i.target, i.references) for i in result.items] == [
        ("train", "one", ()),
        ("train", "two", ()),
        ("test", "three", ("three", "four")),
    ]
    assert result.num_conflicting_labels == 0


def test_near_duplicate_content_goes_with_all_its_targets() -> None:
    items = [
        item("order number 5 please", target="one"),
        item("order number 5 please", target="two"),
        item("Order number 7, please!", split="test", target="three"),
    ]
    assert [i.split for i in deduplicate(items, near="remove").items] == ["test"]


def test_overlaps_point_from_pool_to_test() -> None:
    items = [item("x"), item("y"), item("X", split="test"), item("x", split="validation")]
    assert sorted(overlaps(items)) == [(0, 2), (3, 2)]
