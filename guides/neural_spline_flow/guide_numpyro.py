"""The neural spline flow in NumPyro: encoder outputs in, a distribution of z out."""

from __future__ import annotations

from functools import partial
from math import log

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from flax import nnx
from flowjax.bijections import RationalQuadraticSpline
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.transforms import AffineTransform, Transform

from elbozoo.guides import neural_spline_flow as specs
from elbozoo.guides.masked_network_numpyro import MaskedNetwork


class NeuralSplineFlow(nnx.Module):
    def __init__(self, spec: specs.NeuralSplineFlow, latent_dim: int, rngs: nnx.Rngs):
        self.spec, self.latent_dim = spec, latent_dim
        masks = [spec.masks(latent_dim, t) for t in range(spec.num_flows)]
        self.flows = nnx.List([MaskedNetwork(mask, spec.context_dim, rngs) for mask in masks])

    def __call__(self, outputs: Array) -> dist.Distribution:
        loc, log_scale, context = jnp.split(outputs, (self.latent_dim, 2 * self.latent_dim), -1)
        standard = dist.Normal(jnp.zeros_like(loc), 1.0).to_event(1)
        couplings = [self.coupling(t, context) for t in range(self.spec.num_flows)]
        place = AffineTransform(loc, jnp.exp(log_scale))
        return dist.TransformedDistribution(standard, [*couplings, place])

    def coupling(self, t: int, context: Array) -> Coupling:
        """The map t."""
        stay, move = self.spec.halves(self.latent_dim, t)
        network, bins = self.flows[t](context, self.spec.masks(self.latent_dim, t)), self.spec.num_bins

        def spline(z: Array) -> Splines:
            knots = network(z)
            knots = knots.reshape(*knots.shape[:-1], len(move), -1)
            parameters = jnp.split(knots, (bins, 2 * bins), -1)
            return Splines(*parameters, bound=self.spec.bound, slope=specs.MIN_SLOPE)

        return Coupling(spline, stay, move)


class Coupling(Transform):
    """Some entries stay, the others move by splines that depend on those; a draw's log slope is kept."""

    domain = codomain = constraints.real_vector

    def __init__(self, spline, stay: np.ndarray, move: np.ndarray):
        self.spline, self.stay, self.move = spline, stay, move
        self.back = np.argsort(np.concatenate([stay, move]))

    def __call__(self, x: Array) -> Array:
        return self.call_with_intermediates(x)[0]

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        moved, log_slope = self.spline(x).forward(x[..., self.move])
        return self.join(x, moved), log_slope.sum(-1)

    def _inverse(self, y: Array) -> Array:
        return self.join(y, self.spline(y).inverse(y[..., self.move]))

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: Array | None = None) -> Array:
        return self.call_with_intermediates(x)[1] if intermediates is None else intermediates

    def join(self, x: Array, moved: Array) -> Array:
        """``x`` with its other entries replaced."""
        return jnp.concatenate([x[..., self.stay], moved], -1)[..., self.back]

    def tree_flatten(self):
        return (), ((), {"spline": self.spline, "stay": self.stay, "move": self.move, "back": self.back})


class Splines:
    """Monotonic splines of many scalars, with zuko's knots and flowjax's formulas."""

    def __init__(self, widths: Array, heights: Array, slopes: Array, bound: float, slope: float):
        def soft(factor: float, x: Array) -> Array:
            return x / (1 + abs(factor * x / log(slope)))

        def positions(x: Array) -> Array:
            ends = jnp.cumsum(jax.nn.softmax(soft(2.0, x)), -1)
            return bound * (2 * jnp.concatenate([jnp.zeros_like(ends[..., :1]), ends], -1) - 1)

        ends = [(0, 0)] * (slopes.ndim - 1) + [(1, 1)]
        self.bound = bound
        self.knots = positions(widths), positions(heights), jnp.exp(jnp.pad(soft(1.0, slopes), ends))

    def forward(self, x: Array) -> tuple[Array, Array]:
        """Values and log slopes at ``x``."""
        return self._each("transform_and_log_det", x)

    def inverse(self, y: Array) -> Array:
        """Where the values are ``y``."""
        return self._each("inverse_and_log_det", y)[0]

    def _each(self, method: str, x: Array) -> tuple[Array, Array]:
        at_rest = RationalQuadraticSpline(knots=self.knots[0].shape[-1] - 2, interval=self.bound)

        @partial(jnp.vectorize, signature="(),(k),(k),(k)->(),()")
        def one(x: Array, *knots: Array) -> tuple[Array, Array]:
            spline = eqx.tree_at(lambda s: (s.x_pos, s.y_pos, s.derivatives), at_rest, knots)
            return getattr(spline, method)(x)

        return one(x, *self.knots)
