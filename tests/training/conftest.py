"""A tiny Llama with rows of token ids, and worker processes that train it."""

import functools
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import HANG_SECONDS

ROOT = Path(__file__).parents[2]
VOCABULARY = 96
CLASSES = 7
INSTRUCTION = [90, 91, 92]  # what all rows begin with


@pytest.fixture(scope="session")
def base_dir(tmp_path_factory):
    """A random Llama of 2 layers x 64 in a transformers directory, with a tied head."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    directory = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_text('{"stands for": "a tokenizer"}')
    return directory


def make_rows(count, *, seed=0, longest=24):
    """Rows of a learnable task: an instruction, a class's marker in noise, its label word, an end.

    Ids: 0 pad, 2 end, 3..9 label words, 10..16 markers, the rest noise.
    """
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        label = index % CLASSES
        noise = [rng.randrange(17, VOCABULARY) for _ in range(rng.randrange(3, longest - 3))]
        noise.insert(rng.randrange(len(noise) + 1), 10 + label)
        prompt = INSTRUCTION + noise
        ids = [*prompt, 3 + label, 2]
        mask = [0] * len(prompt) + [1, 1]
        rows.append({"item_id": f"row-{index}", "input_ids": ids, "target_mask": mask})
    return rows


@pytest.fixture(scope="session")
def new_rows():
    """The function that makes rows: a test file cannot import this one."""
    return make_rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def rows_path(tmp_path_factory):
    """45 rows: with batches of 6 the last batch of an epoch is half empty."""
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", make_rows(45))


@pytest.fixture(scope="session")
def run_workers(tmp_path_factory):
    """run_workers(specs, world_size=2, path=None, processes=...) -> results of all jobs."""
    return lambda specs, **kwargs: _run_workers(
        specs, directory=tmp_path_factory.mktemp("work"), **kwargs
    )


def _run_workers(specs, *, directory, world_size=1, search_path=None):
    """Train all specs, one after another, in one group of worker processes."""
    for number, spec in enumerate(specs):
        spec["job"].setdefault("output_dir", str(directory / f"job{number}"))
        spec["job"]["world_size"] = world_size
    spec_file = directory / "specs.json"
    spec_file.write_text(json.dumps(specs))
    _run_group("worker.py", spec_file, world_size=world_size, search_path=search_path)
    return [
        json.loads((Path(spec["job"]["output_dir"]) / "result.json").read_text()) for spec in specs
    ]


def _run_group(script, argument, *, world_size, search_path=None):
    """Run a script of this directory in so many processes of one group, to the end."""
    port = _free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), str(argument)],
            env=_environment(rank, world_size, port, search_path),
            cwd=argument.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        outputs = [process.communicate(timeout=HANG_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err[-6000:]
        assert out == "", f"chatter on stdout: {out[:500]}"


def _environment(rank, world_size, port, search_path):
    environment = dict(os.environ)
    environment |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
    }
    if search_path is not None:
        environment["PATH"] = search_path
    return environment


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers rounds norms to fp32 in any model, which would hide 1e-9 behind 1e-7."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from tests.training.pack_cases import exact_norm

    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)


@pytest.fixture(scope="session")
def label_rows_path(new_rows, tmp_path_factory):
    """9 items with a row for each of 7 labels, of one and of two tokens."""
    path = tmp_path_factory.mktemp("labels") / "labels.jsonl"
    lines = []
    for row in new_rows(9, seed=5):
        prompt, right = row["input_ids"][:-2], row["input_ids"][-2] - 3
        for label in range(CLASSES):
            target = [3 + label, 2] if label % 2 else [3 + label]
            mask = [0] * len(prompt) + [1] * len(target)
            lines.append(
                {"item_id": row["item_id"], "label": label, "is_reference": label == right}
                | {"input_ids": prompt + target, "target_mask": mask}
            )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def make_trial(base_dir, rows_path, tmp_path):
    """make_trial(number, setting=None, **changes) -> the job of a trial, see pack_cases.py."""
    from tests.training.pack_cases import trial_job

    return functools.partial(
        trial_job, base_dir=base_dir, rows_path=rows_path, output_dir=tmp_path / "out"
    )


@pytest.fixture
def run_pack(label_rows_path):
    """run_pack(jobs, rungs, judge) -> (outcomes by trial, what was told); judge: who is dropped."""
    from tests.training.pack_cases import Told
    from training.train_pack import train_pack

    def run(jobs, rungs=(), judge=lambda pack, rung: (), told=None):
        def judged(pack, rung):
            for trial in judge(pack, rung):
                pack.drop(trial)

        told = told or Told()
        outcomes = train_pack(jobs, told, rung_rows_path=label_rows_path, rungs=rungs, judge=judged)
        return {outcome.trial: outcome for outcome in outcomes}, told

    return run


@pytest.fixture(scope="session")
def run_pack_group(base_dir, rows_path, label_rows_path, tmp_path_factory):
    """run_pack_group(cases, world_size) -> of each case what each worker left, see pack_worker.py.

    A case's output_dir is <directory>/<name>, of its trials and of what the workers leave.
    """

    def run(cases, *, world_size):
        directory = tmp_path_factory.mktemp("packs")
        fixed = {"base_dir": str(base_dir), "rows_path": str(rows_path)}
        for case in cases:
            case["output_dir"] = str(directory / case["name"])
            case["trial_facts"] = fixed | {"world_size": world_size}
            case["rung_rows_path"] = str(label_rows_path)
        (directory / "cases.json").write_text(json.dumps(cases))
        _run_group("pack_worker.py", directory / "cases.json", world_size=world_size)
        return {
            case["name"]: [
                json.loads((directory / case["name"] / f"{rank}.json").read_text())
                for rank in range(world_size)
            ]
            for case in cases
        }

    return run
