"""The transformers engine: a shared prefix computed once, logits only where they are read."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from conf.groups import EngineConfig
from evaluation.engines.base import (
    GenerateRequest,
    GenerateResult,
    Overhead,
    ScoreRequest,
    ScoreResult,
    TextCodec,
    only_winner,
)
from evaluation.engines.decoding import Completion, check_finite, decode_batch, start
from evaluation.engines.forward import CountedModel
from evaluation.engines.rows import Done, Row, chain, in_batches, label_tree, paths
from kernels.memory import is_out_of_memory

T = TypeVar("T")

# Padding per real row that a batch may have. Scoring pays for each padded row; a decoding step of
# 5 rows takes a 135M model on 2 cores half as long as one of 32, so generation wants full batches.
SCORE_PADDING_SHARE = 0.1
GENERATE_PADDING_SHARE = 0.5
BATCH_SIZE = 32  # rows per forward pass where none is asked for
HEAD_ROWS = 256  # hidden states per head multiplication: 256 x 49,152 fp32 logits are 50 MB
NO_MEMORY = "not enough memory for this request alone"


class TransformersEngine:
    """Answers with a transformers model on one device; see `Engine` for the contract."""

    name = "transformers"

    def __init__(
        self,
        config: EngineConfig,
        *,
        model_dir: Path,
        renderer: TextCodec,
        dtype: str,
        device: str,
        threads: int,
    ) -> None:
        """Load the model; threads: of the CPU, for this whole process."""
        torch.set_num_threads(threads)
        self._batch_size = config.batch_size or BATCH_SIZE
        self._codec = renderer
        self._model = CountedModel(
            model_dir, dtype=dtype, device=device, is_sharing=config.prefix_cache
        )
        self._taken = Overhead()
        self.kernels: dict[str, str] = {}  # none of ours; why, where it stands in for the forest

    @property
    def rows_computed(self) -> int:
        """All rows put through the input embedding since the engine was built."""
        return self._model.rows

    def set_adapter(self, path: Path | None) -> None:
        """Answer with the adapter in this directory from now on; None: with the base model."""
        self._model.set_adapter(path)

    def take_shared(self) -> Overhead:
        """Shared and padding rows since this was last asked."""
        now = Overhead(shared_tokens=self._model.shared, padding_tokens=self._model.padding)
        before, self._taken = self._taken, now
        return Overhead(
            shared_tokens=now.shared_tokens - before.shared_tokens,
            padding_tokens=now.padding_tokens - before.padding_tokens,
        )

    def score(
        self, requests: Sequence[ScoreRequest], *, timed: bool = False, winner_only: bool = False
    ) -> Iterator[ScoreResult]:
        """Log-probabilities of each request's labels; winner_only costs as much here."""
        by_id = {request.id: request for request in requests}
        for result in self._score(requests, timed=timed):
            yield only_winner(by_id[result.id], result) if winner_only else result

    def _score(self, requests: Sequence[ScoreRequest], *, timed: bool) -> Iterator[ScoreResult]:
        """All labels' log-probabilities."""
        cut = self._model.share([request.prompt_ids for request in requests])
        groups: list[list[Row]] = []
        for index, request in enumerate(requests):
            tree = label_tree(index, request.prompt_ids[cut:], request.label_ids)
            groups.append([tree] if self._model.is_free or tree.is_chain else paths(tree))
        if not timed:
            yield from self._score_groups(requests, groups, cut=cut)
            return
        for group in groups:
            started = time.perf_counter()
            (result,) = self._score_groups(requests, [group], cut=cut)
            seconds = time.perf_counter() - started
            yield dataclasses.replace(result, first_token_seconds=seconds, total_seconds=seconds)

    def generate(
        self, requests: Sequence[GenerateRequest], *, timed: bool = False
    ) -> Iterator[GenerateResult]:
        """Completions, greedy or sampled."""
        cut = self._model.share([request.prompt_ids for request in requests])
        rows = [chain(i, request.prompt_ids[cut:]) for i, request in enumerate(requests)]
        if not timed:
            # Rows of one length waste no padding; rows of one limit leave the batch together.
            rows.sort(key=lambda r: (-requests[r.request].max_new_tokens, -len(r.tokens)))
            yield from self._generate_rows(requests, rows, cut=cut)
            return
        for row in rows:
            started = time.perf_counter()
            (result,) = self._generate_rows(requests, [row], cut=cut, started=started)
            yield dataclasses.replace(result, total_seconds=time.perf_counter() - started)

    def _score_groups(
        self, requests: Sequence[ScoreRequest], groups: Sequence[Sequence[Row]], *, cut: int
    ) -> Iterator[ScoreResult]:
        """Run all rows, longest first; a request is ready when the last of its rows is."""
        rows = sorted((row for group in groups for row in group), key=lambda r: -len(r.tokens))
        missing = {group[0].request: len(group) for group in groups}
        computed = dict.fromkeys(missing, 0)
        failed: set[int] = set()
        sums = {index: [0.0] * len(requests[index].label_ids) for index in missing}
        firsts = {index: list(values) for index, values in sums.items()}
        score = self._score_batch
        for done in self._in_batches(
            rows, size=self._batch_size, max_padding_share=SCORE_PADDING_SHARE, run=score
        ):
            index = done.row.request
            if done.value is None:
                failed.add(index)
            else:
                for piece, logprob in zip(done.row.pieces, done.value, strict=True):
                    sums[index][piece.label] += logprob
                    if piece.node == len(requests[index].prompt_ids) - cut - 1:
                        firsts[index][piece.label] = logprob
            missing[index] -= 1
            computed[index] += done.computed_tokens
            if missing[index] == 0:
                yield ScoreResult(
                    id=requests[index].id,
                    label_logprobs=() if index in failed else tuple(sums[index]),
                    first_token_logprobs=() if index in failed else tuple(firsts[index]),
                    cached_tokens=cut,
                    computed_tokens=computed[index],
                    error=NO_MEMORY if index in failed else None,
                )

    def _score_batch(self, batch: list[Row]) -> Iterator[Done[list[float]]]:
        for row, values in zip(batch, self._piece_logprobs(batch), strict=True):
            yield Done(row=row, value=values, computed_tokens=len(row.tokens))

    @torch.inference_mode()
    def _piece_logprobs(self, batch: Sequence[Row]) -> list[list[float]]:
        """Log-probabilities of each row's pieces; V-wide logits exist for scored nodes only."""
        hidden = self._model.forward(batch, cache=self._model.batch_cache(len(batch)))  # (B, L, D)
        nodes = sorted({(b, piece.node) for b, row in enumerate(batch) for piece in row.pieces})
        values: dict[tuple[int, int, int], float] = {}
        tokens: dict[tuple[int, int], set[int]] = {node: set() for node in nodes}
        for b, row in enumerate(batch):
            for piece in row.pieces:
                tokens[b, piece.node].add(piece.token)
        for first in range(0, len(nodes), HEAD_ROWS):
            part = nodes[first : first + HEAD_ROWS]
            at = torch.tensor(part, device=hidden.device)
            logprobs = self._model.logits(hidden[at[:, 0], at[:, 1]]).log_softmax(-1)  # (N, V)
            check_finite(logprobs.max(-1).values)
            read = [(n, token) for n, node in enumerate(part) for token in tokens[node]]
            index = torch.tensor(read, device=hidden.device)
            for (n, token), value in zip(
                read, logprobs[index[:, 0], index[:, 1]].tolist(), strict=True
            ):
                values[*part[n], token] = value
        return [[values[b, p.node, p.token] for p in row.pieces] for b, row in enumerate(batch)]

    def _generate_rows(
        self,
        requests: Sequence[GenerateRequest],
        rows: list[Row],
        *,
        cut: int,
        started: float | None = None,
    ) -> Iterator[GenerateResult]:
        def run(batch: list[Row]) -> Iterator[Done[Completion]]:
            live = [start(row, requests[row.request]) for row in batch]
            return decode_batch(self._model, live, codec=self._codec)

        size = self._batch_size if self._model.is_free else 1
        for done in self._in_batches(
            rows, size=size, max_padding_share=GENERATE_PADDING_SHARE, run=run
        ):
            end = done.value
            first = None if end is None or started is None else end.first_token_time - started
            yield GenerateResult(
                id=requests[done.row.request].id,
                completion_ids=tuple(end.ids) if end else (),
                text=end.text if end else "",
                cached_tokens=cut,
                computed_tokens=done.computed_tokens,
                completion_tokens=end.num_generated if end else 0,
                first_token_seconds=first,
                error=None if end else NO_MEMORY,
            )

    def _in_batches(
        self,
        rows: Sequence[Row],
        *,
        size: int,
        max_padding_share: float,
        run: Callable[[list[Row]], Iterator[Done[T]]],
    ) -> Iterator[Done[T]]:
        """Run rows in batches; what one computed before its memory ran out is billed as padding."""
        model = self._model
        claimed = 0  # rows of the running batch that finished rows or its padding account for

        def counted(batch: list[Row]) -> Iterator[Done[T]]:
            nonlocal claimed
            claimed = model.rows - model.padding
            for done in run(batch):
                claimed += done.computed_tokens
                yield done

        def lost() -> None:
            model.padding += model.rows - model.padding - claimed

        return in_batches(
            rows,
            size=size,
            max_padding_share=max_padding_share,
            run=counted,
            is_out_of_memory=is_out_of_memory,
            on_lost=lost,
        )
