"""Finds the user's text in what would leave the machine: items, prompts, outputs.

Letters and digits alone count, so that quotes, line ends and JSON escapes hide nothing. Each text
is known by windows of WINDOW of them, one every STRIDE; a line that holds one anywhere is the
user's. So any WINDOW + STRIDE - 1 letters in a row are found, and a text of WINDOW or more as a
whole. A shorter text is a word or two, which any line may hold: it is not looked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from launch.jsonl import read_lines

WINDOW = 12
STRIDE = 6
LEFT_OUT = "[left out: text of the run]"
_OTHER = re.compile(r"[\W_]+")
_ESCAPE = re.compile(r"\\u[0-9a-fA-F]{4}")
# Fields that hold what the user's rows say, what was asked, and what was answered.
ITEM_FIELDS = ("input", "context", "target", "references", "choices", "rationale", "text")
SAMPLE_FIELDS = ("completion", "answer", "target")


def _letters(text: str) -> str:
    plain = _ESCAPE.sub(lambda m: chr(int(m.group()[2:], 16)), text).replace("\\n", " ")
    return _OTHER.sub("", plain.replace("\\t", " ")).casefold()


class TextFilter:
    """Knows texts, and tells whether a line holds a part of one."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._windows: set[int] = set()
        for text in texts:
            letters = _letters(text)
            starts = range(0, len(letters) - WINDOW + 1, STRIDE)
            self._windows.update(hash(letters[i : i + WINDOW]) for i in starts)

    def holds_text(self, line: str) -> bool:
        """Whether a line holds a part of a text."""
        letters = _letters(line)
        ends = range(len(letters) - WINDOW + 1)
        return any(hash(letters[i : i + WINDOW]) in self._windows for i in ends)

    def clean(self, value: Any) -> Any:
        """Plain data with each text of the user's replaced, also where a key is one."""
        if isinstance(value, dict):
            return {self.clean(k): self.clean(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.clean(v) for v in value]
        return LEFT_OUT if isinstance(value, str) and self.holds_text(value) else value


def texts_of(run: Path) -> Iterator[str]:
    """All texts of a run: items, prompts, completions."""
    for line in read_lines(run / "items.jsonl"):
        yield from _fields(line, ITEM_FIELDS)
    for line in read_lines(run / "prompts.jsonl"):
        yield from _fields(line, ("text", "prompt"))
    for path in run.glob("arms/*/samples.jsonl"):
        for line in read_lines(path):
            yield from _fields(line, SAMPLE_FIELDS)


def _fields(line: dict[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        value = line.get(name)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                yield text
