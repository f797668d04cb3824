"""Texts that no training row may hold: equal to one of them, or with one of them inside (pure)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from conf.records import Item
from evaluation.tasks.duplicates import masked

MIN_WORDS = 4  # a shorter text is looked for as a whole text only: "ok" stands in many others
KEY_WORDS = 8


class HeldOut:
    """Finds held-out texts in others, with case, punctuation and digits masked.

    A user's own prompt may quote a test item below an instruction, so equality is not enough. Each
    held-out text is filed under its first words; a text is searched by looking up its windows.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        """items: of the splits that judge."""
        self._whole: set[str] = set()
        self._by_start: defaultdict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
        for item in items:
            words = tuple(masked(f"{item.context or ''} {item.input}").split())
            self._whole.add(" ".join(words))
            inner = tuple(masked(item.input).split())
            if len(inner) >= MIN_WORDS:
                self._by_start[inner[:KEY_WORDS]].append(inner)
        self._sizes = sorted({len(key) for key in self._by_start})

    def has(self, item: Item) -> bool:
        """Whether an item's text is, or holds, a text that is held out."""
        words = tuple(masked(f"{item.context or ''} {item.input}").split())
        if " ".join(words) in self._whole:
            return True
        for start in range(len(words)):
            for size in self._sizes:
                for text in self._by_start.get(words[start : start + size], ()):
                    if words[start : start + len(text)] == text:
                        return True
        return False
