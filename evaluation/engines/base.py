"""What every engine takes and gives: requests as token ids, results in any order, rows counted.

An engine turns prompts into label scores or completions. It gets all requests of a call at once,
streams results as they are ready, and counts every row it puts through the input embedding:

    sum(result.computed_tokens) + shared_tokens + padding_tokens == rows_computed

so that the bill of a run can be checked against a hook on the embedding, to the token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


@dataclass(kw_only=True, slots=True, frozen=True)
class ScoreRequest:
    """Score each label as the continuation of a prompt.

    prompt_ids: (P,) token ids, P >= 1. label_ids: one tuple of at least one token id per label; a
    label may be a prefix of another. Both come out of one joint tokenisation. label_offsets: one
    constant per label, added to its log-probability to find the winner in winner-only mode and
    ignored otherwise; () stands for zeros.
    """

    id: str
    prompt_ids: tuple[int, ...]
    label_ids: tuple[tuple[int, ...], ...]
    label_offsets: tuple[float, ...] = ()


@dataclass(kw_only=True, slots=True, frozen=True)
class GenerateRequest:
    """Continue a prompt by at most max_new_tokens.

    temperature 0 is greedy. The noise of a sampled answer depends on `seed` alone, never on the
    other requests of the call. A stop string ends the completion and is cut off with what follows.
    messages: (role, text) of each turn, for hosted engines, which apply a template of their own.
    """

    id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    temperature: float = 0.0
    seed: int = 0
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(kw_only=True, slots=True, frozen=True)
class ScoreResult:
    """label_logprobs: one natural-log probability per label, summed over the label's tokens.

    first_token_logprobs: one per label, of its first token alone. winner: index of the best label
    in winner-only mode, the first of equal ones, and winner_logprob its log-probability without
    the offset; both None otherwise. There is no label distribution then: label_logprobs and
    first_token_logprobs are empty.

    cached_tokens: prompt tokens whose rows were not computed for this request alone.
    computed_tokens: rows forwarded for this request alone. Seconds are None unless timed.
    error: why there is no answer (then all scores are empty); None where there is one.
    """

    id: str
    label_logprobs: tuple[float, ...]
    first_token_logprobs: tuple[float, ...]
    cached_tokens: int
    computed_tokens: int
    winner: int | None = None
    winner_logprob: float | None = None
    first_token_seconds: float | None = None
    total_seconds: float | None = None
    error: str | None = None


def only_winner(request: ScoreRequest, result: ScoreResult) -> ScoreResult:
    """A full result as winner-only mode gives it, for engines that cannot do better."""
    sums = result.label_logprobs
    if result.error is not None:
        return result
    offsets = request.label_offsets or (0.0,) * len(sums)
    values = [a + b for a, b in zip(sums, offsets, strict=True)]
    winner = values.index(max(values))
    return replace(
        result,
        label_logprobs=(),
        first_token_logprobs=(),
        winner=winner,
        winner_logprob=sums[winner],
    )


@dataclass(kw_only=True, slots=True, frozen=True)
class Usage:
    """An endpoint's own count of a request's tokens; None where it does not tell."""

    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class GenerateResult:
    """completion_ids: without the end token, up to the stop. text: decoded, without the stop.

    completion_tokens: all tokens that were generated, the end token and the stop included. usage:
    of endpoints, which have a tokenizer of their own; the counts above are 0 where it has None.
    """

    id: str
    completion_ids: tuple[int, ...]
    text: str
    cached_tokens: int
    computed_tokens: int
    completion_tokens: int
    usage: Usage | None = None
    first_token_seconds: float | None = None
    total_seconds: float | None = None
    error: str | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class Overhead:
    """Rows that belong to no single request: shared by several, or padding and lost batches."""

    shared_tokens: int = 0
    padding_tokens: int = 0


class Engine(Protocol):
    """Turns requests into results. One call at a time; a call's iterator is read to its end."""

    name: str

    @property
    def rows_computed(self) -> int:
        """All rows put through the input embedding since the engine was built."""
        ...

    def score(
        self, requests: Sequence[ScoreRequest], *, timed: bool = False, winner_only: bool = False
    ) -> Iterator[ScoreResult]:
        """Label scores; timed: one request at a time, with seconds.

        winner_only: find the label with the highest log-probability plus offset, exactly, and
        leave out what the other labels' scores would cost.
        """
        ...

    def generate(
        self, requests: Sequence[GenerateRequest], *, timed: bool = False
    ) -> Iterator[GenerateResult]:
        """Completions; timed: one request at a time, with seconds."""
        ...

    def take_shared(self) -> Overhead:
        """Shared and padding rows since this was last asked."""
        ...

    def set_adapter(self, path: Path | None) -> None:
        """Answer with the adapter in this directory from now on; None: with the base model."""
        ...


@dataclass(kw_only=True, slots=True, frozen=True)
class Paid:
    """What answers have cost; None where nobody knows.

    usd: of new answers. reused_usd: of those that were paid for earlier and found again.
    """

    usd: float | None
    reused_usd: float | None


@runtime_checkable
class Hosted(Protocol):
    """An engine that is paid by token, not by device-second."""

    def take_paid(self) -> Paid:
        """What answers have cost since this was last asked."""
        ...


@runtime_checkable
class OverHttp(Protocol):
    """An engine whose requests may fail on the way."""

    def take_attempts(self) -> list[dict[str, Any]]:
        """The attempts that failed since this was last asked, as the journal keeps them."""
        ...


@runtime_checkable
class Closes(Protocol):
    """An engine with processes of its own."""

    def close(self) -> None:
        """End them."""
        ...


class TextCodec(Protocol):
    """What an engine needs of a Renderer: text to ids and back, and the ids that end an answer."""

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        ...
