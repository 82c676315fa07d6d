"""Networks between flat data, or latents, and a distribution's parameters.

Each is a spec; its forms, ``<Name>Encoder`` and ``<Name>Decoder``, are in ``networks_pyro.py`` and
``networks_numpyro.py``. Pinned for both engines, whatever the libraries' defaults: weights Glorot-uniform,
``U(-a, a)`` with ``a = sqrt(6 / (fan_in + fan_out))``, fans times the kernel's area for a convolution (Glorot & Bengio
2010, eq. 16); biases zero. The last layer is linear and holds every output together.

Shapes: (..., num_inputs) -> (..., num_outputs), any leading dimensions (K particles, B batch).
"""

from __future__ import annotations

import dataclasses
from math import prod
from typing import ClassVar

import numpy as np

from elbozoo.inference.errors import must
from elbozoo.inference.parts import Part, one_of, positive, whole_number, whole_numbers

__all__ = ["ACTIVATIONS", "MLP", "NORMALIZATIONS", "Conv", "FullyConv", "Network"]

ACTIVATIONS = ("tanh", "relu", "leaky_relu", "elu", "gelu", "silu", "softplus")
"""Names both engines know, with one meaning: ``leaky_relu`` has slope 0.01, ``gelu`` is the exact one."""

NORMALIZATIONS = ("none", "layer")
"""No batch normalisation: under it a datum's bound depends on the others of its batch, so no bound is per datum."""


@dataclasses.dataclass(frozen=True)
class Network(Part):
    """An architecture for an encoder and its mirror image for a decoder."""

    stem: ClassVar[str] = "networks"

    def check_data_dim(self, data_dim: int) -> None:
        """Raise InvalidArgument if the network cannot read data of ``data_dim`` entries."""

    def pooled(self, mean: np.ndarray) -> np.ndarray:
        """``mean`` (data_dim,) of data, over the entries that share a bias of the decoder's last layer."""
        return mean

    @property
    def last_bias(self) -> str:
        """The name of the bias of the decoder's last layer, which holds every output together."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class MLP(Network):
    """Dense layers; the decoder has them in reverse order.

    Args:
        hidden: units of each hidden layer, next to the data first.
        activation: one of ``ACTIVATIONS``, after every hidden layer.
        normalization: "layer" standardises every hidden layer over its units before the activation, then scales and
            shifts it (weight 1 and bias 0 at first); "none" does not.
        output_gain: factor on the last layer's initial weights. Below 1 a tower of networks begins near its biases:
            scales near one, evidence near none.
        hidden_gain: factor on the hidden layers' initial weights. Near 0 every unit begins at the activation of 0,
            and what a network says of two data differs by no more than it has learned.

    Parameters: ``layers.<i>.weight`` (out, in), ``layers.<i>.bias`` (out,); ``norms.<i>.weight``, ``norms.<i>.bias``
    (units,) under layer normalisation.

    References: Ba, Kiros & Hinton 2016, Layer normalization, arXiv 1607.06450.

    Example:
        >>> MLP(hidden=[200, 200]).hidden
        (200, 200)
    """

    hidden: tuple[int, ...] = (200, 200)
    activation: str = "tanh"
    normalization: str = "none"
    output_gain: float = 1.0
    hidden_gain: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", whole_numbers("hidden", self.hidden))
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("normalization", self.normalization, NORMALIZATIONS)
        positive("output_gain", self.output_gain)
        positive("hidden_gain", self.hidden_gain)

    @property
    def last_bias(self) -> str:
        return f"layers.{len(self.hidden)}.bias"


@dataclasses.dataclass(frozen=True)
class _OfImages(Network):
    """A network of flat images, whose decoder ends in a convolution: one bias for all places of a channel."""

    image_shape: tuple[int, ...] = (1, 28, 28)

    def check_data_dim(self, data_dim: int) -> None:
        if prod(self.image_shape) != data_dim:
            raise must("image_shape", f"have data_dim={data_dim} entries", self.image_shape, "Change one of the two")

    def pooled(self, mean: np.ndarray) -> np.ndarray:
        return mean.reshape(self.image_shape[0], -1).mean(axis=1)


@dataclasses.dataclass(frozen=True)
class Conv(_OfImages):
    """Convolutions on flat images, each halving the height and width, then one dense hidden layer.

    Encoder: 3x3 convolutions of stride 2 and padding 1 to ``channels``, flattened in (channel, row, column) order,
    dense to ``hidden``, dense to the outputs. Decoder: the mirror image, where nearest-neighbour doubling and a 3x3
    convolution of padding 1 undo each stride (no transposed convolutions: no checkerboard); its last convolution gives
    ``num_outputs / (height width)`` channels, so two outputs an entry come as two image-sized blocks.

    Args:
        image_shape: (channels, height, width) of one datum, flattened in that order; height and width must be
            multiples of ``2 ** len(channels)``.
        channels: feature maps after each convolution, next to the data first.
        hidden: units of the dense hidden layer.
        activation: one of ``ACTIVATIONS``, after every layer but the last.

    Parameters: ``convs.<i>.weight`` (out, in, 3, 3), ``convs.<i>.bias``, ``layers.<i>.weight`` (out, in),
    ``layers.<i>.bias``.

    References: Odena, Dumoulin & Olah 2016, Deconvolution and checkerboard artifacts, doi 10.23915/distill.00003.

    Example:
        >>> Conv(image_shape=(1, 28, 28)).reduced_shape
        (64, 7, 7)
    """

    channels: tuple[int, ...] = (32, 64)
    hidden: int = 256
    activation: str = "relu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_shape", whole_numbers("image_shape", self.image_shape, 3))
        object.__setattr__(self, "channels", whole_numbers("channels", self.channels))
        whole_number("hidden", self.hidden)
        one_of("activation", self.activation, ACTIVATIONS)
        factor = 2 ** len(self.channels)
        if not self.channels or self.image_shape[1] % factor or self.image_shape[2] % factor:
            condition = f"have at least one entry and a height and width that {self.channels} can halve"
            raise must("channels", condition, self.image_shape, f"Use fewer channels, or pad to multiples of {factor}")

    @property
    def reduced_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) after the encoder's last convolution."""
        factor = 2 ** len(self.channels)
        return self.channels[-1], self.image_shape[1] // factor, self.image_shape[2] // factor

    @property
    def last_bias(self) -> str:
        return f"convs.{len(self.channels) - 1}.bias"


@dataclasses.dataclass(frozen=True)
class FullyConv(_OfImages):
    """Convolutions alone: the encoder's outputs, and the decoder's inputs, are a vector at each place of a small map.

    Encoder: 3x3 convolutions of stride 2 and padding 1 to ``channels``, then one of stride 1 to the vectors. Decoder: a
    3x3 convolution of the vectors to ``channels[-1]``, then the mirror image as in :class:`Conv`. Outputs and inputs
    are flat in (row, column, vector) order, and as many as a multiple of the places.

    Args:
        image_shape: (channels, height, width) of one datum, as in :class:`Conv`.
        channels: feature maps after each halving, next to the data first.
        activation: one of ``ACTIVATIONS``, after every layer but the last.

    Parameters: ``convs.<i>.weight`` (out, in, 3, 3), ``convs.<i>.bias``.

    Raises: InvalidArgument; for outputs that the places do not divide, when a program is built.

    Example:
        >>> FullyConv(image_shape=(1, 28, 28)).positions
        49
    """

    channels: tuple[int, ...] = (64, 128)
    activation: str = "relu"

    def __post_init__(self) -> None:
        same = Conv(self.image_shape, self.channels, activation=self.activation)  # and it has the same conditions
        object.__setattr__(self, "image_shape", same.image_shape)
        object.__setattr__(self, "channels", same.channels)

    @property
    def map_shape(self) -> tuple[int, int]:
        """Height and width of the smallest map."""
        factor = 2 ** len(self.channels)
        return self.image_shape[1] // factor, self.image_shape[2] // factor

    @property
    def positions(self) -> int:
        """Places of the smallest map."""
        return prod(self.map_shape)

    def vector_dim(self, size: int) -> int:
        """Entries of each place's vector, of ``size`` in all, refused where the places do not divide them."""
        if size % self.positions:
            todo = "Pass latents that the places divide, or other channels"
            condition = f"be a multiple of its {self.positions} places"
            raise must("the latents of a FullyConv network", condition, size, todo)
        return size // self.positions

    @property
    def last_bias(self) -> str:
        return f"convs.{len(self.channels)}.bias"
