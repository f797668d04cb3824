"""Answers that many prompts share: what none of them has asked before is computed at once.

An Asker waits for its answers, and several of them are to ask together. So each asks a `Desk`,
which answers what is known and guesses the rest, and notes what it guessed. Once all have asked,
the notes go to the engine in one call, and those that were given guesses ask again. A call that
follows from a guess (an answer after a thought) is not noted: the answer may lead to another call.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from conf.errors import DataError
from conf.records import from_dict, to_dict
from evaluation.engines.base import (
    GenerateRequest,
    GenerateResult,
    Overhead,
    ScoreRequest,
    ScoreResult,
)

Request = ScoreRequest | GenerateRequest
Answer = ScoreResult | GenerateResult
Seat = tuple[int, int]  # a trial at a rung

R = TypeVar("R", ScoreRequest, GenerateRequest)


@dataclass(slots=True)
class Wanted:
    """A request that nobody has an answer to. seats: who asks; they share its price."""

    request: Request
    is_winner_only: bool
    seats: set[Seat] = field(default_factory=set)


def request_key(request: Request, *, is_winner_only: bool = False) -> str:
    """Equal for requests that one answer is right for; their ids do not matter."""
    parts: tuple[object, ...]
    if isinstance(request, ScoreRequest):
        offsets = request.label_offsets if is_winner_only else ()
        parts = ("score", is_winner_only, request.prompt_ids, request.label_ids, offsets)
    else:
        noise = (request.temperature, request.seed) if request.temperature > 0 else ()
        length = request.max_new_tokens
        parts = ("generate", request.prompt_ids, length, request.stop, noise)
    # Of plain tuples; as JSON it took a quarter of what a search computes beside the engine.
    return hashlib.sha256(repr(parts).encode("utf-8")).hexdigest()


class Desk:
    """Stands where an engine stands, for one trial at one rung; computes nothing.

    is_guessing: whether anything was guessed so far: then what came of the answers means nothing.
    """

    name = "known answers"
    rows_computed = 0

    def __init__(self, seat: Seat, known: Mapping[str, Answer], wanted: dict[str, Wanted]) -> None:
        """known: by key. wanted: where to note what is not."""
        self._seat, self._known, self._wanted = seat, known, wanted
        self._guessed_items: set[str] = set()

    @property
    def is_guessing(self) -> bool:
        """Whether an answer was a guess."""
        return bool(self._guessed_items)

    def score(
        self, requests: Sequence[ScoreRequest], *, timed: bool = False, winner_only: bool = False
    ) -> Iterator[ScoreResult]:
        """What is known, and else as if all labels were alike."""
        for request, known in self._look_up(requests, is_winner_only=winner_only):
            if isinstance(known, ScoreResult):
                yield known
                continue
            zeros = () if winner_only else (0.0,) * len(request.label_ids)
            yield ScoreResult(
                id=request.id,
                label_logprobs=zeros,
                first_token_logprobs=zeros,
                cached_tokens=0,
                computed_tokens=0,
                winner=0 if winner_only else None,
                winner_logprob=0.0 if winner_only else None,
            )

    def generate(
        self, requests: Sequence[GenerateRequest], *, timed: bool = False
    ) -> Iterator[GenerateResult]:
        """What is known, and else nothing at all."""
        for request, known in self._look_up(requests, is_winner_only=False):
            if isinstance(known, GenerateResult):
                yield known
                continue
            yield GenerateResult(
                id=request.id,
                completion_ids=(),
                text="",
                cached_tokens=0,
                computed_tokens=0,
                completion_tokens=0,
            )

    def take_shared(self) -> Overhead:
        """Nothing was computed here."""
        return Overhead()

    def set_adapter(self, path: Path | None) -> None:
        """Known answers are of one adapter."""

    def _look_up(
        self, requests: Sequence[R], *, is_winner_only: bool
    ) -> Iterator[tuple[R, Answer | None]]:
        """Each request with its answer under the request's own id, or None for a guess."""
        certain = {r.id for r in requests if item_of(r) not in self._guessed_items}
        for request in requests:
            key = request_key(request, is_winner_only=is_winner_only)
            known = self._known.get(key)
            if known is not None:
                yield request, replace(known, id=request.id)
                continue
            if request.id in certain:
                note = Wanted(request=request, is_winner_only=is_winner_only)
                self._wanted.setdefault(key, note).seats.add(self._seat)
            self._guessed_items.add(item_of(request))
            yield request, None


def item_of(request: Request) -> str:
    """The id of the item that a request ITEM|REPEAT|CALL asks about."""
    return request.id.rsplit("|", 2)[0]


@dataclass(slots=True)
class Price:
    """What a trial at a rung took: rows of its own, and its part of the rows it shares."""

    tokens: int = 0
    device_seconds: float = 0.0


@dataclass(slots=True)
class Shelf:
    """What a search has paid for: answers by key, prices by seat; a file between attempts."""

    answers: dict[str, Answer] = field(default_factory=dict)
    prices: dict[Seat, Price] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Shelf:
        """What an attempt before this one has saved; empty where there is none.

        Raises:
            DataError: a line that is not what `write` writes.
        """
        shelf = cls()
        if not path.is_file():
            return shelf
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                shelf._take(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise DataError(
                    f"{path}:{number}",
                    found=f"{type(error).__name__}: {error}",
                    expected="an answer or a price, as a search writes them",
                    remedy="delete the file: its answers are computed again",
                ) from None
        return shelf

    def _take(self, line: dict[str, object]) -> None:
        match line:
            case {"key": str(key), "score": dict(data)}:
                self.answers[key] = from_dict(ScoreResult, data)
            case {"key": str(key), "generate": dict(data)}:
                self.answers[key] = from_dict(GenerateResult, data)
            case {"seat": [int(trial), int(rung)], "price": dict(data)}:
                self.prices[trial, rung] = from_dict(Price, data)
            case _:
                raise ValueError(f"{sorted(line)}")

    def write(self, path: Path) -> None:
        """All of it as JSON lines; the file appears whole or not at all. Failures are left out."""
        lines: list[dict[str, object]] = [
            {"key": key, "score" if isinstance(a, ScoreResult) else "generate": to_dict(a)}
            for key, a in self.answers.items()
            if a.error is None
        ]
        lines += [{"seat": seat, "price": to_dict(price)} for seat, price in self.prices.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        partial.replace(path)
