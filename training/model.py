"""The model that trains: loaded, given adapters, with the products and the loss that fit it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from conf.choices import NF4_ARGUMENTS
from conf.errors import ConfigError, ModelError
from conf.methods import LoraMethod, PeftMethod
from conf.row_meter import watch
from kernels.linear import choose_linear, pin_linear, swap_linear
from training.adapters import saved_names, with_adapters
from training.attention import checkpoint_contexts
from training.job import TrainJob
from training.layout import choose_layout
from training.lora import use_lora_kernel
from training.loss import TargetLoss, target_loss
from training.packing import Layout

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(kw_only=True, slots=True, frozen=True)
class Trainee:
    """A model ready to train.

    model: what is saved (with peft's wrapper for adapters). linear: which linear product runs.
    layout: how rows become passes. saved_names: the tensors of a checkpoint; None: all.
    """

    loss: TargetLoss
    model: PreTrainedModel | PeftModel
    trained_parameters: int
    total_parameters: int
    linear: str
    layout: Layout
    saved_names: frozenset[str] | None = None


def build(
    job: TrainJob,
    *,
    stage: int = 0,
    linear: tuple[bool, str] | None = None,
    adapter: str = "default",
) -> Trainee:
    """Load the base model and make its parameters, or new adapters, trainable.

    linear: what linear_choice says, where all workers or two attempts are to have the same.
    adapter: peft's name for the adapters.

    Under ZeRO-3 call it while transformers knows the DeepSpeed configuration: parameters are then
    born sharded. Adapters are drawn from trainer.seed, so all workers start equal.

    Raises:
        ModelError: a directory that holds an adapter, or a model without an output head.
        ConfigError: target_modules that the model does not have, or what peft refuses for it.
    """
    model = _load(job, stage=stage)
    if job.trainer.activation_checkpointing:
        model.activation_checkpointing_enable(
            {"use_reentrant": False, "context_fn": checkpoint_contexts}
        )
    trainee: PreTrainedModel | PeftModel = model
    saved = None
    if isinstance(job.method, (LoraMethod, PeftMethod)):
        base = frozenset(id(tensor) for tensor in model.state_dict(keep_vars=True).values())
        trainee = with_adapters(
            model, job.method, arm_name=job.arm_name, seed=job.trainer.seed, adapter=adapter
        )
        saved = saved_names(trainee, base_tensors=base)
    is_swapped, reason = linear or linear_choice(job, stage=stage)
    pin_linear(is_swapped)  # the kernels' own products, too
    if is_swapped:
        # Adapters too: thin as they are, it saves 8% of a LoRA pass.
        swap_linear(trainee, is_packed=False)
    adapters = use_lora_kernel(trainee, job, stage=stage)
    trainee.train()
    head = _head(model, where=job.model_dir)
    return Trainee(
        loss=target_loss(trainee, head=head, job=job, stage=stage),
        model=trainee,
        trained_parameters=sum(_numel(p) for p in trainee.parameters() if p.requires_grad),
        total_parameters=sum(_numel(p) for p in trainee.parameters()),
        linear=f"{'oneDNN' if is_swapped else 'torch'} ({reason})" + (adapters and f", {adapters}"),
        layout=choose_layout(job, model=model, trainee=trainee, stage=stage),
        saved_names=saved,
    )


def linear_choice(job: TrainJob, *, stage: int) -> tuple[bool, str]:
    """Whether the linear layers take oneDNN's product instead of torch's own, and why."""
    obstacle = linear_obstacle(job, stage=stage)
    return choose_linear() if obstacle is None else (False, obstacle)


def linear_obstacle(job: TrainJob, *, stage: int) -> str | None:
    """Why oneDNN's product is out of the question, or None where a measurement decides."""
    if job.kernels_impl == "reference":
        return "kernels.impl=reference"
    if job.device != "cpu" or job.dtype != "float32":
        return f"{job.dtype} on {job.device}"
    if stage == 3:
        # Backward uses the weight that forward saved, but ZeRO-3 takes it away in between;
        # DeepSpeed looks after torch's own product alone.
        return "ZeRO-3 shards the weights"
    return None


def _head(model: PreTrainedModel, *, where: str) -> nn.Module:
    """The output head; asked for after adapters are in, since one may wrap it."""
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None:
        raise ModelError(
            where, found="a model without an output head", expected="a causal language model"
        )
    return head


def _load(job: TrainJob, *, stage: int) -> PreTrainedModel:
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
        **_four_bits(job, stage=stage),
    )
    watch(model.get_input_embeddings())
    return model


def _four_bits(job: TrainJob, *, stage: int) -> dict[str, Any]:
    """What loads a base in 4 bits where the method asks for it; not yet run on a GPU."""
    if not isinstance(job.method, LoraMethod) or job.method.quantization is None:
        return {}
    if stage == 3:
        raise ConfigError(
            f"arms.{job.arm_name}.quantization",
            found=f"{job.method.quantization.name} with ZeRO-3, which shards the weights instead",
            expected="ZeRO 0 to 2 under a base in 4 bits",
            remedy=f"write arms.{job.arm_name}.zero.stage=2",
        )
    from transformers import BitsAndBytesConfig

    dtype = getattr(torch, job.dtype)
    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        **NF4_ARGUMENTS, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def _numel(parameter: nn.Parameter) -> int:
    """A parameter's size also where ZeRO-3 left an empty tensor here."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
