"""q(z | x): a mixture of diagonal Gaussians."""

from __future__ import annotations

import dataclasses

from elbozoo.guides.family import Family
from elbozoo.inference.parts import whole_number

__all__ = ["MixtureOfGaussians"]


@dataclasses.dataclass(frozen=True)
class MixtureOfGaussians(Family):
    r"""A mixture of diagonal Gaussians: ``q(z|x) = sum_c pi_c N(z; loc_c, diag(scale_c^2))``, all functions of x.

    A draw takes a component, then a point of it. Its derivative in the parameters φ is implicit: the maps

    ``S_d(z) = sum_c w_c(z_<d) Phi((z_d - loc_cd) / scale_cd)`` with
    ``w_c(z_<d) ∝ pi_c prod_{j<d} N(z_j; loc_cj, scale_cj^2)``

    (the distribution function of z_d given those before it) send z to uniform noise, which does not depend on φ, so
    ``dz/dφ = -(dS/dz)^{-1} dS/dφ``, by one triangular solve with ``dS_d/dz_d = sum_c w_c N_cd(z_d)`` and, for j < d,
    ``dS_d/dz_j = Cov_w(Phi_cd, s_cj)``, ``s_cj = -(z_j - loc_cj) / scale_cj^2``. So every estimator for reparameterised
    guides serves it.

    Shapes: encoder outputs (..., C (1 + 2 D)) as C logits of pi, then C locs and C log scales of D entries; z (..., D).
    Reparameterised. Units: nats.

    Args:
        num_components: C, the number of Gaussians.

    Limits: the derivative of a draw is a first one; its own derivative is not to be taken. A draw's derivative takes
    D^2 numbers and, between far components, where the density is low, is large. No closed form of the KL. Components
    start alike but for the encoder's weights.

    References:
        Figurnov, Mohamed & Mnih 2018, Implicit reparameterization gradients, arXiv 1805.08498, eqs. 6 and 8 and
        section 4; Graves 2016, Stochastic backpropagation through mixture density distributions, arXiv 1607.05690.

    Example:
        >>> MixtureOfGaussians(num_components=4).num_outputs(50)
        404
    """

    num_components: int = 4

    def __post_init__(self) -> None:
        whole_number("num_components", self.num_components)

    def num_outputs(self, latent_dim: int) -> int:
        return self.num_components * (1 + 2 * latent_dim)
