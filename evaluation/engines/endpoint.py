"""Engines that are reached over HTTP: a hosted model, or a server on this machine.

A hosted model gets messages and applies a template of its own. A server of a model of ours gets the
token ids that every other engine gets (vLLM's /v1/completions takes them), so that a tuned model is
asked what it was trained on. Either only generates.
"""

from __future__ import annotations

import platform
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, JobFailed
from conf.groups import EngineConfig
from conf.hashing import sha256_of
from evaluation.engines.base import (
    GenerateRequest,
    GenerateResult,
    Overhead,
    ScoreRequest,
    ScoreResult,
    Usage,
)
from evaluation.engines.endpoint_client import AttemptFailed
from evaluation.engines.endpoint_retry import Outgoing, Retrier, Stopped
from evaluation.engines.endpoint_store import Reply

MAX_SEED = 2**31  # servers take seeds of 32 bits
# The newer name of max_tokens, which some models insist on and older servers do not know.
NEWER_LIMIT = "max_completion_tokens"


@dataclass(slots=True)
class _Asked:
    """One thing to ask; ids: of all requests that are this very question."""

    key: str
    outgoing: Outgoing
    ids: list[str]


class EndpointEngine:
    """What hosted models and servers of our own have in common: requests to replies."""

    name = "endpoint"

    def __init__(self, config: EngineConfig, *, base_url: str, retrier: Retrier) -> None:
        self._config = config
        self._base_url = base_url
        self._retrier = retrier
        self._rows = 0
        self._limit_name = "max_tokens"

    @property
    def rows_computed(self) -> int:
        """Rows by the endpoint's own counts: prompt tokens not cached, and generated ones."""
        return self._rows

    def take_shared(self) -> Overhead:
        """An endpoint tells of no shared rows: those that it spares are each request's cached."""
        return Overhead()

    def set_adapter(self, path: Path | None) -> None:
        """Only a server of our own has adapters."""
        assert path is None, "a hosted model takes no adapter"

    def score(
        self, requests: Sequence[ScoreRequest], *, timed: bool = False, winner_only: bool = False
    ) -> Iterator[ScoreResult]:
        """Refused: endpoints give no scores of all labels.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"engine={self.name}",
            found="labels to be scored",
            expected="answers to be generated: an endpoint gives no scores of all labels",
            remedy="write answer_by=generate",
        )

    def generate(
        self, requests: Sequence[GenerateRequest], *, timed: bool = False
    ) -> Iterator[GenerateResult]:
        """Completions as they come; timed: streamed, one at a time, with seconds.

        Raises:
            JobFailed: the endpoint refuses every request. BudgetReached: at the ceiling.
        """
        asked = self._asked(requests, timed=timed)
        workers = 1 if timed else min(self._config.max_concurrency, max(1, len(asked)))
        for one, reply in self._replies(list(asked.values()), workers=workers):
            for number, name in enumerate(one.ids):
                yield self._result(name, reply, is_timed=timed, is_first=number == 0)

    def _asked(self, requests: Sequence[GenerateRequest], *, timed: bool) -> dict[str, _Asked]:
        """Different questions by key; a timed request is never the same as another."""
        found: dict[str, _Asked] = {}
        for request in requests:
            outgoing = self._outgoing(request, timed=timed)
            what = [self._base_url, outgoing.path, outgoing.body]
            key = sha256_of([*what, "timed", platform.node(), request.id] if timed else what)
            found.setdefault(key, _Asked(key, outgoing, [])).ids.append(request.id)
        return found

    def _outgoing(self, request: GenerateRequest, *, timed: bool) -> Outgoing:
        path, prompt = self._prompt(request)
        body: dict[str, Any] = {
            "model": self._model_name(),
            **prompt,
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
        }
        if request.stop:
            body["stop"] = list(request.stop)
        if request.temperature > 0:  # the noise of one repeat of one item, so part of the key
            body["seed"] = request.seed % MAX_SEED
        return Outgoing(
            id=request.id,
            path=path,
            body=body,
            is_streamed=timed,
            most_usd=self._most_usd(request, body),
        )

    def _prompt(self, request: GenerateRequest) -> tuple[str, Mapping[str, Any]]:
        raise NotImplementedError

    def _model_name(self) -> str:
        raise NotImplementedError

    def _most_usd(self, request: GenerateRequest, body: Mapping[str, Any]) -> float | None:
        return None

    def _known(self, key: str) -> Reply | None:
        return None

    def _keep(self, key: str, reply: Reply) -> None:
        """Keep a new answer, where answers are kept."""

    def _bill(self, reply: Reply, *, is_new: bool) -> None:
        """Put down what an answer cost, where it costs money."""

    def _replies(
        self, asked: Sequence[_Asked], *, workers: int
    ) -> Iterator[tuple[_Asked, Reply | AttemptFailed]]:
        """Known answers first, then new ones as they come."""
        missing = []
        for one in asked:
            reply = self._known(one.key)
            if reply is None:
                missing.append(one)
                continue
            self._bill(reply, is_new=False)
            yield one, reply
        if missing:
            with self._retrier.client.connected():
                yield from self._new_replies(missing, workers=workers)

    def _new_replies(
        self, missing: Sequence[_Asked], *, workers: int
    ) -> Iterator[tuple[_Asked, Reply | AttemptFailed]]:
        """Answers as they come, from so many threads.

        Raises:
            JobFailed: the endpoint refuses every request. BudgetReached: at the ceiling.
        """
        self._retrier.stop = threading.Event()
        done: queue.SimpleQueue[tuple[_Asked, Reply | BaseException]] = queue.SimpleQueue()
        pool = ThreadPoolExecutor(workers, thread_name_prefix="endpoint")
        try:
            for one in missing:
                pool.submit(self._ask, one, done)
            for _ in missing:
                one, found = done.get()
                if isinstance(found, AttemptFailed) and not found.is_hopeless:
                    yield one, found
                elif isinstance(found, BaseException):
                    raise self._failure(found)
                else:
                    self._bill(found, is_new=True)
                    yield one, found
        finally:  # also where nobody wants the rest any more
            self._retrier.stop.set()
            pool.shutdown(cancel_futures=True)

    def _ask(
        self, one: _Asked, done: queue.SimpleQueue[tuple[_Asked, Reply | BaseException]]
    ) -> None:
        """In a thread: get an answer and keep it before anybody uses it."""
        try:
            reply = self._answer(one.outgoing)
            self._keep(one.key, reply)
            done.put((one, reply))
        except Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits
            done.put((one, error))

    def _answer(self, outgoing: Outgoing) -> Reply:
        try:
            return self._retrier.answer(self._named(outgoing))
        except AttemptFailed as error:
            is_name = error.status == 400 and NEWER_LIMIT in error.reason
            if not is_name or self._limit_name == NEWER_LIMIT:
                raise
            self._limit_name = NEWER_LIMIT
            return self._retrier.answer(self._named(outgoing))

    def _named(self, outgoing: Outgoing) -> Outgoing:
        """The request with its limit under the name that this endpoint takes."""
        body = {self._limit_name if k == "max_tokens" else k: v for k, v in outgoing.body.items()}
        return Outgoing(
            id=outgoing.id,
            path=outgoing.path,
            body=body,
            is_streamed=outgoing.is_streamed,
            most_usd=outgoing.most_usd,
        )

    def _failure(self, error: BaseException) -> BaseException:
        if isinstance(error, AttemptFailed):
            return JobFailed(f"{self._base_url} answers no request: {error}")
        return error

    def _result(
        self, name: str, reply: Reply | AttemptFailed, *, is_timed: bool, is_first: bool
    ) -> GenerateResult:
        """A reply as a result; rows of a question that several requests share are counted once."""
        if isinstance(reply, AttemptFailed):
            return GenerateResult(
                id=name,
                completion_ids=(),
                text="",
                cached_tokens=0,
                computed_tokens=0,
                completion_tokens=0,
                usage=Usage(),
                error=str(reply),
            )
        cached, generated = reply.cached_tokens or 0, reply.completion_tokens or 0
        computed = max(0, (reply.prompt_tokens or 0) - cached + max(0, generated - 1))
        self._rows += computed if is_first else 0
        return GenerateResult(
            id=name,
            completion_ids=(),
            text=reply.text,
            cached_tokens=cached,
            computed_tokens=computed if is_first else 0,
            completion_tokens=generated,
            usage=Usage(
                prompt_tokens=reply.prompt_tokens,
                cached_tokens=reply.cached_tokens,
                completion_tokens=reply.completion_tokens,
            ),
            first_token_seconds=reply.first_token_seconds if is_timed else None,
            total_seconds=reply.total_seconds if is_timed else None,
        )
