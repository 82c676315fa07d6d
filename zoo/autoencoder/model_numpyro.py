"""The autoencoder in NumPyro."""

from __future__ import annotations

from functools import partial

import jax
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from elbozoo.zoo.autoencoder import Autoencoder, no_draws
from elbozoo.zoo.networks.networks_numpyro import network
from elbozoo.zoo.spec import plate_sizes


class Flat(dist.ImproperUniform):
    """Log density 0 everywhere; nothing to draw from."""

    def sample(self, key: jax.Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        raise no_draws()


class Model:
    """p(x | z), under a flat improper prior of z."""

    def __init__(self, spec: Autoencoder, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Likelihood = spec.likelihood.form("numpyro")
        self.Decoder = spec.network.form("numpyro", "Decoder")

    def prior_distribution(self) -> dist.Distribution:
        """The flat prior, with batch shape () and event shape (latent_dim,)."""
        return Flat(dist.constraints.real, (), (self.spec.latent_dim,))

    def decode(self, z: ArrayLike) -> dist.Distribution:
        """p(x | z) for z of shape (..., latent_dim); its mean is the reconstruction."""
        spec = self.spec
        sizes = (spec.latent_dim, spec.likelihood.num_outputs * spec.data_dim)
        likelihood = network(self.prefix + "likelihood", partial(self.Likelihood, spec.likelihood))
        decoder = network(self.prefix + "decoder", partial(self.Decoder, spec.network, *sizes))
        return likelihood(decoder(z))

    def __call__(self, x: ArrayLike | None = None, size: int | None = None) -> Array:
        """Score x given z, which must come from elsewhere. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            z = numpyro.sample("z", self.prior_distribution())
            return numpyro.sample("x", self.decode(z), obs=x)


class Guide:
    """The point mass at encoder(x)."""

    def __init__(self, spec: Autoencoder, model: Model, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Encoder = spec.network.form("numpyro", "Encoder")

    def encode(self, x: ArrayLike) -> dist.Distribution:
        """The code of x of shape (..., data_dim), as a distribution."""
        spec = self.spec
        encoder = network(self.prefix + "encoder", partial(self.Encoder, spec.network, spec.data_dim, spec.latent_dim))
        return dist.Delta(encoder(x), event_dim=1)

    def __call__(self, x: ArrayLike, size: int | None = None) -> Array:
        """Encode x. Returns z of shape (B, latent_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            return numpyro.sample("z", self.encode(x))
