"""Our side: an engine behind the project's own interface, and gates that need no clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf.groups import EngineConfig
from evaluation.engines import build_engine
from evaluation.engines.base import Engine, GenerateRequest, ScoreRequest
from tests.benchmarks.bounds import Continued, Work, needed
from tests.benchmarks.harness import Arm
from tests.benchmarks.parity import Answer, Completion, Scores, Winner
from tests.benchmarks.workloads import Builder, Workload


class EndlessCodec:
    """Text and ids of a tokenizer, with no token that ends an answer: lengths are then fixed."""

    end_ids: tuple[int, ...] = ()

    def __init__(self, builder: Builder) -> None:
        """Wrap a workload builder's tokenizer."""
        self._builder = builder

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._builder.encode(text))

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        return self._builder.decode(ids)


def load_engine(name: str, model_dir: Path, builder: Builder, *, threads: int) -> Engine:
    """The engine that is measured, in fp32 on the CPU."""
    return build_engine(
        EngineConfig(name=name),
        model_dir=model_dir,
        adapter_dir=None,
        renderer=EndlessCodec(builder),
        dtype="float32",
        device="cpu",
        threads=threads,
        task=None,
    )


def our_arm(engine: Engine, *, kind: str) -> Arm:
    """kind: all (every label's score) | winner | generate."""

    def forget() -> None:
        # A request that shares nothing: the prefix an earlier run left is not there any more.
        list(engine.score([ScoreRequest(id="other", prompt_ids=(1, 1), label_ids=((1,),))]))

    def run(workload: Workload) -> list[Answer]:
        return generate(engine, workload) if kind == "generate" else score(engine, workload, kind)

    return Arm(name=f"ours, {kind}", version=engine.name, run=run, prepare=forget)


def score(engine: Engine, workload: Workload, kind: str) -> list[Answer]:
    """Scores of all labels, or the winner, per item."""
    requests = [
        ScoreRequest(id=str(i), prompt_ids=item.prompt_ids, label_ids=item.label_ids)
        for i, item in enumerate(workload.items)
    ]
    found = {r.id: r for r in engine.score(requests, winner_only=kind == "winner")}
    answers: list[Answer] = []
    for request in requests:
        result = found[request.id]
        assert result.error is None, result.error
        if kind == "winner":
            assert result.winner is not None and result.winner_logprob is not None
            answers.append(Winner(index=result.winner, logprob=result.winner_logprob))
        else:
            answers.append(Scores(logprobs=result.label_logprobs))
    return answers


def generate(engine: Engine, workload: Workload) -> list[Answer]:
    """Greedy completions of fixed lengths."""
    requests = [
        GenerateRequest(id=str(i), prompt_ids=item.prompt_ids, max_new_tokens=count)
        for i, (item, count) in enumerate(zip(workload.items, workload.new_tokens, strict=True))
    ]
    found = {r.id: r for r in engine.generate(requests)}
    return [Completion(ids=found[request.id].completion_ids) for request in requests]


def continued(workload: Workload, answers: Sequence[Answer] = ()) -> list[Continued]:
    """(prompt, continuation) of all that has to be scored.

    answers: winners narrow it to their own labels (the least that an exact search needs), and
    completions take the labels' place.
    """
    if not answers:
        return [(item.prompt_ids, label) for item in workload.items for label in item.label_ids]
    pairs: list[Continued] = []
    for item, answer in zip(workload.items, answers, strict=True):
        match answer:
            case Winner(index=index):
                pairs.append((item.prompt_ids, item.label_ids[index]))
            case Completion(ids=ids):
                pairs.append((item.prompt_ids, ids))
            case Scores():
                pairs += [(item.prompt_ids, label) for label in item.label_ids]
    return pairs


@dataclass(slots=True)
class Counts:
    """rows: through any embedding. kv_bytes: the most keys and values the engine held at once."""

    rows: int = 0
    kv_bytes: int = 0
    samples: list[int] = field(default_factory=list)


@contextmanager
def counting(engine: Engine) -> Iterator[Counts]:
    """Count with a hook on every embedding of the process: the engine's own count is not asked."""
    counts = Counts()

    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        counts.kv_bytes = max(counts.kv_bytes, kv_bytes(engine))
        if isinstance(module, torch.nn.Embedding):
            counts.rows += inputs[0].numel()

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield counts
    finally:
        handle.remove()


def kv_bytes(engine: Engine) -> int:
    """Bytes of keys and values that the engine holds now; 0 where it does not say."""
    held: Any = getattr(engine, "kv_bytes", 0)
    return int(held)


@dataclass(kw_only=True, slots=True, frozen=True)
class Gate:
    """Rows that an untimed run put through the embedding, and the number of needed prefixes."""

    rows: int
    needed: Work
    kv_bytes: int

    @property
    def is_exact(self) -> bool:
        """Whether nothing was computed twice, padded or left out."""
        return self.rows == self.needed.rows


def gate(engine: Engine, arm: Arm, workload: Workload) -> Gate:
    """Run once outside the clock and count."""
    arm.prepare()
    with counting(engine) as counts:
        answers = arm.run(workload)
        counts.kv_bytes = max(counts.kv_bytes, kv_bytes(engine))
    return Gate(
        rows=counts.rows,
        needed=needed(continued(workload, answers)),
        kv_bytes=counts.kv_bytes,
    )
