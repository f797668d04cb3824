"""Records survive the way to a line of JSON and back."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from conf.hashing import canonical_json, sha256_of
from conf.records import (
    AnswerRule,
    CurvePoint,
    Item,
    LedgerLine,
    Measured,
    RenderedExample,
    SampleRecord,
    from_dict,
    to_dict,
)

text = st.text(max_size=20)
rules = st.builds(
    AnswerRule,
    arm=text,
    answer_by=st.sampled_from(["score", "generate"]),
    label_offsets=st.none() | st.dictionaries(text, st.floats(allow_nan=False), max_size=3),
    validation=st.dictionaries(
        text, st.builds(Measured, value=st.none() | st.just(0.5)), max_size=3
    ),
)
rows = st.builds(
    RenderedExample,
    item_id=text,
    input_ids=st.lists(st.integers(0, 9), max_size=5).map(tuple),
    target_mask=st.lists(st.integers(0, 1), max_size=5).map(tuple),
)
points = st.builds(
    CurvePoint,
    arm=text,
    step=st.integers(0, 9),
    tokens=st.integers(0, 9),
    device_seconds=st.floats(0, 9),
    metric=text,
    value=st.builds(Measured, value=st.floats(0, 1), n=st.integers(0, 9)),
)
samples = st.builds(
    SampleRecord,
    arm=text,
    item_id=text,
    set=text,
    label_logprobs=st.none() | st.dictionaries(text, st.floats(-9, 0), max_size=3),
    is_correct=st.none() | st.booleans(),
)
items = st.builds(
    Item,
    id=text,
    split=text,
    input=text,
    sha256=text,
    choices=st.lists(text, max_size=3).map(tuple),
    slices=st.dictionaries(text, text, max_size=2),
)


@given(st.one_of(rules, rows, points, samples, items))
def test_a_record_survives_json(record: object) -> None:
    line = json.dumps(to_dict(record), ensure_ascii=False)
    assert from_dict(type(record), json.loads(line)) == record


def test_newer_files_stay_readable() -> None:
    line = to_dict(LedgerLine(job="j", arm=None, purpose="test")) | {"added_later": 1}
    assert from_dict(LedgerLine, line) == LedgerLine(job="j", arm=None, purpose="test")


def test_names_of_many_records_are_one_object_each() -> None:
    """Those of 77 labels took more than half of what a record held."""
    sample = SampleRecord(arm="few_shot", item_id="1", set="test", label_logprobs={"a label": -1.0})
    line = json.dumps(to_dict(sample))
    first, second = (from_dict(SampleRecord, json.loads(line)) for _ in range(2))
    assert first == second == sample
    assert first.arm is second.arm
    assert next(iter(first.label_logprobs or {})) is next(iter(second.label_logprobs or {}))


@given(st.dictionaries(text, st.integers() | text, max_size=5))
def test_hash_does_not_depend_on_the_order_of_keys(value: dict[str, object]) -> None:
    reordered = dict(reversed(list(value.items())))
    assert sha256_of(value) == sha256_of(reordered)
    assert canonical_json(value) == canonical_json(reordered)
