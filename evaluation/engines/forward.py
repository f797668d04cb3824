"""A model that counts its rows and keeps a shared prefix; the transformers engine computes with it.

Shapes: B rows of a batch, P tokens of the shared prefix, L tokens of the longest row after it,
N hidden states whose logits are read, V vocabulary, D width. Logits are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from evaluation.engines.loading import (
    head,
    load_adapter,
    load_model,
    takes_free_mask,
    unload_adapter,
)
from evaluation.engines.rows import Row, chain, common_prefix

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(slots=True, frozen=True)
class _Prefix:
    """Token ids of a prefix, and each layer's keys and values as (1, heads, P, head width)."""

    ids: tuple[int, ...] = ()
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class CountedModel:
    """A causal language model on one device, with one shared prefix in memory.

    rows: all rows put through the input embedding. shared: those of shared prefixes. padding:
    those that fill batches up, or that a batch without enough memory lost. All only grow.
    """

    def __init__(self, model_dir: Path, *, dtype: str, device: str, is_sharing: bool) -> None:
        """Load the model; is_sharing: keep prefixes (never for models that take no free mask)."""
        self._model = load_model(model_dir, dtype=dtype, device=device)
        self.device = torch.device(device)
        self.is_free = takes_free_mask(self._model)
        self._is_sharing = is_sharing and self.is_free
        self._adapter: PeftModel | None = None
        self._modules = dict(self._model.named_modules())
        self._prefix = _Prefix()
        self.rows = self.shared = self.padding = 0
        self._hook = self._count_rows()

    @property
    def prefix_length(self) -> int:
        """P, tokens of the shared prefix that rows now stand behind."""
        return len(self._prefix.ids)

    def set_adapter(self, path: Path | None) -> None:
        """Swap the adapter without loading the base again; the base's weights are never written."""
        if self._adapter is not None:
            unload_adapter(self._model, self._adapter, modules=self._modules)
            self._adapter = None
        if path is not None:
            self._adapter = load_adapter(self._model, path)
        self._prefix = _Prefix()
        self._hook.remove()  # an adapter may have wrapped the embedding
        self._hook = self._count_rows()

    def _count_rows(self) -> torch.utils.hooks.RemovableHandle:
        def count(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self.rows += inputs[0].numel()

        return self._model.get_input_embeddings().register_forward_pre_hook(count)

    def share(self, prompts: Sequence[tuple[int, ...]]) -> int:
        """Have the prompts' common prefix computed; returns its length P.

        At least one token of each prompt stays its own, since its logits are read there. What an
        earlier call left is cut or extended, so only new rows are computed (and billed as shared).
        A single prompt uses what an earlier call left and computes nothing for others.
        """
        if not prompts or not self._is_sharing:
            return 0
        known = self._prefix
        others = prompts if len(prompts) > 1 else [*prompts, known.ids]
        wanted = min(common_prefix(others), min(len(prompt) for prompt in prompts) - 1)
        kept = min(common_prefix([known.ids, prompts[0]]), wanted)
        self._prefix = _Prefix(
            known.ids[:kept], [(k[:, :, :kept], v[:, :, :kept]) for k, v in known.layers]
        )
        if wanted > kept:
            cache = self.batch_cache(1)
            self.forward([chain(0, prompts[0][kept:wanted])], cache=cache)
            self.shared += wanted - kept
            self._prefix = _Prefix(prompts[0][:wanted], _layers(cache))
        return wanted

    def batch_cache(self, size: int) -> DynamicCache:
        """A cache with the shared prefix for `size` rows, as views: nothing is copied here."""
        if not self.is_free:
            return DynamicCache(config=self._model.config)
        cache = DynamicCache()
        for index, (keys, values) in enumerate(self._prefix.layers):
            # `update` would copy the prefix once to make it and again with the rows' own keys.
            cache.update(keys[:, :, :0], values[:, :, :0], index)
            layer = cache.layers[index]
            assert isinstance(layer, DynamicLayer)
            layer.keys = keys.expand(size, -1, -1, -1)
            layer.values = values.expand(size, -1, -1, -1)
        return cache

    @torch.inference_mode()
    def forward(self, rows: Sequence[Row], *, cache: DynamicCache) -> Tensor:
        """Hidden states (B, L, D) of rows that stand right behind the shared prefix."""
        prefix = self.prefix_length
        lengths = [len(row.tokens) for row in rows]
        width = max(lengths)
        self.padding += len(rows) * width - sum(lengths)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        places = torch.full((len(rows), width), prefix, dtype=torch.long)
        for b, row in enumerate(rows):
            ids[b, : lengths[b]] = torch.tensor(row.tokens)
            places[b, : lengths[b]] = torch.tensor(row.depths()) + prefix
        mask: Tensor | None = None  # rows of one length need no mask but the causal one
        if not all(row.is_chain for row in rows):
            mask = tree_mask(rows, prefix=prefix, dtype=self._model.dtype)
        elif min(lengths) < width:
            mask = self.padding_mask(rows)
        return self._hidden(ids, places=places, mask=mask, cache=cache)

    @torch.inference_mode()
    def next_logits(
        self, tokens: Sequence[int], *, places: Sequence[int], mask: Tensor, cache: DynamicCache
    ) -> Tensor:
        """Logits (B, V) after one more token per row. mask: (B, P + L + generated), 1 if real."""
        hidden = self._hidden(
            torch.tensor(tokens)[:, None],
            places=torch.tensor(places)[:, None],
            mask=mask if self.is_free else None,  # others run alone, without a gap
            cache=cache,
        )
        return self.logits(hidden[:, -1])

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (N, V) of hidden states (N, D)."""
        logits: Tensor = head(self._model)(hidden)
        return logits.float()

    def padding_mask(self, rows: Sequence[Row]) -> Tensor:
        """(B, P + L): 1 for the prefix and each row's own tokens, 0 for the padding after them."""
        lengths = torch.tensor([len(row.tokens) for row in rows])
        own = torch.arange(int(lengths.max())) < lengths[:, None]
        prefix = torch.ones(len(rows), self.prefix_length, dtype=torch.bool)
        return torch.cat([prefix, own], dim=1).long().to(self.device)

    def _hidden(
        self, ids: Tensor, *, places: Tensor, mask: Tensor | None, cache: DynamicCache
    ) -> Tensor:
        hidden: Tensor = self._model.base_model(
            input_ids=ids.to(self.device),
            position_ids=places.to(self.device),
            attention_mask=None if mask is None else mask.to(self.device),
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    layers: list[tuple[Tensor, Tensor]] = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None and layer.values is not None
        layers.append((layer.keys, layer.values))
    return layers


def tree_mask(rows: Sequence[Row], *, prefix: int, dtype: torch.dtype) -> Tensor:
    """(B, 1, L, P + L), added to attention: 0 for prefix, ancestors and itself, else lowest."""
    width = max(len(row.tokens) for row in rows)
    seen = torch.zeros(len(rows), width, prefix + width, dtype=torch.bool)
    seen[:, :, :prefix] = True
    seen[:, :, prefix:] = torch.eye(width, dtype=torch.bool)
    for b, row in enumerate(rows):
        own = seen[b, :, prefix:]
        trunk = row.trunk
        own[:trunk, :trunk] = torch.ones(trunk, trunk, dtype=torch.bool).tril()
        for node in range(trunk, len(row.tokens)):
            own[node] |= own[row.parents[node]]
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]
