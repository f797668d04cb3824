"""Which column holds what: the kind, the mapping, or a guess with the command to type (pure)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from conf.groups import ColumnsConfig, TaskConfig
from evaluation.tasks.column_guess import command, guess_mapping, quoted
from evaluation.tasks.readers import RawRow, text_of

MAX_SLICE_VALUES = 20
MAX_SLICE_CHARACTERS = 40


@dataclass(kw_only=True, slots=True, frozen=True)
class Layout:
    """The kind and the columns an item is made from; None: the file has no such column.

    answer: the column with the label (label kinds) or the target. split_group: the column whose
    equal values stay in one split. slices: further short columns, for results by slice.
    stereotype: the column with the answer that a prejudice would give.
    """

    kind: TaskKind
    input: str
    answer: str
    id: str | None
    context: str | None
    choices: str | None
    references: str | None
    rationale: str | None
    group: str | None
    split_group: str | None
    slices: tuple[str, ...]
    stereotype: str | None = None


def choose_layout(config: TaskConfig, rows: Sequence[RawRow], *, name: str) -> Layout:
    """The columns to read, from task.kind, task.columns and what the file has.

    Raises:
        DataError: a named column is not there, or none of the mappings fits; lists the columns.
    """
    columns = tuple(dict.fromkeys(column for row in rows for column in row.values))
    _refuse_unknown_names(config, columns, name=name)
    there = {f: c for f, c in _mapping(config.columns).items() if c in columns}
    kind = _kind(config, there)
    needed = _needed(kind, there)
    if kind is None or not all(field in there for field in needed):
        raise _unmapped(config, rows, columns, there=there, name=name, kind=kind)
    input_field, answer_field = needed[0], needed[-1]
    group = there.get("group", config.group)
    used = {there[field] for field in needed} | {
        there[f]
        for f in ("id", "context", "references", "rationale", "choices", "stereotype")
        if f in there
    }
    is_free = kind in (TaskKind.generation, TaskKind.pairs)
    return Layout(
        kind=kind,
        input=there[input_field],
        answer=there[answer_field],
        id=there.get("id"),
        context=there.get("context"),
        choices=None if is_free else there.get("choices"),
        references=there.get("references") if is_free else None,
        rationale=there.get("rationale"),
        group=group,
        split_group=config.group,
        slices=tuple(c for c in columns if c not in used and _is_slice(c, rows)),
        stereotype=there.get("stereotype"),
    )


def _mapping(columns: ColumnsConfig) -> dict[str, str]:
    return {f.name: getattr(columns, f.name) for f in dataclasses.fields(columns)}


def _refuse_unknown_names(config: TaskConfig, columns: Sequence[str], *, name: str) -> None:
    """Columns that the user named, all of which must exist; defaults need not."""
    default = _mapping(ColumnsConfig())
    named = {f"task.columns.{f}": c for f, c in _mapping(config.columns).items() if c != default[f]}
    if config.group is not None:
        named["task.group"] = config.group
    for key, column in named.items():
        if column not in columns:
            raise DataError(
                key,
                found=f"{column!r}, which {name} does not have",
                expected=f"one of its columns: {', '.join(columns)}",
                remedy=f"{key}={_closest(column, columns)}",
            )


def _closest(word: str, known: Sequence[str]) -> str:
    import difflib

    lower = {k.lower(): k for k in known}
    found = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.0)
    return quoted(lower[found[0]]) if found else "NAME"


def _kind(config: TaskConfig, there: Mapping[str, str]) -> TaskKind | None:
    """task.kind, or what the columns say; a label that the user named wins over a stray target."""
    if config.kind is not TaskKind.auto:
        return config.kind
    if "prompt" in there and "completion" in there:
        return TaskKind.pairs
    if "choices" in there:
        return TaskKind.multiple_choice
    default = ColumnsConfig()
    is_label_named = config.columns.label != default.label
    is_target_named = config.columns.target != default.target
    if "target" in there and not ("label" in there and is_label_named and not is_target_named):
        return TaskKind.generation
    return TaskKind.classification if "label" in there else None


def _needed(kind: TaskKind | None, there: Mapping[str, str]) -> tuple[str, ...]:
    """The fields a kind cannot do without: the input first, the answer last."""
    match kind:
        case TaskKind.pairs:
            return ("prompt", "completion")
        case TaskKind.multiple_choice:
            return ("input", "choices", "label" if "label" in there else "target")
        case TaskKind.generation:
            return ("input", "target")
        case _:
            return ("input", "label")


def _is_slice(column: str, rows: Sequence[RawRow]) -> bool:
    """Short text with 2 to 20 different values, each on average at least twice."""
    values: set[str] = set()
    for row in rows:
        cell = row.values.get(column)
        if isinstance(cell, (list, dict)):
            return False
        text = text_of(cell)
        if len(text) > MAX_SLICE_CHARACTERS:
            return False
        values.add(text)
        if len(values) > MAX_SLICE_VALUES:
            return False
    return len(values - {""}) >= 2 and 2 * len(values) <= len(rows)


def _unmapped(
    config: TaskConfig,
    rows: Sequence[RawRow],
    columns: Sequence[str],
    *,
    there: Mapping[str, str],
    name: str,
    kind: TaskKind | None,
) -> DataError:
    """The refusal that lists the columns and ends with the command to type."""
    counts = {c: len({text_of(row.values.get(c)) for row in rows}) for c in columns}
    mapping = guess_mapping(rows, columns, there=there, kind=kind)
    return DataError(
        name,
        found=f"columns {', '.join(f'{c} ({n} different)' for c, n in counts.items())}",
        expected=f"a column for each of {', '.join(mapping)}"
        + (f", as task.kind={kind.name}" if kind is not None else ""),
        remedy=command(config, mapping),
    )


def refuse_stray_labels(layout: Layout, config: TaskConfig) -> None:
    """label_words and labels mean nothing without labels: refused rather than ignored."""
    if layout.kind is TaskKind.classification:
        return
    for key, value in (("task.labels", config.labels), ("task.label_words", config.label_words)):
        if value:
            raise ConfigError(
                key,
                found=f"labels for a {layout.kind.name} task",
                expected="nothing, as only classification has a label set",
                remedy=f"drop {key}, or write task.kind=classification",
            )
