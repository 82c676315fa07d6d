"""A group of residual stochastic blocks in JAX: its weights, and its latents as one distribution.

Feature maps are (N, height, width, channels) inside; latents are (…, blocks, channels, height, width), as in torch.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from flax import nnx
from jax import Array
from numpyro.distributions import constraints
from numpyro.distributions.kl import kl_divergence
from numpyro.distributions.util import validate_sample

from elbozoo.zoo.networks.networks_numpyro import Convs, Weights, convolve

# --- weights --------------------------------------------------------------------------------------------------------


class Residuals(nnx.Module):
    """The weights of ``count`` equal networks of three convolutions; ``gain`` is the last one's."""

    def __init__(self, count: int, num_inputs: int, hidden: int, num_outputs: int, gain: float, rngs: nnx.Rngs):
        sizes = ((num_inputs, hidden, 1, 1.0), (hidden, hidden, 3, 1.0), (hidden, num_outputs, 1, gain))
        self.layers = nnx.List([Convs(count, *each, rngs) for each in sizes])


def residual(net: Weights, x: Array) -> Array:
    """One network of three convolutions, a silu before each."""
    for layer in range(3):
        x = convolve(net["layers"][layer], jax.nn.silu(x))
    return x


def repeat(block: Callable, state: Any, xs: Any, count: int, remat: bool) -> tuple[Any, Any]:
    """``scan`` over ``count`` blocks; with ``remat`` in two levels, each of about the root of so many."""
    if not remat:
        # Kept are the products alone: what goes into them, nine shifted copies for a convolution of 3×3, is made anew.
        products = jax.checkpoint_policies.dots_saveable
        return jax.lax.scan(jax.checkpoint(block, prevent_cse=False, policy=products), state, xs)
    inner = next(size for size in range(isqrt(count), 0, -1) if count % size == 0)
    once = jax.checkpoint(block, prevent_cse=False)
    chunk = jax.checkpoint(lambda state, xs: jax.lax.scan(once, state, xs), prevent_cse=False)
    xs = jax.tree.map(lambda x: x.reshape(count // inner, inner, *x.shape[1:]), xs)
    state, ys = jax.lax.scan(chunk, state, xs)
    return state, jax.tree.map(lambda y: y.reshape(count, *y.shape[2:]), ys)


# --- the distribution -----------------------------------------------------------------------------------------------


class Path(NamedTuple):
    """The blocks' latents, the locations and log scales they have given those above, and the state below the last."""

    value: Array
    loc: Array
    log_scale: Array
    state: Array


class Layers(dist.Distribution):
    r"""The latents of a group of blocks, each given those before it; the spec has the mathematics.

    Batch shape (…, blocks): ``log_prob`` has a term a block. ``to_event(1)`` makes it a joint distribution.

    Args:
        blocks: weights of the generative blocks, stacked.
        state: of the path above, (…, height, width, width).
        posterior, features: of a guide: its networks' weights, stacked, and the encoder's features of x.
        remat: compute the path anew in the backward pass.
    """

    arg_constraints: ClassVar = {}
    support = constraints.independent(constraints.real, 3)
    pytree_data_fields = ("blocks", "start", "posterior", "features")
    pytree_aux_fields = ("remat",)
    drawn: Array | None = None
    path_of: tuple[Any, Path | None] = None, None  # the last value and its path

    def __init__(
        self,
        blocks: Weights,
        state: Array,
        posterior: Weights | None = None,
        features: Array | None = None,
        remat: bool = False,
        *,
        validate_args: bool | None = None,
    ):
        self.blocks, self.start, self.posterior, self.features, self.remat = blocks, state, posterior, features, remat
        count, _, channels = blocks["project"]["weight"].shape[:3]
        lead = jnp.broadcast_shapes(*(a.shape[:-3] for a in (state, features) if a is not None))
        event_shape = (channels, *state.shape[-3:-1])
        super().__init__((*lead, count), event_shape, validate_args=validate_args)

    def _run(self, latents: Array, draw: bool) -> Path:
        """Down the path with these latents (…, blocks, *event), or with latents made of such noise."""
        lead, count = latents.shape[:-4], latents.shape[-4]
        flat = jnp.moveaxis(latents.reshape(-1, *latents.shape[-4:]), (1, 2), (0, -1))

        def spread(x: Array) -> Array:
            return jnp.broadcast_to(x, (*lead, *x.shape[-3:])).reshape(-1, *x.shape[-3:])

        features = None if self.features is None else spread(self.features)

        def block(state: Array, each: tuple) -> tuple[Array, tuple]:
            generative, posterior, latent = each
            width, channels = state.shape[-1], latent.shape[-1]
            shift, loc, log_scale = jnp.split(residual(generative["prior"], state), [width, width + channels], axis=-1)
            if features is not None:
                moved = residual(posterior, jnp.concatenate([state, features], axis=-1))
                loc, log_scale = loc + moved[..., :channels], log_scale + moved[..., channels:]
            if draw:
                latent = loc + jnp.exp(log_scale) * latent
            state = state + shift + convolve(generative["project"], latent)
            return state + residual(generative["residual"], state), (latent, loc, log_scale)

        xs = (self.blocks, self.posterior, flat)
        state, each = repeat(block, spread(self.start), xs, count, self.remat)
        value, loc, log_scale = (jnp.moveaxis(x, (0, -1), (1, 2)).reshape(latents.shape) for x in each)
        return Path(value, loc, log_scale, state.reshape(*lead, *state.shape[1:]))

    def path(self, value: Array) -> Path:
        """Down the path with the latents ``value``; what was last drawn or asked for is at hand."""
        if self.path_of[0] is not value:
            self.path_of = value, self._run(value, draw=False)._replace(value=value)
        assert self.path_of[1] is not None
        return self.path_of[1]

    def state(self, value: Array) -> Array:
        """The state below the last block, (…, height, width, width)."""
        return self.path(value).state

    def sample(self, key: Array | None, sample_shape: tuple[int, ...] = ()) -> Array:
        dtype = jnp.result_type(self.start)
        noise = jax.random.normal(key, sample_shape + self.batch_shape + self.event_shape, dtype)
        path = self._run(noise, draw=True)
        self.drawn, self.path_of = path.value, (path.value, path)
        return path.value

    @validate_sample
    def log_prob(self, value: Array) -> Array:
        path = self.path(value)
        return dist.Normal(path.loc, jnp.exp(path.log_scale)).log_prob(value).sum((-3, -2, -1))


@kl_divergence.register(Layers, Layers)
def kl_of_layers(q: Layers, p: Layers) -> Array:
    """The KL of each block given the blocks above as ``q`` drew them, (…, blocks).

    Raises: NotImplementedError unless ``p`` was last asked for its path at what ``q`` drew.
    """
    if q.drawn is None or p.path_of[0] is not q.drawn:
        raise NotImplementedError
    one, two = q.path(q.drawn), p.path(q.drawn)
    ends = (dist.Normal(path.loc, jnp.exp(path.log_scale)) for path in (one, two))
    return kl_divergence(*ends).sum((-3, -2, -1))
