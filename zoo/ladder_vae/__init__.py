"""The ladder variational autoencoder: a guide that comes down the generative path."""

from __future__ import annotations

import dataclasses
from math import sqrt

from elbozoo.inference.parts import positive
from elbozoo.zoo.hierarchical_vae import Hierarchy
from elbozoo.zoo.networks import MLP

__all__ = ["LadderVAE"]


@dataclasses.dataclass(frozen=True)
class LadderVAE(Hierarchy):
    r"""The hierarchical model with a top-down guide that merges evidence with the prior by precision.

    The model is :class:`~elbozoo.zoo.HierarchicalVAE`'s. The guide first climbs without drawing,
    ``d_l = MLP_l(d_{l-1})``, ``d_0 = x``, with a location and a variance of evidence ``(m_l, s_l^2 = softplus(.))`` on
    every rung; then it draws from the top, where it shares the model's ``p(z_l | z_{l+1}) = N(mu_l, sigma_l^2)``:

    .. math:: q(z_L|x) = N(m_L, s_L^2),\qquad
        q(z_l | z_{l+1}, x) = N\Big(\frac{m_l s_l^{-2} + \mu_l \sigma_l^{-2}}{s_l^{-2} + \sigma_l^{-2}},
        \frac{1}{s_l^{-2} + \sigma_l^{-2}}\Big)

    Sites: latents ``z1`` (next to the data) to ``zL`` with event shapes (latent_dims[l-1],), observed ``x`` with event
    shape (data_dim,), plate ``data`` at dim -1. Guide and model both draw ``zL`` first, so every KL has its closed form
    given the layers above.

    Parameters: ``decoders.<l>.*`` (in model and guide) and ``encoders.<l>.*``, 0 next to the data (see
    :class:`~elbozoo.zoo.MLP`); ``likelihood.*`` and ``prior.*`` where they have any. Under a ``VampPrior`` the encoders
    are the model's too.

    Shapes: x (B, data_dim), z_l (B, latent_dims[l-1]), or with (K, B) in front under an outer plate of particles.

    Args:
        data_dim: entries of one datum, flat.
        latent_dims: entries of each latent vector, next to the data first; L is how many there are.
        hidden: units of the hidden layers below each latent, next to the data first; those of ``d_l`` too.
        depth: hidden layers in each of these networks.
        activation: one of ``ACTIVATIONS``, after every hidden layer.
        normalization: "none" or "layer", of every hidden layer.
        output_gain: factor on the initial weights of every decoder's last layer.
        hidden_gain: factor on the initial weights of every hidden layer, climbing or coming down; by default what
            keeps variances through rectifiers (exactly, between layers of one width), so that the upper rungs see the
            data from the start.
        evidence_gain: factor on the initial weights of the layers that the evidence comes from.
        likelihood: family of x given z_1.
        prior: family of z_L.

    Raises:
        InvalidArgument: no layer, ``hidden`` of another length than ``latent_dims``, or a gain that is not above 0.

    Limits: L = 1 is a VAE with a diagonal Gaussian guide. The defaults are Sønderby et al.'s five layers, without
    batch normalisation (see ``docs/design/0004-hierarchies.md``). The plain ELBO ends in a bad minimum and one warm-up
    for all layers leaves those above the second dead; begin with
    ``LayerwiseAnnealedKL(warmup=…, delay=…, start=0.001)``, its delay a small part of its warm-up, and see
    ``docs/benchmarks.md``.

    References: Sønderby, Raiko, Maaløe, Sønderby & Winther 2016, Ladder variational autoencoders, arXiv 1602.02282,
        eqs. 10-16; He, Zhang, Ren & Sun 2015, Delving deep into rectifiers, arXiv 1502.01852, eq. 10.

    Example:
        >>> LadderVAE().latent_dims
        (64, 32, 16, 8, 4)
    """

    latent_dims: tuple[int, ...] = (64, 32, 16, 8, 4)
    hidden: tuple[int, ...] = (512, 256, 128, 64, 32)
    activation: str = "leaky_relu"
    output_gain: float = 0.1
    hidden_gain: float = sqrt(2)
    evidence_gain: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("evidence_gain", self.evidence_gain)

    @property
    def rungs(self) -> tuple[MLP, ...]:
        """The architecture of each rung, next to the data first."""
        return tuple(dataclasses.replace(network, output_gain=self.evidence_gain) for network in self.networks)

    @property
    def encoder_sizes(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of each rung, next to the data first; the inputs are the features of the rung below."""
        features = self.hidden if self.depth else (self.data_dim,) * len(self.hidden)
        return tuple(zip((self.data_dim, *features), (2 * dim for dim in self.latent_dims), strict=False))
