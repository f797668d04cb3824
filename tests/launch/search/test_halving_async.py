"""Trials that come to their rungs one by one: who starts next, also after a killed driver."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping

import pytest

from conf.sweeps import HalvingConfig
from launch.search.halving import next_start, rung_shares, setting_means

RULES = HalvingConfig()
Rung = dict[int, float | None]


def alone(*trials: int) -> dict[int, int]:
    """Every trial its own setting."""
    return {trial: trial for trial in trials}


class Cluster:
    """Workers that take what `next_start` says and finish in an order drawn by a seed."""

    def __init__(self, members: Mapping[int, int], *, seed: int, workers: int = 3) -> None:
        self.members, self.workers = members, workers
        self.draw = random.Random(seed)
        self.journal: list[tuple[str, int, int]] = []  # started | came, setting or trial, rung
        self.running: list[tuple[int, int]] = []

    def value(self, trial: int, rung: int) -> float | None:
        draw = random.Random(f"{trial} {rung}")
        return None if draw.random() < 0.05 else draw.random() + self.members[trial] / 8

    def state(self) -> tuple[list[Rung], dict[int, int]]:
        """All that a driver knows, from the journal alone."""
        scores: list[Rung] = [{} for _ in rung_shares(RULES)]
        started: dict[int, int] = {}
        for event, of, rung in self.journal:
            if event == "started":
                started[of] = max(rung, started.get(of, 0))
            else:
                scores[rung][of] = self.value(of, rung)
        return scores, started

    def step(self) -> bool:
        """Start or finish one thing; whether there was one."""
        scores, started = self.state()
        if len(self.running) < self.workers:
            found = next_start(scores, members=self.members, started=started, halving=RULES)
            if found is not None:
                self.journal.append(("started", *found))
                self.running.append(found)
                return True
        if not self.running:
            return False
        setting, rung = self.running.pop(self.draw.randrange(len(self.running)))
        mine = [trial for trial, of in self.members.items() if of == setting]
        self.journal += [("came", trial, rung) for trial in mine]
        return True


@pytest.mark.parametrize("num", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_asynchronous_search_ends_with_whole_trainings_of_the_best(num: int, seed: int) -> None:
    cluster = Cluster({t: t // 2 for t in range(2 * num)}, seed=seed)
    while cluster.step():
        pass
    scores, started = cluster.state()
    assert set(started) == set(range(num)), "every setting has begun"
    for rung in range(1, len(scores) - 1):
        means = setting_means(
            {t: v for t, v in scores[rung].items()},
            {t: s for t, s in cluster.members.items() if t in scores[rung]},
        )
        order = sorted(means, key=lambda s: (-means[s][0], s))
        alive = [s for s in order if means[s][0] > -math.inf]
        must = alive[: math.ceil(len(means) / RULES.eta)]
        assert {s for s in must if started[s] <= rung} == set(), rung
    starts = [(s, r) for event, s, r in cluster.journal if event == "started"]
    assert len(set(starts)) == len(starts), "nothing runs twice"
    assert all(b[1] <= a[1] + 1 for a, b in _steps_of(starts)), "no rung is skipped"


def _steps_of(starts: list[tuple[int, int]]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    by_setting: dict[int, list[tuple[int, int]]] = {}
    for start in starts:
        by_setting.setdefault(start[0], []).append(start)
    return [pair for of in by_setting.values() for pair in itertools.pairwise(of)]


def test_early_promotion_needs_a_place_among_the_best_third_of_those_that_came() -> None:
    members = alone(*range(9))
    started = {s: 1 for s in range(3)}
    watch: Rung = dict.fromkeys(range(3), 0.5)
    two: Rung = {0: 0.3, 1: 0.8}
    rules = RULES
    assert next_start([watch, two], members=members, started=started, halving=rules) == (3, 0)
    three: Rung = {**two, 2: 0.1}
    assert next_start([watch, three], members=members, started=started, halving=rules) == (1, 2)
    gone = {**started, 1: 2}
    assert next_start([watch, three], members=members, started=gone, halving=rules) == (3, 0)


def test_a_rung_is_open_while_somebody_is_to_be_started_towards_it() -> None:
    watch: Rung = dict.fromkeys(range(4), 0.5)
    judged: Rung = {t: t / 4 for t in range(4)}
    started = {0: 1, 1: 1, 2: 1, 3: 2}
    scores: list[Rung] = [watch, judged, {3: 0.9}]
    members = alone(*range(4))
    assert next_start(scores, members=members, started=started, halving=RULES) == (2, 2)
    started[2] = 2
    assert next_start(scores, members=members, started=started, halving=RULES) is None
    scores[2][2] = 0.8
    assert next_start(scores, members=members, started=started, halving=RULES) == (3, 3)


def test_ranks_that_change_promote_everybody_once_the_rung_is_closed() -> None:
    watch: Rung = {t: t / 12 for t in range(12)}
    judged: Rung = {t: 1 - t / 12 for t in range(9)}
    members = alone(*range(12))
    started = {t: 2 if t < 3 else 1 for t in members}
    scores: list[Rung] = [watch, judged]
    assert next_start(scores, members=members, started=started, halving=RULES) is None
    judged |= {t: 1 - t / 12 for t in range(9, 12)}
    for trial in range(3, 12):
        found = next_start(scores, members=members, started=started, halving=RULES)
        assert found == (trial, 2)
        started[trial] = 2


@pytest.mark.parametrize("num_settings", [5, 12])
def test_a_killed_driver_decides_again_as_it_did(num_settings: int) -> None:
    members = {t: t // 2 for t in range(2 * num_settings)}
    cluster = Cluster(members, seed=4)
    decisions = []
    while True:
        scores, started = cluster.state()
        decisions.append(next_start(scores, members=members, started=started, halving=RULES))
        cut = len(cluster.journal)
        if not cluster.step():
            break
        again = Cluster(members, seed=99)
        events = cluster.journal[:cut]
        random.Random(cut).shuffle(events)
        again.journal = events
        scores, started = again.state()
        found = next_start(scores, members=members, started=started, halving=RULES)
        assert found == decisions[-1]
    assert any(d is not None and d[1] == 3 for d in decisions)
