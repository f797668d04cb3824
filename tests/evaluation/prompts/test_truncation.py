"""Prompts over the context: what stays, and that it fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conf.records import Item
from evaluation.prompts.truncation import KEPT_SHARE, MARK, shortened

words = st.lists(st.text("abc", min_size=1, max_size=7), min_size=1, max_size=80).map(" ".join)


def item(text: str, context: str | None = None) -> Item:
    return Item(id="x", split="test", input=text, sha256="0", context=context, label="a")


@given(words, st.integers(0, 300), st.sampled_from(["", "Say what it is: "]))
def test_what_is_around_the_item_stays_and_the_rest_fits(text: str, room: int, head: str) -> None:
    prompt = f"{head}{text}\nSo it is:"

    def fits(short: str) -> bool:
        return len(short) <= room

    found = shortened(prompt, item(text), fits=fits)
    if found is None:
        smallest = max(1, int(KEPT_SHARE * len(text)))
        assert room < len(head) + len("\nSo it is:") + smallest + len(MARK)
        return
    assert fits(found)
    assert found.startswith(head) and found.endswith("\nSo it is:")
    first, _, last = found[len(head) : len(found) - len("\nSo it is:")].partition(MARK)
    assert text.startswith(first) and text.endswith(last)
    if len(prompt) > room + len(MARK) + 2:  # as much stays as fits, but for spaces at the cut
        assert len(found) >= room - 2


def test_the_longer_of_context_and_input_is_cut() -> None:
    context = " ".join(str(i) for i in range(200))
    prompt = f"Read.\n{context}\nWhich number is third?\nanswer:"
    found = shortened(prompt, item("Which number is third?", context), fits=lambda t: len(t) <= 200)
    assert found is not None and "Which number is third?" in found
    assert found.startswith("Read.\n0 1 2 3") and "198 199\n" in found and MARK in found


def test_an_item_after_shots_of_the_same_text_is_the_one_that_is_cut() -> None:
    text = "rain " * 40
    shot = f"Q: {text.strip()}\nA: weather\n"
    found = shortened(f"{shot}Q: {text.strip()}\nA:", item(text), fits=lambda t: len(t) <= 330)
    assert found is not None and found.startswith(shot)


def test_what_cannot_be_cut_is_left() -> None:
    assert shortened("Say: &quot;a&quot;", item('"a"'), fits=lambda _t: True) is None
    assert shortened("Say: abc def", item("abc def"), fits=lambda _t: False) is None
    assert shortened("Say: ", item("  "), fits=lambda _t: True) is None
