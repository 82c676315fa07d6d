"""The autoencoder: what there is without a bottleneck in nats."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from elbozoo.inference.errors import ElbozooError, must
from elbozoo.inference.parts import instance_of, whole_number
from elbozoo.zoo.likelihoods import Bernoulli, Likelihood
from elbozoo.zoo.networks import MLP, Network
from elbozoo.zoo.spec import Spec, check_shape

__all__ = ["Autoencoder"]


@dataclasses.dataclass(frozen=True)
class Autoencoder(Spec):
    """An autoencoder, the reference without a bottleneck in nats. **Not a generative model.**

    ``z = encoder(x)``, ``x | z ~ likelihood(decoder(z))``: the networks of :class:`~elbozoo.zoo.VAE`, with a code in
    place of a latent variable. As a program: z has a flat, improper prior, of log density 0 everywhere, and the guide
    is a point mass at encoder(x).

    Sites: latent ``z`` with event shape (latent_dim,), observed ``x`` with event shape (data_dim,), plate ``data`` at
    dim -1.

    Parameters: ``decoder.*``, ``encoder.*`` (see the network), ``likelihood.*`` where it has any.

    Shapes: x (B, data_dim), z (B, latent_dim), or (K, B, latent_dim) under an outer plate of particles.

    Units: ``ELBO()`` of it is ``log p(x | encoder(x))``, nats per datum, the reconstruction's log likelihood, and its
    rate is 0. This is a bound on nothing: no ``p(x)`` exists that it could be below. Hold it against a VAE's
    *distortion*, which it shows the least of that these networks reach; never against a VAE's ELBO or NLL.

    Args:
        data_dim: entries of one datum, flat.
        latent_dim: entries of the code.
        network: architecture of the encoder and, mirrored, of the decoder.
        likelihood: family of x given z.

    Raises: InvalidArgument, when the model is to draw data, and from every instrument that takes a program for a
        distribution of data (``evaluate``, ``to_arviz``, ``bottleneck``, ``gaps``, ``calibrate``, annealing, NUTS,
        ``diagnose``).

    Limits: ``Pathwise()`` is the gradient; particles are all the same, so K > 1 gains nothing, and shapes of the rate
    have no effect. With a Gaussian likelihood of fixed scale it is least squares.

    References: Rumelhart, Hinton & Williams 1986, Learning internal representations by error propagation; Hinton &
        Salakhutdinov 2006, Reducing the dimensionality of data with neural networks, Science 313.

    Example:
        >>> Autoencoder(data_dim=64, latent_dim=8, network=MLP(hidden=(32,))).generative
        False
    """

    generative: ClassVar[bool] = False

    data_dim: int = 784
    latent_dim: int = 50
    network: Network = dataclasses.field(default_factory=MLP)
    likelihood: Likelihood = dataclasses.field(default_factory=Bernoulli)

    def __post_init__(self) -> None:
        whole_number("data_dim", self.data_dim)
        whole_number("latent_dim", self.latent_dim)
        instance_of("network", self.network, Network)
        instance_of("likelihood", self.likelihood, Likelihood)
        self.network.check_data_dim(self.data_dim)
        self.likelihood.check_data_dim(self.data_dim)

    def check(self, x: Any) -> None:
        self.likelihood.check(check_shape(x, self.data_dim))


def no_draws() -> ElbozooError:
    """The error of a model that is to draw a code."""
    todo = "Run the guide on data, or use VAE, whose latents have a prior"
    return must("site 'z' of an Autoencoder", "be given: codes have no distribution to draw from", "nothing", todo)
