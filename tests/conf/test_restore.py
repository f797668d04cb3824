from __future__ import annotations

import json

import pytest

from conf.hashing import plain
from conf.restore import restore_config
from launch.compose import compose_config


@pytest.mark.parametrize(
    "overrides",
    [
        ["+exp=compare"],
        ["+exp=smoke", "arms.few_shot.shot_selection=random", "arms.zero_shot.engine.batch_size=3"],
        ["+exp=lora", "arms.lora.trainer.schedule=cosine", "zero=3_offload", "task=orders"],
        ["+exp=zero_shot", "+method@arms.now=given", "arms.now.path=x.csv"],
    ],
)
def test_a_configuration_survives_its_file(overrides: list[str]) -> None:
    config = compose_config(overrides)
    assert restore_config(json.loads(json.dumps(plain(config)))) == config
