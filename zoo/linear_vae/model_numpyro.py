"""The linear variational autoencoder in NumPyro."""

from __future__ import annotations

import math
from functools import partial

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from elbozoo.guides.full_covariance_gaussian.guide_numpyro import scale_tril
from elbozoo.zoo.linear_vae import LinearVAE
from elbozoo.zoo.networks.networks_numpyro import linear, network
from elbozoo.zoo.spec import plate_sizes


class Model:
    """p(z) p(x | z)."""

    def __init__(self, spec: LinearVAE, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""

    def decode(self, z: ArrayLike) -> dist.Distribution:
        """p(x | z) for z of shape (..., latent_dim); its mean is the reconstruction."""
        spec = self.spec
        decoder = network(self.prefix + "decoder", partial(linear, spec.latent_dim, spec.data_dim))
        scale = spec.scale
        if spec.learn_scale:
            scale = jnp.exp(numpyro.param(self.prefix + "decoder_log_scale", jnp.array(math.log(spec.scale))))
        return dist.Normal(decoder(z), scale).to_event(1)

    def __call__(self, x: ArrayLike | None = None, size: int | None = None) -> Array:
        """Sample z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        loc = jnp.zeros(self.spec.latent_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            z = numpyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            return numpyro.sample("x", self.decode(z), obs=x)


class Guide:
    """q(z | x)."""

    def __init__(self, spec: LinearVAE, model: Model, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""

    def encode(self, x: ArrayLike) -> dist.Distribution:
        """q(z | x) for x of shape (..., data_dim)."""
        spec = self.spec
        loc = network(self.prefix + "encoder", partial(linear, spec.data_dim, spec.latent_dim))(x)
        if spec.guide == "full":
            zeros = jnp.zeros(spec.latent_dim * (spec.latent_dim + 1) // 2)
            triangle = numpyro.param(self.prefix + "encoder_tril", zeros)
            return dist.MultivariateNormal(loc, scale_tril=scale_tril(triangle, spec.latent_dim))
        log_scale = numpyro.param(self.prefix + "encoder_log_scale", jnp.zeros(spec.latent_dim))
        return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)

    def __call__(self, x: ArrayLike, size: int | None = None) -> Array:
        """Sample z given x. Returns z of shape (B, latent_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            return numpyro.sample("z", self.encode(x))
