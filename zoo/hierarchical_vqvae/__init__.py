"""The two-level vector-quantised variational autoencoder: a coarse map of codes, and a finer one given it."""

from __future__ import annotations

import dataclasses
from math import prod
from typing import Any, ClassVar

from elbozoo.inference.errors import must
from elbozoo.inference.parts import instance_of, whole_numbers
from elbozoo.zoo.likelihoods import Bernoulli, Likelihood
from elbozoo.zoo.networks import FullyConv
from elbozoo.zoo.quantizers import Codebook, Quantizer
from elbozoo.zoo.spec import Spec, check_shape
from elbozoo.zoo.vqvae import CodePriorSizes, check_prior

__all__ = ["HierarchicalVQVAE"]


@dataclasses.dataclass(frozen=True)
class HierarchicalVQVAE(Spec):
    r"""A variational autoencoder with two maps of codes, a coarse one and a finer one given it (VQ-VAE-2).

    ``index_2 ~ prior``, ``index_1 | index_2 ~ prior``, ``x | z_1, z_2 ~ likelihood(decoder(z_1, up(z_2)))``, each level
    with a codebook of its own. The guide goes from the top down, a point mass at each level at the codes nearest to

    .. math:: h = \phi(E_1(x)),\quad e_2 = E_2(h),\quad e_1 = M [h, C(z_2)],

    ``φ`` the activation, ``M`` one linear map at every place, C the guide's own network from the top codes to the finer
    map. With P_l latents of K codes each, ``rate = log q - log p`` is ``(P_1 + P_2) log K`` under the uniform prior,
    ``P_l log K`` of them at level l. The autoregressive one is ``prod_i p(i-th of index_2 | those before it)`` times
    ``prod_i p(i-th of index_1 | those before it, all of index_2)``, two causal transformers, the finer with the top
    indices in front. They start as the uniform one, and none of their gradient reaches codes or encoders.

    Sites: latents ``z1`` (next to the data) and ``z2``, whose values are the codes themselves, event shapes (P_l depth,
    code_dim); observed ``x`` with event shape (data_dim,), plate ``data`` at dim -1. Both model and guide draw ``z2``
    first. Densities are of the indices (masses, in nats), as in :class:`~elbozoo.zoo.VQVAE`.

    Parameters, 0 next to the data: ``decoders.0`` (of z_1 and the map above, joined at each place) and ``decoders.1``
    (up), ``encoders.0``, ``encoders.1`` and ``conditioner`` C, all :class:`~elbozoo.zoo.FullyConv`; ``merge`` M;
    ``codebooks.<l>.*`` (see the quantizer), of both model and guide; ``priors.<l>.*`` under autoregressive priors, as
    ``prior.*`` of a VQVAE, and ``priors.0.context``; ``likelihood.*`` where it has any.

    Shapes: x (B, data_dim), z_l (B, P_l depth, code_dim), or with (K, B) in front under an outer plate of particles.

    Args:
        image_shape: (channels, height, width) of one datum, flattened in that order.
        channels: feature maps after each halving down to the finer map of codes, next to the data first.
        top_channels: feature maps after each further halving, down to the coarse map.
        activation: one of ``ACTIVATIONS``, after every layer but the last of each network.
        quantizer: what stands for an encoder's output at a place, at both levels.
        likelihood: family of x given z_1 and z_2.
        prior: "uniform" or "autoregressive", of the indices.
        prior_width: units of the autoregressive priors' layers, a multiple of 4.
        prior_layers: blocks of each.

    Raises: InvalidArgument, also for maps that the channels cannot halve, the coarse one too.

    Limits: train with ``StraightThrough()``; other gradient estimators refuse it. ``evaluate`` gives ``-ELBO``, as for
    a VQVAE. Two levels; images whose sides the halvings divide. The paper trains its priors (PixelCNNs with attention)
    after the rest: here they learn along with it, and the rest does not notice.

    References: Razavi, van den Oord & Vinyals 2019, Generating diverse high-fidelity images with VQ-VAE-2, arXiv
        1906.00446, section 3, algorithms 1 and 2.

    Example:
        >>> HierarchicalVQVAE(image_shape=(1, 28, 28), channels=(64,), top_channels=(128,)).num_latents
        (196, 49)
    """

    fitting_gradient: ClassVar[str] = "straight-through"
    data_decoder: ClassVar[str] = "decoders.0"

    image_shape: tuple[int, ...] = (1, 28, 28)
    channels: tuple[int, ...] = (64,)
    top_channels: tuple[int, ...] = (128,)
    activation: str = "relu"
    quantizer: Quantizer = dataclasses.field(default_factory=Codebook)
    likelihood: Likelihood = dataclasses.field(default_factory=Bernoulli)
    prior: str = "uniform"
    prior_width: int = 64
    prior_layers: int = 2

    def __post_init__(self) -> None:
        bottom = FullyConv(self.image_shape, self.channels, self.activation)  # and it has the same conditions
        object.__setattr__(self, "image_shape", bottom.image_shape)
        object.__setattr__(self, "channels", bottom.channels)
        object.__setattr__(self, "top_channels", whole_numbers("top_channels", self.top_channels))
        factor = 2 ** len(self.top_channels)
        if not self.top_channels or any(side % factor for side in bottom.map_shape):
            condition = "have at least one entry, and no more than can halve the finer map of codes"
            got = f"{self.top_channels} for a map of {bottom.map_shape[0]} x {bottom.map_shape[1]}"
            raise must("top_channels", condition, got, "Use fewer channels at either level, or pad the images")
        instance_of("quantizer", self.quantizer, Quantizer)
        instance_of("likelihood", self.likelihood, Likelihood)
        self.likelihood.check_data_dim(self.data_dim)
        check_prior(self.prior, self.prior_width, self.prior_layers)

    @property
    def data_dim(self) -> int:
        """Entries of one datum, flat."""
        return prod(self.image_shape)

    @property
    def data_network(self) -> FullyConv:
        return self.networks[0]

    @property
    def networks(self) -> tuple[FullyConv, FullyConv]:
        """Between the data and the finer map, and between that and the coarse one."""
        bottom = FullyConv(self.image_shape, self.channels, self.activation)
        return bottom, FullyConv((self.width, *bottom.map_shape), self.top_channels, self.activation)

    @property
    def width(self) -> int:
        """Features at each place of the finer map."""
        return self.channels[-1]

    @property
    def num_latents(self) -> tuple[int, int]:
        """P, places of each level's map, next to the data first."""
        bottom, top = self.networks
        return bottom.positions, top.positions

    @property
    def latent_dims(self) -> tuple[int, int]:
        """Entries of each level's encoder outputs."""
        bottom, top = self.num_latents
        return bottom * self.quantizer.code_dim, top * self.quantizer.code_dim

    @property
    def num_features(self) -> int:
        """Entries of the finer map."""
        return self.num_latents[0] * self.width

    @property
    def prior_sizes(self) -> tuple[CodePriorSizes, CodePriorSizes]:
        """What each level's autoregressive prior is made from, next to the data first."""
        num_codes = self.quantizer.num_codes
        bottom, top = (places * self.quantizer.depth for places in self.num_latents)
        settings = self.prior_width, self.prior_layers
        return CodePriorSizes(num_codes, bottom, *settings, num_codes, top), CodePriorSizes(num_codes, top, *settings)

    @property
    def codebooks(self) -> dict[str, str]:
        """By latent site, the prefix of its codebook's weights."""
        return {"z1": "codebooks.0", "z2": "codebooks.1"}

    def check(self, x: Any) -> None:
        self.likelihood.check(check_shape(x, self.data_dim))
