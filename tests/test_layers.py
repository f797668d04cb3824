"""Imports go downward only, and what must stay light imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "conf": set(),
    "kernels": set(),
    "training": {"kernels", "conf"},
    "evaluation": {"kernels", "conf"},
    "launch": {"training", "evaluation", "conf", "kernels"},
}
# The rooms of evaluation/, each of which imports only from those before it.
ROOMS = (
    *("wording", "plugins", "tasks", "prompts", "prepare", "scoring", "statistics"),
    *("models", "engines", "probes", "mix", "answering"),
    *("records", "search", "costs", "decision", "results", "report"),
)
OWNERS = {
    "ray": {"launch"},
    "wandb": {"launch"},
    "deepspeed": {"training"},
    "triton": {"kernels"},
    "hydra": {"conf", "launch"},
}
HEAVY = (
    "torch",
    "ray",
    "transformers",
    "peft",
    "deepspeed",
    "wandb",
    "pandas",
    "sklearn",
    "plotly",
)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.lineno, node.module.split(".")[0]


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_packages_import_only_what_they_may(package: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sources(package)
        for line, name in imports(path)
        if (name in ALLOWED and name != package and name not in ALLOWED[package])
        or package not in OWNERS.get(name, {package})
    ]
    assert not wrong, "\n".join(wrong)
    assert len(sources(package)) >= 2, "the test must see the package's files"


def rooms_imported(path: Path) -> Iterator[tuple[int, str]]:
    """The line and the room of each import from evaluation."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "evaluation":
            names = [f"evaluation.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "evaluation" and rest:
                yield node.lineno, rest.split(".")[0]


def test_rooms_of_evaluation_import_only_from_rooms_before_them() -> None:
    wrong = []
    for path in sources("evaluation"):
        room = path.relative_to(ROOT / "evaluation").parts[0].removesuffix(".py")
        if room == "__init__":
            continue
        for line, name in rooms_imported(path):
            if ROOMS.index(name) > ROOMS.index(room):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports evaluation.{name}")
    assert not wrong, "\n".join(wrong)


def test_the_room_test_sees_every_form_of_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text(
        "from evaluation import report as r\n"
        "from evaluation.decision.rules import choose\n"
        "import evaluation.costs.cost\n"
        "import json\n"
    )
    assert list(rooms_imported(bad)) == [(1, "report"), (2, "decision"), (3, "costs")]


def test_the_layer_test_sees_a_wrong_import(tmp_path: Path) -> None:
    bad = tmp_path / "bad.py"
    bad.write_text("def f():\n    from launch import plan\n")
    assert list(imports(bad)) == [(2, "launch")]


@pytest.mark.parametrize(
    "statement",
    [
        "import conf.schema, conf.resolve, conf.records, conf.results",
        "import launch.cli, launch.preflight, launch.plan, launch.dry_run, launch.run",
        "import launch.status, launch.doctor, launch.scheduler, launch.store",
    ],
)
def test_light_modules_import_nothing_heavy(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_package_names_resolve_inside_the_repository() -> None:
    code = "import conf, launch, training, evaluation, kernels as k\n"
    code += "print(*(m.__file__ for m in (conf, launch, training, evaluation, k)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = done.stdout.split()
    assert len(files) == 5
    assert all(Path(f).is_relative_to(ROOT) for f in files)
