"""The Gaussian mixture variational autoencoder: clusters in the latent space, found without labels."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from elbozoo.guides import DiagonalGaussian, Family
from elbozoo.inference.errors import must
from elbozoo.inference.parts import instance_of, whole_number
from elbozoo.zoo.likelihoods import Bernoulli, Likelihood
from elbozoo.zoo.networks import MLP, Network
from elbozoo.zoo.spec import Spec, check_shape

__all__ = ["GaussianMixtureVAE"]


@dataclasses.dataclass(frozen=True)
class GaussianMixtureVAE(Spec):
    r"""A variational autoencoder whose latent is drawn from one of C Gaussian clusters.

    ``y ~ Categorical(w)``, ``z | y ~ N(loc_y, diag(scale_y^2))``, ``x | z ~ likelihood(decoder(z))``. The guide is

    - with ``exact_cluster``: ``z | x ~ family(encoder(x))`` and the model's own posterior ``q(y | z) = p(y | z)``, the
      best there is given q(z | x), as x depends on y through z alone. Then the sum over y is closed,
      ``Σ_y q(y|z) log p(y) p(z|y) / q(y|z) = log p(z)``: it is the VAE with a
      :class:`~elbozoo.zoo.MixturePrior`, with the cluster for a latent of its own;
    - without: ``y | x ~ Categorical(softmax(classifier(x)))``, ``z | x, y ~ family(encoder([x, onehot(y)]))``, which
      may be of several modes.

    ``ELBO(gradient=Enumerate())`` sums over the clusters; ``VIMCO()`` and ``ScoreFunction()`` draw one.

    Sites: latents ``y`` (a whole number) with event shape () and ``z`` with event shape (latent_dim,), observed ``x``
    with event shape (data_dim,), plate ``data`` at dim -1. The exact guide draws z first, so its KL has no closed form.

    Parameters: ``clusters.loc`` (num_clusters, latent_dim), from independent draws of ``N(0, 1 / latent_dim)``;
    ``clusters.log_scale``, the same shape, from 0; ``clusters.logits`` (num_clusters,), from 0, where the weights are
    learned; ``decoder.*``, ``encoder.*``, ``classifier.*`` without the exact guide (see the network), ``likelihood.*``
    and ``posterior.*`` where these have any. Under the exact guide ``clusters.*`` belong to both model and guide.

    Shapes: x (B, data_dim), y (B,), z (B, latent_dim), or with K particles in front.

    Args:
        data_dim: entries of one datum, flat.
        num_clusters: C, at least 2.
        latent_dim: entries of z.
        network: architecture of the encoder (and the classifier) and, mirrored, of the decoder.
        likelihood: family of x given z.
        guide: family of z.
        exact_cluster: the guide's cluster given z is the model's own.
        learn_weights: whether the clusters' weights w are learned; else they are equal.

    Raises: InvalidArgument for a guide that climbs the joint density, and for a convolutional network without the exact
        guide, whose encoder reads x and y side by side.
    Limits: two clusters at one place are one. Which is which is arbitrary:
        :func:`~elbozoo.inference.cluster_accuracy` matches them to classes.

    References:
        Dilokthanakul et al. 2016, Deep unsupervised clustering with Gaussian mixture variational autoencoders, arXiv
        1611.02648; Jiang et al. 2017, Variational deep embedding, arXiv 1611.05148, eqs. 5 and 16 (the exact cluster).

    Example:
        >>> GaussianMixtureVAE(data_dim=64, num_clusters=3).num_clusters
        3
    """

    fitting_gradient: ClassVar[str] = "enumerate"

    data_dim: int = 784
    num_clusters: int = 10
    latent_dim: int = 10
    network: Network = dataclasses.field(default_factory=MLP)
    likelihood: Likelihood = dataclasses.field(default_factory=Bernoulli)
    guide: Family = dataclasses.field(default_factory=DiagonalGaussian)
    exact_cluster: bool = True
    learn_weights: bool = False

    def __post_init__(self) -> None:
        whole_number("data_dim", self.data_dim)
        whole_number("num_clusters", self.num_clusters, 2)
        whole_number("latent_dim", self.latent_dim)
        for name in ("exact_cluster", "learn_weights"):
            if not isinstance(getattr(self, name), bool):
                raise must(name, "be True or False", repr(getattr(self, name)), "Pass one of the two")
        instance_of("network", self.network, Network if self.exact_cluster else MLP)
        instance_of("likelihood", self.likelihood, Likelihood)
        instance_of("guide", self.guide, Family)
        self.network.check_data_dim(self.data_dim)
        self.likelihood.check_data_dim(self.data_dim)
        if self.guide.uses_log_joint:
            condition = "be one that does not climb log p(x, z), which is not this model's to give"
            raise must("guide", condition, type(self.guide).__name__, "Use DiagonalGaussian(), say")
        self.guide.num_outputs(self.latent_dim)  # refuses what the family cannot be of

    @property
    def encoder_sizes(self) -> tuple[int, int]:
        """Inputs and outputs of the encoder of z."""
        inputs = self.data_dim + (0 if self.exact_cluster else self.num_clusters)
        return inputs, self.guide.num_outputs(self.latent_dim)

    @property
    def decoder_sizes(self) -> tuple[int, int]:
        """Inputs and outputs of the decoder."""
        return self.latent_dim, self.likelihood.num_outputs * self.data_dim

    def check(self, x: Any) -> None:
        self.likelihood.check(check_shape(x, self.data_dim))
