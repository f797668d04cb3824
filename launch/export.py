"""`python -m launch.export RUN arm=NAME OUT [merge=true]`: an arm as a directory of its own.

OUT holds what plain transformers and peft load (safetensors, tokenizer, chat template), and
prompt.json with the arm's prompt, rendered. A LoRA arm is its adapter; merge=true makes a whole
model of every arm, adapters merged into their base. OUT appears whole or not at all, and only when
the merged model says of the first training rows what the trained one said.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.errors import ConfigError, ModelError, NotBuiltYet
from conf.hashing import plain
from launch.cli import guarded
from launch.finished import FinishedArm, find_arm, split_arguments
from launch.store import write_json

if TYPE_CHECKING:
    from evaluation.prompts.rendering import Renderer

USAGE = "python -m launch.export outputs/RUN arm=lora exported merge=true"
PROMPT_FILE, MANIFEST = "prompt.json", "export.json"
OURS = ("checkpoint.json", "manifest.json")  # of the run: they hold training rows


def export(arguments: Sequence[str]) -> int:
    """Write the directory."""
    named, rest = split_arguments(arguments, keys=("arm", "merge"))
    is_merged = {"true": True, "false": False}.get(named.get("merge", "false"))
    if "arm" not in named or len(rest) != 2 or is_merged is None:
        raise ConfigError(
            "python -m launch.export",
            found=" ".join(arguments) or "nothing",
            expected="a run, an arm, a directory to make, and perhaps merge=true",
            remedy=USAGE,
        )
    run, target = (Path(a) for a in rest)
    if target.exists() or target.is_symlink():
        raise ConfigError(
            "OUT",
            found=f"{target}, which exists",
            expected="a directory that does not exist yet",
            remedy="name another one, or remove it first",
        )
    found = find_arm(run, named["arm"], with_reference=False, usage=USAGE)
    _write(found, target, is_merged=is_merged)
    print(f"Written: {target}")
    return 0


def _write(found: FinishedArm, target: Path, *, is_merged: bool) -> None:
    from launch.logs.worker_log import logged
    from training.commit import commit

    def write(directory: Path) -> None:
        if found.is_adapter and is_merged:
            _write_merged(found, directory)
            _check_merged(found, directory)
        elif found.checkpoint is not None:
            _copy(found.checkpoint, directory)
            if found.is_adapter:
                _copy_tokenizer(found, directory)
        elif is_merged:
            assert found.model_dir is not None
            _copy(found.model_dir, directory)
        write_json(directory / PROMPT_FILE, prompt_facts(found))
        for path in directory.iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone; servers run as others

    record = found.checkpoint_record
    meta = {
        "run": found.records.name,
        "arm": found.arm.name,
        "kind": found.arm.kind,
        "is_merged": is_merged,
        "base_model": found.arm.model.path or found.arm.model.name,
        "base_model_sha256": record.base_model_sha256 if record is not None else None,
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    with logged(found.records.path / "logs" / "export" / "0.log"):  # what libraries print
        commit(target, write=write, meta=meta, manifest=MANIFEST)


def _copy(source: Path, directory: Path) -> None:
    """All files but our own records of a checkpoint."""
    for path in sorted(source.rglob("*")):
        if path.is_file() and path.name not in OURS:
            place = directory / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def _copy_tokenizer(found: FinishedArm, directory: Path) -> None:
    from training.checkpoint import TOKENIZER_FILES

    assert found.model_dir is not None
    for name in TOKENIZER_FILES:
        if (found.model_dir / name).is_file():
            shutil.copyfile(found.model_dir / name, directory / name)


def _write_merged(found: FinishedArm, directory: Path) -> None:
    """The base model with the adapter in its weights, in the dtype that was trained in."""
    from evaluation.engines.loading import load_adapter, load_model

    assert found.model_dir is not None and found.checkpoint is not None
    assert found.checkpoint_record is not None
    model = load_model(found.model_dir, dtype=found.checkpoint_record.dtype, device="cpu")
    adapted: Any = load_adapter(model, found.checkpoint)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        raise ModelError(
            str(found.checkpoint),
            found=f"an adapter that peft cannot merge: {error}",
            expected="a kind that merges into the weights, e.g. LoRA",
            remedy="leave out merge=true: the adapter alone is exported",
        ) from error
    merged.save_pretrained(str(directory))
    _copy_tokenizer(found, directory)


def _check_merged(found: FinishedArm, directory: Path) -> None:
    """Load what was written, plainly, and compare it with what was trained. Raises JobFailed."""
    from conf.groups import EngineConfig
    from evaluation.answering.agreement import require_agreement
    from evaluation.answering.bill import Bill
    from evaluation.engines import build_engine
    from launch.cluster import num_cores

    record = found.checkpoint_record
    assert record is not None
    engine = build_engine(
        EngineConfig(name="transformers"),
        model_dir=directory,
        adapter_dir=None,
        renderer=found.renderer,
        dtype=record.dtype,
        device="cpu",
        threads=num_cores(),
        task=None,
    )
    bill = Bill(
        job="export", arm=found.arm.name, engine=engine, devices=1, usd_per_device_second=None
    )
    dtypes = (record.dtype,)
    list(require_agreement(engine, record.probe, dtypes=dtypes, where="merged", bill=bill))


def prompt_facts(found: FinishedArm) -> dict[str, Any]:
    """prompt.json: the prompt as the model sees it, and how its answer is read.

    text: the whole prompt with {input} where the item goes (and {context}, {choice 1}, ...).
    answer_by: generate, or score: each label's text follows the prompt, log-probabilities are
    added up, normalised, lessened by the label's offset, and the largest wins. endings: label ->
    what follows the prompt. calls: 2 where a thought is generated before the answer.
    """
    from evaluation.answering.calls import CallMaker
    from evaluation.prepare import context_for, prompt_pattern
    from evaluation.prompts import Ask, first_call, get_style

    task, arm, renderer = found.task, found.arm, found.renderer
    style, context = get_style(arm.answering.prompt), context_for(task, arm)
    if context.retrieve is not None:
        raise NotBuiltYet(
            f"exporting {arm.name}, whose shots are found anew for each item",
            instead="answer with python -m launch.predict, or write shot_selection=balanced",
        )
    like = task.items["train"][0]
    text = prompt_pattern(style, context, renderer, like=like)
    is_one_call = isinstance(first_call(style, like, context), Ask)
    rule = found.records.arms[arm.name].rule
    calls = CallMaker(arm, task=task, renderer=renderer)
    return {
        "arm": arm.name,
        "style": arm.answering.prompt,
        "text": text,
        "calls": 1 if is_one_call else 2,
        "answer_by": rule.answer_by if rule is not None else "generate",
        "normalisation": rule.normalisation if rule is not None else "sum",
        "calibration": rule.calibration if rule is not None else "none",
        "is_voted": rule is not None and rule.is_voted,
        "label_offsets": rule.label_offsets if rule is not None else None,
        **_label_facts(found, renderer, text),
        "max_new_tokens": calls.max_new_tokens,
        "temperature": arm.engine.temperature,
        "stop": [*renderer.stop, *arm.engine.stop],
        "start_token_ids": renderer.encode(""),
        "end_token_ids": list(renderer.end_ids),
        "task": {"name": task.name, "kind": task.kind.name, "instruction": task.instruction},
        "method": plain(arm.answering),
    }


def _label_facts(found: FinishedArm, renderer: Renderer, text: str) -> dict[str, Any]:
    """What follows the prompt for each label; closing_token_id where labels begin one another."""
    from evaluation.prompts.rendering import joint_ids

    if not found.task.labels:
        return {"endings": {}, "closing_token_id": None}
    words = [found.task.word(label) for label in found.task.labels]
    joint = joint_ids(renderer, text, words)
    is_closed = all(ids[-1] == renderer.end_ids[0] for ids in joint.completion_ids)
    gap = renderer.gap(text)
    return {
        "endings": dict(zip(found.task.labels, (gap + w for w in words), strict=True)),
        "closing_token_id": renderer.end_ids[0] if is_closed else None,
    }


if __name__ == "__main__":
    sys.exit(guarded(lambda: export(sys.argv[1:])))
