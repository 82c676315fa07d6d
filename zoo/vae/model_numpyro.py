"""The variational autoencoder in NumPyro."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from elbozoo.zoo.networks.networks_numpyro import network
from elbozoo.zoo.priors.priors_numpyro import prior
from elbozoo.zoo.spec import plate_sizes
from elbozoo.zoo.vae import VAE


class Model:
    """p(z) p(x | z)."""

    def __init__(self, spec: VAE, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.num_outputs = spec.likelihood.num_outputs * spec.data_dim
        self.Likelihood = spec.likelihood.form("numpyro")
        self.Decoder = spec.network.form("numpyro", "Decoder")
        self.Posterior = spec.guide.form("numpyro")
        self.Encoder = spec.network.form("numpyro", "Encoder")

    def encode(self, x: ArrayLike) -> dist.Distribution:
        """q(z | x) for x of shape (..., data_dim): the guide's, which a prior may be made of."""
        spec = self.spec
        sizes = (spec.data_dim, spec.guide.num_outputs(spec.latent_dim))
        posterior = network(self.prefix + "posterior", partial(self.Posterior, spec.guide, spec.latent_dim))
        encoder = network(self.prefix + "encoder", partial(self.Encoder, spec.network, *sizes))
        log_joint = (self.log_joint(x),) if spec.guide.uses_log_joint else ()
        return posterior(encoder(x), *log_joint)

    def prior_distribution(self) -> dist.Distribution:
        """p(z), with batch shape () and event shape (latent_dim,)."""
        spec = self.spec
        sizes = (spec.latent_dim, spec.data_dim, spec.likelihood.unit_interval)
        return prior(self.prefix + "prior", spec.prior, *sizes)(self.encode)

    def conditional(self) -> Callable[[ArrayLike], dist.Distribution]:
        """p(x | z) as a function of z; the parameters' sites are made here."""
        sizes = (self.spec.latent_dim, self.num_outputs)
        likelihood = network(self.prefix + "likelihood", partial(self.Likelihood, self.spec.likelihood))
        decoder = network(self.prefix + "decoder", partial(self.Decoder, self.spec.network, *sizes))
        return lambda z: likelihood(decoder(z))

    def decode(self, z: ArrayLike) -> dist.Distribution:
        """p(x | z) for z of shape (..., latent_dim); its mean is the reconstruction."""
        return self.conditional()(z)

    def log_joint(self, x: ArrayLike) -> Callable[[ArrayLike], Array]:
        """``log p(x, z)`` as a function of z of shape (..., latent_dim), for a guide that climbs it."""
        z_prior, conditional = self.prior_distribution(), self.conditional()
        return lambda z: z_prior.log_prob(z) + conditional(z).log_prob(x)

    def __call__(self, x: ArrayLike | None = None, size: int | None = None) -> Array:
        """Sample z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            z = numpyro.sample("z", self.prior_distribution())
            return numpyro.sample("x", self.decode(z), obs=x)


class Guide:
    """q(z | x)."""

    def __init__(self, spec: VAE, model: Model, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.encode = model.encode

    def __call__(self, x: ArrayLike, size: int | None = None) -> Array:
        """Sample z given x. Returns z of shape (B, latent_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            return numpyro.sample("z", self.encode(x))
