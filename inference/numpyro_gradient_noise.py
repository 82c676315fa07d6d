"""Gradients drawn again and again in JAX: one compiled scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from numpyro.distributions import biject_to

from elbozoo.inference.numpyro_engine import OWN_SITES, STEP, Loss, Params, Program
from elbozoo.inference.objectives import Objective

Moments = tuple[float, dict[str, np.ndarray], dict[str, np.ndarray], frozenset[str]]


def moments(
    program: Program, objective: Objective, args: tuple, num_draws: int, warm_up: int, step: int, seed: int
) -> Moments:
    """The mean bound, the mean and the variance of each gradient entry by site, and the guide's own sites."""
    args = jax.tree.map(jnp.asarray, args)
    first, second = random.split(random.PRNGKey(seed))
    guide = Loss(objective).guide(program.guide_fn)
    params, constraints, mutable = replace(program, guide_fn=guide).init(first, *args)
    transforms = {name: biject_to(constraint) for name, constraint in constraints.items()}
    free = {name: transforms[name].inv(value) for name, value in params.items()}
    if STEP in mutable:
        mutable = {**mutable, STEP: jnp.asarray(step, jnp.result_type(mutable[STEP]))}
    own = {name: value for name, value in free.items() if name in OWN_SITES}
    others = {name: value for name, value in free.items() if name not in OWN_SITES}
    compiled = program.__dict__.setdefault("_compiled", {})  # what a program keeps, and those with other parameters
    sizes = tuple(a.shape for a in args)  # on which the number of data depends
    key = ("gradient_noise", objective, num_draws, warm_up, sizes)
    if key not in compiled:
        told = program.with_params({n: v for n, v in params.items() if n not in OWN_SITES}, mutable).outline(args)
        compiled[key] = jax.jit(_drawing(program, objective, transforms, told.num_data, num_draws, warm_up))
    bound, mean, variance = compiled[key](others, own, mutable, args, second)
    mean, variance = ({n: _flat(v) for n, v in found.items()} for found in (mean, variance))
    return float(bound), mean, variance, program.guide_parameters(args)


def _drawing(
    program: Program, objective: Objective, transforms: Any, num_data: float, num_draws: int, warm_up: int
) -> Callable:
    """Parameters, the estimator's own numbers, its memory, data and a key to the bound and the gradient's moments."""
    loss, adam = Loss(objective), optax.adam(1e-3)
    guide = loss.guide(program.guide_fn)

    def mean_loss(free: Params, mutable: Params, args: tuple, key: jax.Array) -> Any:
        given = {**{n: transforms[n](v) for n, v in free.items()}, **mutable}
        out = loss.loss_with_mutable_state(key, given, program.model_fn, guide, *args)
        return out["loss"] / num_data, out["mutable_state"] or {}

    gradient = jax.value_and_grad(mean_loss, has_aux=True)

    def train(others: Params, args: tuple, carry: Any, key: jax.Array) -> Any:
        own, state, mutable = carry
        (_, after), found = gradient({**others, **own}, mutable, args, key)
        updates, state = adam.update({n: found[n] for n in own}, state)
        return (optax.apply_updates(own, updates), state, _at(after, mutable)), None

    def draw(others: Params, own: Params, args: tuple, carry: Any, key: jax.Array) -> Any:
        count, total, mean, squares, mutable = carry
        (value, after), found = gradient({**others, **own}, mutable, args, key)
        g = jax.tree.map(jnp.negative, {n: found[n] for n in others})
        count = count + 1.0
        moved = jax.tree.map(lambda m, x: m + (x - m) / count, mean, g)
        squares = jax.tree.map(lambda s, x, m, new: s + (x - m) * (x - new), squares, g, mean, moved)
        return (count, total - value, moved, squares, _at(after, mutable)), None

    def run(others: Params, own: Params, mutable: Params, args: tuple, key: jax.Array) -> Any:
        first, second = random.split(key)
        if warm_up:
            carry = (own, adam.init(own), mutable)
            (own, _, mutable), _ = jax.lax.scan(partial(train, others, args), carry, random.split(first, warm_up))
        zero = jax.tree.map(jnp.zeros_like, others)
        carry = (jnp.zeros(()), jnp.zeros(()), zero, zero, mutable)
        keys = random.split(second, num_draws)
        (count, total, mean, squares, _), _ = jax.lax.scan(partial(draw, others, own, args), carry, keys)
        return total / count, mean, jax.tree.map(lambda s: s / (count - 1.0), squares)

    return run


def _at(after: Params, before: Params) -> Params:
    """The mutable values after a step, at the step before: a schedule stands still."""
    return {**after, STEP: before[STEP]} if STEP in before else {**before, **after}


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])
