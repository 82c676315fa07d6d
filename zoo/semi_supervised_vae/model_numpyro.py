"""The semi-supervised variational autoencoder in NumPyro."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from elbozoo.zoo.networks.networks_numpyro import network
from elbozoo.zoo.semi_supervised_vae import POINT_MASS, SemiSupervisedVAE
from elbozoo.zoo.spec import plate_sizes


class Model:
    """p(y) p(z) p(x | y, z)."""

    def __init__(self, spec: SemiSupervisedVAE, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Likelihood = spec.likelihood.form("numpyro")
        self.Decoder = spec.network.form("numpyro", "Decoder")

    def decode(self, y: ArrayLike, z: ArrayLike) -> dist.Distribution:
        """p(x | y, z) for classes y of shape (...) and z of shape (..., latent_dim)."""
        spec = self.spec
        likelihood = network(self.prefix + "likelihood", partial(self.Likelihood, spec.likelihood))
        decoder = network(self.prefix + "decoder", partial(self.Decoder, spec.network, *spec.decoder_sizes))
        return likelihood(decoder(one_hot(y, spec.num_classes), jnp.asarray(z)))

    def __call__(self, x: ArrayLike | None = None, y: ArrayLike | None = None, size: int | None = None) -> Array:
        """Sample y, z and x, or score x; the labels are the guide's to read. Returns x of shape (B, data_dim)."""
        spec = self.spec
        num_data, batch = plate_sizes(x, size, spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            label = numpyro.sample("y", dist.Categorical(logits=jnp.zeros(spec.num_classes)))
            z = numpyro.sample("z", dist.Normal(jnp.zeros(spec.latent_dim), 1.0).to_event(1))
            return numpyro.sample("x", self.decode(label, z), obs=x)


class Guide:
    """q(y | x) q(z | x, y)."""

    def __init__(self, spec: SemiSupervisedVAE, model: Model, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Posterior = spec.guide.form("numpyro")
        self.Encoder = spec.network.form("numpyro", "Encoder")

    def classify(self, x: ArrayLike) -> dist.Distribution:
        """q(y | x) for x of shape (..., data_dim), whatever the labels."""
        spec = self.spec
        build = partial(self.Encoder, spec.network, spec.data_dim, spec.num_classes)
        return dist.Categorical(logits=jax.nn.log_softmax(network(self.prefix + "classifier", build)(x)))

    def encode(self, x: ArrayLike, y: ArrayLike) -> dist.Distribution:
        """q(z | x, y) for x of shape (..., data_dim) and classes y of shape (...)."""
        spec = self.spec
        posterior = network(self.prefix + "posterior", partial(self.Posterior, spec.guide, spec.latent_dim))
        encoder = network(self.prefix + "encoder", partial(self.Encoder, spec.network, *spec.encoder_sizes))
        return posterior(encoder(jnp.asarray(x), one_hot(y, spec.num_classes)))

    def __call__(self, x: ArrayLike, y: ArrayLike | None = None, size: int | None = None) -> Array:
        """Sample y and z given x and the labels that are known. Returns z of shape (B, latent_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        q = self.classify(x)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            if y is not None:
                numpyro.deterministic("log_classifier", log_probability(q.logits, y))
                q = dist.Categorical(logits=with_labels(q.logits, y))
            label = numpyro.sample("y", q)
            return numpyro.sample("z", self.encode(x, label))


def one_hot(y: ArrayLike, num_classes: int) -> Array:
    """All zeros for a label that is not known."""
    return (jnp.asarray(y)[..., None] == jnp.arange(num_classes)).astype(jnp.result_type(float))


def log_probability(logits: Array, y: ArrayLike) -> Array:
    """``log q(y | x)`` of the labels that are known, 0 of the others."""
    return (one_hot(y, logits.shape[-1]) * logits).sum(-1)


def with_labels(logits: Array, y: ArrayLike) -> Array:
    """The logits, and the point mass where the label is known."""
    point_mass = POINT_MASS * (one_hot(y, logits.shape[-1]) - 1.0)
    return jnp.where(jnp.asarray(y)[..., None] >= 0, point_mass, logits)
