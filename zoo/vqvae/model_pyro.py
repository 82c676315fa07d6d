"""The vector-quantised variational autoencoder in Pyro."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from elbozoo.zoo.quantizers.quantizers_pyro import AutoregressiveCodes, UniformCodes
from elbozoo.zoo.spec import plate_sizes
from elbozoo.zoo.vqvae import VQVAE
from elbozoo.zoo.vqvae.code_prior_pyro import CodePrior


class Model(PyroModule):
    """p(z) p(x | z)."""

    def __init__(self, spec: VQVAE, name: str = ""):
        super().__init__(name)
        self.spec = spec
        num_outputs = spec.likelihood.num_outputs * spec.data_dim
        self.likelihood = spec.likelihood.form("pyro")(spec.likelihood)
        self.decoder = spec.network.form("pyro", "Decoder")(spec.network, spec.latent_dim, num_outputs)
        self.codebook = spec.quantizer.form("pyro")(spec.quantizer)
        if spec.prior == "autoregressive":
            self.prior = CodePrior(spec.prior_sizes)

    def prior_distribution(self) -> dist.TorchDistribution:
        """p(z), with batch shape () and event shape (P depth, code_dim)."""
        codes = self.codebook.read()
        if self.spec.prior == "uniform":
            return UniformCodes(codes, self.spec.num_latents).to_event(1)
        return AutoregressiveCodes(codes, self.spec.num_latents, self.prior)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z of shape (..., P depth, code_dim); its mean is the reconstruction."""
        quantizer = self.spec.quantizer
        summed = z.unflatten(-2, (self.spec.num_latents, quantizer.depth)).sum(-2)
        return self.likelihood(self.decoder(summed.flatten(-2)))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            z = pyro.sample("z", self.prior_distribution())
            drawn = pyro.sample("x", self.decode(z), obs=x)
        if x is not None:
            self.codebook.commit()
        return drawn


class Guide(PyroModule):
    """q(z | x)."""

    def __init__(self, spec: VQVAE, model: Model, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.encoder = spec.network.form("pyro", "Encoder")(spec.network, spec.data_dim, spec.latent_dim)
        self.codebook = model.codebook

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) for x of shape (..., data_dim)."""
        outputs = self.encoder(x).unflatten(-1, (self.spec.num_latents, self.spec.quantizer.code_dim))
        return self.codebook.encode(outputs)

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Sample z given x. Returns z of shape (B, P depth, code_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            return pyro.sample("z", self.encode(x))
