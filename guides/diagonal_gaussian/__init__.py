"""q(z | x) = N(loc(x), diag(scale(x)^2))."""

from __future__ import annotations

import dataclasses

from elbozoo.guides.family import Family

__all__ = ["DiagonalGaussian"]


@dataclasses.dataclass(frozen=True)
class DiagonalGaussian(Family):
    """The mean-field Gaussian: ``q(z|x) = prod_d N(z_d; loc_d(x), exp(2 log_scale_d(x)))``.

    Shapes: encoder outputs (..., 2 D) as loc and log scale; z (..., D). Reparameterised.

    Limits: against an exact posterior with correlations it loses at least
    ``1/2 (sum_d log precision_dd - log det precision)`` nats a datum (``-1/2 log(1 - rho^2)`` in two dimensions).

    References:
        Kingma & Welling 2014, Auto-encoding variational Bayes, arXiv 1312.6114, eq. 9.

    Example:
        >>> DiagonalGaussian().num_outputs(50)
        100
    """

    def num_outputs(self, latent_dim: int) -> int:
        return 2 * latent_dim
