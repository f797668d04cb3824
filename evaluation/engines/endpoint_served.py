"""A server of our own model on this machine: asked with token ids, paid by device-second."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.groups import EngineConfig
from evaluation.engines.base import GenerateRequest, GenerateResult
from evaluation.engines.endpoint import EndpointEngine
from evaluation.engines.endpoint_client import EndpointClient
from evaluation.engines.endpoint_retry import FailedAttempt, Pace, Retrier


class ServedEngine(EndpointEngine):
    """A server of our own model on this machine, asked with token ids; paid by device-second.

    serve: given the adapter, or None for the base model, starts what is missing; returns where it
    is served and the model's name there. end: ends it.
    """

    name = "vllm"

    def __init__(
        self,
        config: EngineConfig,
        *,
        serve: Callable[[Path | None], tuple[str, str]],
        end: Callable[[], None],
    ) -> None:
        self._serve, self._end = serve, end
        self._adapter: Path | None = None
        self._name = ""
        self._events: queue.SimpleQueue[FailedAttempt] = queue.SimpleQueue()
        super().__init__(config, base_url="", retrier=self._retrier_for(config, ""))

    def set_adapter(self, path: Path | None) -> None:
        """Answer with this adapter from the next call on."""
        self._adapter = path

    def close(self) -> None:
        """End the server."""
        self._end()

    def generate(
        self, requests: Sequence[GenerateRequest], *, timed: bool = False
    ) -> Iterator[GenerateResult]:
        """See `EndpointEngine`; starts the server where it does not run.

        Raises:
            JobFailed: the server does not start.
        """
        base_url, self._name = self._serve(self._adapter)
        if base_url != self._base_url:
            self._base_url = base_url
            self._retrier = self._retrier_for(self._config, base_url)
        yield from super().generate(requests, timed=timed)

    def take_attempts(self) -> list[dict[str, Any]]:
        """The attempts that failed since this was last asked."""
        return [asdict(self._events.get()) for _ in range(self._events.qsize())]

    def _retrier_for(self, config: EngineConfig, base_url: str) -> Retrier:
        client = EndpointClient(
            base_url,
            key=None,
            timeout_seconds=config.timeout_seconds,
            connections=config.max_concurrency,
        )
        return Retrier(
            client=client,
            pace=Pace(config.requests_per_minute),
            max_attempts=config.max_attempts,
            failed=self._events.put,
        )

    def _model_name(self) -> str:
        return self._name

    def _prompt(self, request: GenerateRequest) -> tuple[str, Mapping[str, Any]]:
        return "completions", {"prompt": list(request.prompt_ids)}
