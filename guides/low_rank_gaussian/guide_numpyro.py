"""The low-rank Gaussian guide in NumPyro: encoder outputs in, a distribution of z out."""

from __future__ import annotations

import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax import Array

from elbozoo.guides import low_rank_gaussian as specs


class LowRankGaussian(nnx.Module):
    def __init__(self, spec: specs.LowRankGaussian, latent_dim: int, rngs: nnx.Rngs):
        self.spec, self.latent_dim = spec, latent_dim

    def __call__(self, outputs: Array) -> dist.Distribution:
        loc, log_scale, factor = jnp.split(outputs, (self.latent_dim, 2 * self.latent_dim), -1)
        factor = factor.reshape(*factor.shape[:-1], self.latent_dim, self.spec.rank)
        return dist.LowRankMultivariateNormal(loc, factor, jnp.exp(2 * log_scale))
