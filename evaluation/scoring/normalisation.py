"""How the log-probabilities of a label's tokens become one score per label (pure).

Labels of different lengths are compared unfairly by the plain sum, and common words are likely
whatever the input; each normalisation mends one of these and costs something else:

    sum          S_i
    token        S_i / tokens of the label
    byte         S_i / UTF-8 bytes of the label's words, without the space before them: `acc_bytes`
                 of lm-evaluation-harness 0.4.13, and its `acc_norm` where all characters are ASCII
    pmi          S_i - mean of S_i over inputs without content: domain-conditional pointwise mutual
                 information (Holtzman et al. 2021, arXiv 2104.08315)
    first_token  log-probability of the first token; equal first tokens are a tie, the first wins
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True, frozen=True)
class LabelScores:
    """What is known of one item's labels; every mapping is label -> value.

    sums: log-probabilities summed over tokens. num_tokens, num_bytes: lengths. firsts: of the first
    tokens. baselines: mean sums of the item's own labels without content; None where they are the
    same for all items and therefore stand in the rule's offsets.
    """

    sums: Mapping[str, float]
    num_tokens: Mapping[str, int]
    num_bytes: Mapping[str, int]
    firsts: Mapping[str, float] | None = None
    baselines: Mapping[str, float] | None = None

    def by(self, normalisation: str) -> dict[str, float]:
        """The labels' scores under a normalisation.

        Raises:
            ValueError: no such normalisation.
        """
        match normalisation:
            case "sum":
                return dict(self.sums)
            case "token":
                return {label: value / self.num_tokens[label] for label, value in self.sums.items()}
            case "byte":
                return {label: value / self.num_bytes[label] for label, value in self.sums.items()}
            case "pmi":
                baselines = self.baselines or dict.fromkeys(self.sums, 0.0)
                return {label: value - baselines[label] for label, value in self.sums.items()}
            case "first_token":
                assert self.firsts is not None, "first tokens are recorded where they may decide"
                return dict(self.firsts)
        raise ValueError(f"no such normalisation: {normalisation}")


def mean_logprobs(logprobs: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Per label the mean log-probability over some inputs; None without inputs."""
    if not logprobs:
        return None
    return {
        label: math.fsum(scores[label] for scores in logprobs) / len(logprobs)
        for label in logprobs[0]
    }
