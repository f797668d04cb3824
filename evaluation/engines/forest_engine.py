"""The forest engine: every needed row once, label tries in one pass, decoding without copies."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from conf.groups import EngineConfig
from evaluation.engines.base import (
    GenerateRequest,
    GenerateResult,
    Overhead,
    ScoreRequest,
    ScoreResult,
    TextCodec,
)
from evaluation.engines.decoding import check_finite
from evaluation.engines.forest import Forest, Pass, build_forest, common_length, next_pass
from evaluation.engines.forest_bill import ForestBill
from evaluation.engines.forest_decoding import Decoder, Ended, Generating, Mode, S, Searching
from evaluation.engines.forest_model import ForestModel
from evaluation.engines.memory import RowsPerPass
from kernels.dispatch import Choice
from kernels.memory import is_out_of_memory
from kernels.token_logprobs import token_logprobs

NO_MEMORY = "not enough memory for this request alone"
SLOTS = 64  # live rows: a decoding step of 64 forwards 1.5 times the tokens per second of one of 32


class ForestEngine:
    """Answers with a transformers model on one device; see `Engine` for the contract."""

    name = "forest"

    def __init__(
        self,
        config: EngineConfig,
        *,
        model_dir: Path,
        renderer: TextCodec,
        dtype: str,
        device: str,
        threads: int,
        kernels: Mapping[str, Choice],
    ) -> None:
        """Load the model; threads: of the CPU, for this whole process.

        kernels: the implementation of each, see `usable_kernels`.

        Raises:
            NotPlainAttention: the model's attention is not plain, full attention.
        """
        torch.set_num_threads(threads)
        self._codec = renderer
        self._model = ForestModel(model_dir, dtype=dtype, device=device, kernels=kernels)
        self._rows_per_pass = RowsPerPass(config.batch_tokens, device=self._model.device)
        self._slots = config.batch_size or SLOTS
        self._is_sharing = config.prefix_cache
        self._shared = self._lost = 0
        self.rows_projected = 0

    @property
    def rows_computed(self) -> int:
        """All rows put through the input embedding since the engine was built."""
        return self._model.rows

    @property
    def kv_bytes(self) -> int:
        """The most bytes of keys and values that were held at once."""
        return self._model.most_kv_bytes

    @property
    def kernels(self) -> dict[str, str]:
        """Which implementation of each kernel runs, and why."""
        return dict(self._model.kernels)

    def set_adapter(self, path: Path | None) -> None:
        """Answer with the adapter in this directory from now on; None: with the base model."""
        self._model.set_adapter(path)

    def take_shared(self) -> Overhead:
        """Shared rows, and rows of passes that ran out of memory, since this was last asked."""
        taken = Overhead(shared_tokens=self._shared, padding_tokens=self._lost)
        self._shared = self._lost = 0
        return taken

    def score(
        self, requests: Sequence[ScoreRequest], *, timed: bool = False, winner_only: bool = False
    ) -> Iterator[ScoreResult]:
        """Log-probabilities of all labels, or the best label alone."""
        run = self._find_winners if winner_only else self._score_all
        if not timed:
            yield from run(requests)
            return
        self._warm([request.prompt_ids for request in requests])
        for request in requests:
            started = time.perf_counter()
            (result,) = run([request])
            seconds = time.perf_counter() - started
            yield dataclasses.replace(result, first_token_seconds=seconds, total_seconds=seconds)

    def generate(
        self, requests: Sequence[GenerateRequest], *, timed: bool = False
    ) -> Iterator[GenerateResult]:
        """Completions, greedy or sampled."""
        if timed:
            self._warm([request.prompt_ids for request in requests])
        for part in [[request] for request in requests] if timed else [requests]:
            started = time.perf_counter()
            for index, done, cached, computed in self._decode(Generating(part, self._codec), part):
                end = None if done is None else done.state
                result = GenerateResult(
                    id=part[index].id,
                    completion_ids=tuple(end.ids) if end else (),
                    text=end.text if end else "",
                    cached_tokens=cached,
                    computed_tokens=computed,
                    completion_tokens=end.num_generated if end else 0,
                    error=None if end else NO_MEMORY,
                )
                if timed and end:
                    result = dataclasses.replace(
                        result,
                        first_token_seconds=end.first_token_time - started,
                        total_seconds=time.perf_counter() - started,
                    )
                yield result

    # -- all labels ---------------------------------------------------------------------------

    def _score_all(self, requests: Sequence[ScoreRequest]) -> Iterator[ScoreResult]:
        """One pass over each item's trie, many items in a pass; results in the forest's order."""
        if not requests:
            return
        prompts = [request.prompt_ids for request in requests]
        labels = [request.label_ids for request in requests]
        forest = build_forest(prompts, labels, known=self._model.path)
        bill = ForestBill(forest, prompts)
        logprobs = np.full(len(forest.read_rows), np.nan)
        last_rows = forest.last_read_rows()
        waiting = np.argsort(last_rows, kind="stable").tolist()[::-1]
        for work, hidden in self._passes(forest, prompts):
            if hidden is not None:
                self._shared += bill.add(work)
                self._read(forest, work, hidden, logprobs)
            while waiting and last_rows[waiting[-1]] < work.high:
                index = waiting.pop()
                result = _scored(requests[index], index, forest, logprobs)
                if result.error is not None:
                    self._lost += bill.lost(index)
                    yield result
                    continue
                yield dataclasses.replace(
                    result, cached_tokens=bill.cached(index), computed_tokens=bill.owned(index)
                )

    def _read(
        self, forest: Forest, work: Pass, hidden: Tensor, logprobs: NDArray[np.float64]
    ) -> None:
        """Project the scored rows of a pass, each once."""
        low, high = np.searchsorted(forest.read_rows, [work.low, work.high])
        if low == high:
            return
        scored, places = np.unique(forest.read_rows[low:high] - work.low, return_inverse=True)
        self.rows_projected += len(scored)
        with torch.no_grad():
            values = token_logprobs(
                hidden[torch.from_numpy(scored).to(hidden.device)],
                self._model.head,
                rows=torch.from_numpy(places).to(hidden.device),
                tokens=torch.from_numpy(forest.read_tokens[low:high]).to(hidden.device),
            )
        check_finite(values)
        logprobs[low:high] = values.double().cpu().numpy()

    def _passes(
        self, forest: Forest, prompts: Sequence[tuple[int, ...]]
    ) -> Iterator[tuple[Pass, Tensor | None]]:
        """Run all passes; one that runs out of memory is split, one row that does is given up.

        A row that is given up yields its whole subtree with None.
        """
        keep = self._begin(prompts)
        low = forest.num_known
        while low < len(forest.tokens):
            size = self._rows_per_pass
            work = next_pass(forest, low, max_rows=size.rows, last_path=range(keep))
            before, hidden = self._model.rows, None
            try:
                with size.measured(work.num_rows):
                    hidden = self._model.prefill(forest, work)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._lost += self._model.rows - before
                size.back_off(work.num_rows)
            if hidden is not None:
                yield work, hidden
                low = work.high
            elif work.num_rows == 1:
                low, keep = int(forest.ends[low]), 0
                yield dataclasses.replace(work, high=low, pushed=()), None
        self._model.path = prompts[0][:keep]

    def _warm(self, prompts: Sequence[tuple[int, ...]]) -> None:
        """Have on the stack what timed requests share, as an engine in service has."""
        if len(prompts) < 2 or not self._is_sharing:
            return
        shared = common_length(min(prompts), max(prompts))
        prefix = prompts[0][: min(shared, min(map(len, prompts)) - 1)]
        if not prefix or self._model.path[: len(prefix)] == prefix:
            return
        forest = build_forest([prefix], known=self._model.path)
        for work, _ in self._passes(forest, [prefix, prefix]):
            self._shared += work.num_rows

    def _begin(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """How many rows to leave on the stack for a later call: what all prompts begin with.

        A single prompt keeps of the stack what it shares with it, and adds nothing.
        """
        known, self._model.path = self._model.path, ()
        if not self._is_sharing:
            return 0
        low, high = (known, prompts[0]) if len(prompts) == 1 else (min(prompts), max(prompts))
        return common_length(low, high)

    # -- token by token -----------------------------------------------------------------------

    def _find_winners(self, requests: Sequence[ScoreRequest]) -> Iterator[ScoreResult]:
        """The best label of each item; only trie nodes that could lead to it are forwarded."""
        mode = Searching(requests)
        for index, done, cached, computed in self._decode(mode, requests):
            winner = None if done is None else done.state.winner
            yield ScoreResult(
                id=requests[index].id,
                label_logprobs=(),
                first_token_logprobs=(),
                winner=winner.label if winner else None,
                winner_logprob=winner.logprob if winner else None,
                cached_tokens=cached,
                computed_tokens=computed,
                error=None if winner else NO_MEMORY,
            )
        self.rows_projected += mode.projected

    def _decode(
        self, mode: Mode[S], requests: Sequence[ScoreRequest] | Sequence[GenerateRequest]
    ) -> Iterator[tuple[int, Ended[S] | None, int, int]]:
        """Per request its index, how it ended (None: no memory alone), cached and computed tokens.

        Out of memory, what has not ended begins again in half as many slots.
        """
        todo, size = list(range(len(requests))), self._slots
        while todo:
            prompts = [requests[index].prompt_ids for index in todo]
            forest = build_forest(prompts, known=self._model.path)
            bill, before, claimed = ForestBill(forest, prompts), self._model.rows, 0
            ended: set[int] = set()
            try:
                for done in self._decoder(mode, forest, prompts, todo, size, bill).run():
                    ended.add(done.request)
                    computed = bill.owned(done.request) + done.forwarded
                    claimed += computed
                    yield todo[done.request], done, bill.cached(done.request), computed
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self._lost += self._model.rows - before - bill.shared - claimed
            todo = [index for place, index in enumerate(todo) if place not in ended]
            if size == 1:
                yield todo.pop(0), None, 0, 0
            size = max(1, min(size, len(todo)) // 2)

    def _decoder(
        self,
        mode: Mode[S],
        forest: Forest,
        prompts: Sequence[tuple[int, ...]],
        numbers: Sequence[int],
        size: int,
        bill: ForestBill,
    ) -> Decoder[S]:
        keep = self._begin(prompts)

        def on_pass(work: Pass) -> None:
            self._shared += bill.add(work)
            if work.high == len(forest.tokens):
                self._model.path = prompts[0][:keep]

        return Decoder(
            model=self._model,
            mode=mode,
            forest=forest,
            numbers=numbers,
            lengths=[len(prompt) for prompt in prompts],
            base=min(keep, min(map(len, prompts)) - 1),
            size=size,
            max_rows=self._rows_per_pass.rows,
            last_path=range(keep),
            on_pass=on_pass,
        )


def _scored(
    request: ScoreRequest, index: int, forest: Forest, logprobs: NDArray[np.float64]
) -> ScoreResult:
    """Sums over each label's tokens; a request whose rows had no memory has no scores."""
    low, high = np.searchsorted(forest.piece_labels, forest.label_starts[[index, index + 1]])
    values = logprobs[forest.piece_reads[low:high]]
    labels = forest.piece_labels[low:high] - forest.label_starts[index]
    is_failed = bool(np.isnan(values).any())
    firsts = values[forest.first_pieces[low:high]]
    return ScoreResult(
        id=request.id,
        label_logprobs=() if is_failed else tuple(np.bincount(labels, weights=values).tolist()),
        first_token_logprobs=() if is_failed else tuple(firsts.tolist()),
        cached_tokens=0,
        computed_tokens=0,
        error=NO_MEMORY if is_failed else None,
    )
