"""Where rows come from: the user's files, the hub, a plugin; to one shape, `Source`.

`pkg:conf/examples/x.csv` is a path below the folder that holds Crossover's packages, so that the
examples work from any current directory and from an installed clone.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import ConfigError, DataError
from conf.groups import TaskConfig
from evaluation.plugins import loader
from evaluation.tasks.readers import SUFFIXES, RawRow, read_rows

SPLITS = ("train", "validation", "test")
PACKAGE_ROOT = Path(__file__).resolve().parents[2]
PACKAGE_PREFIX = "pkg:"


@dataclass(kw_only=True, slots=True, frozen=True)
class Source:
    """Rows by split and what is known of them.

    splits: {"all": rows} for a source that is to be split, else train, test and perhaps validation.
    is_editable: the user can mend an overlap between the files, so it is refused, not removed.
    name: what the task is called where the configuration does not say.
    """

    splits: Mapping[str, Sequence[RawRow]]
    source: str
    licence: str | None = None
    is_synthetic: bool = False
    is_editable: bool = True
    note: str = ""
    instruction: str | None = None
    instructions: tuple[str, ...] = ()
    json_schema: dict[str, Any] | None = field(default=None)


def resolve_path(path: str) -> Path:
    """A path of the configuration as a path of this machine; `pkg:` starts at Crossover's root."""
    if not path.startswith(PACKAGE_PREFIX):
        return Path(path).expanduser()
    inside = (PACKAGE_ROOT / path.removeprefix(PACKAGE_PREFIX)).resolve()
    if not inside.is_relative_to(PACKAGE_ROOT):
        raise ConfigError(
            "task.path",
            found=path,
            expected="a path below the project after pkg:",
            remedy="write a plain path for a file elsewhere",
        )
    return inside


def as_source(loaded: object, *, name: str) -> Source:
    """What a loader returned as a Source: rows, {split: rows}, or a Source already."""
    if isinstance(loaded, Source):
        return loaded
    splits = dict(loaded) if isinstance(loaded, Mapping) else {"all": loaded}
    rows = {split: _raw_rows(found, f"{name}.{split}") for split, found in splits.items()}
    unknown = sorted(set(rows) - {*SPLITS, "all"})
    if unknown or ("all" in rows and len(rows) > 1) or not rows:
        raise DataError(
            f"loader {name}",
            found=f"splits {', '.join(rows) or 'none'}",
            expected="a list of rows, or train, test and perhaps validation",
            remedy='return [..] or {"train": [..], "test": [..]}',
        )
    return Source(splits=rows, source=f"loader {name}")


def _raw_rows(rows: object, where: str) -> tuple[RawRow, ...]:
    if isinstance(rows, (str, bytes)) or not isinstance(rows, Sequence):
        raise DataError(
            f"loader {where}",
            found=f"a {type(rows).__name__}",
            expected="a list of dictionaries, one a row",
            remedy='return [{"input": "..", "label": ".."}, ..]',
        )
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DataError(
                f"{where}[{i}]",
                found=f"a {type(row).__name__}",
                expected="a dictionary: column -> cell",
                remedy='return [{"input": "..", "label": ".."}, ..]',
            )
    return tuple(RawRow(where=f"{where}[{i}]", values=row) for i, row in enumerate(rows))


@loader("file")
def load_files(config: TaskConfig) -> Source:
    """task.path (a file, or a directory with a file per split) or task.files."""
    given = {s: getattr(config.files, s) for s in SPLITS if getattr(config.files, s) is not None}
    if given and config.path is not None:
        raise ConfigError(
            "task.path",
            found="both task.path and task.files",
            expected="one of them",
            remedy="drop task.path to use the files",
        )
    if given:
        return _load_split_files({s: resolve_path(p) for s, p in given.items()}, names=given)
    if config.path is None:
        raise ConfigError(
            "task.path",
            found="nothing",
            expected="a file or directory with labelled examples",
            remedy="python launch.py +exp=compare task.path=tickets.csv "
            "task.columns.input=body task.columns.label=category",
        )
    path = resolve_path(config.path)
    if path.is_dir():
        return _load_directory(path, name=config.path)
    _refuse_missing(path, name=config.path)
    return Source(splits={"all": read_rows(path, name=config.path)}, source=config.path)


def _refuse_missing(path: Path, *, name: str) -> None:
    if path.exists():
        return
    looks_like_hub = name.count("/") == 1 and path.suffix not in SUFFIXES
    near = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES)[:5]
    remedy = f"{path.parent} has {', '.join(near)}" if near else "check the path"
    raise DataError(
        name,
        found="no such file or directory",
        expected=f"a file ending in {' '.join(SUFFIXES)}, or a directory with train and test",
        remedy=f"for a data set of the hub type task=hub task.path={name}"
        if looks_like_hub
        else f"{remedy}; it is taken from the current directory, {os.getcwd()}",
    )


def _load_directory(directory: Path, *, name: str) -> Source:
    """train, test and perhaps validation, in any of the formats, one file for each."""
    files: dict[str, Path] = {}
    for split in SPLITS:
        found = [p for p in (directory / f"{split}{s}" for s in SUFFIXES) if p.exists()]
        if len(found) > 1:
            raise DataError(
                str(found[1]),
                found=f"a second file for {split}, beside {found[0].name}",
                expected="one file a split",
                remedy=f"remove one, or name it: task.files.{split}={found[0]}",
            )
        if found:
            files[split] = found[0]
    if not files:
        there = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
        raise DataError(
            name,
            found=f"a directory with {there}",
            expected=f"train, test and perhaps validation, each ending in {' '.join(SUFFIXES)}",
            remedy="name them: task.files.train=.. task.files.test=..",
        )
    base = name.rstrip("/")
    names = {split: f"{base}/{path.name}" for split, path in files.items()}
    return dataclasses.replace(_load_split_files(files, names=names), source=name)


def _load_split_files(files: Mapping[str, Path], *, names: Mapping[str, str]) -> Source:
    for split in ("train", "test"):
        if split not in files:
            raise DataError(
                f"task.files.{split}",
                found=f"only {', '.join(names.values())}",
                expected=f"a {split} file too",
                remedy=f"add task.files.{split}=.., or give one file as task.path to have it split",
            )
    rows = {split: read_rows(files[split], name=names[split]) for split in files}
    return Source(splits=rows, source=", ".join(names.values()))


@loader("hub")
def load_hub(config: TaskConfig) -> Source:
    """A data set of the hub by `datasets`; from its cache where there is no network."""
    from evaluation.tasks.hub import load_hub_rows  # its imports are heavy

    return load_hub_rows(config)
