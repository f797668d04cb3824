"""Retrieved shots against a TF-IDF of a dozen lines."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

from conf.choices import ShotSelection
from conf.records import Item
from evaluation.prepare import context_for
from evaluation.prompts import Ask, first_call, get_style
from evaluation.prompts.shots import NearestShots
from tests.conftest import make_topic_task
from tests.evaluation.jobs import make_arm

TASK = make_topic_task(train=60, test=20)
POOL = TASK.items["train"]


def cosine(pool: tuple[Item, ...], item: Item, shot: Item) -> float:
    """1 + ln tf times smoothed idf (scikit-learn's definition), written out."""
    words = {i.id: Counter(re.findall(r"\w+", i.input.lower())) for i in pool}
    seen = Counter(word for counts in words.values() for word in counts)

    def weights(text: str) -> dict[str, float]:
        counts = Counter(re.findall(r"\w+", text.lower()))
        return {
            word: (1 + math.log(n)) * (1 + math.log((1 + len(pool)) / (1 + seen[word])))
            for word, n in counts.items()
            if word in seen
        }

    a, b = weights(item.input), weights(shot.input)
    norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
    return sum(v * b.get(word, 0.0) for word, v in a.items()) / norm if norm else 0.0


def test_shots_are_the_nearest_by_the_written_out_definition() -> None:
    nearest = NearestShots(POOL, num_shots=5)
    for item in TASK.items["test"]:
        found = [cosine(POOL, item, shot) for shot in nearest(item)]
        best = sorted((cosine(POOL, item, shot) for shot in POOL), reverse=True)[:5]
        assert found == sorted(found)  # the nearest stands last, next to the question
        assert max(abs(a - b) for a, b in zip(reversed(found), best, strict=True)) < 1e-9


def test_an_item_is_never_its_own_shot_and_order_does_not_matter() -> None:
    item = POOL[7]
    assert item.id not in {shot.id for shot in NearestShots(POOL, num_shots=59)(item)}
    other = NearestShots(tuple(reversed(POOL)), num_shots=9)(item)
    assert other == NearestShots(POOL, num_shots=9)(item)


def test_a_prompt_shows_the_item_s_own_shots() -> None:
    arm = make_arm(prompt="few_shot", num_shots=3, shot_selection=ShotSelection.retrieved)
    context = context_for(TASK, arm)
    nearest = NearestShots(POOL, num_shots=3)
    for item in TASK.items["test"][:4]:
        call = first_call(get_style("few_shot"), item, context)
        assert isinstance(call, Ask)
        asked = [m.content for m in call.messages if m.role == "user"]
        assert asked == [shot.input for shot in (*nearest(item), item)]
    unseen = dataclasses.replace(TASK.items["test"][0], input="", sha256="none")
    assert len(context.at(unseen).shots) == 3
