"""What the benchmarks work on: prompts and labels as text and as token ids.

The layout is the one of lm-evaluation-harness: a context that does not end in a space, and
continuations that begin with one, so that both sides score exactly the same token ids. Rows come
from a directory with NAME/{train,test}.jsonl, or from the embedded messages and made rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from conf.errors import DataError
from tests.benchmarks import made

URGENCY = ("not urgent", "slightly urgent", "quite urgent", "very urgent", "extremely urgent")
URGENCY_INSTRUCTION = (  # 100 tokens
    "You help the support team of an online bank to decide which messages they answer first. Read "
    "the message of the customer and say how urgent it is. A message is extremely urgent when "
    "money is being lost right now, very urgent when a customer cannot pay or travel, quite urgent "
    "when something has failed but can wait until tomorrow, slightly urgent when it is a question "
    "about an order that is on its way, and not urgent when it asks for general information. "
    "Answer with one of these labels."
)
OPENINGS = (
    "Decide whether the text message is spam or ham.",
    "Is this SMS an unwanted advertisement (spam) or a normal message (ham)?",
    "You filter text messages for a phone company. Say spam or ham.",
    "Label each message. spam: advertising, prizes or fraud. ham: all the others.",
    "Read the message and judge whether a friend could have sent it: then ham, otherwise spam.",
)
ENDINGS = (
    "Answer with one word.",
    "Write the label only.",
    "Do not explain your answer.",
    "Think of the sender first.",
)
WORDINGS = tuple(f"{opening} {ending}" for opening in OPENINGS for ending in ENDINGS)


@dataclass(kw_only=True, slots=True, frozen=True)
class Item:
    """A context with its continuations; the token ids of context + ending are prompt + label."""

    context: str
    endings: tuple[str, ...]
    prompt_ids: tuple[int, ...]
    label_ids: tuple[tuple[int, ...], ...]


@dataclass(kw_only=True, slots=True, frozen=True)
class Workload:
    """Items that are answered in one call. source: where their rows come from.

    new_tokens: how many tokens are generated per item; () where labels are scored.
    """

    source: str
    items: tuple[Item, ...]
    new_tokens: tuple[int, ...] = ()

    @property
    def prefix_tokens(self) -> int:
        """Tokens that all prompts begin with."""
        low, high = (pick(item.prompt_ids for item in self.items) for pick in (min, max))
        pairs = zip(low, high, strict=False)
        return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(low), len(high)))

    def first(self, items: int, *, labels: int | None = None) -> Workload:
        """The first items only, with their first labels only."""
        kept = [
            replace(item, endings=item.endings[:labels], label_ids=item.label_ids[:labels])
            for item in self.items[:items]
        ]
        return replace(self, items=tuple(kept), new_tokens=self.new_tokens[:items])


@dataclass(kw_only=True, slots=True, frozen=True)
class Row:
    """A line of a data set. choices: of this row alone, or () where the set has labels."""

    text: str
    label: str
    choices: tuple[str, ...] = ()


@dataclass(kw_only=True, slots=True, frozen=True)
class Rows:
    """Shots come from `train`, items from `test`."""

    source: str
    train: tuple[Row, ...]
    test: tuple[Row, ...]

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, sorted."""
        return tuple(sorted({row.label for row in self.train}))


def load_rows(name: str, data: Path | None) -> Rows:
    """Rows of banking77, arc_easy or sms_spam, in an order drawn with seed 0.

    Raises:
        DataError: a file is missing.
    """
    if data is None:
        source, train, test = made.rows(name)
        splits = {"train": train, "test": test}
    else:
        source = f"{name}, {{train,test}}.jsonl"
        splits = {split: read_jsonl(data / name / f"{split}.jsonl") for split in ("train", "test")}
    rows = {
        split: [
            Row(text=r["input"], label=r["label"].replace("_", " "), choices=tuple(r["choices"]))
            for r in found
        ]
        for split, found in splits.items()
    }
    for split in rows.values():
        random.Random(0).shuffle(split)
    return Rows(source=source, train=tuple(rows["train"]), test=tuple(rows["test"]))


def read_jsonl(path: Path) -> made.RawRows:
    """Lines with input, label and choices (empty where there are none)."""
    if not path.is_file():
        raise DataError(
            str(path), found="no such file", expected="NAME/{train,test}.jsonl", remedy="BENCH_DATA"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    return [{"choices": [], **json.loads(line)} for line in lines]


class Builder:
    """Makes workloads of a tokenizer's token ids. data: a directory, or None for embedded rows."""

    def __init__(self, model_dir: Path, *, data: Path | None) -> None:
        """Read tokenizer.json."""
        self._tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        self._data = data

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids without special tokens."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        text: str = self._tokenizer.decode(list(ids))
        return text

    def item(self, context: str, endings: Sequence[str]) -> Item:
        """Tokenise context + ending for each ending; the context's ids begin all of them."""
        prompt = self.encode(context)
        wholes = [self.encode(context + ending) for ending in endings]
        assert all(whole[: len(prompt)] == prompt for whole in wholes), context[-40:]
        return Item(
            context=context,
            endings=tuple(endings),
            prompt_ids=prompt,
            label_ids=tuple(whole[len(prompt) :] for whole in wholes),
        )

    def few_shot(
        self, name: str, *, shots: int, items: int, chunks: int, min_prefix: int = 0
    ) -> list[Workload]:
        """`chunks` workloads of `items` items each behind the same shots.

        shots: how many at least; min_prefix: more of them until the prefix has as many tokens.
        """
        rows, layout = load_rows(name, self._data), LAYOUTS[name]
        prefix = self._shots(rows, layout, shots=shots, min_prefix=min_prefix)
        return self._chunks(rows, layout, prefix, items=items, chunks=chunks)

    def zero_shot(
        self, *, items: int, chunks: int, shots: int = 0, min_prefix: int = 0
    ) -> list[Workload]:
        """Five labels of two tokens behind an instruction of 100 tokens."""
        rows, layout = load_rows("banking77", self._data), ("Message", "Urgency")
        labelled = replace(
            rows,
            source=f"{rows.source}, with five made labels",
            train=tuple(
                replace(row, label=URGENCY[i % len(URGENCY)]) for i, row in enumerate(rows.train)
            ),
        )
        prefix = f"{URGENCY_INSTRUCTION}\n\n"
        if min_prefix:
            more = min_prefix - len(self.encode(prefix))
            prefix += self._shots(labelled, layout, shots=shots, min_prefix=more)
        return self._chunks(labelled, layout, prefix, items=items, chunks=chunks)

    def wordings(self, *, items: int, chunks: int, shots: int) -> list[Workload]:
        """20 wordings of an instruction, dealt to the chunks, each with the same items."""
        rows, layout = load_rows("sms_spam", self._data), LAYOUTS["sms_spam"]
        prefix = self._shots(rows, layout, shots=shots, min_prefix=0)
        of_each = [
            self._chunks(rows, layout, f"{wording}\n\n{prefix}", items=items, chunks=1)[0]
            for wording in WORDINGS
        ]
        size = len(WORDINGS) // chunks
        return [
            replace(of_each[0], items=tuple(i for w in of_each[k : k + size] for i in w.items))
            for k in range(0, size * chunks, size)
        ]

    def generation(self, *, items: int, chunks: int, shots: int = 8) -> list[Workload]:
        """Requests for 16 to 48 new tokens."""
        found = self.few_shot("banking77", shots=shots, items=items, chunks=chunks)
        spread = [16 + round(32 * i / max(1, items - 1)) for i in range(items)]
        random.Random(0).shuffle(spread)
        return [
            replace(workload.first(items, labels=1), new_tokens=tuple(spread)) for workload in found
        ]

    def _shots(self, rows: Rows, layout: tuple[str, str], *, shots: int, min_prefix: int) -> str:
        by_label: dict[str, list[Row]] = {}
        for row in rows.train:
            by_label.setdefault("" if row.choices else row.label, []).append(row)
        queues = list(by_label.values())  # one label after the other, so that shots differ
        text, index = "", 0
        while index < shots or len(self.encode(text)) < min_prefix:
            queue = queues[index % len(queues)]
            row = queue[index // len(queues) % len(queue)]
            text += f"{layout[0]}: {row.text}\n{layout[1]}: {row.label}\n\n"
            index += 1
        return text

    def _chunks(
        self, rows: Rows, layout: tuple[str, str], prefix: str, *, items: int, chunks: int
    ) -> list[Workload]:
        if items * chunks > len(rows.test):
            raise DataError(
                rows.source,
                found=f"{len(rows.test)} test rows",
                expected=f"{items * chunks} or more",
            )
        labels = rows.labels
        made_items = [
            self.item(
                f"{prefix}{layout[0]}: {row.text}\n{layout[1]}:",
                [f" {label}" for label in row.choices or labels],
            )
            for row in rows.test[: items * chunks]
        ]
        return [
            Workload(source=rows.source, items=tuple(made_items[k * items : (k + 1) * items]))
            for k in range(chunks)
        ]


LAYOUTS = {
    "banking77": ("Message", "Intent"),
    "sms_spam": ("Message", "Label"),
    "arc_easy": ("Question", "Answer"),
}
