"""A task: items in three frozen splits, a scoring rule, an instruction (no torch, no pandas).

`load_task` is the one way in: loader -> rows -> checked items -> splits -> duplicates -> limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import evaluation.tasks.embedded  # noqa: F401 - registers its loader
import evaluation.tasks.orders  # noqa: F401 - registers its loader
from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from conf.groups import TaskConfig
from conf.hashing import sha256_of
from conf.records import Item
from evaluation.plugins import PLUGINS, Plugins
from evaluation.tasks.columns import choose_layout, refuse_stray_labels
from evaluation.tasks.defaults import (
    BUILT_IN_SCORING,
    OBEYS,
    choose_label_words,
    choose_scoring,
    default_instruction,
    label_counts,
)
from evaluation.tasks.duplicates import Deduplicated, deduplicate
from evaluation.tasks.json_schema import read_schema, refuse_bad_targets
from evaluation.tasks.loaders import SPLITS, Source, as_source, resolve_path
from evaluation.tasks.rows import make_items
from evaluation.tasks.splits import limited

# Above this many rows near-duplicates are counted only where they are to be removed.
MAX_ROWS_COUNTED = 20_000


@dataclass(kw_only=True, slots=True, frozen=True)
class TaskFacts:
    """Where the data come from, and what was counted and removed on the way.

    num_rows: rows read. num_exact_duplicates: rows whose normalised content had been seen.
    num_near_duplicates: rows like an earlier one but for case, punctuation, digits or a few words;
    None where it was not counted. num_conflicting_labels: distinct contents that carry more than
    one answer. num_removed: rows dropped in all, limits apart; num_overlap_removed: those of them
    that stood in another split. label_counts: split -> label -> items, after limits; empty counts
    for tasks without labels.
    """

    source: str
    licence: str | None = None
    is_synthetic: bool = False
    note: str = ""
    num_rows: int = 0
    num_exact_duplicates: int = 0
    num_near_duplicates: int | None = None
    num_conflicting_labels: int = 0
    num_removed: int = 0
    num_overlap_removed: int = 0
    label_counts: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(kw_only=True, slots=True, frozen=True)
class Task:
    """A problem set with a scoring rule; kind and scoring are never auto here.

    labels: empty for generation, and for multiple choice, where each item has its own choices.
    label_words: for every label the words that a model reads and writes. items: split -> items.
    sha256: content of all splits, scoring, instruction, labels and words.
    """

    name: str
    kind: TaskKind
    scoring: str
    instruction: str
    instructions: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    label_words: dict[str, str] = field(default_factory=dict)
    items: dict[str, tuple[Item, ...]]
    facts: TaskFacts
    sha256: str
    json_schema: dict[str, Any] | None = None

    def word(self, label: str) -> str:
        """The words for a label; a multiple-choice answer is its own word."""
        return self.label_words.get(label, label)

    def candidates(self, item: Item) -> tuple[str, ...]:
        """The labels an item can get: its choices, the task's labels, or () for free answers."""
        return item.choices if self.kind is TaskKind.multiple_choice else self.labels


def load_task(config: TaskConfig, *, plugins: Plugins | None = None) -> Task:
    """Read, check, split and count a task.

    Raises:
        DataError: the data, with file and line, what was found and what to write.
        ConfigError: a key of `task.*`.
    """
    plugins = plugins or PLUGINS
    _refuse_unknown_scoring(config, plugins)
    load = plugins.loaders.get(config.source, key="task.source")
    source = as_source(load(config), name=config.source)
    every_row = [row for rows in source.splits.values() for row in rows]
    layout = choose_layout(config, every_row, name=source.source)
    refuse_stray_labels(layout, config)
    items = make_items(source.splits, layout, config, is_editable=source.is_editable)
    is_counted = config.near_duplicates == "remove" or len(items) <= MAX_ROWS_COUNTED
    unique = deduplicate(items, near=config.near_duplicates if is_counted else "skip")
    labels: tuple[str, ...] = ()
    if layout.kind is TaskKind.classification:
        labels = tuple(config.labels) or tuple(sorted({item.answer_key for item in items}))
        _refuse_label_set(labels, items, config, column=layout.answer, name=source.source)
    splits = _limited_splits(unique.items, labels, config)
    _refuse_empty_split(splits, num_rows=len(every_row), name=source.source)
    _refuse_unknown_abstaining(config, items)
    facts = _facts(source, unique, splits, labels, num_rows=len(every_row))
    return _finished(config, source, layout.kind, labels, splits, facts)


def _refuse_unknown_scoring(config: TaskConfig, plugins: Plugins) -> None:
    others = [name for name in plugins.scorers.names() if name != OBEYS]
    known = ("auto", *BUILT_IN_SCORING, *others)
    if config.scoring not in known:
        raise ConfigError(
            "task.scoring",
            found=repr(config.scoring),
            expected=f"one of {', '.join(dict.fromkeys(known))}",
            remedy=f"pick one, or register yours: plugins=[my_study.py] with "
            f"@scorer({config.scoring!r})",
        )


def _refuse_label_set(
    labels: Sequence[str], items: Sequence[Item], config: TaskConfig, *, column: str, name: str
) -> None:
    """One label teaches nothing; nearly as many labels as rows are no labels."""
    if len(labels) < 2:
        raise DataError(
            name,
            found=f"only the label {labels[0]!r} in column {column}",
            expected="two or more labels",
            remedy="add rows with another label, or map another column: task.columns.label=NAME",
        )
    if not config.labels and len(items) >= 20 and 2 * len(labels) > len(items):
        raise DataError(
            name,
            found=f"{len(labels)} different labels in {len(items)} rows of column {column}",
            expected="labels that repeat",
            remedy=f"if these are free answers, type task.columns.target={column}; "
            "else map the label column: task.columns.label=NAME",
        )


def _limited_splits(
    items: Sequence[Item], labels: Sequence[str], config: TaskConfig
) -> dict[str, tuple[Item, ...]]:
    """Split -> items, after `task.limit` and `task.is_balanced`."""
    splits: dict[str, tuple[Item, ...]] = {}
    for split in SPLITS:
        limit: int | None = getattr(config.limit, split)
        if config.is_balanced and limit is not None and limit < len(labels):
            raise ConfigError(
                f"task.limit.{split}",
                found=str(limit),
                expected=f"at least {len(labels)}, one item a label, as task.is_balanced is set",
                remedy=f"task.limit.{split}={len(labels)}, or task.is_balanced=false",
            )
        splits[split] = limited(
            [item for item in items if item.split == split],
            limit=limit,
            by_label=bool(labels),
            is_balanced=config.is_balanced,
            seed=config.seed,
        )
    return splits


def _refuse_empty_split(splits: Mapping[str, Sequence[Item]], *, num_rows: int, name: str) -> None:
    for split, items in splits.items():
        if not items:
            raise DataError(
                name,
                found=f"{num_rows} rows, and no {split} item once split and without duplicates",
                expected="items in train, validation and test; some twenty rows a file at least",
                remedy="add rows, or name your own splits: task.files.{train,validation,test}",
            )


def _refuse_unknown_abstaining(config: TaskConfig, items: Sequence[Item]) -> None:
    """An answer that no item has and no choice is cannot be the one for `it is not said`."""
    label = config.abstain_label
    if label is None or any(label in (item.answer_key, *item.choices) for item in items):
        return
    raise ConfigError(
        "task.abstain_label",
        found=f"{label!r}, which is the right answer of no item",
        expected="a label, target or choice of the data, word for word",
        remedy="write it as in the file, or null where every item has an answer",
    )


def _facts(
    source: Source,
    unique: Deduplicated,
    splits: Mapping[str, Sequence[Item]],
    labels: Sequence[str],
    *,
    num_rows: int,
) -> TaskFacts:
    counts = label_counts(splits, labels) if labels else {}
    return TaskFacts(
        source=source.source,
        licence=source.licence,
        is_synthetic=source.is_synthetic,
        note="; ".join(n for n in (source.note, _balance_note(unique.items, splits, labels)) if n),
        num_rows=num_rows,
        num_exact_duplicates=unique.num_exact_duplicates,
        num_near_duplicates=unique.num_near_duplicates,
        num_conflicting_labels=unique.num_conflicting_labels,
        num_removed=unique.num_removed,
        num_overlap_removed=unique.num_overlap_removed,
        label_counts=counts,
    )


def _balance_note(
    items: Sequence[Item], splits: Mapping[str, Sequence[Item]], labels: Sequence[str]
) -> str:
    """Balanced limits change what accuracy means, so the source's own share is said."""
    test = splits["test"]
    if not labels or len(test) == sum(item.split == "test" for item in items):
        return ""
    shares = {label: sum(i.label == label for i in items) / len(items) for label in labels}
    top = max(shares, key=shares.__getitem__)
    here = sum(item.label == top for item in test) / len(test)
    return (
        f"test items balanced by label: {top} is {here:.0%} here, {shares[top]:.0%} in the source"
    )


def _finished(
    config: TaskConfig,
    source: Source,
    kind: TaskKind,
    labels: tuple[str, ...],
    splits: dict[str, tuple[Item, ...]],
    facts: TaskFacts,
) -> Task:
    """Scoring, words, schema and instruction; then the hash over all of it."""
    scoring = choose_scoring(config, kind, splits["train"])
    words = choose_label_words(config, labels)
    schema = source.json_schema
    if config.json_schema is not None:
        schema = read_schema(resolve_path(config.json_schema))
        refuse_bad_targets(schema, [item for items in splits.values() for item in items])
    made = default_instruction(kind, scoring, words=list(words.values()), train=splits["train"])
    # A loader's own instruction names its labels, so it goes where the user renames them.
    own = None if config.label_words else source.instruction
    instruction = config.instruction or own or made
    return Task(
        name=config.name,
        kind=kind,
        scoring=scoring,
        instruction=instruction,
        instructions=tuple(config.instructions) or (source.instructions if own else ()),
        labels=labels,
        label_words=words,
        items=splits,
        facts=facts,
        sha256=sha256_of([kind, scoring, instruction, labels, words, schema, splits]),
        json_schema=schema,
    )
