"""What a Renderer reads from a model directory: tokenizer, template, special tokens, context."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from conf.errors import ConfigError, ModelError

NO_LIMIT = 10**9  # tokenizers without a limit of their own say about 1e30


def read_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json, without the truncation and padding it may ask for."""
    if not path.is_file():
        raise ModelError(
            str(path),
            found="no such file",
            expected="a tokenizer in the format of the tokenizers library",
            remedy="save the tokenizer with transformers: save_pretrained writes it",
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a file it cannot read
        raise ModelError(
            str(path), found=f"a file that does not load: {error}", expected="a tokenizer"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where the file is missing."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(str(path), found=str(error), expected="JSON in UTF-8") from None
    if not isinstance(value, dict):
        raise ModelError(str(path), found=f"a {type(value).__name__}", expected="a JSON object")
    return value


def read_template(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja goes before tokenizer_config.json, as in transformers."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(str(path), found=str(error), expected="text in UTF-8") from None
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def read_special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... as text; the first source that has one wins."""
    tokens: dict[str, str] = {}
    for source in sources:
        for name, value in source.items():
            text = value.get("content") if isinstance(value, dict) else value
            if name.endswith("_token") and isinstance(text, str):
                tokens.setdefault(name, text)
    return tokens


def read_generation_ends(config: Mapping[str, Any]) -> list[int]:
    """eos_token_id of generation_config.json as a list."""
    ends = config.get("eos_token_id")
    return [e for e in (ends if isinstance(ends, list) else [ends]) if type(e) is int]


def read_length_limit(model_dir: Path, config: Mapping[str, Any], max_length: int | None) -> int:
    """The model's context, from config.json, else what the tokenizer says; or fewer tokens."""
    facts = read_json(model_dir / "config.json")
    facts = facts.get("text_config", facts)
    found = [facts.get("max_position_embeddings"), config.get("model_max_length")]
    limits = [int(n) for n in found if isinstance(n, (int, float)) and 0 < n < NO_LIMIT]
    if max_length is not None and limits and max_length > limits[0]:
        raise ConfigError(
            "model.max_length",
            found=str(max_length),
            expected=f"at most {limits[0]} tokens, the model's context",
            remedy=f"write model.max_length={limits[0]} or null",
        )
    if max_length is None and not limits:
        raise ModelError(
            str(model_dir),
            found="no context length in config.json or tokenizer_config.json",
            expected="max_position_embeddings or model_max_length",
            remedy="write model.max_length=2048, or what the model was trained with",
        )
    return max_length if max_length is not None else limits[0]
