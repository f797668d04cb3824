"""Attention of packed passes: each row to itself and to the prefix they share, and nothing else.

transformers would need a T x T mask for it; at 600 tokens a third of a LoRA pass then goes into
scores that no token sees. The model's own code runs unchanged: through transformers' attention
interface it calls a function of this file, which knows the running pass from a context.

On a GPU the mask stays: torch's variable-length attention has no shared prefix, and none was at
hand to test another way on. Shapes: T tokens of a pass, Hq and Hkv heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kernels.segments import Segments
from kernels.shared_prefix_attention import shared_prefix_attention
from training.data import Batch, visibility

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

ATTENTION = "crossover_packed"
EXTRAS = ("softcap", "s_aux", "sliding_window", "position_bias")  # what our attention has not
DROPOUTS = ("attention_dropout", "attn_pdrop", "attn_dropout")  # as configurations name it
MAX_CHECK_ERROR = 1e-2  # relative; 16-bit weights round, a wrong mask is off by more


@dataclass(frozen=True, eq=False)
class PackedPass:
    """What the tokens of a packed pass see. numbers, ends: (T,) as Batch.segments and ends."""

    numbers: Tensor
    ends: Tensor | None = None

    @cached_property
    def prefix(self) -> int:
        """Tokens of the prefix; they stand in front."""
        return int((self.numbers == 0).sum())

    @cached_property
    def segments(self) -> Segments:
        """The prefix, if there is one, and the rest of each row or item, as chains or trees."""
        lengths = torch.bincount(self.numbers).tolist()
        lengths = lengths if self.prefix else lengths[1:]
        if self.ends is None:
            return Segments.chains(lengths)
        starts = accumulate(lengths, initial=0)
        parts = torch.split(self.ends, lengths)
        # Nothing outside the prefix's own segment is in its keys, so it ends with that.
        trees = [
            (part - start).clamp(max=len(part)).tolist()
            for part, start in zip(parts, starts, strict=False)
        ]
        return Segments.trees(trees)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(Hq, T, d) from queries (Hq, T, d), keys and values (Hkv, T, d); differentiable."""
        return shared_prefix_attention(
            query,
            key,
            value,
            prefix_key=key[:, : self.prefix],
            prefix_value=value[:, : self.prefix],
            segments=self.segments,
            scale=scale,
            prefix_from=self.prefix,
            impl="cpu",
        )


@dataclass(frozen=True, eq=False)
class JoinedPass:
    """Several packed passes in one forward pass; none sees another."""

    parts: tuple[PackedPass, ...]


def passes_of(batch: Batch) -> PackedPass | JoinedPass:
    """What the tokens of a packed or joined pass see."""
    assert batch.segments is not None
    if batch.parts is None:
        return PackedPass(batch.segments, batch.ends)
    return JoinedPass(
        tuple(PackedPass(part) for part in torch.split(batch.segments, list(batch.parts)))
    )


_PASS: ContextVar[PackedPass | JoinedPass | None] = ContextVar(
    "the packed pass that runs", default=None
)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **extras: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: (1, H, T, d) in, (1, T, Hq, d) out.

    Outside a packed pass, and for what our attention has not, torch's own, masked if need be. A
    joined pass is a call for each part: in one call, padded or masked, a part that is not a number
    would reach others, since a weight of 0 times nan is nan.
    """
    options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, **extras}
    work = _PASS.get()
    if not isinstance(work, JoinedPass):
        return _attend(work, module, query, key, value, attention_mask, options), None
    sizes = [len(part.numbers) for part in work.parts]
    parts = zip(
        work.parts, *(torch.split(t, sizes, dim=2) for t in (query, key, value)), strict=True
    )
    outs = [_attend(part, module, q, k, v, None, options) for part, q, k, v in parts]
    return torch.cat(outs, dim=1), None


def _attend(
    work: PackedPass | None,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """(1, T, Hq, d), by our kernel where it can."""
    is_plain = options["dropout"] == 0.0 and query.shape[2:] == key.shape[2:] == value.shape[2:]
    has_extras = any(options.get(name) is not None for name in EXTRAS)
    if work is None or not is_plain or has_extras or query.device.type != "cpu":
        if work is not None:
            attention_mask = visibility(work.numbers, dtype=query.dtype, ends=work.ends)
        out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **options)[
            0
        ]
        return out
    scaling = options["scaling"]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return work.attend(query[0], key[0], value[0], scale).transpose(0, 1)[None]


AttentionInterface.register(ATTENTION, _attention)


@contextmanager
def _attending(work: PackedPass | JoinedPass | None) -> Iterator[None]:
    token = _PASS.set(work)
    try:
        yield
    finally:
        _PASS.reset(token)


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For torch's activation checkpointing: a layer that is computed again, when its pass has long
    ended, sees what it saw. A `context_fn`: called where a layer runs for the first time.
    """
    return nullcontext(), _attending(_PASS.get())


@contextmanager
def seeing(
    batch: Batch, *, model: PreTrainedModel | PeftModel
) -> Iterator[dict[str, Tensor | None]]:
    """The arguments that tell a model what each token of a pass sees; call it inside.

    Position ids only where they are not 0, 1, 2, ...; a mask only where attention is not ours.
    """
    if batch.segments is None:
        with _attending(None):
            yield {"attention_mask": batch.attention_mask}
    elif _implementation(model) == ATTENTION:
        with _attending(passes_of(batch)):
            yield {"position_ids": batch.position_ids}
    else:
        assert batch.parts is None, "a joined pass needs our attention"
        mask = visibility(batch.segments, dtype=model.dtype, ends=batch.ends)
        yield {"attention_mask": mask, "position_ids": batch.position_ids}


def attach(model: PreTrainedModel, *, is_whole: bool) -> str:
    """Switch a model that takes packed passes to our attention, which is for CPUs.

    Args:
        model: with its adapters or without.
        is_whole: whether its weights are here, so that the switch can be checked; not under ZeRO-3.

    Returns:
        Why it stays under a mask; empty where it does not.
    """
    config = model.config.get_text_config(decoder=True)
    if _implementation(model) != "sdpa" or not model._supports_attention_backend:
        return "the model attends in a way of its own"
    if any(getattr(config, name, None) for name in DROPOUTS):
        return "attention weights are dropped"
    model.set_attn_implementation(ATTENTION)
    reason = _check(model) if is_whole else ""
    if reason:
        model.set_attn_implementation("sdpa")
    return reason


def attends_by_part(model: PreTrainedModel | PeftModel) -> bool:
    """Whether a model takes joined passes."""
    return _implementation(model) == ATTENTION


def _implementation(model: PreTrainedModel | PeftModel) -> str | None:
    name: str | None = model.config.get_text_config(decoder=True)._attn_implementation
    return name


@torch.no_grad()
def _check(model: PreTrainedModel) -> str:
    """Compare a small packed pass with its last row alone; empty where they agree.

    A model that ignores our attention lets that row see the one before it, and is found out here.
    """
    was_training = model.training
    model.train(False)
    # Rows of the embedding's weight: its hooks count tokens, and these are nobody's.
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight[3:12].unsqueeze(0)
    numbers = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])
    places = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 4, 5]])
    with _attending(PackedPass(numbers)):
        found = _hidden(model, rows, position_ids=places)
    wanted = _hidden(model, rows[:, numbers % 2 == 0])
    model.train(was_training)
    worst = float((found[0, 7:] - wanted[0, 4:]).abs().max())
    if worst <= MAX_CHECK_ERROR * max(1.0, float(wanted.abs().max())):
        return ""
    return f"the model attends in a way of its own (a row is off by {worst:.3g})"


def _hidden(model: PreTrainedModel, rows: Tensor, **places: Tensor) -> Tensor:
    hidden: Tensor = model.base_model(
        inputs_embeds=rows, use_cache=False, **places
    ).last_hidden_state
    return hidden
