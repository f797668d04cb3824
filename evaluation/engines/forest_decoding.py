"""Live rows over a forest: prompts enter free slots, take tokens one by one, and leave when done.

Generation and winner-only scoring are the same loop: forward some rows, read the hidden states,
and let each row say which token it forwards next and which of its own rows that token sees.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from evaluation.engines.base import GenerateRequest, ScoreRequest, TextCodec
from evaluation.engines.best_first import BestFirst, Step, Winner
from evaluation.engines.decoding import Completion, append, check_finite, choose, start
from evaluation.engines.forest import Forest, Pass, next_pass
from evaluation.engines.forest_model import ForestModel
from evaluation.engines.kv import Fill, Slots
from evaluation.engines.rows import chain
from kernels.token_logprobs import token_logprobs

S = TypeVar("S")

# For rows after the prompt at first; slots grow when they are full, which copies them.
SPARE_COLUMNS, SPARE_COLUMNS_SHORT_LIVED = 32, 8
MAX_SLOT_WASTE = 1.5  # columns of short-lived rows' slots, by those that all rows would need
REFILL_SHARE = 0.25  # free slots that make a pass of new prompts worth its small batch


@dataclass(kw_only=True, slots=True, frozen=True)
class Next:
    """The token to forward. above: the row's own earlier rows that it sees; None: all of them."""

    token: int
    above: tuple[int, ...] | None = None


class Mode(Protocol[S]):
    """What is done with hidden states. is_short_lived: a request is done after a few rows."""

    @property
    def is_short_lived(self) -> bool:
        """Whether a request is done after a few rows."""
        ...

    def start(self, request: int) -> S:
        """The state of a request that enters."""
        ...

    def read(self, model: ForestModel, hidden: Tensor, states: Sequence[S]) -> list[Next | None]:
        """What each state forwards next, from its last row's hidden state (n, D); None: done."""
        ...


@dataclass(slots=True)
class Live(Generic[S]):
    """A request in a slot. forwarded: its own rows after the prompt."""

    request: int
    state: S
    next: Next
    forwarded: int = 0


@dataclass(kw_only=True, slots=True, frozen=True)
class Ended(Generic[S]):
    """A request that is done. forwarded: rows computed for it after its prompt."""

    request: int
    state: S
    forwarded: int


@dataclass(slots=True)
class Decoder(Generic[S]):
    """Runs all requests of a forest of prompts through at most `size` slots.

    numbers: what the mode calls each prompt. lengths: tokens of each. base: rows of the stack that
    all prompts begin with; at least one token of each is its own. max_rows: of a pass. last_path:
    rows to leave on the stack. on_pass: told of each pass, for the bill.
    """

    model: ForestModel
    mode: Mode[S]
    forest: Forest
    numbers: Sequence[int]
    lengths: Sequence[int]
    base: int
    size: int
    max_rows: int
    last_path: Sequence[int]
    on_pass: Callable[[Pass], None]
    _live: list[Live[S]] = field(default_factory=list)

    def run(self) -> Iterator[Ended[S]]:
        """Each request when it is done."""
        ends = self.forest.prompt_rows.tolist()
        waiting = sorted(range(len(ends)), key=ends.__getitem__)
        low = self.forest.num_known
        most_alike = max(Counter(ends).values())  # equal prompts end in one row and enter together
        short = self.mode.is_short_lived
        spare = SPARE_COLUMNS_SHORT_LIVED if short else SPARE_COLUMNS
        rooms = [length - self.base + spare for length in self.lengths]
        # Slots are as wide as the longest of their prompts needs. Where a row lives for a few steps
        # only, fewer slots hold the same rows in less memory, and cost little time.
        fitting = int(MAX_SLOT_WASTE * sum(rooms) / max(rooms))
        most = max(1, fitting) if short else len(ends)
        self.size = max(min(self.size, most), most_alike)
        slots = Slots(self.size, device=self.model.device)
        while waiting or self._live:
            count = min(self.size, len(self._live) + len(waiting))
            stop = self._stop_row(waiting, ends, low)
            if stop is None or stop <= low:
                slots.make_room(1 + max(slots.lengths[: len(self._live)]), count=count)
                yield from self._step(slots)
                continue
            work = next_pass(
                self.forest, low, max_rows=min(self.max_rows, stop - low), last_path=self.last_path
            )
            entering = []
            while waiting and ends[waiting[0]] < work.high:
                entering.append(waiting.pop(0))
            if entering:
                slots.make_room(max(rooms[request] for request in entering), count=count)
            yield from self._enter(slots, work, entering)
            low = work.high

    def _stop_row(self, waiting: Sequence[int], ends: Sequence[int], low: int) -> int | None:
        """The row up to which prompts may be computed now; None: rather decode."""
        free = self.size - len(self._live)
        is_worth_it = free >= min(max(1, REFILL_SHARE * self.size), len(waiting))
        if not waiting or (self._live and not is_worth_it):
            return None
        if len(waiting) <= free:
            return len(self.forest.tokens)
        return ends[waiting[free]]  # the first prompt without a slot is not finished

    def _enter(self, slots: Slots, work: Pass, entering: Sequence[int]) -> Iterator[Ended[S]]:
        """Compute a pass; the prompts that end in it take slots."""
        first = len(self._live)
        fill = self._fill(work, entering, first)
        hidden = self.model.prefill(self.forest, work, slots=slots, fill=fill)
        self.on_pass(work)
        if not entering:
            return
        rows = [int(self.forest.prompt_rows[request]) - work.low for request in entering]
        states = [self.mode.start(self.numbers[request]) for request in entering]
        for slot, request in enumerate(entering, start=first):
            slots.lengths[slot] = self.lengths[request] - self.base
            slots.ends[slot] = slots.capacity
        found = self.mode.read(self.model, hidden[rows], states)
        self._live += [
            Live(request, state, step or Next(token=-1))
            for request, state, step in zip(entering, states, found, strict=True)
        ]
        yield from self._leave(slots, first, found)

    def _fill(self, work: Pass, entering: Sequence[int], first: int) -> Fill:
        """Which rows of the pass, and of the stack above it, belong into which slot's columns."""
        own: list[tuple[int, int, int]] = []
        above: list[tuple[int, int, int]] = []
        for slot, request in enumerate(entering, start=first):
            last = int(self.forest.prompt_rows[request])
            path = [*self.forest.ancestors(last), last]
            for depth in range(self.base, len(path)):
                is_own = path[depth] >= work.low
                row = path[depth] - work.low if is_own else depth
                (own if is_own else above).append((row, slot, depth - self.base))
        return Fill.of(own, above, device=self.model.device)

    def _step(self, slots: Slots) -> Iterator[Ended[S]]:
        """One more row for each live request."""
        places = []
        for slot, live in enumerate(self._live):
            above = live.next.above
            own = self.lengths[live.request] - self.base
            if above is not None:  # of its own rows it sees its ancestors only
                slots.ends[slot, own:] = 0
                slots.ends[slot, [own + row for row in (*above, live.forwarded)]] = slots.capacity
            depth = live.forwarded if above is None else len(above)
            places.append(self.lengths[live.request] + depth)
        hidden = self.model.decode(
            slots, tokens=[live.next.token for live in self._live], places=places, depth=self.base
        )
        for live in self._live:
            live.forwarded += 1
        found = self.mode.read(self.model, hidden, [live.state for live in self._live])
        yield from self._leave(slots, 0, found)

    def _leave(self, slots: Slots, first: int, found: Sequence[Next | None]) -> Iterator[Ended[S]]:
        """Take what is done out of the slots from `first` on; the last live slot fills the gap."""
        done: list[Live[S]] = []
        for slot in range(len(self._live) - 1, first - 1, -1):
            step = found[slot - first]
            if step is not None:
                self._live[slot].next = step
                continue
            done.append(self._live[slot])
            slots.move(len(self._live) - 1, slot)
            self._live[slot] = self._live[-1]
            self._live.pop()
        for live in reversed(done):
            yield Ended(request=live.request, state=live.state, forwarded=live.forwarded)


@dataclass(slots=True)
class Generating:
    """Completions, greedy or sampled."""

    requests: Sequence[GenerateRequest]
    codec: TextCodec
    is_short_lived: bool = False

    def start(self, request: int) -> Completion:
        """An empty completion."""
        return start(chain(request, ()), self.requests[request])

    def read(
        self, model: ForestModel, hidden: Tensor, states: Sequence[Completion]
    ) -> list[Next | None]:
        """The next token of each completion."""
        with torch.no_grad():
            tokens = choose(model.head.logits(hidden), states)
        ends = frozenset(self.codec.end_ids)
        return [
            None if append(state, token, codec=self.codec, end_ids=ends) else Next(token=token)
            for state, token in zip(states, tokens, strict=True)
        ]


@dataclass(slots=True)
class Search:
    """A best-first search and what it asks for. above: for each forwarded row, its ancestors."""

    frontier: BestFirst
    wanted: tuple[int, ...]
    above: list[tuple[int, ...]] = field(default_factory=list)
    winner: Winner | None = None


@dataclass(slots=True)
class Searching:
    """Winner-only scoring."""

    requests: Sequence[ScoreRequest]
    projected: int = 0
    is_short_lived: bool = True

    def start(self, request: int) -> Search:
        """A search that has read nothing yet."""
        wanted = self.requests[request]
        frontier = BestFirst(wanted.label_ids, wanted.label_offsets or None)
        return Search(frontier, frontier.first_tokens)

    def read(
        self, model: ForestModel, hidden: Tensor, states: Sequence[Search]
    ) -> list[Next | None]:
        """The next trie node of each search, until it has its winner."""
        rows = [row for row, state in enumerate(states) for _ in state.wanted]
        tokens = [token for state in states for token in state.wanted]
        with torch.no_grad():
            logprobs = token_logprobs(
                hidden,
                model.head,
                rows=torch.tensor(rows, device=hidden.device),
                tokens=torch.tensor(tokens, device=hidden.device),
            )
        check_finite(logprobs)
        values = logprobs.tolist()
        self.projected += len(states)
        found: list[Next | None] = []
        for state in states:
            count = len(state.wanted)
            read: Mapping[int, float] = dict(zip(state.wanted, values[:count], strict=True))
            values = values[count:]
            step = state.frontier.advance(read)
            if isinstance(step, Winner):
                state.winner = step
                found.append(None)
                continue
            state.wanted = step.tokens_to_read
            found.append(Next(token=step.token, above=_above(state, step)))
        return found


def _above(state: Search, step: Step) -> tuple[int, ...]:
    """Ancestors of the next row among the search's own rows; remembered for rows below it."""
    above = () if step.parent < 0 else (*state.above[step.parent], step.parent)
    state.above.append(above)
    return above
