"""What a method and an engine cannot do together is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from conf.choices import AnswerBy, Calibration, Normalisation
from conf.errors import ConfigError
from conf.groups import EngineConfig
from conf.methods import PromptMethod, check_answering
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


def test_the_self_consistency_preset_votes() -> None:
    config = compose_config(["+method@arms.x=self_consistency"])
    from conf.resolve import resolve_arms

    arm = resolve_arms(config)["x"]
    check_answering("arms.x", arm.answering, arm.engine)
    assert arm.answering.self_consistency and arm.engine.repeats == 5
