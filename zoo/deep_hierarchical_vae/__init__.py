"""The very deep hierarchical variational autoencoder: tens of layers of latent feature maps, from coarse to fine."""

from __future__ import annotations

import dataclasses
from math import prod
from typing import Any

from elbozoo.inference.errors import must
from elbozoo.inference.parts import instance_of, whole_number, whole_numbers
from elbozoo.zoo.likelihoods import DiscretizedLogistic, Likelihood
from elbozoo.zoo.spec import Spec, check_shape

__all__ = ["DeepHierarchicalVAE"]


@dataclasses.dataclass(frozen=True)
class DeepHierarchicalVAE(Spec):
    r"""A hierarchy of stochastic layers along one residual, top-down path of feature maps.

    The path's state ``h`` starts at the parameter ``start``; before each finer resolution every position is doubled
    in height and width. At block l, with ``r, p, u, g`` small residual networks and ``W`` a linear map per position,

    .. math::
        (d, \mu_p, \log\sigma_p) = p_l(h), \quad z_l \sim N(\mu_p, \sigma_p^2), \quad
        h' = h + d + W_l z_l, \quad h \leftarrow h' + r_l(h').

    The data are ``x | z ~ likelihood(output(silu(h)))``. The guide goes down the same path, with the same parameters,
    and moves each layer's prior by what the encoder's features ``a`` of x at that resolution say:

    .. math::
        (\Delta\mu, \Delta\log\sigma) = u_l(h, a), \quad
        z_l \mid z_{>l}, x \sim N(\mu_p + \Delta\mu, (\sigma_p e^{\Delta\log\sigma})^2).

    Sites: one a resolution, each a group of equal blocks: ``z1`` at the finest, next to the data, to ``zG`` at the
    coarsest; observed ``x``, event shape (data_dim,); plate ``data`` at dim -1. Along the first event dim of a site
    are its blocks, the first to be drawn first, and the terms of its log densities "per dimension" are those of the
    blocks given all above: nats a layer, in ``FreeBits(per="dimension")`` and wherever the rate is told apart. Used as
    an analytic KL, a site's rate is the KL of each layer in closed form, given the layers above that were drawn.

    Shapes: x (B, data_dim); zg (B, n, latent_channels, H, W) with n blocks on H x W positions; (K, B, …) under an
    outer plate of particles. The finest resolution has one position for every ``patch`` x ``patch`` pixels.

    Parameters: ``generator.*`` (model and guide), ``encoder.*`` (guide), ``likelihood.*`` where there are any.
    The weights of a group's blocks lie in one array whose first axis counts the blocks; groups count from the coarsest.
    Networks are 1x1, 3x3 and 1x1 convolutions over ``hidden`` channels, each after a silu; ``output`` and
    ``encoder.input`` are 3x3. The encoder reads ``2 x - 1``, has as many residual blocks at each resolution as there
    are layers, and halves by means over 2 x 2 positions. Initial weights are Glorot-uniform and biases zero, but: the
    last layer of each p is 0, so that the prior starts as N(0, I); W and the last layers of r, of u and of the
    encoder's blocks are divided by the root of the number of layers in all; ``start`` is 0.

    Args:
        image_shape: (channels, height, width) of one datum, flattened in that order.
        patch: height and width in pixels of the finest resolution's positions.
        width: channels of the path's state.
        hidden: channels inside the residual networks.
        latent_channels: of each layer's latent map.
        blocks: number of stochastic layers at each resolution, from the coarsest; each next one is twice as fine.
        likelihood: family of x given z.
        remat: compute the path anew in the backward pass, in two levels, instead of keeping it: memory grows as the
            root of the number of blocks of a group (NumPyro; in Pyro, block by block, less), for about one more
            forward pass.

    Limits: one block of one resolution is a convolutional VAE with a learned prior. In NumPyro a group is one ``scan``,
    so compile time does not grow with depth; in Pyro it is a loop. Model and guide each run the path: what the guide
    worked out is not handed on. Scales are not bounded: train with ``Adam(skip_norm=…)``.

    References:
        Child 2021, Very deep VAEs, arXiv 2011.10650, section 3 (the path, its initial weights); Vahdat & Kautz 2020,
        NVAE, arXiv 2007.03898, section 3.2, eq. 2 (the guide relative to the prior); Chen et al. 2016, Training deep
        nets with sublinear memory cost, arXiv 1604.06174 (remat).

    Example:
        >>> spec = DeepHierarchicalVAE(image_shape=(1, 28, 28), blocks=(2, 3))
        >>> spec.shapes
        {'z2': (2, 4, 7, 7), 'z1': (3, 4, 14, 14)}
    """

    image_shape: tuple[int, ...] = (1, 28, 28)
    patch: int = 2
    width: int = 32
    hidden: int = 16
    latent_channels: int = 4
    blocks: tuple[int, ...] = (4, 4)
    likelihood: Likelihood = dataclasses.field(default_factory=DiscretizedLogistic)
    remat: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_shape", whole_numbers("image_shape", self.image_shape, 3))
        object.__setattr__(self, "blocks", whole_numbers("blocks", self.blocks))
        for name in ("patch", "width", "hidden", "latent_channels"):
            whole_number(name, getattr(self, name))
        instance_of("likelihood", self.likelihood, Likelihood)
        instance_of("remat", self.remat, bool)
        if not self.blocks:
            raise must("blocks", "have an entry for at least one resolution", self.blocks, "Pass blocks=(4, 4), say")
        factor = self.patch * 2 ** (len(self.blocks) - 1)
        if self.image_shape[1] % factor or self.image_shape[2] % factor:
            condition = f"have a height and width that are multiples of {factor} = patch * 2^{len(self.blocks) - 1}"
            todo = "Use fewer resolutions or another patch, or pad the images"
            raise must("image_shape", condition, self.image_shape, todo)
        self.likelihood.check_data_dim(self.data_dim)

    @property
    def data_dim(self) -> int:
        """Entries of one datum, flat."""
        return prod(self.image_shape)

    @property
    def shapes(self) -> dict[str, tuple[int, int, int, int]]:
        """The event shape (blocks, latent channels, height, width) of each latent site, from the coarsest."""
        count = len(self.blocks)
        sizes = [[side // (self.patch * 2**up) for side in self.image_shape[1:]] for up in range(count)]
        return {
            f"z{up + 1}": (self.blocks[count - 1 - up], self.latent_channels, *sizes[up])
            for up in reversed(range(count))
        }

    def check(self, x: Any) -> None:
        self.likelihood.check(check_shape(x, self.data_dim))
