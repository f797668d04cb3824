"""A linear probe on the tiny model: states against one prompt at a time, every row billed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.choices import Pooling
from conf.errors import ConfigError, JobFailed
from conf.methods import LinearProbeMethod
from conf.records import LedgerLine, SampleRecord
from conf.resolve import Arm
from evaluation.answering.linear_probe import (
    FEATURES_FILE,
    check_probe,
    compute_features,
    linear_probe,
    read_features,
)
from evaluation.engines.loading import load_model
from evaluation.prompts.rendering import Renderer
from evaluation.tasks import Task
from tests.evaluation.jobs import generation, make_arm


def probe_arm(pooling: Pooling = Pooling.mean) -> Arm:
    return dataclasses.replace(make_arm(), method=LinearProbeMethod(pooling=pooling))


def computed(
    arm: Arm, task: Task, model_dir: Path, path: Path
) -> tuple[list[LedgerLine], int, torch.nn.Module, Renderer]:
    """The lines of a features job, and the rows that a hook on the embedding counts."""
    model = load_model(model_dir, dtype="float32", device="cpu")
    renderer = Renderer.load(model_dir, layout="plain", max_length=None)
    rows = 0

    def count(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: object) -> None:
        nonlocal rows
        rows += inputs[0].numel()

    handle = model.get_input_embeddings().register_forward_hook(count)
    events = list(
        compute_features(
            "features",
            arm,
            task=task,
            model=model,
            renderer=renderer,
            devices=2,
            usd_per_device_second=0.01,
            path=path,
        )
    )
    handle.remove()
    return [e for e in events if isinstance(e, LedgerLine)], rows, model, renderer


@pytest.mark.parametrize("pooling", list(Pooling))
def test_states_are_those_of_one_prompt_at_a_time(
    pooling: Pooling, topic_task: Task, tiny_model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / FEATURES_FILE
    lines, rows, model, renderer = computed(probe_arm(pooling), topic_task, tiny_model_dir, path)
    assert sum(line.tokens for line in lines) == rows
    for line in lines:
        assert line.usd == pytest.approx(line.device_seconds * 0.01)
    known = read_features(path)
    for item in (*topic_task.items["test"][:5], topic_task.items["train"][0]):
        # The style `bare` in the plain layout, as any arm's prompt is rendered.
        from evaluation.prepare import context_for
        from evaluation.prompts import first_call, get_style

        context = context_for(topic_task, probe_arm(pooling))
        call = first_call(get_style("bare"), item, context)
        ids = torch.tensor([renderer.encode(renderer.render(call.messages, call.prefix))])
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids).last_hidden_state[0]  # type: ignore[operator]
        wanted = hidden[-1] if pooling is Pooling.last else hidden.mean(dim=0)
        found = known.rows[item.sha256]
        assert np.abs(found - wanted.numpy()).max() < 1e-5
        assert known.tokens[item.sha256] == ids.numel()


def test_it_learns_from_its_training_items_alone(
    topic_task: Task, tiny_model_dir: Path, tmp_path: Path
) -> None:
    path = tmp_path / FEATURES_FILE
    arm = probe_arm()
    computed(arm, topic_task, tiny_model_dir, path)

    def answers(task: Task) -> list[SampleRecord]:
        events = list(linear_probe("reference", arm, task=task, features=path))
        return [e for e in events if isinstance(e, SampleRecord)]

    found = answers(topic_task)
    tests = [s for s in found if s.set == "test"]
    # Random weights keep the words apart: chance is a seventh.
    assert len(tests) == 42 and sum(bool(s.is_correct) for s in tests) >= 30
    timed = [s for s in found if s.set == "latency"]
    assert len(timed) == 8 and all(s.total_seconds for s in timed)
    assert all(s.computed_tokens == 0 and s.cached_tokens == s.prompt_tokens > 0 for s in found)
    wrong = {item.id: dataclasses.replace(item, label="food") for item in topic_task.items["test"]}
    blind = dataclasses.replace(
        topic_task, items={**topic_task.items, "test": tuple(wrong.values())}
    )
    assert [s.answer for s in answers(blind) if s.set == "test"] == [s.answer for s in tests]
    one = tuple(i for i in topic_task.items["train"] if i.label == "food")
    with pytest.raises(JobFailed, match="two labels"):
        answers(dataclasses.replace(topic_task, items={**topic_task.items, "train": one}))


def test_it_is_for_labels() -> None:
    with pytest.raises(ConfigError, match="on"):
        LinearProbeMethod(on="lora")


def test_it_refuses_free_answers(topic_task: Task) -> None:
    check_probe(topic_task, arm="x")
    with pytest.raises(ConfigError, match=r"arms\.x"):
        check_probe(generation(topic_task), arm="x")
