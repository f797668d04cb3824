"""`python -m launch.predict RUN arm=NAME FILE OUT`: apply an arm of a finished run to new rows.

FILE needs the run's input column (and context or choices where the task has them); labels are not
needed and not read. OUT is CSV or JSONL: the row's id and the answer. The same command goes on
where a killed one ended: finished answers lie beside OUT until it is whole.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.choices import TaskKind
from conf.errors import ConfigError, DataError
from conf.hashing import plain, sha256_of
from conf.methods import TfidfMethod
from conf.records import Item, Progress, SampleRecord, from_dict, to_dict
from launch.cli import guarded
from launch.finished import FinishedArm, find_arm, split_arguments

if TYPE_CHECKING:
    from conf.groups import ColumnsConfig
    from evaluation.tasks import Task
    from evaluation.tasks.readers import RawRow

USAGE = "python -m launch.predict outputs/RUN arm=lora new.csv answers.csv"
SECONDS_BETWEEN_NOTES = 5.0


def predict(arguments: Sequence[str]) -> int:
    """Answer the rows of a file and write the answers."""
    named, rest = split_arguments(arguments, keys=("arm",))
    if "arm" not in named or len(rest) != 3:
        raise ConfigError(
            "python -m launch.predict",
            found=" ".join(arguments) or "nothing",
            expected="a run, an arm, a file of rows, and a file to write",
            remedy=USAGE,
        )
    run, source, target = (Path(a) for a in rest)
    if target.suffix not in (".csv", ".jsonl"):
        raise ConfigError("OUT", found=target.name, expected="a name ending in .csv or .jsonl")
    found = find_arm(run, named["arm"], with_reference=True, usage=USAGE)
    items = read_items(source, found.config.task.columns, found.task)
    print(f"{len(items)} rows with {found.arm.name} of {run.name}", flush=True)
    with contextlib.closing(Kept(target, key=_key(found, items))) as kept:
        answers = final_answers(found, kept.records + list(_answered(found, items, kept)))
    write_answers(target, items, answers)
    kept.remove()
    print(f"Written: {target}")
    return 0


def read_items(path: Path, columns: ColumnsConfig, task: Task) -> tuple[Item, ...]:
    """The rows as test items; the answer key is a training item's, and never looked at.

    Raises:
        DataError: a file that cannot be read, a missing column, an empty input, or a double id.
    """
    from evaluation.tasks.readers import read_rows

    model = task.items["train"][0]
    rows = read_rows(path)
    needed = _needed_columns(rows[0], columns, task, path)
    found: dict[str, Item] = {}
    for number, row in enumerate(rows):
        item = _item(row, number, columns, needed, model=model, task=task)
        if item.id in found:
            raise DataError(row.where, found=f"id {item.id} again", expected="one row per id")
        found[item.id] = item
    return tuple(found.values())


def _needed_columns(
    row: RawRow, columns: ColumnsConfig, task: Task, path: Path
) -> Mapping[str, str]:
    """What an item needs -> the column that has it. DataError where one is missing."""
    is_prompt = columns.input not in row.values and columns.prompt in row.values
    needed = {"input": columns.prompt if is_prompt else columns.input}
    if any(item.context for item in task.items["train"]):
        needed["context"] = columns.context
    if task.kind is TaskKind.multiple_choice:
        needed["choices"] = columns.choices
    missing = [column for column in needed.values() if column not in row.values]
    if missing:
        raise DataError(
            str(path),
            found=f"columns {', '.join(map(str, row.values))}",
            expected=f"column{'s' if len(missing) > 1 else ''} {', '.join(missing)}, as in the run",
            remedy="rename the file's columns to those of the run's own data",
        )
    return needed


def _item(
    row: RawRow,
    number: int,
    columns: ColumnsConfig,
    needed: Mapping[str, str],
    *,
    model: Item,
    task: Task,
) -> Item:
    from evaluation.tasks.duplicates import content_sha256
    from evaluation.tasks.readers import text_of
    from evaluation.tasks.rows import choices_of

    cells = {name: text_of(value) for name, value in row.values.items()}
    text = cells[needed["input"]]
    if not text:
        column = needed["input"]
        raise DataError(row.where, found=f"no text in column {column}", expected="a text")
    choices: tuple[str, ...] = ()
    if "choices" in needed:
        choices = choices_of(row.values.get(needed["choices"]))
        if len(set(choices)) < 2 or len(set(choices)) < len(choices) or "" in choices:
            raise DataError(
                row.where,
                found=f"{cells[needed['choices']]!r} in column {needed['choices']}",
                expected="two or more different choices",
                remedy='write a JSON list, ["one", "two"], or one|two',
            )
    context = cells.get(columns.context) or None
    return dataclasses.replace(
        model,
        id=cells.get(columns.id) or str(number),
        split="test",
        input=text,
        context=context,
        choices=choices,
        label=choices[0] if choices else model.label,
        rationale=None,
        slices={name: cells[name] for name in model.slices if cells.get(name)},
        sha256=content_sha256(text=text, context=context, choices=choices),
    )


def _key(found: FinishedArm, items: Sequence[Item]) -> str:
    """What the kept answers of a killed attempt must agree in to be gone on from."""
    record = found.checkpoint_record
    rows = [[item.id, item.sha256, item.slices] for item in items]
    weights = record.files if record is not None else str(found.model_dir)
    return sha256_of([plain(found.arm), found.task.sha256, weights, rows])


class Kept:
    """Finished answers beside OUT, a record a line, so that a killed prediction goes on.

    The first line says what they belong to; those of another arm, file or model are not used.
    """

    def __init__(self, target: Path, *, key: str) -> None:
        from launch.jsonl import Lines, read_lines
        from launch.store import write_atomically

        self._path = target.with_name(f".{target.name}.answers.jsonl")
        lines = list(read_lines(self._path))
        is_ours = bool(lines) and lines[0].get("key") == key
        self.records = [from_dict(SampleRecord, line) for line in lines[1:]] if is_ours else []
        # Written again rather than appended to: a killed writer's last line may be half a line.
        whole = [{"key": key}, *map(to_dict, self.records)]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in whole))
        self._lines = Lines(self._path)

    def append(self, record: SampleRecord) -> None:
        """Keep one more answer."""
        self._lines.append(record)

    def close(self) -> None:
        """Stop writing; the answers stay for the next attempt."""
        self._lines.close()

    def remove(self) -> None:
        """The answers are all written: nothing is left to go on from."""
        self._path.unlink()


def _answered(found: FinishedArm, items: tuple[Item, ...], kept: Kept) -> Iterator[SampleRecord]:
    """Answer the items in this process, as the run's own evaluation did; keeps each answer."""
    task = dataclasses.replace(found.task, items={**found.task.items, "test": items})
    notes = _Notes(len(kept.records))
    for event in _events(found, task, kept):
        if isinstance(event, SampleRecord) and event.set == "test":
            kept.append(event)
            yield event
        elif isinstance(event, Progress):
            notes.show(event)


def _events(found: FinishedArm, task: Task, kept: Kept) -> Iterator[Any]:
    if isinstance(found.arm.method, TfidfMethod):
        from evaluation.answering.references import tfidf

        yield from tfidf(task, job="predict", arm=found.arm.name)
        return
    from launch import workers

    for events in workers.Evaluator().answer(_work(found, task, kept)):
        yield from events


def _work(found: FinishedArm, task: Task, kept: Kept) -> Any:
    """The work of the run's own evaluation, on other items and in this process."""
    from launch import workers
    from launch.cluster import local_machine

    config, arm, record = found.config, found.arm, found.checkpoint_record
    machine = local_machine(config.cluster)
    assert found.model_dir is not None
    is_whole = found.checkpoint is not None and not found.is_adapter
    return workers.AnswerWork(
        job="predict",
        arm=arm,
        sets=("test",),
        task=task,
        model_dir=found.checkpoint if is_whole and found.checkpoint else found.model_dir,
        adapter_dir=found.checkpoint if found.is_adapter else None,
        step=None,
        train_seed=None,
        machine=machine,
        devices=machine.devices_per_node if machine.device == "cpu" else 1,
        plugins=tuple(str(Path(p).resolve()) for p in config.plugins),
        rule=found.records.arms[arm.name].rule,
        kernels_impl=config.kernels.impl.name,
        num_labels=None,
        usd_per_device_second=None,
        done=tuple(kept.records),
        log_path=found.records.path / "logs" / "predict" / "0.log",
        probe=record.probe if record is not None else (),
        trained_dtype=record.dtype if record is not None else "float32",
    )


class _Notes:
    """How far a prediction is, on stderr, every few seconds."""

    def __init__(self, num_kept: int) -> None:
        self._begun = self._last = time.monotonic()
        self._stream = sys.stderr  # as it is now: while an engine answers, stderr is its log
        if num_kept:
            self._print(f"{num_kept} answers found of an earlier attempt")

    def show(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._last >= SECONDS_BETWEEN_NOTES:
            self._last = now
            seconds = now - self._begun
            self._print(f"{progress.done}/{progress.total} {progress.unit} in {seconds:.0f} s")

    def _print(self, note: str) -> None:
        print(note, file=self._stream, flush=True)


def final_answers(found: FinishedArm, records: Sequence[SampleRecord]) -> dict[str, SampleRecord]:
    """Item -> the record that holds its answer: of the last call, and of the vote if there is one.

    Without a vote the first of several sampled repeats answers.
    """
    from evaluation.scoring.voting import ballot, majority
    from evaluation.tasks.defaults import LABEL_KINDS

    last: dict[str, dict[int, SampleRecord]] = {}
    for record in sorted(records, key=lambda r: (r.repeat, r.call)):
        last.setdefault(record.item_id, {})[record.repeat] = record
    rule = found.records.arms[found.arm.name].rule
    is_voted = rule is not None and rule.is_voted
    is_label = found.task.kind in LABEL_KINDS
    chosen = {}
    for item_id, by_repeat in last.items():
        repeats = list(by_repeat.values())
        ballots = [ballot(r.answer, is_label=is_label) for r in repeats]
        chosen[item_id] = repeats[(majority(ballots) or 0) if is_voted else 0]
    return chosen


def write_answers(path: Path, items: Sequence[Item], answers: Mapping[str, SampleRecord]) -> None:
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
