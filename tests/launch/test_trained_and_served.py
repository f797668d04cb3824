"""What a method trained is what both engines answer with, for every method that can be asked for.

The model is built, trained and saved as a training job does it, and loaded from its directory.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from conf.groups import EngineConfig, TrainerConfig, ZeroConfig
from conf.methods import LoraMethod, PeftMethod, TunedMethod
from conf.records import RenderedExample
from evaluation.engines import build_engine
from evaluation.engines.base import Engine, ScoreRequest
from training.checkpoint import gathered_state, write_checkpoint
from training.data import padded_batch
from training.job import TrainJob
from training.model import Trainee, build
from training.optimizer import RATE_RATIO, parameter_groups
from training.peft_methods import check_peft_method, usable_types

LORA: dict[str, LoraMethod] = {
    "plain": LoraMethod(lora_rank=4),
    "rslora": LoraMethod(lora_rank=4, use_rslora=True),
    "dora": LoraMethod(lora_rank=4, use_dora=True),
    "lora_plus": LoraMethod(lora_rank=4, lora_plus_ratio=16.0),
    "some_layers": LoraMethod(lora_rank=3, target_modules=["q_proj", "mlp.up_proj"]),
    "all_of_it": LoraMethod(use_rslora=True, use_dora=True, lora_plus_ratio=4.0),
}
# Arguments without which peft refuses a model 64 wide.
SMALL: dict[str, dict[str, Any]] = {
    "BEFT": {"target_modules": ["v_proj"]},
    "C3A": {"block_size": 8},
    "PVERA": {"r": 8},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 2},
    "VBLORA": {"vector_length": 16, "num_vectors": 8},
    "VERA": {"r": 8, "save_projection": False},
    "WAVEFT": {"n_frequency": 64},
}
QUICK = {"IA3", "VERA", "OFT", "C3A"}


class Codec:
    """Engines score token ids here; nothing is tokenised."""

    end_ids = (0,)

    def encode(self, text: str) -> list[int]:
        raise AssertionError(text)

    def decode(self, ids: list[int]) -> str:
        raise AssertionError(ids)


def engine(name: str, model_dir: Path) -> Engine:
    return build_engine(
        EngineConfig(name=name),
        model_dir=model_dir,
        adapter_dir=None,
        renderer=Codec(),
        dtype="float32",
        device="cpu",
        threads=1,
        task=None,
    )


@pytest.fixture(scope="module")
def engines(tiny_model_dir: Path) -> dict[str, Engine]:
    return {name: engine(name, tiny_model_dir) for name in ("forest", "transformers")}


def rows() -> list[RenderedExample]:
    source = random.Random(3)
    made = []
    for index in range(6):
        ids = tuple(source.randrange(3, 200) for _ in range(source.randrange(5, 14)))
        mask = tuple(int(t >= len(ids) - 2) for t in range(len(ids)))
        made.append(RenderedExample(item_id=str(index), input_ids=ids, target_mask=mask))
    return made


def make_job(method: TunedMethod, model_dir: Path, *, dtype: str = "float32") -> TrainJob:
    return TrainJob(
        arm_name="mine",
        method=method,  # type: ignore[arg-type]
        trainer=TrainerConfig(),
        zero=ZeroConfig(),
        model_dir=str(model_dir),
        base_model="tiny",
        base_model_sha256="",
        renderer_sha256="",
        prompt_sha256="",
        rows_path="",
        output_dir="",
        dtype=dtype,
        device="cpu",
        threads=1,
        world_size=1,
        pad_id=0,
        usd_per_device_second=None,
    )


def take_steps(trainee: Trainee, job: TrainJob, count: int = 3) -> None:
    groups = parameter_groups(trainee.model.named_parameters(), method=job.method, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, lr=job.learning_rate)
    for group in optimizer.param_groups:
        group["lr"] = 3 * job.learning_rate * group[RATE_RATIO]
    for _ in range(count):
        optimizer.zero_grad()
        trainee.loss(padded_batch(rows(), pad_id=0)).backward()
        optimizer.step()


def save(trainee: Trainee, job: TrainJob, directory: Path) -> None:
    state = gathered_state(trainee.model, names=trainee.saved_names, keep=True)
    write_checkpoint(
        directory,
        job=job,
        model=trainee.model,
        state=state,
        step=1,
        tokens=1,
        trained_parameters=trainee.trained_parameters,
    )


@torch.no_grad()
def trained_logprobs(trainee: Trainee) -> list[float]:
    trainee.model.eval()
    return [-float(trainee.loss(padded_batch([row], pad_id=0))) for row in rows()]


def served_logprobs(one: Engine) -> list[float]:
    requests = [
        ScoreRequest(id=row.item_id, prompt_ids=row.input_ids[:-2], label_ids=(row.input_ids[-2:],))
        for row in rows()
    ]
    found = {result.id: result.label_logprobs[0] for result in one.score(requests)}
    return [found[row.item_id] for row in rows()]


def all_methods() -> list[Any]:
    lora = [pytest.param(method, id=f"lora-{name}") for name, method in LORA.items()]
    others = [
        pytest.param(
            PeftMethod(peft_type=name, peft=SMALL.get(name, {})),
            id=name,
            marks=() if name in QUICK else pytest.mark.slow,
        )
        for name in usable_types()
    ]
    return lora + others


def test_every_type_is_here() -> None:
    assert len(all_methods()) == 6 + 31
    assert set(SMALL) | QUICK <= set(usable_types())


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's own, about defaults of its methods
@pytest.mark.parametrize("method", all_methods())
def test_trained_equals_served(
    method: LoraMethod | PeftMethod,
    tiny_model_dir: Path,
    engines: dict[str, Engine],
    tmp_path: Path,
) -> None:
    if isinstance(method, PeftMethod):
        check_peft_method("arms.mine", method)
    job = make_job(method, tiny_model_dir)
    trainee = build(job)
    take_steps(trainee, job)
    wanted = trained_logprobs(trainee)
    save(trainee, job, tmp_path / "checkpoint")
    for name, one in engines.items():
        one.set_adapter(None)
        before = served_logprobs(one)
        assert max(abs(a - b) for a, b in zip(before, wanted, strict=True)) > 1e-3, "it trained"
        one.set_adapter(tmp_path / "checkpoint")
        assert served_logprobs(one) == pytest.approx(wanted, abs=1e-4), name
        one.set_adapter(None)
        assert served_logprobs(one) == before, f"{name}: the base is as it was"
