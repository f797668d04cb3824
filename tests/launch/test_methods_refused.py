"""Methods that cannot run here are refused before anything starts, in the dry run too."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from conf.choices import Quantization
from conf.errors import ConfigError, NotBuiltYet, Refused
from conf.methods import LoraMethod
from conf.resolve import resolve_arms
from launch.arm_checks import check_quantization
from launch.compose import compose_config
from launch.overrides import rewrite
from launch.placement import Machine
from launch.preflight import check

SMALL = ["model=tiny", "task.limit.train=40", "task.limit.validation=10", "task.limit.test=10"]


def checked(root: Path, *overrides: str) -> Any:
    config = compose_config(rewrite([*SMALL, f"run.root={root}", *overrides]))
    return check(config, exp="lora", command="")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["arms.x.peft_type=NONSENSE"], ["arms.x.peft_type", "IA3"]),
        (["arms.x.peft_type=PREFIX_TUNING"], ["virtual tokens"]),
        (["arms.x.peft_type=VERA", "arms.x.peft.rank=8"], ["arms.x.peft.rank", "VeraConfig"]),
        (["arms.x.peft_type=VERA", "arms.x.peft.r=many"], ["arms.x.peft.r", "int"]),
    ],
    ids=str,
)
def test_peft_arms(overrides: list[str], says: list[str], tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        checked(tmp_path, "+method@arms.x=peft", *overrides)
    for text in says:
        assert text in str(caught.value)


def test_a_peft_arm_that_fits_is_planned(tmp_path: Path) -> None:
    ia3 = ["+method@arms.x=peft", "arms.x.peft_type=IA3"]
    one = checked(tmp_path, *ia3).plan.job("train:x").key
    assert one == checked(tmp_path, *ia3).plan.job("train:x").key
    other = checked(tmp_path, *ia3, "arms.x.peft.target_modules=[k_proj]")
    assert one != other.plan.job("train:x").key, "arguments are part of what is trained"


@pytest.mark.parametrize(
    "override",
    ["use_rslora=true", "use_dora=true", "lora_plus_ratio=16", "lora_rank=3", "target_modules=[q]"],
)
def test_each_key_of_lora_makes_another_training(override: str, tmp_path: Path) -> None:
    plain = checked(tmp_path, "+exp=lora").plan.job("train:lora").key
    assert (
        plain != checked(tmp_path, "+exp=lora", f"arms.lora.{override}").plan.job("train:lora").key
    )


def machine(device: str) -> Machine:
    return Machine(devices=1, devices_per_node=1, device=device, name="x")


def test_four_bits_need_cuda_and_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    arms = resolve_arms(compose_config(["+exp=lora", "arms.lora.quantization=nf4"]))
    assert isinstance(arms["lora"].method, LoraMethod)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for device, says in (("cpu", "the device is cpu"), ("cuda", "bitsandbytes is not installed")):
        with pytest.raises(ConfigError, match=says) as caught:
            check_quantization(arms, machine(device))
        assert caught.value.where == "arms.lora.quantization"
        assert "quantization=null" in caught.value.remedy
    there = importlib.machinery.ModuleSpec("bitsandbytes", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)
    check_quantization(arms, machine("cuda"))
    with pytest.raises(ConfigError, match="the device is cpu"):
        check_quantization(arms, machine("cpu"))


def test_prompts_on_a_base_in_four_bits_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.machinery.ModuleSpec("bitsandbytes", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)
    overrides = ["+exp=lora", "arms.lora.quantization=nf4", "+method@arms.y=few_shot_on_lora"]
    with pytest.raises(NotBuiltYet, match=r"arms\.y\.on=lora"):
        check_quantization(resolve_arms(compose_config(overrides)), machine("cuda"))


def test_training_and_serving_ask_for_the_same_four_bits(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arguments alone: there is no GPU here, and without one nothing loads in 4 bits."""
    import torch
    import transformers
    from transformers.utils import quantization_config

    from evaluation.engines import loading
    from tests.launch.test_trained_and_served import make_job
    from training.model import build

    class Seen(Exception):
        pass

    def load(*_: Any, **given: Any) -> None:
        raise Seen(given)

    monkeypatch.setattr(quantization_config.importlib.metadata, "version", lambda _: "9.0")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    job = make_job(LoraMethod(quantization=Quantization.nf4), tiny_model_dir, dtype="bfloat16")
    found = []
    for run in (
        lambda: build(job),
        lambda: loading.load_model(tiny_model_dir, dtype="nf4", device="cuda:0"),
    ):
        with pytest.raises(Seen) as caught:
            run()
        found.append(caught.value.args[0])
    for given in found:
        config = given["quantization_config"]
        assert config.load_in_4bit and config.bnb_4bit_quant_type == "nf4"
        assert config.bnb_4bit_use_double_quant
        assert config.bnb_4bit_compute_dtype is torch.bfloat16 is given["dtype"]
    assert [given["device_map"] for given in found] == [{"": 0}, {"": "cuda:0"}]
    with pytest.raises(ConfigError, match="ZeRO-3"):
        build(job, stage=3)
