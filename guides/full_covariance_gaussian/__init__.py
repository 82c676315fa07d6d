"""q(z | x) = N(loc(x), L(x) L(x)^T)."""

from __future__ import annotations

import dataclasses

import numpy as np

from elbozoo.guides.family import Family

__all__ = ["FullCovarianceGaussian", "lower_triangle"]


@dataclasses.dataclass(frozen=True)
class FullCovarianceGaussian(Family):
    """A Gaussian with all correlations: ``q(z|x) = N(z; loc(x), L(x) L(x)^T)``, L lower triangular.

    The outputs hold L's lower triangle row by row (L_00, L_10, L_11, L_20, ...), its diagonal as logarithms.

    Shapes: encoder outputs (..., D + D (D + 1) / 2) as loc and triangle; z (..., D). Reparameterised.

    Limits: the triangle grows as D^2: the last layer of a 50-dimensional guide has 1325 outputs.

    References:
        Kingma & Welling 2019, An introduction to variational autoencoders, arXiv 1906.02691, section 2.5.1.

    Example:
        >>> FullCovarianceGaussian().num_outputs(50)
        1325
    """

    def num_outputs(self, latent_dim: int) -> int:
        return latent_dim + latent_dim * (latent_dim + 1) // 2


def lower_triangle(dim: int) -> np.ndarray:
    """Index of each entry (i, j <= i) of a (dim, dim) matrix in its row-major lower triangle; 0 above the diagonal."""
    rows, columns = np.indices((dim, dim))
    return np.where(columns <= rows, rows * (rows + 1) // 2 + columns, 0)
