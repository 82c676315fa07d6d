"""The two-level vector-quantised variational autoencoder in Pyro."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from elbozoo.zoo.hierarchical_vqvae import HierarchicalVQVAE
from elbozoo.zoo.networks.networks_pyro import ACTIVATIONS, linear
from elbozoo.zoo.quantizers.quantizers_pyro import AutoregressiveCodes, UniformCodes, indices
from elbozoo.zoo.spec import plate_sizes
from elbozoo.zoo.vqvae.code_prior_pyro import CodePrior


class Model(PyroModule):
    """p(z_2) p(z_1 | z_2) p(x | z_1, z_2)."""

    codebooks: Any

    def __init__(self, spec: HierarchicalVQVAE, name: str = ""):
        super().__init__(name)
        self.spec = spec
        (bottom, top), features = spec.networks, spec.num_features
        num_outputs = spec.likelihood.num_outputs * spec.data_dim
        self.likelihood = spec.likelihood.form("pyro")(spec.likelihood)
        self.decoders = nn.ModuleList(
            [
                bottom.form("pyro", "Decoder")(bottom, spec.latent_dims[0] + features, num_outputs),
                top.form("pyro", "Decoder")(top, spec.latent_dims[1], features),
            ]
        )
        self.codebooks = nn.ModuleList([spec.quantizer.form("pyro")(spec.quantizer) for _ in range(2)])
        if spec.prior == "autoregressive":
            self.priors = nn.ModuleList([CodePrior(sizes) for sizes in spec.prior_sizes])

    def prior_distribution(self) -> dist.TorchDistribution:
        """p(z_2), with batch shape () and event shape (P_2 depth, code_dim)."""
        codes, places = self.codebooks[1].read(), self.spec.num_latents[1]
        if self.spec.prior == "uniform":
            return UniformCodes(codes, places).to_event(1)
        return AutoregressiveCodes(codes, places, self.priors[1])

    def conditional(self, above: Tensor) -> dist.TorchDistribution:
        """p(z_1 | z_2 = above), with event shape (P_1 depth, code_dim)."""
        codes, places = self.codebooks[0].read(), self.spec.num_latents[0]
        if self.spec.prior == "uniform":
            return UniformCodes(codes, places).to_event(1)
        context = indices(self.codebooks[1].read(), above)
        return AutoregressiveCodes(codes, places, self.priors[0], context)

    def decode(self, z1: Tensor, z2: Tensor) -> dist.TorchDistribution:
        """p(x | z_1, z_2) for z_l of shape (..., P_l depth, code_dim); its mean is the reconstruction."""
        spec = self.spec
        above = by_place(spec, self.decoders[1](summed(spec, z2).flatten(-2)))
        joined = torch.cat([summed(spec, z1), above], -1)
        return self.likelihood(self.decoders[0](joined.flatten(-2)))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample both z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            z2 = pyro.sample("z2", self.prior_distribution())
            z1 = pyro.sample("z1", self.conditional(z2))
            drawn = pyro.sample("x", self.decode(z1, z2), obs=x)
        if x is not None:
            for codebook in self.codebooks:
                codebook.commit()
        return drawn


class Guide(PyroModule):
    """q(z_2 | x) q(z_1 | x, z_2)."""

    codebooks: Any

    def __init__(self, spec: HierarchicalVQVAE, model: Model, name: str = ""):
        super().__init__(name)
        self.spec = spec
        (bottom, top), features = spec.networks, spec.num_features
        self.encoders = nn.ModuleList(
            [
                bottom.form("pyro", "Encoder")(bottom, spec.data_dim, features),
                top.form("pyro", "Encoder")(top, features, spec.latent_dims[1]),
            ]
        )
        self.conditioner = top.form("pyro", "Decoder")(top, spec.latent_dims[1], features)
        self.merge = linear(2 * spec.width, spec.quantizer.code_dim)
        self.codebooks = model.codebooks

    def features(self, x: Tensor) -> Tensor:
        """What both levels read of x, (..., P_1, width)."""
        outputs = self.encoders[0](x).unflatten(-1, (self.spec.num_latents[0], self.spec.width))
        return ACTIVATIONS[self.spec.activation](outputs)

    def encode_top(self, features: Tensor) -> dist.TorchDistribution:
        """q(z_2 | x) of its features."""
        outputs = self.encoders[1](features.movedim(-1, -2).flatten(-2))  # as an image, channels first
        return self.codebooks[1].encode(outputs.unflatten(-1, (self.spec.num_latents[1], self.spec.quantizer.code_dim)))

    def encode(self, features: Tensor, above: Tensor) -> dist.TorchDistribution:
        """q(z_1 | x, z_2 = above) of the features of x."""
        said = by_place(self.spec, self.conditioner(summed(self.spec, above).flatten(-2)))
        joined = torch.cat([features.expand(*said.shape[:-2], -1, -1), said], -1)
        return self.codebooks[0].encode(self.merge(joined))

    def forward(self, x: Tensor, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Sample both z given x. Returns z_l of shape (B, P_l depth, code_dim), next to the data first."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        features = self.features(x)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            z2 = pyro.sample("z2", self.encode_top(features))
            z1 = pyro.sample("z1", self.encode(features, z2))
        return z1, z2


def summed(spec: HierarchicalVQVAE, z: Tensor) -> Tensor:
    """What the codes (..., P depth, code_dim) of each place stand for, (..., P, code_dim)."""
    return z.unflatten(-2, (-1, spec.quantizer.depth)).sum(-2)


def by_place(spec: HierarchicalVQVAE, image: Tensor) -> Tensor:
    """A flat image of features, channels first, as (..., P_1, width)."""
    return image.unflatten(-1, (spec.width, spec.num_latents[0])).movedim(-1, -2)
