"""A weighted mix of prompt/completion sources: how many rows of each, which, and as token ids."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from conf.errors import DataError
from conf.hashing import sha256_of
from conf.methods import InstructionMethod
from conf.records import Item, RenderedExample, SourceRows
from conf.resolve import Arm
from evaluation.mix.sources import MixSource, load_sources
from evaluation.prepare import (
    MAX_TOO_LONG_SHARE,
    TrainingRows,
    prompt_pattern,
    shown_row,
    source_rows,
    training_row,
)
from evaluation.prompts import get_style
from evaluation.prompts.rendering import Renderer
from evaluation.tasks import Task


@dataclass(kw_only=True, slots=True, frozen=True)
class Mix:
    """A mix that is decided: sources, and how many rows each gives.

    num_rows, num_asked: source -> rows that it gives, and that its weight asked for. max_repeats:
    how often a source's items may come. sha256: of all that determines the rows but the model.
    """

    sources: tuple[MixSource, ...]
    num_rows: Mapping[str, int]
    num_asked: Mapping[str, int]
    max_repeats: int
    seed: int
    sha256: str

    @property
    def size(self) -> int:
        """Rows in all."""
        return sum(self.num_rows.values())

    @property
    def num_labels(self) -> int:
        """Different labelled examples in it that somebody provided: not the embedded ones."""
        target = {i for s in self.sources if s.is_target for i, _, _ in self._drawn(s)}
        others = (
            len({i for i, _, _ in self._drawn(s)})
            for s in self.sources
            if s.is_labelled and not s.is_target
        )
        return len(target) + sum(others)

    def _drawn(self, source: MixSource) -> Iterator[tuple[str, int, int]]:
        for item, wording, repeat in drawn(source, self.num_rows[source.name], seed=self.seed):
            yield item.id, wording, repeat


def make_mix(arm: Arm, task: Task, *, task_source: str) -> Mix:
    """Load and check an instruction arm's sources, and share out the rows.

    Raises:
        ConfigError, DataError: a source that cannot be used, with key, or file and line.
    """
    method = arm.method
    assert isinstance(method, InstructionMethod)
    sources = load_sources(arm, task, task_source=task_source)
    usable = [source for source in sources if source.items]
    given = num_rows(usable, size=method.mix_size, max_repeats=method.max_repeats)
    asked = num_rows(usable, size=method.mix_size, max_repeats=None)
    content = [
        [s.name, s.source, s.style, s.items, [c.instruction for c in s.contexts]] for s in usable
    ]
    return Mix(
        sources=sources,
        num_rows={s.name: given.get(s.name, 0) for s in sources},
        num_asked={s.name: asked.get(s.name, 0) for s in sources},
        max_repeats=method.max_repeats,
        seed=method.mix_seed,
        sha256=sha256_of([content, given, method.mix_seed]),
    )


def num_rows(
    sources: Sequence[MixSource], *, size: int | None, max_repeats: int | None
) -> dict[str, int]:
    """Rows that each source gives; max_repeats=None: that its weight asks for.

    size=None: the sources of the target task share its training items, each item once, and the
    others stand beside them by weight. Without a target source: as many rows as there are items.
    """
    weights = {source.name: source.weight for source in sources}
    sizes = {source.name: len(source.items) for source in sources}
    targets = {source.name for source in sources if source.is_target}
    parts = [(set(weights), sum(sizes.values()) if size is None else size)]
    if size is None and targets:
        num_items = max(sizes[name] for name in targets)
        own = sum(weights[name] for name in targets)
        others = set(weights) - targets
        rest = sum(weights[name] for name in others)
        parts = [(targets, num_items), (others, round(num_items * rest / own))]
    found: dict[str, int] = {}
    for names, total in parts:
        most = {name: total if max_repeats is None else sizes[name] * max_repeats for name in names}
        found |= shared_out({n: w for n, w in weights.items() if n in names}, total, most=most)
    return found


def shared_out(
    weights: Mapping[str, float], total: int, *, most: Mapping[str, int]
) -> dict[str, int]:
    """Rows per source in proportion to the weights, at most `most` of each.

    What a source cannot fill goes to the others by their weights; where none can take more, there
    are fewer rows than `total`. Whole rows by largest remainder, so that the sum is exact.
    """
    given: dict[str, float] = {}
    while len(given) < len(weights):
        left = min(total, sum(most.values())) - sum(given.values())
        rest = {name: w for name, w in weights.items() if name not in given}
        unit = left / sum(rest.values())
        full = [name for name, weight in rest.items() if weight * unit >= most[name]]
        if not full:
            given |= {name: weight * unit for name, weight in rest.items()}
        given |= {name: float(most[name]) for name in full}
    rows = {name: math.floor(value + 1e-9) for name, value in given.items()}
    missing = min(total, sum(most.values())) - sum(rows.values())
    by_remainder = sorted(weights, key=lambda name: rows[name] - given[name])
    for name in [n for n in by_remainder if rows[n] < most[n]][:missing]:
        rows[name] += 1
    return {name: rows[name] for name in weights}


def drawn(source: MixSource, count: int, *, seed: int) -> Iterator[tuple[Item, int, int]]:
    """The first `count` of a source's items in random order: item, wording, repeat (from 0).

    An item comes again only after all others have. `target` and `wordings` walk the same order
    from its two ends, so that they share the training items and repeat none before all are used.
    """
    stream = "target" if source.is_target else source.name
    for repeat in range(-(-count // max(1, len(source.items)))):
        order = list(source.items)
        random.Random(f"mix {seed} {stream} {repeat}").shuffle(order)
        if source.source == "wordings":
            order.reverse()
        begun = repeat * len(order)
        for place, item in enumerate(order[: count - begun]):
            yield item, (begun + place) % len(source.contexts), repeat


def mixed_rows(mix: Mix, arm: Arm, renderer: Renderer) -> TrainingRows:
    """Render and tokenise a mix, source by source; training shuffles the rows.

    Raises:
        DataError: over 5% of a source's rows, or all of them, are too long.
    """
    rows: list[RenderedExample] = []
    facts: list[SourceRows] = []
    total_weight = sum(s.weight for s in mix.sources if s.items)
    for source in mix.sources:
        every = list(_rows(source, mix, arm, renderer))
        kept = [row for row in every if len(row.input_ids) <= renderer.max_length]
        _refuse_too_long(source, arm, num_rows=len(every), num_kept=len(kept), renderer=renderer)
        rows += kept
        facts.append(
            source_rows(
                source.name,
                kept=kept,
                dropped=[row for row in every if len(row.input_ids) > renderer.max_length],
                num_items=len(source.items),
                share_asked=source.weight / total_weight if source.items else 0.0,
                num_held_out=source.num_held_out,
                num_duplicates=source.num_duplicates,
                note=source.note or _shortage(source, mix),
            )
        )
    first = next(source for source in mix.sources if mix.num_rows[source.name])
    style = get_style(first.style, key=f"arms.{arm.name}.prompt")
    pattern = prompt_pattern(style, first.contexts[0], renderer, like=first.items[0])
    return TrainingRows(
        rows=tuple(rows),
        prompt_sha256=sha256_of(pattern),
        num_truncated=sum(f.num_dropped for f in facts),
        shown_row=shown_row(rows[0], renderer),
        sources=tuple(facts),
    )


def _rows(source: MixSource, mix: Mix, arm: Arm, renderer: Renderer) -> Iterator[RenderedExample]:
    """A source's rows; their ids name the source, the wording and the repeat."""
    style = get_style(source.style, key=f"arms.{arm.name}.prompt")
    for item, wording, repeat in drawn(source, mix.num_rows[source.name], seed=mix.seed):
        row = training_row(item, style, source.contexts[wording], renderer)
        yield RenderedExample(
            item_id=f"{source.name}:{item.id}:{wording}:{repeat}",
            input_ids=row.input_ids,
            target_mask=row.target_mask,
        )


def _refuse_too_long(
    source: MixSource, arm: Arm, *, num_rows: int, num_kept: int, renderer: Renderer
) -> None:
    num_too_long = num_rows - num_kept
    if num_rows and (num_too_long > MAX_TOO_LONG_SHARE * num_rows or not num_kept):
        raise DataError(
            f"arms.{arm.name}.sources.{source.name}",
            found=f"{num_too_long} of {num_rows} rows over {renderer.max_length} tokens",
            expected=f"at most {MAX_TOO_LONG_SHARE:.0%} of rows over the model's context",
            remedy=f"shorten its rows, or leave it out: ~arms.{arm.name}.sources.{source.name}",
        )


def _shortage(source: MixSource, mix: Mix) -> str:
    """Said where a source is too small for its weight."""
    given, asked = mix.num_rows[source.name], mix.num_asked[source.name]
    if given >= asked:
        return ""
    return (
        f"{len(source.items)} items, each {mix.max_repeats} times at most: {given} rows where its "
        f"weight asks for {asked}"
    )
