"""Frozen splits and limits."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from conf.groups import ColumnsConfig, LimitConfig, TaskConfig
from conf.records import Item
from evaluation.tasks import Task, load_task
from evaluation.tasks.duplicates import content_sha256
from evaluation.tasks.splits import (
    balanced_shares,
    is_validation,
    limited,
    sampled,
    split_of,
    spread,
    uniform,
)

keys = st.lists(st.text(max_size=8), max_size=30)


def item(i: int, label: str) -> Item:
    text = f"text {i}"
    return Item(
        id=str(i),
        split="train",
        input=text,
        sha256=content_sha256(text=text, context=None, choices=()),
        label=label,
    )


ITEMS = [item(i, "abc"[i % 3] if i % 10 else "rare") for i in range(200)]


def test_shares_are_60_20_20() -> None:
    counts = Counter(split_of(f"row {i}", seed=0) for i in range(20_000))
    for split, share in (("train", 0.6), ("validation", 0.2), ("test", 0.2)):
        assert abs(counts[split] / 20_000 - share) < 0.012  # four standard deviations
    held_out = sum(is_validation(f"row {i}", seed=0) for i in range(20_000))
    assert abs(held_out / 20_000 - 0.2) < 0.012


def test_hash_is_pinned() -> None:
    """A change here moves every user's rows between splits: it must be on purpose."""
    rows = [split_of(f"row {i}", seed=0) for i in range(8)]
    assert rows == ["train", "train", "train", "train", "validation", "train", "train", "test"]
    assert 0.0 <= uniform("row", purpose="x", seed=0) < 1.0


def test_seed_and_purpose_matter() -> None:
    rows = [f"row {i}" for i in range(100)]
    assert [split_of(r, seed=0) for r in rows] != [split_of(r, seed=1) for r in rows]
    # Carving validation must not reuse the split's hash: it would take whole regions of it.
    train = [r for r in (f"row {i}" for i in range(5000)) if split_of(r, seed=0) == "train"]
    assert 0.15 < sum(is_validation(r, seed=0) for r in train) / len(train) < 0.25


def _load(tmp_path, rows: list[str], **keys) -> Task:
    path = tmp_path / "data.csv"
    path.write_text("\n".join(["text,label,who", *rows]) + "\n", encoding="utf-8")
    return load_task(
        TaskConfig(name="t", path=str(path), columns=ColumnsConfig(input="text"), **keys)
    )


def _splits(task: Task) -> dict[str, str]:
    return {i.input: split for split, items in task.items.items() for i in items}


def test_adding_rows_moves_none(tmp_path) -> None:
    rows = [f"message {i} {'x' * (i % 7)},{'ab'[i % 2]},p{i}" for i in range(120)]
    before = _splits(_load(tmp_path, rows))
    more = [f"later {i},{'ab'[i % 2]},q{i}" for i in range(60)]
    after = _splits(_load(tmp_path, more + rows[::-1]))
    assert len(before) == 120 and len(after) == 180
    assert all(after[text] == split for text, split in before.items())


def test_identical_content_is_in_one_split(tmp_path) -> None:
    rows = [f"message {i % 40},{'ab'[i % 2]},p" for i in range(120)]
    shouted = [row.replace("message", " MESSAGE ") for row in rows]
    task = _load(tmp_path, rows + shouted)
    texts = [" ".join(i.input.lower().split()) for items in task.items.values() for i in items]
    assert sorted(texts) == sorted({f"message {i}" for i in range(40)})
    assert task.facts.num_exact_duplicates == 200


def test_group_stays_together(tmp_path) -> None:
    rows = [f"message {i},{'ab'[i % 2]},person {i // 6}" for i in range(180)]
    task = _load(tmp_path, rows, group="who")
    where: dict[str | None, set[str]] = {}
    for split, items in task.items.items():
        for i in items:
            where.setdefault(i.group, set()).add(split)
    assert len(where) == 30 and all(len(splits) == 1 for splits in where.values())
    assert len(set().union(*where.values())) == 3


def test_stratified_in_expectation(tmp_path) -> None:
    rows = [f"message {i},{'a' if i % 4 else 'b'},p" for i in range(4000)]
    counts = _load(tmp_path, rows).facts.label_counts
    for split in ("train", "validation", "test"):
        share = counts[split]["b"] / sum(counts[split].values())
        assert abs(share - 0.25) < 0.06


@given(st.dictionaries(st.text(max_size=3), st.integers(0, 30), max_size=6), st.integers(0, 100))
def test_balanced_shares(sizes: dict[str, int], total: int) -> None:
    shares = balanced_shares(sizes, total=total)
    assert sum(shares.values()) == min(total, sum(sizes.values()))
    assert all(0 <= shares[k] <= sizes[k] for k in sizes)
    unfilled = [shares[k] for k in sizes if shares[k] < sizes[k]]
    # No label may have two more than one that could still take some.
    assert not unfilled or max(shares.values()) - min(unfilled) <= 1


def test_limits_are_nested_and_balanced() -> None:
    small = limited(ITEMS, limit=40, by_label=True, is_balanced=False, seed=0)
    large = limited(ITEMS, limit=90, by_label=True, is_balanced=False, seed=0)
    assert Counter(i.label for i in small) == {"a": 10, "b": 10, "c": 10, "rare": 10}
    assert Counter(i.label for i in large)["rare"] == 20  # all there are
    assert {i.id for i in small} < {i.id for i in large} and len(large) == 90
    order = [int(i.id) for i in large]
    assert order == sorted(order)


def test_strict_balance() -> None:
    strict = limited(ITEMS, limit=150, by_label=True, is_balanced=True, seed=0)
    assert set(Counter(i.label for i in strict).values()) == {20}
    no_limit = limited(ITEMS, limit=None, by_label=True, is_balanced=True, seed=0)
    assert [i.id for i in no_limit] == [i.id for i in strict]
    odd = limited(ITEMS, limit=42, by_label=True, is_balanced=True, seed=0)
    assert set(Counter(i.label for i in odd).values()) == {10}


def test_limit_without_labels_and_its_seed() -> None:
    one = limited(ITEMS, limit=50, by_label=False, is_balanced=False, seed=0)
    two = limited(ITEMS, limit=50, by_label=False, is_balanced=False, seed=1)
    assert len(one) == len(two) == 50 and one != two
    assert limited(ITEMS, limit=None, by_label=False, is_balanced=False, seed=0) == tuple(ITEMS)
    assert limited([], limit=5, by_label=True, is_balanced=True, seed=0) == ()


def test_limit_of_a_task(tmp_path) -> None:
    rows = [f"message {i},{'a' if i % 9 else 'b'},p" for i in range(600)]
    task = _load(tmp_path, rows, limit=LimitConfig(train=30, test=10))
    assert task.facts.label_counts["train"] == {"a": 15, "b": 15}
    assert task.facts.label_counts["test"] == {"a": 5, "b": 5}
    assert sum(task.facts.label_counts["validation"].values()) > 60
    assert "in the source" in task.facts.note


def test_a_sample_hangs_on_no_order_of_rows_and_a_spread_does() -> None:
    rows = [item(i, "ab"[i % 2]) for i in range(40)]
    assert {i.label for i in spread(rows, 20)} == {"a"}  # for latency, where labels do not matter
    found = sampled(rows, 20)
    assert len(found) == 20 and min(Counter(i.label for i in found).values()) >= 5
    assert {i.id for i in sampled(rows[::-1], 20)} == {i.id for i in found}
    assert {i.id for i in sampled(rows, 7)} <= {i.id for i in found}
    assert [int(i.id) for i in found] == sorted(int(i.id) for i in found)
    assert sampled(rows[:3], 9) == tuple(rows[:3])
