"""All benchmarks by name, and the rows of the table that each gives.

A benchmark is one process; arms that share a peer are measured in the same rounds, so that one
benchmark may give several rows. Floors and aims stand where the rows are made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from tests.benchmarks.actor_rows import two_actors
from tests.benchmarks.comparing import Setup
from tests.benchmarks.generation_rows import GENERATION, generation
from tests.benchmarks.harness import Result
from tests.benchmarks.loss_rows import LOSSES, lora_step, loss_rows
from tests.benchmarks.memory_rows import peak_memory
from tests.benchmarks.orchestration_rows import orchestration
from tests.benchmarks.pack_memory import pack_memory
from tests.benchmarks.pack_rows import PACKS, packed_adapters
from tests.benchmarks.planner_rows import PLANNER, loop_overhead, planner_seconds
from tests.benchmarks.scoring_rows import (
    SCORING,
    against_evaluator,
    against_replicated,
    wordings,
)
from tests.benchmarks.search_rows import SEARCHES, halved_wordings
from tests.benchmarks.sweep_rows import sweep_halving, sweep_makespan
from tests.benchmarks.training_rows import TRAINING, against_trl

MEMORY = ("banking77_8shot", "two_labels_16shot")


def benchmarks() -> dict[str, Callable[[Setup], list[Result]]]:
    """What runs each benchmark."""
    found: dict[str, Callable[[Setup], list[Result]]] = {}
    for key in SCORING:
        found[key] = functools.partial(against_evaluator, key=key)
    for key in SCORING:
        found[f"replicated_cache_{key}"] = functools.partial(against_replicated, key=key)
    found |= {"generate_32": generation, "wordings_20": wordings}
    for key in MEMORY:
        found[f"memory_{key}"] = functools.partial(peak_memory, key=key)
    for key in TRAINING:
        found[key] = functools.partial(against_trl, key=key)
    for key in PACKS:
        found[key] = functools.partial(packed_adapters, key=key)
    for key in SEARCHES:
        found[key] = functools.partial(halved_wordings, key=key)
    found |= {"pack_memory": pack_memory}
    found |= {"sweep_makespan": sweep_makespan, "sweep_halving": sweep_halving}
    found |= {"loss": loss_rows, "lora_layer": lora_step}
    found |= {"loop_overhead": loop_overhead, "planner_seconds": planner_seconds}
    found |= {"two_actors": two_actors, "orchestration": orchestration}
    return found


def rows() -> dict[str, tuple[str, ...]]:
    """The rows of each benchmark."""
    found: dict[str, tuple[str, ...]] = {name: (name,) for name in benchmarks()}
    for key, spec in SCORING.items():
        found[key] = tuple(target.name for target in spec.targets)
        found[f"replicated_cache_{key}"] = tuple(
            f"replicated_cache_{target.name}" for target in spec.targets
        )
    found["loss"] = LOSSES
    found["planner_seconds"] = PLANNER
    found["generate_32"] = tuple(name for name, *_ in GENERATION)
    return found


def find(name: str) -> list[str]:
    """The benchmarks that a name of a benchmark or of a row asks for; "" asks for all."""
    return [key for key, of_it in rows().items() if name in ("", key, *of_it)]
