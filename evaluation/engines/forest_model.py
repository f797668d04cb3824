"""A transformers model whose attention reads a KV stack and KV slots instead of a cache.

    stack   keys and values of the path above the rows that are computed now: one copy, no batch
    slots   keys and values of each live row's own tokens while it decodes: B slots of C columns

The model's own code runs unchanged: it is switched to an attention function of this file, through
transformers' attention interface, and its linear layers to kernels.linear where that is faster. A
model of a plain form with packed layers runs through plain_layers.py instead, checked against it.
Shapes: T rows of a pass, P rows of the stack, n live rows, D width, Hq and Hkv heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor
from transformers import AttentionInterface

from evaluation.engines.adapters import Adapters, weight_and_bias
from evaluation.engines.forest import Forest, Pass
from evaluation.engines.kv import Fill, KvStack, Slots
from evaluation.engines.loading import head, load_model, takes_free_mask
from evaluation.engines.plain_layers import PlainLayers
from kernels.dispatch import Choice
from kernels.linear import choose_linear, swap_linear
from kernels.segments import Segments
from kernels.shared_prefix_attention import shared_prefix_attention
from kernels.token_logprobs import Head

ATTENTION = "crossover_forest"
MAX_CHECK_ERROR = 1e-2  # relative; 16-bit weights round, a wrong mask is off by more
MAX_LAYERS_ERROR = 1e-4  # relative; plain layers are fp32
PACKED_SHARE = 0.25  # of free memory that a second, packed copy of the weights may take
EXTRAS = ("softcap", "s_aux", "sliding_window", "position_bias")  # what our attention has not


class _Attends(Protocol):
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(Hq, T, d) from the rows' own queries (Hq, T, d), keys and values (Hkv, T, d)."""
        ...


class NotPlainAttention(Exception):
    """The model attends in a way of its own; the message says which: "the model has ..."."""


_ACTIVE: ContextVar[_Attends] = ContextVar("what the running pass attends to")


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **extras: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: (1, H, T, d) in, (1, T, Hq, d) out."""
    for name in EXTRAS:
        if extras.get(name) is not None:
            raise NotPlainAttention(f"attention with {name}")
    out = _ACTIVE.get().attend(module.layer_idx, query[0], key[0], value[0], scaling)
    return out.transpose(0, 1)[None], None


AttentionInterface.register(ATTENTION, _attention)


@dataclass(slots=True)
class _Prefill:
    """A pass over new rows below the stack. fill: where rows go in the slots, if any."""

    stack: KvStack
    work: Pass
    segments: Segments
    impl: str
    slots: Slots | None = None
    fill: Fill | None = None
    pushed: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    own_bytes: int = 0  # keys and values of the pass's rows; one layer's at a time

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        prefix_key, prefix_value = self.stack.read(layer, self.work.depth, key)
        out = shared_prefix_attention(
            query,
            key,
            value,
            prefix_key=prefix_key,
            prefix_value=prefix_value,
            segments=self.segments,
            scale=scale,
            impl=self.impl,
        )
        self.own_bytes = key.nbytes + value.nbytes
        rows = [row - self.work.low for row in self.work.pushed]
        if rows:
            self.pushed.append((key[:, rows], value[:, rows]))
        if self.slots is not None and self.fill is not None:
            for places, keys, values in (
                (self.fill.own, key, value),
                (self.fill.above, prefix_key, prefix_value),
            ):
                rows, slots, columns = places
                if len(rows):
                    self.slots.write(layer, slots, columns, keys[:, rows], values[:, rows])
        return out


@dataclass(slots=True)
class _Decode:
    """One more token for each live slot."""

    stack: KvStack
    depth: int
    slots: Slots
    columns: Tensor
    live: Tensor  # 0..n-1
    segments: Segments
    impl: str

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        self.slots.write(layer, self.live, self.columns, key, value)
        prefix_key, prefix_value = self.stack.read(layer, self.depth, key)
        return shared_prefix_attention(
            query,
            self.slots.keys[layer][:, : len(self.live)].flatten(1, 2),
            self.slots.values[layer][:, : len(self.live)].flatten(1, 2),
            prefix_key=prefix_key,
            prefix_value=prefix_value,
            segments=self.segments,
            scale=scale,
            impl=self.impl,
        )


class ForestModel:
    """A causal language model that computes passes of a forest and counts its rows.

    rows: all rows put through the input embedding; it only grows. path: token ids on the stack
    that outlive a call. kernels: what runs, and why. most_kv_bytes: keys and values held at once,
    at most so far.
    """

    def __init__(
        self, model_dir: Path, *, dtype: str, device: str, kernels: Mapping[str, Choice]
    ) -> None:
        """Load the model. kernels: which implementation of each kernel to use.

        Raises:
            NotPlainAttention: the model's attention is not plain, full attention.
            ModelError: see `load_model`.
        """
        self._model = load_model(model_dir, dtype=dtype, device=device)
        if not takes_free_mask(self._model):
            raise NotPlainAttention("sliding windows or recurrent layers")
        self.device = torch.device(device)
        self._attention_impl = kernels["shared_prefix_attention"].impl
        self._impl = {name: choice.impl for name, choice in kernels.items()}
        self.kernels = {name: f"{c.impl}: {c.reason}" for name, c in kernels.items()}
        self.kernels["linear"] = self._swap_linear()
        self.stack = KvStack()
        self.path: tuple[int, ...] = ()
        self.rows = self.most_kv_bytes = 0
        self._adapters = Adapters(self._model)
        self._adapter_path: Path | None = None
        self._hook = self._count_rows()
        self._layers: PlainLayers | None = None  # while None, transformers' modules run
        expected = self._check_attention()
        self._is_plain_form = self._check_layers(expected)
        self.head = self._prepared_head()
        self._plain_head, self._is_plain = head(self._model), True

    def _swap_linear(self) -> str:
        if self._impl["token_logprobs"] == "reference" or self.device.type != "cpu":
            return "reference"
        is_better, seen = choose_linear()
        if not is_better or self._model.dtype != torch.float32:
            return f"reference: {seen}"
        weights = sum(p.nbytes for p in self._model.base_model.parameters())
        is_packed = weights < PACKED_SHARE * psutil.virtual_memory().available
        swap_linear(self._model.base_model, is_packed=is_packed)
        return f"cpu: {seen}"

    def _prepared_head(self) -> Head:
        weight, bias = weight_and_bias(head(self._model))
        return Head(weight, bias, impl=self._impl["token_logprobs"])

    def set_adapter(self, path: Path | None) -> None:
        """Answer with an adapter, or with the base model; a change empties the stack."""
        if path == self._adapter_path:
            return  # the stack stays right: a checkpoint's files never change
        self._adapters.set(path)
        self._adapter_path, self.path = path, ()
        if head(self._model) is not self._plain_head or not self._is_plain:
            self.head = self._prepared_head()
            self._is_plain = head(self._model) is self._plain_head
        if self._is_plain_form:
            is_wrapped = self._adapters.is_wrapped
            self._layers = None if is_wrapped else PlainLayers.of(self._model.base_model)
        self._hook.remove()  # an adapter may have wrapped the embedding
        self._hook = self._count_rows()

    def _count_rows(self) -> torch.utils.hooks.RemovableHandle:
        def count(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.rows += inputs[0].numel()

        return self._model.get_input_embeddings().register_forward_pre_hook(count)

    @torch.no_grad()
    def _check_attention(self) -> Tensor:
        """Compare a small tree with the model's own attention on its two paths; returns the tree.

        A model that ignores our attention computes the tree as a chain, and is found out here.
        """
        ids, places = self._check_tree()
        paths = ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 7])
        expected = torch.stack([self._own_hidden(ids[path])[-1] for path in paths])
        self._model.set_attn_implementation(ATTENTION)
        found = self._run_tree()
        worst = (found[[6, 7]] - expected).abs().max().item()
        if not worst <= MAX_CHECK_ERROR * max(1.0, expected.abs().max().item()):
            raise NotPlainAttention(f"attention of its own kind (a tree is off by {worst:.3g})")
        return found

    @torch.no_grad()
    def _check_layers(self, expected: Tensor) -> bool:
        """Take the loop over plain layers if the model has that form and gives the same tree."""
        self._layers = PlainLayers.of(self._model.base_model)
        if self._layers is None:
            return False
        worst = (self._run_tree() - expected).abs().max().item()
        if worst <= MAX_LAYERS_ERROR * max(1.0, expected.abs().max().item()):
            self.kernels["linear"] += "; plain layers in one loop"
            return True
        self._layers = None
        self.kernels["linear"] += f"; plain layers would be off by {worst:.3g}"
        return False

    def _check_tree(self) -> tuple[Tensor, Tensor]:
        """Tokens and positions of the tree 0..4, then the branches 5 6 and 7."""
        ids = torch.arange(3, 11, device=self.device)
        return ids, torch.tensor([0, 1, 2, 3, 4, 5, 6, 5], device=self.device)

    def _run_tree(self) -> Tensor:
        work = Pass(low=0, high=8, depth=0, starts=(0,), kept=0, pushed=())
        segments = Segments.trees([[8, 8, 8, 8, 8, 7, 7, 8]], device=self.device)
        found = self._run(
            *self._check_tree(), _Prefill(self.stack, work, segments, self._attention_impl)
        )
        self.rows = 0
        return found

    def _own_hidden(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self._model.base_model(
            input_ids=ids[None], use_cache=False
        ).last_hidden_state
        return hidden[0]

    @torch.inference_mode()
    def prefill(
        self,
        forest: Forest,
        work: Pass,
        *,
        slots: Slots | None = None,
        fill: Fill | None = None,
    ) -> Tensor:
        """Hidden states (T, D) of a pass; the stack is then as the next pass needs it.

        A pass that fails, for lack of memory say, leaves the stack as it was.
        """
        tokens = torch.from_numpy(forest.tokens[work.low : work.high])
        places = torch.from_numpy(forest.depths[work.low : work.high])
        bounds = [*work.starts, work.high]
        clipped = forest.ends[work.low : work.high].clip(max=work.high)
        segments = Segments.trees(
            [
                (clipped[a - work.low : b - work.low] - a).tolist()
                for a, b in zip(bounds, bounds[1:], strict=False)
            ],
            device=self.device,
        )
        state = _Prefill(self.stack, work, segments, self._attention_impl, slots, fill)
        hidden = self._run(tokens.to(self.device), places.to(self.device), state)
        self.stack.push(work.kept, state.pushed)
        self._note_kv(slots, state.own_bytes)
        return hidden

    @torch.inference_mode()
    def decode(
        self, slots: Slots, *, tokens: Sequence[int], places: Sequence[int], depth: int
    ) -> Tensor:
        """Hidden states (n, D) after one more token in each of the first n slots.

        places: the tokens' positions. depth: rows of the stack that they all see.
        """
        live = len(tokens)
        columns = torch.tensor(slots.lengths[:live], device=self.device)
        segments = Segments.slots(columns, slots.ends[:live], capacity=slots.capacity)
        places_of_live = torch.arange(live, device=self.device)
        state = _Decode(
            self.stack, depth, slots, columns, places_of_live, segments, self._attention_impl
        )
        hidden = self._run(
            torch.tensor(tokens, device=self.device),
            torch.tensor(places, device=self.device),
            state,
        )
        for slot in range(live):
            slots.lengths[slot] += 1
        self._note_kv(slots)
        return hidden

    def _note_kv(self, slots: Slots | None, own_bytes: int = 0) -> None:
        held = own_bytes + self.stack.nbytes + (slots.nbytes if slots is not None else 0)
        self.most_kv_bytes = max(self.most_kv_bytes, held)

    def _run(self, tokens: Tensor, places: Tensor, state: _Attends) -> Tensor:
        if self._layers is not None:
            return self._layers.hidden(tokens, places, state.attend)
        with _attending(state):
            hidden: Tensor = self._model.base_model(
                input_ids=tokens[None], position_ids=places[None], use_cache=False
            ).last_hidden_state
        return hidden[0]


@contextmanager
def _attending(state: _Attends) -> Iterator[None]:
    token = _ACTIVE.set(state)
    try:
        yield
    finally:
        _ACTIVE.reset(token)
