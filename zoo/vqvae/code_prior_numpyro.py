"""The network of the autoregressive prior over indices, in flax.nnx."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn import gelu

from elbozoo.zoo.networks.networks_numpyro import LayerNorm, linear
from elbozoo.zoo.vqvae import HEADS, VQVAE


class CodePrior(nnx.Module):
    """Indices (..., L) to the logits of each given those before it, (..., L, num_codes)."""

    def __init__(self, spec: VQVAE, rngs: nnx.Rngs):
        width, scale = spec.prior_width, spec.prior_width**-0.5
        self.embedding = nnx.Param(scale * jax.random.normal(rngs.params(), (spec.quantizer.num_codes, width)))
        self.positions = nnx.Param(scale * jax.random.normal(rngs.params(), (spec.num_indices, width)))
        self.start = nnx.Param(scale * jax.random.normal(rngs.params(), (width,)))
        self.blocks = nnx.List([Block(width, rngs) for _ in range(spec.prior_layers)])
        self.norm = LayerNorm(width)
        self.head = linear(width, spec.quantizer.num_codes, rngs)
        self.head.kernel[...] = jnp.zeros_like(self.head.kernel[...])

    def __call__(self, index: Array) -> Array:
        before = self.embedding[...][index[..., :-1]]
        start = jnp.broadcast_to(self.start[...], (*before.shape[:-2], 1, before.shape[-1]))
        x = jnp.concatenate([start, before], -2) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Block(nnx.Module):
    """Attention to what came before, then two dense layers, each on a residual path."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attention, self.output = linear(width, 3 * width, rngs), linear(width, width, rngs)
        self.up, self.down = linear(width, 4 * width, rngs), linear(4 * width, width, rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.output(self.attend(self.norm1(x)))
        return x + self.down(gelu(self.up(self.norm2(x)), approximate=False))

    def attend(self, x: Array) -> Array:
        length, width = x.shape[-2:]
        split = self.attention(x).reshape(*x.shape[:-1], 3, HEADS, width // HEADS)
        query, key, value = jnp.moveaxis(split, -3, 0)
        scores = jnp.einsum("...ihd,...jhd->...hij", query, key) * (width // HEADS) ** -0.5
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((length, length), bool)), scores, -jnp.inf))
        return jnp.einsum("...hij,...jhd->...ihd", weights, value).reshape(x.shape)
