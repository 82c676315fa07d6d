"""The Gaussian mixture variational autoencoder in Pyro."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from elbozoo.zoo.gaussian_mixture_vae import GaussianMixtureVAE
from elbozoo.zoo.semi_supervised_vae.model_pyro import one_hot
from elbozoo.zoo.spec import plate_sizes


class Clusters(nn.Module):
    """The parameters of p(y) and p(z | y)."""

    def __init__(self, spec: GaussianMixtureVAE):
        super().__init__()
        shape = (spec.num_clusters, spec.latent_dim)
        self.spec = spec
        if spec.learn_weights:
            self.logits = nn.Parameter(torch.zeros(spec.num_clusters))
        self.loc = nn.Parameter(torch.randn(shape) / sqrt(spec.latent_dim))
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def forward(self) -> Mixture:
        logits = self.logits if self.spec.learn_weights else self.loc.new_zeros(len(self.loc))
        return Mixture(logits.log_softmax(-1), self.loc, self.log_scale.exp())


class Mixture(NamedTuple):
    """The clusters: log weights (C,), locations and scales (C, D)."""

    log_weights: Tensor
    loc: Tensor
    scale: Tensor

    def weights(self) -> dist.Categorical:
        """p(y)."""
        return dist.Categorical(logits=self.log_weights)

    def latent(self, y: Tensor) -> dist.Independent:
        """p(z | y) for clusters y of shape (...)."""
        return dist.Normal(self.loc[y], self.scale[y]).to_event(1)

    def cluster(self, z: Tensor) -> dist.Categorical:
        """p(y | z) for z of shape (..., latent_dim)."""
        log_lik = dist.Normal(self.loc, self.scale).to_event(1).log_prob(z[..., None, :])
        return dist.Categorical(logits=self.log_weights + log_lik)


class Model(PyroModule):
    """p(y) p(z | y) p(x | z)."""

    def __init__(self, spec: GaussianMixtureVAE, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.clusters = Clusters(spec)
        self.likelihood = spec.likelihood.form("pyro")(spec.likelihood)
        self.decoder = spec.network.form("pyro", "Decoder")(spec.network, *spec.decoder_sizes)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z of shape (..., latent_dim); its mean is the reconstruction."""
        return self.likelihood(self.decoder(z))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample y, z and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        clusters = self.clusters()
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            y = pyro.sample("y", clusters.weights())
            z = pyro.sample("z", clusters.latent(y))
            return pyro.sample("x", self.decode(z), obs=x)


class Guide(PyroModule):
    """q(z | x) p(y | z), or q(y | x) q(z | x, y)."""

    def __init__(self, spec: GaussianMixtureVAE, model: Model, name: str = ""):
        super().__init__(name)
        self.spec = spec
        encoder = spec.network.form("pyro", "Encoder")
        self.posterior = spec.guide.form("pyro")(spec.guide, spec.latent_dim)
        self.encoder = encoder(spec.network, *spec.encoder_sizes)
        if spec.exact_cluster:
            self.clusters = model.clusters  # the model's own, under the same name
        else:
            self.classifier = encoder(spec.network, spec.data_dim, spec.num_clusters)

    def classify(self, x: Tensor) -> dist.Categorical:
        """q(y | x) of the guide that draws y first."""
        return dist.Categorical(logits=self.classifier(x))

    def encode(self, x: Tensor, y: Tensor | None = None) -> dist.TorchDistribution:
        """q(z | x), or q(z | x, y)."""
        parts = (x,) if y is None else (x, one_hot(y, self.spec.num_clusters, x.dtype))
        return self.posterior(self.encoder(*parts))

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Sample z and y given x. Returns z of shape (B, latent_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            if self.spec.exact_cluster:
                z = pyro.sample("z", self.encode(x))
                pyro.sample("y", self.clusters().cluster(z))
                return z
            y = pyro.sample("y", self.classify(x))
            return pyro.sample("z", self.encode(x, y))
