"""The ladder variational autoencoder in NumPyro: the hierarchical model, and a guide that comes down with it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from elbozoo.zoo.hierarchical_vae.model_numpyro import Model
from elbozoo.zoo.ladder_vae import LadderVAE
from elbozoo.zoo.networks.networks_numpyro import network
from elbozoo.zoo.spec import plate_sizes

__all__ = ["Guide", "Model"]


class Guide:
    """q(z_L | x) q(z_{L-1} | z_L, x) ... q(z_1 | z_2, x)."""

    def __init__(self, spec: LadderVAE, model: Model, name: str = ""):
        self.spec, self.name, self.model = spec, name, model
        self.prefix = f"{name}." if name else ""

    def climb(self, x: ArrayLike) -> list[tuple[Array, Array]]:
        """Location and log scale of the evidence on every rung, next to the data first."""
        features, evidence = jnp.asarray(x), []
        for i, (architecture, sizes) in enumerate(zip(self.spec.networks, self.spec.encoder_sizes, strict=True)):
            build = partial(architecture.form("numpyro", "Rung"), architecture, *sizes)
            outputs, features = network(f"{self.prefix}encoders.{i}", build)(features)
            loc, log_scale = jnp.split(outputs, 2, -1)
            evidence.append((loc, log_scale))
        return evidence

    def __call__(self, x: ArrayLike, size: int | None = None) -> Array:
        """Sample every z given x. Returns z_1 of shape (B, latent_dims[0])."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        *evidence, (loc, log_scale) = self.climb(x)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            top = len(self.spec.latent_dims)
            z = numpyro.sample(f"z{top}", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))
            for layer in range(top - 1, 0, -1):
                q = merge(evidence[layer - 1], self.model.conditional(layer, z))
                z = numpyro.sample(f"z{layer}", q)
        return z


def merge(evidence: tuple[Array, Array], prior: tuple[Array, Array]) -> dist.Distribution:
    """The normalised product of two diagonal Gaussians, given by locations and log scales."""
    (m, log_s), (mu, log_sigma) = evidence, prior
    loc = mu + jax.nn.sigmoid(2.0 * (log_sigma - log_s)) * (m - mu)
    return dist.Normal(loc, jnp.exp(-0.5 * jnp.logaddexp(-2.0 * log_s, -2.0 * log_sigma))).to_event(1)
