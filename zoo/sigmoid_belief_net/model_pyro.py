"""The sigmoid belief network in Pyro."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from elbozoo.zoo.sigmoid_belief_net import SigmoidBeliefNet
from elbozoo.zoo.spec import plate_sizes


class Coins(nn.Module):
    """Independent binary units with learned odds."""

    def __init__(self, num_units: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_units))

    def forward(self) -> dist.Independent:
        return dist.Bernoulli(logits=self.logits).to_event(1)


class Model(PyroModule):
    """p(z_L) p(z_{L-1} | z_L) ... p(x | z_1)."""

    def __init__(self, spec: SigmoidBeliefNet, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.likelihood = spec.likelihood.form("pyro")(spec.likelihood)
        self.prior = Coins(spec.latent_dims[-1])
        decoder = spec.network.form("pyro", "Decoder")
        self.decoders = nn.ModuleList([decoder(spec.network, *sizes) for sizes in spec.decoder_sizes])

    def prior_distribution(self) -> dist.TorchDistribution:
        """p(z_L), with batch shape () and event shape (latent_dims[-1],)."""
        return self.prior()

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z_1) for z_1 of shape (..., latent_dims[0]); its mean is the reconstruction."""
        return self.likelihood(self.decoders[0](centred(z)))

    def conditional(self, layer: int, above: Tensor) -> dist.TorchDistribution:
        """p(z_layer | z_{layer+1} = above), for 1 <= layer < L."""
        return dist.Bernoulli(logits=self.decoders[layer](centred(above))).to_event(1)

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample every z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        top = len(self.spec.latent_dims)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            z = pyro.sample(f"z{top}", self.prior_distribution())
            for layer in range(top - 1, 0, -1):
                z = pyro.sample(f"z{layer}", self.conditional(layer, z))
            return pyro.sample("x", self.decode(z), obs=x)


class Guide(PyroModule):
    """q(z_1 | x) q(z_2 | z_1) ... q(z_L | z_{L-1})."""

    def __init__(self, spec: SigmoidBeliefNet, model: Model, name: str = ""):
        super().__init__(name)
        self.spec = spec
        encoder = spec.network.form("pyro", "Encoder")
        self.encoders = nn.ModuleList([encoder(spec.network, *sizes) for sizes in spec.encoder_sizes])
        self.posteriors = nn.ModuleList([family.form("pyro")(family) for family in spec.posteriors])

    def encode(self, layer: int, below: Tensor) -> dist.TorchDistribution:
        """q(z_layer | below), for 1 <= layer <= L; below z_1 is the data."""
        return self.posteriors[layer - 1](self.encoders[layer - 1](centred(below)))

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Sample every z given x. Returns z_L of shape (B, latent_dims[-1])."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        z = x
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            for layer in range(1, len(self.spec.latent_dims) + 1):
                z = pyro.sample(f"z{layer}", self.encode(layer, z))
        return z


def centred(z: Tensor) -> Tensor:
    """0 and 1 as -1 and 1, floats whatever the type of z; what lies between goes between."""
    return 2.0 * z - 1.0
