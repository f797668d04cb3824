"""Evaluator processes that wait for their next work, shared by the runs of one invocation."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from launch import workers
from launch.placement import Machine

PLACE_SECONDS = 20.0  # an actor that finds its devices free starts in 2 to 5


@dataclass(kw_only=True, slots=True)
class Evaluators:
    """Idle evaluators by number of engine processes; used by all threads of a scheduler."""

    machine: Machine
    _idle: list[tuple[int, Any]] = field(default_factory=list)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def borrow(self, actors: int) -> Any:
        """An evaluator with so many engine processes, with the model of its last job if idle."""
        with self._guard:
            for place, (size, actor) in enumerate(self._idle):
                if size == actors:
                    del self._idle[place]
                    return actor
        self.release_idle()  # one of another size keeps devices that the new one waits for
        actor = workers.evaluator(self.machine, actors=actors)
        self._wait_for(actor)
        return actor

    def _wait_for(self, actor: Any) -> None:
        """Until it is there. Of a cluster that lost a node, idle ones may hold what it needs."""
        import ray

        ready = actor.__ray_ready__.remote()
        while not ray.wait([ready], timeout=PLACE_SECONDS)[0]:
            self.release_idle()

    def give_back(self, actors: int, actor: Any, *, is_alive: bool) -> None:
        """Keep an evaluator for the next job, or end one that failed."""
        if is_alive:
            with self._guard:
                self._idle.append((actors, actor))
        else:
            _kill(actor)

    def release_idle(self) -> None:
        """End evaluators that wait for work, so that a training finds its devices free."""
        with self._guard:
            idle, self._idle = self._idle, []
        for _, actor in idle:
            _kill(actor)


def _kill(actor: Any) -> None:
    import ray

    ray.kill(actor, no_restart=True)
