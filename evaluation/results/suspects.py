"""Items whose label may be wrong: all arms answer them alike, and otherwise (pure)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from conf.label_results import Suspect
from conf.records import Item

MIN_ARMS = 3  # two that err alike are no witness
MAX_SUSPECTS = 200


def suspects(
    answers: Mapping[str, Mapping[str, Sequence[str | None]]],
    items: Mapping[str, Item],
    *,
    shows_text: bool,
) -> tuple[list[Suspect], int]:
    """The suspects, and how many items all arms have answered.

    Args:
        answers: arm -> item id -> its answers, one for each draw and seed.
        items: the test items by id.
        shows_text: whether labels, answers and inputs may be shown; else ids and counts alone.
    """
    if len(answers) < MIN_ARMS:
        return [], 0
    common = [i for i in items if all(i in given for given in answers.values())]
    found = []
    for item_id in common:
        item = items[item_id]
        given = [answer for by_item in answers.values() for answer in by_item[item_id]]
        if len(set(given)) == 1 and given[0] is not None and given[0] != item.answer_key:
            found.append(
                Suspect(
                    item_id=item_id,
                    label=item.answer_key if shows_text else None,
                    answer=given[0] if shows_text else None,
                    num_answers=len(given),
                    input=item.input if shows_text else None,
                )
            )
    return found, len(common)
