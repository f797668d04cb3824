"""A guess at the columns of a file that says nothing, and the command that states it (pure)."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence

from conf.choices import TaskKind
from conf.groups import TaskConfig
from evaluation.tasks.readers import RawRow, text_of

PLACEHOLDER = "COLUMN"  # stands in the command where no guess is possible
_SAMPLE = 2000
_MAX_LABEL_CHARACTERS = 40


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Names that people give to columns, most telling first; compared in lower case.
_INPUT_NAMES = _words(
    "text body message question sentence content description review prompt instruction query "
    "utterance email comment title subject document article source english"
)
_LABEL_NAMES = _words(
    "category class intent sentiment topic tag type status priority department queue y gold"
)
_TARGET_NAMES = _words(
    "answer output response completion reply summary translation reference french result"
)


def guess_mapping(
    rows: Sequence[RawRow],
    columns: Sequence[str],
    *,
    there: Mapping[str, str],
    kind: TaskKind | None,
) -> dict[str, str]:
    """Field -> column for the fields that the kind needs; what is settled (`there`) stays.

    By name first, then by content: few different short values are a label, long text an input.
    """
    sample = rows[:_SAMPLE]
    free = [c for c in columns if c not in there.values()]
    texts = {c: [text_of(row.values.get(c)) for row in sample] for c in free}
    length = {c: sum(map(len, found)) for c, found in texts.items()}
    labels = {c: len(set(found)) for c, found in texts.items() if _is_label(found)}
    label = there.get("label") or _by_name(("label", *_LABEL_NAMES), list(labels))
    target = there.get("target") or _by_name(("target", *_TARGET_NAMES), free)
    if label is None and target is None:
        label = min(labels, key=labels.__getitem__, default=None)
    is_target = kind is TaskKind.generation or (kind is None and label is None and bool(target))
    answer = (target or label if is_target else label or target) or PLACEHOLDER
    others = [c for c in free if c != answer]
    text = _by_name(("input", *_INPUT_NAMES), others) or max(
        others, key=length.__getitem__, default=PLACEHOLDER
    )
    if kind is TaskKind.pairs:
        return {"prompt": there.get("prompt", text), "completion": there.get("completion", answer)}
    mapping = {"input": there.get("input", text), "target" if is_target else "label": answer}
    if kind is TaskKind.multiple_choice:
        mapping["choices"] = there.get("choices", PLACEHOLDER)
    return mapping


def _is_label(texts: Sequence[str]) -> bool:
    distinct = len(set(texts) - {""})
    is_short = sum(map(len, texts)) <= _MAX_LABEL_CHARACTERS * len(texts)
    return is_short and 2 <= distinct <= max(2, len(texts) // 3)


def _by_name(names: Sequence[str], columns: Sequence[str]) -> str | None:
    """The first column that has the first of the names as one of its words."""
    for name in names:
        for column in columns:
            if name in re.split(r"[\W_]+", column.lower()):
                return column
    return None


def command(config: TaskConfig, mapping: Mapping[str, str]) -> str:
    """The whole command with this column mapping, ready to paste into a shell."""
    parts = [] if config.source == "file" else [f"task.source={quoted(config.source)}"]
    if config.path is not None:
        parts.append(f"task.path={quoted(config.path)}")
    for split in ("train", "validation", "test"):
        path = getattr(config.files, split)
        if path is not None:
            parts.append(f"task.files.{split}={quoted(path)}")
    parts += [f"task.columns.{f}={quoted(c)}" for f, c in mapping.items()]
    return " ".join(["python launch.py +exp=compare", *parts])


def quoted(value: str) -> str:
    """A value as Hydra and the shell both need it; plain words stay as they are."""
    if re.fullmatch(r"[A-Za-z0-9_./:@-]+", value):
        return value
    # Hydra reads a backslash as itself unless it stands before a quote.
    escaped = re.sub(r'(\\*)"', r'\1\1\\"', value)
    escaped = re.sub(r"(\\+)$", r"\1\1", escaped)
    return shlex.quote(f'"{escaped}"')
