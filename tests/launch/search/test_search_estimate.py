"""What a rung is expected to take: equal to how its items are laid out, and near to real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from conf.records import RenderedExample
from conf.resolve import resolve_arms
from evaluation.prompts.rendering import Renderer
from evaluation.search.rung_rows import rung_rows
from evaluation.tasks import Task
from launch.compose import compose_config
from launch.estimate import arm_tokens
from launch.search.estimate import scoring_tokens
from training.item_trees import ItemTrees
from training.job import PASS_TOKENS


def item(number: int, *, shared: int, own: int, labels: int, length: int) -> list[RenderedExample]:
    """A prompt of shared + own tokens, and labels that differ in their first token."""
    prompt = (*range(shared), *([1000 + number] * own))
    ids = [tuple(range(2000 + 50 * k, 2000 + 50 * k + length)) for k in range(max(1, labels))]
    mask = (0,) * len(prompt) + (1,) * length
    return [RenderedExample(item_id="", input_ids=(*prompt, *i), target_mask=mask) for i in ids]


@pytest.mark.parametrize("labels", [2, 7])
@pytest.mark.parametrize(("shared", "own", "length"), [(40, 36, 1), (5, 9, 4), (60, 1, 2)])
def test_equal_items_take_what_is_said(labels: int, shared: int, own: int, length: int) -> None:
    made = [item(n, shared=shared, own=own, labels=labels, length=length) for n in range(30)]
    known = {"num_items": 30, "num_labels": labels, "prompt": shared + own, "shared": shared}
    for max_tokens in (10_000, shared + 10 * (own + labels * (length - 1))):
        said = scoring_tokens(**known, completion=length, max_tokens=max_tokens)
        found = ItemTrees.of(made).num_tokens(max_tokens=max_tokens)
        assert said == found if max_tokens == 10_000 else said == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("kind", ["score", "generate"])
def test_real_rungs_take_about_what_is_said(
    kind: str, tiny_model_dir: Path, topic_task: Task
) -> None:
    config = compose_config(["+exp=lora", "model=tiny", f"arms.lora.answer_by={kind}"])
    arm, renderer = resolve_arms(config)["lora"], Renderer.load(tiny_model_dir, layout="plain")
    items: dict[str, list[RenderedExample]] = {}
    for row in rung_rows(topic_task, arm, renderer):
        items.setdefault(row.item_id, []).append(row)
    tokens = arm_tokens(arm, topic_task, renderer)
    targets = [sum(row.target_mask) for rows in items.values() for row in rows]
    said = scoring_tokens(
        num_items=len(items),
        num_labels=len(topic_task.labels) if kind == "score" else 0,
        prompt=tokens.prompt,
        shared=tokens.shared,
        completion=sum(targets) / len(targets),  # this model has a label's word as one token
        max_tokens=PASS_TOKENS["cpu"],
    )
    found = ItemTrees.of(list(items.values())).num_tokens(max_tokens=PASS_TOKENS["cpu"])
    assert found == pytest.approx(said, rel=0.1)
