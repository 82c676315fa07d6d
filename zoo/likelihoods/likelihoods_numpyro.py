"""The likelihoods in NumPyro: decoder outputs in, distributions of x out."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax import Array
from jax.nn import log_sigmoid
from numpyro.distributions import constraints
from numpyro.distributions.util import validate_sample

from elbozoo.zoo import likelihoods as specs
from elbozoo.zoo.networks.networks_numpyro import linear


class Bernoulli(nnx.Module):
    def __init__(self, spec: specs.Bernoulli, rngs: nnx.Rngs):
        pass

    def __call__(self, outputs: Array) -> dist.Distribution:
        return dist.Bernoulli(logits=outputs).to_event(1)


class AutoregressiveBernoulli(nnx.Module):
    def __init__(self, spec: specs.AutoregressiveBernoulli, rngs: nnx.Rngs):
        self.spec = spec
        self.autoregression = nnx.Param(jnp.zeros((spec.data_dim, spec.data_dim)))
        if spec.masked_units:
            self.hidden = linear(spec.data_dim, spec.masked_units, rngs)
            self.readout = linear(spec.masked_units, spec.data_dim, rngs, bias=False)

    def __call__(self, outputs: Array) -> dist.Distribution:
        direct = jnp.tril(self.autoregression[...], -1)
        if not self.spec.masked_units:
            return AutoregressiveLogits(outputs, direct)
        sees, seen = self.spec.masks()
        assert self.hidden.bias is not None
        hidden, readout = self.hidden.kernel[...].T * sees, self.readout.kernel[...].T * seen
        return AutoregressiveLogits(outputs, direct, hidden, self.hidden.bias[...], readout)


class ContinuousBernoulli(nnx.Module):
    def __init__(self, spec: specs.ContinuousBernoulli, rngs: nnx.Rngs):
        pass

    def __call__(self, outputs: Array) -> dist.Distribution:
        return ContinuousBernoulliLogits(outputs).to_event(1)


class Gaussian(nnx.Module):
    def __init__(self, spec: specs.Gaussian, rngs: nnx.Rngs):
        self.scale = spec.scale
        if spec.scale == "learned":
            self.log_scale = nnx.Param(jnp.zeros(()))

    def __call__(self, outputs: Array) -> dist.Distribution:
        if self.scale == "pixel":
            loc, log_scale = jnp.split(outputs, 2, -1)
            return dist.Normal(loc, jnp.exp(log_scale)).to_event(1)
        scale = jnp.exp(self.log_scale[...]) if self.scale == "learned" else self.scale
        return dist.Normal(outputs, scale).to_event(1)


class DiscretizedLogistic(nnx.Module):
    def __init__(self, spec: specs.DiscretizedLogistic, rngs: nnx.Rngs):
        self.levels = spec.levels

    def __call__(self, outputs: Array) -> dist.Distribution:
        loc, log_scale = jnp.split(outputs, 2, -1)
        return LogisticLevels(loc, log_scale, self.levels).to_event(1)


class AutoregressiveLogits(dist.Distribution):
    """Binary vectors, each entry given those before it; the spec has the mathematics, the matrices are masked here."""

    arg_constraints: ClassVar = {"logits": constraints.real_vector}
    support = constraints.independent(constraints.boolean, 1)
    pytree_data_fields = ("direct", "hidden", "bias", "readout")

    def __init__(
        self,
        logits: Array,
        direct: Array,
        hidden: Array | None = None,
        bias: Array | None = None,
        readout: Array | None = None,
        *,
        validate_args: bool | None = None,
    ):
        self.logits, self.direct, size = logits, direct, jnp.shape(logits)[-1]
        self.hidden = jnp.zeros((0, size), direct.dtype) if hidden is None else hidden  # no hidden unit: no row
        self.bias = jnp.zeros(0, direct.dtype) if bias is None else bias
        self.readout = jnp.zeros((size, 0), direct.dtype) if readout is None else readout
        super().__init__(jnp.shape(logits)[:-1], jnp.shape(logits)[-1:], validate_args=validate_args)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        shape = sample_shape + self.batch_shape + self.event_shape
        logits, dtype = jnp.broadcast_to(self.logits, shape), jnp.result_type(self.logits)
        noise = jax.random.logistic(key, shape, dtype)  # s(a) is how often it lies below a

        def draw(i, state):
            x, total = state
            conditional = logits[..., i] + x @ self.direct[i] + jnp.tanh(total) @ self.readout[i]
            entry = (noise[..., i] < conditional).astype(dtype)
            return x.at[..., i].set(entry), total + entry[..., None] * self.hidden[:, i]

        start = jnp.zeros(shape, dtype), jnp.broadcast_to(self.bias, (*shape[:-1], len(self.bias)))
        return jax.lax.fori_loop(0, shape[-1], draw, start)[0]

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        hidden = jnp.tanh(value @ self.hidden.T + self.bias)
        conditional = self.logits + (value @ self.direct.T + hidden @ self.readout.T)
        return log_sigmoid((2 * value - 1) * conditional).sum(-1)


class ContinuousBernoulliLogits(dist.Distribution):
    """The continuous Bernoulli by its logits; the spec's docstring has the mathematics."""

    arg_constraints: ClassVar = {"logits": constraints.real}
    support = constraints.unit_interval
    reparametrized_params: ClassVar = ["logits"]

    def __init__(self, logits: Array, *, validate_args: bool | None = None):
        self.logits = logits
        super().__init__(batch_shape=jnp.shape(logits), validate_args=validate_args)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        # The inverse of F(x) = expm1(l x) / expm1(l), at -|l| so that nothing overflows, mirrored where l > 0.
        logits, shape = self.logits, sample_shape + self.batch_shape
        uniform = jax.random.uniform(key, shape, jnp.result_type(logits))
        flat = jnp.abs(logits) < 1e-3
        rate = jnp.where(flat, -1.0, -jnp.abs(logits))
        below = jnp.log1p(jnp.where(logits > 0, 1 - uniform, uniform) * jnp.expm1(rate)) / rate
        curved = jnp.where(logits > 0, 1 - below, below)
        return jnp.where(flat, uniform + logits * uniform * (1 - uniform) / 2, curved).clip(0.0, 1.0)

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        u = jnp.abs(self.logits) / 2
        near = u < 0.1
        far = jnp.where(near, 1.0, u)  # keeps the branch not taken from giving NaN gradients
        exact = far + jnp.log(-jnp.expm1(-2 * far)) - jnp.log(2 * far)
        square = jnp.where(near, u, 0.0) ** 2
        series = square / 6 - square**2 / 180 + square**3 / 2835 - square**4 / 37800
        return self.logits * (value - 0.5) - jnp.where(near, series, exact)

    @property
    def mean(self) -> Array:
        u = self.logits / 2
        near = jnp.abs(u) < 0.1
        far = jnp.where(near, 1.0, u)
        series = u / 3 - u**3 / 45 + 2 * u**5 / 945 - u**7 / 4725
        return 0.5 + jnp.where(near, series, 1 / jnp.tanh(far) - 1 / far) / 2

    @property
    def variance(self) -> Array:
        u = jnp.abs(self.logits) / 2
        near = u < 0.1
        far = jnp.where(near, 1.0, u)
        csch_squared = 4 * jnp.exp(-2 * far) / jnp.expm1(-2 * far) ** 2
        series = 1 / 3 - u**2 / 15 + 2 * u**4 / 189 - u**6 / 675
        return jnp.where(near, series, 1 / far**2 - csch_squared) / 4


class LogisticLevels(dist.Distribution):
    """A logistic distribution's mass on each of ``levels`` values in [0, 1]; the spec has the mathematics."""

    arg_constraints: ClassVar = {"loc": constraints.real, "log_scale": constraints.real}
    pytree_aux_fields = ("levels",)

    def __init__(self, loc: Array, log_scale: Array, levels: int = 256, *, validate_args: bool | None = None):
        self.loc, self.log_scale = jnp.broadcast_arrays(loc, log_scale)
        self.levels = levels
        super().__init__(batch_shape=self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self):
        return _Levels(self.levels)

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        noise = jax.random.logistic(key, sample_shape + self.batch_shape, jnp.result_type(self.loc))
        value = self.loc + jnp.exp(self.log_scale) * noise
        return jnp.round(value.clip(0.0, 1.0) * (self.levels - 1)) / (self.levels - 1)

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        half = 0.5 / (self.levels - 1)
        precision = jnp.exp(-self.log_scale)
        below = log_sigmoid((value + half - self.loc) * precision)
        above = log_sigmoid((self.loc - value + half) * precision)
        inner = below + above + jnp.log(-jnp.expm1(-2 * half * precision))
        return jnp.where(value < half, below, jnp.where(value > 1 - half, above, inner))

    @property
    def mean(self) -> Array:
        # E[k] is the sum over k >= 1 of P(level >= k); level by level, so that memory does not grow with levels.
        precision, steps = jnp.exp(-self.log_scale), self.levels - 1

        def add(k, total):
            return total + jax.nn.sigmoid((self.loc - (k - 0.5) / steps) * precision)

        return jax.lax.fori_loop(1, self.levels, add, jnp.zeros_like(self.loc)) / steps

    @property
    def variance(self) -> Array:
        precision, steps = jnp.exp(-self.log_scale), self.levels - 1

        def add(k, total):
            return total + (2 * k - 1) * jax.nn.sigmoid((self.loc - (k - 0.5) / steps) * precision)

        return jax.lax.fori_loop(1, self.levels, add, jnp.zeros_like(self.loc)) / steps**2 - self.mean**2


class _Levels(constraints.Constraint):
    """Multiples of 1 / (levels - 1) in [0, 1]."""

    is_discrete = True

    def __init__(self, levels: int):
        self.levels = levels

    def __call__(self, x: Array) -> Array:
        steps = x * (self.levels - 1)
        return (x >= 0) & (x <= 1) & (jnp.abs(steps - jnp.round(steps)) <= specs.LEVEL_TOLERANCE)

    def feasible_like(self, prototype: Array) -> Array:
        return jnp.zeros_like(prototype)

    def tree_flatten(self):
        return (), ((), {"levels": self.levels})
