"""Intervals of a metric and of a paired difference, as a run's items and its looks ask for (pure).

Three ways: for a number of items fixed beforehand; the same where items share sources; and, of a
run that looked at its scores on the way (decision.stop_early), confidence sequences only, since
every interval and test of the other two is wrong after such looks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from conf.records import Measured
from conf.results import Pair, Variance
from evaluation.decision.closing import compared, pair_alpha, pair_stakes
from evaluation.records.run_records import RunRecords
from evaluation.statistics.clusters import clustered_difference, clustered_interval, sources_of
from evaluation.statistics.sequential import confidence_sequence, stakes
from evaluation.statistics.variance import Replicate, pooled_interval


@dataclass(kw_only=True, slots=True, frozen=True)
class ItemRule:
    """How the test items of a run were come by.

    sources: item -> its source, where items share sources. num_arms: of the plan; each of their
    pairs has its share of the error. is_sequential: whether the run looked on the way.
    """

    confidence: float
    sources: Mapping[str, str] | None = None
    num_arms: int = 2
    is_sequential: bool = False

    @classmethod
    def of(cls, records: RunRecords, *, confidence: float) -> ItemRule:
        """The rule of a run; what it was made under counts, not what it is decided under now."""
        return cls(
            confidence=confidence,
            sources=sources_of(i for i in records.items.values() if i.split == "test"),
            num_arms=len(records.arm_specs),
            is_sequential=records.decision.stop_early,
        )

    @property
    def largest(self) -> int | None:
        """Items of the largest source."""
        if self.sources is None:
            return None
        return max(Counter(self.sources.values()).values())

    def mean(self, scores: Mapping[str, float]) -> Measured:
        """The mean over items; an interval for shares where the scores are shares."""
        items = sorted(scores)
        values = [scores[i] for i in items]
        of = None if self.sources is None else [self.sources[i] for i in items]
        is_share = all(0 <= v <= 1 for v in values)
        if not self.is_sequential or not is_share or not values:
            return clustered_interval(values, of, confidence=self.confidence, is_share=is_share)
        bets_on = stakes(values, low=0.0, high=1.0, sources=of, largest=self.largest)
        low, high = confidence_sequence(bets_on, alpha=1 - self.confidence)
        return Measured(value=bets_on.mean, low=low, high=high, n=len(values))

    def pooled(
        self, scores: Mapping[str, float], parts: Variance, replicates: Mapping[Replicate, object]
    ) -> Measured:
        """The mean over items of several draws or seeds, else of the items alone."""
        if self.is_sequential or (parts.draws is None and parts.seeds is None):
            return self.mean(scores)
        return pooled_interval(
            sum(scores.values()) / len(scores),
            parts,
            n=len(scores),
            num_draws=len({draw for draw, _ in replicates}),
            num_seeds=len({seed for _, seed in replicates}),
            confidence=self.confidence,
        )

    def pair(
        self,
        names: tuple[str, str],
        a: Mapping[str, float],
        b: Mapping[str, float],
        *,
        margin: float,
    ) -> Pair:
        """Arms a and b on the items that both answered."""
        common = sorted(a.keys() & b.keys())
        of = None if self.sources is None else [self.sources[i] for i in common]
        found = clustered_difference(
            [a[i] for i in common], [b[i] for i in common], of, confidence=self.confidence
        )
        low, high, p_value, e_value = found.low, found.high, found.p_value, None
        method = "fixed_n" if of is None else "clustered"
        if self.is_sequential:
            method, low, high, p_value = "confidence_sequence", None, None, None
            bets_on = pair_stakes(a, b, items=common, sources=self.sources, largest=self.largest)
            if bets_on is not None:
                alpha = pair_alpha(self.num_arms, confidence=self.confidence)
                looked = compared(names, bets_on, alpha=alpha, margin=margin)
                low, high, e_value = looked.low, looked.high, looked.e_value
        return Pair(
            a=names[0],
            b=names[1],
            difference=found.difference,
            low=low,
            high=high,
            p_value=p_value,
            p_adjusted=None,
            n=found.n,
            wins=found.wins,
            losses=found.losses,
            ties=found.ties,
            method=method,
            e_value=e_value,
            num_sources=None if of is None else len(set(of)),
        )
