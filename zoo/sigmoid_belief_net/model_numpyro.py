"""The sigmoid belief network in NumPyro."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from elbozoo.zoo.networks.networks_numpyro import network
from elbozoo.zoo.sigmoid_belief_net import SigmoidBeliefNet
from elbozoo.zoo.spec import plate_sizes


class Coins(nnx.Module):
    """Independent binary units with learned odds."""

    def __init__(self, num_units: int, rngs: nnx.Rngs):
        self.logits = nnx.Param(jnp.zeros(num_units))

    def __call__(self) -> dist.Distribution:
        return dist.Bernoulli(logits=self.logits[...]).to_event(1)


class Model:
    """p(z_L) p(z_{L-1} | z_L) ... p(x | z_1)."""

    def __init__(self, spec: SigmoidBeliefNet, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Likelihood = spec.likelihood.form("numpyro")
        self.Decoder = spec.network.form("numpyro", "Decoder")

    def _decoder(self, layer: int, z: ArrayLike) -> Array:
        """What the latent above ``layer`` says of it; 0 is the data."""
        build = partial(self.Decoder, self.spec.network, *self.spec.decoder_sizes[layer])
        return network(f"{self.prefix}decoders.{layer}", build)(centred(z))

    def prior_distribution(self) -> dist.Distribution:
        """p(z_L), with batch shape () and event shape (latent_dims[-1],)."""
        return network(self.prefix + "prior", partial(Coins, self.spec.latent_dims[-1]))()

    def decode(self, z: ArrayLike) -> dist.Distribution:
        """p(x | z_1) for z_1 of shape (..., latent_dims[0]); its mean is the reconstruction."""
        likelihood = network(self.prefix + "likelihood", partial(self.Likelihood, self.spec.likelihood))
        return likelihood(self._decoder(0, z))

    def conditional(self, layer: int, above: ArrayLike) -> dist.Distribution:
        """p(z_layer | z_{layer+1} = above), for 1 <= layer < L."""
        return dist.Bernoulli(logits=self._decoder(layer, above)).to_event(1)

    def __call__(self, x: ArrayLike | None = None, size: int | None = None) -> Array:
        """Sample every z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        top = len(self.spec.latent_dims)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            z = numpyro.sample(f"z{top}", self.prior_distribution())
            for layer in range(top - 1, 0, -1):
                z = numpyro.sample(f"z{layer}", self.conditional(layer, z))
            return numpyro.sample("x", self.decode(z), obs=x)


class Guide:
    """q(z_1 | x) q(z_2 | z_1) ... q(z_L | z_{L-1})."""

    def __init__(self, spec: SigmoidBeliefNet, model: Model, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Encoder = spec.network.form("numpyro", "Encoder")

    def encode(self, layer: int, below: ArrayLike) -> dist.Distribution:
        """q(z_layer | below), for 1 <= layer <= L; below z_1 is the data."""
        spec, i = self.spec, layer - 1
        encoder = network(f"{self.prefix}encoders.{i}", partial(self.Encoder, spec.network, *spec.encoder_sizes[i]))
        family = spec.posteriors[i]
        posterior = network(f"{self.prefix}posteriors.{i}", partial(family.form("numpyro"), family))
        return posterior(encoder(centred(below)))

    def __call__(self, x: ArrayLike, size: int | None = None) -> Array:
        """Sample every z given x. Returns z_L of shape (B, latent_dims[-1])."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        z = jnp.asarray(x)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            for layer in range(1, len(self.spec.latent_dims) + 1):
                z = numpyro.sample(f"z{layer}", self.encode(layer, z))
        return z


def centred(z: ArrayLike) -> Array:
    """0 and 1 as -1 and 1, floats whatever the type of z; what lies between goes between."""
    return 2.0 * jnp.asarray(z) - 1.0
