"""q(z | x) = N(loc(x), W(x) W(x)^T + diag(scale(x)^2))."""

from __future__ import annotations

import dataclasses

from elbozoo.guides.family import Family
from elbozoo.inference.errors import must
from elbozoo.inference.parts import whole_number

__all__ = ["LowRankGaussian"]


@dataclasses.dataclass(frozen=True)
class LowRankGaussian(Family):
    """A Gaussian with a few directions of correlation: ``q(z|x) = N(z; loc, W W^T + diag(exp(2 log_scale)))``.

    W(x) has D rows and ``rank`` columns. Between :class:`DiagonalGaussian` (W = 0) and
    :class:`FullCovarianceGaussian`, which any covariance is from rank D - 1 on.

    Shapes: encoder outputs (..., (2 + rank) D) as loc, log scale and W row by row; z (..., D). Reparameterised. Units:
    nats.

    Args:
        rank: columns of W, at most latent_dim.

    Limits: the KL from a diagonal Gaussian prior has no closed form in either library, and is sampled. A density costs
    D rank^2 and a Cholesky factor of a (rank, rank) matrix.

    References:
        Ong, Nott & Smith 2018, Gaussian variational approximation with a factor covariance structure,
        arXiv 1701.03208, eq. 5; Rezende, Mohamed & Wierstra 2014, arXiv 1401.4082, section 4.3 (rank 1, of the
        precision).

    Example:
        >>> LowRankGaussian(rank=3).num_outputs(50)
        250
    """

    rank: int = 2

    def __post_init__(self) -> None:
        whole_number("rank", self.rank)

    def num_outputs(self, latent_dim: int) -> int:
        if self.rank > latent_dim:
            todo = f"Pass LowRankGaussian(rank={latent_dim}) or less, or FullCovarianceGaussian()"
            raise must("rank", f"be at most latent_dim={latent_dim}", self.rank, todo)
        return (2 + self.rank) * latent_dim
