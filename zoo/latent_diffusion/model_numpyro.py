"""A VAE with a diffusion for a prior, in NumPyro."""

from __future__ import annotations

from functools import partial
from typing import cast

import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike

from elbozoo.zoo.diffusion import ExactNormal, noise_said, outputs_of
from elbozoo.zoo.diffusion.process_numpyro import Noise, Schedule, draw_step, sample, undo_step
from elbozoo.zoo.latent_diffusion import LatentDiffusion
from elbozoo.zoo.networks.networks_numpyro import network
from elbozoo.zoo.schedules.schedules_numpyro import schedule
from elbozoo.zoo.spec import plate_sizes
from elbozoo.zoo.vae import model_numpyro as vae


class Model:
    """p(z) p(x | z)."""

    def __init__(self, spec: LatentDiffusion, name: str = ""):
        self.spec, self.name = spec, name
        self.prefix = f"{name}." if name else ""
        self.vae = vae.Model(spec.vae(), name)
        self.encode, self.decode = self.vae.encode, self.vae.decode
        self.Denoiser, self.end = spec.denoiser.form("numpyro"), ExactNormal().form("numpyro")(ExactNormal())

    def schedule(self) -> Schedule:
        """Times to ``(log_snr, slope)``; the parameters' site is made here."""
        return schedule(self.prefix + "schedule", self.spec.schedule)

    def noise(self) -> Noise:
        """(z, log_snr) to the noise that the denoiser says there is in z; the parameters' site is made here."""
        spec = self.spec
        make = partial(self.Denoiser, spec.denoiser, spec.latent_dim, outputs_of(spec.predicts))
        output = network(self.prefix + "denoiser", make)
        return lambda z, log_snr: noise_said(output(z, log_snr), z, log_snr, spec.predicts, ExactNormal())

    def __call__(self, x: ArrayLike | None = None, size: int | None = None) -> Array:
        """Sample the latents and x, or score x; without x draw ``size`` data. Returns x of shape (B, data_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            z = undo_step(self.noise(), self.schedule(), self.spec.steps, self.spec.latent_dim)
            z = sample("z", self.end(z, self.schedule()(0.0 * z[..., 0])[0]))
            return cast(Array, numpyro.sample("x", self.decode(z), obs=x))


class Guide:
    """q(z | x), and the noising of z, which has no parameters of its own."""

    def __init__(self, spec: LatentDiffusion, model: Model, name: str = ""):
        self.spec, self.name, self.model = spec, name, model
        self.prefix = f"{name}." if name else ""

    def encode(self, x: ArrayLike) -> dist.Distribution:
        """q(z | x) for x of shape (..., data_dim)."""
        return self.model.encode(x)

    def __call__(self, x: ArrayLike, size: int | None = None) -> Array:
        """Sample the latents given x. Returns z of shape (B, latent_dim)."""
        num_data, batch = plate_sizes(x, size, self.spec.data_dim)
        with numpyro.plate("data", num_data, subsample_size=batch, dim=-1):
            z = sample("z", self.encode(x))
            draw_step(z, self.model.schedule(), self.spec.steps, self.model.noise() if self.spec.watched else None)
            return z
