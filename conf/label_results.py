"""The label curve's part of results.json: metric and cost at each number of labels."""

from __future__ import annotations

from dataclasses import dataclass, field

from conf.records import Measured


@dataclass(kw_only=True, slots=True, frozen=True)
class LabelPlace:
    """Where the records of one arm with one set of labels lie: arms/<records>/.

    num_used: labels that the arm looks at; places that use the same ones share their records.
    share_flipped: of the set's labels, by noise. on: records of the arm that it stands on.
    """

    arm: str
    records: str
    num_labels: int
    num_used: int
    draw: int = 0
    seed: int = 0
    noise: float = 0.0
    share_flipped: float = 0.0
    on: str | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class LabelPoint:
    """One arm with so many labels, over all draws and training seeds.

    num_labels: labelled items there were; num_used: those the arm looked at (shots end at
    num_shots). value: the metric over items, draws and seeds; variance_*: of that mean, by where it
    comes from. by_draw: the metric in each draw; sd_draws: their spread. num_runs: draws times
    seeds that are done. share_flipped: of the labels, really. fixed_*: paid before the first
    request, mean over runs; fixed_usd with labels. request_*, prompt_tokens: of one request.
    """

    arm: str
    num_labels: int
    num_used: int
    noise: float
    value: Measured
    by_draw: tuple[float, ...] = ()
    sd_draws: float | None = None
    variance_items: float | None = None
    variance_draws: float | None = None
    variance_seeds: float | None = None
    num_runs: int = 0
    num_missing: int = 0
    fixed_device_seconds: float | None = None
    fixed_usd: float | None = None
    request_device_seconds: Measured = field(default_factory=Measured)
    request_usd: Measured = field(default_factory=Measured)
    prompt_tokens: float | None = None
    share_flipped: float = 0.0


@dataclass(kw_only=True, slots=True, frozen=True)
class LabelCrossing:
    """The number of labels from which on a tuned arm is at least as good as a prompted one.

    status: crosses | none_seen (up to the largest number) | always (from the smallest on) | unknown
    (too few points). low, high: the bootstrap interval over items and draws; low None: below the
    smallest number tried, high None: above the largest; beyond them nothing is known. share_seen:
    resamples in which there is a crossing or `always`.
    """

    prompted: str
    tuned: str
    noise: float
    status: str
    labels: float | None = None
    low: float | None = None
    high: float | None = None
    share_seen: float | None = None
    smallest: int = 0
    largest: int = 0


@dataclass(kw_only=True, slots=True, frozen=True)
class Suspect:
    """A test item that all arms answer alike and against its label: the label may be wrong.

    input: None where the report shows no text.
    """

    item_id: str
    label: str | None
    answer: str | None
    num_answers: int
    input: str | None = None


@dataclass(kw_only=True, slots=True, frozen=True)
class LabelCurve:
    """Everything a label curve shows. constants: arms without labels -> their value."""

    metric: str
    sizes: tuple[int, ...]
    draws: int
    seeds: int
    noise: tuple[float, ...]
    points: tuple[LabelPoint, ...]
    constants: dict[str, Measured] = field(default_factory=dict)
    crossings: tuple[LabelCrossing, ...] = ()
    suspects: tuple[Suspect, ...] = ()
    num_suspects: int = 0
    num_checked: int = 0
