"""Measure what a training holds: `memory_worker.py SPECS.json`, with RANK, WORLD_SIZE, ... set.

A spec is that of worker.py with "lengths" and "targets" of the rows of one pass. For each, bytes of
the live tensors of this process go to <output_dir>/memory-<rank>.json, in the specs' order.
"""

import gc
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import torch.distributed as dist
from worker import make_job

from conf.records import RenderedExample
from training import engine as engines
from training import zero
from training.data import make_batch


def live(known=()):
    """The storages of all tensors that live, each once, by address; known: left out.

    They must be kept for as long as they are compared with: a freed one's address is used again.
    """
    found = {}
    for thing in gc.get_objects():
        try:
            if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
                storage = thing.untyped_storage()
                found[storage.data_ptr()] = storage
        except (RuntimeError, ReferenceError):
            continue
    return {k: v for k, v in found.items() if k not in known}


def held(tensors):
    """These tensors' storages by address, each once."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}


def total(storages):
    """Their bytes."""
    return sum(storage.nbytes() for storage in storages.values())


def saved_by(call, *, known):
    """The bytes that autograd keeps of a call for its backward pass, and what the call returns."""
    kept = {}
    alive = []  # storages, not tensors: those would keep the graph that keeps them

    def pack(tensor):
        storage = tensor.untyped_storage()
        alive.append(storage)  # a freed one's address must not be taken for a shared one
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return sum(kept.values()), result


def rows_of(lengths, targets, *, vocabulary):
    rng = random.Random(0)
    return [
        RenderedExample(
            item_id=str(number),
            input_ids=tuple(rng.randrange(3, vocabulary) for _ in range(length)),
            target_mask=(0,) * (length - targets) + (1,) * targets,
        )
        for number, length in enumerate(lengths)
    ]


def state_bytes(model, batch, before):
    """Bytes of all that lives but for the batch, and for what lived before."""
    gc.collect()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    after = live(before) | held(gradients)  # those that Python never saw are not found
    inputs = [batch.input_ids, batch.positions, batch.targets]
    inputs += [t for t in (batch.segments, batch.position_ids) if t is not None]
    return total(after) - total(held(inputs))


def measure(job, *, stage, rows):
    """Bytes of each part, read from the tensors of one worker in mid-step."""
    gc.collect()
    before = live()
    with engines.started(job, stage=stage, local_rank=0) as engine:
        model = engine.trainee.model
        gc.collect()
        weights = held(getattr(p, "ds_tensor", p) if stage == 3 else p for p in model.parameters())
        batch = make_batch(rows, layout=engine.trainee.layout, pad_id=0)
        result = {"is_packed": engine.trainee.layout.is_packed, "tokens": batch.input_ids.numel()}
        engine.run_pass(batch, scale=1.0, is_last=True)
        engine.reduce()
        engine.step(learning_rate=1e-4)  # allocates the optimizer's state
        engine.run_pass(batch, scale=1.0, is_last=True)
        states = [state_bytes(model, batch, before)]
        engine.reduce()  # from here on stage 1 holds its own part of the gradients alone
        states.append(state_bytes(model, batch, before))
        result |= {"weights": total(weights), "state": max(states)}
        if stage < 3:
            known = held([*model.parameters(), *model.buffers()])
            result["activations"], loss = saved_by(lambda: engine.trainee.loss(batch), known=known)
            del loss
    return result


if __name__ == "__main__":
    zero.PERSISTED_ELEMENTS = 0
    specs = json.loads(Path(sys.argv[1]).read_text())
    dist.init_process_group("gloo")
    results = []
    for spec in specs:
        zero.BUCKET_ELEMENTS = spec["bucket"]
        job = make_job(spec)
        config = json.loads((Path(job.model_dir) / "config.json").read_text())
        rows = rows_of(spec["lengths"], spec["targets"], vocabulary=config["vocab_size"])
        results.append(measure(job, stage=int(job.zero.stage.value), rows=rows))
        gc.collect()
    directory = Path(specs[0]["job"]["output_dir"])
    (directory / f"memory-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
