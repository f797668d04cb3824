"""`python launch.py`: compose, check, plan, then show the plan or run it."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib.util
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from conf.errors import (
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    ConfigError,
    CrossoverError,
)

if importlib.util.find_spec("hydra") is not None:
    from conf import clusters, groups, methods, run_groups, schema, sweeps

if TYPE_CHECKING:
    from rich.console import Console

    from conf.schema import RunConfig
    from launch.preflight import Checked

TYPED = "CROSSOVER_TYPED"  # environment of a submitted driver: the command it was submitted by
CONF = Path(__file__).resolve().parent.parent / "conf"
EXAMPLES = (
    ("make compare", "seven arms on the embedded model and data, in minutes, no GPU"),
    ("python launch.py +exp=smoke", "the same path in seconds, with scripted answers"),
    (
        "python launch.py +exp=compare task.path=tickets.csv task.columns.input=body "
        "task.columns.label=category",
        "your own data",
    ),
    (
        "python launch.py -m +exp=lora trainer.learning_rate=3e-4,1e-3 dry_run=true",
        "a sweep, a run for each value; dry_run shows the plan, time and money, and starts nothing",
    ),
)


def main() -> None:
    """Entry point of launch.py; ends the process with one of conf.errors' exit codes."""
    if importlib.util.find_spec("hydra") is None:
        print("This Python has no hydra-core. Type `make install`, then use .venv/bin/python.")
        sys.exit(EXIT_REFUSED)
    arguments = sys.argv[1:]
    if not arguments:
        print(listing())
        sys.exit(0)
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(guarded(lambda: compose_and_run(arguments)))


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def guarded(call: Callable[[], int]) -> int:
    """Run a command; refusals and interrupts become a message and an exit code."""
    try:
        return call()
    except CrossoverError as error:
        print(
            f"{'Refused' if error.exit_code == EXIT_REFUSED else 'Failed'}: {error}",
            file=sys.stderr,
        )
        return error.exit_code
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED


def listing() -> str:
    """All experiments, a line each, and four commands to try."""
    lines = ["Crossover: fine-tune or prompt? Answered with measurements.", "", "Experiments:"]
    for path in sorted((CONF / "exp").glob("*.yaml")):
        lines.append(f"  +exp={path.stem:<24}{experiment_line(path)}")
    lines += ["", "Try:"]
    for command, what in EXAMPLES:
        lines.append(f"  {command}\n      {what}")
    return "\n".join(lines)


def experiment_line(path: Path) -> str:
    """What an experiment's preset says of itself in its second line."""
    comments = [t for t in path.read_text(encoding="utf-8").splitlines() if t.startswith("# ")]
    return next((c[2:] for c in comments if "@package" not in c), "")


def compose_and_run(arguments: list[str]) -> int:
    """Let Hydra compose the configuration, then run it; returns the exit code.

    Hydra ends composition errors with exit code 1; here they are refusals, code 2.
    """
    import hydra

    from launch.combinations import is_sweep
    from launch.overrides import experiment_of, rewrite

    if is_sweep(arguments):
        from launch.multirun import run_sweep

        return run_sweep(arguments)
    typed_there = os.environ.get(TYPED)  # a driver on a cluster tells what its user typed
    command = typed_there or shlex.join(["python", "launch.py", *arguments])
    overrides = rewrite(arguments)
    schema.register()
    composed: list[Any] = []
    sys.argv = [sys.argv[0], *overrides]
    wrapped = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):  # Hydra prints its errors there before it exits
            wrapped(composed.append)()
    except SystemExit as stop:
        print(explained(output.getvalue()), file=sys.stderr)
        return EXIT_REFUSED if stop.code else 0
    if not composed:  # --help, --cfg and the like print and are done
        return 0
    return run(typed(composed[0]), exp=experiment_of(overrides), command=command)


def typed(config: Any) -> RunConfig:
    """The composed configuration as typed objects, their own checks run.

    Raises:
        ConfigError: a key that `+` added and no class has, or a required value that is not set.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue

    from launch.overrides import key_of

    for key in sorted(OmegaConf.missing_keys(config)):
        raise ConfigError(key, found="nothing", expected="a value", remedy=f"write {key}=VALUE")
    try:
        found = OmegaConf.to_object(config)
    except AttributeError as error:
        cls, key = re.findall(r"'(\w+)'", str(error))[:2]
        typed_keys = [key_of(a) for a in sys.argv[1:] if key_of(a).split(".")[-1] == key]
        raise ConfigError(
            next(iter(typed_keys), key),
            found=f"{key}, which {cls} does not have",
            expected="a key that exists",
            remedy=_known_keys(key, cls),
        ) from None
    except MissingMandatoryValue as error:
        raise ConfigError(
            str(error.full_key), found="nothing", expected="a value", remedy="set it"
        ) from None
    assert isinstance(found, schema.RunConfig)
    return found


NOISE = ("HYDRA_FULL_ERROR", "To append to your config use", "reference_type=", "object_type=")


def explained(text: str) -> str:
    """Hydra's message without what misleads, and with the next thing to type."""
    lines = [t for t in text.splitlines() if t.strip() and not any(n in t for n in NOISE)]
    search_path = next((i for i, t in enumerate(lines) if "Config search path" in t), len(lines))
    lines = lines[:search_path]
    hints = []
    if "Key 'True' not in" in text:
        hints.append('In YAML a bare `on:` is a boolean; write "on": lora')
    elif found := re.search(r"Key '([^']+)' (?:is )?not in '(\w+)'", text):
        hints.append(_known_keys(found.group(1), found.group(2)))
    if "override 'exp'" in text:
        hints.append("Write +exp=NAME; `python launch.py` lists the experiments.")
    return "Refused: " + "\n  ".join([t.strip() for t in lines] + hints)


def _known_keys(key: str, class_name: str) -> str:
    """The closest key of a schema class, or all of them."""
    modules = (schema, clusters, groups, run_groups, methods, sweeps)
    found = (getattr(m, class_name, None) for m in modules)
    cls = next((c for c in found if c is not None), None)
    if not dataclasses.is_dataclass(cls):
        return ""
    names = [f.name for f in dataclasses.fields(cls)]
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    close = close or [n for n in names if n.startswith(key[:1]) and set(key) <= set(n)][:1]
    return f"Did you mean {close[0]}?" if close else f"Keys here: {', '.join(names)}"


def run(config: RunConfig, *, exp: str | None, command: str) -> int:
    """Check, plan, and run, submit or show the plan."""
    from launch.elsewhere.ray_cluster import is_driver
    from launch.preflight import check

    checked = check(config, exp=exp, command=command)
    if config.cluster.name == "ray" and not is_driver(config.cluster) and not config.dry_run:
        from launch.elsewhere.submission import submit

        return submit(checked, here=Path.cwd())
    if config.cluster.name in ("slurm", "kuberay") and not config.dry_run:
        from launch.elsewhere import kuberay, slurm

        hand_over = slurm.submit if config.cluster.name == "slurm" else kuberay.submit
        return hand_over(checked, here=Path.cwd())
    return run_checked(checked, console_for())


def run_checked(checked: Checked, console: Console) -> int:
    """Run what is checked, or show its plan."""
    if checked.config.dry_run:
        from launch.dry_run import show

        show(checked, console)
        return 0
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from launch.run import execute

    return execute(checked, console)


def console_for() -> Console:
    """The terminal; where it is none, wide enough that no figure of a table is cut."""
    from rich.console import Console

    return Console() if sys.stdout.isatty() else Console(width=120)
