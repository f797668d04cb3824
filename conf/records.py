"""What a run leaves behind, and the types that two rooms exchange.

Everything written to a run directory is one of these. A value that is not known is None, never 0.
Field names are the contract of the records: they may be added to, never renamed.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from conf.hashing import plain
from conf.shared_names import shared

SCHEMA_VERSION = 1

# Why tokens were computed; one ledger line has one of these.
PURPOSES = (
    "test",
    "validation",
    "calibration",
    "curve",
    "latency",
    "general",
    "instructions",  # verifiable requests: how often the weights obey
    "bias",  # questions that a prejudice would answer
    "abstain",  # questions that the text before them does not answer
    "steering",  # the task's items, each with an instruction of its own
    "wording",  # test items under other wordings of the instruction
    "agreement",  # the probe of a checkpoint, asked again after loading
    # A search for the best training: all trials but what the winner's own steps cost; of a search
    # in legs, which are billed before the winner is known, those too.
    "sweep",
    "prompt_search",  # a search for the best prompt
    "shared",  # rows that several items use: a prefix prefilled once
    "padding",  # rows forwarded that belong to no item
    "train",
    "redone",  # work repeated after a failure
    "reference",
)


@dataclass(kw_only=True, slots=True, frozen=True)
class Measured:
    """A value with its 95% interval and the number of observations behind it."""

    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class Item:
    """One example of a task. `input` is what the model sees, `label` or `target` what is right.

    `answer_key` gives the right answer as text. `group` is the user's group column.
    `sha256` is the hash of the content that a model sees (context, input, choices), normalised.
    """

    id: str
    split: str  # train | validation | test | general
    input: str
    sha256: str
    context: str | None = None
    label: str | None = None
    target: str | None = None
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    rationale: str | None = None
    group: str | None = None
    slices: dict[str, str] = field(default_factory=dict)

    @property
    def answer_key(self) -> str:
        """The right answer: the label where there is one, else the target."""
        answer = self.label if self.label is not None else self.target
        assert answer is not None, f"item {self.id} has neither label nor target"
        return answer


@dataclass(kw_only=True, slots=True, frozen=True)
class RenderedExample:
    """One training row: token ids, and which of them the loss counts.

    input_ids: (L,) token ids. target_mask: (L,), 1 where the token is a target. Written by the
    prepare job, read by training; padding is masked by length, never by token id.
    """

    item_id: str
    input_ids: tuple[int, ...]
    target_mask: tuple[int, ...]


@dataclass(kw_only=True, slots=True, frozen=True)
class SourceRows:
    """What one source gave to the training rows of an arm, and what was trained of it.

    num_items: different items it has. num_rows, tokens, target_tokens: of the prepared rows, each
    once. num_dropped, dropped_tokens: rows over the model's context, left out whole, so that
    truncated_tokens is 0. trained_*: over all epochs. share_asked: of the mix, by weight.
    num_held_out: rows left out since they hold a text that the arms are judged on.
    """

    source: str
    num_items: int
    num_rows: int
    tokens: int
    target_tokens: int
    num_dropped: int = 0
    dropped_tokens: int = 0
    truncated_tokens: int = 0
    trained_rows: int | None = None
    trained_tokens: int | None = None
    trained_target_tokens: int | None = None
    share_asked: float | None = None
    num_held_out: int = 0
    num_duplicates: int = 0
    note: str = ""


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainingData:
    """The rows of one training by source: one source, target, but for a mix."""

    arm: str
    sources: tuple[SourceRows, ...]


@dataclass(kw_only=True, slots=True, frozen=True)
class SampleRecord:
    """One answer of one arm to one item. One line of arms/<arm>/samples.jsonl."""

    arm: str
    item_id: str
    # test | validation | general | instructions | bias | abstain | steering | wording | latency
    set: str
    repeat: int = 0
    draw: int = 0
    paraphrase: int = 0  # number of the wording; 0: the task's own
    train_seed: int | None = None
    num_shots: int = 0
    num_labels: int | None = None
    step: int | None = None  # optimizer step of the checkpoint; None for an untuned model
    call: int = 0  # index of the call that gave the answer; earlier calls have answer None
    answer_by: str = "score"  # score | generate
    prompt_sha256: str = ""
    # Counted by the endpoint where that is hosted; null where it does not tell.
    prompt_tokens: int | None = 0
    cached_tokens: int | None = 0
    computed_tokens: int | None = 0
    completion_tokens: int | None = 0
    truncated_tokens: int = 0  # cut from the item's text since the prompt was over the context
    label_logprobs: dict[str, float] | None = None  # sums over tokens; None in winner-only mode
    first_token_logprobs: dict[str, float] | None = None  # where an answer may be chosen by them
    baseline_logprobs: dict[str, float] | None = None  # of an item's choices, without content
    winner_logprob: float | None = None  # winner-only mode: the answer's log-probability
    completion: str | None = None
    answer: str | None = None
    target: str | None = None
    is_correct: bool | None = None
    calibrated_answer: str | None = None
    is_correct_calibrated: bool | None = None
    score: float | None = None
    is_format_valid: bool | None = None
    group: str | None = None
    first_token_seconds: float | None = None
    total_seconds: float | None = None
    error: str | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainRecord:
    """One optimizer step (not cumulative). One line of arms/<arm>/train.jsonl.

    flops: operations that the step needs, by shapes. flops_share: of them per second, of the matrix
    product that was measured on the same workers. peak_memory_bytes: by worker, so far.
    """

    arm: str
    step: int
    examples: int
    tokens: int  # without padding, over all workers
    target_tokens: int
    loss: float  # sum over targets / target tokens of the global batch
    learning_rate: float
    grad_norm: float | None
    step_seconds: float
    device_seconds: float
    usd: float | None
    train_seed: int = 0
    trial: int | None = None
    num_labels: int | None = None
    flops: int | None = None
    flops_share: float | None = None
    peak_memory_bytes: tuple[int, ...] = ()


@dataclass(kw_only=True, slots=True, frozen=True)
class CurvePoint:
    """A checkpoint scored on the validation split. One line of arms/<arm>/curve.jsonl."""

    arm: str
    step: int
    tokens: int  # trained so far
    device_seconds: float  # trained so far
    metric: str
    value: Measured
    train_seed: int = 0


@dataclass(kw_only=True, slots=True, frozen=True)
class LedgerLine:
    """Tokens and device-seconds that one job spent for one purpose.

    tokens counts rows forwarded through the embedding, so that the lines of a run sum to what a
    hook on the embedding counts. device_seconds = wall seconds x devices reserved.
    """

    job: str
    arm: str | None
    purpose: str
    tokens: int = 0
    completion_tokens: int = 0
    device_seconds: float = 0.0
    usd: float | None = None
    is_reused: bool = False


def rule_name(answer_by: str, normalisation: str, calibration: str) -> str:
    """A way to answer by name: score/none, score/batch, score/token, generate/none.

    Calibration stands on sums, so a name holds one of the two.
    """
    return f"{answer_by}/{calibration if normalisation == 'sum' else normalisation}"


@dataclass(kw_only=True, slots=True, frozen=True)
class AnswerRule:
    """How an arm turns label scores or completions into answers, chosen on validation.

    answer_by: score | generate. normalisation: sum | token | byte | pmi | first_token.
    calibration: none | contextual | batch. label_offsets: what is subtracted from each label's
    score. is_voted: the repeats of an item vote, and the majority is its answer. validation:
    candidate name -> its score on the validation items, so that the choice can be checked.
    """

    arm: str
    answer_by: str
    normalisation: str = "sum"
    calibration: str = "none"
    label_offsets: dict[str, float] | None = None
    is_voted: bool = False
    validation: dict[str, Measured] = field(default_factory=dict)
    draw: int = 0

    @property
    def name(self) -> str:
        """The candidate that the rule is, e.g. score/batch."""
        return rule_name(self.answer_by, self.normalisation, self.calibration)

    @property
    def is_calibrated(self) -> bool:
        """Whether labels are compared by anything but the sums of their log-probabilities."""
        return self.calibration != "none" or self.normalisation != "sum"


@dataclass(kw_only=True, slots=True, frozen=True)
class PromptText:
    """A rendered prompt, stored once by its hash. One line of prompts.jsonl."""

    prompt_sha256: str
    arm: str
    text: str


@dataclass(kw_only=True, slots=True, frozen=True)
class Progress:
    """How far a job is, for the live table: done of total, in what unit, and a short note."""

    done: int
    total: int
    unit: str = "items"
    note: str = ""


@dataclass(kw_only=True, slots=True, frozen=True)
class TrainSummary:
    """What a finished training leaves for the report."""

    arm: str
    steps: int
    trained_parameters: int
    total_parameters: int
    checkpoint_bytes: int
    device_seconds: float
    peak_memory_bytes: int | None
    examples: int
    tokens: int
    target_tokens: int
    padding_tokens: int
    num_truncated: int
    learning_rate: float
    world_size: int
    zero_stage: int
    shown_row: str  # one rendered row with its targets marked
    redone_tokens: int = 0  # of passes that ran out of memory, taken again in smaller ones
    probe_tokens: int = 0  # forwarded to note what the trained model says, see ProbeItem


@dataclass(kw_only=True, slots=True, frozen=True)
class JournalEvent:
    """One line of journal.jsonl. time: seconds since the epoch."""

    time: float
    event: str
    job: str | None = None
    arm: str | None = None
    data: dict[str, Any] = field(default_factory=dict)


def total(counts: Iterable[int | None]) -> int | None:
    """The sum of counts; None where one of them is not known."""
    found = 0
    for count in counts:
        if count is None:
            return None
        found += count
    return found


T = TypeVar("T")


def to_dict(record: Any) -> dict[str, Any]:
    """A record as the plain dictionary that is written as one JSON line."""
    return typing.cast(dict[str, Any], plain(record))


def from_dict(cls: type[T], data: dict[str, Any]) -> T:
    """A record from its dictionary; unknown keys are dropped, so newer files stay readable."""
    if not isinstance(data, dict):
        raise TypeError(f"found {type(data).__name__}, not an object")
    revivers = _revivers(typing.cast(Any, cls))
    return cls(**{k: _revived(revivers[k], v) for k, v in data.items() if k in revivers})


Reviver = Callable[[Any], Any] | None  # gives a value from JSON its type back; None: it has it


def _revived(revive: Reviver, value: Any) -> Any:
    return value if revive is None or value is None else revive(value)


@functools.cache
def _revivers(cls: type) -> dict[str, Reviver]:
    """By field of a record; resolving its types took two thirds of reading it."""
    hints = typing.get_type_hints(cls)
    return {f.name: _reviver(hints[f.name]) for f in dataclasses.fields(cls)}


def _reviver(hint: Any) -> Reviver:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _union_reviver([h for h in args if h is not type(None)])
    if dataclasses.is_dataclass(hint):
        cls = typing.cast(type[Any], hint)
        return lambda value: from_dict(cls, value) if isinstance(value, dict) else value
    if hint is str:
        return shared
    if origin in (tuple, list):
        element = _reviver(args[0])
        return lambda values: origin(_revived(element, v) for v in values)
    if origin is dict:
        entry = _reviver(args[1])
        return lambda values: {shared(k): _revived(entry, v) for k, v in values.items()}
    return None


def _union_reviver(hints: Sequence[Any]) -> Reviver:
    """Of several types the one that is a record, for a dictionary; else the value as it is."""
    if len(hints) == 1:
        return _reviver(hints[0])
    records = [h for h in hints if dataclasses.is_dataclass(h)]
    if len(records) != 1:
        return None
    return _reviver(records[0])
