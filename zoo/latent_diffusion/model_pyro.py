"""A VAE with a diffusion for a prior, in Pyro."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor

from elbozoo.zoo.diffusion import ExactNormal, noise_said, outputs_of
from elbozoo.zoo.diffusion.process_pyro import draw_step, undo_step
from elbozoo.zoo.latent_diffusion import LatentDiffusion
from elbozoo.zoo.schedules.schedules_pyro import schedule
from elbozoo.zoo.spec import plate_sizes
from elbozoo.zoo.vae.model_pyro import recognition


class Model(PyroModule):
    """p(z) p(x | z)."""

    origin: Tensor

    def __init__(self, spec: LatentDiffusion, name: str = ""):
        super().__init__(name)
        self.spec = spec
        num_outputs = spec.likelihood.num_outputs * spec.data_dim
        self.likelihood = spec.likelihood.form("pyro")(spec.likelihood)
        self.decoder = spec.network.form("pyro", "Decoder")(spec.network, spec.latent_dim, num_outputs)
        self.schedule = schedule(spec.schedule)
        self.denoiser = spec.denoiser.form("pyro")(spec.denoiser, spec.latent_dim, outputs_of(spec.predicts))
        self.end = ExactNormal().form("pyro")(ExactNormal())
        self.register_buffer("origin", torch.zeros(spec.latent_dim), persistent=False)  # goes where the model goes

    @pyro_method
    def noise(self, z: Tensor, log_snr: Tensor) -> Tensor:
        """The noise that the denoiser says there is in z."""
        return noise_said(self.denoiser(z, log_snr), z, log_snr, self.spec.predicts, ExactNormal())

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z) for z of shape (..., latent_dim); its mean is the reconstruction."""
        return self.likelihood(self.decoder(z))

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample the latents and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            z = undo_step(self.noise, self.schedule, self.spec.steps, self.origin)
            z = pyro.sample("z", self.end(z, self.schedule(0.0 * z[..., 0])[0]))
            return pyro.sample("x", self.decode(z), obs=x)


class Guide(PyroModule):
    """q(z | x), and the noising of z, which has no parameters of its own."""

    def __init__(self, spec: LatentDiffusion, model: Model, name: str = ""):
        super().__init__(name)
        self.spec, self.schedule, self.noise = spec, model.schedule, model.noise
        self.posterior, self.encoder = recognition(spec.vae())

    def encode(self, x: Tensor) -> dist.TorchDistribution:
        """q(z | x) for x of shape (..., data_dim)."""
        return self.posterior(self.encoder(x))

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Sample the latents given x. Returns z of shape (B, latent_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            z = pyro.sample("z", self.encode(x))
            draw_step(z, self.schedule, self.spec.steps, self.noise if self.spec.watched else None)
            return z
