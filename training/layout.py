"""Which layout a training's passes have: packed where the model lets us say what a token sees."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING

from torch import nn

from training.attention import attach
from training.job import MASKED_PASS_TOKENS, PASS_TOKENS, TrainJob
from training.loss import usable
from training.packing import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose_layout(
    job: TrainJob, *, model: PreTrainedModel, trainee: nn.Module, stage: int = 0
) -> Layout:
    """Packed passes where the model lets us say what each token sees, padded ones elsewhere.

    Switches the model to attention without a T x T mask where packed passes can have it.

    Args:
        job: what is trained.
        model: the model itself.
        trainee: the model with its adapters, whose dropout counts too: a shared prefix would be
            dropped out alike for all rows of a pass, so it is shared only where nothing is dropped.
        stage: of ZeRO; under 3 no weights are here to check the switch with.
    """
    obstacle = "kernels.impl=reference" if job.kernels_impl == "reference" else _obstacle(model)
    if obstacle is not None:
        return Layout(
            is_packed=False,
            shares_prefix=False,
            max_rows=job.padded_rows,
            max_tokens=MASKED_PASS_TOKENS[job.device],
            reason=obstacle,
        )
    mask_reason = _kernel_obstacle(job) or attach(model, is_whole=stage != 3)
    drops = _drops(model, trainee)
    shares = "no prefix is shared: dropout" if drops else "common prefixes computed once"
    attention = f"under a mask, {mask_reason}" if mask_reason else "row by row"
    return Layout(
        is_packed=True,
        shares_prefix=not drops,
        max_rows=job.max_rows,
        max_tokens=(MASKED_PASS_TOKENS if mask_reason else PASS_TOKENS)[job.device],
        reason=f"{shares}; attention {attention}",
    )


def _obstacle(model: PreTrainedModel) -> str | None:
    """Why rows of this model cannot be packed, or None.

    Sliding windows, recurrent layers and ALiBi count tokens by their place in memory.
    """
    config = model.config.get_text_config(decoder=True)
    windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # newer configurations name each layer's kind, and may keep an unused window
        kinds = ["windowed" if any(windows) else "full_attention"]
    if set(kinds) != {"full_attention"} or getattr(model, "_is_stateful", False):
        return "the model has layers other than full attention"
    if getattr(config, "alibi", False) or "position_ids" not in signature(model.forward).parameters:
        return "the model takes no position ids"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"{config._attn_implementation} attention takes no mask"
    return None


def _kernel_obstacle(job: TrainJob) -> str:
    """Why our attention cannot run for a job; empty where it can."""
    if job.device != "cpu":
        return f"the device is {job.device}"
    choice = usable("shared_prefix_attention", job)
    return choice.reason if choice.impl == "reference" else ""


def _drops(model: PreTrainedModel, trainee: nn.Module) -> bool:
    """Whether anything is dropped at random while training."""
    if getattr(model.config.get_text_config(decoder=True), "attention_dropout", 0.0):
        return True
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in trainee.modules())
