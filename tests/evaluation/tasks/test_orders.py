"""The synthetic orders: schema, variety, held-out phrasings, no answer from word counts."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict

import jsonschema

from conf.choices import TaskKind
from conf.groups import LimitConfig, TaskConfig
from conf.hashing import sha256_of
from evaluation.tasks import load_task
from evaluation.tasks.orders import SCHEMA, SIZES, make_orders
from evaluation.tasks.orders_phrases import HELD_OUT, NUMBER_WORDS, SEEN, Phrases

ORDERS = make_orders()
CONFIG = TaskConfig(
    name="orders",
    source="orders",
    kind=TaskKind.generation,
    scoring="json",
    limit=LimitConfig(train=240, validation=40, test=150),
)


def test_same_on_every_machine() -> None:
    assert make_orders() == ORDERS
    pinned = "0884d2e1d3e0311ec8f8ec0bbd3e95117a863361bca8d062a96e00e8ef201d66"
    assert sha256_of(ORDERS) == pinned, "the items changed: results of earlier runs do not compare"
    assert make_orders(seed=1) != ORDERS


def test_task_says_that_it_is_synthetic() -> None:
    task = load_task(CONFIG)
    assert task.facts.is_synthetic and "synthetic" in task.facts.note
    assert {split: len(items) for split, items in task.items.items()} == {
        "train": 240,
        "validation": 40,
        "test": 150,
    }
    assert task.json_schema == SCHEMA and task.labels == () and task.kind is TaskKind.generation
    assert all(field in task.instruction for field in SCHEMA["required"])
    assert set(task.items["test"][0].slices) == {"trap"}
    assert load_task(TaskConfig(name="o", source="orders")).scoring == "json"


def test_sizes_and_no_message_twice() -> None:
    texts = [order.text.casefold() for orders in ORDERS.values() for order in orders]
    assert {split: len(orders) for split, orders in ORDERS.items()} == SIZES
    assert len(set(texts)) == len(texts) == sum(SIZES.values())


def test_targets_are_canonical_and_satisfy_the_schema() -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    for orders in ORDERS.values():
        for order in orders:
            value = json.loads(order.target)
            validator.validate(value)
            assert list(value) == SCHEMA["required"] and "\n" not in order.target
            assert json.dumps(value, ensure_ascii=False) == order.target


def test_answers_can_be_read_off_the_message() -> None:
    words = {v: k for k, v in NUMBER_WORDS.items()}
    for orders in ORDERS.values():
        for order in orders:
            value = json.loads(order.target)
            for field in ("customer", "city", "product"):
                assert value[field].casefold() in order.text.casefold(), order
            numbers = {int(n) for n in re.findall(r"\d+", order.text)}
            numbers |= {n for w, n in words.items() if w in order.text.casefold()}
            assert value["quantity"] in numbers or "dozen" in order.text, order
            assert "{" not in order.text and "  " not in order.text


def test_variety() -> None:
    values = [json.loads(o.target) for orders in ORDERS.values() for o in orders]
    assert len({v["customer"] for v in values}) == 32
    assert len({v["product"] for v in values}) == 30
    assert len({v["city"] for v in values}) == 26
    dues = Counter(str(v["due"]) for v in values)
    assert dues["None"] > 30 and dues["asap"] > 50 and dues["tomorrow"] > 20
    assert any(d.startswith("in ") for d in dues) and any("-" in d for d in dues)
    texts = [o.text for orders in ORDERS.values() for o in orders]
    assert any("dozen" in t for t in texts) and any("fifty" in t for t in texts)


def _frames(phrases: Phrases) -> set[str]:
    lists = [
        phrases.amounts, phrases.orders, phrases.corrections, phrases.dues, phrases.urgent,
        phrases.cities, phrases.names, phrases.noise, *phrases.traps.values(),
    ]  # fmt: skip
    return {frame for found in lists for frame in found}


def test_test_phrasings_are_held_out() -> None:
    assert not _frames(SEEN) & _frames(HELD_OUT)
    # What surrounds the values, e.g. "deliver to our shop in", must not reach the other side.
    pieces = {
        side: {p.strip(" .,:") for f in _frames(phrases) for p in re.split(r"\{\w+\}", f)}
        for side, phrases in (("seen", SEEN), ("held out", HELD_OUT))
    }
    long = {s: {p for p in found if len(p.split()) >= 3} for s, found in pieces.items()}
    texts = {s: " ".join(o.text.casefold() for o in ORDERS[s]) for s in ORDERS}
    assert not [p for p in long["seen"] if p.casefold() in texts["test"]]
    assert not [p for p in long["held out"] if p.casefold() in texts["train"] + texts["validation"]]


def test_half_of_the_messages_mislead() -> None:
    for orders in ORDERS.values():
        traps = Counter(order.trap for order in orders)
        assert 0.4 < 1 - traps["none"] / len(orders) < 0.7
        assert len(traps) == 6 and min(traps.values()) > 3


def test_a_bag_of_words_cannot_tell_right_from_wrong() -> None:
    """Where a second city, name or quantity stands, its words do not say which one is right.

    The best rule over sets of words is to take the value that is more often right in training; it
    must do no better than chance on the test messages that hold two.
    """
    cities = {json.loads(o.target)["city"] for orders in ORDERS.values() for o in orders}
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for order in (*ORDERS["train"], *ORDERS["validation"]):
        for city in cities:
            if re.search(rf"\b{city}\b", order.text):
                right[city].append(json.loads(order.target)["city"] == city)
    share = {city: sum(found) / len(found) for city, found in right.items()}
    hits = []
    for order in ORDERS["test"]:
        found = [c for c in cities if re.search(rf"\b{c}\b", order.text)]
        if len(found) == 2:
            best = max(found, key=lambda c: share.get(c, 0.9))
            hits.append(best == json.loads(order.target)["city"])
    assert len(hits) >= 15 and sum(hits) / len(hits) < 0.8
