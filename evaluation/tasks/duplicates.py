"""Exact and near-duplicates, conflicting answers, and a pool disjoint from the test items (pure).

Exact: equal context, input and choices after Unicode (NFKC), case and white space are normalised;
punctuation stays, as brackets can carry meaning. Near: equal when case, punctuation and digits are
masked too, or a Jaccard similarity of the token sets of at least `NEAR_THRESHOLD`, under an equal
context. Near-duplicates are found in reading order against the rows kept so far, so that after
removal no two kept rows are near-duplicates.
"""

from __future__ import annotations

import dataclasses
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from conf.hashing import sha256_of
from conf.records import Item

NEAR_THRESHOLD = 0.8
# Test first: where two splits share a content, the pool loses it and the test keeps it.
SPLIT_ORDER = {"test": 0, "validation": 1, "train": 2}

_DIGITS = re.compile(r"\d+")
_NOT_WORDS = re.compile(r"[\W_]+")


def normalised(text: str) -> str:
    """NFKC, case-folded, runs of white space as one space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def masked(text: str) -> str:
    """`normalised`, with every number as 0 and punctuation as a space; a text of nothing but
    punctuation stays as it is.
    """
    plain = normalised(text)
    return _NOT_WORDS.sub(" ", _DIGITS.sub("0", plain)).strip() or plain


def content_sha256(*, text: str, context: str | None, choices: Sequence[str]) -> str:
    """The hash of what a model sees of an item, normalised: equal content, equal hash."""
    return sha256_of(
        [normalised(context or ""), normalised(text), [normalised(c) for c in choices]]
    )


def near_duplicates(
    texts: Sequence[str], *, blocks: Sequence[str], threshold: float = NEAR_THRESHOLD
) -> dict[int, int]:
    """For each near-duplicate its earlier, kept original: index -> index.

    A text is compared only with kept texts of the same block. Jaccard by prefix filter: two sets
    at least `threshold` alike share a token among the rarest n - ceil(threshold * n) + 1 of each
    (Chaudhuri et al. 2006; Bayardo et al. 2007), so that only such pairs are compared in full.
    """
    keys = [masked(text) for text in texts]
    sets = [frozenset(key.split()) for key in keys]
    counts = Counter(token for tokens in sets for token in tokens)
    first_with_key: dict[tuple[str, str], int] = {}
    kept_with_token: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    original_of: dict[int, int] = {}
    for i, tokens in enumerate(sets):
        block = blocks[i]
        found = first_with_key.setdefault((block, keys[i]), i)
        if found != i:
            original_of[i] = original_of.get(found, found)
            continue
        prefix = _rarest(tokens, counts, threshold)
        lists = [kept_with_token[block, token] for token in prefix]
        original = _first_alike(tokens, lists, sets, threshold)
        if original is not None:
            original_of[i] = original
            continue
        for kept in lists:
            kept.append(i)
    return original_of


def _rarest(tokens: frozenset[str], counts: Counter[str], threshold: float) -> list[str]:
    size = len(tokens) - math.ceil(threshold * len(tokens) - 1e-9) + 1
    return sorted(tokens, key=lambda token: (counts[token], token))[:size]


def _first_alike(
    tokens: frozenset[str],
    lists: Sequence[Sequence[int]],
    sets: Sequence[frozenset[str]],
    threshold: float,
) -> int | None:
    """The earliest candidate that is alike enough; sizes are compared first, as that is cheap."""
    low, high = threshold * len(tokens) - 1e-9, len(tokens) / threshold + 1e-9
    best: int | None = None
    for j in {j for candidates in lists for j in candidates}:
        if (best is not None and j > best) or not low <= len(sets[j]) <= high:
            continue
        shared = len(tokens & sets[j])
        if shared >= threshold * (len(tokens) + len(sets[j]) - shared) - 1e-9:
            best = j
    return best


@dataclass(kw_only=True, slots=True, frozen=True)
class Deduplicated:
    """Items without duplicates, in their old order, and the counts that `TaskFacts` shows."""

    items: tuple[Item, ...]
    num_exact_duplicates: int
    num_near_duplicates: int | None
    num_conflicting_labels: int
    num_removed: int
    num_overlap_removed: int


def deduplicate(items: Sequence[Item], *, near: str) -> Deduplicated:
    """Drop exact duplicates always, near-duplicates with near="remove"; test-first.

    Free answers: further targets for one content are references of a test or validation item, and
    stay as rows of their own in train, where they teach. near: count | remove | skip (None).
    """
    order = sorted(range(len(items)), key=lambda i: (SPLIT_ORDER[items[i].split], i))
    first: dict[str, int] = {}
    seen: set[tuple[str, str]] = set()
    exact: dict[int, int] = {}
    answers: defaultdict[int, list[str]] = defaultdict(list)
    for i in order:
        item, kept = items[i], first.setdefault(items[i].sha256, i)
        answer = (item.sha256, normalised(item.answer_key))
        same_split = item.split == items[kept].split
        is_further_row = item.target is not None and item.split == "train" and same_split
        if kept != i and not (is_further_row and answer not in seen):
            exact[i] = kept
        if item.target is not None and item.split != "train" and same_split and answer not in seen:
            answers[kept] += [item.target, *item.references]
        seen.add(answer)
    close = {} if near == "skip" else _close(list(first.values()), items)
    dropped = dict(exact)
    if near == "remove":  # with a content all its rows go
        dropped |= {i: close[k] for i, x in enumerate(items) if (k := first[x.sha256]) in close}
    return Deduplicated(
        items=tuple(
            _with_references(item, answers[i]) for i, item in enumerate(items) if i not in dropped
        ),
        num_exact_duplicates=len(exact),
        num_near_duplicates=None if near == "skip" else len(close),
        num_conflicting_labels=num_conflicts(items),
        num_removed=len(dropped),
        num_overlap_removed=sum(items[i].split != items[j].split for i, j in dropped.items()),
    )


def _with_references(item: Item, answers: Sequence[str]) -> Item:
    """All accepted answers, the target first; an item with one answer needs none."""
    references = tuple(dict.fromkeys((*answers, *item.references)))
    return item if len(answers) < 2 else dataclasses.replace(item, references=references)


def _close(order: Sequence[int], items: Sequence[Item]) -> dict[int, int]:
    """Near-duplicates among `order`, as indices into `items`."""
    found = near_duplicates(
        [" ".join((items[i].input, *items[i].choices)) for i in order],
        blocks=[normalised(items[i].context or "") for i in order],
    )
    return {order[i]: order[j] for i, j in found.items()}


def num_conflicts(items: Sequence[Item]) -> int:
    """Distinct contents that stand with more than one label; free answers may well differ."""
    answers: defaultdict[str, set[str]] = defaultdict(set)
    for item in items:
        if item.label is not None:
            answers[item.sha256].add(normalised(item.label))
    return sum(len(found) > 1 for found in answers.values())


def overlaps(items: Sequence[Item]) -> list[tuple[int, int]]:
    """Exact duplicates across splits, as (index that loses, index that keeps), test-first."""
    order = sorted(range(len(items)), key=lambda i: (SPLIT_ORDER[items[i].split], i))
    first: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    for i in order:
        j = first.setdefault(items[i].sha256, i)
        if items[i].split != items[j].split:
            pairs.append((i, j))
    return sorted(pairs)
