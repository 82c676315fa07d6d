"""The categorical variational autoencoder in Pyro."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from elbozoo.inference.pyro_distributions import OneHotCategorical
from elbozoo.zoo.categorical_vae import CategoricalVAE
from elbozoo.zoo.categorical_vae.posterior_pyro import AutoregressivePosterior
from elbozoo.zoo.spec import plate_sizes


class Model(PyroModule):
    """p(z) p(x | z)."""

    prior_logits: Tensor

    def __init__(self, spec: CategoricalVAE, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.likelihood = spec.likelihood.form("pyro")(spec.likelihood)
        num_outputs = spec.likelihood.num_outputs * spec.data_dim
        self.decoder = spec.network.form("pyro", "Decoder")(spec.network, spec.num_codes, num_outputs)
        logits = torch.zeros(spec.num_latents, spec.num_categories)
        self.register_buffer("prior_logits", logits, persistent=False)  # goes where the model goes

    def prior_distribution(self) -> dist.TorchDistribution:
        """p(z), with batch shape () and event shape (num_latents, num_categories)."""
        return OneHotCategorical(logits=self.prior_logits).to_event(1)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z of shape (..., num_latents, num_categories); its mean is the reconstruction."""
        return self.likelihood(self.decoder(1.0 * z.flatten(-2)))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            z = pyro.sample("z", self.prior_distribution())
            return pyro.sample("x", self.decode(z), obs=x)


class Guide(PyroModule):
    """q(z | x)."""

    def __init__(self, spec: CategoricalVAE, model: Model, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.encoder = spec.network.form("pyro", "Encoder")(spec.network, spec.data_dim, spec.num_codes)
        if spec.autoregressive_guide:
            self.posterior = AutoregressivePosterior(spec)

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) for x of shape (..., data_dim)."""
        logits = self.encoder(x).unflatten(-1, (self.spec.num_latents, self.spec.num_categories))
        if self.spec.autoregressive_guide:
            return self.posterior(logits)
        return OneHotCategorical(logits=logits).to_event(1)

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Sample z given x. Returns z of shape (B, num_latents, num_categories)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            return pyro.sample("z", self.encode(x))
