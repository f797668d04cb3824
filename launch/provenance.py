"""What a run directory says of itself: what was asked, of which code, on what machine."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from conf.hashing import plain
from evaluation.models import ModelPlace
from evaluation.models.facts import facts
from launch import cluster
from launch.preflight import Checked
from launch.probing import further_items
from launch.store import RunDirectory, write_json

PACKAGES = (
    "crossover",
    "torch",
    "ray",
    "deepspeed",
    "transformers",
    "peft",
    "wandb",
    "hydra-core",
    "numpy",
)


def write_facts(checked: Checked, run: RunDirectory) -> None:
    """config.json, plan.json and items.jsonl: what was asked, what will be done, on which items."""
    task = checked.task
    base = next(iter(checked.model_facts.values()), None)
    write_json(
        run.path / "config.json",
        {
            "config": plain(checked.config),
            "exp": checked.exp,
            "arms": {n: {"kind": a.kind, "on": a.on} for n, a in checked.arms.items()},
            "command": checked.command,
            "label_places": [] if checked.labels is None else plain(checked.labels.places),
            **_commit(),
            "versions": versions(),
            "hardware": {
                "name": checked.machine.name,
                "device": checked.machine.device,
                "devices": checked.machine.devices,
                "cores": cluster.num_cores(),
                "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
                "system": platform.platform(),
            },
            "task": {
                "name": task.name,
                "kind": task.kind.name,
                "scoring": task.scoring,
                "instruction": task.instruction,
                "labels": list(task.labels),
                "sha256": task.sha256,
                "num_items": {s: len(v) for s, v in task.items.items()},
                "facts": plain(task.facts),
            },
            "model": {
                "name": checked.config.model.name,
                "path": checked.config.model.path,
                "note": checked.config.model.note,
                "directory": _directory(checked),
                **(plain(dataclasses.asdict(base)) if base else {}),
            },
        },
    )
    write_json(run.path / "plan.json", checked.plan)
    items = [i for s in ("train", "validation", "test") for i in task.items[s]]
    run.write_items(items + further_items(task, checked.plan, checked.config))


def complete_facts(checked: Checked, run: RunDirectory) -> None:
    """Tell config.json the facts of a model that was made in this run, as a later one would."""
    place = _base_place(checked)
    if checked.model_facts or place is None or not place.path.is_dir():
        return
    written = json.loads((run.path / "config.json").read_text(encoding="utf-8"))
    written["model"] |= plain(dataclasses.asdict(facts(place.path)))
    write_json(run.path / "config.json", written)


def _base_place(checked: Checked) -> ModelPlace | None:
    return next((checked.places[n] for n in checked.arms if n in checked.places), None)


def _directory(checked: Checked) -> str | None:
    """Where the run's base model is, or will be; None where no arm has one."""
    place = _base_place(checked)
    if place is None:
        return None
    here = Path.cwd()
    return str(place.path.relative_to(here) if place.path.is_relative_to(here) else place.path)


def versions() -> dict[str, str]:
    """Versions of the packages that decide what a run computes."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _commit() -> dict[str, Any]:
    """The commit of this checkout and whether it has changes; None outside a repository."""
    here = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "is_dirty": None}
    return {"commit": commit, "is_dirty": bool(status.strip())}
