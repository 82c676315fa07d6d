"""The variational autoencoder: one layer of latents."""

from __future__ import annotations

import dataclasses
from typing import Any

from elbozoo.guides import DiagonalGaussian, Family
from elbozoo.inference.errors import must
from elbozoo.inference.parts import instance_of, whole_number
from elbozoo.zoo.likelihoods import Bernoulli, Likelihood
from elbozoo.zoo.networks import MLP, Network
from elbozoo.zoo.priors import Prior, StandardNormal
from elbozoo.zoo.spec import Spec, check_shape

__all__ = ["VAE"]


@dataclasses.dataclass(frozen=True)
class VAE(Spec):
    """A variational autoencoder.

    ``z ~ prior``, by default N(0, I), ``x | z ~ likelihood(decoder(z))``; the guide is ``z | x ~ family(encoder(x))``,
    one pair of networks for all data (amortized).

    Sites: latent ``z`` with event shape (latent_dim,), observed ``x`` with event shape (data_dim,), plate ``data`` at
    dim -1.

    Parameters: ``decoder.*``, ``encoder.*`` (see the network), ``likelihood.*`` and ``prior.*`` where these have any.
    Under a prior that is made of the guide (``VampPrior``) ``encoder.*`` are parameters of both model and guide.

    Shapes: x (B, data_dim), z (B, latent_dim), or (K, B, latent_dim) under an outer plate of particles.

    Args:
        data_dim: entries of one datum, flat.
        latent_dim: entries of one latent vector.
        network: architecture of the encoder and, mirrored, of the decoder.
        likelihood: family of x given z.
        guide: family of z given x.
        prior: family of z.

    Limits: the defaults are the one-layer model of Burda et al. (50 latents, two tanh layers of 200 each way,
    exp for the scale, Glorot-uniform weights, zero biases; pinned in both engines). One last layer holds the guide's
    locations and log scales together, so its Glorot bound counts both.

    References:
        Kingma & Welling 2014, Auto-encoding variational Bayes, arXiv 1312.6114; Rezende, Mohamed & Wierstra 2014,
        arXiv 1401.4082; Burda, Grosse & Salakhutdinov 2015, arXiv 1509.00519, section 5.

    Example:
        >>> spec = VAE(data_dim=64, latent_dim=8, network=MLP(hidden=(32,)))
        >>> VAE.from_config(spec.to_config()) == spec
        True
    """

    data_dim: int = 784
    latent_dim: int = 50
    network: Network = dataclasses.field(default_factory=MLP)
    likelihood: Likelihood = dataclasses.field(default_factory=Bernoulli)
    guide: Family = dataclasses.field(default_factory=DiagonalGaussian)
    prior: Prior = dataclasses.field(default_factory=StandardNormal)

    def __post_init__(self) -> None:
        whole_number("data_dim", self.data_dim)
        whole_number("latent_dim", self.latent_dim)
        instance_of("network", self.network, Network)
        instance_of("likelihood", self.likelihood, Likelihood)
        instance_of("guide", self.guide, Family)
        instance_of("prior", self.prior, Prior)
        self.network.check_data_dim(self.data_dim)
        self.likelihood.check_data_dim(self.data_dim)
        if self.prior.needs_encoder and self.guide.uses_log_joint:
            condition = "be one that does not climb log p(x, z), of which a prior made of q(z | x) is a part"
            raise must("guide", condition, type(self.guide).__name__, "Use another prior, or a guide that does not")
        self.guide.num_outputs(self.latent_dim)  # refuses what the family cannot be of

    def check(self, x: Any) -> None:
        self.likelihood.check(check_shape(x, self.data_dim))
