"""The decoding loop: a batch of completions, greedy or sampled, each leaving when it ends."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from conf.errors import JobFailed
from evaluation.engines.base import GenerateRequest, TextCodec
from evaluation.engines.forward import CountedModel
from evaluation.engines.rows import Done, Row


@dataclass(slots=True)
class Completion:
    """A completion while it grows.

    ids: without the end token. num_generated: with it. text: decoded, without the stop; set when
    it ends. noise: the request's own generator; None when greedy.
    """

    row: Row
    request: GenerateRequest
    noise: torch.Generator | None
    ids: list[int] = field(default_factory=list)
    num_generated: int = 0
    text: str = ""
    first_token_time: float = 0.0


def start(row: Row, request: GenerateRequest) -> Completion:
    """An empty completion."""
    noise = None
    if request.temperature > 0:
        noise = torch.Generator().manual_seed(request.seed)  # on the CPU: equal on all devices
    return Completion(row=row, request=request, noise=noise)


def decode_batch(
    model: CountedModel, live: list[Completion], *, codec: TextCodec
) -> Iterator[Done[Completion]]:
    """Decode a batch; each completion is yielded when it ends, and its row leaves the batch.

    Rows end at different columns of the batch; the gap up to the longest stays masked, and each
    row goes on with its own positions.
    """
    rows = [completion.row for completion in live]
    end_ids = frozenset(codec.end_ids)
    offset = model.prefix_length - 1
    cache, mask = model.batch_cache(len(rows)), model.padding_mask(rows)
    logits = _first_logits(model, rows, model.forward(rows, cache=cache))
    while True:
        kept: list[int] = []
        for b, (completion, token) in enumerate(zip(live, choose(logits, live), strict=True)):
            if append(completion, token, codec=codec, end_ids=end_ids):
                forwarded = len(completion.row.tokens) + completion.num_generated - 1
                yield Done(row=completion.row, value=completion, computed_tokens=forwarded)
            else:
                kept.append(b)
        if not kept:
            return
        if len(kept) < len(live):
            live = [live[b] for b in kept]
            index = torch.tensor(kept, device=mask.device)
            cache.batch_select_indices(index)
            mask = mask[index]
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        logits = model.next_logits(
            [completion.ids[-1] for completion in live],
            places=[offset + len(c.row.tokens) + c.num_generated for c in live],
            mask=mask,
            cache=cache,
        )


def _first_logits(model: CountedModel, rows: Sequence[Row], hidden: Tensor) -> Tensor:
    last = torch.tensor([len(row.tokens) - 1 for row in rows], device=hidden.device)
    return model.logits(hidden[torch.arange(len(rows), device=hidden.device), last])


def choose(logits: Tensor, live: Sequence[Completion]) -> list[int]:
    """The next token of each row: the most likely, or a draw by Gumbel noise of the row's own."""
    best, greedy = logits.max(-1)
    check_finite(best)
    tokens: list[int] = greedy.tolist()
    for b, completion in enumerate(live):
        if completion.noise is not None:
            gumbel = -torch.empty(logits.shape[-1]).exponential_(generator=completion.noise).log()
            noisy = logits[b].cpu() / completion.request.temperature + gumbel
            tokens[b] = int(noisy.argmax())
    return tokens


def check_finite(values: Tensor) -> None:
    """Stop the job where the model computes nan or infinity: any answer would be a wrong one.

    Raises:
        JobFailed: for a value that is not finite.
    """
    if not bool(values.isfinite().all()):
        raise JobFailed("the model's logits are not finite (weights broken, or dtype too narrow)")


def append(
    completion: Completion, token: int, *, codec: TextCodec, end_ids: frozenset[int]
) -> bool:
    """Add a token; whether the completion ends with it."""
    request = completion.request
    if completion.num_generated == 0:
        completion.first_token_time = time.perf_counter()
    completion.num_generated += 1
    is_end = token in end_ids
    if not is_end:
        completion.ids.append(token)
    is_last = is_end or completion.num_generated >= request.max_new_tokens
    if is_last or request.stop:
        completion.text = codec.decode(completion.ids)
        cuts = [at for stop in request.stop if (at := completion.text.find(stop)) >= 0]
        if cuts:
            completion.text = completion.text[: min(cuts)]
            return True
    return is_last
