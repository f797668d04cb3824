"""Equal names of many records as one object: 77 labels in each were most of what a record held."""

from __future__ import annotations

import functools
from typing import Any

NAME_CHARACTERS = 64  # of a name; what is longer is text, and comes once
NUM_NAMES = 512  # that are known at a time


def shared(value: Any) -> Any:
    """The value; of an equal name that came before, that very object."""
    is_name = type(value) is str and len(value) <= NAME_CHARACTERS
    return _first_equal(value) if is_name else value


@functools.lru_cache(maxsize=NUM_NAMES)
def _first_equal(name: str) -> str:
    """Not sys.intern: its table grows with all names ever seen, those of items too."""
    return name
