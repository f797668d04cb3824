"""Rows for the benchmarks where no data directory is given: the embedded messages, and made ones.

The made rows have the shape of the real sets (number of labels and choices, and about their number
of tokens), so that the work is alike. Their sense does not matter: only time is measured.
"""

from __future__ import annotations

import itertools
import random
from typing import Any

from conf.groups import TaskConfig
from evaluation.tasks.embedded import load_sms_spam

RawRows = list[dict[str, Any]]  # input, label, choices

THINGS = (  # 11 x 7 = 77 labels
    "card payment",
    "cash withdrawal",
    "bank transfer",
    "top up",
    "direct debit",
    "refund",
    "exchange rate",
    "virtual card",
    "mobile wallet",
    "account statement",
    "identity check",
)
EVENTS = ("failed", "pending", "not recognised", "charged twice", "wrong amount", "limit", "fee")
FRAMES = (
    "Why is my {thing} {event} when I tried it this morning, reference {n}?",
    "I have looked everywhere, but the {thing} still says {event}. It is number {n}.",
    "Hello, can you tell me what {event} means for the {thing} I made {n} days ago",
    "{thing} {event}, please help me, my customer number is {n}",
)
SUBJECTS = ("a magnet", "the moon", "green plants", "a steel wire", "warm air", "sea water")
QUESTIONS = (
    "Which of these best explains what happens to {subject} in experiment {n} of the class?",
    "A student looks at {subject} for {n} minutes and writes down a result. What does it show?",
    "What is the main reason that {subject} changes after {n} hours in the dark?",
)
CHOICES = (
    "It gains energy from the sun.",
    "It loses heat to the air around it",
    "It reflects light",
    "Its mass becomes smaller.",
    "It attracts small pieces of iron",
    "Gravity pulls it down",
    "It reacts with oxygen.",
    "It takes in water through its surface",
)


def rows(name: str) -> tuple[str, RawRows, RawRows]:
    """Source, train rows and test rows of a stand-in for sms_spam, banking77 or arc_easy."""
    if name == "sms_spam":
        source: Any = load_sms_spam(TaskConfig(name="sms_spam", source="sms_spam"))
        found: RawRows = [
            {"input": str(r.values["input"]), "label": str(r.values["label"]), "choices": []}
            for r in source.splits["all"]
        ]
        return source.source, found[:400], found[400:]
    found = _intents() if name == "banking77" else _questions()
    return f"made rows in the shape of {name}", found[:1000], found[1000:]


def _intents() -> RawRows:
    draw = random.Random(1)
    pairs = list(itertools.product(THINGS, EVENTS))
    return [
        {
            "input": draw.choice(FRAMES).format(thing=thing, event=event, n=n),
            "label": f"{thing} {event}",
            "choices": [],
        }
        for n, (thing, event) in enumerate(itertools.islice(itertools.cycle(pairs), 2000))
    ]


def _questions() -> RawRows:
    draw = random.Random(2)
    found: RawRows = []
    for n in range(2000):
        choices = draw.sample(CHOICES, 4)
        text = draw.choice(QUESTIONS).format(subject=draw.choice(SUBJECTS), n=n)
        found.append({"input": text, "label": choices[0], "choices": sorted(choices)})
    return found
