"""What the training benchmarks train on: banking77 as chat, with and without an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.records import RenderedExample
from evaluation.prompts.layouts import Message
from evaluation.prompts.rendering import Renderer, joint_ids
from tests.benchmarks.workloads import load_rows

BATCH = 8
INSTRUCTION = (
    "You help the support team of an online bank. Read the message of the customer and name its "
    "topic in a few words, as the bank's list of topics has it. Messages are about cards that do "
    "not arrive, do not work, were lost, stolen or swallowed by a machine; about transfers and "
    "top-ups that are pending, were declined, cancelled or went to somebody else; about cash "
    "withdrawals, exchange rates, fees and refunds; about the proof of identity, the source of "
    "funds, the pin, the passcode and the details of an account. Where a message fits two topics "
    "take the narrower one. Write the topic only, in small letters, without a full stop."
)


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainingData:
    """Rows by round. source: where they come from."""

    source: str
    chunks: tuple[tuple[RenderedExample, ...], ...]

    @property
    def mean_tokens(self) -> float:
        """Tokens of a row."""
        lengths = [len(row.input_ids) for chunk in self.chunks for row in chunk]
        return sum(lengths) / len(lengths)

    @property
    def mean_targets(self) -> float:
        """Target tokens of a row."""
        counts = [sum(row.target_mask) for chunk in self.chunks for row in chunk]
        return sum(counts) / len(counts)


def banking77(
    model_dir: Path, data: Path | None, *, rows: int, chunks: int, instruction: str = ""
) -> TrainingData:
    """Chat examples with the model's own system prompt: message, then topic."""
    renderer = Renderer.load(model_dir)
    found = load_rows("banking77", data)
    texts = list(found.train)
    while len(texts) < rows * chunks:  # the made rows are few; no chunk holds one twice
        texts += found.train
    made = [_example(renderer, instruction, row.text, row.label) for row in texts[: rows * chunks]]
    parts = tuple(tuple(made[k * rows : (k + 1) * rows]) for k in range(chunks))
    return TrainingData(source=found.source, chunks=parts)


def _example(renderer: Renderer, instruction: str, text: str, label: str) -> RenderedExample:
    content = f"{instruction}\n\n{text}" if instruction else text
    prompt = renderer.render([Message(role="user", content=content)])
    joint = joint_ids(renderer, prompt, [label], end=True)
    targets = joint.completion_ids[0]
    return RenderedExample(
        item_id="",
        input_ids=(*joint.prompt_ids, *targets),
        target_mask=(0,) * len(joint.prompt_ids) + (1,) * len(targets),
    )


def batches(rows: Sequence[RenderedExample]) -> list[Sequence[RenderedExample]]:
    """Rows in batches of 8."""
    return [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
