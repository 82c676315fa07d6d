"""Annealed importance sampling in NumPyro: Hamiltonian transitions of all chains and data at once, compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.distributions import biject_to
from numpyro.infer.hmc_util import velocity_verlet

from elbozoo.inference.latents import ChainState, LatentSpace, end_points
from elbozoo.inference.numpyro_engine import Params, Program, particles


class Annealer:
    """See :class:`elbozoo.inference.annealing.annealed_importance_sampling`; one program on B data, K chains each.

    Args:
        program: a trained program.
        args: the data.
        start: "guide" or "prior".
        num_leapfrog: leapfrog steps a transition.
    """

    def __init__(self, program: Program, args: tuple, start: str, num_leapfrog: int):
        self.program, self.args, self.start, self.num_leapfrog = program, args, start, num_leapfrog
        self.space = LatentSpace(program.outline(args), len(args[0]), biject_to)
        cache = program.__dict__.setdefault("_compiled", {})
        shapes = tuple(self.space.shapes.items())
        key = ("annealer", start, num_leapfrog, len(args[0]), shapes)
        if key not in cache:
            cache[key] = jax.jit(self._begin), jax.jit(self._advance)
        self.jitted_begin, self.jitted_advance = cache[key]

    def _densities(self, params: Params, args: tuple, u: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``log π_0`` and ``log π_1`` at ``u``, ``(K, B)``."""
        values, log_det = self.space.constrain(u)
        model, guide = self.program.model_fn, self.program.guide_fn
        terms, _ = particles(random.key(0), params, model, guide, args, num_particles=len(u), values=values)
        return end_points(terms, log_det, self.start)

    def _begin(self, params: Params, args: tuple, values: Any, step_size: jax.Array) -> ChainState:
        u = self.space.unconstrain(values)
        log_start, log_joint = self._densities(params, args, u)
        return ChainState(u, log_start, log_joint, step_size)

    def _advance(self, params: Params, args: tuple, state: ChainState, path: Any, settings: Any) -> Any:
        """Along a path of ``(change of β, β, step size)``."""
        seed, adapt, target = settings

        def move(carry: tuple[ChainState, jax.Array], point: Any) -> Any:
            (state, key), (change, beta, given) = carry, point
            key, use = random.split(key)
            log_weight = change * (state.log_joint - state.log_start)
            step_size = jnp.where(adapt > 0, state.step_size, given)
            state, accepted = self._transition(use, params, args, state._replace(step_size=step_size), beta)
            tuned = step_size * jnp.exp(adapt * (accepted - target))
            return (state._replace(step_size=tuned), key), (log_weight, step_size, accepted)

        (state, _), (log_weight, step_size, accepted) = jax.lax.scan(move, (state, random.key(seed)), path)
        return state, log_weight.sum(axis=0), step_size, accepted

    def _transition(
        self, key: jax.Array, params: Params, args: tuple, state: ChainState, beta: jax.Array
    ) -> tuple[ChainState, jax.Array]:
        """One Hamiltonian transition that leaves ``π_0^(1-β) π_1^β`` invariant, and each datum's acceptance."""
        momentum_key, accept_key = random.split(key)

        def potential(u: jax.Array) -> jax.Array:
            return -ChainState(u, *self._densities(params, args, u), state.step_size).log_density(beta).sum()

        init, update = velocity_verlet(potential, lambda _, r: 0.5 * jnp.square(r).sum())
        momentum = random.normal(momentum_key, state.u.shape, state.u.dtype)
        size = state.step_size[:, None]
        end = jax.lax.fori_loop(0, self.num_leapfrog, lambda _, s: update(size, None, s), init(state.u, momentum))
        new = ChainState(end.z, *self._densities(params, args, end.z), state.step_size)
        energy = jnp.square(momentum).sum(-1) - jnp.square(end.r).sum(-1)
        log_ratio = new.log_density(beta) - state.log_density(beta) + 0.5 * energy
        log_ratio = jnp.where(jnp.isfinite(log_ratio), log_ratio, -jnp.inf)  # a diverged trajectory is rejected
        accept = jnp.log(random.uniform(accept_key, log_ratio.shape, log_ratio.dtype)) < log_ratio
        u = jnp.where(accept[..., None], new.u, state.u)
        log_start, log_joint = (jnp.where(accept, a, b) for a, b in zip(new[1:3], state[1:3], strict=True))
        return ChainState(u, log_start, log_joint, state.step_size), jnp.exp(jnp.minimum(log_ratio, 0.0)).mean(axis=0)

    # --- what annealing calls ---

    def begin(self, values: Mapping[str, np.ndarray], step_size: float) -> ChainState:
        """Chains at these latents ``(K, B, …)``."""
        sizes = np.full(len(self.args[0]), step_size, self.program.float_dtype)
        return self.jitted_begin(self.program._all_params(), self.args, dict(values), sizes)

    def advance(
        self,
        state: ChainState,
        path: tuple[np.ndarray, np.ndarray, np.ndarray],
        *,
        seed: int,
        adapt: float,
        target: float,
    ) -> tuple[ChainState, np.ndarray, np.ndarray, np.ndarray]:
        """Weigh and move the chains along ``path``: changes of β ``(S,)``, βs ``(S,)``, step sizes ``(S, B)``.

        Args:
            adapt: how fast step sizes follow the acceptance; 0 takes those of ``path``.
            target: the acceptance they aim at.

        Returns: the state, log weights ``(K, B)`` of this path, step sizes and acceptances ``(S, B)``.
        """
        dtype = self.program.float_dtype
        given = tuple(p.astype(dtype) for p in path)
        settings = (seed, np.asarray(adapt, dtype), np.asarray(target, dtype))
        state, *arrays = self.jitted_advance(self.program._all_params(), self.args, state, given, settings)
        log_weight, sizes, accepted = map(np.asarray, arrays)
        return state, log_weight, sizes, accepted

    def values(self, state: ChainState) -> dict[str, np.ndarray]:
        """The chains' latents."""
        return jax.tree.map(np.asarray, self.space.constrain(state.u)[0])
