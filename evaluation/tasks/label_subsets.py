"""Smaller sets of training labels: nested, label by label, and with flipped labels (pure)."""

from __future__ import annotations

import math
from dataclasses import replace

from conf.choices import TaskKind
from conf.errors import ConfigError
from conf.hashing import sha256_of
from conf.label_curve import LabelCurveConfig
from conf.records import Item
from evaluation.tasks import Task
from evaluation.tasks.splits import limited, uniform

SMALLEST = 8  # labels at the left end of a curve whose sizes are not given


def sizes_of(config: LabelCurveConfig, task: Task) -> tuple[int, ...]:
    """The numbers of labels of a curve: those asked for, or log-spaced from 8 up to the pool.

    Raises:
        ConfigError: more labels than the training split has, or a pool without room for a curve;
            noise on a task whose answers are no labels.
    """
    pool = len(task.items["train"])
    if len(config.noise) > 1 and task.kind is not TaskKind.classification:
        raise ConfigError(
            "label_curve.noise",
            found=f"{config.noise} on a {task.kind.name} task",
            expected="[0], since only labels of a fixed set can be flipped",
            remedy="write label_curve.noise=[0]",
        )
    if config.sizes is not None:
        if config.sizes[-1] > pool:
            fitting = [size for size in config.sizes if size < pool]
            raise ConfigError(
                "label_curve.sizes",
                found=f"{config.sizes[-1]} labels",
                expected=f"at most {pool}, the training items there are",
                remedy=f"write label_curve.sizes={[*fitting, pool]}".replace(" ", ""),
            )
        return tuple(config.sizes)
    if pool < 4:
        raise ConfigError(
            "label_curve.sizes", found=f"a pool of {pool} training items", expected="4 or more"
        )
    first = min(SMALLEST, pool // 2)
    step = math.log(pool / first) / (config.num_sizes - 1)
    spaced = {round(first * math.exp(step * k)) for k in range(config.num_sizes)}
    return tuple(sorted({*spaced, pool} - {size for size in spaced if size > pool}))


def subset(task: Task, *, size: int, draw: int = 0, noise: float = 0.0) -> Task:
    """The task with `size` of its training items; validation and test stay as they are.

    Of one draw a smaller set is part of a larger one, every label comes before any comes twice as
    far as there are items, and a label flipped at some noise is flipped alike at more.
    """
    train = limited(
        task.items["train"], limit=size, by_label=bool(task.labels), is_balanced=False, seed=draw
    )
    flipped = tuple(with_noise(item, task.labels, noise=noise, draw=draw) for item in train)
    if flipped == task.items["train"]:
        return task
    told = [[item.id, item.answer_key] for item in flipped]
    return replace(
        task,
        items={**task.items, "train": flipped},
        sha256=sha256_of(["subset", task.sha256, told]),
    )


def with_noise(item: Item, labels: tuple[str, ...], *, noise: float, draw: int) -> Item:
    """The item, in a share `noise` of cases with one of the other labels, each as likely."""
    if item.label is None or uniform(item.sha256, purpose="noise", seed=draw) >= noise:
        return item
    others = [label for label in labels if label != item.label]
    place = uniform(item.sha256, purpose="flipped label", seed=draw)
    return replace(item, label=others[int(place * len(others))])


def share_flipped(task: Task, noisy: Task) -> float:
    """The share of a set's training labels that are not the task's."""
    right = {item.id: item.answer_key for item in task.items["train"]}
    items = noisy.items["train"]
    return sum(item.answer_key != right[item.id] for item in items) / len(items)
