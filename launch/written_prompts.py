"""Which prompts a run has written lately, in a fixed number of bytes."""

from __future__ import annotations

from array import array

# 0.5 MB. A run asks the same prompt again in a later job or attempt: the last so many are known.
NUM_PLACES = 1 << 16


class WrittenPrompts:
    """Remembers prompts by hash, each in the one place that its hash gives it.

    A prompt that another one has taken the place of is written once more, and readers know a prompt
    by its hash: memory stays the same for any number of them. Two prompts are taken for one where
    64 bits of their hashes agree.
    """

    def __init__(self) -> None:
        self._places = array("Q", bytes(8 * NUM_PLACES))

    def add(self, arm: str, prompt_sha256: str) -> bool:
        """Remember a prompt of an arm; whether it was not known."""
        mark = hash((arm, prompt_sha256)) % (1 << 64) or 1
        place = mark % NUM_PLACES
        is_new = self._places[place] != mark
        self._places[place] = mark
        return is_new
