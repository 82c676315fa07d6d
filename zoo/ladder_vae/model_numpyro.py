"""The ladder variational autoencoder in NumPyro: the hierarchical model, and a guide that comes down with it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from elbozoo.zoo.hierarchical_vae import model_numpyro as hierarchical
from elbozoo.zoo.ladder_vae import LadderVAE
from elbozoo.zoo.networks.networks_numpyro import network
from elbozoo.zoo.priors.priors_numpyro import prior
from elbozoo.zoo.spec import plate_sizes


class Model(hierarchical.Model):
    """p(z_L) p(z_{L-1} | z_L) ... p(x | z_1)."""

    spec: LadderVAE

    def climb(self, x: ArrayLike) -> list[tuple[Array, Array]]:
        """Location and variance of the evidence on every rung, next to the data first: the guide's."""
        features, evidence = jnp.asarray(x), []
        for i, (architecture, sizes) in enumerate(zip(self.spec.rungs, self.spec.encoder_sizes, strict=True)):
            build = partial(architecture.form("numpyro", "Rung"), architecture, *sizes)
            outputs, features = network(f"{self.prefix}encoders.{i}", build)(features)
            loc, raw = jnp.split(outputs, 2, -1)
            evidence.append((loc, jax.nn.softplus(raw)))
        return evidence

    def encode(self, x: ArrayLike) -> dist.Distribution:
        """q(z_L | x), which a prior may be made of."""
        loc, variance = self.climb(x)[-1]
        return dist.Normal(loc, jnp.sqrt(variance)).to_event(1)

    def prior_distribution(self) -> dist.Distribution:
        """p(z_L), with batch shape () and event shape (latent_dims[-1],)."""
        return prior(self.prefix + "prior", self.spec.prior, *self.spec.prior_sizes)(self.encode)


class Guide:
    """q(z_L | x) q(z_{L-1} | z_L, x) ... q(z_1 | z_2, x)."""

    def __init__(self, spec: LadderVAE, model: Model, name: str = ""):
        self.spec, self.name, self.model = spec, name, model

    def __call__(self, x: ArrayLike, size: int | None = None) -> Array:
        """Sample every z given x. Returns z_1 of shape (B, latent_dims[0])."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        *evidence, (loc, variance) = self.model.climb(x)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            top = len(self.spec.latent_dims)
            z = numpyro.sample(f"z{top}", dist.Normal(loc, jnp.sqrt(variance)).to_event(1))
            for layer in range(top - 1, 0, -1):
                q = merge(evidence[layer - 1], self.model.conditional(layer, z))
                z = numpyro.sample(f"z{layer}", q)
        return z


def merge(evidence: tuple[Array, Array], prior: tuple[Array, Array]) -> dist.Distribution:
    """The normalised product of two diagonal Gaussians, by location and variance, and by location and log scale."""
    (m, variance), (mu, log_scale) = evidence, prior
    share = 1.0 / (1.0 + variance * jnp.exp(-2.0 * log_scale))
    return dist.Normal(mu + share * (m - mu), jnp.sqrt(share * variance)).to_event(1)
