"""A model behind an OpenAI-compatible endpoint: paid by token, answers kept in a store."""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from conf.groups import EngineConfig
from conf.hashing import sha256_of
from evaluation.engines.base import GenerateRequest, Paid
from evaluation.engines.endpoint import EndpointEngine
from evaluation.engines.endpoint_ceiling import Ceiling, EndpointPlace, cost_usd, most_usd
from evaluation.engines.endpoint_check import check_endpoint
from evaluation.engines.endpoint_client import EndpointClient
from evaluation.engines.endpoint_retry import FailedAttempt, Pace, Retrier
from evaluation.engines.endpoint_store import AnswerStore, Reply


class HostedEngine(EndpointEngine):
    """A model behind an OpenAI-compatible endpoint: paid by token, answers kept in a store."""

    name = "openai"

    def __init__(self, config: EngineConfig, *, place: EndpointPlace) -> None:
        """Open the store; nothing is sent.

        Raises:
            ConfigError: no endpoint or model, or no key where one is needed.
        """
        check_endpoint(config)
        assert config.base_url is not None
        self._events: queue.SimpleQueue[FailedAttempt] = queue.SimpleQueue()
        ceiling = None
        if place.limit_usd is not None and place.spend is not None:
            ceiling = Ceiling(place.spend, limit_usd=place.limit_usd)
        retrier = Retrier(
            client=EndpointClient(
                config.base_url,
                key=os.environ.get(config.api_key_env) or None,
                timeout_seconds=config.timeout_seconds,
                connections=config.max_concurrency,
            ),
            pace=Pace(config.requests_per_minute),
            max_attempts=config.max_attempts,
            failed=self._events.put,
            price=place.price,
            ceiling=ceiling,
        )
        super().__init__(config, base_url=config.base_url, retrier=retrier)
        self._price = place.price
        name = sha256_of([config.base_url, config.model])[:16]
        self._store = AnswerStore(place.answers / f"{name}.jsonl")
        self._new_usd: float | None = 0.0
        self._reused_usd: float | None = 0.0

    def take_paid(self) -> Paid:
        """What answers have cost since this was last asked; None where nobody knows."""
        taken = Paid(usd=self._new_usd, reused_usd=self._reused_usd)
        self._new_usd = self._reused_usd = 0.0
        return taken

    def take_attempts(self) -> list[dict[str, Any]]:
        """The attempts that failed since this was last asked."""
        return [asdict(self._events.get()) for _ in range(self._events.qsize())]

    def _model_name(self) -> str:
        assert self._config.model is not None
        return self._config.model

    def _prompt(self, request: GenerateRequest) -> tuple[str, Mapping[str, Any]]:
        """Messages; how the answer's turn begins goes as an assistant's turn without an end."""
        assert request.messages, "calls for hosted engines carry their messages"
        turns = [{"role": role, "content": text} for role, text in request.messages if text]
        return "chat/completions", {"messages": turns}

    def _most_usd(self, request: GenerateRequest, body: Mapping[str, Any]) -> float | None:
        if self._price is None:
            return None
        size = len(json.dumps(body["messages"], ensure_ascii=False).encode("utf-8"))
        return most_usd(
            self._price,
            prompt_bytes=size,
            turns=len(request.messages),
            max_new_tokens=request.max_new_tokens,
        )

    def _known(self, key: str) -> Reply | None:
        return self._store.get(key)

    def _keep(self, key: str, reply: Reply) -> None:
        self._store.put(key, reply)

    def _bill(self, reply: Reply, *, is_new: bool) -> None:
        usd = None
        if self._price is not None:
            usd = cost_usd(
                self._price,
                prompt_tokens=reply.prompt_tokens,
                cached_tokens=reply.cached_tokens,
                completion_tokens=reply.completion_tokens,
            )
        if is_new:
            self._new_usd = _sum(self._new_usd, usd)
        else:
            self._reused_usd = _sum(self._reused_usd, usd)


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b
