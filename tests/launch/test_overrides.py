from __future__ import annotations

import pytest

from conf.errors import ConfigError
from launch.cli import explained
from launch.overrides import experiment_of, rewrite


def test_a_path_alone_implies_its_group() -> None:
    assert rewrite(["+exp=compare", "task.path=a.csv"])[-1] == "task=file"
    assert rewrite(["task.files.train=a.csv"])[-1] == "task=file"
    assert rewrite(["model.path=/m"])[-1] == "model=hub"
    assert rewrite(["task=hub", "task.path=o/n"]) == ["task=hub", "task.path=o/n"]


def test_arguments_of_a_peft_method_may_be_new_keys() -> None:
    assert rewrite(["arms.x.peft.r=8"]) == ["++arms.x.peft.r=8"]
    same = ["arms.x.peft_type=VERA", "arms.x.peft={r: 8}", "+arms.x.peft.r=8", "arms.x.lora_rank=2"]
    assert rewrite(same) == same


def test_a_zero_stage_is_a_name_not_a_number() -> None:
    assert rewrite(["zero=3"]) == ["zero='3'"]
    assert rewrite(["zero=3_offload", "zero.stage=3"]) == ["zero=3_offload", "zero.stage=3"]


@pytest.mark.parametrize(
    "override", ["tracking.api_key=abc", "+wandb_api_key=abc", "++model.token=x", "password=1"]
)
def test_secrets_on_the_command_line_are_refused_without_repeating_them(override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rewrite([override])
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize("override", ["engine.max_new_tokens=4", "arms.x.max_thought_tokens=9"])
def test_keys_about_tokens_are_no_secrets(override: str) -> None:
    assert rewrite([override]) == [override]


def test_experiment_is_read_off_the_overrides() -> None:
    assert experiment_of(["task.seed=1", "+exp=lora"]) == "lora"
    assert experiment_of(["task.seed=1"]) is None


def test_hydra_message_loses_the_misleading_hint_and_gains_a_suggestion() -> None:
    text = "Could not override 'x'.\nTo append to your config use +x=1\n"
    text += "Key 'lerning_rate' is not in struct\nKey 'lerning_rate' not in 'TrainerConfig'\n"
    shown = explained(text)
    assert "To append" not in shown
    assert "Did you mean learning_rate?" in shown
