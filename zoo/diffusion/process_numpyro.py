"""The sites of a diffusion in NumPyro: the whole chain, or one step of it for each datum."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from elbozoo.zoo.diffusion import Steps, before, level_at, noise_of, relative_charge, scales, step_back, to_step

Schedule = Callable[..., tuple[Array, Array]]
Noise = Callable[[Array, Array], Array]


def sample(name: str, fn: dist.Distribution) -> Array:
    return cast(Array, numpyro.sample(name, fn))


# --- the whole chain ------------------------------------------------------------------------------------------------


def draw_chain(x: Array, schedule: Schedule, num_steps: int) -> Array:
    """The guide's sites ``z<T>`` … ``z0``: ``q(z_T | x)``, then ``q(z_s | z_t, x)``. Returns z_0."""
    log_snr = schedule(jnp.linspace(0.0, 1.0, num_steps + 1))[0]
    z = sample(f"z{num_steps}", noised(x, log_snr[-1]))
    for s in reversed(range(num_steps)):
        z = sample(f"z{s}", step_given(z, x, log_snr[s + 1], log_snr[s]))
    return z


def undo_chain(noise: Noise, schedule: Schedule, num_steps: int, dim: int) -> Array:
    """The model's sites ``z<T>`` … ``z0``: N(0, I), then ``p(z_s | z_t)``. Returns z_0."""
    log_snr = schedule(jnp.linspace(0.0, 1.0, num_steps + 1))[0]
    z = sample(f"z{num_steps}", dist.Normal(jnp.zeros(dim), 1.0).to_event(1))
    for s in reversed(range(num_steps)):
        z = sample(f"z{s}", step_said(noise, z, log_snr[s + 1], log_snr[s]))
    return z


def noised(x: Array, log_snr: Array, noise: Array | None = None) -> dist.Distribution:
    """``q(z | x)``; the one value that it has with this noise."""
    alpha, sigma = scales(log_snr)
    if noise is not None:
        return dist.Delta(alpha * x + sigma * noise, event_dim=1)
    return dist.Normal(alpha * x, sigma).to_event(1)


def step_given(z: Array, x: Array, log_snr: Array, earlier: Array) -> dist.Distribution:
    """``q(z_s | z_t, x)``."""
    return dist.Normal(*step_back(z, noise_of(z, x, log_snr), log_snr, earlier)).to_event(1)


def step_said(noise: Noise, z: Array, log_snr: Array, earlier: Array) -> dist.Distribution:
    """``p(z_s | z_t)``: the guide's step, for the noise that the denoiser says there is in z_t."""
    return dist.Normal(*step_back(z, noise(z, log_snr), log_snr, earlier)).to_event(1)


# --- one step a datum, or every step by itself ----------------------------------------------------------------------


def draw_step(x: Array, schedule: Schedule, steps: Steps, watch: Noise | None = None) -> Array:
    """The guide's sites; ``watch`` is the model's denoiser, for a schedule that minimises the variance. Returns z_0."""
    num_steps = steps.num_steps
    sample(steps.last, noised(x, schedule(jnp.ones(()))[0]))
    with charged(steps) as t:
        t = sample("time", times(steps).mask(False)) if t is None else t
        t, noise = to_step(t, num_steps), None
        factor: tuple[Array, ...] = ()
        if watch is not None:
            noise = sample("noise", dist.Normal(jnp.zeros(x.shape[-1]), 1.0).to_event(1).mask(False))
            factor = (relative_charge(x, noise, level_at(schedule, t, num_steps), watch),)
        level = level_at(schedule, t, num_steps, *factor)
        level = sample("level", dist.Delta(level, event_dim=1).mask(False))
        z = sample("noisy", noised(x, level[..., 0], noise).mask(False))
        if num_steps:
            sample("step", step_given(z, x, level[..., 0], before(level, num_steps)))
        else:
            sample("step", instant(level, noise_of(z, x, level[..., 0])))
    return sample("z0", noised(x, schedule(jnp.zeros(()))[0]).mask(False))


def undo_step(noise: Noise, schedule: Schedule, steps: Steps, dim: int) -> Array:
    """The model's sites, in the same order; where it draws for itself ``z0`` comes of a chain. Returns z_0."""
    num_steps = steps.num_steps
    sample(steps.last, dist.Normal(jnp.zeros(dim), 1.0).to_event(1))
    with charged(steps) as t:
        t = sample("time", times(steps).mask(False)) if t is None else t
        if steps.watched:
            sample("noise", dist.Normal(jnp.zeros(dim), 1.0).to_event(1).mask(False))
        level = level_at(schedule, to_step(t, num_steps), num_steps)
        level = sample("level", dist.Delta(level, event_dim=1).mask(False))
        z = sample("noisy", dist.Normal(jnp.zeros(dim), 1.0).to_event(1).mask(False))
        if num_steps:
            sample("step", step_said(noise, z, level[..., 0], before(level, num_steps)))
        else:
            sample("step", instant(level, noise(z, level[..., 0])))
    return sample("z0", ReverseChain(noise, schedule, steps.sampling_steps, dim).mask(False))


@contextmanager
def charged(steps: Steps) -> Iterator[Array | None]:
    """The steps that are charged: one for T by its scale, or all of them in a plate, which gives their times."""
    if not steps.every:
        with numpyro.handlers.scale(scale=max(steps.num_steps, 1)):
            yield None
        return
    plate: Any = numpyro.plate("times", steps.num_steps)
    with plate as indices:
        yield ((indices + 0.5) / steps.num_steps).reshape(-1, *(1,) * (-plate.dim - 1))


def times(steps: Steps) -> dist.Distribution:
    return StratifiedUniform() if steps.stratified else dist.Uniform()


def instant(level: Array, noise: Array) -> dist.Distribution:
    """The path's increment at one instant, in units of its own noise: guide and model differ in its drift alone."""
    return dist.Normal(jnp.sqrt(level[..., 1:]) * noise, 1.0).to_event(1)


# --- distributions --------------------------------------------------------------------------------------------------


class StratifiedUniform(dist.Distribution):
    """Uniform numbers at equal distances from one random offset: each is uniform, and together they fill (0, 1)."""

    arg_constraints: ClassVar = {}
    reparametrized_params: ClassVar = []
    support = constraints.unit_interval

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = sample_shape + self.batch_shape
        offset = jax.random.uniform(key, dtype=jnp.result_type(float))
        return (offset + jnp.arange(prod(shape)).reshape(shape) / prod(shape)) % 1.0

    def log_prob(self, value: Array) -> Array:
        return jnp.zeros(jnp.shape(value))


class ReverseChain(dist.Distribution):
    """z_0 as the model draws it, from noise in equal steps of time; its density has no closed form."""

    arg_constraints: ClassVar = {}
    reparametrized_params: ClassVar = []
    support = constraints.real_vector

    def __init__(self, noise: Noise, schedule: Schedule, num_steps: int, dim: int):
        self.noise, self.schedule, self.num_steps = noise, schedule, num_steps
        super().__init__((), (dim,))

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        assert key is not None
        log_snr = self.schedule(jnp.linspace(0.0, 1.0, self.num_steps + 1))[0][::-1]
        key, start = jax.random.split(key)

        def back(z: Array, each: tuple) -> tuple[Array, None]:
            key, log_snr, earlier = each
            now, then = (jnp.broadcast_to(v, z.shape[:-1]) for v in (log_snr, earlier))
            loc, scale = step_back(z, self.noise(z, now), now, then)
            return loc + scale * jax.random.normal(key, z.shape, z.dtype), None

        z = jax.random.normal(start, sample_shape + self.batch_shape + self.event_shape, log_snr.dtype)
        keys = jax.random.split(key, self.num_steps)
        return jax.lax.scan(back, z, (keys, log_snr[:-1], log_snr[1:]))[0]

    def log_prob(self, value: Array) -> Array:
        raise NotImplementedError("the density of what a chain draws has no closed form")
