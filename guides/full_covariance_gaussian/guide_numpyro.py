"""The full-covariance Gaussian guide in NumPyro: encoder outputs in, a distribution of z out."""

from __future__ import annotations

import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax import Array

from elbozoo.guides import full_covariance_gaussian as specs


class FullCovarianceGaussian(nnx.Module):
    def __init__(self, spec: specs.FullCovarianceGaussian, latent_dim: int, rngs: nnx.Rngs):
        self.latent_dim = latent_dim

    def __call__(self, outputs: Array) -> dist.Distribution:
        loc, triangle = outputs[..., : self.latent_dim], outputs[..., self.latent_dim :]
        return dist.MultivariateNormal(loc, scale_tril=scale_tril(triangle, self.latent_dim))


def scale_tril(triangle: Array, dim: int) -> Array:
    """The (..., dim, dim) Cholesky factor whose row-major lower triangle is given, with its diagonal as logarithms."""
    matrix = triangle[..., specs.lower_triangle(dim)]
    diagonal = jnp.exp(jnp.diagonal(matrix, axis1=-2, axis2=-1))
    return jnp.tril(matrix, -1) + diagonal[..., None] * jnp.eye(dim, dtype=diagonal.dtype)
