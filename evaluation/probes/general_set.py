"""The general set: easy questions that have nothing to do with the user's task (pure, no torch).

A model that is tuned on one task may unlearn others. These 120 items are answered by the base model
and by each tuned one; the change between the two is the forgetting. They are made here, so their
answers are computed (arithmetic, copying) or stand in tables of facts; wrong choices come from the
same table, so that they are of the same sort. Written for this project.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from conf.choices import AnswerBy, Calibration, Normalisation, TaskKind
from conf.hashing import sha256_of
from conf.methods import PromptMethod
from conf.records import Item
from conf.resolve import Arm
from evaluation.tasks import Task, TaskFacts
from evaluation.tasks.duplicates import content_sha256

NUM_CHOICES = 4
INSTRUCTION = "You are a helpful assistant."
KINDS = ("knowledge", "arithmetic", "copying", "words")
MOST_ITEMS = 120
PER_KIND = MOST_ITEMS // len(KINDS)

# question -> (what it is asked about -> the right answer); answers of one table are of one sort.
KNOWLEDGE = {
    "What is the capital of {}?": {
        "France": "Paris",
        "Japan": "Tokyo",
        "Italy": "Rome",
        "Spain": "Madrid",
        "Germany": "Berlin",
        "Egypt": "Cairo",
        "Russia": "Moscow",
        "Greece": "Athens",
        "China": "Beijing",
        "England": "London",
    },
    "What colour is {}?": {
        "grass": "green",
        "blood": "red",
        "snow": "white",
        "coal": "black",
        "a ripe lemon": "yellow",
        "a clear sky at noon": "blue",
        "a carrot": "orange",
        "chocolate": "brown",
    },
    "What kind of thing is a {}?": {
        "sparrow": "bird",
        "rose": "flower",
        "hammer": "tool",
        "salmon": "fish",
        "lettuce": "vegetable",
        "banana": "fruit",
        "shirt": "garment",
        "pine": "tree",
        "bicycle": "vehicle",
        "sofa": "furniture",
        "beetle": "insect",
        "triangle": "shape",
    },
}
WORDS = {
    "What is the opposite of {}?": {
        "hot": "cold",
        "up": "down",
        "big": "small",
        "light": "dark",
        "open": "closed",
        "early": "late",
        "wet": "dry",
        "fast": "slow",
        "full": "empty",
        "hard": "soft",
        "rich": "poor",
        "first": "last",
    },
    "What is the plural of {}?": {
        "mouse": "mice",
        "child": "children",
        "foot": "feet",
        "tooth": "teeth",
        "woman": "women",
        "goose": "geese",
        "leaf": "leaves",
        "city": "cities",
    },
    "What comes right after {}?": {
        "Monday": "Tuesday",
        "Thursday": "Friday",
        "Saturday": "Sunday",
        "Tuesday": "Wednesday",
        "March": "April",
        "June": "July",
        "September": "October",
        "November": "December",
        "January": "February",
        "Wednesday": "Thursday",
    },
}
COPIED = (
    "lantern river button saddle copper meadow violet anchor basket pepper thunder window candle "
    "marble feather ladder garden pocket silver tunnel carpet rocket dragon kettle blanket harbour "
    "bottle mirror spider hammer"
).split()


@dataclasses.dataclass(kw_only=True, slots=True, frozen=True)
class _Question:
    kind: str
    text: str
    choices: tuple[str, ...]
    answer: str


def general_items(count: int = MOST_ITEMS) -> tuple[Item, ...]:
    """The first items of the set, a kind each in turn; always the same ones.

    count: at most MOST_ITEMS.
    """
    source = random.Random(0)
    by_kind = (
        _from_tables("knowledge", KNOWLEDGE, source),
        _arithmetic(source),
        _copying(source),
        _from_tables("words", WORDS, source),
    )
    questions = [one for turn in zip(*by_kind, strict=True) for one in turn]
    return tuple(_item(i, one, source) for i, one in enumerate(questions))[:count]


def general_task(count: int) -> Task:
    """The set as a multiple-choice task, its items under `general`."""
    items = general_items(count)
    return Task(
        name="general",
        kind=TaskKind.multiple_choice,
        scoring="exact",
        instruction=INSTRUCTION,
        items={"train": (), "validation": (), "test": (), "general": items},
        facts=TaskFacts(source="evaluation/probes/general_set.py", is_synthetic=True),
        sha256=sha256_of([INSTRUCTION, items]),
    )


def general_arm(arm: Arm) -> Arm:
    """The arm's model asked plainly: choices scored by sums, whatever the arm's own prompt."""
    method = PromptMethod(
        prompt="cloze",
        answer_by=AnswerBy.score,
        normalisation=Normalisation.sum,
        calibration=Calibration.none,
    )
    engine = dataclasses.replace(arm.engine, winner_only=False)
    return dataclasses.replace(arm, method=method, engine=engine)


def _item(index: int, question: _Question, source: random.Random) -> Item:
    choices = list(question.choices)
    source.shuffle(choices)
    return Item(
        id=f"general-{index:03d}",
        split="general",
        input=question.text,
        sha256=content_sha256(text=question.text, context=None, choices=tuple(choices)),
        choices=tuple(choices),
        label=question.answer,
        slices={"kind": question.kind},
    )


def _from_tables(
    kind: str, tables: dict[str, dict[str, str]], source: random.Random
) -> list[_Question]:
    """One question per row of the tables; wrong choices are other rows' answers."""
    found = []
    for pattern, facts in tables.items():
        for about, answer in facts.items():
            others = sorted({*facts.values()} - {answer, about})
            found.append(_question(kind, pattern.format(about), answer, others, source))
    source.shuffle(found)
    return found


def _arithmetic(source: random.Random) -> list[_Question]:
    """Sums, differences and products of small numbers; wrong choices are near the right one."""
    found = []
    for number in range(PER_KIND):
        a, b = source.randint(2, 12), source.randint(2, 9)
        text, value = (
            (f"{a} + {b}", a + b),
            (f"{a + b} - {b}", a),
            (f"{a} * {b}", a * b),
        )[number % 3]
        near = [str(value + d) for d in (-3, -2, -1, 1, 2, 3, 10) if value + d >= 0]
        found.append(_question("arithmetic", f"What is {text}?", str(value), near, source))
    return found


def _copying(source: random.Random) -> list[_Question]:
    """A word to repeat, or to find by its place in a short list."""
    found = []
    for number, word in enumerate(COPIED):
        others = [other for other in COPIED if other != word]
        words = [word, *source.sample(others, NUM_CHOICES - 1)]
        text, wrong = f"Repeat this word: {word}", others
        if number % 3:
            place = ("first", "last")[number % 3 - 1]
            shown = words if place == "first" else [*words[1:], word]
            text, wrong = f"Which word is {place} in this list: {', '.join(shown)}?", words[1:]
        found.append(_question("copying", text, word, wrong, source))
    return found


def _question(
    kind: str, text: str, answer: str, wrong: Sequence[str], source: random.Random
) -> _Question:
    """A question with some of its wrong answers; the right choice stands first."""
    choices = (answer, *source.sample(list(wrong), NUM_CHOICES - 1))
    return _Question(kind=kind, text=text, choices=choices, answer=answer)
