"""Where a verdict changes as one number is turned: a walk and a bisection over `choose` (pure).

Nothing about costs or limits is known here: a knob makes the evidence and the decision for any
value, the rules are applied to them, and the first values at which another answer comes out are
narrowed down to rounding. A window narrower than a step of the walk (a third) may be missed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from conf.results import ArmResult, Cost
from conf.run_groups import DecisionConfig
from evaluation.costs.cost import scaled
from evaluation.decision.rules import Choice, Evidence, choose, volume

STEPS_PER_DECADE = 8
MAX_SWITCHES = 16  # in one step of the walk; there are fewer, since each is an arm's or a rival's
PRECISION = 1e-12  # relative
CHEAPEST_ERROR_USD, DEAREST_ERROR_USD = 1e-9, 1e6  # between which a wrong answer's cost is turned


@dataclass(kw_only=True, slots=True, frozen=True)
class Knob:
    """A positive number that can be turned from low to high; now: where it stands."""

    what: str
    now: float
    low: float
    high: float
    setting: Callable[[float], tuple[Evidence, DecisionConfig]]

    def choice(self, value: float) -> Choice:
        """What the rules choose there."""
        evidence, decision = self.setting(value)
        return choose(evidence, decision=decision)


@dataclass(kw_only=True, slots=True, frozen=True)
class Switch:
    """The first value, on the way out from where the knob stands, with another answer."""

    at: float
    is_above: bool
    choice: Choice


def answer_of(choice: Choice) -> str:
    """What a choice comes to: the arm, or why there is none."""
    return choice.arm or f"({choice.state})"


def switches(knob: Knob, *, is_upward: bool) -> Iterator[Switch]:
    """Every change of the answer on the way up or down, the nearest first."""
    at, choice = knob.now, knob.choice(knob.now)
    for there in _steps(knob, is_upward=is_upward):
        for _ in range(MAX_SWITCHES):
            if answer_of(knob.choice(there)) == answer_of(choice):
                break
            at, choice = _boundary(knob, at, there, answer_of(choice))
            yield Switch(at=at, is_above=is_upward, choice=choice)
        at = there


def _steps(knob: Knob, *, is_upward: bool) -> Iterator[float]:
    """Values from where the knob stands to its end, evenly spaced in their logarithm."""
    start = min(max(knob.now, knob.low), knob.high)
    end = knob.high if is_upward else knob.low
    decades = abs(math.log10(end / start))
    count = math.ceil(decades * STEPS_PER_DECADE)
    for i in range(1, count + 1):
        yield start * (end / start) ** (i / count)


def _boundary(knob: Knob, near: float, far: float, answer: str) -> tuple[float, Choice]:
    """The first value after `near`, up to `far`, that does not give this answer any more."""
    while abs(far - near) > PRECISION * max(abs(far), abs(near)):
        middle = math.sqrt(near * far) if near > 0 else far / 2
        if not min(near, far) < middle < max(near, far):
            break
        if answer_of(knob.choice(middle)) == answer:
            near = middle
        else:
            far = middle
    return far, knob.choice(far)


def told(knob: Knob) -> list[Switch]:
    """Each way the nearest change and, where that leaves no arm, the nearest to another arm."""
    now = knob.choice(knob.now).arm
    found: list[Switch] = []
    for is_upward in (True, False):
        for switch in switches(knob, is_upward=is_upward):
            if switch.choice.arm == now:
                continue
            if not found or found[-1].is_above != is_upward or switch.choice.arm is not None:
                found.append(switch)
            if switch.choice.arm is not None:
                break
    return found


def volume_knob(evidence: Evidence, decision: DecisionConfig) -> Knob:
    """Requests over the horizon, by the traffic of a month."""

    def setting(requests: float) -> tuple[Evidence, DecisionConfig]:
        monthly = requests / decision.horizon_months
        return evidence, replace(decision, requests_per_month=monthly)

    return Knob(what="volume", now=volume(decision), low=1.0, high=1e12, setting=setting)


def error_knob(evidence: Evidence, decision: DecisionConfig, *, now: float) -> Knob:
    """USD that a wrong answer costs."""

    def setting(usd: float) -> tuple[Evidence, DecisionConfig]:
        return evidence, replace(decision, error_usd=usd)

    low, high = CHEAPEST_ERROR_USD, DEAREST_ERROR_USD
    return Knob(what="error_usd", now=now, low=low, high=high, setting=setting)


def price_knob(evidence: Evidence, decision: DecisionConfig, *, usd_per_hour: float) -> Knob:
    """USD of a device-hour."""

    def setting(usd: float) -> tuple[Evidence, DecisionConfig]:
        factor = usd / usd_per_hour
        arms = {
            name: repriced(arm, factor=factor, usd_per_second=usd_per_hour / 3600)
            for name, arm in evidence.arms.items()
        }
        return replace(evidence, arms=arms), decision

    low, high = 1e-4 * usd_per_hour, 1e4 * usd_per_hour
    return Knob(what="device_price", now=usd_per_hour, low=low, high=high, setting=setting)


def prompt_knob(evidence: Evidence, decision: DecisionConfig, *, arm: str) -> Knob | None:
    """Prompt tokens of an arm whose answers stay as good; None where a token's cost is unknown."""
    result, per_token = evidence.arms[arm], evidence.usd_per_prompt_token.get(arm)
    tokens = None if result.tokens is None else result.tokens.prompt.value
    if result.cost is None or result.cost.request_usd.value is None or not tokens or not per_token:
        return None
    cost, usd, now = result.cost, result.cost.request_usd.value, tokens
    # A token less saves what one more costs. Cached tokens cost nothing and a request has a part
    # that no token explains, so no more can be saved than was computed.
    computed = None if result.tokens is None else result.tokens.computed.value
    most = usd / per_token
    fewest = max(1.0, now - (most if computed is None else min(most, computed)))

    def setting(count: float) -> tuple[Evidence, DecisionConfig]:
        factor = 1 + per_token * (count - now) / usd
        changed = replace(
            cost,
            request_usd=scaled(cost.request_usd, factor),
            request_device_seconds=scaled(cost.request_device_seconds, factor),
        )
        arms = {**evidence.arms, arm: replace(result, cost=changed)}
        return replace(evidence, arms=arms), decision

    return Knob(what="prompt_length", now=now, low=fewest, high=1000 * now, setting=setting)


def repriced(result: ArmResult, *, factor: float, usd_per_second: float) -> ArmResult:
    """The arm where a device-second costs `factor` as much; what no device earns stays as it is.

    Args:
        result: an arm at the present price.
        factor: new price / present price.
        usd_per_second: the present price, USD per device-second.
    """
    cost = result.cost
    if cost is None or cost.request_device_seconds.value is None:
        return result  # paid by the request, as a system given for comparison is
    fixed = cost.fixed_usd
    if fixed is not None and cost.fixed_device_seconds is not None:
        fixed += (factor - 1) * cost.fixed_device_seconds * usd_per_second
    changed: Cost = replace(cost, fixed_usd=fixed, request_usd=scaled(cost.request_usd, factor))
    return replace(result, cost=changed)
