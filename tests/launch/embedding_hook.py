"""Counts what every process of a run puts through an embedding; the product knows nothing of it.

The run gets a `sitecustomize` on its PYTHONPATH, which Python imports in each process before
anything else. When torch's Embedding is imported there, its forward begins with a line in a file of
the process: the number of rows. The line is in the page cache before the rows are computed, so a
killed process leaves all of its lines.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil

COUNTS = "CROSSOVER_TEST_COUNTS"
CODE = """
import importlib.machinery, os, sys, time

NAME = "torch.nn.modules.sparse"


def count(module):
    plain = module.Embedding.forward
    state = {}

    def forward(self, input):
        if state.get("process") != os.getpid():  # a forked process has a file of its own
            name = f"{time.time_ns()}-{os.getpid()}"
            path = os.path.join(os.environ["CROSSOVER_TEST_COUNTS"], name)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
            state.update(process=os.getpid(), file=os.open(path, flags))
        os.write(state["file"], b"%d\\n" % input.numel())
        return plain(self, input)

    module.Embedding.forward = forward


class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != NAME:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            count(module)

        spec.loader.exec_module = exec_module
        return spec


if "CROSSOVER_TEST_COUNTS" in os.environ:
    sys.meta_path.insert(0, Finder)
"""


def hooked(root: Path) -> dict[str, str]:
    """The environment of a run below this directory whose embeddings count."""
    code, counts = root / "site", root / "counts"
    code.mkdir()
    counts.mkdir()
    (code / "sitecustomize.py").write_text(CODE, encoding="utf-8")
    paths = [str(code), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), COUNTS: str(counts)}


def passes(root: Path) -> list[int]:
    """The rows of every pass of every process so far."""
    files = (root / "counts").iterdir()
    return [int(line) for path in files for line in path.read_text().split()]


def processes_of(root: Path) -> list[int]:
    """Those that run with the counting environment of a directory, whoever started them."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(root) in process.environ().get(COUNTS, ""):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def billed(run: Path) -> int:
    """The tokens on the bill of a run."""
    ledger = json.loads((run / "results.json").read_text())["ledger"]
    return sum(line["tokens"] for line in ledger)
