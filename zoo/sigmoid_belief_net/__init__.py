"""The sigmoid belief network: layers of binary latents."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from elbozoo.inference.errors import must
from elbozoo.inference.parts import instance_of, whole_number, whole_numbers
from elbozoo.zoo.likelihoods import AutoregressiveBernoulli, Bernoulli, Likelihood
from elbozoo.zoo.networks import MLP
from elbozoo.zoo.spec import Spec, check_shape

__all__ = ["SigmoidBeliefNet"]


@dataclasses.dataclass(frozen=True)
class SigmoidBeliefNet(Spec):
    """A sigmoid belief network: layers of binary latents, each unit a coin whose odds the layer above sets.

    ``z_L ~ prod_i Bernoulli(s(prior_i))``, ``z_l | z_{l+1} ~ prod_i Bernoulli(s(decoder_l(2 z_{l+1} - 1)_i))``,
    ``x | z_1 ~ likelihood(decoder_0(2 z_1 - 1))``, s the sigmoid; the guide climbs from the data:
    ``q(z | x) = q(z_1 | x) q(z_2 | z_1) ... q(z_L | z_{L-1})``, each factor with logits ``encoder_l(2 below - 1)``. So
    every network sees its binary inputs as -1 and 1.

    With ``autoregressive_guide`` unit i of a layer also sees the units before it:
    ``logit q(z_i = 1 | z_{<i}, below) = encoder(2 below - 1)_i + sum_{j<i} A_ij z_j``.

    Sites: latents ``z1`` (next to the data) to ``zL`` with event shapes (latent_dims[l-1],), observed ``x`` with event
    shape (data_dim,), plate ``data`` at dim -1. The model draws ``zL`` first, the guide ``z1``, so only the top
    layer's KL, whose prior has no parents, has a closed form, and that under the factorised guide.

    Parameters: ``prior.logits`` (latent_dims[-1],), from 0; ``decoders.<l>.*`` and ``encoders.<l>.*``, 0 next to the
    data (see :class:`~elbozoo.zoo.MLP`), weights Glorot-uniform and biases 0 at first; ``likelihood.*`` where it has
    any; with ``autoregressive_guide`` ``posteriors.<l>.autoregression`` A (units, units), from 0, of which only what is
    below the diagonal counts.

    Shapes: x (B, data_dim), z_l (B, latent_dims[l-1]), or with (K, B) in front under an outer plate of particles.

    Args:
        data_dim: entries of one datum, flat.
        latent_dims: units of each layer of latents, next to the data first; one to three layers.
        hidden: units of tanh layers inside every network between two layers, next to the data first; none for the
            linear network, whose logits are affine in the layer above.
        autoregressive_guide: let the units within a layer of the guide depend on one another.
        likelihood: family of x given z_1.

    Raises: InvalidArgument for no layer of latents or more than three.

    Limits: no latent is reparameterised. ``Pathwise()`` is refused: train with ``IWAE(5, gradient=VIMCO())``, or with
    ``DisARM()``, ``NVIL()``, ``RWS()``, ``REBAR()`` or ``GumbelSoftmax()``. Draws from the autoregressive guide take a
    pass a unit, and it has a place under the gradients that take any family alone (``VIMCO``, ``ScoreFunction``,
    ``NVIL``, ``RWS``). Up to 12 latent units in all ``exact_log_lik`` sums over the states.

    References:
        Neal 1992, Connectionist learning of belief networks, Artificial Intelligence 56; Mnih & Gregor 2014, Neural
        variational inference and learning in belief networks, arXiv 1402.0030 (one to three layers of 200 units, and
        the guide that climbs); Mnih & Rezende 2016, Variational inference for Monte Carlo objectives, arXiv 1602.06725
        (the same under several particles). Units that depend on those before them: Gregor et al. 2014, Deep
        autoregressive networks, arXiv 1310.8499.

    Example:
        >>> SigmoidBeliefNet(data_dim=64, latent_dims=(8, 4)).decoder_sizes
        ((8, 64), (4, 8))
    """

    fitting_gradient: ClassVar[str] = "nvil"
    data_decoder: ClassVar[str] = "decoders.0"

    data_dim: int = 784
    latent_dims: tuple[int, ...] = (200,)
    hidden: tuple[int, ...] = ()
    autoregressive_guide: bool = False
    likelihood: Likelihood = dataclasses.field(default_factory=Bernoulli)

    def __post_init__(self) -> None:
        whole_number("data_dim", self.data_dim)
        for name in ("latent_dims", "hidden"):
            object.__setattr__(self, name, whole_numbers(name, getattr(self, name)))
        if not 1 <= len(self.latent_dims) <= 3:
            todo = "Pass latent_dims=(200, 200), say"
            raise must("latent_dims", "have one to three layers", self.latent_dims, todo)
        if not isinstance(self.autoregressive_guide, bool):
            raise must(
                "autoregressive_guide", "be True or False", repr(self.autoregressive_guide), "Pass one of the two"
            )
        instance_of("likelihood", self.likelihood, Likelihood)
        self.likelihood.check_data_dim(self.data_dim)

    @property
    def network(self) -> MLP:
        """The architecture of every encoder and, mirrored, of every decoder."""
        return MLP(self.hidden)

    @property
    def decoder_sizes(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of each decoder, next to the data first."""
        outputs = (self.likelihood.num_outputs * self.data_dim, *self.latent_dims[:-1])
        return tuple(zip(self.latent_dims, outputs, strict=True))

    @property
    def encoder_sizes(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of each encoder, next to the data first."""
        return tuple(zip((self.data_dim, *self.latent_dims), self.latent_dims, strict=False))

    @property
    def posteriors(self) -> tuple[Bernoulli, ...]:
        """What family of binary vectors an encoder's outputs are made into, by layer."""
        return tuple(AutoregressiveBernoulli(n) if self.autoregressive_guide else Bernoulli() for n in self.latent_dims)

    def check(self, x: Any) -> None:
        self.likelihood.check(check_shape(x, self.data_dim))
