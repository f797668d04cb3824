"""Data sets of the hub, through `datasets`, which is imported only when one is asked for."""

from __future__ import annotations

import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from conf.errors import ConfigError, DataError
from conf.groups import TaskConfig
from evaluation.tasks.readers import RawRow

if TYPE_CHECKING:
    from evaluation.tasks.loaders import Source

# How publishers call the splits, by our names.
_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}


def load_hub_rows(config: TaskConfig) -> Source:
    """The splits of task.path=owner/name, class numbers as their names.

    Raises:
        ConfigError: task.path unset. DataError: not there, not reachable, not readable.
    """
    from evaluation.tasks.loaders import Source

    if config.path is None:
        raise ConfigError(
            "task.path",
            found="nothing",
            expected="a data set's id on the hub",
            remedy="task=hub task.path=owner/name task.columns.input=text",
        )
    splits = chosen_splits(_fetch(config))
    name = f"hub:{config.path}"
    return Source(
        splits={split: _rows(data, f"{name} {split}") for split, data in splits.items()},
        source=f"{name}@{config.revision or 'latest'}",
        is_editable=False,
        note="" if "test" in splits or "all" in splits else "no test split",
    )


def chosen_splits(found: Mapping[str, Any]) -> dict[str, Any]:
    """Our splits out of the publisher's; one alone is split by us, validation replaces test."""
    ours = {
        split: next(found[alias] for alias in aliases if alias in found)
        for split, aliases in _ALIASES.items()
        if any(alias in found for alias in aliases)
    }
    if len(found) == 1:
        return {"all": next(iter(found.values()))}
    if "test" not in ours and "validation" in ours:
        ours["test"] = ours.pop("validation")
    if not {"train", "test"} <= set(ours):
        raise DataError(
            "task.path",
            found=f"splits {', '.join(found)}",
            expected="train and test (or validation)",
            remedy="save the splits you want as files and give task.files.{train,test}",
        )
    return ours


def _fetch(config: TaskConfig) -> Mapping[str, Any]:
    is_offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() not in ("0", "", "false")
    if not is_offline and not _is_reachable():
        # Read when `datasets` is imported; without it five retries take 24 s before the cache is
        # looked at.
        os.environ["HF_HUB_OFFLINE"] = "1"
        is_offline = True
    import datasets

    try:
        loaded: Mapping[str, Any] = datasets.load_dataset(
            config.path, name=config.subset, revision=config.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        lines = str(error).splitlines() or [""]
        raise DataError(
            f"hub:{config.path}",
            found=f"{type(error).__name__}: {lines[0]}",
            expected="a data set in the local cache, as the hub cannot be reached or "
            "HF_HUB_OFFLINE is set"
            if is_offline
            else "a data set of the hub with plain data files",
            remedy='where there is network: python -c "import datasets; datasets.load_dataset('
            f"'{config.path}')\", then copy HF_HOME here; or save the rows as files and give "
            "task.path; a data set with several configurations wants task.subset=NAME",
        ) from error
    return loaded


def _is_reachable() -> bool:
    """Whether the hub's host takes connections; behind a proxy only a request could tell."""
    if urllib.request.getproxies():
        return True
    endpoint = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=2).close()
    except OSError:
        return False
    return True


def _rows(data: Any, where: str) -> tuple[RawRow, ...]:
    """Rows as dictionaries; a ClassLabel's number becomes its name, and -1 (hidden) is empty."""
    names = {c: f.names for c, f in data.features.items() if hasattr(f, "names")}

    def cell(column: str, value: object) -> object:
        if column in names and isinstance(value, int):
            return names[column][value] if value >= 0 else ""
        return value

    return tuple(
        RawRow(where=f"{where}[{i}]", values={c: cell(c, v) for c, v in row.items()})
        for i, row in enumerate(data)
    )
