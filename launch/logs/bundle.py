"""`python -m launch.doctor --bundle RUN`: a zip that tells what failed, without text or secrets.

In it: config, plan, events, logs, stacks, errors, versions, machine. Left out: items, prompts,
records of answers, checkpoints, reports, W&B files, and each line or value elsewhere that holds a
part of a text of the run (text_filter.py) or looks like a secret (masking.py).
"""

from __future__ import annotations

import json
import os
import platform
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import DataError
from launch.jsonl import read_lines
from launch.logs.masking import MASK, is_secret_name, masked, secrets_of
from launch.logs.text_filter import LEFT_OUT, TextFilter, texts_of
from launch.provenance import versions

MAX_LOG_BYTES = 256 * 2**10  # of each log, its end
# Keys of the configuration whose values are the user's own words, however short.
TEXT_KEYS = frozenset(
    ("instruction", "instructions", "labels", "label_words", "label_counts", "label_places")
    + ("system", "persona", "facts")
)
# What an event may say in words; all else of it is numbers.
EVENT_WORDS = frozenset(
    ("command", "error", "remedy", "reason", "purpose", "metric", "variant", "impl", "kernel")
    + ("answer_by", "status", "device", "dtype", "kind", "name")
)
# Of the environment, names alone: they tell what was set.
ENVIRONMENT = ("RAY_", "OMP_", "CUDA_", "NCCL_", "GLOO_", "HF_", "WANDB_", "MALLOC_", "LD_PRELOAD")


@dataclass(slots=True)
class Bundle:
    """The files of a bundle by name, and what was left out of it, by why, in numbers."""

    files: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)

    def leave_out(self, why: str, count: int = 1) -> None:
        """Count something that stays here."""
        if count:
            self.left_out[why] = self.left_out.get(why, 0) + count


@dataclass(slots=True)
class _Cleaner:
    texts: TextFilter
    secrets: tuple[str, ...]
    bundle: Bundle

    def value(self, value: Any) -> Any:
        """Plain data without secrets, the user's own words and texts."""
        if isinstance(value, Mapping):
            return {self.text(str(k)): self._of_key(str(k), v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.value(v) for v in value]
        return self.text(value) if isinstance(value, str) else value

    def _of_key(self, key: str, value: Any) -> Any:
        if isinstance(value, str) and value and is_secret_name(key):
            return MASK
        if key in TEXT_KEYS and value:
            self.bundle.leave_out("texts of the configuration")
            return LEFT_OUT
        return self.value(value)

    def text(self, line: str) -> str:
        """One line, or what stands for it."""
        if self.texts.holds_text(line):
            self.bundle.leave_out("lines or values that hold text of the run")
            return LEFT_OUT
        return masked(line, self.secrets)


def bundle_of(run: Path) -> Bundle:
    """What a bundle of a run holds.

    Raises:
        DataError: the directory is no run directory.
    """
    if not any((run / name).is_file() for name in ("plan.json", "config.json", "journal.jsonl")):
        raise DataError(
            str(run),
            found="no plan.json",
            expected="a run directory",
            remedy="python -m launch.doctor --bundle outputs/RUN",
        )
    bundle = Bundle()
    cleaner = _Cleaner(TextFilter(texts_of(run)), secrets_of(), bundle)
    for name in ("config.json", "plan.json", "sweep.json"):
        _add_json(bundle, cleaner, run / name, name)
    _add_events(bundle, cleaner, run)
    _add_logs(bundle, cleaner, run)
    bundle.files["versions.json"] = _dumped(versions())
    bundle.files["machine.json"] = _dumped(_machine())
    _count_rest(bundle, run)
    bundle.files["left_out.json"] = _dumped(bundle.left_out)
    return bundle


def _dumped(value: Any) -> str:
    return json.dumps(value, indent=1) + "\n"


def _add_json(bundle: Bundle, cleaner: _Cleaner, path: Path, name: str) -> None:
    if not path.is_file():
        return
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        bundle.files[name] = _dumped({"damaged": type(error).__name__})
        return
    bundle.files[name] = _dumped(cleaner.value(value))


def _add_events(bundle: Bundle, cleaner: _Cleaner, run: Path) -> None:
    lines = []
    try:
        for event in read_lines(run / "journal.jsonl"):
            lines.append({**event, "data": _event_data(event.get("data") or {}, cleaner)})
    except ValueError as error:
        lines.append({"damaged": type(error).__name__})
    bundle.files["journal.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines)
    spent = run / "spent.jsonl"
    if spent.is_file():
        bundle.files["spent.jsonl"] = spent.read_text(encoding="utf-8")


def _event_data(data: Mapping[str, Any], cleaner: _Cleaner) -> dict[str, Any]:
    """Numbers, and words of keys that never hold the user's; what is nested stays here."""
    kept: dict[str, Any] = {}
    for key, value in data.items():
        if value is None or isinstance(value, bool | int | float):
            kept[key] = value
        elif isinstance(value, str) and key in EVENT_WORDS:
            kept[key] = "\n".join(map(cleaner.text, value.split("\n")))
    return kept


def _add_logs(bundle: Bundle, cleaner: _Cleaner, run: Path) -> None:
    """The end of each log and stack line by line, and what failed as JSON."""
    for path in sorted((run / "logs").rglob("*")):
        name = path.relative_to(run).as_posix()
        if path.is_symlink() or not path.is_file():
            continue
        if path.suffix == ".json":
            _add_json(bundle, cleaner, path, name)
        elif path.suffix in (".log", ".stack", ".old"):
            size = path.stat().st_size
            with path.open("rb") as stream:
                stream.seek(max(0, size - MAX_LOG_BYTES))
                text = stream.read().decode("utf-8", "replace")
            bundle.leave_out("bytes of long logs", max(0, size - MAX_LOG_BYTES))
            # A line cut in two could hide the half of a secret.
            lines = text.splitlines()[1 if size > MAX_LOG_BYTES else 0 :]
            bundle.files[name] = "".join(cleaner.text(line) + "\n" for line in lines)
        else:
            bundle.leave_out("other files of the run")


def _machine() -> dict[str, Any]:
    names = sorted(n for n in os.environ if n.startswith(ENVIRONMENT))
    return {
        "system": platform.platform(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "environment_names": names,
        "time": time.time(),
    }


def _count_rest(bundle: Bundle, run: Path) -> None:
    """How much of the run stays here altogether."""
    for path in run.rglob("*"):
        name = path.relative_to(run).as_posix()
        if path.is_file() and name not in bundle.files and not name.startswith("logs/"):
            bundle.leave_out("other files of the run")


def write_bundle(run: Path) -> int:
    """Write <run>-bundle.zip beside the run, and say what is in it and what is not."""
    run = run.resolve()
    bundle = bundle_of(run)
    target = run.with_name(f"{run.name}-bundle.zip")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in bundle.files.items():
            archive.writestr(name, text)
    os.replace(temporary, target)
    print(f"{target}: {len(bundle.files)} files, {target.stat().st_size / 1024:.0f} KiB")
    for why, count in sorted(bundle.left_out.items()):
        print(f"  left out: {count} {why}")
    print("  It holds no items, prompts or outputs. Look at it before you pass it on.")
    return 0
