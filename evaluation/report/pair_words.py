"""What a table of pairs says of its intervals and tests, by how the items were come by (pure)."""

from __future__ import annotations

from collections.abc import Sequence

from conf.results import Pair
from evaluation import wording

FIXED = (
    " Intervals come from a paired bootstrap over items, which are taken for independent. p: exact"
    " McNemar where every score is 0 or 1, else the bootstrap's; Holm's correction runs over all"
    " pairs."
)
CLUSTERED = (
    " Items share sources ({count} in all), and only sources are independent: intervals and p are"
    " those of Student's t over sources; Holm's correction runs over all pairs."
)
LOOKED = (
    " The run looked at its scores wave by wave and closed comparisons early (decision.stop_early)."
    " So the intervals are confidence sequences: they hold at every look, for all pairs together,"
    " and decide alone. e: by how much the items speak against a difference of 0; there is no p."
    " Arms that left early have fewer items. Means by label or slice have intervals of a fixed"
    " number of items, which are too narrow after looks."
)


def pairs_note(pairs: Sequence[Pair]) -> str:
    """The part of the note on intervals and tests."""
    methods = {pair.method for pair in pairs}
    if "confidence_sequence" in methods:
        return LOOKED
    counts = [pair.num_sources for pair in pairs if pair.num_sources is not None]
    return CLUSTERED.format(count=max(counts)) if counts else FIXED


def test_cells(pair: Pair) -> tuple[str, str]:
    """The cells `p` and `p (Holm)`; of a confidence sequence its e-value, and nothing."""
    if pair.method == "confidence_sequence":
        value = wording.UNKNOWN if pair.e_value is None else f"e = {pair.e_value:.3g}"
        return value, wording.UNKNOWN
    return p_words(pair.p_value), p_words(pair.p_adjusted)


def p_words(value: float | None) -> str:
    """A p-value to three places."""
    if value is None:
        return wording.UNKNOWN
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
