"""The learned schedule in flax.nnx, for NumPyro."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import log

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.lax import stop_gradient

from elbozoo.inference.arrays import scale_gradient
from elbozoo.zoo import schedules as specs
from elbozoo.zoo.networks.networks_numpyro import network


def schedule(name: str, spec: specs.Schedule) -> Callable[..., tuple[Array, Array]]:
    """The schedule as a function of time; where it is learned, its parameters' site is made here."""
    return network(name, partial(spec.form("numpyro"), spec)) if spec.learned else spec


class LearnedSchedule(nnx.Module):
    def __init__(self, spec: specs.LearnedSchedule, rngs: nnx.Rngs):
        self.spec, dtype = spec, jnp.result_type(float)
        self.log_snr_max = nnx.Param(jnp.asarray(spec.log_snr_max, dtype))
        self.log_span = nnx.Param(jnp.asarray(log(spec.log_snr_max - spec.log_snr_min), dtype))
        self.log_linear = nnx.Param(jnp.zeros((), dtype))
        self.log_height = nnx.Param(jnp.full(spec.schedule_units, -3.0, dtype))
        self.log_steepness = nnx.Param(jnp.full(spec.schedule_units, log(10.0), dtype))
        self.center = nnx.Param((jnp.arange(spec.schedule_units, dtype=dtype) + 0.5) / spec.schedule_units)

    def __call__(self, t: Array, factor: Array | None = None) -> tuple[Array, Array]:
        between = (self.log_linear[...], self.log_height[...], self.log_steepness[...], self.center[...])
        lost, slope = specs.monotone(t, *between)
        if factor is not None:
            lost, slope = scale_gradient(lost, factor), scale_gradient(slope, factor)
        highest, span = jnp.minimum(self.log_snr_max[...], specs.MOST), jnp.exp(self.log_span[...])
        if not self.spec.learn_ends:
            highest, span = stop_gradient(highest), stop_gradient(span)
        return highest - span * lost, span * slope
