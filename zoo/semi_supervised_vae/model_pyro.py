"""The semi-supervised variational autoencoder in Pyro."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor

from elbozoo.zoo.semi_supervised_vae import POINT_MASS, SemiSupervisedVAE
from elbozoo.zoo.spec import plate_sizes


class Model(PyroModule):
    """p(y) p(z) p(x | y, z)."""

    zeros: Tensor

    def __init__(self, spec: SemiSupervisedVAE, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.likelihood = spec.likelihood.form("pyro")(spec.likelihood)
        self.decoder = spec.network.form("pyro", "Decoder")(spec.network, *spec.decoder_sizes)
        zeros = torch.zeros(max(spec.num_classes, spec.latent_dim))
        self.register_buffer("zeros", zeros, persistent=False)  # goes where the model goes

    def decode(self, y: Tensor, z: Tensor) -> dist.TorchDistribution:
        """p(x | y, z) for classes y of shape (...) and z of shape (..., latent_dim)."""
        return self.likelihood(self.decoder(one_hot(y, self.spec.num_classes, z.dtype), z))

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample y, z and x, or score x; the labels are the guide's to read. Returns x of shape (B, data_dim)."""
        spec = self.spec
        num_data, batch = plate_sizes(x, size, spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            label = pyro.sample("y", dist.Categorical(logits=self.zeros[: spec.num_classes]))
            z = pyro.sample("z", dist.Normal(self.zeros[: spec.latent_dim], 1.0).to_event(1))
            return pyro.sample("x", self.decode(label, z), obs=x)


class Guide(PyroModule):
    """q(y | x) q(z | x, y)."""

    def __init__(self, spec: SemiSupervisedVAE, model: Model, name: str = ""):
        super().__init__(name)
        self.spec = spec
        encoder = spec.network.form("pyro", "Encoder")
        self.posterior = spec.guide.form("pyro")(spec.guide, spec.latent_dim)
        self.classifier = encoder(spec.network, spec.data_dim, spec.num_classes)
        self.encoder = encoder(spec.network, *spec.encoder_sizes)

    def classify(self, x: Tensor) -> dist.Categorical:
        """q(y | x) for x of shape (..., data_dim), whatever the labels."""
        return dist.Categorical(logits=self.classifier(x))

    def encode(self, x: Tensor, y: Tensor) -> dist.TorchDistribution:
        """q(z | x, y) for x of shape (..., data_dim) and classes y of shape (...)."""
        return self.posterior(self.encoder(x, one_hot(y, self.spec.num_classes, x.dtype)))

    def forward(self, x: Tensor, y: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample y and z given x and the labels that are known. Returns z of shape (B, latent_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        q = self.classify(x)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            if y is not None:
                with poutine.infer_config(config_fn=lambda _: {"is_auxiliary": True}):  # the guide's alone
                    pyro.deterministic("log_classifier", log_probability(q.logits, y), event_dim=0)
                q = dist.Categorical(logits=with_labels(q.logits, y))
            label = pyro.sample("y", q)
            return pyro.sample("z", self.encode(x, label))


def one_hot(y: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """All zeros for a label that is not known."""
    return (y[..., None] == torch.arange(num_classes, device=y.device)).to(dtype)


def log_probability(logits: Tensor, y: Tensor) -> Tensor:
    """``log q(y | x)`` of the labels that are known, 0 of the others."""
    return (one_hot(y, logits.shape[-1], logits.dtype) * logits).sum(-1)


def with_labels(logits: Tensor, y: Tensor) -> Tensor:
    """The logits, and the point mass where the label is known."""
    point_mass = POINT_MASS * (one_hot(y, logits.shape[-1], logits.dtype) - 1.0)
    return torch.where(y[..., None] >= 0, point_mass, logits)
