"""The network of the autoregressive prior over indices, in flax.nnx."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn import gelu

from elbozoo.zoo.networks.networks_numpyro import LayerNorm, linear
from elbozoo.zoo.vqvae import HEADS, CodePriorSizes


class CodePrior(nnx.Module):
    """Indices (..., L), and a context of (..., L'), to the logits of each given the context and those before it.

    The context stands in front of the sequence, every position sees all of it, and the logits are (..., L, num_codes).
    """

    def __init__(self, sizes: CodePriorSizes, rngs: nnx.Rngs):
        self.sizes = sizes
        width, scale = sizes.width, sizes.width**-0.5
        self.embedding = nnx.Param(scale * jax.random.normal(rngs.params(), (sizes.num_codes, width)))
        positions = sizes.context_length + sizes.length
        self.positions = nnx.Param(scale * jax.random.normal(rngs.params(), (positions, width)))
        self.start = nnx.Param(scale * jax.random.normal(rngs.params(), (width,)))
        if sizes.context_length:
            self.context = nnx.Param(scale * jax.random.normal(rngs.params(), (sizes.context_codes, width)))
        self.blocks = nnx.List([Block(sizes, rngs) for _ in range(sizes.layers)])
        self.norm = LayerNorm(width)
        self.head = linear(width, sizes.num_codes, rngs)
        self.head.kernel[...] = jnp.zeros_like(self.head.kernel[...])

    def __call__(self, index: Array, context: Array | None = None) -> Array:
        before = self.embedding[...][index[..., :-1]]
        start = jnp.broadcast_to(self.start[...], (*before.shape[:-2], 1, before.shape[-1]))
        parts = [start, before]
        if context is not None:
            first = self.context[...][context]
            leading = jnp.broadcast_shapes(first.shape[:-2], before.shape[:-2])
            parts = [jnp.broadcast_to(part, (*leading, *part.shape[-2:])) for part in (first, *parts)]
        x = jnp.concatenate(parts, -2) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[..., self.sizes.context_length :, :]))


class Block(nnx.Module):
    """Attention to the context and what came before, then two dense layers, each on a residual path."""

    def __init__(self, sizes: CodePriorSizes, rngs: nnx.Rngs):
        self.visible, width = sizes.visible(), sizes.width
        self.norm1, self.norm2 = LayerNorm(width), LayerNorm(width)
        self.attention, self.output = linear(width, 3 * width, rngs), linear(width, width, rngs)
        self.up, self.down = linear(width, 4 * width, rngs), linear(4 * width, width, rngs)

    def __call__(self, x: Array) -> Array:
        x = x + self.output(self.attend(self.norm1(x)))
        return x + self.down(gelu(self.up(self.norm2(x)), approximate=False))

    def attend(self, x: Array) -> Array:
        width = x.shape[-1]
        split = self.attention(x).reshape(*x.shape[:-1], 3, HEADS, width // HEADS)
        query, key, value = jnp.moveaxis(split, -3, 0)
        scores = jnp.einsum("...ihd,...jhd->...hij", query, key) * (width // HEADS) ** -0.5
        weights = jax.nn.softmax(jnp.where(self.visible, scores, -jnp.inf))
        return jnp.einsum("...hij,...jhd->...ihd", weights, value).reshape(x.shape)
