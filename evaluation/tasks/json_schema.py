"""The schema that JSON answers must satisfy: read from the user's file, and the targets checked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, DataError
from conf.records import Item
from evaluation.tasks.readers import read_text

KEY = "task.json_schema"


def read_schema(path: Path) -> dict[str, Any]:
    """A JSON schema without references to other files.

    Raises:
        ConfigError: no JSON, no schema, or a `$ref` that leaves the file. DataError: unreadable.
    """
    import jsonschema  # only where a schema is given

    try:
        schema = json.loads(read_text(path, name=str(path)))
        if not isinstance(schema, dict):
            raise ConfigError(KEY, found=f"{path}: no JSON object", expected="a JSON schema")
        jsonschema.Draft202012Validator.check_schema(schema)
    except (json.JSONDecodeError, jsonschema.SchemaError) as error:
        message = error.message if isinstance(error, jsonschema.SchemaError) else str(error)
        raise ConfigError(
            KEY,
            found=f"{path}: {message}",
            expected="a JSON schema (draft 2020-12)",
            remedy='e.g. {"type": "object", "required": ["item"], "properties": {..}}',
        ) from None
    # Following one would fetch a file or an address named by data.
    outside = [ref for ref in _references(schema) if not ref.startswith("#")]
    if outside:
        raise ConfigError(
            KEY,
            found=f'{path}: "$ref": {outside[0]!r}',
            expected="references inside the file, which start with #",
            remedy="copy the definition into $defs",
        )
    return schema


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, found in value.items():
            if key in ("$ref", "$dynamicRef") and isinstance(found, str):
                yield found
            else:
                yield from _references(found)
    elif isinstance(value, list):
        for found in value:
            yield from _references(found)


def refuse_bad_targets(schema: dict[str, Any], items: Sequence[Item]) -> None:
    """DataError for the first target that is no JSON or breaks the schema, with the count."""
    import jsonschema

    validator = jsonschema.Draft202012Validator(schema)
    bad: list[tuple[Item, str]] = []
    for item in items:
        try:
            error = next(validator.iter_errors(json.loads(item.answer_key)), None)
        except json.JSONDecodeError as malformed:
            bad.append((item, f"no JSON: {malformed}"))
            continue
        if error is not None:
            bad.append((item, error.message))
    if bad:
        item, message = bad[0]
        raise DataError(
            f"{item.split} item {item.id}",
            found=f"{item.answer_key[:80]}: {message} ({len(bad)} such targets in all)",
            expected="targets that satisfy task.json_schema, as they are what answers are held to",
            remedy="mend the targets or the schema",
        )
