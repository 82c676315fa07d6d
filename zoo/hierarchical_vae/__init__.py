"""The hierarchical variational autoencoder: several layers of Gaussian latents, and a guide that climbs them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from elbozoo.guides import DiagonalGaussian, Family
from elbozoo.inference.errors import must
from elbozoo.inference.parts import instance_of, one_of, positive, whole_number, whole_numbers
from elbozoo.zoo.likelihoods import Bernoulli, Likelihood
from elbozoo.zoo.networks import ACTIVATIONS, MLP, NORMALIZATIONS
from elbozoo.zoo.priors import Prior, StandardNormal
from elbozoo.zoo.spec import Spec, check_shape

__all__ = ["HierarchicalVAE", "Hierarchy"]


@dataclasses.dataclass(frozen=True)
class Hierarchy(Spec):
    """The generative model that :class:`HierarchicalVAE` and :class:`~elbozoo.zoo.LadderVAE` share.

    ``z_L ~ prior``, ``z_l | z_{l+1} ~ N(loc_l(z_{l+1}), diag(scale_l(z_{l+1})^2))``, ``x | z_1 ~ likelihood(z_1)``.
    """

    data_decoder: ClassVar[str] = "decoders.0"

    data_dim: int = 784
    latent_dims: tuple[int, ...] = (100, 50)
    hidden: tuple[int, ...] = (200, 100)
    depth: int = 2
    activation: str = "tanh"
    normalization: str = "none"
    output_gain: float = 1.0
    hidden_gain: float = 1.0
    likelihood: Likelihood = dataclasses.field(default_factory=Bernoulli)
    prior: Prior = dataclasses.field(default_factory=StandardNormal)

    def __post_init__(self) -> None:
        whole_number("data_dim", self.data_dim)
        for name in ("latent_dims", "hidden"):
            object.__setattr__(self, name, whole_numbers(name, getattr(self, name)))
        if not self.latent_dims:
            raise must("latent_dims", "have at least one layer", self.latent_dims, "Pass latent_dims=(100, 50), say")
        if len(self.hidden) != len(self.latent_dims):
            condition = f"have one entry for each of the {len(self.latent_dims)} layers of latent_dims"
            raise must("hidden", condition, self.hidden, "Add or remove entries, next to the data first")
        whole_number("depth", self.depth, least=0)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("normalization", self.normalization, NORMALIZATIONS)
        positive("output_gain", self.output_gain)
        positive("hidden_gain", self.hidden_gain)
        instance_of("likelihood", self.likelihood, Likelihood)
        self.likelihood.check_data_dim(self.data_dim)
        instance_of("prior", self.prior, Prior)

    @property
    def prior_sizes(self) -> tuple[int, int, bool]:
        """What the prior's form is made from beside its spec: it is the top latent's."""
        return self.latent_dims[-1], self.data_dim, self.likelihood.unit_interval

    @property
    def networks(self) -> tuple[MLP, ...]:
        """The architecture between each latent layer and what is below it, next to the data first."""
        settings = (self.activation, self.normalization, self.output_gain, self.hidden_gain)
        return tuple(MLP((units,) * self.depth, *settings) for units in self.hidden)

    @property
    def data_network(self) -> MLP:
        return self.networks[0]

    @property
    def decoder_sizes(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of each decoder, next to the data first; all but the first give loc and log scale."""
        outputs = (self.likelihood.num_outputs * self.data_dim, *(2 * dim for dim in self.latent_dims[:-1]))
        return tuple(zip(self.latent_dims, outputs, strict=True))

    def check(self, x: Any) -> None:
        self.likelihood.check(check_shape(x, self.data_dim))


@dataclasses.dataclass(frozen=True)
class HierarchicalVAE(Hierarchy):
    """A variational autoencoder with L layers of latents and a bottom-up guide.

    ``z_L ~ prior``, ``z_l | z_{l+1} ~ N(loc_l(z_{l+1}), diag(scale_l(z_{l+1})^2))``, ``x | z_1 ~
    likelihood(decoder(z_1))``; the guide climbs from the data:
    ``q(z | x) = q(z_1 | x) q(z_2 | z_1) ... q(z_L | z_{L-1})``, each factor of ``guide``'s family.

    Sites: latents ``z1`` (next to the data) to ``zL`` with event shapes (latent_dims[l-1],), observed ``x`` with event
    shape (data_dim,), plate ``data`` at dim -1. The model draws ``zL`` first, the guide ``z1``; so no KL has a closed
    form but the top one's where L = 1, and rates are sampled.

    Parameters: ``decoders.<l>.*`` and ``encoders.<l>.*``, 0 next to the data (see :class:`~elbozoo.zoo.MLP`);
    ``posteriors.<l>.*``, ``likelihood.*`` and ``prior.*`` where guide, likelihood and prior have any.

    Shapes: x (B, data_dim), z_l (B, latent_dims[l-1]), or with (K, B) in front under an outer plate of particles.

    Args:
        data_dim: entries of one datum, flat.
        latent_dims: entries of each latent vector, next to the data first; L is how many there are.
        hidden: units of the hidden layers below each latent, next to the data first.
        depth: hidden layers in each of these networks.
        activation: one of ``ACTIVATIONS``, after every hidden layer.
        normalization: "layer" or "none", of every hidden layer.
        output_gain: factor on the initial weights of every network's last layer. Scales are exponentials of what may be
            a tower of networks: beyond two layers, or with an activation without bounds, begin with 0.1.
        hidden_gain: factor on the hidden layers' initial weights; ``sqrt(2)`` keeps variances through (leaky)
            rectifiers, exactly between layers of one width (He et al. 2015, arXiv 1502.01852, eq. 10).
        likelihood: family of x given z_1.
        prior: family of z_L; not one that is made of q(z_L | x), which this guide does not have.
        guide: family of each z_l given what is below it.

    Raises:
        InvalidArgument: no layer, ``hidden`` of another length than ``latent_dims``, a gain that is not above 0, or a
            ``VampPrior``.

    Limits: L = 1 is :class:`~elbozoo.zoo.VAE` with its latent called ``z1``. The defaults are Burda et al.'s two-layer
    model. Under the ELBO the upper layers of this guide tend to collapse (``z_l`` then falls back on its prior): begin
    with ``fit(…, start=DataMean())``, compare :class:`~elbozoo.zoo.LadderVAE`, and see ``docs/benchmarks.md``.

    References: Rezende, Mohamed & Wierstra 2014, arXiv 1401.4082, section 3; Burda, Grosse & Salakhutdinov 2015,
        arXiv 1509.00519, section 5; why upper layers die: Sønderby et al. 2016, arXiv 1602.02282, section 3.1.

    Example:
        >>> spec = HierarchicalVAE(data_dim=64, latent_dims=(8, 4), hidden=(32, 16))
        >>> spec.decoder_sizes
        ((8, 64), (4, 16))
    """

    guide: Family = dataclasses.field(default_factory=DiagonalGaussian)

    def __post_init__(self) -> None:
        super().__post_init__()
        instance_of("guide", self.guide, Family)
        if self.guide.uses_log_joint:
            condition = "be one that does not climb log p(x, z): each of these factors sees one layer alone"
            raise must("guide", condition, type(self.guide).__name__, "Use DiagonalGaussian(), or VAE")
        if self.prior.needs_encoder:
            condition = "be one that is not made of q(z_L | x): this guide reaches the top through the layers below"
            todo = "Use LadderVAE, whose guide has it, or MixturePrior()"
            raise must("prior", condition, type(self.prior).__name__, todo)

    @property
    def encoder_sizes(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of each encoder, next to the data first."""
        outputs = (self.guide.num_outputs(dim) for dim in self.latent_dims)
        return tuple(zip((self.data_dim, *self.latent_dims), outputs, strict=False))
