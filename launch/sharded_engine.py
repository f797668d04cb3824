"""One engine over several engine processes: shards out, results merged, dead processes replaced.

Requests are split so that a shard keeps whole subtrees of the prefix tree (engines/shards.py).
Each engine process is a Ray actor that keeps its model between calls and swaps adapters; it streams
results with the rows it has computed so far. A result that has come is never asked for again, so
when a process dies, exactly the requests without a result go to a new one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from conf.errors import JobFailed
from conf.row_meter import announced_rows
from evaluation.engines.base import (
    GenerateRequest,
    GenerateResult,
    Overhead,
    ScoreRequest,
    ScoreResult,
)
from evaluation.engines.rows import label_tree
from evaluation.engines.shards import shards
from launch.engine_process import EngineSpec, Part, Request, Result, start_engine
from launch.estimate import PROMPT_ROWS_PER_DECODED_TOKEN

MAX_RESTARTS = 3  # of the process of one shard; what kills it every time is the request itself
MAX_REASON = 300  # characters


@dataclass(kw_only=True, slots=True, eq=False)
class _Shard:
    """Requests of one engine process. pending: those without a result, by id.

    unclaimed_rows: computed, and in no result and no overhead so far. rows_dir: where its running
    call announces rows; told_rows: those that its parts have told of.
    """

    number: int
    pending: dict[str, Request]
    stream: Any = None
    deaths: int = 0
    unclaimed_rows: int = 0
    rows_dir: Path | None = None
    told_rows: int = 0

    def untold_rows(self) -> int:
        """What the running call announced and no part told of."""
        return 0 if self.rows_dir is None else announced_rows(self.rows_dir) - self.told_rows


class ShardedEngine:
    """Several engine processes as one `Engine`; timed calls go to the first of them, alone.

    Counts are sums over the processes. Of one that died, all rows that it announced and that no
    result accounts for are billed as padding.
    """

    def __init__(self, spec: EngineSpec, *, actors: int, log_dir: Path) -> None:
        """Start nothing yet. log_dir: where the processes write; may be set anew for each job.

        rows_dir: where they announce their rows, too; None: nowhere.
        """
        self.name = spec.config.name
        self.log_dir = log_dir
        self.rows_dir: Path | None = None
        self.process_ids: dict[int, int] = {}  # by number, as the last part of each told
        self._spec = spec
        self._num_actors = actors
        self._actors: dict[int, Any] = {}
        self._adapter_dir: Path | None = None
        self._rows = self._shared = self._padding = 0
        self._kernels: dict[str, dict[str, str]] = {}  # by kernel and implementation: with reason

    @property
    def rows_computed(self) -> int:
        """All rows put through the embeddings, as far as the processes told."""
        return self._rows

    @property
    def kernels(self) -> dict[str, str]:
        """What each kernel runs as, known after the first results; all where machines differ."""
        return {name: " | ".join(seen.values()) for name, seen in self._kernels.items()}

    def take_shared(self) -> Overhead:
        """Shared and padding rows since this was last asked."""
        taken = Overhead(shared_tokens=self._shared, padding_tokens=self._padding)
        self._shared = self._padding = 0
        return taken

    def set_adapter(self, path: Path | None) -> None:
        """Answer with this adapter from the next call on; the processes swap when it comes."""
        self._adapter_dir = path

    def score(
        self, requests: Sequence[ScoreRequest], *, timed: bool = False, winner_only: bool = False
    ) -> Iterator[ScoreResult]:
        """Label scores; see `Engine`."""
        for result in self._run(requests, {"timed": timed, "winner_only": winner_only}):
            assert isinstance(result, ScoreResult)
            yield result

    def generate(
        self, requests: Sequence[GenerateRequest], *, timed: bool = False
    ) -> Iterator[GenerateResult]:
        """Completions; see `Engine`."""
        for result in self._run(requests, {"timed": timed}):
            assert isinstance(result, GenerateResult)
            yield result

    def close(self) -> None:
        """End the processes; a later call starts new ones."""
        while self._actors:
            _kill(self._actors.popitem()[1])

    def _run(self, requests: Sequence[Request], options: Mapping[str, bool]) -> Iterator[Result]:
        """Results of all shards as they come.

        Raises:
            JobFailed: a shard's process died more than MAX_RESTARTS times.
            Exception: what an engine raised, as it raised it.
        """
        running = self._split(requests, num_shards=1 if options["timed"] else self._num_actors)
        is_done = False
        try:
            for shard in running:
                self._send(shard, options)
            while running:
                shard, part = self._receive(running)
                if part is not None:
                    yield from self._take(shard, part)
                elif shard.pending:
                    self._send(shard, options)
                else:
                    running.remove(shard)
            is_done = True
        finally:
            if not is_done:
                self.close()  # or the processes would finish what nobody waits for

    def _split(self, requests: Sequence[Request], *, num_shards: int) -> list[_Shard]:
        groups = shards(
            [r.prompt_ids for r in requests], num_shards, [_own_rows(r) for r in requests]
        )
        split = [
            _Shard(number=number, pending={requests[i].id: requests[i] for i in group})
            for number, group in enumerate(groups)
        ]
        assert sum(len(shard.pending) for shard in split) == len(requests), "ids are unique"
        return split

    def _send(self, shard: _Shard, options: Mapping[str, bool]) -> None:
        """Give a shard's open requests to its process, a new one where there is none."""
        if shard.number not in self._actors:
            self._actors[shard.number] = start_engine(self._spec)
        name = f"engine-{shard.number}-{time.time_ns()}"
        shard.rows_dir = None if self.rows_dir is None else self.rows_dir / name
        shard.told_rows = 0
        call = self._actors[shard.number].answer.options(num_returns="streaming")
        shard.stream = call.remote(
            list(shard.pending.values()),
            options,
            adapter_dir=self._adapter_dir,
            log_path=self.log_dir / f"engine-{shard.number}.log",
            rows_dir=shard.rows_dir,
        )

    def _receive(self, running: Sequence[_Shard]) -> tuple[_Shard, Part | None]:
        """The next part of any shard; None where its stream is over, or its process died."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        ready, _ = ray.wait([shard.stream for shard in running], num_returns=1)
        shard = next(shard for shard in running if shard.stream is ready[0])
        try:
            part: Part = ray.get(next(shard.stream))
            return shard, part
        except StopIteration:
            assert not shard.pending, "an engine answers every request"
        except RayTaskError as error:
            raise error.cause or error from error
        except RayError as error:  # the process, its node or what it sent is lost
            self._bury(shard, error)
        return shard, None

    def _take(self, shard: _Shard, part: Part) -> Iterator[Result]:
        """Count a part and give out its results."""
        overhead = part.overhead
        self.process_ids[shard.number] = part.process_id
        self._rows += part.rows
        shard.told_rows += part.rows
        self._shared += overhead.shared_tokens
        self._padding += overhead.padding_tokens
        shard.unclaimed_rows += part.rows - overhead.shared_tokens - overhead.padding_tokens
        for kernel, choice in part.kernels.items():
            self._kernels.setdefault(kernel, {}).setdefault(choice.partition(":")[0], choice)
        for result in part.results:
            del shard.pending[result.id]
            shard.unclaimed_rows -= result.computed_tokens
        yield from part.results

    def _bury(self, shard: _Shard, error: Exception) -> None:
        """Bill what a dead process computed for nothing, and say what happens to its requests."""
        shard.deaths += 1
        _kill(self._actors.pop(shard.number))
        untold = shard.untold_rows()
        self._rows += untold
        self._padding += shard.unclaimed_rows + untold
        shard.unclaimed_rows = 0
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:MAX_REASON]}"
        if shard.pending and shard.deaths > MAX_RESTARTS:
            raise JobFailed(
                f"engine process {shard.number} died {shard.deaths} times with "
                f"{len(shard.pending)} requests open; the last time: {reason}"
            )
        print(
            f"engine process {shard.number} died ({reason}); "
            f"{len(shard.pending)} requests without a result go to a new one"
        )


def _own_rows(request: Request) -> float:
    """What a request costs beyond its prompt, in prompt rows."""
    if isinstance(request, ScoreRequest):
        return _label_rows(request.label_ids)
    return PROMPT_ROWS_PER_DECODED_TOKEN * request.max_new_tokens


@lru_cache
def _label_rows(label_ids: tuple[tuple[int, ...], ...]) -> int:
    """Rows of the trie of labels: each distinct prefix once, without the last tokens."""
    return len(label_tree(0, (0,), label_ids).tokens) - 1


def _kill(actor: Any) -> None:
    import ray

    ray.kill(actor, no_restart=True)
