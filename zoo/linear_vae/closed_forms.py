"""The linear VAE's information bottleneck in closed form, one principal direction at a time.

For data with covariance eigenvalues ``l_i`` (divide by N, not N - 1), a decoder variance ``s2`` that is fixed, and the
objective ``E[log p(x|z)] - beta KL(q(z|x) || p(z))``, put ``theta = beta s2``. At the global optimum the decoder's
columns are the eigenvectors, with squared norm ``max(0, l_i - theta)``: reverse water-filling with water level theta.
A direction carries information exactly when ``l_i > theta``. All functions take the eigenvalues of the directions that
the latents can serve (the ``latent_dim`` largest) as an array of any shape and work entry by entry, in float64.

References:
    Tipping & Bishop 1999, Probabilistic principal component analysis, J. R. Stat. Soc. B 61, section 3.2;
    Lucas, Tucker, Grosse & Norouzi 2019, Don't blame the ELBO!, arXiv 1911.02469, theorem 1; Cover & Thomas 2006,
    Elements of Information Theory, theorem 10.3.3 (reverse water-filling).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from elbozoo.inference.errors import must

__all__ = [
    "active_unit_statistic",
    "direction_value",
    "kl_per_direction",
    "learned_variance",
    "posterior_variance",
    "squared_error",
]


def kl_per_direction(eigenvalues: ArrayLike, s2: float, beta: float = 1.0) -> np.ndarray:
    """KL of each direction at the optimum, averaged over the data: ``max(0, 1/2 log(l_i / theta))``.

    Args:
        eigenvalues: of the data covariance.
        s2: decoder variance.
        beta: weight of the KL in the objective.

    Returns:
        Nats per datum, the eigenvalues' shape. Their sum is the rate.

    Example:
        >>> kl_per_direction([np.e**2, 0.5], s2=1.0)
        array([1., 0.])
    """
    values, theta = _water_level(eigenvalues, s2, beta)
    return 0.5 * np.log(np.maximum(values / theta, 1.0))


def active_unit_statistic(eigenvalues: ArrayLike, s2: float, beta: float = 1.0) -> np.ndarray:
    """``Var_x(E_q[z_i])`` of each direction at the optimum: ``max(0, 1 - theta / l_i)``, in [0, 1).

    Arguments as for ``kl_per_direction``. A unit counts as active above 0.01 (Burda et al. 2015).
    """
    return 1.0 - posterior_variance(eigenvalues, s2, beta)


def posterior_variance(eigenvalues: ArrayLike, s2: float, beta: float = 1.0) -> np.ndarray:
    """Variance of q(z_i | x) of each direction at the optimum: ``min(1, theta / l_i)``.

    Arguments as for ``kl_per_direction``. It is 1, the prior's, where a direction is collapsed.
    """
    values, theta = _water_level(eigenvalues, s2, beta)
    return theta / np.maximum(values, theta)


def squared_error(eigenvalues: ArrayLike, s2: float, beta: float = 1.0) -> np.ndarray:
    """``E[(x_i - decode(z)_i)^2]`` along each direction at the optimum: ``min(theta, l_i)``, z drawn from q.

    Arguments as for ``kl_per_direction``. In squared units of x. A direction that no latent serves loses all of
    ``l_i``. With the rate this is the whole rate-distortion curve as beta runs.
    """
    values, theta = _water_level(eigenvalues, s2, beta)
    return np.minimum(values, theta)


def direction_value(eigenvalues: ArrayLike, s2: float) -> np.ndarray:
    """Nats per datum that the optimal bound (beta = 1) falls by when a direction is lost.

    ``1/2 (l_i / s2 - 1 - log(l_i / s2))`` where ``l_i > s2``, and 0 where the direction is collapsed anyway.
    """
    values, theta = _water_level(eigenvalues, s2, 1.0)
    ratio = np.maximum(values / theta, 1.0)
    return 0.5 * (ratio - 1.0 - np.log(ratio))


def learned_variance(eigenvalues: ArrayLike, latent_dim: int) -> float:
    """The decoder variance at the optimum when it is learned (beta = 1): the mean of the discarded eigenvalues.

    Args:
        eigenvalues: all ``data_dim`` of them, in any order.
        latent_dim: number of directions kept, the largest.

    Returns:
        s2 in squared units of x (Tipping & Bishop 1999, section 3.2).

    Raises:
        InvalidArgument: no eigenvalue is discarded, so that the bound has no maximum in s2.

    Example:
        >>> learned_variance([4.0, 1.0, 2.0], latent_dim=1)
        1.5
    """
    values = np.sort(np.asarray(eigenvalues, dtype=np.float64))[::-1]
    if not 0 <= latent_dim < values.size:
        raise must("latent_dim", f"be below the {values.size} eigenvalues", latent_dim, "Keep fewer directions")
    return float(values[latent_dim:].mean())


def _water_level(eigenvalues: ArrayLike, s2: float, beta: float) -> tuple[np.ndarray, float]:
    values = np.asarray(eigenvalues, dtype=np.float64)
    if not (s2 > 0.0 and beta > 0.0):
        raise must("s2 and beta", "be above 0", (s2, beta), "Pass the decoder's variance and the KL's weight")
    if np.any(values < 0.0):
        raise must("eigenvalues", "be at least 0", values.min(), "Pass those of a covariance; clip rounding errors")
    return values, float(s2 * beta)
