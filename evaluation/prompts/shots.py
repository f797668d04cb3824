"""Retrieved shots: for each item the nearest labelled ones, by the cosine of their TF-IDF.

Finding them takes well under a millisecond for a pool of thousands, and is not timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from conf.records import Item


class NearestShots:
    """The items of a pool that are most like a given one; fitted when first asked."""

    def __init__(self, pool: Sequence[Item], *, num_shots: int) -> None:
        """Order the pool by content, so that ties do not depend on the order of a file."""
        self._pool = sorted(pool, key=lambda item: (item.sha256, item.id))
        self._num_shots = num_shots
        self._vectorizer: Any = None
        self._rows: Any = None

    def __call__(self, item: Item) -> tuple[Item, ...]:
        """The shots of an item, the nearest last; never the item itself."""
        similarities = self._similarities(item)
        places = sorted(range(len(self._pool)), key=lambda k: (-similarities[k], k))
        others = (k for k in places if self._pool[k].sha256 != item.sha256)
        nearest = [self._pool[k] for k, _ in zip(others, range(self._num_shots), strict=False)]
        return tuple(reversed(nearest))

    def _similarities(self, item: Item) -> list[float]:
        from sklearn.feature_extraction.text import TfidfVectorizer

        if self._vectorizer is None:
            # One-letter words too, so that a short text is not left without any feature.
            self._vectorizer = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\b\w+\b")
            self._rows = self._vectorizer.fit_transform([_text(shot) for shot in self._pool])
        query = self._vectorizer.transform([_text(item)])
        return [float(value) for value in (self._rows @ query.T).toarray()[:, 0]]


def _text(item: Item) -> str:
    return f"{item.context}\n{item.input}" if item.context else item.input
