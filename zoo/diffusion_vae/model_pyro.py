"""Diffusion in Pyro, in discrete and in continuous time."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, pyro_method
from torch import Tensor

from elbozoo.zoo.diffusion import is_narrow, noise_said, outputs_of
from elbozoo.zoo.diffusion.process_pyro import draw_chain, draw_step, undo_chain, undo_step
from elbozoo.zoo.schedules.schedules_pyro import schedule
from elbozoo.zoo.spec import plate_sizes


class Model(PyroModule):
    """p(z) p(x | z)."""

    origin: Tensor

    def __init__(self, spec: Any, name: str = ""):
        super().__init__(name)
        self.spec = spec
        self.schedule = schedule(spec.schedule)
        self.denoiser = spec.denoiser.form("pyro")(spec.denoiser, spec.data_dim, outputs_of(spec.predicts))
        self.likelihood = spec.likelihood.form("pyro")(spec.likelihood, is_narrow(spec.likelihood, spec.schedule))
        self.register_buffer("origin", torch.zeros(spec.data_dim), persistent=False)  # goes where the model goes

    @pyro_method
    def noise(self, z: Tensor, log_snr: Tensor) -> Tensor:
        """The noise that the denoiser says there is in z."""
        return noise_said(self.denoiser(z, log_snr), z, log_snr, self.spec.predicts, self.spec.likelihood)

    def decode(self, z: Tensor) -> dist.TorchDistribution:
        """p(x | z_0) for z_0 of shape (..., data_dim)."""
        return self.likelihood(z, self.schedule(z.new_zeros(()))[0])

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Sample the latents and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        spec = self.spec
        num_data, batch = plate_sizes(x, size, spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            if spec.process == "chain":
                z = undo_chain(self.noise, self.schedule, spec.num_steps, self.origin)
            else:
                z = undo_step(self.noise, self.schedule, spec.steps, self.origin)
            return pyro.sample("x", self.decode(z), obs=x)


class Guide(PyroModule):
    """q(z | x), which has no parameters of its own."""

    def __init__(self, spec: Any, model: Model, name: str = ""):
        super().__init__(name)
        self.spec, self.schedule, self.noise = spec, model.schedule, model.noise

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Sample the latents given x. Returns z_0 of shape (B, data_dim)."""
        spec = self.spec
        num_data, batch = plate_sizes(x, size, spec.data_dim)
        with pyro.plate("data", num_data, subsample=torch.arange(batch), dim=-1):
            signal = spec.likelihood.signal(x)
            if spec.process == "chain":
                return draw_chain(signal, self.schedule, spec.num_steps)
            return draw_step(signal, self.schedule, spec.steps, self.noise if spec.watched else None)
