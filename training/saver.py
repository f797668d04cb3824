"""When a training saves its state, and what happens when it cannot."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError

from conf.errors import ClusterError, JobFailed, MachineFailed
from training.agree import is_true_everywhere, number_from_rank_0, text_from_rank_0
from training.commit import is_whole
from training.engine import Engine
from training.job import Runtime, TrainingStopped, TrainJob
from training.state import (
    SavedState,
    keep_newest,
    newest_state,
    read_state,
    states_directory,
    training_sha256,
    write_state,
)

# The share of the time that saving may take where trainer.state_every_steps is null. A training
# that dies at a random moment then loses half of 1/0.03 times a save: 17 seconds for each of it.
STATE_TIME_SHARE = 0.03
# A guess for the first state, before one was measured: gathering, hashing and syncing to a disk.
GUESSED_BYTES_PER_SECOND = 200e6
GUESSED_SECONDS = 0.3
# At a point, whose checkpoint would have to be made again. Not always: in a training of a minute
# the state of all weights (1.6 GB of 135M parameters) costs more than the steps it could save.
POINT_TIME_SHARE = 0.2
STATE_BYTES = 12  # per trained parameter: the fp32 weight and Adam's two moments
_GO_ON, _SAVE, _STOP = range(3)


class StateSaver:
    """Saves states while a training runs, and stops it when its runtime asks for that.

    note: reports a remark on global rank 0. resumed: the state it went on from.
    """

    def __init__(
        self,
        *,
        job: TrainJob,
        runtime: Runtime,
        engine: Engine,
        note: Callable[[str], None],
        resumed: SavedState | None,
    ) -> None:
        self._job = job
        self._runtime = runtime
        self._engine = engine
        self._note = note
        self._is_writer = runtime.global_rank == 0
        self._training = training_sha256(job) if self._is_writer else ""
        self._saved_step = 0 if resumed is None else resumed.step
        parameters = engine.trainee.trained_parameters
        writing = STATE_BYTES * parameters / GUESSED_BYTES_PER_SECOND
        self._cost_seconds = GUESSED_SECONDS + writing
        self._since = time.perf_counter()

    def after(
        self, step: int, *, totals: Mapping[str, int], is_point: bool, is_end: bool = False
    ) -> None:
        """Save the state of a step if it is due; called after every step but the last.

        is_end: this call of the training ends here, and another one goes on from the state.

        Raises:
            TrainingStopped: on all workers, when the runtime asked for it.
        """
        is_asked = self._runtime.should_save()  # of all workers: it tells too that they get on
        what = self._due(step, is_asked, is_point=is_point) if self._is_writer else _GO_ON
        if is_end and what == _GO_ON:
            what = _SAVE
        what = number_from_rank_0(what, device=self._engine.device)
        if what == _GO_ON:
            return
        self._save(step, totals=totals)
        if what == _STOP:
            raise TrainingStopped(number_from_rank_0(self._saved_step, device=self._engine.device))

    def _due(self, step: int, is_asked: bool, *, is_point: bool) -> int:
        if is_asked:
            return _STOP
        every = self._job.trainer.state_every_steps
        if every is not None:
            return _SAVE if is_point or step % every == 0 else _GO_ON
        waited = time.perf_counter() - self._since
        share = POINT_TIME_SHARE if is_point else STATE_TIME_SHARE
        return _SAVE if waited * share >= self._cost_seconds else _GO_ON

    def _save(self, step: int, *, totals: Mapping[str, int]) -> None:
        """Save on rank 0 what all gather. A state that cannot be written is no reason to stop."""
        started = time.perf_counter()
        tensors = self._engine.state_tensors(keep=self._is_writer)
        if not self._is_writer:
            for _ in tensors:
                pass
            return
        try:
            write_state(
                self._job.output_dir,
                training=self._training,
                step=step,
                adam_steps=self._engine.adam_steps(),
                seed=self._job.trainer.seed,
                totals=totals,
                is_linear_swapped=self._engine.is_linear_swapped,
                tensors=tensors,
            )
        except (OSError, SafetensorError) as error:
            for _ in tensors:  # the other workers take part to the end
                pass
            where = states_directory(self._job.output_dir)
            self._note(f"state of step {step} not saved: {no_room(where, self._bytes(), error)}")
        else:
            self._saved_step = step
            keep_newest(self._job.output_dir, count=self._job.trainer.keep_states)
        self._since = time.perf_counter()
        self._cost_seconds = self._since - started

    def _bytes(self) -> int:
        return STATE_BYTES * self._engine.trainee.trained_parameters


def no_room(directory: Path, needed_bytes: int, error: BaseException) -> str:
    """A sentence on a directory that could not be written."""
    return (
        f"{directory} takes about {needed_bytes:,} bytes, {free_bytes(directory):,} are free there "
        f"({type(error).__name__}: {error})"
    )


def free_bytes(directory: Path) -> int:
    """Free bytes where a directory is, or will be."""
    while not directory.exists():
        directory = directory.parent
    return shutil.disk_usage(directory).free


def require_room(job: TrainJob, *, trainee_bytes: int, state_bytes: int, points: int) -> str:
    """Check the disk before the first step; on global rank 0. Returns a remark, or "".

    trainee_bytes: of one checkpoint. points: checkpoints that are still to be written.

    Raises:
        ClusterError: the checkpoints do not fit.
    """
    directory = Path(job.output_dir)
    free, needed = free_bytes(directory), points * trainee_bytes
    if free < needed:
        raise ClusterError(
            str(directory),
            found=f"{free:,} bytes free",
            expected=f"{needed:,} bytes for {points} checkpoints",
            remedy="free some space, or write trainer.num_points=1",
        )
    with_states = needed + (job.trainer.keep_states + 1) * state_bytes
    if free < with_states:
        return (
            f"{free:,} bytes are free at {directory}, states and checkpoints take about "
            f"{with_states:,}: states may fail to be saved"
        )
    return ""


def find_state(
    job: TrainJob, *, runtime: Runtime, device: str, note: Callable[[str], None]
) -> SavedState | None:
    """The state to go on from, the same on all workers, or None; collective.

    Rank 0 chooses it, and one worker of each machine reads it whole.

    Raises:
        JobFailed: states are there and none is whole.
        MachineFailed: another machine does not see it.
    """
    failure, name = "", ""
    if runtime.global_rank == 0:
        try:
            found = newest_state(job.output_dir, training=training_sha256(job))
        except JobFailed as error:
            failure = str(error)
        else:
            for remark in found.notes:
                note(remark)
            name = "" if found.state is None else found.state.directory.name
    failure = text_from_rank_0(failure, device=device)
    if failure:
        raise JobFailed(failure)
    name = text_from_rank_0(name, device=device)
    if not name:
        return None
    directory = states_directory(job.output_dir) / name
    sees_it = runtime.local_rank != 0 or runtime.global_rank == 0 or is_whole(directory)
    if not is_true_everywhere(sees_it, device=device):
        raise MachineFailed(
            f"{directory} is not the same on all machines; it must be shared storage"
        )
    return read_state(directory)
