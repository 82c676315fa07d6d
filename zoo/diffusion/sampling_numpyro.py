"""Drawing from a diffusion, and its flow, in JAX; the flow is solved by diffrax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from numpyro.handlers import block, substitute

from elbozoo.zoo.diffusion import flow, step_back, step_without_noise
from elbozoo.zoo.diffusion.process_numpyro import noised

MOST_STEPS = 4096


def draw(program: Any, num_data: int, sampler: str, num_steps: int, tolerance: float, seed: int) -> np.ndarray:
    @jax.jit
    def compute(params: Any, key: Array) -> Array:
        start, back, end = jax.random.split(key, 3)
        noise, schedule, decode = (_of(program, name, params) for name in ("noise", "schedule", "decode"))
        noise, schedule = noise(), schedule()
        z = jax.random.normal(start, (num_data, program.spec.data_dim), jnp.result_type(float))
        if sampler == "flow":
            z = _solve(flow_of(noise), z, schedule, tolerance, backwards=True)
        else:
            log_snr = schedule(jnp.linspace(0.0, 1.0, num_steps + 1))[0][::-1]
            z = _walk(noise, z, log_snr, sampler, back)
        return decode(z).sample(end)

    return np.asarray(compute(program._all_params(), jax.random.key(seed)))


def flow_log_prob(program: Any, z: np.ndarray, num_probes: int | None, tolerance: float, seed: int) -> np.ndarray:
    @jax.jit
    def compute(params: Any, z: Array, key: Array) -> Array:
        noise, schedule = (_of(program, name, params)() for name in ("noise", "schedule"))
        field, dim = flow_of(noise), z.shape[-1]
        probes = jnp.eye(dim) if num_probes is None else jax.random.rademacher(key, (num_probes, *z.shape), z.dtype)
        weight = 1.0 if num_probes is None else 1.0 / num_probes

        def both(log_snr: Array, state: tuple) -> tuple[Array, Array]:
            def along(probe: Array) -> Array:
                probe = jnp.broadcast_to(probe, z.shape)
                return (probe * jax.jvp(partial(field, log_snr), (state[0],), (probe,))[1]).sum(-1)

            return field(log_snr, state[0]), weight * jax.lax.map(along, probes).sum(0)

        end, trace = _solve(both, (z, jnp.zeros(len(z), z.dtype)), schedule, tolerance)
        return dist.Normal().log_prob(end).sum(-1) + trace

    return np.asarray(compute(program._all_params(), jnp.asarray(z), jax.random.key(seed)))


def end(program: Any, x: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """z_0 drawn given x, and ``log p(x | z_0) - log q(z_0 | x)``."""

    @jax.jit
    def compute(params: Any, x: Array, key: Array) -> tuple[Array, Array]:
        schedule, decode = _of(program, "schedule", params)(), _of(program, "decode", params)
        given = noised(program.spec.likelihood.signal(x), schedule(jnp.zeros(len(x), x.dtype))[0])
        z = given.sample(key)
        return z, decode(z).log_prob(x) - given.log_prob(z)

    found = compute(program._all_params(), jnp.asarray(x), jax.random.key(seed))
    return np.asarray(found[0]), np.asarray(found[1])


def flow_of(noise: Callable) -> Callable[[Array, Array], Array]:
    """``dz / d log_snr`` at (log_snr, z)."""

    def field(log_snr: Array, z: Array, *_: Any) -> Array:
        now = jnp.broadcast_to(jnp.asarray(log_snr, z.dtype), z.shape[:-1])
        return flow(z, noise(z, now), now)

    return field


def _walk(noise: Callable, z: Array, log_snr: Array, sampler: str, key: Array) -> Array:
    """Back from noise through these levels."""

    def step(z: Array, each: tuple) -> tuple[Array, None]:
        key, now, then = each
        now, then = (jnp.broadcast_to(v, z.shape[:-1]) for v in (now, then))
        said = noise(z, now)
        if sampler == "ddim":
            return step_without_noise(z, said, now, then), None
        loc, scale = step_back(z, said, now, then)
        return loc + scale * jax.random.normal(key, z.shape, z.dtype), None

    keys = jax.random.split(key, len(log_snr) - 1)
    return jax.lax.scan(step, z, (keys, log_snr[:-1], log_snr[1:]))[0]


def _solve(field: Callable, state: Any, schedule: Callable, tolerance: float, backwards: bool = False) -> Any:
    """The flow's solution from the data's end of the schedule to the noise's, or back."""
    first, last = (schedule(jnp.asarray(t))[0] for t in ((1.0, 0.0) if backwards else (0.0, 1.0)))
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: field(t, y)),
        diffrax.Dopri5(),
        t0=first,
        t1=last,
        dt0=None,
        y0=state,
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        max_steps=MOST_STEPS,
        adjoint=diffrax.ForwardMode(),
    )
    return jax.tree.map(lambda y: y[-1], solution.ys)


def _of(program: Any, name: str, params: Any) -> Callable:
    """A method of the model's form with these parameters."""
    method = getattr(program.model_fn, name)
    return block(substitute(method, data=params), hide_fn=lambda site: site["type"] in ("param", "mutable"))
