"""Every YAML file composes, and the number found is asserted so that none is overlooked."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.methods import GivenMethod
from conf.schema import RunConfig
from launch.cli import CONF, experiment_line
from launch.compose import compose_config

FILES = sorted(p.relative_to(CONF) for p in CONF.rglob("*.yaml") if p.name != "config.yaml")
EXPERIMENTS = [p.stem for p in FILES if p.parent.name == "exp"]
CONTRACT = "zero_shot few_shot chain_of_thought role_play lora full instruction compare"
CONTRACT += " label_curve sweep smoke"


def overrides_of(path: Path) -> list[str]:
    group, name = path.parent.name, path.stem
    if group == "exp":
        return [f"+exp={name}"]
    if group == "method":
        needed = {"given": ["arms.x.path=predictions.csv"], "peft": ["arms.x.peft_type=IA3"]}
        extra = needed.get(name, [])
        return [f"+method@arms.x={name}", *extra]
    if group == "source":
        return ["+exp=instruction", f"+source@arms.instruction.sources.x={name}"]
    return [f"{group}={name}"]


def test_the_presets_of_the_contract_are_there() -> None:
    assert len(FILES) == 69
    assert set(CONTRACT.split()) <= set(EXPERIMENTS)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_preset_composes(path: Path) -> None:
    config = compose_config(overrides_of(path))
    assert isinstance(config, RunConfig)
    if path.stem == "given":
        assert isinstance(config.arms["x"], GivenMethod)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_says_what_it_is_in_one_line(name: str) -> None:
    line = experiment_line(CONF / "exp" / f"{name}.yaml")
    assert 10 < len(line) <= 80


def test_compare_has_the_seven_arms_of_the_contract() -> None:
    arms = compose_config(["+exp=compare"]).arms
    assert list(arms) == (
        "zero_shot few_shot chain_of_thought role_play lora full few_shot_on_lora".split()
    )


def test_prices_have_a_source_and_a_date() -> None:
    names = [p.stem for p in FILES if p.parent.name == "pricing"]
    assert len(names) == 7
    for name in names:
        pricing = compose_config([f"pricing={name}"]).pricing
        assert pricing.source and pricing.date
        if name == "unknown":
            assert pricing.usd_per_device_second is None


@pytest.mark.parametrize(
    ("name", "model", "usd_per_million"),
    [
        ("hosted_small", "gpt-5-mini", (0.25, 0.025, 2.0)),
        ("hosted_large", "gpt-5.2", (1.75, 0.175, 14.0)),
    ],
)
def test_a_hosted_price_stands_beside_that_of_own_devices(
    name: str, model: str, usd_per_million: tuple[float, ...]
) -> None:
    pricing = compose_config([f"pricing={name}"]).pricing
    price = pricing.hosted[model]
    keys = ("input", "cached_input", "output")
    assert tuple(getattr(price, f"{k}_usd_per_million") for k in keys) == usd_per_million
    assert price.source and price.date
    assert pricing.device_hour == compose_config(["pricing=cpu_core_hour"]).pricing.device_hour
