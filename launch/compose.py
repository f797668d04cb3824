"""Compose the configuration from Python, for the `python -m launch.*` commands and tests."""

from __future__ import annotations

from pathlib import Path

from conf import schema
from conf.errors import ConfigError
from conf.schema import RunConfig
from launch.overrides import rewrite

CONF = Path(__file__).resolve().parent.parent / "conf"


def compose_config(overrides: list[str]) -> RunConfig:
    """The typed configuration for these overrides.

    Raises:
        ConfigError: whatever Hydra refuses, or one of the schema's own checks.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    schema.register()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = compose("config", overrides=rewrite(overrides))
            found = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(
            " ".join(overrides), found=str(error), expected="keys and values that exist"
        ) from None
    assert isinstance(found, RunConfig)
    return found
