"""The vector-quantised variational autoencoder in NumPyro."""

from __future__ import annotations

from functools import partial

import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from elbozoo.zoo.networks.networks_numpyro import network
from elbozoo.zoo.quantizers.quantizers_numpyro import AutoregressiveCodes, UniformCodes
from elbozoo.zoo.spec import plate_sizes
from elbozoo.zoo.vqvae import VQVAE
from elbozoo.zoo.vqvae.code_prior_numpyro import CodePrior


class Model:
    """p(z) p(x | z)."""

    def __init__(self, spec: VQVAE, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Likelihood = spec.likelihood.form("numpyro")
        self.Decoder = spec.network.form("numpyro", "Decoder")
        self.codebook = spec.quantizer.form("numpyro")(spec.quantizer, self.prefix + "codebook")

    def prior_distribution(self) -> dist.Distribution:
        """p(z), with batch shape () and event shape (P depth, code_dim)."""
        codes = self.codebook.read()
        if self.spec.prior == "uniform":
            return UniformCodes(codes, self.spec.num_latents).to_event(1)
        logits = network(self.prefix + "prior", partial(CodePrior, self.spec.prior_sizes))
        return AutoregressiveCodes(codes, self.spec.num_latents, logits)

    def decode(self, z: Array) -> dist.Distribution:
        """p(x | z) for z of shape (..., P depth, code_dim); its mean is the reconstruction."""
        spec = self.spec
        num_outputs = spec.likelihood.num_outputs * spec.data_dim
        likelihood = network(self.prefix + "likelihood", partial(self.Likelihood, spec.likelihood))
        decoder = network(self.prefix + "decoder", partial(self.Decoder, spec.network, spec.latent_dim, num_outputs))
        summed = z.reshape(*z.shape[:-2], spec.num_latents, spec.quantizer.depth, z.shape[-1]).sum(-2)
        return likelihood(decoder(summed.reshape(*z.shape[:-2], -1)))

    def __call__(self, x: ArrayLike | None = None, size: int | None = None) -> Array:
        """Sample z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            z = numpyro.sample("z", self.prior_distribution())
            drawn = numpyro.sample("x", self.decode(z), obs=x)
        if x is not None:
            self.codebook.commit()
        return drawn


class Guide:
    """q(z | x)."""

    def __init__(self, spec: VQVAE, model: Model, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Encoder = spec.network.form("numpyro", "Encoder")
        self.codebook = model.codebook

    def encode(self, x: ArrayLike) -> dist.Distribution:
        """q(z | x) for x of shape (..., data_dim)."""
        spec = self.spec
        encoder = network(self.prefix + "encoder", partial(self.Encoder, spec.network, spec.data_dim, spec.latent_dim))
        outputs = encoder(x)
        return self.codebook.encode(outputs.reshape(*outputs.shape[:-1], spec.num_latents, spec.quantizer.code_dim))

    def __call__(self, x: ArrayLike, size: int | None = None) -> Array:
        """Sample z given x. Returns z of shape (B, P depth, code_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            return numpyro.sample("z", self.encode(x))
