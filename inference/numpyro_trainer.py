"""Training on JAX: an epoch is one compiled ``lax.scan`` over data on the device; replicates share its program."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro import validation_enabled
from numpyro.distributions import biject_to

from elbozoo.inference.errors import CorruptFile, must
from elbozoo.inference.numpyro_engine import MEMORY, OWN_SITES, Params, Program, particles, with_own_sites
from elbozoo.inference.objectives import Objective
from elbozoo.inference.optimizers import Adam
from elbozoo.inference.recording import NOBODY, check_amortised, check_counts, first_non_finite, step_metrics
from elbozoo.inference.weights import frozen_mask, with_values


class State(NamedTuple):
    """All that training carries from step to step; with replicates every leaf but the step has an axis of them."""

    params: Params  # unconstrained
    average: Params | None  # of the parameters, where the optimiser keeps one
    optimizer: Any
    mutable: Params
    key: jax.Array  # raw key data, so that it is an ordinary array
    step: jax.Array


REPLICATES = State(*cast(Any, (0, 0, 0, 0, 0, None)))
"""The axes of replicates."""


class Trainer:
    """Runs epochs of one objective on one program.

    ``norm_every`` is how often the gradient's norm is measured, in steps, if ``skip_norm`` does not ask for each;
    at the others it is said to be -1.

    Args:
        data: what :meth:`epoch` takes minibatches from, until ``self.data`` is set to others; the first of them are
            what the program is first run on.
        num_data: how many data there are in all, where ``data`` are not all; ``math.inf`` where nobody can tell.
        batch_size: data a minibatch.
        seeds: one seed a replicate.
        frozen: beginnings of the names of weights that stay as they are.
        devices: over how many devices each minibatch is spread; parameters, data and noise are those of one.
    """

    def __init__(
        self,
        program: Program,
        objective: Objective,
        optimizer: Any,
        data: tuple,
        *,
        batch_size: int,
        seeds: list[int],
        redraw_pixels: bool,
        device: str | None,
        frozen: tuple[str, ...] = (),
        num_data: float | None = None,
        devices: int = 1,
    ):
        self.norm_every = 1
        self.num_data = len(data[0]) if num_data is None else num_data
        self.objective, self.whole = objective, program
        if objective.gradient.keeps_numbers:
            program = replace(program, guide_fn=with_own_sites(program.guide_fn, objective))
        self.program = program
        self.adam = optimizer if isinstance(optimizer, Adam) else Adam()  # which neither skips nor averages
        self.optimizer = optimizer.optax() if isinstance(optimizer, Adam) else optimizer
        if not isinstance(self.optimizer, optax.GradientTransformation):
            raise must(
                "optimizer",
                "be an Adam or an optax GradientTransformation for a NumPyro program",
                type(optimizer).__name__,
                "Pass optax.adam(1e-3)",
            )
        self.device = _device(device)
        self.mesh = _mesh(device, devices) if devices > 1 else None
        self.redraw_pixels, self.replicated = redraw_pixels, len(seeds) > 1
        self.data = self.put(data)
        with self._on_device():
            self.batch_size = min(batch_size, len(data[0]))
            example = jax.tree.map(lambda a: a[: self.batch_size], self.data)
            if program.spec is None and program.local_to is None:
                # an autoguide keeps what it sees at its first call, which must not be a tracer
                program.init(random.PRNGKey(seeds[0]), *example)
            zoos = program.spec is not None and getattr(self.whole.guide_fn, "spec", None) is program.spec
            if self.batch_size < self.num_data and not zoos:  # the zoo's guides are amortised
                check_amortised(self._shapes(example), self._shapes(jax.tree.map(lambda a: a[:1], example)))
            self.transforms: dict[str, Any] = {}  # known once the program has been run, in _init
            self.frozen = frozen and self._frozen(example, frozen)
            init = partial(self._init, example=example)
            keys = jnp.stack([random.PRNGKey(s) for s in seeds])
            run = jax.vmap(init, out_axes=REPLICATES) if self.replicated else lambda k: init(k[0])
            self.state: State = jax.jit(run)(keys)
            if not self.transforms:
                raise must(
                    "program", "have a parameter to train", "none", "Add numpyro.param or a network to model or guide"
                )
            self.state = self._everywhere(self.state)
        epoch, held_out = self._epoch, self._held_out
        if self.replicated:
            together = jax.vmap(epoch, (REPLICATES, None, 0), (REPLICATES, 0))
            epoch = self._in_turn if _platform(self.device) == "cpu" else together
            held_out = jax.vmap(held_out, (REPLICATES, None, None))
        self._run_epoch = jax.jit(epoch, out_shardings=self.mesh and NamedSharding(self.mesh, PartitionSpec()))
        self._run_held_out = jax.jit(held_out)

    def _on_device(self) -> Any:
        return contextlib.nullcontext() if self.device is None else jax.default_device(self.device)

    def _everywhere(self, tree: Any) -> Any:
        """``tree``, whole on each of several devices."""
        return tree if self.mesh is None else jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def _spread(self, tree: Any) -> Any:
        """``tree``, its first axes cut among several devices."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, NamedSharding(self.mesh, PartitionSpec("data")))

    def _shapes(self, example: tuple) -> dict[str, Any]:
        """The shapes of every parameter, by site, without computing anything."""
        params = jax.eval_shape(lambda key: self.program.init(key, *example)[0], random.PRNGKey(0))
        return {n: [a.shape for a in jax.tree.leaves(v)] for n, v in params.items()}

    def _frozen(self, example: tuple, frozen: tuple[str, ...]) -> Params:
        """Which leaves of the parameters stay as they are, as truth values."""
        params = jax.eval_shape(lambda key: self.program.init(key, *example)[0], random.PRNGKey(0))
        own = {n: jax.tree.map(lambda _: False, v) for n, v in params.items() if n in OWN_SITES}
        theirs = {n: v for n, v in params.items() if n not in OWN_SITES}
        mask = frozen_mask(theirs, self.program._prefix, frozen)
        if all(jax.tree.leaves(mask)):
            raise must("frozen", "leave a parameter to train", frozen, "Hold fewer weights still")
        return mask | own

    def _init(self, key: jax.Array, example: tuple) -> State:
        params, constraints, mutable = self.program.init(key, *example)
        self.transforms = {n: biject_to(c) for n, c in constraints.items()}
        unconstrained = {n: self.transforms[n].inv(v) for n, v in params.items()}
        average = None if self.adam.average is None else unconstrained
        return State(unconstrained, average, self.optimizer.init(unconstrained), mutable, key, jnp.zeros((), jnp.int32))

    def _constrain(self, params: Params) -> Params:
        return {n: self.transforms[n](v) for n, v in params.items()}

    # --- one step, one epoch ---

    def _batch(self, data: tuple, index: jax.Array, key: jax.Array) -> tuple[tuple, jax.Array]:
        """The minibatch of a step, and the key that is left of the step's."""
        batch = self._spread(jax.tree.map(lambda a: a[self._spread(index)], data))
        if self.redraw_pixels:
            pixel_key, key = random.split(key)
            batch = (random.bernoulli(pixel_key, batch[0]).astype(batch[0].dtype), *batch[1:])
        return batch, key

    def _terms(self, params: Params, mutable: Params, batch: tuple, key: jax.Array, step: jax.Array) -> Any:
        terms, mutable = particles(
            key,
            {**self._constrain(params), **mutable},
            self.program.model_fn,
            self.program.guide_fn,
            batch,
            num_particles=self.objective.num_particles,
            analytic_kl=self.objective.uses_analytic_kl,
            step=step,
        )
        self.objective.check(terms)
        return terms, mutable

    def _step(self, data: tuple, state: State, index: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        batch, key = self._batch(data, index, _key_of_step(state))

        def loss(params: Params) -> tuple[jax.Array, Any]:
            terms, mutable = self._terms(params, state.mutable, batch, key, state.step)
            check_counts(terms, self.num_data, self.batch_size)
            metrics = jax.lax.stop_gradient(step_metrics(self.objective, terms))
            if terms.memory:
                mutable = {**mutable, MEMORY: dict(jax.lax.stop_gradient(self.objective.remember(terms)))}
            return -self.objective.surrogate(terms).mean() / terms.data_per_entry, (metrics, mutable)

        gradient, (metrics, mutable) = jax.grad(loss, has_aux=True)(state.params)
        gradient = self._held(gradient, jax.tree.map(jnp.zeros_like, gradient))
        updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.params)
        params: Any = self._held(optax.apply_updates(state.params, updates), state.params)
        if self.norm_every == 1 or self.adam.skip_norm is not None:
            metrics["grad_norm"] = norm = _norm(gradient)
        else:  # with 60,000 parameters and batches of 10 it is a quarter of a step's time on a CPU
            unknown = jnp.asarray(-1.0, jnp.result_type(*jax.tree.leaves(gradient)))
            measured = state.step % self.norm_every == 0
            metrics["grad_norm"] = norm = jax.lax.cond(measured, _norm, lambda _: unknown, gradient)
        if self.adam.skip_norm is not None:
            metrics["skipped"] = 1.0 * (norm > self.adam.skip_norm)
        average: Any = state.average
        if average is not None:
            average = self._held(optax.incremental_update(params, average, self.adam.share(state.step)), average)
        return State(params, average, optimizer, mutable, state.key, state.step + 1), metrics

    def _held(self, moved: Any, still: Any) -> Any:
        """``moved``, but ``still`` where weights are frozen."""
        if not self.frozen:
            return moved
        return jax.tree.map(lambda frozen, new, old: old if frozen else new, self.frozen, moved, still)

    def _epoch(self, state: State, data: tuple, order: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        return jax.lax.scan(partial(self._step, data), state, order)

    def _in_turn(self, state: State, data: tuple, order: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        """An epoch of each replicate, one after another: on a CPU batched matrix products cost more than they save."""

        def epoch(replicate: tuple[State, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
            return self._epoch(replicate[0]._replace(step=state.step), data, replicate[1])

        states, metrics = jax.lax.map(epoch, (state._replace(step=cast(Any, None)), order))
        return states._replace(step=states.step[0]), metrics

    def _held_out(self, state: State, batch: tuple, salt: jax.Array) -> jax.Array:
        key = random.fold_in(random.fold_in(state.key, 2**31 - 1), salt)
        terms, _ = self._terms(_final(state), state.mutable, batch, key, state.step)
        return self.objective.bound(terms).mean() / terms.data_per_entry

    # --- what fit calls ---

    def put(self, data: tuple) -> tuple:
        """Arrays on the device, for ``self.data``; other threads may call it."""
        with self._on_device():
            return self._everywhere(jax.tree.map(jnp.asarray, data))

    def epoch(self, order: np.ndarray) -> dict[str, np.ndarray]:
        """Run one epoch; ``order`` is ``(replicates, steps, batch)``. Metrics are ``(replicates, steps)``."""
        order = np.asarray(order, np.int32)
        with self._on_device():
            self.state, metrics = self._run_epoch(self.state, self.data, order if self.replicated else order[0])
        metrics = {n: np.asarray(v) for n, v in metrics.items()}
        return metrics if self.replicated else {n: v[None] for n, v in metrics.items()}

    def held_out(self, valid: tuple, batch_size: int) -> np.ndarray:
        """The objective's bound on held-out data, nats per datum, ``(replicates,)``."""
        total, count = 0.0, len(valid[0])
        with self._on_device():
            for i, start in enumerate(range(0, count, batch_size)):
                batch = jax.tree.map(lambda a, s=start: a[s : s + batch_size], valid)
                total = total + np.asarray(self._run_held_out(self.state, batch, i)) * len(batch[0])
        return np.atleast_1d(total / count)

    def snapshot(self) -> State:
        """The present state; arrays are immutable, so it costs nothing."""
        return self.state

    def take(self, snapshot: State) -> None:
        """Go back to a snapshot."""
        self.state = snapshot

    def begin_at(self, weights: Mapping[str, np.ndarray]) -> None:
        """Begin at these weights, in torch's names and layouts, in every replicate; the others stay as they are."""
        own = {n: v for n, v in self._constrain(self.state.params).items() if n not in OWN_SITES}
        with self._on_device():
            moved = jax.tree.map(jnp.asarray, with_values(own, self.program._prefix, weights, self.replicated))
            self._start_from(self.state.params | {n: self.transforms[n].inv(v) for n, v in moved.items()})

    def adopt(self, other: Trainer) -> None:
        """Begin at the parameters of another trainer of as many replicates; the optimiser starts anew."""
        params = {n: other.state.params.get(n, v) for n, v in self.state.params.items()}
        mutable = {n: other.state.mutable.get(n, v) for n, v in self.state.mutable.items()}
        self.state = self.state._replace(mutable=mutable)
        self._start_from(params)

    def _start_from(self, params: Params) -> None:
        """Begin at these (unconstrained) parameters; the optimiser starts anew."""
        init = jax.vmap(self.optimizer.init) if self.replicated else self.optimizer.init
        average = None if self.adam.average is None else params
        with self._on_device():
            params, optimizer = self._everywhere((params, jax.jit(init)(params)))
        self.state = self.state._replace(params=params, average=average, optimizer=optimizer)

    def bad_parameter(self) -> tuple[str, int] | None:
        """The first parameter that is not finite, and its replicate; None when all are.

        Or of which the optimiser keeps a number that is not: a square that overflowed stops Adam for good.
        """
        if not _bad(self.state):  # all replicates at once: to cut one out takes as long as many steps
            return None
        names = (_bad(self._replicate(replicate)) for replicate in range(self._count))
        return next((name, replicate) for replicate, name in enumerate(names) if name)

    def blame(self, index: np.ndarray) -> tuple[str, int]:
        """What the next step would make non-finite: the site, else the parameter by its gradient; and the replicate.

        Args:
            index: the step's minibatches, ``(replicates, batch)``.
        """
        for replicate in range(self._count):
            state = self._replicate(replicate)
            key = _key_of_step(state)
            with self._on_device(), validation_enabled(False):  # run op by op, NumPyro would refuse what is to be named
                batch, key = self._batch(self.data, jnp.asarray(index[replicate]), key)
                terms = partial(self._terms, mutable=state.mutable, batch=batch, key=key, step=state.step)
                name = first_non_finite(terms(state.params)[0])
                if not name:
                    name = _non_finite(jax.grad(partial(self._mean_surrogate, terms))(state.params))
            if name:
                return name, replicate
        return NOBODY, 0

    @property
    def _count(self) -> int:
        return len(self.state.key) if self.replicated else 1

    def _mean_surrogate(self, terms: Callable, params: Params) -> jax.Array:
        return self.objective.surrogate(terms(params)[0]).mean()

    def _replicate(self, index: int) -> State:
        if not self.replicated:
            return self.state
        without: Any = self.state._replace(step=cast(Any, None))
        return jax.tree.map(lambda x: x[index], without)._replace(step=self.state.step)

    def same(self, value: Any) -> Any:
        """``value``: there is one process."""
        return value

    def programs(self) -> list[Program]:
        """One trained program a replicate."""
        found = []
        for state in map(self._replicate, range(self._count)):
            params, mutable = (
                {n: v for n, v in values.items() if n not in OWN_SITES}
                for values in (self._constrain(_final(state)), state.mutable)
            )
            if self.mesh is not None:  # what is made of them next need not be on several devices
                params, mutable = jax.tree.map(lambda a: jnp.asarray(np.asarray(a)), (params, mutable))
            found.append(self.whole.with_params(params, mutable or None))
        return found

    def arrays(self) -> dict[str, np.ndarray]:
        """The whole state as named arrays, for a checkpoint."""
        leaves, _ = jax.tree_util.tree_flatten_with_path(self.state)
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take the state of a checkpoint. Raises: CorruptFile when it is of another program or optimizer."""
        leaves, tree = jax.tree_util.tree_flatten_with_path(self.state)
        names = [jax.tree_util.keystr(path) for path, _ in leaves]
        wrong = [
            n
            for n, (_, leaf) in zip(names, leaves, strict=True)
            if n not in arrays or arrays[n].shape != leaf.shape or arrays[n].dtype != leaf.dtype
        ]
        if wrong or len(names) != len(arrays):
            raise must(
                "checkpoint",
                "hold the state of this program and optimizer",
                f"a mismatch at {wrong[:3] or 'extra arrays'}",
                "Resume with the settings it was started with",
                CorruptFile,
            )
        with self._on_device():
            self.state = self._everywhere(jax.tree_util.tree_unflatten(tree, [jnp.asarray(arrays[n]) for n in names]))


def _key_of_step(state: State) -> jax.Array:
    """Of all that a step draws. The first two of its kind are what :meth:`Program.init` splits the seed into."""
    return random.fold_in(state.key, state.step + 2)


def _final(state: State) -> Params:
    """The parameters that held-out data and the trained program see."""
    return state.params if state.average is None else state.average


def _norm(tree: Any) -> jax.Array:
    """The global norm (optax has it under another name in every other version)."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))


def _bad(state: State) -> str:
    """Name of the first parameter that is not finite, or of which the optimiser keeps what is not; empty if none."""
    return _non_finite(state.params) or _non_finite(_kept_of(state.optimizer, state.params))


def _non_finite(params: Params) -> str:
    """Name of the first site with a non-finite leaf; empty if none."""
    bad = (n for n, v in params.items() if not all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(v)))
    return next(bad, "")


def _kept_of(optimizer: Any, params: Params) -> dict[str, list[Any]]:
    """What an optimiser keeps for each site: the floating leaves of its state that lie under the site's name."""
    found: dict[str, list[Any]] = {n: [] for n in params}
    for path, leaf in jax.tree_util.tree_leaves_with_path(optimizer):
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey) and key.key in found]
        if names and jnp.issubdtype(leaf.dtype, jnp.floating):
            found[names[0]].append(leaf)
    return found


def _mesh(name: str | None, count: int) -> Mesh:
    _device(name)
    found = jax.devices(name)
    if count > len(found):
        todo = f"Pass devices={len(found)}, or make more of them visible"
        raise must("devices", f"be at most the {len(found)} that JAX sees here", count, todo)
    return Mesh(np.array(found[:count]), ("data",))


def _platform(device: Any) -> str:
    """Of a device, or of the one that arrays are made on by default."""
    return (device or next(iter(jnp.zeros(()).devices()))).platform


def _device(name: str | None) -> Any:
    if name is None:
        return None
    try:
        return jax.devices(name)[0]
    except RuntimeError as error:
        found = sorted({d.platform for d in jax.devices()})
        raise must(
            "device",
            "be one that JAX can see here",
            repr(name),
            f"Use one of {found}, or install jax with support for it",
        ) from error
