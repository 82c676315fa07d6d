"""The semi-supervised variational autoencoder: a class and a continuous latent, where some labels are known."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from elbozoo.guides import DiagonalGaussian, Family
from elbozoo.inference.errors import must
from elbozoo.inference.parts import instance_of, whole_number
from elbozoo.zoo.likelihoods import Bernoulli, Likelihood
from elbozoo.zoo.networks import MLP, Network
from elbozoo.zoo.spec import Spec, check_shape

__all__ = ["POINT_MASS", "SemiSupervisedVAE"]

POINT_MASS = 1e4
"""How far below a label's logit the other classes' are set: exp(-POINT_MASS) is exactly 0 in either float type, and
0 times it is 0, where an infinity would give nan."""


@dataclasses.dataclass(frozen=True)
class SemiSupervisedVAE(Spec):
    r"""The generative semi-supervised model "M2": one of C classes, and a style that is independent of it.

    ``y ~ Categorical(1/C)``, ``z ~ N(0, I)``, ``x | y, z ~ likelihood(decoder([onehot(y), z]))``; the guide is
    ``y | x ~ Categorical(softmax(classifier(x)))``, ``z | x, y ~ family(encoder([x, onehot(y)]))``.

    Model and guide take ``(x, y=None)``: y holds a class where the label is known and -1 where it is not, and is read
    by the guide alone. At a known label the guide's distribution of y is the point mass there, of log-probability 0. So
    the bound of a datum is that of its own case, under every objective and gradient:

    .. math::
        \text{labelled:}\quad -\mathcal L(x, y) &= E_{q(z|x,y)}[\log p(x|y,z) + \log p(y) + \log p(z) - \log q(z|x,y)]
            \le \log p(x, y) \\
        \text{unlabelled:}\quad -\mathcal U(x) &= \sum_y q(y|x) (-\mathcal L(x, y)) + H[q(y|x)] \le \log p(x)

    No known label trains the classifier by these. ``Classification(ELBO(gradient=Enumerate()), weight=…)`` adds the
    term that does (the paper's eq. 9); for it the guide records ``log_classifier``, the classifier's log-probability of
    the label where there is one, 0 elsewhere. ``Enumerate()`` is the exact sum over classes of eq. 7.

    Sites: latents ``y`` (a whole number) with event shape () and ``z`` with event shape (latent_dim,), observed ``x``
    with event shape (data_dim,), plate ``data`` at dim -1. The guide records ``log_classifier`` where y is given.

    Parameters: ``decoder.*``, ``classifier.*``, ``encoder.*`` (see :class:`~elbozoo.zoo.MLP`), ``likelihood.*`` and
    ``posterior.*`` where these have any.

    Shapes: x (B, data_dim), labels (B,), y (B,), z (B, latent_dim), or with K particles in front.

    Args:
        data_dim: entries of one datum, flat.
        num_classes: C, at least 2.
        latent_dim: entries of z.
        network: architecture of classifier and encoder and, mirrored, of the decoder; dense, for these read x or z and
            y side by side.
        likelihood: family of x given y and z.
        guide: family of z given x and y.

    Raises: InvalidArgument for another network, a guide that climbs the joint density, and by ``check_data`` for labels
        that are neither a class nor -1.
    Limits: bounds of labelled and unlabelled data are of different quantities, ``log p(x, y)`` and ``log p(x)``; their
        mean is what the history shows. A sleep phase (``RWS``) teaches the classifier from unlabelled data alone.
        ``GumbelSoftmax`` and ``REBAR`` need a one-hot site, which NumPyro does not have.

    References:
        Kingma, Rezende, Mohamed & Welling 2014, Semi-supervised learning with deep generative models, arXiv 1406.5298,
        eqs. 6, 7 and 9; the defaults are 50 latents and one layer of 500 softplus units each way (section 4).

    Example:
        >>> spec = SemiSupervisedVAE(data_dim=64, latent_dim=8)
        >>> spec.check_data(np.zeros((3, 64)), np.array([-1, 0, 9]))
    """

    fitting_gradient: ClassVar[str] = "enumerate"

    data_dim: int = 784
    num_classes: int = 10
    latent_dim: int = 50
    network: Network = dataclasses.field(default_factory=lambda: MLP((500,), "softplus"))
    likelihood: Likelihood = dataclasses.field(default_factory=Bernoulli)
    guide: Family = dataclasses.field(default_factory=DiagonalGaussian)

    def __post_init__(self) -> None:
        whole_number("data_dim", self.data_dim)
        whole_number("num_classes", self.num_classes, 2)
        whole_number("latent_dim", self.latent_dim)
        instance_of("network", self.network, MLP)
        instance_of("likelihood", self.likelihood, Likelihood)
        instance_of("guide", self.guide, Family)
        self.likelihood.check_data_dim(self.data_dim)
        if self.guide.uses_log_joint:
            condition = "be one that does not climb log p(x, z), which here depends on y"
            raise must("guide", condition, type(self.guide).__name__, "Use DiagonalGaussian(), say")
        self.guide.num_outputs(self.latent_dim)  # refuses what the family cannot be of

    @property
    def encoder_sizes(self) -> tuple[int, int]:
        """Inputs and outputs of the encoder of z."""
        return self.data_dim + self.num_classes, self.guide.num_outputs(self.latent_dim)

    @property
    def decoder_sizes(self) -> tuple[int, int]:
        """Inputs and outputs of the decoder."""
        return self.num_classes + self.latent_dim, self.likelihood.num_outputs * self.data_dim

    def check(self, x: Any) -> None:
        self.likelihood.check(check_shape(x, self.data_dim))

    def check_data(self, x: Any, *others: Any) -> None:
        """Raise InvalidArgument unless ``x`` and the labels, where they are given, are data of the model."""
        if len(others) > 1:
            super().check_data(x, *others)
        self.check(x)
        if others:
            self._check_labels(np.asarray(others[0]), len(x))

    def _check_labels(self, y: np.ndarray, num_data: int) -> None:
        todo = "Pass one class a datum, and -1 where it is not known"
        if y.shape != (num_data,):
            raise must("y", f"have shape ({num_data},)", y.shape, todo)
        known = np.isin(y, np.arange(-1, self.num_classes))
        if not known.all():
            first = int(np.argmin(known))
            raise must("y", f"lie in 0 … {self.num_classes - 1} or be -1", f"{y[first]:g} at index {first}", todo)
