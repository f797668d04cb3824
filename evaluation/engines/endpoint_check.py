"""What is refused of a hosted endpoint before anything starts; light, and nothing is sent."""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from conf.errors import ConfigError
from conf.groups import EngineConfig


def check_endpoint(config: EngineConfig) -> None:
    """Refuse an endpoint that cannot be asked; nothing is sent.

    Raises:
        ConfigError: no address or model, a key in the address, or no key where one is needed.
    """
    url = urlsplit(config.base_url or "")
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ConfigError(
            "engine.base_url",
            found=repr(config.base_url),
            expected="the address of an OpenAI-compatible endpoint, up to /v1",
            remedy="write engine.base_url=https://HOST/v1",
        )
    if url.password is not None or url.username is not None or url.query:
        raise ConfigError(
            "engine.base_url",
            found="an address with a name, password or query, which would be written down",
            expected="the address alone",
            remedy=f"put the key into the environment as {config.api_key_env or 'OPENAI_API_KEY'}",
        )
    if not config.model:
        raise ConfigError(
            "engine.model",
            found=repr(config.model),
            expected="the model's name at the endpoint",
            remedy="write engine.model=NAME",
        )
    is_here = url.hostname in ("localhost", "127.0.0.1", "::1")
    if config.api_key_env and not is_here and not os.environ.get(config.api_key_env):
        raise ConfigError(
            "engine.api_key_env",
            found=f"no key in the environment variable {config.api_key_env}",
            expected=f"the key of {url.hostname}",
            remedy=f"type export {config.api_key_env}=KEY, or write engine.api_key_env='' where "
            "the endpoint needs none",
        )
