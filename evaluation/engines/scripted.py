"""The scripted engine: deterministic answers without a model, for smoke runs and tests (no torch).

`engine.script` says how it answers, with parts joined by `+`:

    constant   always the first label, or the word `answer`
    oracle     always right
    noisy      right for about 8 of 10 items, more with shots, by a hash of item and prompt
    echo       generation repeats the end of the prompt; scores favour the label it contains
    sleep:0.01 waits that many seconds per request
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from conf.errors import ConfigError
from conf.groups import EngineConfig
from conf.records import Item
from evaluation.engines.base import (
    GenerateRequest,
    GenerateResult,
    Overhead,
    ScoreRequest,
    ScoreResult,
    TextCodec,
    only_winner,
)
from evaluation.engines.rows import common_prefix, label_tree

if TYPE_CHECKING:
    from pathlib import Path

    from evaluation.tasks import Task

SCRIPTS = ("constant", "oracle", "noisy", "echo")
LONG_PROMPT_TOKENS = 200  # at this length the noisy script is halfway to always right


class ScriptedEngine:
    """Answers by script; token counts are those of a perfect engine without padding.

    A request's id is `ITEM|REPEAT|CALL`, or an item's id: that is how the answer is found.
    """

    name = "scripted"

    def __init__(self, config: EngineConfig, *, renderer: TextCodec, task: Task | None) -> None:
        """Read the script; task: where the right answers come from.

        Raises:
            ConfigError: for a script that does not exist.
        """
        self._codec = renderer
        self._script, self._sleep_seconds = _parse(config.script)
        self._is_sharing = config.prefix_cache
        self._task = task
        splits = task.items.values() if task is not None else ()
        self._items = {item.id: item for items in splits for item in items}
        self._rows = self._shared = 0
        self._prefix: tuple[int, ...] = ()

    @property
    def rows_computed(self) -> int:
        """Rows that a model would have put through its embedding."""
        return self._rows

    def take_shared(self) -> Overhead:
        """Shared rows since this was last asked; a script needs no padding."""
        taken, self._shared = Overhead(shared_tokens=self._shared), 0
        return taken

    def set_adapter(self, path: Path | None) -> None:
        """A script answers alike with any adapter."""

    def score(
        self, requests: Sequence[ScoreRequest], *, timed: bool = False, winner_only: bool = False
    ) -> Iterator[ScoreResult]:
        """Log-probabilities that put 0.9 on the scripted label."""
        cut = self._share([request.prompt_ids for request in requests])
        for request in requests:
            started = time.perf_counter()
            time.sleep(self._sleep_seconds)
            count = len(request.label_ids)
            chosen = self._choice(request)
            other = math.log(0.1 / max(1, count - 1))
            sums = tuple(math.log(0.9) if i == chosen else other for i in range(count))
            computed = len(label_tree(0, request.prompt_ids[cut:], request.label_ids).tokens)
            self._rows += computed
            seconds = time.perf_counter() - started if timed else None
            result = ScoreResult(
                id=request.id,
                label_logprobs=sums,
                first_token_logprobs=_first_token_logprobs(request, sums),
                cached_tokens=cut,
                computed_tokens=computed,
                first_token_seconds=seconds,
                total_seconds=seconds,
            )
            yield only_winner(request, result) if winner_only else result

    def generate(
        self, requests: Sequence[GenerateRequest], *, timed: bool = False
    ) -> Iterator[GenerateResult]:
        """The scripted answer as text."""
        cut = self._share([request.prompt_ids for request in requests])
        for request in requests:
            started = time.perf_counter()
            time.sleep(self._sleep_seconds)
            ids = tuple(self._codec.encode(self._text(request)))[: request.max_new_tokens]
            has_end = len(ids) < request.max_new_tokens
            computed = len(request.prompt_ids) - cut + max(0, len(ids) + has_end - 1)
            self._rows += computed
            seconds = time.perf_counter() - started if timed else None
            yield GenerateResult(
                id=request.id,
                completion_ids=ids,
                text=_cut(self._codec.decode(list(ids)), request.stop),
                cached_tokens=cut,
                computed_tokens=computed,
                completion_tokens=len(ids) + has_end,
                first_token_seconds=seconds,
                total_seconds=seconds,
            )

    def _share(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """As the transformers engine: the common prefix once, new rows billed as shared."""
        if not prompts or not self._is_sharing:
            return 0
        others = prompts if len(prompts) > 1 else [*prompts, self._prefix]
        wanted = min(common_prefix(others), min(len(prompt) for prompt in prompts) - 1)
        new = wanted - min(common_prefix([self._prefix, prompts[0]]), wanted)
        self._prefix = prompts[0][:wanted]
        self._shared += new
        self._rows += new
        return wanted

    def _choice(self, request: ScoreRequest) -> int:
        """Index of the scripted label."""
        count = len(request.label_ids)
        if self._script == "constant":
            return 0
        if self._script == "echo":
            prompt = self._codec.decode(list(request.prompt_ids))
            words = [self._codec.decode(list(ids)).strip() for ids in request.label_ids]
            return max(range(count), key=lambda i: prompt.rfind(words[i]))
        item = self._item(request.id)
        if item is None or self._task is None:  # a content-free input has no right answer
            return _hash(request.id) % count
        right = self._task.candidates(item).index(item.answer_key)
        if self._is_right(request.id, len(request.prompt_ids)):
            return right
        return (right + 1 + _hash(request.id, "wrong") % max(1, count - 1)) % count

    def _text(self, request: GenerateRequest) -> str:
        if self._script == "echo":
            return self._codec.decode(list(request.prompt_ids[-request.max_new_tokens :]))
        item = self._item(request.id)
        if self._script == "constant" or item is None or self._task is None:
            return (
                self._word(self._task.labels[0]) if self._task and self._task.labels else "answer"
            )
        if self._is_right(f"{request.id}|{request.seed}", len(request.prompt_ids)):
            return self._word(item.answer_key)
        wrong = [label for label in self._task.candidates(item) if label != item.answer_key]
        return self._word(wrong[_hash(request.id) % len(wrong)]) if wrong else "something else"

    def _word(self, label: str) -> str:
        return self._task.word(label) if self._task is not None else label

    def _item(self, request_id: str) -> Item | None:
        return self._items.get(request_id.rsplit("|", 2)[0])

    def _is_right(self, request_id: str, prompt_tokens: int) -> bool:
        """Oracles are; the noisy script in 80 of 100 cases, in more the longer its prompt is."""
        if self._script == "oracle":
            return True
        bonus = 0.15 * prompt_tokens / (prompt_tokens + LONG_PROMPT_TOKENS)
        return _hash(request_id, "right") % 1000 < 1000 * (0.8 + bonus)


def _parse(script: str) -> tuple[str, float]:
    """The script's name and its seconds per request."""
    name, seconds = "constant", 0.0
    for part in script.split("+"):
        kind, _, value = part.partition(":")
        if part in SCRIPTS:
            name = part
        elif kind == "sleep" and value.replace(".", "", 1).isdigit():
            seconds = float(value)
        else:
            raise ConfigError(
                "engine.script",
                found=repr(script),
                expected=f"{', '.join(SCRIPTS)}, or one of them with +sleep:SECONDS",
                remedy="type engine.script=noisy",
            )
    return name, seconds


def _first_token_logprobs(request: ScoreRequest, sums: Sequence[float]) -> tuple[float, ...]:
    """As if the labels were all there is: a token has the mass of the labels it begins."""
    mass: dict[int, float] = {}
    for ids, value in zip(request.label_ids, sums, strict=True):
        mass[ids[0]] = mass.get(ids[0], 0.0) + math.exp(value)
    return tuple(math.log(mass[ids[0]]) for ids in request.label_ids)


def _hash(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("|".join(parts).encode()).digest()[:4], "big")


def _cut(text: str, stop: Sequence[str]) -> str:
    cuts = [at for end in stop if (at := text.find(end)) >= 0]
    return text[: min(cuts)] if cuts else text
