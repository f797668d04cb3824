"""An arm of a finished run, found again: its configuration, task, base model and checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from conf.checkpoint_records import CheckpointRecord
from conf.errors import ConfigError, ModelError
from conf.methods import AnsweringMethod, TfidfMethod
from conf.resolve import Arm, resolve_arms
from conf.restore import restore_config
from conf.schema import RunConfig
from conf.space import arm_with
from launch.label_curve.plan import head_task

if TYPE_CHECKING:
    from evaluation.prompts.rendering import Renderer
    from evaluation.records.run_records import RunRecords
    from evaluation.tasks import Task


@dataclass(kw_only=True, slots=True, frozen=True)
class FinishedArm:
    """What answers new rows, or is exported.

    model_dir: the base model's directory; None for TF-IDF. checkpoint: the arm's own or that of
    the arm it stands on, verified; None where the base model answers.
    """

    records: RunRecords
    config: RunConfig
    arm: Arm
    task: Task
    model_dir: Path | None
    checkpoint: Path | None
    checkpoint_record: CheckpointRecord | None

    @property
    def renderer(self) -> Renderer:
        """The base model's tokenizer and template."""
        from evaluation.prompts.rendering import Renderer

        assert self.model_dir is not None, "TF-IDF renders nothing"
        model = self.arm.model
        return Renderer.load(self.model_dir, layout=model.layout, max_length=model.max_length)

    @property
    def is_adapter(self) -> bool:
        """Whether the checkpoint stands on the base model, rather than being a whole model."""
        record = self.checkpoint_record
        return record is not None and record.kind != "full"


def find_arm(run: Path, name: str, *, with_reference: bool, usage: str) -> FinishedArm:
    """Find a finished arm of a run directory.

    Args:
        run: a run directory; base models are looked for in the cache beside it.
        name: the arm's.
        with_reference: whether TF-IDF is an arm that the caller can use.
        usage: the command as it should be typed.

    Raises:
        DataError: no run. ConfigError: no such arm, or it did not finish. ModelError: a base model
            or checkpoint that is gone or has changed.
    """
    from evaluation.plugins import load_plugins
    from evaluation.records.run_records import read_run
    from evaluation.tasks import load_task

    records = read_run(run)
    config = restore_config(records.config)
    load_plugins(config.plugins)
    arm = _arm(config, records, name, with_reference=with_reference, usage=usage)
    model_dir = checkpoint = record = None
    if isinstance(arm.method, AnsweringMethod):
        model_dir = _model_dir(arm, records)
        checkpoint, record = _checkpoint(arm, records, model_dir)
    return FinishedArm(
        records=records,
        config=config,
        arm=arm,
        task=head_task(config, load_task(config.task)),
        model_dir=model_dir,
        checkpoint=checkpoint,
        checkpoint_record=record,
    )


def split_arguments(
    arguments: Sequence[str], *, keys: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """`key=value` arguments with these keys, and all others in their order."""
    named = {}
    rest = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in keys and value and key not in named:
            named[key] = value
        else:
            rest.append(argument)
    return named, rest


def _arm(
    config: RunConfig, records: RunRecords, name: str, *, with_reference: bool, usage: str
) -> Arm:
    kinds = (AnsweringMethod, TfidfMethod) if with_reference else (AnsweringMethod,)
    arms = resolve_arms(config)
    done = [n for n, a in arms.items() if isinstance(a.method, kinds) and a.kind != "linear_probe"]
    done = [n for n in done if records.arms[n].status == "done"]
    if name not in done:
        raise ConfigError(
            "arm",
            found=name,
            expected=f"a finished arm of this run: {', '.join(done) or 'there is none'}",
            remedy=usage,
        )
    search = records.arms[name].search
    values = list(search.chosen_values().items()) if search is not None else []
    return arm_with(config, name, values) if values else arms[name]


def _model_dir(arm: Arm, records: RunRecords) -> Path:
    from evaluation.models import locate

    cache = records.path.resolve().parent / ".cache"
    place = locate(arm.model, cache=cache, texts_sha256=str(records.task["sha256"]))
    if place.kind != "ready":
        raise ModelError(
            str(place.path),
            found="no such directory",
            expected="the base model that the run used, in the cache beside the run",
            remedy="type the run's own command again: it makes the model and runs nothing else",
        )
    return place.path


def _checkpoint(
    arm: Arm, records: RunRecords, model_dir: Path
) -> tuple[Path | None, CheckpointRecord | None]:
    from evaluation.prompts.rendering import Renderer
    from launch.checkpoints import verified
    from training.job import FINAL, checkpoint_directory

    name = arm.name if arm.is_tuned else arm.on
    if name is None:
        return None, None
    choice = records.arms[arm.name].checkpoint
    variant = FINAL if choice is None else choice.variant
    own = checkpoint_directory(records.path / "arms" / name, variant)
    checkpoint = own if own.is_dir() else Path(name)
    model = arm.model
    renderer = Renderer.load(model_dir, layout=model.layout, max_length=model.max_length)
    return checkpoint.resolve(), verified(checkpoint, renderer_sha256=renderer.sha256)
