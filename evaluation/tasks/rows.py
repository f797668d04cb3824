"""Rows to items: every cell checked, all problems counted, the first of each kind shown (pure)."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from conf.choices import TaskKind
from conf.errors import DataError
from conf.groups import TaskConfig
from conf.hashing import sha256_of
from conf.records import Item
from evaluation.tasks.columns import Layout
from evaluation.tasks.duplicates import content_sha256, overlaps
from evaluation.tasks.readers import RawRow, text_of
from evaluation.tasks.splits import is_validation, split_of

SHOWN_PLACES = 5


@dataclass(kw_only=True, slots=True, frozen=True)
class Problem:
    """One wrong row. kind: what rows with the same problem are counted under."""

    kind: str
    where: str
    found: str
    expected: str
    remedy: str


def refuse(problems: Sequence[Problem]) -> None:
    """Raise DataError for the first problem, with the counts and first places of all; or return."""
    if not problems:
        return
    first = problems[0]
    counts = Counter(problem.kind for problem in problems)
    lines = []
    for kind, count in counts.items():
        places = [problem.where for problem in problems if problem.kind == kind]
        more = ", .." if count > SHOWN_PLACES else ""
        lines.append(f"{count} x {kind}: {', '.join(places[:SHOWN_PLACES])}{more}")
    in_all = "" if len(problems) == 1 else f" (in all: {'; '.join(lines)})"
    raise DataError(
        first.where,
        found=first.found + in_all,
        expected=first.expected,
        remedy=first.remedy,
    )


def make_items(
    rows: Mapping[str, Sequence[RawRow]], layout: Layout, config: TaskConfig, *, is_editable: bool
) -> tuple[Item, ...]:
    """Items with their splits; {"all": rows} is split by content or group.

    Raises:
        DataError: empty or wrong cells, labels outside the set, duplicate ids, and, for files that
            the user can mend, contents that two splits share.
    """
    items: list[Item] = []
    places: list[str] = []
    problems: list[Problem] = []
    for split, rows_of_split in rows.items():
        for row in rows_of_split:
            found = list(_problems_of(row, layout))
            problems += found
            if not found:
                items.append(_item(row, layout, config, split, has_validation="validation" in rows))
                places.append(row.where)
    if layout.kind is TaskKind.classification:
        problems += _label_problems(items, places, config, pool=_pool(rows))
    if layout.id is not None:
        problems += _id_problems(items, places)
    if is_editable and "all" not in rows:
        problems += _overlap_problems(items, places, has_validation="validation" in rows)
    refuse(problems)
    return tuple(items)


def _pool(rows: Mapping[str, Sequence[RawRow]]) -> tuple[str, ...]:
    """The splits that define the label set: all of a file that we split, else the train file's."""
    if "all" in rows:
        return ("train", "validation", "test")
    return ("train",) if "validation" in rows else ("train", "validation")


def _problems_of(row: RawRow, layout: Layout) -> Iterator[Problem]:
    """What is wrong with the cells of one row."""
    for column in (layout.input, layout.answer):
        if not text_of(row.values.get(column)):
            yield Problem(
                kind=f"empty {column}",
                where=row.where,
                found=f"an empty cell in column {column}",
                expected="a text",
                remedy="fill the cell in, or remove the row",
            )
    if layout.choices is None:
        return
    choices = choices_of(row.values.get(layout.choices))
    label = text_of(row.values.get(layout.answer))
    if len(set(choices)) < 2 or len(set(choices)) != len(choices) or "" in choices:
        yield Problem(
            kind=f"bad {layout.choices}",
            where=row.where,
            found=f"{text_of(row.values.get(layout.choices))!r} in column {layout.choices}",
            expected="two or more different choices",
            remedy='write a JSON list, ["one", "two"], or one|two',
        )
    elif label and label not in choices:
        yield Problem(
            kind="an answer that is no choice",
            where=row.where,
            found=f"{label!r}, which is not among the choices {' | '.join(choices)}",
            expected="the right choice, word for word",
            remedy=f"write {_closest(label, choices)!r} if that is meant",
        )


def choices_of(cell: object) -> tuple[str, ...]:
    """The choices in a cell: a list, a JSON list as text, or texts with | between."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except json.JSONDecodeError:
            return ()
    if isinstance(cell, str):
        cell = cell.split("|")
    if isinstance(cell, Mapping):  # the hub's way: {"text": [..], "label": [..]}
        cell = cell.get("text")
    return tuple(text_of(choice) for choice in cell) if isinstance(cell, (list, tuple)) else ()


def _item(
    row: RawRow, layout: Layout, config: TaskConfig, split: str, *, has_validation: bool
) -> Item:
    def cell(column: str | None) -> str | None:
        return None if column is None else text_of(row.values.get(column)) or None

    text = text_of(row.values.get(layout.input))
    context = cell(layout.context)
    choices = () if layout.choices is None else choices_of(row.values.get(layout.choices))
    sha256 = content_sha256(text=text, context=context, choices=choices)
    group = cell(layout.split_group)
    key = sha256 if group is None else f"group {group}"
    if split == "all":
        split = split_of(key, seed=config.seed)
    elif split == "train" and not has_validation and is_validation(key, seed=config.seed):
        split = "validation"
    answer = cell(layout.answer)
    has_label = layout.kind in (TaskKind.classification, TaskKind.multiple_choice)
    references = () if layout.references is None else choices_of(row.values.get(layout.references))
    slices = [(c, c) for c in layout.slices] + [("stereotype", layout.stereotype)]
    return Item(
        id=cell(layout.id) or sha256_of([sha256, answer])[:16],
        split=split,
        input=text,
        sha256=sha256,
        context=context,
        label=answer if has_label else None,
        target=None if has_label else answer,
        references=references,
        choices=choices,
        rationale=cell(layout.rationale),
        group=cell(layout.group),
        slices={name: found for name, c in slices if (found := cell(c)) is not None},
    )


def _label_problems(
    items: Sequence[Item], places: Sequence[str], config: TaskConfig, *, pool: Sequence[str]
) -> Iterator[Problem]:
    """Labels outside task.labels; or, in the user's own splits, labels that train does not have."""
    known = list(config.labels)
    known = known or sorted({item.answer_key for item in items if item.split in pool})
    for item, where in zip(items, places, strict=True):
        if item.answer_key not in known:
            named = f"{'task.labels' if config.labels else 'train'}: {', '.join(known)}"
            yield Problem(
                kind=f"a label outside {'task.labels' if config.labels else 'train'}",
                where=where,
                found=f"label {item.answer_key!r}, which is not in {named}",
                expected="a label of the label set",
                remedy=f"write {_closest(item.answer_key, known)!r} if that is meant, or "
                + ("add it to task.labels" if config.labels else "add train rows with it"),
            )


def _id_problems(items: Sequence[Item], places: Sequence[str]) -> Iterator[Problem]:
    """Ids given twice."""
    first: dict[str, str] = {}
    for item, where in zip(items, places, strict=True):
        before = first.setdefault(item.id, where)
        if before != where:
            yield Problem(
                kind="duplicate id",
                where=where,
                found=f"id {item.id!r}, which {before} has too",
                expected="every id once, over all splits",
                remedy="make the ids unique, or remove the id column to have them made",
            )


def _overlap_problems(
    items: Sequence[Item], places: Sequence[str], *, has_validation: bool
) -> Iterator[Problem]:
    """Contents in two of the user's files; what we carved out of train is ours to clean."""
    for loses, keeps in overlaps(items):
        if not has_validation and items[keeps].split != "test":
            continue
        pool = items[loses].split if has_validation else "train"
        splits = f"{pool} and {items[keeps].split}"
        yield Problem(
            kind=f"overlap of {splits}",
            where=places[loses],
            found=f"the same content as {places[keeps]}, so {splits} overlap",
            expected="no content in two splits, as scores on seen items prove nothing",
            remedy="remove these rows from one of the files, or give one file as task.path "
            "to have it split by content",
        )


def _closest(word: str, known: Sequence[str]) -> str:
    return difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0] if known else word
