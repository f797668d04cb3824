"""Cutting a prompt that is longer than the context: the middle of the item's longest text goes.

What all items share (instruction, shots) and the opening of the answer stay whole; of the item, its
beginning and its end stay, where most texts say what they are about (LongBench cuts prompts in the
middle too: Bai et al. 2023, arXiv 2308.14508). The shortened text is rendered and tokenised like
any other, so a mark stands where something is missing and the stored prompt is what was asked.
"""

from __future__ import annotations

from collections.abc import Callable

from conf.records import Item

MARK = " ... "
KEPT_SHARE = 0.1  # a text of which less would stay is not answered


def shortened(text: str, item: Item, *, fits: Callable[[str], bool]) -> str | None:
    """A prompt with as much of the item's longest text as fits.

    text: rendered prompt. fits: whether a text does. None where the prompt does not hold the
    item's text as it is, or where under a tenth of it would stay.
    """
    part = max((t.strip() for t in (item.input, item.context or "")), key=len)
    start = text.rfind(part)
    if not part or start < 0:
        return None
    before, after = text[:start], text[start + len(part) :]

    def cut(kept: int) -> str:
        head = (kept + 1) // 2
        tail = part[len(part) - (kept - head) :].lstrip()
        return before + part[:head].rstrip() + MARK + tail + after

    low, high = max(1, int(KEPT_SHARE * len(part))), len(part)
    if not fits(cut(low)):
        return None
    while high - low > 1:  # low fits
        middle = (low + high) // 2
        low, high = (middle, high) if fits(cut(middle)) else (low, middle)
    return cut(low)
