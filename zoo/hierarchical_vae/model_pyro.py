"""The hierarchical variational autoencoder in Pyro."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from elbozoo.zoo.hierarchical_vae import HierarchicalVAE, Hierarchy
from elbozoo.zoo.spec import plate_sizes


class Model(PyroModule):
    """p(z_L) p(z_{L-1} | z_L) ... p(x | z_1)."""

    def __init__(self, spec: Hierarchy, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.likelihood = spec.likelihood.form("pyro")(spec.likelihood)
        self.prior = spec.prior.form("pyro")(spec.prior, *spec.prior_sizes)
        layers = zip(spec.networks, spec.decoder_sizes, strict=True)
        self.decoders = nn.ModuleList([network.form("pyro", "Decoder")(network, *sizes) for network, sizes in layers])

    def prior_distribution(self) -> dist.TorchDistribution:
        """p(z_L), with batch shape () and event shape (latent_dims[-1],)."""
        return self.prior()

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z_1) for z_1 of shape (..., latent_dims[0]); its mean is the reconstruction."""
        return self.likelihood(self.decoders[0](z))

    def conditional(self, layer: int, above: Tensor) -> tuple[Tensor, Tensor]:
        """Location and log scale of p(z_layer | z_{layer+1} = above), for 1 <= layer < L."""
        loc, log_scale = self.decoders[layer](above).chunk(2, -1)
        return loc, log_scale

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample every z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        top = len(self.spec.latent_dims)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            z = pyro.sample(f"z{top}", self.prior_distribution())
            for layer in range(top - 1, 0, -1):
                loc, log_scale = self.conditional(layer, z)
                z = pyro.sample(f"z{layer}", dist.Normal(loc, log_scale.exp()).to_event(1))
            return pyro.sample("x", self.decode(z), obs=x)


class Guide(PyroModule):
    """q(z_1 | x) q(z_2 | z_1) ... q(z_L | z_{L-1})."""

    def __init__(self, spec: HierarchicalVAE, model: Model, name: str = ""):
        super().__init__(name)
        self.spec = spec
        layers = zip(spec.networks, spec.encoder_sizes, strict=True)
        self.encoders = nn.ModuleList([network.form("pyro", "Encoder")(network, *sizes) for network, sizes in layers])
        posterior = spec.guide.form("pyro")
        self.posteriors = nn.ModuleList([posterior(spec.guide, dim) for dim in spec.latent_dims])

    def encode(self, layer: int, below: Tensor) -> dist.TorchDistribution:
        """q(z_layer | below), for 1 <= layer <= L; below z_1 is the data."""
        return self.posteriors[layer - 1](self.encoders[layer - 1](below))

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Sample every z given x. Returns z_L of shape (B, latent_dims[-1])."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        z = x
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            for layer in range(1, len(self.spec.latent_dims) + 1):
                z = pyro.sample(f"z{layer}", self.encode(layer, z))
        return z
