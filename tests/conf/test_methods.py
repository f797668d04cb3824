"""What a method and an engine cannot do together is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from conf.choices import AnswerBy, Calibration, Normalisation
from conf.errors import ConfigError
from conf.groups import EngineConfig
from conf.methods import LoraMethod, PeftMethod, PromptMethod, check_answering
from launch.compose import compose_config


def engine(**fields: Any) -> EngineConfig:
    return EngineConfig(name="forest", **fields)


VOTES = {"repeats": 5, "temperature": 0.7}


@pytest.mark.parametrize(
    ("method", "config", "key"),
    [
        ({"calibration": Calibration.batch}, {"winner_only": True}, "calibration"),
        ({"calibration": Calibration.contextual}, {"winner_only": True}, "calibration"),
        ({"normalisation": Normalisation.byte}, {"winner_only": True}, "normalisation"),
        ({"normalisation": Normalisation.first_token}, {"winner_only": True}, "normalisation"),
        ({"self_consistency": True}, {}, "self_consistency"),
        ({"self_consistency": True}, {"repeats": 2, "temperature": 0.7}, "self_consistency"),
    ],
)
def test_pairs_that_do_not_go_together(
    method: dict[str, Any], config: dict[str, Any], key: str
) -> None:
    with pytest.raises(ConfigError, match=rf"arms\.x\.{key}(.|\n)*remedy"):
        check_answering("arms.x", PromptMethod(**method), engine(**config))


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ({}, {}),
        ({}, {"winner_only": True}),
        ({"calibration": Calibration.none}, {"winner_only": True}),
        ({"normalisation": Normalisation.sum, "answer_by": AnswerBy.score}, {"winner_only": True}),
        ({"self_consistency": True}, VOTES),
        ({"calibration": Calibration.batch, "normalisation": Normalisation.sum}, {}),
    ],
)
def test_pairs_that_do(method: dict[str, Any], config: dict[str, Any]) -> None:
    check_answering("arms.x", PromptMethod(**method), engine(**config))


@pytest.mark.parametrize("name", ["token", "byte", "pmi", "first_token"])
@pytest.mark.parametrize("calibration", [Calibration.contextual, Calibration.batch])
def test_calibration_stands_on_sums(name: str, calibration: Calibration) -> None:
    with pytest.raises(ConfigError, match=f"normalisation={name}"):
        PromptMethod(normalisation=Normalisation[name], calibration=calibration)
    PromptMethod(normalisation=Normalisation[name], calibration=Calibration.none)


def test_other_refusals() -> None:
    with pytest.raises(ConfigError, match="refuse or truncate"):
        engine(too_long="drop")
    with pytest.raises(ConfigError, match="batch_tokens"):
        engine(batch_tokens=0)
    with pytest.raises(ConfigError, match="answer_by=score"):
        PromptMethod(self_consistency=True, answer_by=AnswerBy.score)


@pytest.mark.parametrize("ratio", [0.5, -16.0, 0.0])
def test_lora_plus_never_slows_b_down(ratio: float) -> None:
    with pytest.raises(ConfigError, match="lora_plus_ratio"):
        LoraMethod(lora_plus_ratio=ratio)


def test_lora_is_plain_unless_asked() -> None:
    method = LoraMethod()
    assert (method.lora_rank, method.lora_alpha, method.lora_dropout) == (16, 32.0, 0.0)
    assert not (method.use_rslora or method.use_dora)
    assert method.lora_plus_ratio is None and method.quantization is None
    assert method.target_modules == [], "all linear layers but the head"


def test_arguments_of_peft_are_typed_on_the_command_line() -> None:
    from launch.overrides import rewrite

    typed = ["arms.x.peft_type=VERA", "arms.x.peft.r=8", "arms.x.peft.target_modules=[q_proj]"]
    method = compose_config(rewrite(["+method@arms.x=peft", *typed])).arms["x"]
    assert isinstance(method, PeftMethod)
    assert method.peft == {"r": 8, "target_modules": ["q_proj"]}
    assert type(method.peft["r"]) is int and type(method.peft["target_modules"]) is list


def test_short_prompt_compares_one_method_under_two_prompts() -> None:
    import dataclasses

    arms = compose_config(["+exp=short_prompt"]).arms
    lora, bare = arms["lora"], arms["lora_bare"]
    assert isinstance(lora, LoraMethod) and isinstance(bare, LoraMethod)
    assert (lora.prompt, bare.prompt) == ("zero_shot", "bare")
    assert dataclasses.replace(bare, prompt="zero_shot") == lora


def test_the_self_consistency_preset_votes() -> None:
    config = compose_config(["+method@arms.x=self_consistency"])
    from conf.resolve import resolve_arms

    arm = resolve_arms(config)["x"]
    check_answering("arms.x", arm.answering, arm.engine)
    assert arm.answering.self_consistency and arm.engine.repeats == 5


def test_an_instruction_arm_trains_as_lora_or_full() -> None:
    from conf.methods import FullMethod, InstructionMethod, LoraMethod, trained_method
    from conf.resolve import resolve_arms

    extra = ["arms.instruction.lora_rank=4", "arms.instruction.prompt=bare"]
    arm = resolve_arms(compose_config(["+exp=instruction", *extra]))["instruction"]
    assert arm.kind == "instruction" and arm.is_tuned and isinstance(arm.method, LoraMethod)
    assert type(arm.training) is LoraMethod
    assert arm.training == LoraMethod(lora_rank=4, prompt="bare")
    full = resolve_arms(compose_config(["+exp=instruction", "arms.instruction.tunes=full"]))
    assert full["instruction"].training == FullMethod()
    assert full["lora"].training is full["lora"].method
    assert not isinstance(trained_method(arm.method), InstructionMethod)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        (["arms.instruction.tunes=full", "arms.instruction.lora_rank=4"], "lora_rank"),
        (["arms.instruction.sources.orders.weight=0"], "weight"),
        (["arms.instruction.sources.orders.weight=-2"], "weight"),
        (["arms.instruction.mix_size=0"], "mix_size"),
        (["arms.instruction.max_repeats=0"], "max_repeats"),
        (["arms.instruction.tunes=some"], "tunes"),
    ],
)
def test_bad_keys_of_a_mix_are_refused(override: list[str], found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        compose_config(["+exp=instruction", *override])


def test_sources_are_added_changed_and_left_out() -> None:
    name = "arms.instruction.sources"
    config = compose_config(
        [
            "+exp=instruction",
            f"~{name}.orders",
            f"{name}.mine.path=pairs.json",
            f"+source@{name}.more=file",
            f"{name}.more.path=more.csv",
            f"{name}.more.columns.prompt=question",
        ]
    )
    sources = config.arms["instruction"].sources  # type: ignore[attr-defined]
    assert list(sources) == ["target", "wordings", "instructions", "sms_spam", "mine", "more"]
    assert sources["mine"].path == "pairs.json" and sources["more"].columns.prompt == "question"
