"""What the page's script needs to decide again; templates/decision.js has the same rules (pure).

The script ports evaluation/decision/rules.py, decision/gap.py and the re-pricing of sensitivity.py,
and a test holds the two equal. What depends on no slider, such as a quantile, is computed here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from conf.records import Measured
from conf.results import ArmResult, Pair, Results
from evaluation import wording
from evaluation.decision.gap import holm_level
from evaluation.decision.rules import PAID_ONCE, family
from evaluation.report.charts import is_priced
from evaluation.statistics import normal_quantile, quantile_to_decide


@dataclass(kw_only=True, slots=True, frozen=True)
class Slider:
    """An assumption that the page lets one turn; shown: the run's own value."""

    key: str
    title: str
    shown: str


def sliders(results: Results) -> list[Slider]:
    """Volume and horizon; device price and cost of an error where the run has a price."""
    data = decision_data(results)
    decision, price = data["decision"], data["usd_per_hour"]
    monthly, months = decision.get("requests_per_month"), decision.get("horizon_months")
    if not monthly or not months:
        return []
    found = [
        Slider(key="requests_per_month", title="Requests a month", shown=wording.count(monthly)),
        Slider(key="horizon_months", title="Horizon, months", shown=f"{months:g}"),
    ]
    if price:
        found.append(
            Slider(key="usd_per_hour", title="USD a device-hour", shown=wording.usd(price))
        )
    if data["is_priced"]:
        error = decision.get("error_usd")
        shown = "not counted" if error is None else f"{wording.usd(error)} USD"
        found.append(Slider(key="error_usd", title="USD a wrong answer", shown=shown))
    return found


def totals_note(results: Results) -> str:
    """What the table of totals holds, and in which unit."""
    unit = "USD" if is_priced(results) else "Device-seconds, since the run has no price"
    return (
        f"{unit}. Fixed: paid before the first request. Wrong answers count where they have a"
        " price: set it above, or decision.error_usd."
    )


def decision_data(results: Results) -> dict[str, Any]:
    """Arms, pairs, limits and prices as the script reads them; numbers keep all their digits."""
    confidence = _confidence(results)
    price = results.pricing.get("device_hour")
    return {
        "arms": [_arm(name, r) for name, r in results.arms.items()],
        "pairs": [_pair(p, confidence) for p in results.pairs],
        "decision": {k: v for k, v in results.decision.items() if not isinstance(v, (dict, list))},
        "usd_per_hour": price.get("usd") if isinstance(price, dict) else None,
        "is_priced": is_priced(results),
        "z": normal_quantile(confidence),
        "confidence": confidence,
    }


def _confidence(results: Results) -> float:
    value = results.decision.get("confidence")
    return value if isinstance(value, float) else 0.95


def _arm(name: str, r: ArmResult) -> dict[str, Any]:
    cost = r.cost
    return {
        "name": name,
        "status": r.status,
        "family": family(r),
        "is_paid_once": r.kind in PAID_ONCE,
        "metric": _value(r.metric),
        "format_validity": _value(r.format_validity),
        "consistency": _value(r.consistency),
        "p95_seconds": _value(r.latency.p95_seconds if r.latency else None),
        "ready_seconds": r.ready_seconds,
        "is_generated": r.answer_rule is not None and r.answer_rule.answer_by == "generate",
        "cost": cost
        and {
            "fixed_usd": cost.fixed_usd,
            "fixed_device_seconds": cost.fixed_device_seconds,
            "request_usd": _triple(cost.request_usd),
            "request_device_seconds": _triple(cost.request_device_seconds),
        },
    }


def _value(measured: Any) -> float | None:
    return None if measured is None else measured.value


def _triple(measured: Measured) -> dict[str, float | None]:
    return {"value": measured.value, "low": measured.low, "high": measured.high}


def _pair(p: Pair, confidence: float) -> dict[str, Any]:
    return {
        "a": p.a,
        "b": p.b,
        "difference": p.difference,
        "low": p.low,
        "high": p.high,
        "n": p.n,
        "p_adjusted": p.p_adjusted,
        "z_to_decide": quantile_to_decide(holm_level(p, confidence)),
    }
