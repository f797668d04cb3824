"""One base model under many LoRA adapters that train at once, each on rows of its own.

A pass is a sequence of parts, each some rows of one adapter, laid out as that adapter alone would
lay them out (training/packing.py): a common prefix is shared within a part and never between two,
for its rows depend on the adapter. Every linear layer multiplies all rows by the base at once and
adds each part's low-rank product (kernels/grouped_lora.py); attention is a call for each part; all
else works row by row. So a part computes what it computes alone, and its nan stays with it.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

from conf.errors import ConfigError, ModelError
from conf.methods import LoraMethod
from conf.records import RenderedExample
from kernels.grouped_lora import Adapter, grouped_lora
from kernels.linear import Linear
from training.adapters import add_adapter
from training.attention import attach, attends_by_part
from training.data import joined_batch, num_targets
from training.item_trees import ItemTree, ItemTrees
from training.job import TrainJob
from training.lora import is_plain_adapter
from training.loss import usable
from training.model import Trainee, build, linear_choice
from training.packing import Layout

# Adapters of a base in 16 bits are kept and updated in fp32, and rounded for each product: steps of
# AdamW are often smaller than what 8 bits of bf16 can tell apart.
HALF = (torch.bfloat16, torch.float16)


class Part(NamedTuple):
    """Rows that an adapter forwards together."""

    adapter: str
    rows: Sequence[RenderedExample]


@dataclasses.dataclass(slots=True)
class RowRanges:
    """Whose rows of the running pass are whose: range k is starts[k] to starts[k + 1].

    Parts of one adapter that lie side by side are one range. One object for all layers of a model,
    set anew for each pass. No context variable: on a GPU backward runs in a thread of its own,
    where checkpointed layers are computed again.
    """

    adapters: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()


class PackLinear(PeftLinear):
    """peft's layer with each adapter on its own rows. peft finds layers by "Linear" in the name."""

    impl: str
    ranges: RowRanges

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """From x (..., in) to (..., out), inside a pass of a pack."""
        base: Any = self.get_base_layer()
        adapters = [self._adapter(name) for name in self.ranges.adapters]
        return grouped_lora(x, base.weight, self.ranges.starts, adapters, base.bias, impl=self.impl)

    def _adapter(self, name: str) -> Adapter | None:
        """None where this layer is not a target of the adapter."""
        if name not in self.lora_A:
            return None
        a, b = cast(nn.Linear, self.lora_A[name]), cast(nn.Linear, self.lora_B[name])
        dtype = cast(Any, self.get_base_layer()).weight.dtype
        return Adapter(a.weight.to(dtype), b.weight.to(dtype), self.scaling[name])


class PackModel:
    """A base model with the adapters of a pack. layout: how one trial's rows become parts."""

    def __init__(
        self, job: TrainJob, *, adapter: str, linear: tuple[bool, str] | None = None
    ) -> None:
        """Load the base of a job, with its adapter.

        linear: as of `linear_choice`; None: what that says here.

        Raises:
            ModelError, ConfigError: a model or method that cannot be packed; see `add`.
        """
        self._device = job.device
        self._ranges = RowRanges()
        self._last = ""  # an adapter that is to go, and is the only one
        self._impl = usable("grouped_lora", job).impl
        choice = linear or linear_choice(job, stage=0)
        self.is_linear_swapped = choice[0]
        self._trainee: Trainee = build(job, adapter=adapter, linear=choice)
        assert isinstance(self._trainee.model, PeftModel)
        self.model: PeftModel = self._trainee.model
        self.layout: Layout = self._trainee.layout
        self._require_packed(job)
        self._fit(job, adapter=adapter)
        if job.device != "cpu":
            self.model.to(job.device)

    @property
    def reason(self) -> str:
        """What runs, and why, for people."""
        return f"{self._trainee.linear}; grouped_lora: {self._impl}; {self.layout.reason}"

    @property
    def total_parameters(self) -> int:
        """Parameters of the base."""
        return sum(p.numel() for name, p in self.model.named_parameters() if ".lora_" not in name)

    def add(self, job: TrainJob, *, adapter: str) -> None:
        """One more adapter, drawn as it would be on a model of its own.

        Raises:
            ConfigError: target_modules that the model does not have, or its head.
        """
        assert isinstance(job.method, LoraMethod)
        add_adapter(
            self.model,
            job.method,
            arm_name=job.arm_name,
            seed=job.trainer.seed,
            adapter=adapter,
        )
        self._fit(job, adapter=adapter)
        if self._last:
            self.remove(self._last)

    def remove(self, adapter: str) -> None:
        """Free an adapter's weights and gradients; of the last one, when another is added.

        For peft wants an active adapter that exists, though it means nothing here.
        """
        others = [name for name in self.model.peft_config if name != adapter]
        self._last = "" if others else adapter
        if not others:
            return
        self.model.set_adapter(others[0])
        with warnings.catch_warnings():  # of which adapter is active now
            warnings.simplefilter("ignore")
            self.model.delete_adapter(adapter)
        self._train_all()

    def named_parameters(self, adapter: str) -> list[tuple[str, nn.Parameter]]:
        """An adapter's parameters by name."""
        return [(n, p) for n, p in self.model.named_parameters() if f".{adapter}." in n]

    def backward(self, parts: Sequence[Part]) -> list[float]:
        """One pass: the sum of each part's losses; their gradients add up in the adapters."""
        with self._assigned(self._owners(parts)):
            losses = self._losses(parts)
            torch.autograd.backward(losses.sum())
        return [float(own.detach().double().sum()) for own in _by_part(losses, parts)]

    @torch.no_grad()
    def logprobs(self, parts: Sequence[Part]) -> list[list[float]]:
        """One pass without gradients: for each part log p(targets) of each of its rows, summed."""
        with self._assigned(self._owners(parts)):
            losses = self._losses(parts).double()
        return [
            logprob_sums(own, list(map(num_targets, part.rows)))
            for part, own in zip(parts, _by_part(losses, parts), strict=True)
        ]

    @torch.no_grad()
    def item_logprobs(
        self, adapter: str, items: ItemTrees, trees: Sequence[ItemTree]
    ) -> list[list[float]]:
        """One pass over some items: for each log p(targets) of each of its rows, summed."""
        batch = items.batch(trees)
        with self._assigned([(adapter, batch.input_ids.numel())]):
            losses = self._trainee.loss(batch.to(self._device), reduction="none").double()
        each = torch.split(losses, [len(tree.targets) for tree in trees])
        return [logprob_sums(own, tree.row_targets) for own, tree in zip(each, trees, strict=True)]

    def num_tokens(self, part: Part) -> int:
        """Tokens that a part puts through the embedding."""
        return self.layout.num_tokens(part.rows)

    def passes(self, parts: Sequence[Part], *, max_tokens: int) -> Iterator[list[Part]]:
        """Parts in order, so many in a pass as max_tokens allows, and at least one."""
        ready: list[Part] = []
        for part in parts:
            if ready and sum(map(self.num_tokens, [*ready, part])) > max_tokens:
                yield ready
                ready = []
            ready.append(part)
        if ready:
            yield ready

    def _losses(self, parts: Sequence[Part]) -> Tensor:
        """-log p of each target, (N,), part by part."""
        batch = joined_batch([part.rows for part in parts], shares_prefix=True)
        loss: Tensor = self._trainee.loss(batch.to(self._device), reduction="none")
        return loss

    def _owners(self, parts: Sequence[Part]) -> list[tuple[str, int]]:
        return [(part.adapter, self.num_tokens(part)) for part in parts]

    @contextmanager
    def _assigned(self, owners: Sequence[tuple[str, int]]) -> Iterator[None]:
        """So many rows of each adapter, in order."""
        own = [(name, list(found)) for name, found in groupby(owners, key=lambda o: o[0])]
        sizes = [sum(size for _, size in found) for _, found in own]
        self._ranges.adapters = tuple(name for name, _ in own)
        self._ranges.starts = tuple(accumulate(sizes, initial=0))
        try:
            yield
        finally:
            self._ranges.adapters = self._ranges.starts = ()

    def _fit(self, job: TrainJob, *, adapter: str) -> None:
        """Give the layers of a new adapter our forward, and its weights their gradients."""
        base = self.model.get_base_model()
        if isinstance(base.get_output_embeddings(), PeftLinear):  # type: ignore[operator]
            self.remove(adapter)
            raise ConfigError(
                f"arms.{job.arm_name}.target_modules",
                found="the output head",
                expected="layers below it: in a pack the head serves all trials at once",
            )
        for module in self.model.modules():
            if not isinstance(module, PeftLinear) or adapter not in module.lora_A:
                continue
            if type(module.get_base_layer()) not in (nn.Linear, Linear) or not is_plain_adapter(
                module, adapter
            ):
                raise ModelError(
                    job.model_dir,
                    found=f"a layer of type {type(module.get_base_layer()).__name__} with LoRA",
                    expected="plain linear layers, which trials can share in a pack",
                    remedy="train its trials one by one",
                )
            for side in (module.lora_A[adapter], module.lora_B[adapter]):
                if side.weight.dtype in HALF:
                    side.float()
            module.__class__ = PackLinear
            module.impl, module.ranges = self._impl, self._ranges  # type: ignore[assignment]
        self._train_all()

    def _train_all(self) -> None:
        """All adapters train, where peft lets the active one alone."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".lora_" in name)

    def _require_packed(self, job: TrainJob) -> None:
        """Refuse a model whose rows cannot lie side by side."""
        reason = "" if self.layout.is_packed else self.layout.reason
        base: Any = self.model.get_base_model()
        if not reason and not attends_by_part(base):
            reason = attach(base, is_whole=True)
        if not reason and not self.layout.shares_prefix:
            reason = "something is dropped at random, by another stream than it would be alone"
        if reason:
            raise ModelError(
                job.model_dir,
                found=reason,
                expected="a model whose rows can be packed, for trials that train in one pass",
                remedy="train its trials one by one",
            )


def _by_part(losses: Tensor, parts: Sequence[Part]) -> tuple[Tensor, ...]:
    """The losses (N,) of each part's targets."""
    return torch.split(losses, [sum(map(num_targets, part.rows)) for part in parts])


def logprob_sums(losses: Tensor, counts: Sequence[int]) -> list[float]:
    """Minus the losses (N,) of rows with so many targets each, summed by row."""
    return [-float(row.sum()) for row in torch.split(losses, list(counts))]
