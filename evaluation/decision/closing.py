"""Which comparisons a run may close after a wave of its test items, and which arms leave (pure).

The intervals are confidence sequences that hold for all pairs and all looks at once: each pair has
its share of the error (Bonferroni), so that what has been said of a pair whose arms have left stays
said. A comparison is closed

- `different`: its interval excludes 0;
- `equal`: its interval lies within the equivalence margin;
- `dearer`: the arm that is behind costs more over the horizon, and hardly ever gets ahead with the
  items that are left, so that it would not be taken either way;
- `hopeless`: the items that are left hardly ever decide it;
- `irrelevant`: both arms hardly ever get ahead of others, so that neither will lead.

The last three claim nothing of the arms: such a pair is reported as it stands, mostly undecided.
"Hardly ever" is in under 5% of the futures drawn from a Bayesian bootstrap of what was seen (Rubin
1981), with one item more in favour of either side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from conf.run_groups import DecisionConfig
from evaluation.decision.gap import Total
from evaluation.decision.rules import LIMITS, is_cheaper
from evaluation.statistics.sequential import (
    Stakes,
    confidence_sequence,
    distinct,
    log_capital,
    log_e_value,
    stakes,
)

Flags = npt.NDArray[np.bool_]

NUM_FUTURES = 200
HARDLY_EVER = 0.05
MAX_LOG = 700.0  # an e-value beyond 1e304 is written as that


@dataclass(kw_only=True, slots=True, frozen=True)
class Comparison:
    """Arms a and b after some items: difference = a - b, with its confidence sequence.

    state: open, or why it is closed, as this module says. n: items that both answered. e_value:
    against a difference of 0, of this pair alone. trailing: the arm behind, where it hardly ever
    gets ahead.
    """

    a: str
    b: str
    state: str
    difference: float | None
    low: float
    high: float
    e_value: float
    n: int
    trailing: str | None = None

    @property
    def is_closed(self) -> bool:
        """Whether no further item is worth its price."""
        return self.state != "open"

    @property
    def behind(self) -> str | None:
        """The arm with the lower mean; None of equal ones."""
        return None if not self.difference else self.b if self.difference > 0 else self.a


def pair_alpha(num_arms: int, *, confidence: float) -> float:
    """The share of the error that each pair of so many arms has."""
    return (1 - confidence) / max(1, math.comb(num_arms, 2))


def pair_stakes(
    a: Mapping[str, float],
    b: Mapping[str, float],
    *,
    items: Sequence[str],
    sources: Mapping[str, str] | None,
    largest: int | None,
) -> Stakes | None:
    """The differences on the items that both answered, to bet on; None outside -1 .. 1.

    sources: item -> its source, where items share sources. largest: items of the largest one.
    """
    common = [i for i in items if i in a and i in b]
    differences = [a[i] - b[i] for i in common]
    if any(abs(d) > 1 for d in differences):
        return None
    of = None if sources is None else [sources[i] for i in common]
    return stakes(differences, low=-1.0, high=1.0, sources=of, largest=largest)


def compared(name: tuple[str, str], bets_on: Stakes, *, alpha: float, margin: float) -> Comparison:
    """One pair by its interval alone."""
    low, high = confidence_sequence(bets_on, alpha=alpha)
    is_known = bets_on.num_items > 0
    return Comparison(
        a=name[0],
        b=name[1],
        state=_decided(low, high, margin=margin),
        difference=bets_on.mean if is_known else None,
        low=low,
        high=high,
        e_value=math.exp(min(MAX_LOG, log_e_value(bets_on, 0.0))),
        n=bets_on.num_items,
    )


def _decided(low: float, high: float, *, margin: float) -> str:
    if -margin <= low and high <= margin:
        return "equal"
    return "different" if low > 0 or high < 0 else "open"


@dataclass(kw_only=True, slots=True, frozen=True)
class Futures:
    """How often the items that are left change a comparison. shares of the futures drawn."""

    decided: float
    turned: float  # the arm that is behind gets ahead, or level


def futures(
    bets_on: Stakes, *, num_left: int, alpha: float, margin: float, seed: int = 0
) -> Futures:
    """Draw what the items that are left may bring.

    Args:
        bets_on: the differences so far.
        num_left: sources that are left.
        alpha: the pair's.
        margin: of equivalence.
        seed: of the draws, so that a decision is a function of the scores.
    """
    known, seen = distinct(bets_on)
    whole = replace(
        known, sums=np.append(known.sums, [0.0, 1.0]), sizes=np.append(known.sizes, [1.0, 1.0])
    )
    rng = np.random.default_rng(seed)
    chances = rng.dirichlet(np.append(seen, [1.0, 1.0]), size=NUM_FUTURES)
    drawn = rng.multinomial(num_left, chances).astype(np.float64)
    counts = np.append(seen, [0.0, 0.0]) + drawn
    bar = math.log(2 / alpha)

    def refused(mean: float, *, is_above: bool) -> Flags:
        return np.asarray(log_capital(whole, mean, is_above=is_above, counts=counts) >= bar)

    different = refused(0.0, is_above=True) | refused(0.0, is_above=False)
    equal = refused(-margin, is_above=True) & refused(margin, is_above=False)
    now = bets_on.sums.sum() - bets_on.sizes.sum() / 2
    then = counts @ (whole.sums - whole.sizes / 2)
    return Futures(
        decided=float((different | equal).mean()), turned=float((then * now <= 0).mean())
    )


def judge(
    scores: Mapping[str, Mapping[str, float]],
    *,
    items: Sequence[str],
    num_left: int,
    num_arms: int,
    decision: DecisionConfig,
    costs: Mapping[str, Total],
    sources: Mapping[str, str] | None = None,
    largest: int | None = None,
    frozen: Sequence[Comparison] = (),
) -> tuple[Comparison, ...]:
    """Every pair of arms after a wave.

    Args:
        scores: arm -> item -> score, of the arms that can still be compared.
        items: the items of all waves so far, in the run's order.
        num_left: items, or sources where items share them, of later waves.
        num_arms: all arms of the plan: each of their pairs has its share of the error.
        decision: confidence, margin and limits.
        costs: arm -> total cost over the horizon.
        sources: item -> its source, where items share sources.
        largest: items of the largest source.
        frozen: what was found of arms that have left since; it stays.
    """
    alpha = pair_alpha(num_arms, confidence=decision.confidence)
    found = [_at_rest(pair) for pair in frozen]
    known = {(pair.a, pair.b) for pair in frozen}
    for a, b in itertools.combinations(scores, 2):
        if (a, b) in known:
            continue
        bets_on = pair_stakes(scores[a], scores[b], items=items, sources=sources, largest=largest)
        if bets_on is None or not bets_on.sums.size:
            continue  # no such test of scores outside 0 .. 1: the pair stays open
        pair = compared((a, b), bets_on, alpha=alpha, margin=decision.equivalence_margin)
        found.append(_foreseen(pair, bets_on, num_left, alpha=alpha, decision=decision))
    if any(getattr(decision, limit) is not None for limit in LIMITS):
        return tuple(found)  # a limit may take the arms away that lead
    behind = {pair.trailing for pair in found}
    return tuple(_beside_the_point(pair, behind, costs) for pair in found)


def _at_rest(pair: Comparison) -> Comparison:
    """A pair that gets no further item: the arm behind stays behind."""
    return pair if pair.state == "equal" else replace(pair, trailing=pair.behind)


def _foreseen(
    pair: Comparison, bets_on: Stakes, num_left: int, *, alpha: float, decision: DecisionConfig
) -> Comparison:
    """A pair with what the items that are left hardly ever change."""
    if pair.is_closed:
        return _at_rest(pair)
    ahead = futures(bets_on, num_left=num_left, alpha=alpha, margin=decision.equivalence_margin)
    return replace(
        pair,
        state="hopeless" if ahead.decided < HARDLY_EVER else "open",
        trailing=pair.behind if ahead.turned < HARDLY_EVER else None,
    )


def _beside_the_point(
    pair: Comparison, behind: Set[str | None], costs: Mapping[str, Total]
) -> Comparison:
    """Close a pair that cannot change which arm is recommended."""
    if pair.state != "open":
        return pair
    if {pair.a, pair.b} <= behind:
        return replace(pair, state="irrelevant")
    ahead = pair.b if pair.trailing == pair.a else pair.a
    if pair.trailing is not None and is_cheaper(costs[ahead], costs[pair.trailing]):
        return replace(pair, state="dearer")
    return pair


def leaving(pairs: Sequence[Comparison], arms: Sequence[str]) -> tuple[str, ...]:
    """The arms all of whose comparisons are closed; one that has none stays."""
    return tuple(
        arm
        for arm in arms
        if (own := [p for p in pairs if arm in (p.a, p.b)]) and all(p.is_closed for p in own)
    )
