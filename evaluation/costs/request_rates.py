"""Coefficients that predict what any request takes on a model and device (pure).

    device-seconds = fixed + per_prompt_token x work of the computed tokens
                           + per_output_token x tokens put out

The work of a token is 1 + key_share x keys it attends to, from the model's shape: tokens behind a
cached prefix of 393 take 13% more than the same tokens at the start (SmolLM2-135M). Fitted to
requests timed alone, by non-negative least squares of relative errors: a request of 40 ms counts
as much as one of 1 s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from conf.records import Measured
from conf.results import RequestRates
from evaluation.statistics import NUM_RESAMPLES, percentile_interval

Floats = NDArray[np.float64]

MIN_REQUESTS = 6  # three coefficients, and as many observations again to tell how well they fit
MIN_SPAN = 1.5  # most / fewest computed tokens; below, the slope is read off noise
MAX_CONDITION = 30.0  # of the scaled design: Belsley's bound for collinearity that matters
COEFFICIENTS = ("fixed", "prompt_token", "output_token")


@dataclass(kw_only=True, slots=True, frozen=True)
class TimedRequest:
    """A request alone on the device. cached_tokens: those of its prompt that were not computed."""

    device_seconds: float
    computed_tokens: int
    output_tokens: int
    cached_tokens: int = 0


def work(tokens: float, *, behind: float, key_share: float) -> float:
    """What computing `tokens` in a row costs, in tokens that attend to nothing.

    Args:
        tokens: computed, each attending to all before it.
        behind: tokens before them that are not computed.
        key_share: cost of attending to one key / cost of a token's products with the weights.
    """
    return tokens * (1 + key_share * (behind + tokens / 2))


def key_share_of(model: Mapping[str, object]) -> float:
    """Key share from a model's facts: 4 x width x layers / (2 x weights but embeddings) FLOPs.

    0, attention for nothing, where the facts are not there.
    """
    names = ("num_parameters", "num_layers", "hidden", "vocabulary")
    facts = [value for name in names if isinstance(value := model.get(name), int)]
    if len(facts) < len(names):
        return 0.0
    parameters, layers, width, vocabulary = facts
    tables = vocabulary * width * (1 if model.get("tied_head") else 2)
    weights = parameters - tables
    return 2 * width * layers / weights if weights > 0 else 0.0


@dataclass(kw_only=True, slots=True, frozen=True)
class Rates:
    """Fitted coefficients in device-seconds; None where the requests do not tell.

    values: (3,), of COEFFICIENTS. draws: (NUM_RESAMPLES, 3), of requests drawn again within arms.
    """

    values: Floats
    draws: Floats
    known: tuple[bool, bool, bool]
    n: int
    key_share: float = 0.0
    why_unknown: str = ""

    @property
    def per_prompt_token(self) -> float | None:
        """Device-seconds of one more computed prompt token."""
        return float(self.values[1]) if self.known[1] else None

    def device_seconds(
        self, *, computed_tokens: float, output_tokens: float, cached_tokens: float = 0.0
    ) -> float | None:
        """What a request takes; None where a coefficient it needs is not known."""
        needs = (True, computed_tokens > 0, output_tokens > 0)
        if any(need and not known for need, known in zip(needs, self.known, strict=True)):
            return None
        computed = work(computed_tokens, behind=cached_tokens, key_share=self.key_share)
        return float(self.values @ np.array([1.0, computed, output_tokens]))

    def of_cached(self, cached_tokens: float) -> Floats:
        """(1 + NUM_RESAMPLES,) device-seconds of computing a cached prefix after all; first: best.

        Asked for only where per_prompt_token is known.
        """
        rates = np.concatenate([self.values[1:2], self.draws[:, 1]])
        found: Floats = rates * work(cached_tokens, behind=0.0, key_share=self.key_share)
        return found

    def coefficient(self, name: str, *, confidence: float) -> Measured:
        """One of COEFFICIENTS with its interval."""
        at = COEFFICIENTS.index(name)
        if not self.known[at]:
            return Measured(n=self.n)
        low, high = percentile_interval(self.draws[:, at], n=self.n, confidence=confidence)
        return Measured(value=float(self.values[at]), low=max(0.0, low), high=high, n=self.n)


def fit_rates(
    requests: Mapping[str, Sequence[TimedRequest]], *, key_share: float = 0.0, seed: int = 0
) -> Rates:
    """The rates of one model and device from the requests of its arms.

    Args:
        requests: of each arm that runs the model.
        key_share: of the model, see `work`.
        seed: of the resampling, which is within arms.
    """
    groups = [list(group) for group in requests.values() if group]
    timed = [r for group in groups for r in group]
    n, none = len(timed), (False, False, False)
    nothing = Rates(values=np.zeros(3), draws=np.zeros((NUM_RESAMPLES, 3)), known=none, n=n)
    if n < MIN_REQUESTS:
        return replace(nothing, why_unknown=f"{n} requests were timed; {MIN_REQUESTS} are needed")
    design, seconds = _design(timed, key_share)
    used = np.array([True, True, bool(design[:, 2].any())])
    why = _why_not(design[:, used])
    if why:
        return replace(nothing, why_unknown=why)
    rng, sizes = np.random.default_rng(seed), [len(group) for group in groups]
    counts = np.concatenate(
        [rng.multinomial(size, np.full(size, 1 / size), size=NUM_RESAMPLES) for size in sizes],
        axis=1,
    )
    return Rates(
        values=_solve(design, seconds, used),
        draws=_solve_drawn(design, seconds, used, counts),
        known=(True, True, bool(used[2])),
        n=n,
        key_share=key_share,
        why_unknown="" if used[2] else "no request that was timed generates text",
    )


def _design(timed: Sequence[TimedRequest], key_share: float) -> tuple[Floats, Floats]:
    """(requests, 3) of 1, work and output tokens, and (requests,) of device-seconds."""
    rows = [
        (
            1.0,
            work(r.computed_tokens, behind=r.cached_tokens, key_share=key_share),
            float(r.output_tokens),
        )
        for r in timed
    ]
    return np.array(rows), np.array([r.device_seconds for r in timed])


def _why_not(design: Floats) -> str:
    """Why the coefficients of these columns cannot be told apart; empty where they can."""
    tokens = design[:, 1]
    if tokens.max() < MIN_SPAN * max(1.0, tokens.min()):
        return (
            f"the timed requests compute {tokens.min():.0f} to {tokens.max():.0f} tokens; "
            f"the longest must have {MIN_SPAN:g} times as many as the shortest"
        )
    condition = np.linalg.cond(design / np.linalg.norm(design, axis=0))
    if condition > MAX_CONDITION:
        return "the timed requests have prompts and outputs that grow together"
    return ""


def _solve(design: Floats, seconds: Floats, used: NDArray[np.bool_]) -> Floats:
    """(3,) coefficients that are not negative; 0 where a column is not used."""
    from scipy.optimize import nnls  # takes 0.2 s to import, and only a report needs it

    weights = 1.0 / seconds
    found, _ = nnls(design[:, used] * weights[:, None], np.ones(len(seconds)))
    values = np.zeros(3)
    values[used] = found
    return values


def _solve_drawn(
    design: Floats, seconds: Floats, used: NDArray[np.bool_], counts: NDArray[np.int64]
) -> Floats:
    """(draws, 3): as `_solve`, each request taken as often as `counts` (draws, requests) says.

    By the normal equations of all draws at once; the few with a negative coefficient by `nnls`
    (56 requests: 0.02 s instead of 0.45 s).
    """
    scaled = design[:, used] / seconds[:, None]
    products = np.einsum("ni,nj->nij", scaled, scaled).reshape(len(seconds), -1)
    width = scaled.shape[1]
    left = (counts @ products).reshape(-1, width, width)
    ridge = 1e-12 * np.trace(left, axis1=1, axis2=2)[:, None, None] * np.eye(width)
    solved = np.linalg.solve(left + ridge, (counts @ scaled)[:, :, None])[:, :, 0]
    values = np.zeros((len(counts), 3))
    values[:, used] = solved
    for at in np.flatnonzero((solved < 0).any(axis=1)):
        rows = np.repeat(np.arange(len(seconds)), counts[at])
        values[at] = _solve(design[rows], seconds[rows], used)
    return values


def held_out_error(
    requests: Mapping[str, Sequence[TimedRequest]], *, key_share: float
) -> float | None:
    """The worst relative error of an arm's mean request, predicted from the other arms' requests.

    None where no arm can be left out and predicted.
    """
    errors = []
    for name, group in requests.items():
        others = [r for other, timed in requests.items() if other != name for r in timed]
        if not group or len(others) < MIN_REQUESTS:
            continue
        design, seconds = _design(others, key_share)
        rows, measured = _design(group, key_share)
        used = np.array([True, True, bool(design[:, 2].any())])
        if _why_not(design[:, used]) or bool(rows[:, ~used].any()):
            continue
        predicted = rows @ _solve(design, seconds, used)
        errors.append(abs(float(predicted.mean() / measured.mean()) - 1.0))
    return max(errors) if errors else None


def reported(
    rates: Rates, requests: Mapping[str, Sequence[TimedRequest]], *, confidence: float
) -> RequestRates:
    """The rates as they stand in results.json."""
    return RequestRates(
        fixed_device_seconds=rates.coefficient("fixed", confidence=confidence),
        prompt_token_device_seconds=rates.coefficient("prompt_token", confidence=confidence),
        output_token_device_seconds=rates.coefficient("output_token", confidence=confidence),
        arms=tuple(name for name, timed in requests.items() if timed),
        held_out_error=held_out_error(requests, key_share=rates.key_share),
        why_unknown=rates.why_unknown,
    )
