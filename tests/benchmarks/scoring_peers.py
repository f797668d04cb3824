"""The peers that score labels: lm-evaluation-harness, and the plain transformers baseline.

lm-eval runs as its users run it (`is_shipped`), and once more on a model whose linear layers are
ours (kernels.linear), which compares ways of working and not matrix libraries. The plain baseline
is written here and always has our linear layers.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from kernels.linear import swap_linear
from tests.benchmarks.harness import Arm, best_of
from tests.benchmarks.parity import Answer, Scores
from tests.benchmarks.workloads import Workload

EVALUATOR_BATCHES = (1, 2, 4, 8, 16)
REPLICATED_BATCHES = (16, 32, 64)
FULL_BATCHES = (1, 4, 8, 16)


def load_model(model_dir: Path, *, is_shipped: bool = False, attention: str = "sdpa") -> Any:
    """The model in fp32; with our linear layers unless it is wanted as shipped."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        str(model_dir),
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        attn_implementation=attention,
    )
    model.eval()
    if not is_shipped:
        swap_linear(model, is_packed=True)
    return model


class Evaluator:
    """lm-evaluation-harness' `hf` model, called with token ids as its own loglikelihood does.

    Lengths are sorted and single-token labels of one context share a forward pass: both are what
    it does by itself.
    """

    def __init__(self, model: Any, model_dir: Path) -> None:
        """Wrap a loaded model."""
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
        self.lm: Any = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=1)

    def check_ids(self, workload: Workload) -> None:
        """Its tokenisation of text gives our token ids."""
        for item in workload.items:
            for ending, label in zip(item.endings, item.label_ids, strict=True):
                context, continuation = self.lm._encode_pair(item.context, ending)
                same = (tuple(context), tuple(continuation)) == (item.prompt_ids, label)
                assert same, f"lm-eval tokenises otherwise: {item.context[-40:]!r} {ending!r}"

    def arm(self, batch: int) -> Arm:
        """At a fixed batch size."""

        def run(workload: Workload) -> list[Answer]:
            self.lm.batch_size_per_gpu = batch
            requests = [
                ((item.context, ending), list(item.prompt_ids), list(label))
                for item in workload.items
                for ending, label in zip(item.endings, item.label_ids, strict=True)
            ]
            found = iter(self.lm._loglikelihood_tokens(requests, disable_tqdm=True))
            return [
                Scores(logprobs=tuple(next(found)[0] for _ in item.endings))
                for item in workload.items
            ]

        version = f"lm-eval {metadata.version('lm-eval')} hf"
        return Arm(name="lm-eval", version=version, run=run, settings={"batch_size": batch})


def has_evaluator() -> bool:
    """Whether lm-evaluation-harness is installed here."""
    return importlib.util.find_spec("lm_eval") is not None


class PlainBaseline:
    """What a careful user writes with transformers: a replicated prefix cache, logits where read.

    The prefix that all prompts share is prefilled once and its cache repeated for the rows of a
    batch. A row is the rest of a prompt and a label without its last token (rows with the same
    tokens are run once); rows are sorted by length and right-padded, so that causal attention
    needs no mask of its own; the head sees only hidden states that are read, which is finer than
    `logits_to_keep`. is_cached=False: full prompts, no cache.
    """

    def __init__(self, model: Any, *, batch: int, is_cached: bool = True) -> None:
        """Wrap a loaded model; batch: rows per forward pass."""
        self.model = model
        self.batch = batch
        self.is_cached = is_cached
        self.kv_bytes = 0

    def arm(self, name: str = "plain") -> Arm:
        """This baseline as an arm."""
        version = f"transformers {metadata.version('transformers')}, our plain baseline"
        return Arm(name=name, version=version, run=self.score, settings={"batch_size": self.batch})

    @torch.inference_mode()
    def score(self, workload: Workload) -> list[Answer]:
        """Log-probabilities of all labels."""
        prefix = 0
        if self.is_cached:  # one token of each prompt stays, since logits are read there
            shortest = min(len(item.prompt_ids) for item in workload.items)
            prefix = min(workload.prefix_tokens, shortest - 1)
        rows: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for i, item in enumerate(workload.items):
            for j, label in enumerate(item.label_ids):
                rows.setdefault(item.prompt_ids[prefix:] + label[:-1], []).append((i, j))
        wide = self._repeated(workload.items[0].prompt_ids[:prefix]) if prefix else None
        sums = [[0.0] * len(item.label_ids) for item in workload.items]
        ordered = sorted(rows, key=len, reverse=True)
        for first in range(0, len(ordered), self.batch):
            part = ordered[first : first + self.batch]
            hidden = self._hidden(part, cache=wide)
            reads = [
                (b, len(row) - len(label) + k, token, i, j)
                for b, row in enumerate(part)
                for i, j in rows[row]
                for label in [workload.items[i].label_ids[j]]
                for k, token in enumerate(label)
            ]
            for value, (*_, i, j) in zip(self._logprobs(hidden, reads), reads, strict=True):
                sums[i][j] += value
        return [Scores(logprobs=tuple(of_item)) for of_item in sums]

    def _repeated(self, prefix: Sequence[int]) -> DynamicCache:
        cache = DynamicCache()
        self.model.base_model(torch.tensor([prefix]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(self.batch)
        return cache

    def _hidden(self, rows: Sequence[tuple[int, ...]], *, cache: DynamicCache | None) -> Tensor:
        """Hidden states (B, L, D) of right-padded rows; the cache is left as it was."""
        width = max(map(len, rows))
        ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])
        if cache is None:
            return self.model.base_model(ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]
        used: Any = copy.copy(cache)
        used.layers = [copy.copy(layer) for layer in cache.layers]
        if len(rows) < self.batch:
            used.batch_select_indices(torch.arange(len(rows)))
        hidden: Tensor = self.model.base_model(
            ids, past_key_values=used, use_cache=True
        ).last_hidden_state
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in used.layers)
        self.kv_bytes = max(self.kv_bytes, held)
        return hidden

    def _logprobs(
        self, hidden: Tensor, reads: Sequence[tuple[int, int, int, int, int]]
    ) -> list[float]:
        """log P(token) at (row, column) of each read; each hidden state is projected once."""
        places = sorted({(b, column) for b, column, *_ in reads})
        index = {place: n for n, place in enumerate(places)}
        at = torch.tensor(places)
        logprobs = self.model.lm_head(hidden[at[:, 0], at[:, 1]]).log_softmax(-1)  # (N, V)
        rows = torch.tensor([index[b, column] for b, column, *_ in reads])
        tokens = torch.tensor([token for _, _, token, *_ in reads])
        return logprobs[rows, tokens].tolist()  # type: ignore[no-any-return]


def best_evaluator(evaluator: Evaluator, sample: Workload) -> tuple[Arm, dict[str, float]]:
    """lm-eval at its best fixed batch size."""
    return best_of([evaluator.arm(batch) for batch in EVALUATOR_BATCHES], sample)


def best_plain(
    model: Any, sample: Workload, *, is_cached: bool
) -> tuple[PlainBaseline, dict[str, float]]:
    """The plain baseline at its best batch size (16 or more where the cache is replicated)."""
    sizes = REPLICATED_BATCHES if is_cached else FULL_BATCHES
    candidates = [PlainBaseline(model, batch=b, is_cached=is_cached) for b in sizes]
    best, seconds = best_of([c.arm() for c in candidates], sample)
    chosen = best.settings["batch_size"]
    return next(c for c in candidates if c.batch == chosen), seconds
