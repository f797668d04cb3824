"""Run training jobs in one worker process: `worker.py SPECS.json`, with RANK, WORLD_SIZE, ... set.

Each spec is {"method": {"kind": ...}, "trainer": {...}, "zero": {...}, "job": {...}}. For each job
the records, summary or error of global rank 0 go to <output_dir>/result.json.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from conf.choices import Schedule, ZeroStage
from conf.errors import CrossoverError
from conf.groups import TrainerConfig, ZeroConfig
from conf.methods import FullMethod, LoraMethod, PeftMethod
from conf.records import Progress, TrainRecord, to_dict
from training import engine, zero
from training.job import TrainJob
from training.loop import train

METHODS = {"full": FullMethod, "lora": LoraMethod, "peft": PeftMethod}


def make_job(spec):
    method = dict(spec["method"])
    trainer = dict(spec.get("trainer", {}))
    trainer["schedule"] = Schedule[trainer.get("schedule", "linear")]
    zero = dict(spec.get("zero", {}))
    zero["stage"] = ZeroStage(zero.get("stage", 0))
    fixed = {
        "arm_name": method["kind"],
        "base_model": "tiny",
        "base_model_sha256": "a" * 64,
        "renderer_sha256": "b" * 64,
        "prompt_sha256": "c" * 64,
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "world_size": 1,
        "pad_id": 0,
        "usd_per_device_second": None,
    }
    return TrainJob(
        method=METHODS[method.pop("kind")](**method),
        trainer=TrainerConfig(**trainer),
        zero=ZeroConfig(**zero),
        **(fixed | spec["job"]),
    )


class ListRuntime:
    """A Runtime that keeps what is reported."""

    def __init__(self):
        self.global_rank = dist.get_rank()
        self.local_rank = int(os.environ["LOCAL_RANK"])
        self.world_size = dist.get_world_size()
        self.records = []
        self.progress = []

    def report(self, record):
        kept = self.records if isinstance(record, TrainRecord) else self.progress
        assert isinstance(record, (TrainRecord, Progress))
        kept.append(to_dict(record))

    def should_save(self):
        return False


class EmbeddedTokens:
    """Counts the token positions that enter any embedding of this process."""

    def __init__(self):
        self.count = 0
        self.hook = torch.nn.modules.module.register_module_forward_pre_hook(self._see)

    def _see(self, module, inputs):
        if isinstance(module, torch.nn.Embedding):
            self.count += inputs[0].numel()

    def total(self):
        self.hook.remove()
        count = torch.tensor(self.count)
        dist.all_reduce(count)
        return int(count)


class HeldBytes:
    """Bytes of the tensors that this worker holds around its last optimizer step, by part."""

    def __init__(self):
        self.found = {}
        self.step = engine.Engine.step
        held = self

        def measured(self, **kwargs):
            held.found["gradients"] = _gradient_bytes(self)
            norm = held.step(self, **kwargs)
            parameters = list(self.trainee.model.parameters())
            weights = [getattr(p, "ds_tensor", p) for p in parameters]
            whole = [p for p in parameters if hasattr(p, "ds_tensor") and p.numel()]
            states = self._optimizer.state.values()
            held.found["optimizer"] = _bytes(t for s in states for t in s.values() if t.dim())
            held.found["weights"] = _bytes([*weights, *whole])
            return norm

        engine.Engine.step = measured

    def stop(self):
        engine.Engine.step = self.step
        return self.found


def _gradient_bytes(trained):
    averaged = getattr(trained._engine.optimizer, "averaged_gradients", None) or {}
    parts = [part for parts in averaged.values() if parts is not None for part in parts]
    own = [p.grad for p in trained.trainee.model.parameters() if p.grad is not None]
    return _bytes([*parts, *own])


def _bytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def run(spec):
    job = make_job(spec)
    runtime = ListRuntime()
    result = {"records": runtime.records, "progress": runtime.progress}
    embedded, held = EmbeddedTokens(), HeldBytes()
    try:
        result["summary"] = to_dict(train(job, runtime))
    except CrossoverError as error:
        result["error"] = [type(error).__name__, str(error)]
    result["held_bytes"] = held.stop()
    result["embedded_tokens"] = embedded.total()
    if runtime.global_rank == 0:
        Path(job.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(job.output_dir) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    zero.PERSISTED_ELEMENTS = 0  # else ZeRO-3 would leave all of a tiny model whole
    dist.init_process_group("gloo")
    for one in json.loads(Path(sys.argv[1]).read_text()):
        run(one)
    dist.destroy_process_group()
