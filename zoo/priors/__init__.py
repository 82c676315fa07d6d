"""Priors p(z) of one latent vector: fixed, or learned together with the model.

Each is a spec; its forms are in ``priors_pyro.py`` and ``priors_numpyro.py``. A form is made from
``(spec, latent_dim, data_dim, unit_interval)``, the last being whether data lie in [0, 1]
(``Likelihood.unit_interval``). Called with the model's ``encode``, the map x -> q(z|x), which it reads where
``needs_encoder`` says so, it returns p(z): a distribution with batch shape () and event shape (latent_dim,).

A learned prior moves towards the aggregate posterior ``q(z) = 1/N sum_n q(z | x_n)``: the mean rate is
``I_q(x; z) + KL(q(z) || p(z))``, and the second term is all that a prior can lower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from elbozoo.guides import Family, NeuralSplineFlow
from elbozoo.inference.errors import must
from elbozoo.inference.parts import Part, instance_of, whole_number

__all__ = ["FlowPrior", "MixturePrior", "Prior", "StandardNormal", "VampPrior"]


@dataclasses.dataclass(frozen=True)
class Prior(Part):
    """A family for p(z)."""

    stem: ClassVar[str] = "priors"
    learned: ClassVar[bool] = True
    """Whether it has parameters."""
    needs_encoder: ClassVar[bool] = False
    """Whether it is made of q(z | x): then the latent must be one whose guide depends on x alone."""


@dataclasses.dataclass(frozen=True)
class StandardNormal(Prior):
    """The fixed prior ``p(z) = N(z; 0, I)``, against which a Gaussian guide has its KL in closed form.

    Shapes: z (latent_dim,). Units: nats (of a density). No parameters.

    Example:
        >>> StandardNormal().learned
        False
    """

    learned: ClassVar[bool] = False


@dataclasses.dataclass(frozen=True)
class MixturePrior(Prior):
    """A learned mixture of diagonal Gaussians: ``p(z) = sum_c w_c N(z; loc_c, diag(scale_c^2))``.

    ``w = softmax(logits)``, ``scale_c = exp(log_scale_c)``.

    Parameters: ``prior.logits`` (num_components,), from 0; ``prior.loc`` (num_components, latent_dim), from independent
    draws of ``N(0, 1 / latent_dim)``; ``prior.log_scale``, the same shape, from 0. So components begin about
    ``sqrt(2)`` of their scales apart, whatever the dimension: none begins out of the latents' reach, where it would get
    no gradient.

    Shapes: z (latent_dim,). Units: nats (of a density). The KL to it has no closed form and is sampled.

    Args:
        num_components: components of the mixture.

    Limits: one component is a Gaussian, with which the model is no richer than with ``StandardNormal`` (a decoder's
    first layer can move and scale its input).

    References:
        Dilokthanakul et al. 2016, Deep unsupervised clustering with Gaussian mixture VAEs, arXiv 1611.02648; Tomczak &
        Welling 2018, VAE with a VampPrior, arXiv 1705.07120, section 2.2 (there the baseline "MoG").

    Example:
        >>> MixturePrior(num_components=10)
        MixturePrior(num_components=10)
    """

    num_components: int = 10

    def __post_init__(self) -> None:
        whole_number("num_components", self.num_components)


@dataclasses.dataclass(frozen=True)
class FlowPrior(Prior):
    """A learned flow: a guide family whose parameters are constants, ``p(z) = family(z; outputs)``.

    With :class:`~elbozoo.guides.NeuralSplineFlow`, z is a standard normal moved by monotonic splines, coupling by
    coupling; densities and draws both take one pass.

    Parameters: ``prior.outputs`` (family's number of outputs,), from 0, in the place of an encoder's outputs;
    ``prior.flow.*``, as the family's own.

    Shapes: z (latent_dim,). Units: nats (of a density). The KL to it has no closed form and is sampled.

    Args:
        flow: the family; an :class:`~elbozoo.guides.InverseAutoregressiveFlow` takes a pass an entry for each density.

    References:
        Chen et al. 2017, Variational lossy autoencoder, arXiv 1611.02731, section 3.2; the splines: Durkan et al. 2019,
        Neural spline flows, arXiv 1906.04032.

    Example:
        >>> FlowPrior().flow.num_outputs(latent_dim=2) > 0
        True
    """

    flow: Family = dataclasses.field(default_factory=NeuralSplineFlow)

    def __post_init__(self) -> None:
        instance_of("flow", self.flow, Family)


@dataclasses.dataclass(frozen=True)
class VampPrior(Prior):
    """A learned mixture of the guide's own posteriors at pseudo-inputs: ``p(z) = 1/C sum_c q(z | u_c)``.

    The ELBO's best prior is the aggregate posterior ``1/N sum_n q(z | x_n)``, which costs N encodings and overfits;
    this one has C learned inputs in the data's place. Model and guide share the encoder, and gradients reach it through
    both: as the guide's, and as parameters of the model's (estimators that stop the guide's parameters inside
    ``log q(z|x)`` leave those inside ``log p(z)`` alone).

    Parameters: ``prior.pseudo_inputs`` a (num_components, data_dim), from independent draws of N(0, 1);
    ``u = sigmoid(a)`` where data lie in [0, 1], which keeps u in their range with a gradient everywhere (the paper's
    code clips, where an entry that has left the range never comes back), and ``u = a`` under a Gaussian likelihood:
    standardise such data, or pseudo-inputs begin far from them.

    Shapes: z (latent_dim,). Units: nats (of a density). The KL to it has no closed form and is sampled; a density costs
    num_components of q's, and every run of the model num_components encodings. With 500 components, 50 latents and
    batches of 128 that is most of a step's time on a CPU.

    Args:
        num_components: pseudo-inputs C.

    Limits: one pseudo-input makes the prior that one posterior. Pseudo-inputs equal to the data (C = N) make it the
    aggregate posterior: ``KL(q(z) || p(z)) = 0`` and the rate is ``I_q(x; z)``. It is refused where the guide of the
    latent does not depend on x alone (the top of a bottom-up hierarchy).

    References:
        Tomczak & Welling 2018, VAE with a VampPrior, arXiv 1705.07120, eq. 9.

    Example:
        >>> VampPrior().needs_encoder
        True
    """

    num_components: int = 500
    needs_encoder: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole_number("num_components", self.num_components)

    @staticmethod
    def encoder(encode: Any) -> Callable:
        """``encode``, refused unless it can be called."""
        if not callable(encode):
            todo = "Call the prior with the model's encode, or use StandardNormal() or MixturePrior()"
            raise must("encode", "be the map x -> q(z|x) that a VampPrior is made of", repr(encode), todo)
        return encode
