"""The model that trains: loaded, given adapters, wrapped so that only target rows meet the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from conf.errors import ConfigError, ModelError
from conf.methods import LoraMethod
from kernels.linear import choose_linear, swap_linear
from training.data import Batch, visibility
from training.job import PASS_TOKENS, TrainJob
from training.packing import Layout

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class TargetLoss(nn.Module):
    """A causal language model as the sum of -log p(target) over a pass's target tokens.

    The head sees the target rows alone: a hook on it picks them out of the hidden states, so
    whatever an architecture does after its head (soft caps, scales) still happens. On SmolLM2-135M
    a LoRA step ran 380 tokens/s so, against 280 with all logits. The loss is computed in fp32 at
    least.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, head: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._positions: Tensor | None = None
        head.register_forward_pre_hook(self._keep_target_rows)

    def _keep_target_rows(self, _head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, *rest = inputs  # (B, L, D)
        assert self._positions is not None, "the head ran outside a training pass"
        return (hidden.flatten(0, 1)[self._positions].unsqueeze(0), *rest)  # (1, N, D)

    def forward(self, batch: Batch) -> Tensor:
        """The loss of a pass, (): a sum over its N target tokens, 0 where N is 0."""
        self._positions = batch.positions
        logits = self.model(input_ids=batch.input_ids, use_cache=False, **self._view(batch)).logits
        self._positions = None
        logits = logits.squeeze(0).to(torch.promote_types(logits.dtype, torch.float32))  # (N, V)
        return nn.functional.cross_entropy(logits, batch.targets, reduction="sum")

    def _view(self, batch: Batch) -> dict[str, Tensor | None]:
        """What each token sees; position ids only where they are not 0, 1, 2, ..."""
        if batch.segments is None:
            return {"attention_mask": batch.attention_mask}
        mask = visibility(batch.segments, dtype=self.model.dtype)
        return {"attention_mask": mask, "position_ids": batch.position_ids}


@dataclass(kw_only=True, slots=True, frozen=True)
class Trainee:
    """A model ready to train.

    model: what is saved (with peft's wrapper for LoRA). linear: which linear product runs, and why.
    layout: how rows become passes.
    """

    loss: TargetLoss
    model: PreTrainedModel | PeftModel
    trained_parameters: int
    total_parameters: int
    linear: str
    layout: Layout


def build(job: TrainJob, *, stage: int = 0) -> Trainee:
    """Load the base model and make its parameters, or new adapters, trainable.

    Under ZeRO-3 call it while transformers knows the DeepSpeed configuration: parameters are then
    born sharded. Adapters are drawn from trainer.seed, so all workers start equal.

    Raises:
        ModelError: a directory that holds an adapter, or a model without an output head.
        ConfigError: target_modules that the model does not have.
    """
    model = _load(job)
    if job.trainer.activation_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    trainee: PreTrainedModel | PeftModel = model
    if isinstance(job.method, LoraMethod):
        trainee = _with_adapters(model, job.method, job=job)
    is_swapped, reason = linear_choice(job, stage=stage)
    if is_swapped:
        # Adapters too: thin as they are, it saves 8% of a LoRA pass.
        swap_linear(trainee, is_packed=False)
    trainee.train()
    return Trainee(
        loss=TargetLoss(trainee, head=_head(model, where=job.model_dir)),
        model=trainee,
        trained_parameters=sum(_numel(p) for p in trainee.parameters() if p.requires_grad),
        total_parameters=sum(_numel(p) for p in trainee.parameters()),
        linear=f"{'oneDNN' if is_swapped else 'torch'} ({reason})",
        layout=choose_layout(job, model=model, trainee=trainee),
    )


def linear_choice(job: TrainJob, *, stage: int) -> tuple[bool, str]:
    """Whether the linear layers take oneDNN's product instead of torch's own, and why."""
    if job.kernels_impl == "reference":
        return False, "kernels.impl=reference"
    if job.device != "cpu" or job.dtype != "float32":
        return False, f"{job.dtype} on {job.device}"
    if stage == 3:
        # Backward uses the weight that forward saved, but ZeRO-3 takes it away in between;
        # DeepSpeed looks after torch's own product alone.
        return False, "ZeRO-3 shards the weights"
    return choose_linear()


def choose_layout(job: TrainJob, *, model: PreTrainedModel, trainee: nn.Module) -> Layout:
    """Packed passes where the model lets us say what each token sees, padded ones elsewhere.

    trainee: the model with its adapters, whose dropout counts too: a shared prefix would be dropped
    out alike for all rows of a pass, so it is shared only where nothing is dropped.
    """
    obstacle = "kernels.impl=reference" if job.kernels_impl == "reference" else _obstacle(model)
    if obstacle is not None:
        return Layout(
            is_packed=False,
            shares_prefix=False,
            max_rows=job.padded_rows,
            max_tokens=PASS_TOKENS[job.device],
            reason=obstacle,
        )
    drops = _drops(model, trainee)
    return Layout(
        is_packed=True,
        shares_prefix=not drops,
        max_rows=job.max_rows,
        max_tokens=PASS_TOKENS[job.device],
        reason="no prefix is shared: dropout" if drops else "common prefixes computed once",
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


def _drops(model: PreTrainedModel, trainee: nn.Module) -> bool:
    """Whether anything is dropped at random while training."""
    if getattr(model.config.get_text_config(decoder=True), "attention_dropout", 0.0):
        return True
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in trainee.modules())


def _head(model: PreTrainedModel, *, where: str) -> nn.Module:
    """The output head; asked for after adapters are in, since one may wrap it."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        raise ModelError(
            where, found="a model without an output head", expected="a causal language model"
        )
    return head


def _load(job: TrainJob) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    if (Path(job.model_dir) / "adapter_config.json").exists():
        raise ModelError(
            job.model_dir,
            found="an adapter",
            expected="a whole model to train",
            remedy="merge the adapter into its base first, or train on the base model",
        )
    torch.manual_seed(job.trainer.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        job.model_dir,
        dtype=getattr(torch, job.dtype),
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
    )
    return model


def _with_adapters(model: PreTrainedModel, method: LoraMethod, *, job: TrainJob) -> PeftModel:
    from peft import LoraConfig, get_peft_model

    if method.target_modules:
        linear = [name for name, module in model.named_modules() if _is_linear(module)]
        check_targets(method.target_modules, linear_modules=linear, arm_name=job.arm_name)
    config = LoraConfig(
        r=method.lora_rank,
        lora_alpha=method.lora_alpha,  # type: ignore[arg-type]  # a float works
        lora_dropout=method.lora_dropout,
        target_modules=list(method.target_modules) or "all-linear",  # the latter skips the head
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(job.trainer.seed)
    # No fp32 copies of bf16 adapters: DeepSpeed keeps the fp32 originals itself.
    return get_peft_model(model, config, autocast_adapter_dtype=False)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def check_targets(wanted: Sequence[str], *, linear_modules: Sequence[str], arm_name: str) -> None:
    """Refuse target_modules of which any matches no linear layer.

    peft complains only when none matches, and a partly wrong list trains fewer adapters silently. A
    name matches as in peft: the module's whole path, or its end after a dot.
    """
    missing = [
        name
        for name in wanted
        if not any(path == name or path.endswith(f".{name}") for path in linear_modules)
    ]
    if missing:
        known = sorted({path.rpartition(".")[2] for path in linear_modules})
        raise ConfigError(
            f"arms.{arm_name}.target_modules",
            found=", ".join(missing),
            expected=f"linear layers of the model: {', '.join(known)}",
            remedy=f"write arms.{arm_name}.target_modules=[] for all linear layers but the head",
        )


def _numel(parameter: nn.Parameter) -> int:
    """A parameter's size also where ZeRO-3 left an empty tensor here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
