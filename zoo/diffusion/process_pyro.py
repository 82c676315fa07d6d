"""The sites of a diffusion in Pyro: the whole chain, or one step of it for each datum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from elbozoo.zoo.diffusion import Steps, before, level_at, noise_of, relative_charge, scales, step_back, to_step

Schedule = Callable[..., tuple[Tensor, Tensor]]
Noise = Callable[[Tensor, Tensor], Tensor]


# --- the whole chain ------------------------------------------------------------------------------------------------


def draw_chain(x: Tensor, schedule: Schedule, num_steps: int) -> Tensor:
    """The guide's sites ``z<T>`` … ``z0``: ``q(z_T | x)``, then ``q(z_s | z_t, x)``. Returns z_0."""
    log_snr = schedule(grid(num_steps, x))[0]
    z = pyro.sample(f"z{num_steps}", noised(x, log_snr[-1]))
    for s in reversed(range(num_steps)):
        z = pyro.sample(f"z{s}", step_given(z, x, log_snr[s + 1], log_snr[s]))
    return z


def undo_chain(noise: Noise, schedule: Schedule, num_steps: int, origin: Tensor) -> Tensor:
    """The model's sites ``z<T>`` … ``z0``: N(0, I), then ``p(z_s | z_t)``. Returns z_0."""
    log_snr = schedule(grid(num_steps, origin))[0]
    z = pyro.sample(f"z{num_steps}", dist.Normal(origin, 1.0).to_event(1))
    for s in reversed(range(num_steps)):
        z = pyro.sample(f"z{s}", step_said(noise, z, log_snr[s + 1], log_snr[s]))
    return z


def grid(num_steps: int, like: Tensor) -> Tensor:
    """The ends of so many steps of time, from 0 to 1."""
    return torch.linspace(0.0, 1.0, num_steps + 1, dtype=like.dtype, device=like.device)


def noised(x: Tensor, log_snr: Tensor, noise: Tensor | None = None) -> TorchDistribution:
    """``q(z | x)``; the one value that it has with this noise."""
    alpha, sigma = scales(log_snr)
    if noise is not None:
        return dist.Delta(alpha * x + sigma * noise, event_dim=1)
    return dist.Normal(alpha * x, sigma).to_event(1)


def step_given(z: Tensor, x: Tensor, log_snr: Tensor, earlier: Tensor) -> TorchDistribution:
    """``q(z_s | z_t, x)``."""
    return dist.Normal(*step_back(z, noise_of(z, x, log_snr), log_snr, earlier)).to_event(1)


def step_said(noise: Noise, z: Tensor, log_snr: Tensor, earlier: Tensor) -> TorchDistribution:
    """``p(z_s | z_t)``: the guide's step, for the noise that the denoiser says there is in z_t."""
    return dist.Normal(*step_back(z, noise(z, log_snr), log_snr, earlier)).to_event(1)


# --- one step a datum, or every step by itself ----------------------------------------------------------------------


def draw_step(x: Tensor, schedule: Schedule, steps: Steps, watch: Noise | None = None) -> Tensor:
    """The guide's sites; ``watch`` is the model's denoiser, for a schedule that minimises the variance. Returns z_0."""
    num_steps = steps.num_steps
    pyro.sample(steps.last, noised(x, schedule(x.new_ones(()))[0]))
    with charged(steps, x) as t:
        t = pyro.sample("time", times(steps, x).mask(False)) if t is None else t
        t, noise = to_step(t, num_steps), None
        factor: tuple[Tensor, ...] = ()
        if watch is not None:
            noise = pyro.sample("noise", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1).mask(False))
            with torch.no_grad():
                factor = (relative_charge(x, noise, level_at(schedule, t, num_steps), watch),)
        level = level_at(schedule, t, num_steps, *factor)
        level = pyro.sample("level", dist.Delta(level, event_dim=1).mask(False))
        z = pyro.sample("noisy", noised(x, level[..., 0], noise).mask(False))
        if num_steps:
            pyro.sample("step", step_given(z, x, level[..., 0], before(level, num_steps)))
        else:
            pyro.sample("step", instant(level, noise_of(z, x, level[..., 0])))
    return pyro.sample("z0", noised(x, schedule(x.new_zeros(()))[0]).mask(False))


def undo_step(noise: Noise, schedule: Schedule, steps: Steps, origin: Tensor) -> Tensor:
    """The model's sites, in the same order; where it draws for itself ``z0`` comes of a chain. Returns z_0."""
    num_steps = steps.num_steps
    pyro.sample(steps.last, dist.Normal(origin, 1.0).to_event(1))
    with charged(steps, origin) as t:
        t = pyro.sample("time", times(steps, origin).mask(False)) if t is None else t
        if steps.watched:
            pyro.sample("noise", dist.Normal(origin, 1.0).to_event(1).mask(False))
        level = level_at(schedule, to_step(t, num_steps), num_steps)
        level = pyro.sample("level", dist.Delta(level, event_dim=1).mask(False))
        z = pyro.sample("noisy", dist.Normal(origin, 1.0).to_event(1).mask(False))
        if num_steps:
            pyro.sample("step", step_said(noise, z, level[..., 0], before(level, num_steps)))
        else:
            pyro.sample("step", instant(level, noise(z, level[..., 0])))
    return pyro.sample("z0", ReverseChain(noise, schedule, steps.sampling_steps, origin).mask(False))


@contextmanager
def charged(steps: Steps, like: Tensor) -> Iterator[Tensor | None]:
    """The steps that are charged: one for T by its scale, or all of them in a plate, which gives their times."""
    if not steps.every:
        with pyro.poutine.scale(scale=max(steps.num_steps, 1)):
            yield None
        return
    plate: Any = pyro.plate("times", steps.num_steps)
    with plate as indices:
        yield ((indices.to(like) + 0.5) / steps.num_steps).reshape(-1, *(1,) * (-plate.dim - 1))


def times(steps: Steps, like: Tensor) -> TorchDistribution:
    """Of the type and on the device of ``like``."""
    return StratifiedUniform(like) if steps.stratified else dist.Uniform(like.new_zeros(()), like.new_ones(()))


def instant(level: Tensor, noise: Tensor) -> TorchDistribution:
    """The path's increment at one instant, in units of its own noise: guide and model differ in its drift alone."""
    return dist.Normal(level[..., 1:].sqrt() * noise, 1.0).to_event(1)


# --- distributions --------------------------------------------------------------------------------------------------


class StratifiedUniform(TorchDistribution):
    """Uniform numbers at equal distances from one random offset: each is uniform, and together they fill (0, 1)."""

    arg_constraints: ClassVar = {}
    support = constraints.unit_interval
    has_rsample = True

    def __init__(self, like: Tensor):
        self.like = like.new_zeros(())
        super().__init__(validate_args=False)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(StratifiedUniform, _instance)
        new.like = self.like
        super(StratifiedUniform, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape=()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape
        places = torch.arange(prod(shape), dtype=self.like.dtype, device=self.like.device).reshape(shape) / prod(shape)
        return (torch.rand_like(self.like) + places) % 1.0

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)


class ReverseChain(TorchDistribution):
    """z_0 as the model draws it, from noise in equal steps of time; its density has no closed form."""

    arg_constraints: ClassVar = {}
    support = constraints.real_vector

    def __init__(self, noise: Noise, schedule: Schedule, num_steps: int, origin: Tensor):
        self.noise, self.schedule, self.num_steps, self.origin = noise, schedule, num_steps, origin
        super().__init__(torch.Size(), origin.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        new = self._get_checked_instance(ReverseChain, _instance)
        new.noise, new.schedule, new.num_steps, new.origin = self.noise, self.schedule, self.num_steps, self.origin
        super(ReverseChain, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        return new

    def sample(self, sample_shape=()) -> Tensor:
        with torch.no_grad():
            log_snr = self.schedule(grid(self.num_steps, self.origin))[0]
            z = torch.randn_like(self.origin.expand(torch.Size(sample_shape) + self.batch_shape + self.event_shape))
            for s in reversed(range(self.num_steps)):
                now, then = (v.expand(z.shape[:-1]) for v in (log_snr[s + 1], log_snr[s]))
                loc, scale = step_back(z, self.noise(z, now), now, then)
                z = loc + scale * torch.randn_like(z)
            return z

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError("the density of what a chain draws has no closed form")
