"""The categorical variational autoencoder: a layer of latents that each take one of several values."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from elbozoo.inference.errors import must
from elbozoo.inference.parts import instance_of, whole_number
from elbozoo.zoo.likelihoods import Bernoulli, Likelihood
from elbozoo.zoo.networks import MLP, Network
from elbozoo.zoo.spec import Spec, check_shape

__all__ = ["CategoricalVAE"]


@dataclasses.dataclass(frozen=True)
class CategoricalVAE(Spec):
    """A variational autoencoder whose latents are categorical, each a one-hot vector.

    ``z_i ~ Categorical(1/C, ..., 1/C)`` for i = 1 ... num_latents, ``x | z ~ likelihood(decoder(z))``; the guide is
    ``z_i | x ~ Categorical(softmax(encoder(x)_i))``, independent of one another. The decoder reads the one-hot vectors
    end to end.

    With ``autoregressive_guide`` latent i of the guide also sees the latents before it, ``q(z_1 | x) q(z_2 | x, z_1)
    ...``: ``z_i | z_{<i}, x ~ Categorical(softmax(encoder(x)_i + sum_{j<i} A_ij z_j))``.

    Sites: latent ``z`` with event shape (num_latents, num_categories), observed ``x`` with event shape (data_dim,),
    plate ``data`` at dim -1.

    Parameters: ``decoder.*``, ``encoder.*`` (see the network), ``likelihood.*`` where it has any; with
    ``autoregressive_guide`` ``posterior.autoregression`` (num_codes, num_codes), from 0, whose blocks (num_categories,
    num_categories) are the A_ij, of which only those below the diagonal count. The prior is fixed.

    Shapes: x (B, data_dim), z (B, num_latents, num_categories), or with (K, B) in front under an outer plate of
    particles. Encoder outputs (B, num_latents * num_categories), the categories of one latent next to one another.

    Units: ``KL(q(z|x) || p(z))`` is at most ``num_latents log(num_categories)`` nats under the factorised
    guide; an objective that asks for closed forms gets this one. Under the autoregressive one it is sampled.

    Args:
        data_dim: entries of one datum, flat.
        num_latents: categorical variables in z.
        num_categories: values that each can take.
        network: architecture of the encoder and, mirrored, of the decoder.
        likelihood: family of x given z.
        autoregressive_guide: let the latents of the guide depend on one another.

    Raises: InvalidArgument for fewer than two categories.

    Limits: z is not reparameterised. ``Pathwise()`` is refused: train with ``GumbelSoftmax()``, ``REBAR()``,
    ``IWAE(5, gradient=VIMCO())``, ``NVIL()`` or ``RWS()``. The autoregressive guide has a place under the gradients
    that take any family alone (the last three and ``ScoreFunction()``), and a draw from it takes a pass a latent. Two
    categories make a one-layer
    :class:`~elbozoo.zoo.SigmoidBeliefNet` with a fixed prior, in other parameters.

    References:
        Jang, Gu & Poole 2017, Categorical reparameterization with Gumbel-softmax, arXiv 1611.01144 (whose relaxed bound
        also takes the KL of the categorical variables); Maddison, Mnih & Teh 2017, The concrete distribution, arXiv
        1611.00712. Latents that depend on those before them: Gregor et al. 2014, Deep autoregressive networks, arXiv
        1310.8499 (for binary ones).

    Example:
        >>> CategoricalVAE(data_dim=64, num_latents=4, num_categories=5, network=MLP((16,))).num_codes
        20
    """

    fitting_gradient: ClassVar[str] = "gumbel-softmax"

    data_dim: int = 784
    num_latents: int = 20
    num_categories: int = 10
    network: Network = dataclasses.field(default_factory=MLP)
    likelihood: Likelihood = dataclasses.field(default_factory=Bernoulli)
    autoregressive_guide: bool = False

    def __post_init__(self) -> None:
        whole_number("data_dim", self.data_dim)
        whole_number("num_latents", self.num_latents)
        whole_number("num_categories", self.num_categories, least=2)
        instance_of("network", self.network, Network)
        instance_of("likelihood", self.likelihood, Likelihood)
        if not isinstance(self.autoregressive_guide, bool):
            raise must(
                "autoregressive_guide", "be True or False", repr(self.autoregressive_guide), "Pass one of the two"
            )
        self.network.check_data_dim(self.data_dim)
        self.likelihood.check_data_dim(self.data_dim)

    @property
    def num_codes(self) -> int:
        """Entries of z: the encoder's outputs and the decoder's inputs."""
        return self.num_latents * self.num_categories

    def earlier(self) -> np.ndarray:
        """Which entries of z each may depend on in the guide: those of earlier latents, (num_codes, num_codes)."""
        latent = np.arange(self.num_codes) // self.num_categories
        return latent < latent[:, None]

    def check(self, x: Any) -> None:
        self.likelihood.check(check_shape(x, self.data_dim))
