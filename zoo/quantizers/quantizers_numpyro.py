"""The quantizers in NumPyro, and distributions over their codes."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from flax import nnx
from jax import Array
from jax.lax import stop_gradient
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from elbozoo.zoo import quantizers as specs
from elbozoo.zoo.networks.networks_numpyro import network

State = dict[str, Array]


class Quantization(NamedTuple):
    """What a quantizer makes of outputs (..., P, D)."""

    residuals: Array  # what each codebook was given, (..., P, depth, D), constant
    index: Array  # (..., P, depth)
    posterior: dist.Distribution  # q(z | x), a point mass, event shape (P depth, D)


def quantize(encoded: Array, codes: Array, trained: bool = True) -> Quantization:
    """Outputs (..., P, D) by the codes (depth, K, D) that are nearest to them, to what is left, and so on."""
    residual, residuals, indices, chosen, errors, commitments = encoded, [], [], [], [], []
    for book in codes:
        index = nearest(stop_gradient(residual)[..., None, :], book[None])[..., 0]
        code = book[index]
        residuals.append(stop_gradient(residual))
        indices.append(index)
        chosen.append(stop_gradient(code))
        errors.append(((stop_gradient(residual) - code) ** 2).sum(-1))
        commitments.append(((residual - stop_gradient(code)) ** 2).sum(-1))
        residual = residual - stop_gradient(code)
    chosen[0] = chosen[0] + (encoded - stop_gradient(encoded))  # exactly the code; its derivative is the output's

    def flat(parts: list[Array], event_ndim: int) -> Array:
        """The parts of each position next to one another."""
        stacked = jnp.stack(parts, -1 - event_ndim)
        split = stacked.ndim - event_ndim
        return stacked.reshape(*stacked.shape[: split - 2], -1, *stacked.shape[split:])

    scale = 1.0 if trained else 0.0
    posterior = NearestCode(flat(chosen, 1), scale * flat(errors, 0), scale * flat(commitments, 0)).to_event(1)
    return Quantization(jnp.stack(residuals, -2), jnp.stack(indices, -1), posterior)


def nearest(x: Array, codes: Array) -> Array:
    """Indices (..., depth) of the codes (depth, K, D) nearest to x (..., depth, D)."""
    distance = (codes**2).sum(-1) - 2 * jnp.einsum("...de,dke->...dk", x, codes)
    return jnp.argmin(distance, -1)


def same(value: Array, code: Array) -> Array:
    """Whether a value (..., D) is a code, up to how far rounding lets a search be wrong."""
    return ((value - code) ** 2).sum(-1) <= 1e-5 * (value**2).sum(-1) + 1e-12


# --- forms --------------------------------------------------------------------------------------------------------


class CodebookModule(nnx.Module):
    """Codes that gradients move."""

    def __init__(self, spec: specs.Codebook, rngs: nnx.Rngs):
        self.codes = nnx.Param(initial_codes(spec, rngs))

    def __call__(self) -> Array:
        return self.codes[...]


def initial_codes(spec: specs.Codebook, rngs: nnx.Rngs) -> Array:
    shape, bound = (spec.depth, spec.num_codes, spec.code_dim), 1.0 / spec.num_codes
    return jax.random.uniform(rngs.params(), shape, jnp.result_type(float), -bound, bound)


class Codebook:
    """The codes, from parameters or from mutable sites."""

    def __init__(self, spec: specs.Codebook, name: str):
        self.spec, self.name = spec, name

    def read(self) -> Array:
        """(depth, num_codes, code_dim)."""
        if self.spec.update == "gradient":
            return network(self.name, lambda rngs: CodebookModule(self.spec, rngs))()
        return self._state("$buffers")["codes"]

    def encode(self, outputs: Array) -> dist.Distribution:
        """q(z | x) of outputs (..., P, D); moving averages are worked out for :meth:`commit`."""
        if self.spec.update == "gradient":
            return quantize(outputs, self.read()).posterior
        state = self._state("$buffers")
        found = quantize(outputs, state["codes"])
        self._state("$next", state).update(follow(self.spec, state, found))
        return found.posterior

    def commit(self) -> None:
        """Let the codes follow what the guide has seen. The model does so last, for both have read them by then."""
        if self.spec.update == "ema":
            state = self._state("$buffers")
            state.update(self._state("$next", state))

    def _state(self, suffix: str, start: State | None = None) -> State:
        """A mutable site; engines keep what a step of training leaves there."""
        if start is None:
            key = numpyro.prng_key()
            codes = initial_codes(self.spec, nnx.Rngs(params=jax.random.key(0) if key is None else key))
            start = {"codes": codes, "counts": jnp.ones(codes.shape[:2], codes.dtype), "sums": codes}
            start["steps"] = jnp.zeros((), jnp.int32)
        found: Any = numpyro.primitives.mutable(self.name + suffix, dict(start))
        return found


class Residual(Codebook):
    """Several codebooks."""


class FiniteScalar:
    def __init__(self, spec: specs.FiniteScalar, name: str):
        self.spec = spec

    def read(self) -> Array:
        return jnp.asarray(self.spec.table({}), jnp.result_type(float))

    def encode(self, outputs: Array) -> dist.Distribution:
        half, shift, offset, width = jnp.asarray(self.spec.bounds(), outputs.dtype)
        bounded = (jnp.tanh(outputs + shift) * half - offset) / width
        return quantize(bounded, self.read(), trained=False).posterior

    def commit(self) -> None:
        pass


def follow(spec: specs.Codebook, state: State, found: Quantization) -> State:
    """The moving averages after a step, dead codes revived."""
    residuals = found.residuals.reshape(-1, *found.residuals.shape[-2:])
    index, steps = found.index.reshape(-1, found.index.shape[-1]), state["steps"] + 1
    next_state = [
        _follow(spec, state["codes"][d], state["counts"][d], state["sums"][d], residuals[:, d], index[:, d], steps)
        for d in range(spec.depth)
    ]
    codes, counts, sums = (jnp.stack(each) for each in zip(*next_state, strict=True))
    return {"codes": codes, "counts": counts, "sums": sums, "steps": steps}


def _follow(
    spec: specs.Codebook, codes: Array, counts: Array, sums: Array, outputs: Array, index: Array, steps: Array
) -> tuple[Array, Array, Array]:
    """One codebook (K, D) after the outputs (n, D) at the codes ``index`` (n,)."""
    hits = jnp.zeros_like(counts).at[index].add(1.0)
    counts = spec.decay * counts + (1 - spec.decay) * hits
    sums = spec.decay * sums + (1 - spec.decay) * jnp.zeros_like(sums).at[index].add(outputs)
    used = hits > 0
    codes = jnp.where(used[:, None], sums / jnp.where(used, counts, 1.0)[:, None], codes)
    if not spec.revive:
        return codes, counts, sums
    num, dead = len(outputs), counts < spec.revive
    rank = jnp.cumsum(dead) - 1
    stride = jnp.maximum(num // jnp.maximum(dead.sum(), 1), 1)
    revived = (dead & (rank < num))[:, None]
    fresh = outputs[(rank * stride + steps % num * specs.WALK) % num]
    return (
        jnp.where(revived, fresh, codes),
        jnp.where(revived[:, 0], 1.0, counts),
        jnp.where(revived, fresh, sums),
    )


# --- distributions over codes -------------------------------------------------------------------------------------


class _Codes(constraints.Constraint):
    """Vectors from a finite set."""

    is_discrete = True
    event_dim = 1

    def __call__(self, x: Array) -> Array:
        return jnp.isfinite(x).all(-1)

    def feasible_like(self, prototype: Array) -> Array:
        return jnp.zeros_like(prototype)

    def tree_flatten(self):
        return (), ((), {})


class NearestCode(dist.Distribution):
    """Point masses at codes (..., D), whose draws carry a derivative of their own; with the errors of quantisation."""

    arg_constraints: ClassVar = {}
    reparametrized_params: ClassVar = []
    support = _Codes()
    pytree_data_fields = ("code", "codebook_error", "commitment_error")

    def __init__(
        self, code: Array, codebook_error: Array, commitment_error: Array, *, validate_args: bool | None = None
    ):
        self.code, self.codebook_error, self.commitment_error = code, codebook_error, commitment_error
        super().__init__(code.shape[:-1], code.shape[-1:], validate_args=validate_args)

    @property
    def quantisation_errors(self) -> tuple[tuple[str, Array], ...]:
        """``||sg(e) - c||^2`` and ``||e - sg(c)||^2``, of batch shape."""
        return ("codebook_error", self.codebook_error), ("commitment_error", self.commitment_error)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        return jnp.broadcast_to(self.code, sample_shape + self.code.shape)

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        return jnp.where(same(value, stop_gradient(self.code)), 0.0, -jnp.inf)


class UniformCodes(dist.Distribution):
    """A code of each of P depth codebooks with equal probabilities; batch shape (P depth,), event shape (D,)."""

    arg_constraints: ClassVar = {}
    support = _Codes()
    pytree_data_fields = ("codes",)

    def __init__(self, codes: Array, positions: int, *, validate_args: bool | None = None):
        self.codes = stop_gradient(codes)
        super().__init__((positions * len(codes),), codes.shape[-1:], validate_args=validate_args)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = (*sample_shape, -1, len(self.codes))
        index = jax.random.randint(key, sample_shape + self.batch_shape, 0, self.codes.shape[1]).reshape(shape)
        return look_up(self.codes, index)

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        _, inside = find(self.codes, value)
        return jnp.where(inside, -log(self.codes.shape[1]), -jnp.inf)


class AutoregressiveCodes(dist.Distribution):
    """A code of each codebook given the indices before it; batch shape () or the context's, event shape (P depth, D).

    ``logits`` maps indices (..., P depth) to the logits of each (..., P depth, K), which depend on those before it, and
    on the indices (*batch, n) of the context where there is one.
    """

    arg_constraints: ClassVar = {}
    support = constraints.independent(_Codes(), 1)
    pytree_data_fields = ("codes", "context")
    pytree_aux_fields = ("logits",)

    def __init__(
        self,
        codes: Array,
        positions: int,
        logits: Callable,
        context: Array | None = None,
        *,
        validate_args: bool | None = None,
    ):
        self.codes, self.logits, self.context = stop_gradient(codes), logits, context
        batch_shape = () if context is None else context.shape[:-1]
        super().__init__(batch_shape, (positions * len(codes), codes.shape[-1]), validate_args=validate_args)

    def _conditionals(self, index: Array) -> Array:
        return self.logits(index) if self.context is None else self.logits(index, self.context)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        shape, length = sample_shape + self.batch_shape, self.event_shape[0]
        noise = jax.random.gumbel(key, (*shape, length, self.codes.shape[1]), self.codes.dtype)

        def draw(i: Any, index: Array) -> Array:
            return index.at[..., i].set(jnp.argmax(self._conditionals(index)[..., i, :] + noise[..., i, :], -1))

        index = jax.lax.fori_loop(0, length, draw, jnp.zeros((*shape, length), int))
        return look_up(self.codes, index.reshape(*shape, -1, len(self.codes)))

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        index, inside = find(self.codes, value)
        each = jax.nn.log_softmax(self._conditionals(index))
        chosen = jnp.take_along_axis(each, index[..., None], -1)[..., 0]
        return jnp.where(inside.all(-1), chosen.sum(-1), -jnp.inf)


def indices(codes: Array, value: Array) -> Array:
    """Indices (..., P depth) of the codes (depth, K, D) that values (..., P depth, D) stand for."""
    return find(stop_gradient(codes), value)[0]


def look_up(codes: Array, index: Array) -> Array:
    """The codes (depth, K, D) at indices (..., P, depth), (..., P depth, D)."""
    values = codes[jnp.arange(len(codes)), index]
    return values.reshape(*index.shape[:-2], -1, codes.shape[-1])


def find(codes: Array, value: Array) -> tuple[Array, Array]:
    """Indices of values (..., P depth, D) and whether each is a code, (..., P depth)."""
    value = stop_gradient(value)
    split = value.reshape(*value.shape[:-2], -1, len(codes), value.shape[-1])
    index = nearest(split, codes)
    return index.reshape(value.shape[:-1]), same(value, look_up(codes, index))
