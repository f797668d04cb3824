"""What there is to run on, and what goes where: workers, engine processes, dtypes (pure)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from conf.errors import ConfigError
from conf.groups import ModelConfig
from conf.methods import LoraMethod
from conf.resolve import Arm
from conf.schema import RunConfig


@dataclass(kw_only=True, slots=True, frozen=True)
class Machine:
    """What a plan is made for: device slots in all, slots per node, and their kind."""

    devices: int
    devices_per_node: int
    device: str  # cpu | cuda
    name: str  # what latency depends on, e.g. the processor's name

    @property
    def nodes(self) -> int:
        """Nodes with devices."""
        return max(1, self.devices // max(1, self.devices_per_node))


def workers_of(config: RunConfig, machine: Machine) -> int:
    """Training workers: as asked, else one per accelerator, or on CPU one per node.

    Only as many as get equal shares of every arm's batch: with a batch of 8 on 32 devices the other
    24 would have nothing to do, and 8 examples do not go into 3 shares. On CPU a worker uses its
    node's cores as threads: two one-thread workers would send each full gradient (540 MB for 135M
    parameters) over gloo at every step.
    """
    if config.cluster.workers is not None:
        return config.cluster.workers
    most = machine.nodes if machine.device == "cpu" else machine.devices
    given = [getattr(method, "trainer", None) for method in config.arms.values()]
    sizes = [g.batch_size for g in given if g is not None and g.batch_size is not None]
    batch = math.gcd(config.trainer.batch_size, *sizes)
    return max(n for n in range(1, most + 1) if batch % n == 0)


def workers_left(asked: int, left: Machine, *, batch_size: int) -> int:
    """As many of the workers asked for as a machine that lost nodes still holds.

    Each gets an equal share of a batch, so that a resumed training takes the same steps.
    """
    most = max(1, min(asked, left.devices))
    return max(n for n in range(1, most + 1) if batch_size % n == 0)


def threads_of(workers: int, machine: Machine) -> int:
    """CPU threads of one training worker; 1 where an accelerator computes."""
    if machine.device != "cpu":
        return 1
    return max(1, min(machine.devices // workers, machine.devices_per_node))


def engine_actors(arm: Arm, machine: Machine) -> int:
    """Engine processes of an arm: as asked, else one per accelerator, or one on a CPU.

    On a CPU one process with all cores as threads has one copy of the weights and of each prefix,
    and no core waits at the end for a longer shard. A script needs no devices. A hosted model has
    no process here (0); vLLM's server is one.

    Raises:
        ConfigError: more than there are devices.
    """
    if arm.engine.is_hosted:
        return 0
    if arm.engine.name == "vllm":
        return 1
    asked = arm.engine.actors
    if asked is None:
        is_one = machine.device == "cpu" or arm.engine.name == "scripted"
        return 1 if is_one else machine.devices_per_node
    if asked > machine.devices_per_node:
        raise ConfigError(
            f"arms.{arm.name}.engine.actors",
            found=f"{asked} engine processes, one device each",
            expected=f"at most {machine.devices_per_node}: {machine.name}",
            remedy=f"write engine.actors={machine.devices_per_node}, or leave it out",
        )
    return asked


def devices_per_actor(actors: int, machine: Machine) -> int:
    """Devices of each engine process: one accelerator, or its share of the cores; 0 without one."""
    if not actors:
        return 0
    return machine.devices_per_node // actors if machine.device == "cpu" else 1


def dtype_name(arm: Arm, device: str) -> str:
    """What an arm's model is held in when it answers: nf4 where it was trained on that."""
    method = arm.training
    if isinstance(method, LoraMethod) and method.quantization is not None:
        return method.quantization.name
    return model_dtype(arm.model, device)


def model_dtype(model: ModelConfig, device: str) -> str:
    """float32 on CPU, bfloat16 on accelerators, unless the user said otherwise."""
    if model.dtype.name != "auto":
        return model.dtype.name
    return "float32" if device == "cpu" else "bfloat16"
