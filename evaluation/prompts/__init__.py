"""What a prompt style is made of: messages, the two kinds of calls, and what a style may use.

A style is a generator. It gets an item and a PromptContext, yields Ask or Think, is sent the
completion of each, and returns the answer's text:

    @prompt_style("polite")
    def polite(item, context):
        messages = conversation(item, system=context.instruction + " Be polite.")
        answer = yield Ask(messages)
        return answer

What is constant (instruction, shots) comes first and the item last, so that all requests of an
arm share a long prefix of tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from conf.choices import ShotSelection, TaskKind
from conf.errors import ConfigError, DataError
from conf.hashing import sha256_of, sha256_of_file
from conf.records import Item
from evaluation.plugins import STYLES
from evaluation.tasks import Task


@dataclass(slots=True, frozen=True)
class Message:
    """One turn of a chat. role: system | user | assistant."""

    role: str
    content: str


@dataclass(slots=True, frozen=True)
class Ask:
    """The call that gives the answer, scored or generated; prefix: how the answer's turn begins."""

    messages: tuple[Message, ...]
    prefix: str = ""


@dataclass(slots=True, frozen=True)
class Think:
    """A call that generates freely; its text is sent back to the style."""

    messages: tuple[Message, ...]
    prefix: str = ""
    max_new_tokens: int = field(kw_only=True)


@dataclass(kw_only=True, slots=True, frozen=True)
class PromptContext:
    """What a style may use besides the item.

    labels: the words of the labels, empty where each item has its own or there are none.
    answer_word: the right answer of a shot in the words that a model should write. retrieve: finds
    each item's own shots, where they are retrieved.
    """

    instruction: str
    kind: TaskKind
    answer_word: Callable[[Item], str]
    labels: tuple[str, ...] = ()
    shots: tuple[Item, ...] = ()
    persona: str | None = None
    max_thought_tokens: int = 48
    retrieve: Callable[[Item], tuple[Item, ...]] | None = None

    def at(self, item: Item) -> PromptContext:
        """The context with the item's own shots, where shots are retrieved."""
        return self if self.retrieve is None else replace(self, shots=self.retrieve(item))


Calls = Generator[Ask | Think, str, str]
Style = Callable[[Item, PromptContext], Calls]


def item_text(item: Item) -> str:
    """The item alone: context, input, then its choices as lettered lines."""
    choices = "\n".join(f"{letter(i)}. {choice}" for i, choice in enumerate(item.choices))
    return "\n".join(part for part in (item.context, item.input, choices) if part)


def letter(index: int) -> str:
    """The letter of a choice: A, B, ..., Z, then AA, AB, ..."""
    return (letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def conversation(
    item: Item,
    *,
    system: str,
    shots: Sequence[Item] = (),
    answer_word: Callable[[Item], str] | None = None,
    layout: Callable[[Item], str] = item_text,
) -> tuple[Message, ...]:
    """System message, each shot as a question and its answer, then the item's question.

    answer_word is needed with shots: what the assistant says to one.
    """
    messages = [Message("system", system)]
    for shot in shots:
        assert answer_word is not None, "shots need answer_word"
        messages += [Message("user", layout(shot)), Message("assistant", answer_word(shot))]
    return (*messages, Message("user", layout(item)))


def get_style(name_or_path: str, *, key: str = "arms.*.prompt") -> Style:
    """A style by its name, or a user's prompt file by its path ending in .md.

    Raises:
        ConfigError: no such style or file, or a file that cannot be used; `key` is named.
    """
    import evaluation.prompts.styles  # noqa: F401  (built-ins register when imported; they import this file)
    from evaluation.prompts.user_prompt import load_user_prompt

    if name_or_path.endswith(".md"):
        return load_user_prompt(Path(name_or_path), key=key)
    style: Style = STYLES.get(name_or_path, key=key)
    return style


def style_sha256(name_or_path: str) -> str:
    """What a job's hash needs of a style: its name, or its file's content (plugins: their own)."""
    is_file = name_or_path.endswith(".md") and Path(name_or_path).is_file()
    return sha256_of_file(Path(name_or_path)) if is_file else sha256_of(name_or_path)


def draw_shots(
    task: Task,
    *,
    num_shots: int,
    selection: ShotSelection = ShotSelection.balanced,
    draw: int = 0,
    key: str = "arms.*.num_shots",
) -> tuple[Item, ...]:
    """Shots from the training split: a function of the items, the counts and `draw` alone.

    balanced: as equal a count per label as there are items for; tasks without labels draw at
    random. retrieved: none here, since each item has its own. The order is shuffled. More shots
    than training items are refused (ConfigError).
    """
    pool = sorted(task.items["train"], key=lambda item: (item.sha256, item.id))
    if num_shots > len(pool):
        raise ConfigError(
            key,
            found=str(num_shots),
            expected=f"at most the {len(pool)} items of the training split",
            remedy=f"write {key}={len(pool)}, or raise task.limit.train",
        )
    if selection is ShotSelection.retrieved:
        return ()
    source = random.Random(draw)
    source.shuffle(pool)
    if selection is ShotSelection.balanced and task.labels:
        pool = _turn_by_turn(pool, source)
    shots = pool[:num_shots]
    source.shuffle(shots)
    return tuple(shots)


def _turn_by_turn(pool: Sequence[Item], source: random.Random) -> list[Item]:
    """The pool reordered so that each prefix has the labels as equally often as can be."""
    by_label: dict[str, list[Item]] = {}
    for item in pool:
        by_label.setdefault(item.answer_key, []).append(item)
    labels = sorted(by_label)
    source.shuffle(labels)
    rounds = max(map(len, by_label.values()), default=0)
    return [
        by_label[label][turn]
        for turn in range(rounds)
        for label in labels
        if turn < len(by_label[label])
    ]


def first_call(style: Style, item: Item, context: PromptContext) -> Ask | Think:
    """The first call of a style: what is rendered before anything is generated."""
    return _checked(next(iter(style(item, context.at(item))), None))


def _checked(call: object) -> Ask | Think:
    if isinstance(call, (Ask, Think)):
        return call
    raise ConfigError(
        "plugins",
        found=f"a prompt style that yields {type(call).__name__}",
        expected="a generator that yields Ask or Think",
        remedy="write: answer = yield Ask(conversation(item, system=...)); return answer",
    )


def first_ask(style: Style, item: Item, context: PromptContext) -> Ask:
    """The call that asks for the answer; what is thought before it is the item's rationale.

    Raises:
        DataError: the style thinks first and the item has no rationale.
    """
    calls = style(item, context.at(item))
    call = _checked(next(calls))
    while isinstance(call, Think):
        if not (item.rationale or "").strip():
            raise DataError(
                f"item {item.id}",
                found="no rationale, and a prompt style that thinks before it answers",
                expected="a text in the column task.columns.rationale of every training item",
                remedy="add the column, or train with prompt=zero_shot",
            )
        call = _checked(calls.send(item.rationale or ""))
    return call
