r"""Pareto k̂: how heavy the tail of importance weights is, and so how far an estimate made with them can be trusted;
and weights whose tail is smoothed by the same fit.

ArviZ has it too, but its argument changed sign between versions (log weights in 0.23, their negatives in 1.x), and it
wants all weights at once. This one works on the largest weights alone, for many data together.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from elbozoo.inference.errors import must

LARGE_K = 0.7
"""Above it the estimate and its standard error are unreliable at any practical number of draws."""

_LEAST_TAIL = 5  # draws needed to fit two parameters
_PRIOR_DRAWS, _PRIOR_K = 10, 0.5  # the weakly informative prior on k
_BLOCK = 2**16  # entries of one work array


def tail_size(num_draws: int) -> int:
    r"""M, the number of largest weights in the tail: ``⌈min(K/5, 3 √K)⌉`` for K draws (Vehtari et al. 2024)."""
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def pareto_k(log_weight: np.ndarray, axis: int = 0) -> np.ndarray:
    r"""The shape k̂ of a generalised Pareto distribution fitted to the M largest of K importance weights, per datum.

    The exceedances :math:`w - u` over the (M+1)-th largest weight :math:`u` have the survival function
    :math:`(1 + k t/\sigma)^{-1/k}`. k is estimated by the quasi-Bayes mean of Zhang and Stephens, then shrunk towards
    0.5 with the weight of ten draws, :math:`\hat k = (M k + 5) / (M + 10)`.

    Larger is heavier: moments of order above ``1/k`` are infinite. Below 0.5 the weights have a finite variance; up to
    0.7 the estimate is still usable; above it (:data:`LARGE_K`) it is not, and neither is its standard error; at 1 and
    above the mean itself is infinite.

    Args:
        log_weight: log weights, unnormalised, nats.
        axis: the axis of the K draws.

    Returns: k̂ with ``axis`` removed, float64. ``nan`` for fewer than 21 draws (no tail to fit), or where a weight is
        nan or infinite; ``-inf`` where the tail's weights are equal up to rounding (an exact guide); ``inf`` where all
        but four vanish beside the largest.

    References: Vehtari, Simpson, Gelman, Yao & Gabry 2024, Pareto smoothed importance sampling (arXiv 1507.02646);
        Zhang & Stephens 2009, A new and efficient estimation method for the generalized Pareto distribution,
        Technometrics 51.
    """
    log_weight = np.moveaxis(np.asarray(log_weight), axis, 0)
    num_draws = log_weight.shape[0]
    if num_draws == 0:
        raise must("log_weight", "hold at least one draw", log_weight.shape, "Pass an array with draws on axis 0")
    count = min(tail_size(num_draws) + 1, num_draws)
    return pareto_k_from_tail(largest(log_weight, count), num_draws)


def largest(log_weight: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` largest entries along axis 0, in no order; a nan counts as largest, so that none is lost."""
    if log_weight.shape[0] <= count:
        return log_weight
    return np.partition(log_weight, log_weight.shape[0] - count, axis=0)[-count:]


def pareto_k_from_tail(top: np.ndarray, num_draws: int) -> np.ndarray:
    """k̂ from the M + 1 largest of ``num_draws`` log weights, where M is :func:`tail_size`.

    Args:
        top: those log weights, ``(M + 1, ...)``, in any order along axis 0.
        num_draws: K, all draws.

    Returns: as :func:`pareto_k`, with the shape of ``top[0]``.
    Raises: InvalidArgument when ``top`` has another length.
    """
    top = np.asarray(top)
    tail = tail_size(num_draws)
    if top.shape[0] != min(tail + 1, num_draws):
        condition = f"hold the {min(tail + 1, num_draws)} largest of {num_draws} log weights"
        raise must("top", condition, top.shape[0], "Use largest(log_weight, count)")
    flat = top.reshape(top.shape[0], -1)
    k = np.full(flat.shape[1], np.nan)
    if tail >= _LEAST_TAIL:
        step = max(1, _BLOCK // top.shape[0])
        for start in range(0, len(k), step):
            k[start : start + step], _ = _fit_tails(np.sort(flat[:, start : start + step], axis=0))
    return k.reshape(top.shape[1:])


def pareto_smooth(log_weight: np.ndarray) -> np.ndarray:
    r"""Log weights whose tail is replaced by what the Pareto distribution fitted to it has at its ranks, per datum.

    The j-th smallest of the M weights above the threshold u becomes :math:`u + F^{-1}((j - ½) / M)`, F being the
    distribution that :func:`pareto_k` fits, and no more than the largest weight was. Less of an estimate then hangs on
    the few largest draws, for a small bias. Weights without a tail to fit (k̂ is nan or infinite) stay as they are.

    Shapes: ``log_weight`` and the result ``(K, …)``, draws along axis 0; unnormalised, nats, float64.

    References: Vehtari, Simpson, Gelman, Yao & Gabry 2024, Pareto smoothed importance sampling (arXiv 1507.02646).
    """
    log_weight = np.asarray(log_weight, dtype=np.float64)
    smooth, tail = log_weight.reshape(len(log_weight), -1).copy(), tail_size(len(log_weight))
    if tail < _LEAST_TAIL:
        return log_weight
    ranked = np.argsort(smooth, axis=0)[-tail - 1 :]
    top = np.take_along_axis(smooth, ranked, axis=0)
    for column, (k, scale) in enumerate(zip(*_fit_tails(top), strict=True)):
        if np.isfinite(k) and scale > 0.0:
            threshold, largest_weight = top[0, column], top[-1, column]
            above = ranked[top[:, column] > threshold, column]
            rank = (np.arange(len(above)) + 0.5) / len(above)
            excess = scale * (np.expm1(-k * np.log1p(-rank)) / k if k else -np.log1p(-rank))
            tail_weight = np.minimum(np.exp(threshold - largest_weight) + excess, 1.0)  # the largest weight is 1
            smooth[above, column] = np.log(tail_weight) + largest_weight
    return smooth.reshape(log_weight.shape)


def _fit_tails(top: Float[np.ndarray, "M1 B"]) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
    """k̂ of each column of sorted log weights, whose first row is the threshold; and σ, the largest weight being 1."""
    largest_weight = top[-1].astype(np.float64)
    known = np.isfinite(largest_weight)  # sorting puts nan and +inf last; all weights zero puts -inf there
    safe = np.where(known, top, 0.0).astype(np.float64)
    eps = np.finfo(top.dtype if top.dtype.kind == "f" else np.float64).eps
    level = safe[-1] - safe[0] <= 32.0 * eps * np.maximum(1.0, np.abs(safe[-1]))
    weights = np.exp(safe - safe[-1])
    excess = weights[1:] - weights[0]
    fitted = known & ~level & ((excess > 0.0).sum(axis=0) >= _LEAST_TAIL)
    k = np.where(known, np.where(level, -np.inf, np.inf), np.nan)
    scale = np.full_like(k, np.nan)
    if fitted.any():
        k[fitted], scale[fitted] = _fit_pareto(excess[:, fitted])
    return k, scale


def _fit_pareto(excess: Float[np.ndarray, "M B"]) -> tuple[Float[np.ndarray, " B"], Float[np.ndarray, " B"]]:
    """Zhang and Stephens' estimate of k, shrunk, and of σ for each column of sorted exceedances.

    Zeros (ties with the threshold) do not count.
    """
    count = (excess > 0.0).sum(axis=0)
    zeros = excess.shape[0] - count
    quartile = np.take_along_axis(excess, (zeros + (count / 4 + 0.5).astype(int) - 1)[None], axis=0)[0]
    grid = 30 + np.sqrt(count).astype(int)  # number of grid points for b = -k/σ, per column
    points = np.arange(1, grid.max() + 1)[:, None]
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        # The paper's grid (its θ): below 1/largest, denser towards it, with the first quartile as the unit of scale.
        b = 1.0 / excess[-1] + (1.0 - np.sqrt(grid / (points - 0.5))) / (3.0 * quartile)
        slope = np.stack([np.log1p(-row * excess).sum(axis=0) for row in b]) / count  # k at each b; a zero adds log 1
        log_profile = count * (np.log(-b / slope) - slope - 1.0)
        log_profile = np.where((points <= grid) & ~np.isnan(log_profile), log_profile, -np.inf)
        weight = np.exp(log_profile - np.maximum(log_profile.max(axis=0), np.finfo(float).min))
        weight /= weight.sum(axis=0)
        mean_b = np.where(weight > 0.0, b * weight, 0.0).sum(axis=0)
        k = np.log1p(-mean_b * excess).sum(axis=0) / count
        scale = -k / mean_b
    shrunk = (count * k + _PRIOR_DRAWS * _PRIOR_K) / (count + _PRIOR_DRAWS)
    # No grid point has a profile where the smallest exceedances are 0 to rounding: a tail without end.
    return np.where(np.isnan(shrunk) | (log_profile.max(axis=0) == -np.inf), np.inf, shrunk), scale
