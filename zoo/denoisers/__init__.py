r"""Denoisers: networks that are shown a noised signal and how noisy it is.

Each is a spec; its forms are in ``denoisers_pyro.py`` and ``denoisers_numpyro.py``. A form is made from
``(spec, data_dim, num_outputs)`` and maps ``z`` of shape (..., data_dim) and ``log_snr`` of shape (...) to
(..., num_outputs data_dim). What the output means is the model's ``predicts``: with ``z = alpha x + sigma e`` the noise
e, the signal x, the velocity ``v = alpha e - sigma x`` (Salimans & Ho 2022, arXiv 2202.00512, appendix D), or the
mean and the log scale of a normal prior of x that z is then weighed against (two outputs; compare the two outputs of
Benny & Wolf 2022, arXiv 2203.04304, and the preconditioning of Karras et al. 2022, arXiv 2206.00364, section 5).

Both networks see the noise level as ``h = silu(W f(log_snr) + b)``, f being sines and cosines of log_snr at frequencies
from 1/8 to 8. Pinned for both engines: weights Glorot-uniform, biases zero, the last layer of the network (and of each
residual block) zero, so that every denoiser begins by saying 0.
"""

from __future__ import annotations

import dataclasses
from math import prod
from typing import Any, ClassVar

import numpy as np

from elbozoo.inference.arrays import Array, concatenate, namespace
from elbozoo.inference.errors import must
from elbozoo.inference.parts import Part, one_of, positive, whole_number, whole_numbers
from elbozoo.zoo.networks import ACTIVATIONS

__all__ = ["Denoiser", "GaussianDenoiser", "MLPDenoiser", "UNet"]

FREQUENCIES = 2.0 ** np.linspace(-3.0, 3.0, 16)


def embed(log_snr: Array) -> Array:
    """Sines and cosines of ``log_snr`` (...), (..., 32)."""
    xp = namespace(log_snr)
    angles = concatenate([(log_snr * float(frequency))[..., None] for frequency in FREQUENCIES], -1)
    return concatenate([xp.sin(angles), xp.cos(angles)], -1)


def fourier(z: Array, octaves: tuple[int, ...]) -> list[Array]:
    """``z`` and ``sin(2^n pi z)``, ``cos(2^n pi z)`` for each octave n: what tells neighbouring levels apart."""
    xp = namespace(z)
    angles = [2.0**n * np.pi * z for n in octaves]
    return [z, *(xp.sin(a) for a in angles), *(xp.cos(a) for a in angles)]


def group_count(channels: int) -> int:
    """Groups of a group normalisation: 8 where they divide the channels."""
    return int(np.gcd(8, channels))


@dataclasses.dataclass(frozen=True)
class Denoiser(Part):
    """A network that is shown a noised signal and its log signal-to-noise ratio."""

    stem: ClassVar[str] = "denoisers"
    predicts: ClassVar[str] = ""
    """What alone its output can be; empty where the model chooses."""

    def check_data_dim(self, data_dim: int) -> None:
        """Raise InvalidArgument if it cannot read signals of ``data_dim`` entries."""


@dataclasses.dataclass(frozen=True)
class MLPDenoiser(Denoiser):
    """Dense residual layers: ``x <- x + V_i a(W_i x + U_i h + b_i)`` between a dense layer in and one out.

    Args:
        units: width of the residual path and of every hidden layer.
        num_layers: residual layers.
        activation: one of ``ACTIVATIONS``.
        octaves: n of the Fourier features ``sin(2^n pi z)``, ``cos(2^n pi z)`` beside z; none by default.

    Parameters: ``time`` (units, 32), ``enter`` (units, data_dim (1 + 2 octaves)), ``hidden.<i>``, ``times.<i>``
    (without bias), ``back.<i>`` (units, units), ``leave`` (num_outputs data_dim, units), each ``.weight`` and
    ``.bias``.

    Raises: InvalidArgument.
    References: the Fourier features, Kingma et al. 2021, arXiv 2107.00630, appendix C.

    Example:
        >>> MLPDenoiser(units=64).num_layers
        3
    """

    units: int = 512
    num_layers: int = 3
    activation: str = "silu"
    octaves: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        whole_number("units", self.units)
        whole_number("num_layers", self.num_layers, 0)
        one_of("activation", self.activation, ACTIVATIONS)
        object.__setattr__(self, "octaves", _octaves(self.octaves))


@dataclasses.dataclass(frozen=True)
class UNet(Denoiser):
    """A small convolutional U-Net.

    With ``patch`` above 1, squares of pixels are first folded into channels, and unfolded at the end: as many
    parameters, and its square times faster. A 3x3 convolution in; at each resolution ``num_blocks`` residual blocks,
    then 2x2 averages and a 3x3 convolution to the next; one block in the middle; the way back with nearest-neighbour
    doubling and a 3x3 convolution, and blocks that also see what the way down had there; group normalisation, silu
    and a 3x3 convolution out. A residual block is normalise, silu, convolve, add the noise level's channels,
    normalise, silu, convolve; a 1x1 convolution where its input has other channels. Groups are of eighths of the
    channels where 8 divides them.

    Args:
        image_shape: (channels, height, width) of one datum, flattened in that order.
        channels: feature maps at each resolution, the finest first.
        num_blocks: residual blocks at each resolution, each way.
        octaves: n of the Fourier features ``sin(2^n pi z)``, ``cos(2^n pi z)`` beside z.
        patch: side of the squares.

    Raises: InvalidArgument for an image that cannot be cut into squares and halved so often.
    References: Ronneberger, Fischer & Brox 2015, arXiv 1505.04597; Ho, Jain & Abbeel 2020, arXiv 2006.11239, appendix
        B, without attention; the Fourier features, Kingma et al. 2021, arXiv 2107.00630, appendix C; the patches,
        Hoogeboom, Heek & Salimans 2023, arXiv 2301.11093, section 3.3.

    Example:
        >>> UNet(image_shape=(1, 28, 28)).channels
        (32, 64)
    """

    image_shape: tuple[int, ...] = (1, 28, 28)
    channels: tuple[int, ...] = (32, 64)
    num_blocks: int = 1
    octaves: tuple[int, ...] = (7, 8)
    patch: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_shape", whole_numbers("image_shape", self.image_shape, 3))
        object.__setattr__(self, "channels", whole_numbers("channels", self.channels))
        object.__setattr__(self, "octaves", _octaves(self.octaves))
        whole_number("num_blocks", self.num_blocks)
        whole_number("patch", self.patch)
        factor = self.patch * 2 ** (len(self.channels) - 1)
        if not self.channels or self.image_shape[1] % factor or self.image_shape[2] % factor:
            condition = (
                f"have a height and width that patches of {self.patch} and {len(self.channels) - 1} halvings divide"
            )
            raise must("image_shape", condition, self.image_shape, "Use fewer channels, or pad the images")

    def check_data_dim(self, data_dim: int) -> None:
        if prod(self.image_shape) != data_dim:
            raise must("image_shape", f"have data_dim={data_dim} entries", self.image_shape, "Change one of the two")


@dataclasses.dataclass(frozen=True)
class GaussianDenoiser(Denoiser):
    """The exact denoiser of ``x ~ N(0, scale^2 I)``: ``E[x | z] = alpha scale^2 z / (alpha^2 scale^2 + sigma^2)``.

    With it every figure of a diffusion has a closed form. No parameters.

    Args:
        scale: of the data.

    Raises: InvalidArgument unless the scale is above 0.

    Example:
        >>> GaussianDenoiser(scale=2.0).predicts
        'signal'
    """

    predicts: ClassVar[str] = "signal"

    scale: float = 1.0

    def __post_init__(self) -> None:
        positive("scale", self.scale)

    def expected_signal(self, z: Array, log_snr: Array) -> Array:
        """``E[x | z]``, of the shape of z."""
        snr = namespace(log_snr).exp(log_snr)
        alpha = (snr / (1.0 + snr)) ** 0.5
        return (alpha * (1.0 + snr) * self.scale**2 / (snr * self.scale**2 + 1.0))[..., None] * z


def _octaves(values: Any) -> tuple[int, ...]:
    for value in tuple(values):
        whole_number("every entry of octaves", value, 0)
    return tuple(values)
