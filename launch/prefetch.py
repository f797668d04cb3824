"""`python -m launch.prefetch [overrides]`: make the model and the data ready in the cache.

For the first set-up, and for nodes without internet: run it where there is internet, and copy
outputs/.cache/.
"""

from __future__ import annotations

import sys
from pathlib import Path

from launch.cli import guarded
from launch.compose import compose_config


def prefetch(overrides: list[str]) -> int:
    """Convert or download the base model, and load the task once."""
    from evaluation.models import locate, make_ready
    from evaluation.tasks import load_task

    config = compose_config(overrides)
    cache = Path(config.run.root) / ".cache"
    task = load_task(config.task)
    place = locate(config.model, cache=cache, texts_sha256=task.sha256)
    if place.kind != "ready":
        print(f"Preparing {config.model.name}, once, about half a minute", flush=True)
    texts = [i.input for split in ("train", "validation") for i in task.items[split]]
    path = make_ready(config.model, place, texts=texts)
    counts = ", ".join(f"{len(items)} {split}" for split, items in task.items.items())
    print(f"Model {config.model.name}: {path}")
    print(f"Task {task.name}: {counts} items")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: prefetch(sys.argv[1:])))
