"""An engine in a process of its own: what builds it, and the Ray actor that answers with it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from conf.groups import EngineConfig
from conf.row_meter import METER
from evaluation.engines.base import (
    Engine,
    GenerateRequest,
    GenerateResult,
    Overhead,
    ScoreRequest,
    ScoreResult,
)
from evaluation.engines.endpoint_ceiling import EndpointPlace
from evaluation.prompts.rendering import Renderer
from evaluation.tasks import Task
from launch.logs.worker_log import logged
from launch.workers import gathered

SECONDS_PER_PART = 0.2  # of results that cross between processes together

Request = ScoreRequest | GenerateRequest
Result = ScoreResult | GenerateResult


@dataclass(kw_only=True, slots=True, frozen=True)
class EngineSpec:
    """What builds an engine in any process. layout, max_length: of ModelConfig."""

    config: EngineConfig
    model_dir: Path
    layout: str
    max_length: int | None
    dtype: str
    device: str
    threads: int  # of the CPU
    kernels_impl: str = "auto"
    task: Task | None = None  # scripted engine only
    endpoint: EndpointPlace | None = None  # hosted engines only
    log_dir: Path | None = None  # where a server of its own writes; no part of what it is

    def identity(self) -> EngineSpec:
        """What two specs have in common where one loaded engine serves both: requests say the rest.

        So an arm with another temperature does not load the model again.
        """
        config = replace(
            self.config,
            temperature=0.0,
            repeats=1,
            stop=[],
            max_new_tokens=None,
            latency_requests=0,
        )
        return replace(self, config=config, log_dir=None)

    def build(self) -> Engine:
        """The engine, with its model loaded and no adapter.

        Raises:
            ModelError: for a directory it cannot load.
        """
        from evaluation.engines import build_engine

        if self.config.name == "vllm":
            from launch.vllm_server import served_engine

            return served_engine(self)
        return build_engine(
            self.config,
            model_dir=self.model_dir,
            adapter_dir=None,
            renderer=Renderer.load(self.model_dir, layout=self.layout, max_length=self.max_length),
            dtype=self.dtype,
            device=self.device,
            threads=self.threads,
            task=self.task,
            kernels_impl=self.kernels_impl,
            endpoint=self.endpoint,
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class Part:
    """Some results of a shard, and what its engine computed since the part before.

    rows: put through the embedding. kernels: the engine's choices so far, by kernel.
    """

    results: list[Result]
    overhead: Overhead
    rows: int
    kernels: Mapping[str, str]
    process_id: int


class EngineActor:
    """An engine in a process of its own; a Ray actor. The model is loaded at the first call."""

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._adapter_dir: Path | None = None
        self._rows = 0

    def answer(
        self,
        requests: Sequence[Request],
        options: Mapping[str, bool],
        *,
        adapter_dir: Path | None,
        log_path: Path,
        rows_dir: Path | None,
    ) -> Iterator[Part]:
        """Answer a shard with an adapter, or the base model; yields parts as results come.

        rows_dir: where the rows are announced before they are computed.
        """
        with logged(log_path):
            METER.count_into(rows_dir)
            before = METER.rows
            if adapter_dir != self._adapter_dir:
                self._engine.set_adapter(adapter_dir)
                self._adapter_dir = adapter_dir
            answered = _answered(self._engine, requests, options)
            yield self._part([], checked_rows=METER.rows - before)
            for results in gathered(answered, seconds=SECONDS_PER_PART):
                yield self._part(results)
            yield self._part([])  # rows computed after the last result

    @cached_property
    def _engine(self) -> Engine:
        return self._spec.build()

    def _part(self, results: list[Result], *, checked_rows: int = 0) -> Part:
        """checked_rows: computed to check what was loaded, which the engine does not count."""
        rows, before = self._engine.rows_computed, self._rows
        self._rows = rows
        overhead = self._engine.take_shared()
        return Part(
            results=results,
            overhead=replace(overhead, padding_tokens=overhead.padding_tokens + checked_rows),
            rows=rows - before + checked_rows,
            kernels=kernels_of(self._engine),
            process_id=os.getpid(),
        )


def _answered(
    engine: Engine, requests: Sequence[Request], options: Mapping[str, bool]
) -> Iterator[Result]:
    """Scores or completions: the requests of a call are of one kind."""
    scores = [r for r in requests if isinstance(r, ScoreRequest)]
    if scores:
        yield from engine.score(scores, **options)
    generations = [r for r in requests if isinstance(r, GenerateRequest)]
    if generations:
        yield from engine.generate(generations, **options)


def kernels_of(engine: Engine) -> dict[str, str]:
    """What each kernel of an engine runs as, and why; empty for engines without kernels of ours."""
    return dict(getattr(engine, "kernels", {}))


def start_engine(spec: EngineSpec) -> Any:
    """A new engine process that reserves its devices."""
    import ray

    is_cpu = spec.device == "cpu"
    options = {
        "num_cpus": spec.threads if is_cpu else 1,
        "num_gpus": 0 if is_cpu else 1,
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(spec.threads)}},
        "max_restarts": 0,
    }
    return ray.remote(EngineActor).options(**options).remote(spec)
