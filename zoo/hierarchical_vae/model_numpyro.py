"""The hierarchical variational autoencoder in NumPyro."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from elbozoo.zoo.hierarchical_vae import HierarchicalVAE, Hierarchy
from elbozoo.zoo.networks.networks_numpyro import network
from elbozoo.zoo.priors.priors_numpyro import prior
from elbozoo.zoo.spec import plate_sizes


class Model:
    """p(z_L) p(z_{L-1} | z_L) ... p(x | z_1)."""

    def __init__(self, spec: Hierarchy, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Likelihood = spec.likelihood.form("numpyro")

    def _decoder(self, layer: int, z: ArrayLike) -> Array:
        """What the latent above ``layer`` says of it; 0 is the data."""
        architecture = self.spec.networks[layer]
        build = partial(architecture.form("numpyro", "Decoder"), architecture, *self.spec.decoder_sizes[layer])
        return network(f"{self.prefix}decoders.{layer}", build)(z)

    def prior_distribution(self) -> dist.Distribution:
        """p(z_L), with batch shape () and event shape (latent_dims[-1],)."""
        return prior(self.prefix + "prior", self.spec.prior, *self.spec.prior_sizes)()

    def decode(self, z: ArrayLike) -> dist.Distribution:
        """p(x | z_1) for z_1 of shape (..., latent_dims[0]); its mean is the reconstruction."""
        likelihood = network(self.prefix + "likelihood", partial(self.Likelihood, self.spec.likelihood))
        return likelihood(self._decoder(0, z))

    def conditional(self, layer: int, above: ArrayLike) -> tuple[Array, Array]:
        """Location and log scale of p(z_layer | z_{layer+1} = above), for 1 <= layer < L."""
        loc, log_scale = jnp.split(self._decoder(layer, above), 2, -1)
        return loc, log_scale

    def __call__(self, x: ArrayLike | None = None, size: int | None = None) -> Array:
        """Sample every z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        top = len(self.spec.latent_dims)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            z = numpyro.sample(f"z{top}", self.prior_distribution())
            for layer in range(top - 1, 0, -1):
                loc, log_scale = self.conditional(layer, z)
                z = numpyro.sample(f"z{layer}", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))
            return numpyro.sample("x", self.decode(z), obs=x)


class Guide:
    """q(z_1 | x) q(z_2 | z_1) ... q(z_L | z_{L-1})."""

    def __init__(self, spec: HierarchicalVAE, model: Model, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Posterior = spec.guide.form("numpyro")

    def encode(self, layer: int, below: ArrayLike) -> dist.Distribution:
        """q(z_layer | below), for 1 <= layer <= L; below z_1 is the data."""
        spec, i = self.spec, layer - 1
        architecture = spec.networks[i]
        build = partial(architecture.form("numpyro", "Encoder"), architecture, *spec.encoder_sizes[i])
        posterior = partial(self.Posterior, spec.guide, spec.latent_dims[i])
        outputs = network(f"{self.prefix}encoders.{i}", build)(below)
        return network(f"{self.prefix}posteriors.{i}", posterior)(outputs)

    def __call__(self, x: ArrayLike, size: int | None = None) -> Array:
        """Sample every z given x. Returns z_L of shape (B, latent_dims[-1])."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        z = jnp.asarray(x)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            for layer in range(1, len(self.spec.latent_dims) + 1):
                z = numpyro.sample(f"z{layer}", self.encode(layer, z))
        return z
