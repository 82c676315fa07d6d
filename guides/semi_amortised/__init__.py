"""q(z | x): a Gaussian that starts where the encoder puts it and climbs the ELBO."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from elbozoo.guides.diagonal_gaussian import DiagonalGaussian
from elbozoo.guides.family import Family
from elbozoo.guides.full_covariance_gaussian import FullCovarianceGaussian
from elbozoo.guides.low_rank_gaussian import LowRankGaussian
from elbozoo.inference.errors import must
from elbozoo.inference.parts import positive, whole_number

__all__ = ["SemiAmortised"]


@dataclasses.dataclass(frozen=True)
class SemiAmortised(Family):
    """A Gaussian whose parameters take a few steps up each datum's own ELBO: ``λ <- λ + step_size dL(λ)/dλ``.

    ``λ_0 = encoder(x)``; ``L(λ) = 1/(2 P) sum_p log p(x, z(λ, e_p)) + H[q_λ]`` where z(λ, e) is q_λ's location plus its
    scale times e, and the points ``e_p`` are fixed: ``num_points`` pairs ±e of length sqrt(D), orthogonal within blocks
    of D. So the guide is a function of x without noise of its own, and all of it is differentiated, the steps too: the
    encoder learns where to start, and the model sees where its guide will go. With num_points a multiple of D, L is
    the exact ELBO where ``log p(x, z)`` is quadratic in z.

    Shapes: encoder outputs λ_0, as of ``family``; z (..., D). Reparameterised. Units: nats.

    Args:
        family: a Gaussian one, whose parameters climb.
        steps: of plain gradient ascent.
        step_size: of each step, on all of λ alike.
        num_points: pairs of points.

    Limits: each step evaluates the decoder and its gradient at 2 num_points points a datum, and training
    differentiates that once more. Too large a step diverges: ``step_size`` times the largest curvature of L must stay
    below 2. The model's parameters are the guide's too. Of the models, those whose guide hands over its log joint.

    References:
        Kim, Wiseman, Miller, Sontag & Rush 2018, Semi-amortized variational autoencoders, arXiv 1802.02550, algorithm 1
        (there with fresh noise in each step).

    Example:
        >>> SemiAmortised(steps=3).num_outputs(50)
        100
        >>> e = SemiAmortised(num_points=2).points(2)
        >>> bool(np.allclose(e.T @ e / len(e), np.eye(2)))
        True
    """

    uses_log_joint: ClassVar[bool] = True

    family: Family = dataclasses.field(default_factory=DiagonalGaussian)
    steps: int = 5
    step_size: float = 0.01
    num_points: int = 4

    def __post_init__(self) -> None:
        gaussian = (DiagonalGaussian, FullCovarianceGaussian, LowRankGaussian)
        if not isinstance(self.family, gaussian):
            names = ", ".join(cls.__name__ for cls in gaussian)
            raise must("family", f"be one of {names}", repr(self.family), "Pass family=DiagonalGaussian(), say")
        whole_number("steps", self.steps)
        positive("step_size", self.step_size)
        whole_number("num_points", self.num_points)

    def num_outputs(self, latent_dim: int) -> int:
        return self.family.num_outputs(latent_dim)

    def points(self, latent_dim: int) -> np.ndarray:
        """The fixed points e_p, (2 num_points, latent_dim)."""
        rng, blocks = np.random.default_rng(0), -(-self.num_points // latent_dim)
        rotations = [np.linalg.qr(rng.standard_normal((latent_dim, latent_dim)))[0] for _ in range(blocks)]
        half = np.sqrt(latent_dim) * np.concatenate(rotations)[: self.num_points]
        return np.concatenate([half, -half])


def refuse_without_log_joint() -> Exception:
    """The error of a model whose guide does not hand over its log joint."""
    todo = "Use a guide that does not climb, or VAE"
    return must("guide", "be given its model's log joint to be semi-amortised", "none", todo)
