"""The loss of a pass: sum of -log p over its target tokens, which alone meet the head.

The kernel takes the decoder's target rows and the head's weight, and never holds their logits. It
must know what a model does after its head, so it is used only where a probe shows that it does.
Elsewhere a hook on the head picks the target rows out, and all else is the model's own.

B: rows of a pass, L: longest row, T: tokens of a packed pass, N: its targets, D: width,
V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels.dispatch import Choice, choose
from kernels.linear import Linear
from kernels.linear_cross_entropy import Shaping, linear_cross_entropy, shaped
from training.attention import seeing
from training.data import Batch
from training.job import TrainJob

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PROBE = 60.0  # logits of -PROBE to PROBE: a cap of 30, the usual one, changes them by half
# Of the largest value. The same numbers go the same way twice; 16 bits round what follows the head.
MAX_PROBE_ERROR = {torch.float32: 1e-5, torch.float64: 1e-5}
MAX_PROBE_ERROR_16_BITS = 2e-2


class TargetLoss(nn.Module):
    """A causal language model as the sum of -log p(target) over a pass's target tokens.

    On SmolLM2-135M a LoRA step ran 380 tokens/s so, against 280 with all logits. The loss is
    computed in fp32 at least. choice: whether the kernel runs, and why.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        *,
        head: nn.Module,
        choice: Choice | None = None,
        shaping: Shaping | None = None,
    ) -> None:
        """Prepare the head.

        Args:
            model: with or without adapters.
            head: its output layer.
            choice: of linear_cross_entropy.
            shaping: what the model does after its head; None: the model's own code does it.
        """
        super().__init__()
        self.model = model
        self.choice = choice or Choice(impl="reference", reason="not asked for")
        self._shaping = shaping
        self._kept_head = (head,)  # in a tuple: it is a part of the model, not of this module
        self._positions: Tensor | None = None
        if shaping is None:
            head.register_forward_pre_hook(self._keep_target_rows)

    def _keep_target_rows(self, _head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = inputs  # (B, L, D)
        assert self._positions is not None, "the head ran outside a training pass"
        return (hidden.flatten(0, 1)[self._positions].unsqueeze(0), *rest)  # (1, N, D)

    def forward(self, batch: Batch, reduction: str = "sum") -> Tensor:
        """The loss of a pass, (): a sum over its N target tokens, 0 where N is 0.

        reduction: none for the losses of the targets, (N,), where no gradient is asked for or the
            head is frozen.
        """
        if self._shaping is not None:
            return self._by_kernel(batch, self._shaping, reduction)
        self._positions = batch.positions
        with seeing(batch, model=self.model) as view:
            logits = self.model(input_ids=batch.input_ids, use_cache=False, **view).logits
        self._positions = None
        logits = logits.squeeze(0).to(torch.promote_types(logits.dtype, torch.float32))  # (N, V)
        return nn.functional.cross_entropy(logits, batch.targets, reduction=reduction)

    def _by_kernel(self, batch: Batch, shaping: Shaping, reduction: str) -> Tensor:
        with seeing(batch, model=self.model) as view:
            hidden = _hidden(self.model, input_ids=batch.input_ids, **view)  # (B, L, D)
        head: Any = self._kept_head[0]
        weight, bias = head.weight, head.bias
        if not torch.is_grad_enabled():  # nothing trains now, and `none` asks for that
            weight, bias = weight.detach(), None if bias is None else bias.detach()
        return linear_cross_entropy(
            hidden.flatten(0, 1)[batch.positions],  # (N, D)
            weight,
            batch.targets,
            bias,
            soft_cap=shaping.soft_cap,
            scale=shaping.scale,
            reduction=reduction,
            impl=self.choice.impl,
        )


def target_loss(
    model: PreTrainedModel | PeftModel, *, head: nn.Module, job: TrainJob, stage: int
) -> TargetLoss:
    """The loss for a job: with the kernel where it may run and is right, else through the model.

    Args:
        model: with its adapters, if there are any, where it was built.
        head: the model's output layer.
        job: says device, dtype and kernels.impl.
        stage: of ZeRO.
    """
    choice = usable("linear_cross_entropy", job)
    if choice.impl == "reference":
        return TargetLoss(model, head=head, choice=choice)
    shaping, reason = _find_shaping(model, head=head, stage=stage)
    if shaping is None:
        choice = Choice(impl="reference", reason=reason)
    return TargetLoss(model, head=head, choice=choice, shaping=shaping)


def usable(kernel: str, job: TrainJob) -> Choice:
    """The implementation of a kernel for a job: kernels.impl, or the reference where that is wrong.

    Raises:
        KernelsNotBuilt: for an implementation that cannot run on the device.
    """
    wanted = choose(job.kernels_impl, job.device)
    if wanted.impl == "reference":
        return wanted
    from kernels.checks import check_kernels

    (found,) = check_kernels(job.device, getattr(torch, job.dtype), wanted.impl, only=(kernel,))
    if found.is_ok:
        return wanted
    return Choice(impl="reference", reason=f"{wanted.impl} {found.reason}")


def _find_shaping(
    model: PreTrainedModel | PeftModel, *, head: nn.Module, stage: int
) -> tuple[Shaping | None, str]:
    """What the model does after its head, if the kernel can do it; else why not."""
    if stage == 3:
        return None, "ZeRO-3 shards the head"
    if type(head) not in (nn.Linear, Linear):  # an adapter, or quantised
        return None, f"the head is a {type(head).__name__}"
    if _decoder(model) is None:
        return None, "the model has no decoder of its own"
    was_training = model.training
    model.train(False)
    try:
        return _probe(model, head)
    finally:
        model.train(was_training)


@torch.no_grad()
def _probe(model: PreTrainedModel | PeftModel, head: nn.Module) -> tuple[Shaping | None, str]:
    """Run 3 tokens with known numbers in the place of the head's logits; see what becomes of them.

    So a factor or cap is found however small this model's own logits are.
    """
    weight: Any = head.weight
    probe = torch.linspace(-PROBE, PROBE, len(weight), device=weight.device).to(weight.dtype)
    inputs: list[Tensor] = []

    def put(_head: nn.Module, given: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        inputs.append(given[0])
        return probe.expand_as(logits).clone()

    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight[:3].unsqueeze(0)  # its hooks count tokens, and these are nobody's
    hook = head.register_forward_hook(put)
    try:
        found: Tensor = model(inputs_embeds=rows, use_cache=False).logits
    finally:
        hook.remove()
    if len(inputs) != 1 or not _agree(_hidden(model, inputs_embeds=rows), inputs[0]):
        return None, "the head does not take the decoder's last rows"
    for shaping in _known_shapings(model):
        if _agree(shaped(probe.float(), shaping).expand(found.shape), found):
            return shaping, ""
    return None, "the model does something unknown after its head"


def _agree(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    tolerance = MAX_PROBE_ERROR.get(wanted.dtype, MAX_PROBE_ERROR_16_BITS)
    worst = (found.float() - wanted.float()).abs().max()
    return bool(worst <= tolerance * wanted.float().abs().max())  # nan does not agree


def _known_shapings(model: PreTrainedModel | PeftModel) -> Iterator[Shaping]:
    """What a model's configuration may mean. Granite divides by logits_scaling, others multiply."""
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    cap = getattr(config, "final_logit_softcapping", None)
    scales = [1.0]
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"):
        value = getattr(config, name, None)
        if isinstance(value, (int, float)) and value:
            scales += [float(value), 1 / value]
    for scale in scales:
        yield Shaping(soft_cap=cap or None, scale=scale)


def _decoder(model: PreTrainedModel | PeftModel) -> nn.Module | None:
    """The model without its head; None where it has no such part."""
    whole: Any = model
    if hasattr(whole, "get_base_model"):  # peft's wrapper
        whole = whole.get_base_model()
    decoder: nn.Module = whole.base_model
    return None if decoder is whole else decoder


def _hidden(model: PreTrainedModel | PeftModel, **inputs: Tensor | None) -> Tensor:
    """The decoder's last rows, (B, L, D)."""
    decoder = _decoder(model)
    assert decoder is not None
    hidden: Tensor = decoder(use_cache=False, **inputs)[0]
    return hidden
