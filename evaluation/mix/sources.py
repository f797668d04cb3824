"""Where the rows of a mix come from: the target task, embedded requests, other data (no torch)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError, Refused
from conf.groups import TaskConfig
from conf.methods import InstructionMethod, SourceConfig
from conf.records import Item
from conf.resolve import Arm
from evaluation.plugins import PLUGINS
from evaluation.prepare import context_for
from evaluation.probes.general_set import general_items
from evaluation.probes.instructions import instruction_task, requests
from evaluation.probes.probe_sets import whole_probes
from evaluation.prompts import PromptContext
from evaluation.tasks import Task
from evaluation.tasks.columns import choose_layout
from evaluation.tasks.defaults import choose_label_words, choose_scoring, default_instruction
from evaluation.tasks.held_out import HeldOut
from evaluation.tasks.loaders import Source, as_source
from evaluation.tasks.readers import RawRow
from evaluation.tasks.rows import make_items

TARGET_SOURCES = ("target", "wordings")
EMBEDDED = ("instructions", "sms_spam", "orders")
# Where a task has no further wordings of its own. {} is its instruction.
MADE_WORDINGS = (
    "Your task: {}",
    "Follow this instruction for the text that comes next. {}",
    "{} Keep to this form of answer.",
)


@dataclass(kw_only=True, slots=True, frozen=True)
class MixSource:
    """A source that is loaded and checked.

    contexts: one per wording; a row takes them in turn. style: the prompt style of its rows.
    num_held_out: rows left out since a text of the target's validation or test items, or of the
    requests that judge, is in them. num_duplicates: rows whose content had been seen.
    is_labelled: whether its rows are labels that somebody paid for. note: why it has no rows.
    """

    name: str
    source: str
    weight: float
    items: tuple[Item, ...] = ()
    contexts: tuple[PromptContext, ...] = ()
    style: str = "zero_shot"
    num_held_out: int = 0
    num_duplicates: int = 0
    is_labelled: bool = False
    note: str = ""

    @property
    def is_target(self) -> bool:
        """Whether its rows are the target task's own training items."""
        return self.source in TARGET_SOURCES


def load_sources(arm: Arm, task: Task, *, task_source: str) -> tuple[MixSource, ...]:
    """All sources of an instruction arm, checked.

    Args:
        arm: its method is an InstructionMethod.
        task: the target task.
        task_source: task.source; a source of the same name would be the target again.

    Raises:
        ConfigError, DataError: a source that cannot be read, with key, or file and line.
    """
    method = arm.method
    assert isinstance(method, InstructionMethod)
    key = f"arms.{arm.name}.sources"
    held_out = HeldOut(
        [
            *task.items["test"],
            *task.items["validation"],
            *requests(is_test=True),
            *general_items(),
            *whole_probes(),
        ]
    )
    found = []
    for name, config in method.sources.items():
        if config == SourceConfig(source="file", weight=config.weight):
            continue  # a place for the user's own file, which is not given
        found.append(
            _load(f"{key}.{name}", name, config, arm, task, held_out, task_source=task_source)
        )
    if not any(source.items for source in found):
        raise ConfigError(
            key,
            found="no source with rows" + "".join(f"; {s.name}: {s.note}" for s in found),
            expected="at least one source of training rows",
            remedy=f"write {key}.mine.path=pairs.json, or take the preset: "
            f"method@arms.{arm.name}=instruction",
        )
    return tuple(found)


def _load(
    key: str,
    name: str,
    config: SourceConfig,
    arm: Arm,
    task: Task,
    held_out: HeldOut,
    *,
    task_source: str,
) -> MixSource:
    plain = MixSource(name=name, source=config.source, weight=config.weight)
    match config.source:
        case "target":
            return replace(
                plain,
                items=task.items["train"],
                contexts=(context_for(task, arm),),
                style=arm.answering.prompt,
                is_labelled=True,
            )
        case "wordings":
            return _wordings(plain, arm, task)
        case "instructions":
            own = instruction_task(0)
            return replace(plain, items=own.items["train"], contexts=(_context(own),))
        case source if source == task_source and source in EMBEDDED:
            return replace(plain, note="it is the target task")
        case _:
            return _loaded(plain, key, config, held_out=held_out)


def _wordings(plain: MixSource, arm: Arm, task: Task) -> MixSource:
    """The target under other instructions: the task's further ones, else made from its own."""
    first = context_for(task, arm)
    if arm.answering.prompt == "bare":
        return replace(plain, note="prompt=bare shows no instruction")
    others = task.instructions or tuple(
        made.replace("{}", first.instruction) for made in MADE_WORDINGS
    )
    return replace(
        plain,
        items=task.items["train"],
        contexts=tuple(replace(first, instruction=other) for other in others),
        style=arm.answering.prompt,
        is_labelled=True,
    )


def _context(task: Task) -> PromptContext:
    return PromptContext(
        instruction=task.instruction,
        kind=task.kind,
        labels=tuple(task.word(label) for label in task.labels),
        answer_word=lambda item: task.word(item.answer_key),
    )


def _loaded(plain: MixSource, key: str, config: SourceConfig, *, held_out: HeldOut) -> MixSource:
    """Rows of a loader, without what is held out and without repeated contents."""
    task_config = _task_config(plain.name, config, key=key)
    load = PLUGINS.loaders.get(config.source, key=f"{key}.source")
    source = as_source(load(task_config), name=config.source)
    items, kind = _training_items(source, task_config, key=key)
    unique = {item.sha256: item for item in reversed(items)}
    kept = tuple(i for i in items if unique[i.sha256] is i and not held_out.has(i))
    num_duplicates = len(items) - len(unique)
    return replace(
        plain,
        items=kept,
        contexts=(_loaded_context(source, task_config, kind, kept or items),),
        num_duplicates=num_duplicates,
        num_held_out=len(unique) - len(kept),
        is_labelled=config.source not in EMBEDDED,
        note="" if kept else "all its rows are held out by the target task",
    )


def _task_config(name: str, config: SourceConfig, *, key: str) -> TaskConfig:
    if config.source == "file" and config.path is None:
        raise ConfigError(
            f"{key}.path",
            found="nothing",
            expected="a file of prompt/completion pairs, or a labelled file",
            remedy=f"write {key}.path=pairs.json",
        )
    return TaskConfig(
        name=name,
        source=config.source,
        path=config.path,
        subset=config.subset,
        revision=config.revision,
        columns=config.columns,
        instruction=config.instruction,
    )


def _training_items(source: Source, config: TaskConfig, *, key: str) -> tuple[list[Item], TaskKind]:
    """The rows to train on, as items.

    All rows of the user's one file; the train file of a directory; of an embedded set that we split
    ourselves, its training split.
    """
    rows: Sequence[RawRow] = source.splits.get("train", source.splits.get("all", ()))
    is_ours_to_split = "all" in source.splits and not source.is_editable
    try:
        layout = choose_layout(config, rows, name=source.source)
    except Refused as error:
        raise DataError(
            error.where,
            found=error.found,
            expected=error.expected,
            remedy=f"write {key}.columns.prompt=NAME {key}.columns.completion=NAME, or the columns "
            "input and label, target or choices",
        ) from None
    # An empty validation split keeps a fifth of the rows from being set aside.
    splits = {"all": rows} if is_ours_to_split else {"train": rows, "validation": ()}
    items = make_items(splits, layout, config, is_editable=False)
    return [item for item in items if item.split == "train"], layout.kind


def _loaded_context(
    source: Source, config: TaskConfig, kind: TaskKind, items: Iterable[Item]
) -> PromptContext:
    """The instruction and label words that a run on this data would have."""
    train = list(items)
    labels: tuple[str, ...] = ()
    if kind is TaskKind.classification:
        labels = tuple(sorted({item.answer_key for item in train}))
    words = choose_label_words(config, labels)
    scoring = choose_scoring(config, kind, train)
    made = default_instruction(kind, scoring, words=list(words.values()), train=train)
    return PromptContext(
        instruction=config.instruction or source.instruction or made,
        kind=kind,
        labels=tuple(words.values()),
        answer_word=lambda item: words.get(item.answer_key, item.answer_key),
    )
