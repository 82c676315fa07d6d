"""The two-level vector-quantised variational autoencoder in NumPyro."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from elbozoo.zoo.hierarchical_vqvae import HierarchicalVQVAE
from elbozoo.zoo.networks.networks_numpyro import ACTIVATIONS, linear, network
from elbozoo.zoo.quantizers.quantizers_numpyro import AutoregressiveCodes, UniformCodes, indices
from elbozoo.zoo.spec import plate_sizes
from elbozoo.zoo.vqvae.code_prior_numpyro import CodePrior


class Model:
    """p(z_2) p(z_1 | z_2) p(x | z_1, z_2)."""

    def __init__(self, spec: HierarchicalVQVAE, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Likelihood = spec.likelihood.form("numpyro")
        self.Decoder = spec.networks[0].form("numpyro", "Decoder")
        quantizer = spec.quantizer.form("numpyro")
        self.codebooks = [quantizer(spec.quantizer, f"{self.prefix}codebooks.{i}") for i in range(2)]

    def _decoder(self, level: int, z: Array) -> Array:
        """What a map of vectors, (..., P, vector), is decoded to; level 0 is next to the data."""
        spec = self.spec
        data = spec.latent_dims[0] + spec.num_features, spec.likelihood.num_outputs * spec.data_dim
        sizes = (data, (spec.latent_dims[1], spec.num_features))[level]
        build = partial(self.Decoder, spec.networks[level], *sizes)
        return network(f"{self.prefix}decoders.{level}", build)(flat(z))

    def _prior(self, level: int) -> Callable[..., Array]:
        return network(f"{self.prefix}priors.{level}", partial(CodePrior, self.spec.prior_sizes[level]))

    def prior_distribution(self) -> dist.Distribution:
        """p(z_2), with batch shape () and event shape (P_2 depth, code_dim)."""
        codes, places = self.codebooks[1].read(), self.spec.num_latents[1]
        if self.spec.prior == "uniform":
            return UniformCodes(codes, places).to_event(1)
        return AutoregressiveCodes(codes, places, self._prior(1))

    def conditional(self, above: Array) -> dist.Distribution:
        """p(z_1 | z_2 = above), with event shape (P_1 depth, code_dim)."""
        codes, places = self.codebooks[0].read(), self.spec.num_latents[0]
        if self.spec.prior == "uniform":
            return UniformCodes(codes, places).to_event(1)
        context = indices(self.codebooks[1].read(), above)
        return AutoregressiveCodes(codes, places, self._prior(0), context)

    def decode(self, z1: Array, z2: Array) -> dist.Distribution:
        """p(x | z_1, z_2) for z_l of shape (..., P_l depth, code_dim); its mean is the reconstruction."""
        spec = self.spec
        above = by_place(spec, self._decoder(1, summed(spec, z2)))
        joined = jnp.concatenate([summed(spec, z1), above], -1)
        likelihood = network(self.prefix + "likelihood", partial(self.Likelihood, spec.likelihood))
        return likelihood(self._decoder(0, joined))

    def __call__(self, x: ArrayLike | None = None, size: int | None = None) -> Array:
        """Sample both z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            z2 = numpyro.sample("z2", self.prior_distribution())
            z1 = numpyro.sample("z1", self.conditional(z2))
            drawn = numpyro.sample("x", self.decode(z1, z2), obs=x)
        if x is not None:
            for codebook in self.codebooks:
                codebook.commit()
        return drawn


class Guide:
    """q(z_2 | x) q(z_1 | x, z_2)."""

    def __init__(self, spec: HierarchicalVQVAE, model: Model, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Encoder = spec.networks[0].form("numpyro", "Encoder")
        self.Decoder = spec.networks[0].form("numpyro", "Decoder")
        self.codebooks = model.codebooks

    def _encoder(self, level: int, x: ArrayLike) -> Array:
        spec = self.spec
        sizes = ((spec.data_dim, spec.num_features), (spec.num_features, spec.latent_dims[1]))[level]
        return network(f"{self.prefix}encoders.{level}", partial(self.Encoder, spec.networks[level], *sizes))(x)

    def features(self, x: ArrayLike) -> Array:
        """What both levels read of x, (..., P_1, width)."""
        outputs = self._encoder(0, x)
        outputs = outputs.reshape(*outputs.shape[:-1], self.spec.num_latents[0], self.spec.width)
        return ACTIVATIONS[self.spec.activation](outputs)

    def encode_top(self, features: Array) -> dist.Distribution:
        """q(z_2 | x) of its features."""
        outputs = self._encoder(1, flat(jnp.moveaxis(features, -1, -2)))  # as an image, channels first
        shape = self.spec.num_latents[1], self.spec.quantizer.code_dim
        return self.codebooks[1].encode(outputs.reshape(*outputs.shape[:-1], *shape))

    def encode(self, features: Array, above: Array) -> dist.Distribution:
        """q(z_1 | x, z_2 = above) of the features of x."""
        spec = self.spec
        build = partial(self.Decoder, spec.networks[1], spec.latent_dims[1], spec.num_features)
        said = by_place(spec, network(self.prefix + "conditioner", build)(flat(summed(spec, above))))
        joined = jnp.concatenate([jnp.broadcast_to(features, said.shape), said], -1)
        merge = network(self.prefix + "merge", partial(linear, 2 * spec.width, spec.quantizer.code_dim))
        return self.codebooks[0].encode(merge(joined))

    def __call__(self, x: ArrayLike, size: int | None = None) -> tuple[Array, Array]:
        """Sample both z given x. Returns z_l of shape (B, P_l depth, code_dim), next to the data first."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        features = self.features(x)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            z2 = numpyro.sample("z2", self.encode_top(features))
            z1 = numpyro.sample("z1", self.encode(features, z2))
        return z1, z2


def summed(spec: HierarchicalVQVAE, z: Array) -> Array:
    """What the codes (..., P depth, code_dim) of each place stand for, (..., P, code_dim)."""
    return z.reshape(*z.shape[:-2], -1, spec.quantizer.depth, z.shape[-1]).sum(-2)


def by_place(spec: HierarchicalVQVAE, image: Array) -> Array:
    """A flat image of features, channels first, as (..., P_1, width)."""
    return jnp.moveaxis(image.reshape(*image.shape[:-1], spec.width, spec.num_latents[0]), -1, -2)


def flat(z: Array) -> Array:
    """The last two dims as one."""
    return z.reshape(*z.shape[:-2], -1)
