"""Weights and Adam's moments in and out of DeepSpeed, whole and by name, for any ZeRO stage.

DeepSpeed's own loaders unpickle, and want the world size that saved. Here each parameter is
gathered, or dealt out, by itself. All functions are collective: every worker calls them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from conf.errors import JobFailed
from training.state import SavedState, StateTensors

MOMENTS = ("exp_avg", "exp_avg_sq")


def trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that train, by name; a tied one once."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def gathered(model: nn.Module, engine: Any, *, keep: bool) -> Iterator[tuple[str, Tensor]]:
    """fp32 tensors on CPU by `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`, in turn.

    There must have been a step. engine: DeepSpeed's. Only workers with `keep` are given tensors;
    the others must exhaust it all the same.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    masters = _whole_masters(engine)
    for name, parameter in trained(model):
        for kind in ("weight", *MOMENTS):
            if not _is_sharded(parameter):
                master = masters.get(id(parameter), parameter)
                whole = master if kind == "weight" else engine.basic_optimizer.state[master][kind]
            elif kind == "weight":
                whole = safe_get_full_fp32_param(parameter)
            else:
                whole = safe_get_full_optimizer_state(parameter, kind)
            if keep:
                yield f"{kind}/{name}", whole.detach().reshape(_shape(parameter)).cpu()


def adam_steps(engine: Any) -> int:
    """Updates that the optimizer has counted; the same for all parameters."""
    states = list(engine.basic_optimizer.state.values())
    return int(states[0]["step"]) if states else 0


def load_weights(model: nn.Module, state: SavedState) -> None:
    """Put a state's weights into a model that DeepSpeed does not hold yet.

    Under ZeRO-3 the base was born sharded: rank 0 writes, the others receive.

    Raises:
        JobFailed: the state holds other parameters than the model trains.
    """
    tensors = StateTensors(state)
    names = {name for name, _ in trained(model)}
    if tensors.names() != names:
        odd = ", ".join(sorted(tensors.names() ^ names)[:3])
        raise JobFailed(f"{state.directory} holds other parameters than the model trains: {odd}")
    for name, parameter in trained(model):
        with _writable(parameter), torch.no_grad():
            parameter.copy_(tensors.get("weight", name))


def _writable(parameter: nn.Parameter) -> Any:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)


def restore(model: nn.Module, engine: Any, state: SavedState) -> None:
    """Put fp32 weights and moments into DeepSpeed's optimizer, as after the step of the state."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    _allocate_moments(engine, steps=state.adam_steps)
    tensors = StateTensors(state)
    masters = _whole_masters(engine)
    for name, parameter in trained(model):
        # bf16 weights came from these by rounding; the optimizer goes on from the fp32 ones.
        if not _is_sharded(parameter):
            master = masters.get(id(parameter), parameter)
            master.data.copy_(tensors.get("weight", name))
            for kind in MOMENTS:
                engine.basic_optimizer.state[master][kind].copy_(tensors.get(kind, name))
            continue
        safe_set_full_fp32_param(parameter, tensors.get("weight", name).to(engine.device))
        for kind in MOMENTS:
            value = tensors.get(kind, name).to(engine.device)
            safe_set_full_optimizer_state(parameter, value, kind)


def _allocate_moments(engine: Any, *, steps: int) -> None:
    """Give the optimizer the state that it would make in its first step."""
    basic, sharding = engine.basic_optimizer, engine.optimizer
    flat = getattr(sharding, "fp32_partitioned_groups_flat", None)  # ZeRO-3
    held = flat if flat is not None else [p for g in basic.param_groups for p in g["params"]]
    basic.state.clear()
    for tensor in held:
        basic.state[tensor] = {
            # fused AdamW counts beside the tensor that it updates
            "step": torch.tensor(float(steps), dtype=torch.float32, device=tensor.device),
            **{kind: torch.zeros_like(tensor, dtype=torch.float32) for kind in MOMENTS},
        }
    if hasattr(sharding, "_hp_optimizer_states_linked"):  # ZeRO-1, ZeRO-2 and bf16 without ZeRO
        sharding._hp_optimizer_states_linked = False
        sharding._lazy_init_hp_params_optimizer_state()


def _is_sharded(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed deals it, or its fp32 copy, out to the workers."""
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _whole_masters(engine: Any) -> dict[int, Tensor]:
    """The fp32 copies that bf16 without ZeRO keeps on each worker, by their parameter's id."""
    low = getattr(engine.optimizer, "fp16_groups", [])
    full = getattr(engine.optimizer, "fp32_groups", [])
    return {
        id(parameter): master
        for parameters, masters in zip(low, full, strict=False)
        for parameter, master in zip(parameters, masters, strict=True)
    }


def _shape(parameter: nn.Parameter) -> torch.Size:
    """A parameter's shape also where ZeRO-3 left an empty tensor here."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
