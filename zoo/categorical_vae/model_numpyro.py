"""The categorical variational autoencoder in NumPyro."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from elbozoo.inference.numpyro_distributions import OneHotCategorical
from elbozoo.zoo.categorical_vae import CategoricalVAE
from elbozoo.zoo.categorical_vae.posterior_numpyro import AutoregressivePosterior
from elbozoo.zoo.networks.networks_numpyro import network
from elbozoo.zoo.spec import plate_sizes


class Model:
    """p(z) p(x | z)."""

    def __init__(self, spec: CategoricalVAE, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Likelihood = spec.likelihood.form("numpyro")
        self.Decoder = spec.network.form("numpyro", "Decoder")

    def prior_distribution(self) -> dist.Distribution:
        """p(z), with batch shape () and event shape (num_latents, num_categories)."""
        return OneHotCategorical(jnp.zeros((self.spec.num_latents, self.spec.num_categories))).to_event(1)

    def decode(self, z: ArrayLike) -> dist.Distribution:
        """p(x | z) for z of shape (..., num_latents, num_categories); its mean is the reconstruction."""
        spec, z = self.spec, 1.0 * jnp.asarray(z)
        sizes = (spec.num_codes, spec.likelihood.num_outputs * spec.data_dim)
        likelihood = network(self.prefix + "likelihood", partial(self.Likelihood, spec.likelihood))
        decoder = network(self.prefix + "decoder", partial(self.Decoder, spec.network, *sizes))
        return likelihood(decoder(z.reshape(*z.shape[:-2], spec.num_codes)))

    def __call__(self, x: ArrayLike | None = None, size: int | None = None) -> Array:
        """Sample z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            z = numpyro.sample("z", self.prior_distribution())
            return numpyro.sample("x", self.decode(z), obs=x)


class Guide:
    """q(z | x)."""

    def __init__(self, spec: CategoricalVAE, model: Model, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Encoder = spec.network.form("numpyro", "Encoder")

    def encode(self, x: ArrayLike) -> dist.Distribution:
        """q(z | x) for x of shape (..., data_dim)."""
        spec = self.spec
        encoder = network(self.prefix + "encoder", partial(self.Encoder, spec.network, spec.data_dim, spec.num_codes))
        outputs = encoder(x)
        logits = outputs.reshape(*outputs.shape[:-1], spec.num_latents, spec.num_categories)
        if spec.autoregressive_guide:
            return network(self.prefix + "posterior", partial(AutoregressivePosterior, spec))(logits)
        return OneHotCategorical(logits).to_event(1)

    def __call__(self, x: ArrayLike, size: int | None = None) -> Array:
        """Sample z given x. Returns z of shape (B, num_latents, num_categories)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            return numpyro.sample("z", self.encode(x))
