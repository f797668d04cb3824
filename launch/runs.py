"""`python -m launch.runs [ROOT] [--json]`: the runs below a directory, the newest first."""

from __future__ import annotations

import datetime
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from conf.errors import ConfigError, DataError
from launch.cli import guarded
from launch.run_state import age, view_run

ROOT = "outputs"
LINE_CHARACTERS = 200
# A directory with one of these is a run, or was one.
SIGNS = ("plan.json", "config.json", "journal.jsonl", "results.json")


@dataclass(kw_only=True, slots=True, frozen=True)
class Row:
    """One run. when: last sign of life, seconds since the epoch. note: what is damaged."""

    run: str
    status: str
    exp: str | None = None
    task: str | None = None
    device_seconds: float | None = None
    usd: float | None = None
    verdict: str | None = None
    arm: str | None = None
    when: float | None = None
    note: str = ""


def rows(root: Path) -> list[Row]:
    """All runs directly below a directory, the newest first; a damaged one is a row as well.

    Raises:
        DataError: there is no such directory.
    """
    if not root.is_dir():
        raise DataError(
            str(root),
            found="no directory",
            expected="a run.root, below which runs lie",
            remedy="python -m launch.runs outputs",
        )
    found = [
        _row(path)
        for path in root.iterdir()
        if path.is_dir() and any((path / sign).is_file() for sign in SIGNS)
    ]
    return sorted(found, key=lambda row: (-(row.when or 0.0), row.run))


def _row(run: Path) -> Row:
    try:
        view = view_run(run)
        stored = _json(run / "config.json")
        results = _json(run / "results.json") if (run / "results.json").exists() else {}
        choice = results.get("recommendation") or {}
        return Row(
            run=run.name,
            status=view.status,
            exp=stored["exp"],
            task=stored["task"]["name"],
            device_seconds=view.spent.device_seconds if view.spent else None,
            usd=view.usd,
            verdict=choice.get("verdict"),
            arm=choice.get("arm"),
            when=view.heartbeat,
        )
    except DataError as error:
        problem = error.found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    when = max(p.stat().st_mtime for p in [run, *run.glob("*.json*")])
    return Row(run=run.name, status="damaged", when=when, note=problem)


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} is no object")
    return value


def table(found: list[Row]) -> Table:
    """The rows for a screen; what is not known is "-"."""
    shown = Table(box=None, pad_edge=False)
    for name in ("run", "status", "task", "USD", "device-s", "verdict", "when"):
        justify: Literal["left", "right"] = "right" if name in ("USD", "device-s") else "left"
        shown.add_column(name, justify=justify, overflow="fold", no_wrap=name in ("run", "when"))
    for row in found:
        verdict = row.verdict or row.note or "-"
        when = "-"
        if row.when is not None:
            stamp = datetime.datetime.fromtimestamp(row.when).isoformat(" ", "minutes")
            when = f"{stamp}, {age(row.when)}"
        shown.add_row(
            row.run,
            row.status,
            row.task or "-",
            "-" if row.usd is None else f"{row.usd:.4f}",
            "-" if row.device_seconds is None else f"{row.device_seconds:.0f}",
            verdict,
            when,
        )
    return shown


def main(arguments: list[str]) -> int:
    """Print the table, or JSON: a list of rows."""
    places = [a for a in arguments if a != "--json"]
    if len(places) > 1 or any(p.startswith("-") for p in places):
        raise ConfigError(
            "python -m launch.runs",
            found=" ".join(arguments),
            expected="at most one directory, and --json",
            remedy=f"python -m launch.runs {ROOT} --json",
        )
    found = rows(Path(places[0] if places else ROOT))
    if "--json" in arguments:
        print(json.dumps([asdict(row) for row in found], indent=1))
    else:
        console = Console()
        if not console.is_terminal:  # a file or a pipe cuts no line
            console.width = LINE_CHARACTERS
        console.print(table(found) if found else "no runs there yet")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
