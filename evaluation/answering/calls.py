"""From what a prompt style asks to a request for the engine: render, tokenise, check, cut."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from conf.choices import RepeatStopping, TaskKind
from conf.errors import DataError
from conf.hashing import sha256_of
from conf.records import AnswerRule, Item
from conf.resolve import Arm
from evaluation.engines.base import GenerateRequest, ScoreRequest
from evaluation.prepare import context_for
from evaluation.prompts import Ask, Calls, Think, get_style
from evaluation.prompts.rendering import Renderer, joint_ids
from evaluation.prompts.truncation import shortened
from evaluation.tasks import Task

# Room for an answer beyond the longest right one: a model may begin with a few words of its own.
SPARE_SHARE, SPARE_TOKENS = 0.25, 8


@dataclass(kw_only=True, slots=True, frozen=True)
class Pass:
    """One pass over items. rule: how scores become calibrated answers; None: they do not yet.

    repeats: answers to each item, at most. stopping: when the repeats of an item, which vote, stop
    early; None where they do not vote. is_pmi: an item's choices are scored without content too.
    is_sample: the items are a few of the set, drawn by chance.
    """

    set: str
    purpose: str
    answer_by: str
    items: Sequence[Item]
    rule: AnswerRule | None = None
    repeats: int = 1
    stopping: RepeatStopping | None = None
    is_pmi: bool = False
    is_timed: bool = False
    is_sample: bool = False


@dataclass(slots=True)
class Talk:
    """The calls of one style with one item. call: what it asks now, None when it is over."""

    item: Item
    repeat: int
    calls: Calls
    call: Ask | Think | None
    index: int = 0

    def send(self, text: str) -> str | None:
        """Send a completion; returns the style's own answer when it is over, else None."""
        try:
            self.call = self.calls.send(text)
        except StopIteration as end:
            self.call = None
            return text if end.value is None else str(end.value)
        self.index += 1
        return None


@dataclass(kw_only=True, slots=True, frozen=True)
class Call:
    """One call of one talk, ready for the engine.

    prompt_tokens: of the prompt's text alone. truncated_tokens: what the prompt had before it was
    cut, less what it has. labels: what is scored, in the request's order. error: why it cannot be
    asked.
    """

    talk: Talk
    text: str
    sha256: str
    prompt_tokens: int
    request: ScoreRequest | GenerateRequest
    truncated_tokens: int = 0
    labels: tuple[str, ...] = ()
    error: str | None = None

    @property
    def num_tokens(self) -> dict[str, int]:
        """Label -> its tokens; empty for a call that generates."""
        if not isinstance(self.request, ScoreRequest):
            return {}
        return dict(zip(self.labels, map(len, self.request.label_ids), strict=False))

    @property
    def has_distinct_starts(self) -> bool:
        """Whether the first tokens tell the labels apart, and say less than the labels whole."""
        if not isinstance(self.request, ScoreRequest):
            return False
        ids = self.request.label_ids
        return len({label[0] for label in ids}) == len(ids) < sum(map(len, ids))


class CallMaker:
    """Makes the calls of one arm."""

    def __init__(self, arm: Arm, *, task: Task, renderer: Renderer) -> None:
        """Draw the shots, find the style, and how long an answer may be."""
        self._arm = arm
        self._task = task
        self._renderer = renderer
        self._style = get_style(arm.answering.prompt, key=f"arms.{arm.name}.prompt")
        self._context = context_for(task, arm)
        self._stop = (*renderer.stop, *arm.engine.stop)
        self.max_new_tokens = arm.engine.max_new_tokens or self._longest_answer_tokens()

    def start(self, item: Item, *, repeat: int) -> Talk:
        """Begin a talk with an item."""
        calls = self._style(item, self._context.at(item))
        return Talk(item=item, repeat=repeat, calls=calls, call=next(calls))

    def make(self, talk: Talk, *, answer_by: str) -> Call:
        """The talk's present call as a request.

        Where prompts are truncated, one is cut until the longest answer has room behind it.
        """
        ask = talk.call
        assert ask is not None, "a talk that is over asks nothing"
        text = self._renderer.render(ask.messages, ask.prefix)
        if isinstance(ask, Ask) and answer_by == "score":
            return self._to_score(talk, text)
        limit = ask.max_new_tokens if isinstance(ask, Think) else self.max_new_tokens
        return self._to_generate(talk, text, limit=limit)

    def _to_score(self, talk: Talk, text: str) -> Call:
        labels = self._task.candidates(talk.item)
        words = [self._task.word(label) for label in labels]
        joint, error = None, None
        try:
            joint = joint_ids(self._renderer, text, words)
        except DataError as broken:  # of one item's choices; a task's labels are refused earlier
            error = f"item {talk.item.id}: {broken.found}; expected {broken.expected}"
        prompt_tokens = 0 if joint is None else joint.prompt_tokens
        longest = 0 if joint is None else max(map(len, joint.completion_ids))
        if self._has_to_cut(prompt_tokens + longest):
            short = self._cut(talk, text, room=self._renderer.max_length - longest)
            if short is not None:
                call = self._to_score(talk, short)
                return replace(call, truncated_tokens=prompt_tokens - call.prompt_tokens)
        return Call(
            talk=talk,
            text=text,
            sha256=_sha256(text),
            prompt_tokens=prompt_tokens,
            request=ScoreRequest(
                id=_name(talk),
                prompt_ids=joint.prompt_ids if joint else (),
                label_ids=tuple(joint.completion_ids) if joint else (),
            ),
            labels=labels,
            error=error or self._length_error(prompt_tokens, longest),
        )

    def _to_generate(self, talk: Talk, text: str, *, limit: int) -> Call:
        prompt = tuple(self._renderer.encode(text))
        # A hosted model has a context of its own, and says so where a prompt is too long for it.
        is_hosted = self._arm.engine.is_hosted
        room = limit if is_hosted else self._renderer.max_length - len(prompt)
        if self._has_to_cut(len(prompt) + limit):
            short = self._cut(talk, text, room=self._renderer.max_length - limit)
            if short is not None:
                call = self._to_generate(talk, short, limit=limit)
                return replace(call, truncated_tokens=len(prompt) - call.prompt_tokens)
        request = GenerateRequest(
            id=_name(talk),
            prompt_ids=prompt,
            max_new_tokens=max(1, min(limit, room)),
            stop=self._stop,
            temperature=self._arm.engine.temperature,
            seed=int(sha256_of(["noise", _name(talk)])[:15], 16),
            messages=_turns(talk),
        )
        return Call(
            talk=talk,
            text=text,
            sha256=_sha256(text),
            prompt_tokens=len(prompt),
            request=request,
            error=self._length_error(len(prompt), 1),
        )

    def _has_to_cut(self, tokens: int) -> bool:
        return self._arm.engine.too_long == "truncate" and tokens > self._renderer.max_length

    def _cut(self, talk: Talk, text: str, *, room: int) -> str | None:
        return shortened(
            text, talk.item, fits=lambda short: len(self._renderer.encode(short)) <= room
        )

    def _length_error(self, prompt_tokens: int, answer_tokens: int) -> str | None:
        limit = self._renderer.max_length
        if prompt_tokens + answer_tokens <= limit or self._arm.engine.is_hosted:
            return None
        return (
            f"a prompt of {prompt_tokens} tokens and an answer of {answer_tokens} "
            f"do not fit the context of {limit}"
        )

    def _longest_answer_tokens(self) -> int:
        """The longest right answer of the training split, its end token, and some room."""
        answers = {self._task.word(item.answer_key) for item in self._task.items["train"]}
        longest = max((len(self._renderer.encode(answer)) for answer in answers), default=1)
        return math.ceil(longest * (1 + SPARE_SHARE)) + 1 + SPARE_TOKENS


def check_labels(task: Task, renderer: Renderer) -> None:
    """Refuse labels or choices that no score tells apart; for use before anything starts.

    Raises:
        DataError: an empty one, or two with the same tokens; the item of bad choices is named.
    """
    if task.kind is TaskKind.classification:
        joint_ids(renderer, "", [task.word(label) for label in task.labels])
    elif task.kind is TaskKind.multiple_choice:
        for item in (item for items in task.items.values() for item in items):
            try:
                joint_ids(renderer, "", item.choices)
            except DataError as error:
                raise DataError(
                    f"{task.name}, item {item.id}",
                    found=error.found,
                    expected="choices that differ",
                    remedy="mend the item's choices, or leave the item out",
                ) from None


def _name(talk: Talk) -> str:
    """A request's id; the scripted engine reads the item's id off it."""
    return f"{talk.item.id}|{talk.repeat}|{talk.index}"


def _turns(talk: Talk) -> tuple[tuple[str, str], ...]:
    """The turns of the present call; an answer's beginning is an assistant's turn to go on with."""
    ask = talk.call
    assert ask is not None
    turns = [(message.role, message.content) for message in ask.messages]
    return (*turns, ("assistant", ask.prefix.rstrip())) if ask.prefix.strip() else tuple(turns)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
