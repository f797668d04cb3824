"""Fixtures that several rooms share: a small task, and a tiny model built on its texts."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from conf.choices import TaskKind  # noqa: E402
from conf.groups import ModelConfig
from conf.records import Item  # noqa: E402
from evaluation.models import locate, make_ready  # noqa: E402
from evaluation.tasks import Task, TaskFacts  # noqa: E402

# A busy machine is not a wrong result: an example of 1 ms was seen to take 300. The fast tests draw
# the same examples every time, so that a red one is this change's; `make test-all` draws new ones.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, print_blob=True)
settings.load_profile("fixed")

TOPICS = {
    "billing": ("invoice", "charge", "refund", "receipt"),
    "delivery": ("parcel", "courier", "tracking", "address"),
    "login": ("password", "account", "locked", "reset"),
    "hardware": ("screen", "battery", "cable", "broken"),
    "weather": ("rain", "storm", "sunny", "wind"),
    "travel": ("flight", "hotel", "ticket", "luggage"),
    "food": ("pizza", "soup", "hungry", "kitchen"),
}
FRAMES = (
    "My {a} has a problem with the {b}",
    "Please look at the {a}, the {b} is wrong",
    "I asked about {a} and {b} yesterday",
    "Why is there no {a} for my {b}?",
    "{a} and {b}, again! Help me",
)


def topic_items(split: str, count: int, *, seed: int) -> tuple[Item, ...]:
    """Seven-class items, balanced: a label is known by its words."""
    source = random.Random(seed)
    items = []
    for index in range(count):
        label = list(TOPICS)[index % len(TOPICS)]
        a, b = source.sample(TOPICS[label], 2)
        text = source.choice(FRAMES).format(a=a, b=b) + f" ({index})"
        items.append(
            Item(
                id=f"{split}-{index}",
                split=split,
                input=text,
                sha256=hashlib.sha256(text.encode()).hexdigest(),
                label=label,
                group="a" if index % 2 else "b",
            )
        )
    return tuple(items)


def make_topic_task(*, train: int = 140, validation: int = 28, test: int = 42) -> Task:
    """A classification task of seven classes, made of templates."""
    counts = {"train": train, "validation": validation, "test": test}
    return Task(
        name="topics",
        kind=TaskKind.classification,
        scoring="exact",
        instruction="Name the topic: " + ", ".join(TOPICS) + ".",
        labels=tuple(TOPICS),
        label_words={label: label for label in TOPICS},
        items={
            split: topic_items(split, count, seed=index)
            for index, (split, count) in enumerate(counts.items())
        },
        facts=TaskFacts(source="tests", is_synthetic=True),
        sha256=hashlib.sha256(repr(counts).encode()).hexdigest(),
    )


@pytest.fixture(scope="session")
def topic_task() -> Task:
    return make_topic_task()


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory, topic_task: Task) -> Path:
    """A Llama of 2 layers, 64 wide, with a BPE of at most 1,024 tokens, on the task's texts."""
    config = ModelConfig(name="tiny", source="tiny", layout="plain")
    cache = tmp_path_factory.mktemp("cache")
    texts = [topic_task.instruction]
    texts += [f"{item.input} {item.label}" for item in topic_task.items["train"]]
    place = locate(config, cache=cache, texts_sha256=topic_task.sha256)
    return make_ready(config, place, texts=texts)
