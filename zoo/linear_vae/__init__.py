"""The linear variational autoencoder: probabilistic PCA with an amortized guide, every answer known exactly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import cho_solve

from elbozoo.guides.full_covariance_gaussian import lower_triangle
from elbozoo.inference.errors import must
from elbozoo.inference.parts import one_of, positive, whole_number
from elbozoo.zoo.likelihoods import Gaussian
from elbozoo.zoo.linear_vae.closed_forms import (
    active_unit_statistic,
    direction_value,
    kl_per_direction,
    learned_variance,
    posterior_variance,
    squared_error,
)
from elbozoo.zoo.spec import Spec, check_shape

__all__ = [
    "LinearVAE",
    "active_unit_statistic",
    "direction_value",
    "kl_per_direction",
    "learned_variance",
    "posterior_variance",
    "squared_error",
]

Weights = Mapping[str, ArrayLike]


@dataclasses.dataclass(frozen=True)
class LinearVAE(Spec):
    """Probabilistic PCA as a VAE: the model to test every bound, estimator and diagnostic on.

    ``z ~ N(0, I)``, ``x | z ~ N(W z + b, s2 I)``; the guide is ``z | x ~ N(A x + c, S)`` with one S for all data.

    - Marginal: ``x ~ N(b, W W^T + s2 I)``.
    - Posterior: ``M = W^T W + s2 I``; mean ``M^-1 W^T (x - b)``, covariance ``s2 M^-1``, the same for all x. So the
      full guide can be exact, and then every bound at every K equals ``log p(x)`` with zero variance.
    - The diagonal guide is exact where W has orthogonal columns, which the global optimum can always have.
    - At the maximum of the likelihood W spans the leading eigenvectors of the data covariance and b is the mean; the
      ELBO has no local maxima that the likelihood does not have, so a linear VAE stuck with collapsed latents is stuck
      for the optimiser's sake, or for s2's (a direction with ``eigenvalue <= s2`` collapses at the optimum itself).

    Sites: latent ``z`` with event shape (latent_dim,), observed ``x`` with event shape (data_dim,), plate ``data`` at
    dim -1.

    Parameters (torch layout): ``decoder.weight`` W (data_dim, latent_dim), ``decoder.bias`` b, ``encoder.weight`` A
    (latent_dim, data_dim), ``encoder.bias`` c; ``encoder_log_scale`` (latent_dim,), or for the full guide
    ``encoder_tril`` (latent_dim (latent_dim + 1) / 2,), the row-major lower triangle of S's Cholesky factor with its
    diagonal as logarithms; ``decoder_log_scale`` () where it is learned.

    Shapes: x (B, data_dim), z (B, latent_dim), or (K, B, latent_dim) under an outer plate of particles.

    Args:
        data_dim: entries of one datum.
        latent_dim: entries of one latent vector.
        scale: the decoder's standard deviation, or where learning it starts.
        learn_scale: whether the decoder's standard deviation is a parameter.
        guide: ``"diagonal"`` or ``"full"``, the form of S.

    Limits: ``closed_forms`` has the optimum under any beta, direction by direction.

    References:
        Tipping & Bishop 1999, Probabilistic principal component analysis, J. R. Stat. Soc. B 61, section 3; Lucas,
        Tucker, Grosse & Norouzi 2019, Don't blame the ELBO!, arXiv 1911.02469, theorem 1.

    Example:
        >>> spec = LinearVAE(data_dim=3, latent_dim=1, scale=0.5)
        >>> weights = spec.optimum([[3, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]])
        >>> round(float((weights["decoder.weight"] ** 2).sum()), 6)  # the largest eigenvalue, 4.5, less s2
        4.25
    """

    data_dim: int
    latent_dim: int
    scale: float = 1.0
    learn_scale: bool = False
    guide: str = "diagonal"

    def __post_init__(self) -> None:
        whole_number("data_dim", self.data_dim)
        whole_number("latent_dim", self.latent_dim)
        positive("scale", self.scale)
        if not isinstance(self.learn_scale, bool):
            raise must("learn_scale", "be True or False", repr(self.learn_scale), "Pass one of the two")
        one_of("guide", self.guide, ("diagonal", "full"))

    def check(self, x: ArrayLike) -> None:
        Gaussian().check(check_shape(x, self.data_dim))

    def bias_of_mean(self, mean: np.ndarray) -> dict[str, np.ndarray]:
        return {"decoder.bias": mean}

    def log_prob(self, weights: Weights, x: ArrayLike) -> np.ndarray:
        """The exact marginal ``log N(x; b, W W^T + s2 I)``.

        Args:
            weights: the program's weights in torch layout; those of the guide are not read.
            x: data, (B, data_dim).

        Returns:
            (B,), nats, float64.
        """
        weight, bias, s2 = self._decoder(weights)
        mean, cholesky = self._posterior(weights, x)
        residual = np.asarray(x, dtype=np.float64) - bias - mean @ weight.T
        # |C| = s2^(X - D) |M| and r^T C^-1 r = |r - W m|^2 / s2 + |m|^2, which has no cancellation.
        log_det = (self.data_dim - self.latent_dim) * np.log(s2) + 2.0 * np.log(np.diag(cholesky)).sum()
        quadratic = (residual**2).sum(-1) / s2 + (mean**2).sum(-1)
        return -0.5 * (self.data_dim * np.log(2.0 * np.pi) + log_det + quadratic)

    def posterior(self, weights: Weights, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """The exact posterior ``N(M^-1 W^T (x - b), s2 M^-1)``.

        Args:
            weights: the program's weights in torch layout; those of the guide are not read.
            x: data, (B, data_dim).

        Returns:
            Its mean (B, latent_dim) and the covariance (latent_dim, latent_dim) that all x share, float64.
        """
        mean, cholesky = self._posterior(weights, x)
        return mean, self._decoder(weights)[2] * cho_solve((cholesky, True), np.eye(self.latent_dim))

    def elbo(self, weights: Weights, x: ArrayLike) -> np.ndarray:
        """The exact ELBO of any weights: ``log p(x) - KL(q(z|x) || p(z|x))``, both Gaussian.

        Args:
            weights: the program's weights in torch layout.
            x: data, (B, data_dim).

        Returns:
            (B,), nats, float64.
        """
        mean, cholesky = self._posterior(weights, x)
        root = cholesky.T / np.sqrt(self._decoder(weights)[2])  # root^T root is the posterior's precision
        scale = self._scale_tril(weights)
        offset = np.asarray(x, dtype=np.float64) @ _array(weights, "encoder.weight").T + _array(weights, "encoder.bias")
        distance = ((offset - mean) @ root.T) ** 2
        log_dets = 2.0 * (np.log(np.diag(root)).sum() + np.log(np.diag(scale)).sum())
        kl = 0.5 * (((root @ scale) ** 2).sum() + distance.sum(-1) - self.latent_dim - log_dets)
        return self.log_prob(weights, x) - kl

    def exact_guide(self, weights: Weights) -> dict[str, np.ndarray]:
        """The same model with the best guide there is for it.

        ``A = M^-1 W^T``, ``c = -A b``; the full S is the posterior's covariance, the diagonal one has the variances
        ``s2 / M_ii``, which minimise ``KL(q || p(z|x))``.

        Args:
            weights: the program's weights in torch layout; those of the guide are not read.

        Returns:
            All weights of the program, float64.
        """
        weight, bias, s2 = self._decoder(weights)
        matrix = self._matrix(weight, s2)
        encoder = np.linalg.solve(matrix, weight.T)
        model = {name: np.asarray(array, np.float64) for name, array in weights.items() if name.startswith("decoder")}
        guide = {"encoder.weight": encoder, "encoder.bias": -encoder @ bias}
        if self.guide == "diagonal":
            return {**model, **guide, "encoder_log_scale": 0.5 * np.log(s2 / np.diag(matrix))}
        scale = np.linalg.cholesky(s2 * np.linalg.inv(matrix))
        np.fill_diagonal(scale, np.log(np.diag(scale)))
        return {**model, **guide, "encoder_tril": scale[np.tril_indices(self.latent_dim)]}

    def optimum(self, x: ArrayLike, beta: float = 1.0) -> dict[str, np.ndarray]:
        """The weights at a global maximum of ``E[log p(x|z)] - beta KL``, averaged over the data.

        b is the mean; column i of W is the i-th eigenvector times ``sqrt(max(0, l_i - beta s2))``; the guide has
        precision ``l_i / (beta s2)`` where that is above 1. With ``beta=1`` it is the maximum of the likelihood.

        Args:
            x: data, (N, data_dim).
            beta: weight of the KL.

        Returns:
            All weights of the program, float64. The maximum is unique up to rotations of the latents.

        Raises:
            InvalidArgument: ``beta`` is not 1 though the scale is learned.
        """
        if self.learn_scale and beta != 1.0:
            raise must("beta", "be 1 where the scale is learned", beta, "Build the spec with learn_scale=False")
        data = np.asarray(x, dtype=np.float64)
        eigenvalues, vectors = np.linalg.eigh(np.cov(data, rowvar=False, bias=True).reshape((self.data_dim,) * 2))
        eigenvalues, vectors = np.clip(eigenvalues[::-1], 0.0, None), vectors[:, ::-1]
        s2 = learned_variance(eigenvalues, self.latent_dim) if self.learn_scale else self.scale**2
        served = np.zeros(self.latent_dim)  # latents beyond data_dim serve no direction
        count = min(self.latent_dim, self.data_dim)
        served[:count] = eigenvalues[:count]
        columns = np.zeros((self.data_dim, self.latent_dim))
        columns[:, :count] = vectors[:, :count]
        norm = np.sqrt(np.maximum(served - beta * s2, 0.0))
        variance = posterior_variance(served, s2, beta)
        bias = data.mean(0)
        encoder = (columns * norm / np.maximum(served, beta * s2)).T
        weights = {"decoder.weight": columns * norm, "decoder.bias": bias}
        if self.learn_scale:
            weights["decoder_log_scale"] = np.array(0.5 * np.log(s2))
        weights |= {"encoder.weight": encoder, "encoder.bias": -encoder @ bias}
        if self.guide == "diagonal":
            return {**weights, "encoder_log_scale": 0.5 * np.log(variance)}
        return {**weights, "encoder_tril": np.diag(0.5 * np.log(variance))[np.tril_indices(self.latent_dim)]}

    def _decoder(self, weights: Weights) -> tuple[np.ndarray, np.ndarray, float]:
        log_scale = float(_array(weights, "decoder_log_scale")) if self.learn_scale else math.log(self.scale)
        return _array(weights, "decoder.weight"), _array(weights, "decoder.bias"), math.exp(2.0 * log_scale)

    def _matrix(self, weight: np.ndarray, s2: float) -> np.ndarray:
        return weight.T @ weight + s2 * np.eye(self.latent_dim)

    def _posterior(self, weights: Weights, x: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """The posterior's mean (B, D) and the Cholesky factor of M."""
        weight, bias, s2 = self._decoder(weights)
        cholesky = np.linalg.cholesky(self._matrix(weight, s2))
        centred = check_shape(x, self.data_dim).astype(np.float64) - bias
        return cho_solve((cholesky, True), weight.T @ centred.T).T, cholesky

    def _scale_tril(self, weights: Weights) -> np.ndarray:
        if self.guide == "diagonal":
            return np.diag(np.exp(_array(weights, "encoder_log_scale")))
        matrix = _array(weights, "encoder_tril")[lower_triangle(self.latent_dim)]
        return np.tril(matrix, -1) + np.diag(np.exp(np.diag(matrix)))


def _array(weights: Weights, name: str) -> np.ndarray:
    if name not in weights:
        raise must("weights", f"have {name!r}", sorted(weights), "Pass program.weights of this spec")
    return np.asarray(weights[name], dtype=np.float64)
