"""Diffusion in NumPyro, in discrete and in continuous time."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from elbozoo.zoo.diffusion import is_narrow, noise_said, outputs_of
from elbozoo.zoo.diffusion.process_numpyro import Noise, Schedule, draw_chain, draw_step, undo_chain, undo_step
from elbozoo.zoo.networks.networks_numpyro import network
from elbozoo.zoo.schedules.schedules_numpyro import schedule
from elbozoo.zoo.spec import plate_sizes


class Model:
    """p(z) p(x | z)."""

    def __init__(self, spec: Any, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.Denoiser = spec.denoiser.form("numpyro")
        self.likelihood = spec.likelihood.form("numpyro")(spec.likelihood, is_narrow(spec.likelihood, spec.schedule))

    def schedule(self) -> Schedule:
        """Times to ``(log_snr, slope)``; the parameters' site is made here."""
        return schedule(self.prefix + "schedule", self.spec.schedule)

    def noise(self) -> Noise:
        """(z, log_snr) to the noise that the denoiser says there is in z; the parameters' site is made here."""
        spec = self.spec
        make = partial(self.Denoiser, spec.denoiser, spec.data_dim, outputs_of(spec.predicts))
        output = network(self.prefix + "denoiser", make)
        return lambda z, log_snr: noise_said(output(z, log_snr), z, log_snr, spec.predicts, spec.likelihood)

    def decode(self, z: Array) -> dist.Distribution:
        """p(x | z_0) for z_0 of shape (..., data_dim)."""
        return self.likelihood(z, self.schedule()(jnp.zeros(()))[0])

    def __call__(self, x: ArrayLike | None = None, size: int | None = None) -> Array:
        """Sample the latents and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        spec = self.spec
        num_data, batch = plate_sizes(x, size, spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            if spec.process == "chain":
                z = undo_chain(self.noise(), self.schedule(), spec.num_steps, spec.data_dim)
            else:
                z = undo_step(self.noise(), self.schedule(), spec.steps, spec.data_dim)
            return numpyro.sample("x", self.decode(z), obs=x)


class Guide:
    """q(z | x), which has no parameters of its own."""

    def __init__(self, spec: Any, model: Model, name: str = ""):
        self.spec, self.name, self.model = spec, name, model
        self.prefix = f"{name}." if name else ""

    def __call__(self, x: ArrayLike, size: int | None = None) -> Array:
        """Sample the latents given x. Returns z_0 of shape (B, data_dim)."""
        spec = self.spec
        num_data, batch = plate_sizes(x, size, spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            signal = spec.likelihood.signal(x)
            if spec.process == "chain":
                return draw_chain(signal, self.model.schedule(), spec.num_steps)
            return draw_step(signal, self.model.schedule(), spec.steps, self.model.noise() if spec.watched else None)
