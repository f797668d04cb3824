"""Forward and backward of a step of all trials of a pack, in smaller passes where memory runs out.

training/passes.py does it for a training alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from conf.errors import JobFailed
from kernels.memory import is_out_of_memory
from training.job import PeerLost
from training.pack_model import PackModel, Part
from training.pack_trial import Trial
from training.pack_workers import Workers
from training.telemetry import peak_memory_bytes


@dataclass(slots=True)
class TrialStep:
    """What one trial did in a step of the pack.

    parts, tokens: over all workers. own: the parts of this one. redone_tokens: computed in vain.
    """

    trial: Trial
    parts: list[Part]
    own: list[Part]
    tokens: int
    loss: float = 0.0
    redone_tokens: int = 0
    values: tuple[float, float, float] | None = field(default=None)  # None: it failed


class PackPasses:
    """The passes of a pack's steps.

    max_tokens: of a pass, as memory was found to hold. peaks: bytes of memory, by worker.
    """

    def __init__(
        self, model: PackModel, *, workers: Workers, device: str, note: Callable[[str], None]
    ) -> None:
        """note: tells a remark."""
        self.max_tokens = model.layout.max_tokens
        self.peaks: tuple[int, ...] = (0,)
        self._model, self._workers, self._device, self._note = model, workers, device, note

    def backward(self, trials: Iterable[Trial]) -> list[TrialStep]:
        """The next step of each trial, up to losses and gradients, summed over the workers.

        Raises:
            JobFailed: no memory for one part alone.
            PeerLost: that is so on another worker.
        """
        steps = [self._dealt(trial) for trial in trials]
        self._sum(steps, failure=self._backward(steps))
        return steps

    def _dealt(self, trial: Trial) -> TrialStep:
        """A trial's next step, and what of it is this worker's."""
        shares = trial.next_parts()
        parts = [part for share in shares for part in share]
        tokens = sum(map(self._model.num_tokens, parts))
        return TrialStep(
            trial=trial, parts=parts, own=shares[self._workers.global_rank], tokens=tokens
        )

    def _sum(self, steps: Sequence[TrialStep], *, failure: str) -> None:
        """Sum over the workers what each of them computed of these steps.

        failure: why this one could not compute its part.
        """
        known = [value for step in steps for value in (step.loss, step.redone_tokens)]
        *known, num_failed = self._workers.summed([*known, float(bool(failure))])
        if num_failed:
            raise JobFailed(failure) if failure else PeerLost("another worker has no memory left")
        for step, loss, redone in zip(steps, known[::2], known[1::2], strict=True):
            step.loss, step.redone_tokens = loss, int(redone)
        self._workers.sum_gradients(p for step in steps for p in step.trial.parameters)
        memory = peak_memory_bytes(self._device)
        self.peaks, most_tokens = self._workers.of_each([memory, self.max_tokens])
        self.max_tokens = min(most_tokens)  # of a pass: rungs are dealt out in the same ones

    def _backward(self, steps: Sequence[TrialStep]) -> str:
        """Forward and backward of this worker's parts; gradients stay where they belong.

        Returns why not, where one part alone does not fit into memory; else nothing.
        """
        owners = [(step, part) for step in steps for part in step.own]
        parts = [part for _, part in owners]
        while True:
            losses: list[float] = []
            try:
                for together in self._model.passes(parts, max_tokens=self.max_tokens):
                    losses += self._model.backward(together)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = self._shrink(steps, owners, done=len(losses))
                if failure:
                    return failure
                continue
            for (step, _), loss in zip(owners, losses, strict=True):
                step.loss += loss
            return ""

    def _shrink(
        self,
        steps: Sequence[TrialStep],
        owners: Sequence[tuple[TrialStep, Part]],
        *,
        done: int,
    ) -> str:
        """Half the tokens in a pass from now on; the step is taken again. Returns why not, if so.

        done: parts that were computed in vain; the pass that failed is counted as well.
        """
        parts = [part for _, part in owners]
        failed = next(self._model.passes(parts[done:], max_tokens=self.max_tokens))
        if len(failed) == 1:
            return (
                f"out of memory with {len(failed[0].rows)} rows of one trial in a pass. Try "
                "trainer.micro_batch_size=1, or trainer.activation_checkpointing=true."
            )
        for step, part in owners[: done + len(failed)]:
            step.redone_tokens += self._model.num_tokens(part)
        for step in steps:
            step.trial.forget_gradients()
        tried = sum(map(self._model.num_tokens, failed))
        self.max_tokens = tried // 2
        self._note(f"out of memory: at most {self.max_tokens} tokens in a pass from now on")
        return ""
