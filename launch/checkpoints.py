"""Which checkpoint a job answers with, and whether it is whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from conf.checkpoint_records import CheckpointRecord
from conf.errors import JobFailed, ModelError
from conf.hashing import sha256_of, sha256_of_file
from conf.records import CurvePoint, from_dict
from conf.results import CheckpointChoice
from training.job import FINAL, checkpoint_directory, point_name


def point_checkpoint(points: Path, point: int | None) -> Path:
    """Where a checkpoint of a finished training lies.

    Args:
        points: the training's output directory.
        point: which of its intermediate checkpoints, 0 is the first; None: the last one.

    Raises:
        JobFailed: the training was too short to have so many.
    """
    if point is None:
        return checkpoint_directory(points, FINAL)
    steps = sorted(p.name for p in points.glob("step-*"))
    if point >= len(steps):
        raise JobFailed(f"the training wrote {len(steps)} intermediate checkpoints only: {points}")
    return checkpoint_directory(points, steps[point])


def best_point(points: Mapping[str, CurvePoint | None]) -> CheckpointChoice:
    """The checkpoint with the best score on validation; of equal ones the earlier.

    points: curve job -> what it left, of all of a training's checkpoints, the last included.

    Raises:
        JobFailed: one of them has no score.
    """
    scored: list[tuple[float, CurvePoint]] = []
    for job, point in points.items():
        if point is None or point.value.value is None:
            raise JobFailed(f"{job} has no score on validation, so that none can be called best")
        scored.append((point.value.value, point))
    last = max(point.step for _, point in scored)
    _, best = max(scored, key=lambda pair: (pair[0], -pair[1].step))
    return CheckpointChoice(
        variant=point_name(best.step, total_steps=last),
        step=best.step,
        metric=best.metric,
        points={str(p.step): p.value for _, p in sorted(scored, key=lambda pair: pair[1].step)},
    )


def verified(directory: Path, *, renderer_sha256: str) -> CheckpointRecord:
    """A checkpoint whose files are whole and whose tokenizer and template are the model's.

    Raises:
        ModelError: a file changed after it was written, or the checkpoint was trained with another
            tokenizer, chat template or special tokens.
    """
    record = read_checkpoint(directory)
    for name, sha256 in record.files.items():
        path = directory / name
        if not path.is_file() or sha256_of_file(path) != sha256:
            raise ModelError(
                str(path),
                found="another content than checkpoint.json says" if path.is_file() else "no file",
                expected=f"sha256 {sha256[:12]}...",
                remedy="train again: remove the job's directory below outputs/.cache/jobs",
            )
    if record.renderer_sha256 and record.renderer_sha256 != renderer_sha256:
        raise ModelError(
            str(directory),
            found="a checkpoint trained with another tokenizer, chat template or special tokens",
            expected="those of the base model it is put on",
            remedy="name the model that it was trained from: model.path=DIRECTORY",
        )
    return record


def read_checkpoint(directory: Path) -> CheckpointRecord:
    """checkpoint.json of our own checkpoints; plain peft and transformers directories do without.

    Raises:
        ModelError: the directory is neither.
    """
    own = directory / "checkpoint.json"
    if own.is_file():
        return from_dict(CheckpointRecord, json.loads(own.read_text(encoding="utf-8")))
    is_adapter = (directory / "adapter_config.json").is_file()
    if not is_adapter and not (directory / "config.json").is_file():
        raise ModelError(
            str(directory),
            found="no checkpoint.json, adapter_config.json or config.json",
            expected="a checkpoint directory of a run, or one that peft or transformers saved",
            remedy="write arms.NAME.on=outputs/RUN/arms/lora/final/checkpoint",
        )
    return CheckpointRecord(
        arm="",
        kind="lora" if is_adapter else "full",
        step=0,
        tokens=0,
        base_model="",
        base_model_sha256="",
        renderer_sha256="",
        prompt_sha256="",
        files={},
        trained_parameters=0,
    )


def checkpoint_sha256(directory: Path) -> str:
    """Names, sizes and contents' ends of a checkpoint's files; refuses pickles.

    Raises:
        ModelError: a pickle among the weights, or no weights in safetensors.
    """
    read_checkpoint(directory)
    files = sorted(p for p in directory.iterdir() if p.is_file())
    bad = [p.name for p in files if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    if bad or not any(p.suffix == ".safetensors" for p in files):
        raise ModelError(
            str(directory),
            found=", ".join(bad) or "no .safetensors file",
            expected="weights in safetensors only: loading a pickle runs its code",
            remedy="save it again with save_pretrained(..., safe_serialization=True)",
        )
    for path in files:
        if path.suffix == ".safetensors":
            _check_header(path)
    content = []
    for path in files:
        with path.open("rb") as stream:
            head = stream.read(1 << 20)
            stream.seek(max(0, path.stat().st_size - (1 << 20)))
            content.append([path.name, path.stat().st_size, head.hex(), stream.read().hex()])
    return sha256_of(content)


def _check_header(path: Path) -> None:
    """Refuse what only calls itself safetensors, by its header alone."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise ModelError(
            str(path),
            found=f"no safetensors file, or not the whole of it ({error})",
            expected="weights as save_pretrained writes them",
            remedy="copy the checkpoint again, or train it again",
        ) from None
