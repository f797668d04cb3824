"""The state of a pack on disk: what trials need to go on after their process died.

One directory, `<output_dir>/state/pack/`, that each newer state replaces whole, as
training/commit.py does: a safetensors file for each trial that trains, with its adapters and Adam's
two moments, and a manifest with its totals, the scores of all rungs and how other trials left. What
a step draws is a function of the seed and the step, so no random generator is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from conf.errors import JobFailed
from conf.hashing import plain, sha256_of, sha256_of_file
from conf.records import from_dict
from conf.trial_records import RungScore, TrialOutcome
from training.commit import Damaged, commit, read_verified, settle
from training.job import TrainJob
from training.pack_trial import Trial
from training.state import states_directory, training_sha256

PACK = "pack"


@dataclass(kw_only=True, slots=True, frozen=True)
class PackState:
    """A verified state.

    totals: of each trial that trains, by number. outcomes: of those that left. is_linear_swapped:
    which linear product the weights were made with. max_tokens: of a pass.
    """

    directory: Path
    totals: Mapping[int, Mapping[str, float]]
    outcomes: tuple[TrialOutcome, ...]
    scores: tuple[RungScore, ...]
    is_linear_swapped: bool
    max_tokens: int

    def tensors(self, trial: int) -> dict[str, Tensor]:
        """A trial's tensors, as Trial.tensors gave them."""
        return load_file(_file(self.directory, trial))


def pack_sha256(jobs: Sequence[TrainJob], *, rung_rows_path: Path, rungs: Sequence[float]) -> str:
    """The hash of all that determines what a pack does: the state of another one is not used."""
    trials = [[job.trial, training_sha256(job)] for job in jobs]
    return sha256_of([trials, sha256_of_file(rung_rows_path), list(rungs)])


def write_pack_state(
    output_dir: str | Path,
    *,
    pack: str,
    trials: Collection[Trial],
    outcomes: Iterable[TrialOutcome],
    scores: Iterable[RungScore],
    is_linear_swapped: bool,
    max_tokens: int,
) -> None:
    """Replace the state by a newer one, whole or not at all.

    Raises:
        OSError, SafetensorError: no space, no permission; the older state is still there.
    """
    commit(
        states_directory(output_dir) / PACK,
        write=_writer(trials),
        meta={
            "pack_sha256": pack,
            "totals": {str(trial.number): trial.totals() for trial in trials},
            "outcomes": plain(list(outcomes)),
            "scores": plain(list(scores)),
            "is_linear_swapped": is_linear_swapped,
            "max_tokens": max_tokens,
        },
    )


def _writer(trials: Collection[Trial]) -> Callable[[Path], None]:
    def write(building: Path) -> None:
        for trial in trials:
            save_file(trial.tensors(), _file(building, trial.number))

    return write


def _file(directory: Path, trial: int) -> Path:
    return directory / f"trial-{trial}.safetensors"


def read_pack_state(output_dir: str | Path, *, pack: str) -> PackState | None:
    """The state of this very pack; None where there is none yet, or that of another one.

    Raises:
        JobFailed: it is damaged.
    """
    directory = states_directory(output_dir) / PACK
    settle(directory)
    if not directory.is_dir():
        return None
    try:
        body: dict[str, Any] = read_verified(directory)
    except (Damaged, OSError) as error:
        raise JobFailed(
            f"{directory}: the state of the search is damaged, so it cannot go on where it was: "
            f"{error}. Nothing was trained. Remove {directory} to start from step 1."
        ) from error
    if body["pack_sha256"] != pack:
        return None
    return PackState(
        directory=directory,
        totals={int(number): totals for number, totals in body["totals"].items()},
        outcomes=tuple(from_dict(TrialOutcome, found) for found in body["outcomes"]),
        scores=tuple(from_dict(RungScore, found) for found in body["scores"]),
        is_linear_swapped=bool(body["is_linear_swapped"]),
        max_tokens=int(body["max_tokens"]),
    )
