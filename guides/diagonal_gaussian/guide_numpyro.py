"""The diagonal Gaussian guide in NumPyro: encoder outputs in, a distribution of z out."""

from __future__ import annotations

import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax import Array

from elbozoo.guides import diagonal_gaussian as specs


class DiagonalGaussian(nnx.Module):
    def __init__(self, spec: specs.DiagonalGaussian, latent_dim: int, rngs: nnx.Rngs):
        pass

    def __call__(self, outputs: Array) -> dist.Distribution:
        loc, log_scale = jnp.split(outputs, 2, -1)
        return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)
