"""The rows of a training, made once: those it trains on, and those a search is judged by."""

from __future__ import annotations

from pathlib import Path

from conf.records import Progress
from conf.resolve import Arm
from evaluation.mix import Mix, mixed_rows
from evaluation.tasks import Task
from launch.search.messages import RUNG_ROWS
from launch.store import write_json


def prepare_rows(
    arm: Arm,
    *,
    task: Task,
    model_dir: Path,
    mix: Mix | None,
    has_rungs: bool,
    directory: Path,
) -> Progress:
    """Render and tokenise an arm's rows into a job's directory; rows.json marks them whole.

    Args:
        arm: whose prompt and answers they are.
        task: its items.
        model_dir: of the tokenizer and template.
        mix: what an instruction arm trains on; None: the task's training items.
        has_rungs: with the validation rows that trials are judged by.
        directory: of the job.
    """
    from evaluation.prepare import training_rows, write_rows
    from evaluation.prompts.rendering import Renderer
    from evaluation.search.rung_rows import rung_rows

    renderer = Renderer.load(model_dir, layout=arm.model.layout, max_length=arm.model.max_length)
    rows = mixed_rows(mix, arm, renderer) if mix else training_rows(task, arm, renderer)
    write_rows(rows.rows, directory / "rows.jsonl")
    if has_rungs:
        write_rows(rung_rows(task, arm, renderer), directory / RUNG_ROWS)
    facts = {
        "prompt_sha256": rows.prompt_sha256,
        "num_truncated": rows.num_truncated,
        "shown_row": rows.shown_row,
        "renderer_sha256": renderer.sha256,
        "pad_id": renderer.end_ids[0],  # any id does: padding is masked by length
    }
    write_json(directory / "sources.json", rows.sources)
    write_json(directory / "rows.json", facts)  # last: it marks the rows whole
    return Progress(done=len(rows.rows), total=len(rows.rows), unit="rows")
