"""Training states on disk: what a training needs to go on after any of its processes died.

A state is `<output_dir>/state/step-000013/`: whole fp32 tensors by parameter name (the weights that
train, Adam's two moments) in safetensors files, and a manifest with the step, Adam's step count and
the totals. It knows neither the number of workers nor the ZeRO stage that wrote it. Frozen weights
are not in it. Neither is the state of random generators: what a step draws is a function of
(seed, step, global rank), see training/loop.py. Light until tensors are read: no torch.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import JobFailed
from conf.hashing import plain, sha256_of, sha256_of_file
from training.commit import MANIFEST, Damaged, commit, read_verified, remains, settle
from training.job import TrainJob

if TYPE_CHECKING:
    from torch import Tensor

STATE_DIRECTORY = "state"
# One file is written while its tensors are in memory; a whole model's state would need 12 bytes per
# parameter on one worker.
PART_BYTES = 1 << 30
# What may differ between the attempts of one training: none of it changes the result by more than
# rounding.
_FREE_TRAINER_KEYS = (
    "micro_batch_size",
    "activation_checkpointing",
    "state_every_steps",
    "keep_states",
    "keep",
)


@dataclass(kw_only=True, slots=True, frozen=True)
class SavedState:
    """A verified state.

    adam_steps: updates that its moments have seen. totals: see the loop. is_linear_swapped: which
    linear product its weights were made with.
    """

    directory: Path
    step: int
    adam_steps: int
    totals: Mapping[str, int]
    is_linear_swapped: bool


@dataclass(kw_only=True, slots=True, frozen=True)
class Found:
    """The newest state that may be used, or None; notes: what was passed over, and why."""

    state: SavedState | None
    notes: tuple[str, ...]


def states_directory(output_dir: str | Path) -> Path:
    """Where a training keeps its states."""
    return Path(output_dir) / STATE_DIRECTORY


def training_sha256(job: TrainJob) -> str:
    """The hash of all that determines what a training does: a state of another one is not used.

    Workers, ZeRO stage and passes are not in it: a training may go on with others.
    """
    trainer = {
        field.name: getattr(job.trainer, field.name)
        for field in dataclasses.fields(job.trainer)
        if field.name not in _FREE_TRAINER_KEYS
    }
    return sha256_of(
        {
            "arm": job.arm_name,
            "method": plain(job.method),
            "trainer": trainer,
            "learning_rate": job.learning_rate,
            "base": job.base_model_sha256,
            "renderer": job.renderer_sha256,
            "prompt": job.prompt_sha256,
            "rows": sha256_of_file(Path(job.rows_path)),
            "dtype": job.dtype,
        }
    )


def newest_state(output_dir: str | Path, *, training: str) -> Found:
    """The newest state of this training that is whole, by its manifest.

    training: its training_sha256. A damaged state is passed over with a note, and so is one of
    another training. No state at all is a fresh start.

    Raises:
        JobFailed: there are states, and all of them are damaged.
    """
    directory = states_directory(output_dir)
    for left in remains(directory):
        settle(left)
    notes: list[str] = []
    damaged = 0
    for path in sorted(directory.glob("step-*"), reverse=True):
        try:
            body = read_verified(path)
        except (Damaged, OSError) as error:
            damaged += 1
            notes.append(f"damaged state passed over: {error}")
            continue
        if body["training_sha256"] != training:
            notes.append(f"{path.name} is the state of another training; it is not used")
            continue
        return Found(state=_saved(path, body), notes=tuple(notes))
    if damaged:
        raise JobFailed(
            f"{directory}: no state is whole, so training cannot go on where it was: "
            f"{'; '.join(notes)}. Nothing was trained. Remove {directory} to start from step 1."
        )
    return Found(state=None, notes=tuple(notes))


def read_state(path: Path) -> SavedState:
    """A state that was verified before, by another worker too."""
    return _saved(path, json.loads((path / MANIFEST).read_text(encoding="utf-8")))


def _saved(path: Path, body: Mapping[str, Any]) -> SavedState:
    return SavedState(
        directory=path,
        step=int(body["step"]),
        adam_steps=int(body["adam_steps"]),
        totals={key: int(value) for key, value in body["totals"].items()},
        is_linear_swapped=bool(body["is_linear_swapped"]),
    )


def write_state(
    output_dir: str | Path,
    *,
    training: str,
    step: int,
    adam_steps: int,
    seed: int,
    totals: Mapping[str, int],
    is_linear_swapped: bool,
    tensors: Iterable[tuple[str, Tensor]],
) -> Path:
    """Write one state, whole or not at all; one worker calls it.

    tensors: fp32 tensors by `weight/NAME`, `exp_avg/NAME`, `exp_avg_sq/NAME`; read once, to the end
    even if writing fails, since other workers take part in gathering them.

    Raises:
        OSError, SafetensorError: no space, no permission; older states are still there.
    """
    directory = states_directory(output_dir) / f"step-{step:06d}"
    commit(
        directory,
        write=lambda building: _write_parts(building, tensors),
        meta={
            "training_sha256": training,
            "step": step,
            "adam_steps": adam_steps,
            "seed": seed,
            "totals": dict(totals),
            "is_linear_swapped": is_linear_swapped,
        },
    )
    return directory


def _write_parts(building: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    part: dict[str, Tensor] = {}
    size = number = 0
    failure: Exception | None = None
    for key, tensor in tensors:
        if failure is not None:
            continue
        part[key] = tensor.contiguous()
        size += tensor.nbytes
        if size >= PART_BYTES:
            number += 1
            failure = _write_part(building, number, part)
            part, size = {}, 0
    if failure is None and part:
        failure = _write_part(building, number + 1, part)
    if failure is not None:
        raise failure


def _write_part(building: Path, number: int, part: dict[str, Tensor]) -> Exception | None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(part, building / f"tensors-{number:05d}.safetensors")
    except (OSError, SafetensorError) as error:
        return error
    return None


class StateTensors:
    """The tensors of a state, read from its files one at a time."""

    def __init__(self, state: SavedState) -> None:
        from safetensors import safe_open

        self._files: dict[str, Any] = {}
        for path in sorted(state.directory.glob("*.safetensors")):
            part: Any = safe_open(path, framework="pt", device="cpu")
            self._files |= dict.fromkeys(part.keys(), part)

    def names(self) -> set[str]:
        """The parameters that it holds."""
        return {key.partition("/")[2] for key in self._files}

    def get(self, kind: str, name: str) -> Tensor:
        """One tensor. kind: weight | exp_avg | exp_avg_sq."""
        key = f"{kind}/{name}"
        tensor: Tensor = self._files[key].get_tensor(key)
        return tensor


def keep_newest(output_dir: str | Path, *, count: int) -> None:
    """Remove all states but the newest, and those of other trainings that have later steps.

    Called after a state was written, with the newest at the end by time of writing.
    """
    directory = states_directory(output_dir)
    by_age = sorted(directory.glob("step-*"), key=lambda path: path.stat().st_mtime_ns)
    for path in by_age[:-count]:
        shutil.rmtree(path, ignore_errors=True)


def remove_states(output_dir: str | Path) -> None:
    """Remove all states: called when a training's results are recorded, and not before."""
    shutil.rmtree(states_directory(output_dir), ignore_errors=True)
