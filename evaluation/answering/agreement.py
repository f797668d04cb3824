"""Whether a loaded checkpoint is the model that was trained: the same rows, the same numbers.

Training writes log p(targets) of its first rows into checkpoint.json; before an evaluation the
engine scores the same rows. A wrong base, an adapter put on with another scale or a kernel that is
wrong for this model all leave whole files and plausible answers behind, but not these numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from conf.checkpoint_records import ProbeItem
from conf.errors import JobFailed
from conf.records import LedgerLine
from evaluation.answering.bill import Bill
from evaluation.engines.base import Engine, ScoreRequest

# Largest difference that rounding explains, per target token or per nat of the sum, whichever is
# more. float32: training runs adapters beside their layers and an engine merges them, in another
# order of additions. On a 135M model, 20 rows, that is 1.5e-5; an adapter at 0.99 of its scale is
# 1.1e-2 off. bfloat16 has 8 bits, so that a logit of 20 is rounded to 1/16 and merging rounds each
# weight: 0.09 there; an adapter at half its scale is 0.8 off, and left off altogether 5.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "nf4": 0.25}


@dataclass(kw_only=True, slots=True, frozen=True)
class Disagreement:
    """The item on which the loaded model is farthest off, in units of what is allowed."""

    item_id: str
    trained: float
    loaded: float | None
    allowed: float

    @property
    def excess(self) -> float:
        """Difference / allowed difference; over 1 is another model."""
        if self.loaded is None or self.loaded != self.loaded:
            return float("inf")
        return abs(self.loaded - self.trained) / self.allowed


def require_agreement(
    engine: Engine, probe: Sequence[ProbeItem], *, dtypes: Sequence[str], where: str, bill: Bill
) -> Iterator[LedgerLine]:
    """Score the probe's rows and refuse another model; yields the lines that pay for it.

    Args:
        engine: already answering with the checkpoint.
        probe: what the model as trained found; none: there is nothing to check.
        dtypes: what was trained and what is loaded in; the coarser one sets the tolerance.
        where: the checkpoint, for the message.
        bill: of the job that is about to evaluate.

    Raises:
        JobFailed: an item differs by more than rounding.
    """
    if not probe:
        return
    requests = [
        ScoreRequest(id=str(index), prompt_ids=item.prompt_ids, label_ids=(item.target_ids,))
        for index, item in enumerate(probe)
    ]
    loaded: dict[int, float | None] = {}
    tokens = 0
    for result in engine.score(requests):
        loaded[int(result.id)] = result.label_logprobs[0] if result.error is None else None
        tokens += result.computed_tokens
    yield from bill.lines("agreement", tokens=tokens)
    worst = farthest(probe, loaded, tolerance=max(TOLERANCE[name] for name in dtypes))
    if worst.excess > 1:
        found = "no answer" if worst.loaded is None else f"{worst.loaded:.4f}"
        raise JobFailed(
            f"{where}: the loaded model is not the one that was trained. Item {worst.item_id} had "
            f"log-probability {worst.trained:.4f} after training and has {found} now; at most "
            f"{worst.allowed:.2g} apart is rounding. Check the base model (model.path), "
            "adapter_config.json, and kernels.impl=reference; then train again."
        )


def farthest(
    probe: Sequence[ProbeItem], loaded: dict[int, float | None], *, tolerance: float
) -> Disagreement:
    """The item whose difference is the largest share of what its length and size allow."""
    return max(
        (
            Disagreement(
                item_id=item.item_id,
                trained=item.logprob,
                loaded=loaded.get(index),
                allowed=tolerance * max(len(item.target_ids), abs(item.logprob)),
            )
            for index, item in enumerate(probe)
        ),
        key=lambda found: found.excess,
    )
