"""Label scores to answers: offsets fitted without labels, and which way validation picks.

A scored prompt often prefers one label whatever the input. An offset per label is subtracted from
its log-probability: contextual (Zhao et al. 2021, arXiv 2102.09690) from inputs without content,
batch (Zhou et al. 2023, arXiv 2309.17249) from the mean over validation inputs, labels unused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from conf.records import Item, Measured, rule_name

CONTENT_FREE_INPUTS = ("N/A", "[MASK]", "...")


def content_free_items(like: Item, *, suffix: str = "") -> tuple[Item, ...]:
    """Items that ask about nothing; like: any item, for the fields that a prompt may use.

    suffix: of the ids. Choices stay: an item's own are what is asked about.
    """
    return tuple(
        replace(
            like,
            id=f"content-free-{index}{suffix}",
            input=text,
            context=None if like.context is None else text,
            rationale=None,
            slices=dict.fromkeys(like.slices, text),
        )
        for index, text in enumerate(CONTENT_FREE_INPUTS)
    )


def fit_offsets(logprobs: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Per label the logarithm of its mean probability over some inputs; None without inputs.

    logprobs: for each input label -> log-probability; normalised over the labels first.
    """
    if not logprobs:
        return None
    shares = [_softmax(scores) for scores in logprobs]
    means = {label: math.fsum(s[label] for s in shares) / len(shares) for label in shares[0]}
    return {label: math.log(max(mean, 1e-30)) for label, mean in means.items()}


def _softmax(scores: Mapping[str, float]) -> dict[str, float]:
    highest = max(scores.values())
    weights = {label: math.exp(value - highest) for label, value in scores.items()}
    total = math.fsum(weights.values())
    return {label: weight / total for label, weight in weights.items()}


def best_label(scores: Mapping[str, float], offsets: Mapping[str, float] | None = None) -> str:
    """The label with the highest score after its offset; the first of equal ones."""
    return max(scores, key=lambda label: scores[label] - (offsets[label] if offsets else 0.0))


@dataclass(kw_only=True, slots=True, frozen=True)
class Candidate:
    """One way to answer, and its score on validation; scores: of its items, by id."""

    answer_by: str
    value: Measured
    scores: Mapping[str, float] = field(default_factory=dict)
    normalisation: str = "sum"
    calibration: str = "none"
    offsets: dict[str, float] | None = None

    @property
    def name(self) -> str:
        """E.g. score/batch."""
        return rule_name(self.answer_by, self.normalisation, self.calibration)


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The best on validation; of equal ones the first, so list the simplest first."""
    return max(candidates, key=lambda candidate: candidate.value.value or 0.0)
