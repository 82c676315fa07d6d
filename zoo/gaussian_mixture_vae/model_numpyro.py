"""The Gaussian mixture variational autoencoder in NumPyro."""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from elbozoo.zoo.gaussian_mixture_vae import GaussianMixtureVAE
from elbozoo.zoo.networks.networks_numpyro import network
from elbozoo.zoo.semi_supervised_vae.model_numpyro import one_hot
from elbozoo.zoo.spec import plate_sizes


class Clusters(nnx.Module):
    """The parameters of p(y) and p(z | y)."""

    def __init__(self, spec: GaussianMixtureVAE, rngs: nnx.Rngs):
        shape = (spec.num_clusters, spec.latent_dim)
        self.spec = spec
        if spec.learn_weights:
            self.logits = nnx.Param(jnp.zeros(spec.num_clusters))
        self.loc = nnx.Param(jax.random.normal(rngs.params(), shape) / sqrt(spec.latent_dim))
        self.log_scale = nnx.Param(jnp.zeros(shape))

    def __call__(self) -> Mixture:
        logits = self.logits[...] if self.spec.learn_weights else jnp.zeros(self.spec.num_clusters)
        return Mixture(jax.nn.log_softmax(logits), self.loc[...], jnp.exp(self.log_scale[...]))


class Mixture(NamedTuple):
    """The clusters: log weights (C,), locations and scales (C, D)."""

    log_weights: Array
    loc: Array
    scale: Array

    def weights(self) -> dist.Distribution:
        """p(y)."""
        return dist.Categorical(logits=self.log_weights)

    def latent(self, y: ArrayLike) -> dist.Distribution:
        """p(z | y) for clusters y of shape (...)."""
        y = jnp.asarray(y)
        return dist.Normal(self.loc[y], self.scale[y]).to_event(1)

    def cluster(self, z: ArrayLike) -> dist.Distribution:
        """p(y | z) for z of shape (..., latent_dim)."""
        log_lik = dist.Normal(self.loc, self.scale).to_event(1).log_prob(jnp.asarray(z)[..., None, :])
        return dist.Categorical(logits=jax.nn.log_softmax(self.log_weights + log_lik))


class Model:
    """p(y) p(z | y) p(x | z)."""

    def __init__(self, spec: GaussianMixtureVAE, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Likelihood = spec.likelihood.form("numpyro")
        self.Decoder = spec.network.form("numpyro", "Decoder")

    def clusters(self) -> Mixture:
        """p(y) and p(z | y), which an exact guide is made of too."""
        return network(self.prefix + "clusters", partial(Clusters, self.spec))()

    def decode(self, z: ArrayLike) -> dist.Distribution:
        """p(x | z) for z of shape (..., latent_dim); its mean is the reconstruction."""
        spec = self.spec
        likelihood = network(self.prefix + "likelihood", partial(self.Likelihood, spec.likelihood))
        decoder = network(self.prefix + "decoder", partial(self.Decoder, spec.network, *spec.decoder_sizes))
        return likelihood(decoder(z))

    def __call__(self, x: ArrayLike | None = None, size: int | None = None) -> Array:
        """Sample y, z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        clusters = self.clusters()
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            y = numpyro.sample("y", clusters.weights())
            z = numpyro.sample("z", clusters.latent(y))
            return numpyro.sample("x", self.decode(z), obs=x)


class Guide:
    """q(z | x) p(y | z), or q(y | x) q(z | x, y)."""

    def __init__(self, spec: GaussianMixtureVAE, model: Model, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.clusters = model.clusters
        self.Posterior = spec.guide.form("numpyro")
        self.Encoder = spec.network.form("numpyro", "Encoder")

    def classify(self, x: ArrayLike) -> dist.Distribution:
        """q(y | x) of the guide that draws y first."""
        spec = self.spec
        build = partial(self.Encoder, spec.network, spec.data_dim, spec.num_clusters)
        return dist.Categorical(logits=jax.nn.log_softmax(network(self.prefix + "classifier", build)(x)))

    def encode(self, x: ArrayLike, y: ArrayLike | None = None) -> dist.Distribution:
        """q(z | x), or q(z | x, y)."""
        spec = self.spec
        posterior = network(self.prefix + "posterior", partial(self.Posterior, spec.guide, spec.latent_dim))
        encoder = network(self.prefix + "encoder", partial(self.Encoder, spec.network, *spec.encoder_sizes))
        x = jnp.asarray(x)
        parts = (x,) if y is None else (x, one_hot(y, spec.num_clusters))
        return posterior(encoder(*parts))

    def __call__(self, x: ArrayLike, size: int | None = None) -> Array:
        """Sample z and y given x. Returns z of shape (B, latent_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            if self.spec.exact_cluster:
                z = numpyro.sample("z", self.encode(x))
                numpyro.sample("y", self.clusters().cluster(z))
                return z
            y = numpyro.sample("y", self.classify(x))
            return numpyro.sample("z", self.encode(x, y))
