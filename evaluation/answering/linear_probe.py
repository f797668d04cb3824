"""A linear probe: logistic regression on the base model's hidden states, the cheapest tuned arm.

Hidden states depend on the item alone, so a features job computes them once, and every set of
labels fits on them in seconds. Heavy libraries are imported where they are needed.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from conf.choices import Pooling, TaskKind
from conf.errors import ConfigError, JobFailed
from conf.methods import LinearProbeMethod
from conf.records import Item, LedgerLine, Progress
from conf.resolve import Arm
from evaluation.answering.references import Emitted, reference_record, with_best_strength
from evaluation.prepare import context_for
from evaluation.prompts import first_call, get_style
from evaluation.prompts.rendering import Renderer
from evaluation.tasks import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Floats = npt.NDArray[np.float32]

FEATURES_FILE = "features.npz"
PASS_TOKENS = 1024  # of a forward pass, padding included
TIMED_ITEMS = 8


@dataclass(kw_only=True, slots=True, frozen=True)
class Features:
    """Hidden states by the hash of the item's content.

    rows: content hash -> (D,) pooled state. tokens: content hash -> tokens of its prompt. seconds:
    content hash -> wall seconds of the pass, for the items that were timed alone.
    """

    rows: Mapping[str, Floats]
    tokens: Mapping[str, int]
    seconds: Mapping[str, float]

    def of(self, items: Sequence[Item]) -> Floats:
        """(N, D) states of these items."""
        return np.stack([self.rows[item.sha256] for item in items])


def check_probe(task: Task, *, arm: str) -> None:
    """Refuse what a probe cannot learn; for use before anything starts."""
    if task.kind is not TaskKind.classification:
        raise ConfigError(
            f"arms.{arm}",
            found=f"a linear probe on a {task.kind.name} task",
            expected="a classification task",
            remedy=f"drop it: ~method@arms.{arm}",
        )


def compute_features(
    job: str,
    arm: Arm,
    *,
    task: Task,
    model: PreTrainedModel,
    renderer: Renderer,
    devices: int,
    usd_per_device_second: float | None,
    path: Path,
) -> Iterator[LedgerLine | Progress]:
    """Write the features of all items of a task, and bill their tokens.

    Raises:
        JobFailed: a prompt over the model's context.
    """
    method = arm.method
    assert isinstance(method, LinearProbeMethod), f"{arm.name} is no probe"
    prompts = _prompts(arm, task, renderer)
    timed = list(dict.fromkeys(item.sha256 for item in task.items["test"]))[:TIMED_ITEMS]
    begun = time.perf_counter()
    rows: dict[str, Floats] = {}
    computed = 0
    for batch in _batches(prompts, pass_tokens=PASS_TOKENS):
        longest = max(len(prompts[name]) for name in batch)
        computed += longest * len(batch)
        states = pooled_states(model, [prompts[name] for name in batch], pooling=method.pooling)
        rows |= dict(zip(batch, states, strict=True))
        yield Progress(done=len(rows), total=len(prompts), unit="items")
    seconds = time.perf_counter() - begun
    timings = {}
    for name in timed:
        started = time.perf_counter()
        pooled_states(model, [prompts[name]], pooling=method.pooling)
        timings[name] = time.perf_counter() - started
    tokens = sum(map(len, prompts.values()))
    spent = {
        "reference": (tokens, seconds),
        "padding": (computed - tokens, 0.0),
        "latency": (sum(len(prompts[name]) for name in timed), sum(timings.values())),
    }
    for purpose, (count, wall) in spent.items():
        usd = None if usd_per_device_second is None else wall * devices * usd_per_device_second
        yield LedgerLine(
            job=job,
            arm=arm.name,
            purpose=purpose,
            tokens=count,
            device_seconds=wall * devices,
            usd=usd,
        )
    lengths = {name: len(ids) for name, ids in prompts.items()}
    write_features(Features(rows=rows, tokens=lengths, seconds=timings), path)


def _prompts(arm: Arm, task: Task, renderer: Renderer) -> dict[str, tuple[int, ...]]:
    """The token ids of each different content, by its hash."""
    style, context = get_style(arm.answering.prompt), context_for(task, arm)
    prompts: dict[str, tuple[int, ...]] = {}
    for item in (item for items in task.items.values() for item in items):
        if item.sha256 not in prompts:
            call = first_call(style, item, context)
            ids = tuple(renderer.encode(renderer.render(call.messages, call.prefix)))
            if len(ids) > renderer.max_length:
                raise JobFailed(
                    f"item {item.id}: a prompt of {len(ids)} tokens over the model's context of "
                    f"{renderer.max_length}"
                )
            prompts[item.sha256] = ids
    return prompts


def _batches(
    prompts: Mapping[str, tuple[int, ...]], *, pass_tokens: int
) -> Iterator[tuple[str, ...]]:
    """Names in batches of similar length that take at most so many rows, padding included."""
    batch: list[str] = []
    for name in sorted(prompts, key=lambda name: (len(prompts[name]), name)):
        if batch and len(prompts[name]) * (len(batch) + 1) > pass_tokens:
            yield tuple(batch)
            batch = []
        batch.append(name)
    if batch:
        yield tuple(batch)


def pooled_states(
    model: PreTrainedModel, prompts: Sequence[tuple[int, ...]], *, pooling: Pooling
) -> Floats:
    """(B, D) last hidden states of the prompts, averaged over tokens or of the last one, fp32."""
    import torch

    longest = max(map(len, prompts))
    ids = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
        mask[row, : len(prompt)] = 1
    with torch.inference_mode():
        hidden = model.base_model(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
        ).last_hidden_state.float()
        states = _pooled(hidden, mask.to(model.device), pooling=pooling)
    return np.asarray(states.cpu().numpy(), dtype=np.float32)


def _pooled(hidden: torch.Tensor, mask: torch.Tensor, *, pooling: Pooling) -> torch.Tensor:
    """(B, L, D), (B, L) -> (B, D)."""
    import torch

    lengths = mask.sum(dim=1)
    if pooling is Pooling.last:
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]
    return (hidden * mask[..., None]).sum(dim=1) / lengths[:, None]


def write_features(features: Features, path: Path) -> None:
    """One npz file, whole or not at all."""
    names = sorted(features.rows)
    timed = sorted(features.seconds)
    partial = path.with_suffix(".partial.npz")
    partial.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        partial,
        names=np.array(names),
        rows=np.stack([features.rows[name] for name in names]),
        tokens=np.array([features.tokens[name] for name in names], dtype=np.int64),
        timed=np.array(timed, dtype=np.str_),
        seconds=np.array([features.seconds[name] for name in timed], dtype=np.float64),
    )
    partial.replace(path)


def read_features(path: Path) -> Features:
    """What write_features wrote; nothing is unpickled."""
    with np.load(path, allow_pickle=False) as file:
        names = [str(name) for name in file["names"]]
        rows, tokens = file["rows"], file["tokens"]
        timed = zip((str(name) for name in file["timed"]), file["seconds"], strict=True)
        return Features(
            rows=dict(zip(names, rows, strict=True)),
            tokens={name: int(count) for name, count in zip(names, tokens, strict=True)},
            seconds={name: float(seconds) for name, seconds in timed},
        )


def linear_probe(job: str, arm: Arm, *, task: Task, features: Path) -> Iterator[Emitted]:
    """Fit on the training items, answer validation and test; device_seconds are of one core.

    A timed request is its forward pass and the classifier's answer.
    """
    known = read_features(features)
    labels = [str(item.label) for item in task.items["train"]]
    if len(set(labels)) < 2:
        raise JobFailed("a linear probe needs two labels among its training items")
    pipeline = _pipeline()  # importing is no part of the fit's price
    started = time.perf_counter()
    model = with_best_strength(pipeline, known.of(task.items["train"]), labels)
    classes = [str(label) for label in model.classes_]
    seconds = time.perf_counter() - started
    yield LedgerLine(job=job, arm=arm.name, purpose="reference", device_seconds=seconds)
    count = 0
    for set_name, items in _sets(task, known):
        for item, row, wall in _answers(model, known, items, is_timed=set_name == "latency"):
            logprobs = dict(zip(classes, map(float, row), strict=True))
            best = max(logprobs, key=lambda label: logprobs[label])
            tokens = known.tokens[item.sha256]
            record = reference_record(
                task, item, arm.name, set_name, best, logprobs=logprobs, seconds=wall, tokens=tokens
            )
            count += 1
            yield record
    yield Progress(done=count, total=count, unit="answers", note="linear probe")


def _sets(task: Task, known: Features) -> list[tuple[str, Sequence[Item]]]:
    timed = [item for item in task.items["test"] if item.sha256 in known.seconds]
    return [
        ("validation", task.items["validation"]),
        ("test", task.items["test"]),
        ("latency", timed),
    ]


def _answers(
    model: Any, known: Features, items: Sequence[Item], *, is_timed: bool
) -> Iterable[tuple[Item, Any, float | None]]:
    """Each item, its log-probabilities, and the seconds of a request like it where timed."""
    if not items:
        return
    if not is_timed:
        rows = model.predict_log_proba(known.of(items))
        yield from zip(items, rows, [None] * len(items), strict=True)
        return
    for item in items:
        begun = time.perf_counter()
        row = model.predict_log_proba(known.of([item]))[0]
        yield item, row, known.seconds[item.sha256] + time.perf_counter() - begun


def _pipeline() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
