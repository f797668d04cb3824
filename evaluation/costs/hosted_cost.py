"""What an arm costs whose model is hosted: tokens at the provider's price, and no device (pure)."""

from __future__ import annotations

from collections.abc import Sequence

from conf.records import LedgerLine, Measured, total
from conf.results import CacheCost, Cost
from conf.run_groups import HostedPrice
from evaluation.costs.cost import FIXED_PURPOSES, FixedCost
from evaluation.engines.endpoint_ceiling import cost_usd
from evaluation.records.arm_scores import Request
from evaluation.statistics import mean_interval


def hosted_cost(
    requests: Sequence[Request],
    lines: Sequence[LedgerLine],
    fixed: FixedCost,
    *,
    price: HostedPrice | None,
    confidence: float,
) -> Cost:
    """Cost of an arm's test requests and of what it took to choose how it answers.

    USD is null without a price, and where the endpoint does not tell its tokens.

    Args:
        requests: of the test set.
        lines: the arm's ledger lines.
        fixed: what is counted apart from tokens, its labels and hours.
        price: of the model's tokens.
        confidence: of the interval over requests.
    """
    if price is None:
        return Cost()
    each = requests_usd(requests, price=price)
    paid = [line.usd for line in lines if line.purpose in FIXED_PURPOSES]
    known = [usd for usd in paid if usd is not None]
    values = each["discount"]
    is_known = len(values) == len(requests)
    tokens = total(total([r.prompt_tokens, r.completion_tokens]) for r in requests)
    per_token = sum(values) / tokens if is_known and tokens else None
    return Cost(
        fixed_usd=sum(known) + fixed.people_usd if len(known) == len(paid) else None,
        fixed_device_seconds=fixed.device_seconds,
        request_usd=mean_interval(values, confidence=confidence) if is_known else Measured(),
        usd_per_million_tokens=Measured(
            value=None if per_token is None else per_token * 1e6, n=len(values)
        ),
        by_cache={
            cache: CacheCost(usd=mean_interval(usd, confidence=confidence))
            for cache, usd in each.items()
            if usd and is_known
        },
    )


def requests_usd(requests: Sequence[Request], *, price: HostedPrice) -> dict[str, list[float]]:
    """What requests cost by rule for cached tokens, where the endpoint tells its tokens.

    What is billed is what is measured; without a cache all tokens are at the full price.
    """
    found: dict[str, list[float]] = {"measured": [], "discount": [], "none": []}
    for r in requests:
        prompt, outputs = r.prompt_tokens, r.completion_tokens
        for cache, usd in found.items():
            cached = 0 if cache == "none" else r.cached_tokens
            paid = cost_usd(
                price, prompt_tokens=prompt, cached_tokens=cached, completion_tokens=outputs
            )
            if paid is not None:
                usd.append(paid)
    return found
