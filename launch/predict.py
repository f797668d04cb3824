"""`python -m launch.predict RUN arm=NAME FILE OUT`: apply an arm of a finished run to new rows.

FILE needs the run's input column (and context or choices where the task has them); labels are not
needed and not read. OUT is CSV or JSONL: the row's id and the answer.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from conf.hashing import sha256_of
from conf.methods import AnsweringMethod
from conf.records import Item, SampleRecord
from conf.resolve import Arm, resolve_arms
from conf.restore import restore_config
from conf.schema import RunConfig
from launch.cli import guarded

if TYPE_CHECKING:
    from evaluation.run_records import RunRecords
    from evaluation.tasks import Task

USAGE = "python -m launch.predict outputs/RUN arm=lora new.csv answers.csv"


def predict(arguments: Sequence[str]) -> int:
    """Answer the rows of a file and write the answers."""
    named = [a for a in arguments if a.startswith("arm=")]
    rest = [a for a in arguments if not a.startswith("arm=")]
    if len(named) != 1 or len(rest) != 3:
        raise ConfigError(
            "python -m launch.predict",
            found=" ".join(arguments) or "nothing",
            expected="a run, an arm, a file of rows, and a file to write",
            remedy=USAGE,
        )
    run, source, target = (Path(a) for a in rest)
    from evaluation.plugins import load_plugins
    from evaluation.run_records import read_run
    from evaluation.tasks import load_task

    records = read_run(run)
    config = restore_config(records.config)
    load_plugins(config.plugins)
    arm = _arm(config, records, named[0].removeprefix("arm="))
    task = load_task(config.task)
    items = read_items(source, config, task)
    if target.suffix not in (".csv", ".jsonl"):
        raise ConfigError("OUT", found=target.name, expected="a name ending in .csv or .jsonl")
    print(f"{len(items)} rows with {arm.name} of {run.name}", flush=True)
    answers = _answers(config, records, arm, dataclasses.replace(task, items=_only(task, items)))
    write_answers(target, items, answers)
    print(f"Written: {target}")
    return 0


def _arm(config: RunConfig, records: RunRecords, name: str) -> Arm:
    """The arm of that name, if it finished and answers through a model."""
    arms = resolve_arms(config)
    done = [n for n, a in arms.items() if isinstance(a.method, AnsweringMethod)]
    done = [n for n in done if records.arms[n].status == "done"]
    if name not in done:
        raise ConfigError(
            "arm",
            found=name,
            expected=f"a finished arm of this run: {', '.join(done) or 'there is none'}",
            remedy=USAGE,
        )
    return arms[name]


def read_items(path: Path, config: RunConfig, task: Task) -> tuple[Item, ...]:
    """The rows as test items; the answer key is a training item's, and never looked at.

    Raises:
        DataError: a file that cannot be read, a missing column, an empty input, or a double id.
    """
    from evaluation.readers import read_rows, text_of
    from evaluation.rows import choices_of

    columns, model = config.task.columns, task.items["train"][0]
    found: dict[str, Item] = {}
    for number, row in enumerate(read_rows(path)):
        cells = {k: text_of(v) for k, v in row.values.items()}
        text = cells.get(columns.input) or cells.get(columns.prompt)
        if not text:
            raise DataError(
                row.where,
                found=f"no text in column {columns.input}; columns: {', '.join(cells)}",
                expected=f"a text in column {columns.input}, as in the run",
            )
        choices = choices_of(row.values.get(columns.choices))
        item = dataclasses.replace(
            model,
            id=cells.get(columns.id) or str(number),
            split="test",
            input=text,
            context=cells.get(columns.context) or None,
            choices=choices,
            label=choices[0] if task.kind is TaskKind.multiple_choice else model.label,
            sha256=sha256_of([cells.get(columns.context), text, choices]),
        )
        if item.id in found:
            raise DataError(row.where, found=f"id {item.id} again", expected="one row per id")
        found[item.id] = item
    return tuple(found.values())


def _only(task: Task, items: tuple[Item, ...]) -> dict[str, tuple[Item, ...]]:
    return {**task.items, "test": items}


def _answers(
    config: RunConfig, records: RunRecords, arm: Arm, task: Task
) -> dict[str, SampleRecord]:
    """Answer the test items in this process, as the run's own evaluation did."""
    from evaluation.models import locate
    from launch import workers
    from launch.cluster import local_machine
    from launch.execute import read_checkpoint

    machine = local_machine(config.cluster)
    place = locate(
        arm.model, cache=Path(config.run.root) / ".cache", texts_sha256=str(records.task["sha256"])
    )
    name = arm.name if arm.is_tuned else arm.on
    checkpoint = None
    if name is not None:
        own = records.path / "arms" / name / "final" / "checkpoint"
        checkpoint = own if own.is_dir() else Path(name)
    is_full = checkpoint is not None and read_checkpoint(checkpoint).kind == "full"
    work = workers.AnswerWork(
        job="predict",
        arm=arm,
        sets=("test",),
        task=task,
        model_dir=checkpoint if is_full and checkpoint else place.path,
        adapter_dir=None if is_full else checkpoint,
        step=None,
        train_seed=None,
        machine=machine,
        devices=machine.devices_per_node if machine.device == "cpu" else 1,
        plugins=tuple(str(Path(p).resolve()) for p in config.plugins),
        rule=records.arms[arm.name].rule,
        kernels_impl=config.kernels.impl.name,
        num_labels=None,
        usd_per_device_second=None,
        done=(),
        log_path=records.path / "logs" / "predict" / "0.log",
    )
    answers: dict[str, SampleRecord] = {}
    for events in workers.Evaluator().answer(work):
        for event in events:
            if isinstance(event, SampleRecord) and event.set == "test":
                answers[event.item_id] = event  # a later call of the same item replaces its thought
    return answers


def write_answers(path: Path, items: Sequence[Item], answers: dict[str, SampleRecord]) -> None:
    """One line per row, in the file's order; a failed item has an empty answer and says why."""
    from launch.store import write_atomically

    rows = []
    for item in items:
        record = answers[item.id]
        answer = record.calibrated_answer if record.calibrated_answer is not None else record.answer
        rows.append({"id": item.id, "answer": answer, "error": record.error})
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    else:
        stream = io.StringIO()
        writer = csv.DictWriter(stream, fieldnames=["id", "answer", "error"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = stream.getvalue()
    write_atomically(path, text)


if __name__ == "__main__":
    sys.exit(guarded(lambda: predict(sys.argv[1:])))
