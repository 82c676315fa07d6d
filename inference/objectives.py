r"""Bounds on the log likelihood, each a function of the log weights of ``K`` particles.

Every bound is a frozen dataclass with ``bound(terms)`` (what is reported: nats per datum, higher is better) and
``surrogate(terms)`` (what is differentiated). The gradient estimator is a field, the training shape a wrapper
(:mod:`elbozoo.inference.shapes`), so any bound meets any fitting gradient under any schedule.

With ``l_k = log p(x, z_k) - log q(z_k | x)``, a bound is ``F(l_1 … l_K)`` and needs three formulas: its value ``F``,
its weights ``c_k = ∂F/∂l_k`` and its curvatures ``∂²F/∂l_k²``. The estimators in
:mod:`elbozoo.inference.gradients` need no more.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jaxtyping import Float

from elbozoo.inference.arrays import Array, logsumexp, softmax
from elbozoo.inference.errors import InvalidArgument, must
from elbozoo.inference.gradients import GradientEstimator, Pathwise, refuse_quantised
from elbozoo.inference.parts import instance_of, number, whole_number
from elbozoo.inference.terms import Terms, refuse_estimate

LogWeight = Float[Any, "K *P"]
PerDatum = Float[Any, "*P"]


class Objective(ABC):
    """What training maximises and what it reports.

    Subclasses are frozen dataclasses; both methods are pure and traceable by ``jax.jit``, ``jax.vmap`` and
    ``torch.func``.
    """

    num_particles: int
    gradient: GradientEstimator

    @property
    def uses_analytic_kl(self) -> bool:
        """Whether the engine should put analytic KLs into the terms where they are valid."""
        return False

    @property
    def uses_step(self) -> bool:
        """Whether a schedule in it reads the optimisation step."""
        return False

    def remember(self, terms: Terms) -> Mapping[str, Array]:
        """The gradient estimator's memory after a step with these terms."""
        return terms.memory

    @abstractmethod
    def bound(self, terms: Terms) -> PerDatum:
        """The reported bound, nats per datum: constants included, no shape, never read off a surrogate."""

    @abstractmethod
    def surrogate(self, terms: Terms) -> PerDatum:
        """A function whose gradient is the training gradient; its value means nothing."""

    def check(self, terms: Terms) -> None:
        """Refuse (:class:`Refused`) what cannot give a right gradient on these terms."""
        if not terms.sites:
            raise must(
                "guide", "draw at least one latent site", "none", "Write a guide with a sample site", InvalidArgument
            )

    def scalars(self, terms: Terms) -> dict[str, Any]:
        """Scalars to log beside the bound: the shaped bound, β, λ, …; empty without a shape."""
        return {}


class Bound(Objective):
    """A bound that is a function ``F`` of the log weights; ``linear`` says whether ``F`` is."""

    linear: ClassVar[bool] = False

    def __post_init__(self) -> None:
        whole_number("num_particles", self.num_particles)
        instance_of("gradient", self.gradient, GradientEstimator)

    @abstractmethod
    def value(self, log_weight: LogWeight) -> PerDatum:
        """``F(l)``."""

    @abstractmethod
    def weight(self, log_weight: LogWeight) -> LogWeight:
        """``∂F/∂l_k``."""

    @abstractmethod
    def curvature(self, log_weight: LogWeight) -> LogWeight:
        """``∂²F/∂l_k²``, the diagonal of the Hessian; the doubly reparameterised gradient needs it."""

    @property
    def model_bound(self) -> Bound:
        """The bound that the model's parameters climb, where it differs from the guide's (PIWAE)."""
        return self

    @property
    def uses_step(self) -> bool:
        return self.gradient.uses_step

    def remember(self, terms: Terms) -> Mapping[str, Array]:
        return self.gradient.remember(self, terms)

    def bound(self, terms: Terms) -> PerDatum:
        return self.gradient.value(self, terms)

    def surrogate(self, terms: Terms) -> PerDatum:
        return self.gradient.surrogate(self, terms)

    def check(self, terms: Terms) -> None:
        super().check(terms)
        if not self.linear:
            refuse_estimate(terms, type(self).__name__)
        if not self.gradient.allows_quantised:
            refuse_quantised(type(self.gradient).__name__, terms)
        self.gradient.check_terms(self, terms)
        # Python's own "once" is reset whenever a library touches the filters.
        seen = vars(self).setdefault("_warned", set())
        if terms.joint and self.num_particles > 1 and not isinstance(self, ELBO) and tuple(terms.sites) not in seen:
            seen.add(tuple(terms.sites))
            warnings.warn(
                f"{type(self).__name__}: a sample site lies outside the data plate, so each particle has one joint "
                "weight for the whole batch, and the bound is as loose as that weight varies. Put every latent inside "
                "the plate for per-datum weights, or use ELBO.",
                stacklevel=2,
            )


@dataclass(frozen=True)
class ELBO(Bound):
    r"""The evidence lower bound, averaged over particles.

    .. math:: \mathcal L = E_{q(z|x)}[\log p(x|z)] - \sum_s E_q[KL(q_s \| p_s)],\qquad F(l) = \tfrac1K \sum_k l_k

    With ``analytic_kl`` (default) each site's KL is its closed form where one exists and is valid (what the model's
    site depends on is drawn before it in the guide), and the sample ``log q - log p`` elsewhere. The sampled form has
    zero variance at the exact posterior, the analytic one usually less variance far from it; their expectations
    agree. Estimators that need the sampled form (STL, DReG) get it.

    Args:
        num_particles: K, draws averaged.
        gradient: gradient estimator; ``Pathwise()`` by default.
        analytic_kl: use closed-form KLs where valid.

    Units: nats per datum.
    Raises: InvalidArgument if ``num_particles < 1``.
    Limits: an exact guide makes it ``log p(x)``.
    References: Kingma & Welling 2014 (arXiv 1312.6114), eqs. 3, 7; Rezende et al. 2014 (arXiv 1401.4082).
    """

    linear: ClassVar[bool] = True
    num_particles: int = 1
    gradient: GradientEstimator = field(default_factory=Pathwise)
    analytic_kl: bool = True

    @property
    def uses_analytic_kl(self) -> bool:
        return self.analytic_kl and self.gradient.allows_analytic_kl

    def value(self, log_weight: LogWeight) -> PerDatum:
        return log_weight.mean(axis=0)

    def weight(self, log_weight: LogWeight) -> LogWeight:
        return log_weight.clip(0.0, 0.0) + 1.0 / log_weight.shape[0]  # not 0 l, which is nan at a weight of zero

    def curvature(self, log_weight: LogWeight) -> LogWeight:
        return log_weight.clip(0.0, 0.0)


@dataclass(frozen=True)
class IWAE(Bound):
    r"""The importance-weighted bound.

    .. math:: \mathcal L_K = E\Big[\log \tfrac1K \sum_k \frac{p(x, z_k)}{q(z_k|x)}\Big]

    Args:
        num_particles: K.
        gradient: ``Pathwise()``, ``DReG()`` (whose guide gradient does not drown in noise as K grows), ``STL()``
            (biased for K > 1), ….

    Units: nats per datum. Limits: K = 1 is the ELBO; K → ∞ is ``log p(x)``, the gap shrinking as ``Var(w)/(2K)``
        relative to the mean weight.
    References: Burda et al. 2016 (arXiv 1509.00519), eqs. 8, 14.
    """

    num_particles: int = 5
    gradient: GradientEstimator = field(default_factory=Pathwise)

    def value(self, log_weight: LogWeight) -> PerDatum:
        return logsumexp(log_weight) - math.log(log_weight.shape[0])

    def weight(self, log_weight: LogWeight) -> LogWeight:
        return softmax(log_weight)

    def curvature(self, log_weight: LogWeight) -> LogWeight:
        w = softmax(log_weight)
        return w * (1.0 - w)


@dataclass(frozen=True)
class Renyi(Bound):
    r"""The variational Rényi bound of order α.

    .. math:: \mathcal L_\alpha = \frac{1}{1-\alpha} \log \tfrac1K \sum_k w_k^{1-\alpha}

    Args:
        alpha: order, any real but 1. 0 is IWAE; α → 1 is the ELBO; negative values may exceed ``log p(x)`` at finite K.
        num_particles: K.
        gradient: gradient estimator.

    Raises: InvalidArgument for α = 1 (use ELBO). Units: nats per datum.
    References: Li & Turner 2016 (arXiv 1602.02311), eqs. 10, 11.
    """

    alpha: float = 0.5
    num_particles: int = 5
    gradient: GradientEstimator = field(default_factory=Pathwise)

    def __post_init__(self) -> None:
        super().__post_init__()
        todo = "Use ELBO(), the limit α → 1, or another order"
        number("alpha", self.alpha, lambda v: v != 1, "be finite and differ from 1", todo)

    def value(self, log_weight: LogWeight) -> PerDatum:
        s = 1.0 - self.alpha
        return (logsumexp(s * log_weight) - math.log(log_weight.shape[0])) / s

    def weight(self, log_weight: LogWeight) -> LogWeight:
        return softmax((1.0 - self.alpha) * log_weight)

    def curvature(self, log_weight: LogWeight) -> LogWeight:
        w = self.weight(log_weight)
        return (1.0 - self.alpha) * w * (1.0 - w)


@dataclass(frozen=True)
class MIWAE(Bound):
    r"""The mean of ``outer`` independent IWAE bounds of ``inner`` particles each.

    .. math:: \tfrac1M \sum_m \log \tfrac1L \sum_l w_{ml}

    Args:
        outer: M, groups averaged.
        inner: L, particles within a group; K = M·L.
        gradient: gradient estimator.

    Units: nats per datum. Limits: L = 1 is the ELBO, M = 1 is IWAE.
    References: Rainforth et al. 2018 (arXiv 1802.04537), eq. 15.
    """

    outer: int = 8
    inner: int = 8
    gradient: GradientEstimator = field(default_factory=Pathwise)

    def __post_init__(self) -> None:
        whole_number("outer", self.outer)
        whole_number("inner", self.inner)
        super().__post_init__()

    @property
    def num_particles(self) -> int:
        return self.outer * self.inner

    def _grouped(self, log_weight: LogWeight) -> Array:
        return log_weight.reshape((self.outer, self.inner, *log_weight.shape[1:]))

    def value(self, log_weight: LogWeight) -> PerDatum:
        return (logsumexp(self._grouped(log_weight), axis=1) - math.log(self.inner)).mean(axis=0)

    def weight(self, log_weight: LogWeight) -> LogWeight:
        return softmax(self._grouped(log_weight), axis=1).reshape(tuple(log_weight.shape)) / self.outer

    def curvature(self, log_weight: LogWeight) -> LogWeight:
        w = self.outer * self.weight(log_weight)
        return w * (1.0 - w) / self.outer


@dataclass(frozen=True)
class CIWAE(Bound):
    r"""A convex combination of the ELBO and IWAE: ``β ELBO + (1 - β) IWAE``.

    Args:
        beta: weight of the ELBO, in [0, 1].
        num_particles: K.
        gradient: gradient estimator.

    Units: nats per datum. Limits: β = 0 is IWAE, β = 1 the ELBO.
    References: Rainforth et al. 2018 (arXiv 1802.04537), eq. 16.
    """

    beta: float = 0.5
    num_particles: int = 5
    gradient: GradientEstimator = field(default_factory=Pathwise)

    def __post_init__(self) -> None:
        super().__post_init__()
        number("beta", self.beta, lambda v: 0 <= v <= 1, "lie in [0, 1]", "0 is IWAE, 1 is the ELBO")

    def value(self, log_weight: LogWeight) -> PerDatum:
        iwae = logsumexp(log_weight) - math.log(log_weight.shape[0])
        if self.beta in (0.0, 1.0):  # 0 times an infinity is nan
            return log_weight.mean(axis=0) if self.beta else iwae
        return self.beta * log_weight.mean(axis=0) + (1.0 - self.beta) * iwae

    def weight(self, log_weight: LogWeight) -> LogWeight:
        return self.beta / log_weight.shape[0] + (1.0 - self.beta) * softmax(log_weight)

    def curvature(self, log_weight: LogWeight) -> LogWeight:
        w = softmax(log_weight)
        return (1.0 - self.beta) * w * (1.0 - w)


@dataclass(frozen=True)
class PIWAE(MIWAE):
    r"""Partially importance-weighted: the model climbs ``IWAE(outer·inner)``, the guide ``MIWAE(outer, inner)``.

    The same ``K = M·L`` particles serve both: the model gets the tightest bound, the guide the better gradient signal.
    The reported bound is the model's, ``IWAE(M·L)``. A parameter that model and guide share gets both gradients,
    each for its role.

    Args:
        outer: M, groups of the guide's bound.
        inner: L, particles within a group.
        gradient: gradient estimator (of the guide's bound).

    Units: nats per datum. Limits: M = 1 is IWAE.
    References: Rainforth et al. 2018 (arXiv 1802.04537), section 4.
    """

    @property
    def model_bound(self) -> Bound:
        return IWAE(self.num_particles)


@dataclass(frozen=True)
class TVO(Bound):
    r"""The thermodynamic variational objective, lower (left Riemann) form.

    .. math:: \sum_{j=0}^{J-1} (\beta_{j+1} - \beta_j)\, \hat E_{\pi_{\beta_j}}[\log w],\qquad
        \hat E_{\pi_\beta}[\log w] = \sum_k \frac{w_k^\beta}{\sum_i w_i^\beta} \log w_k

    with ``β_0 = 0``, ``β_J = 1`` and the points between spaced evenly in ``log β`` from ``first_beta``. The
    self-normalised expectation at β is the slope of the convex ``β ↦ log mean_k w_k^β``, so at every K the sum lies
    between the ELBO and IWAE_K: the K-sample value is itself a lower bound, and what is differentiated is exactly its
    expectation.

    Args:
        partitions: J, number of intervals.
        num_particles: K.
        first_beta: β_1 when J > 1, in (0, 1).
        gradient: gradient estimator.

    Units: nats per datum. Limits: J = 1 is the ELBO; J → ∞ is IWAE_K.
    References: Masrani et al. 2019 (arXiv 1907.00031), eqs. 7, 10; the log-uniform spacing is theirs (section 6).
    """

    partitions: int = 5
    num_particles: int = 10
    first_beta: float = 0.025
    gradient: GradientEstimator = field(default_factory=Pathwise)

    def __post_init__(self) -> None:
        whole_number("partitions", self.partitions)
        super().__post_init__()
        number("first_beta", self.first_beta, lambda v: 0 < v < 1, "lie in (0, 1)", "The paper uses values near 0.03")

    def _intervals(self) -> list[tuple[float, float]]:
        """Pairs (left point, width)."""
        inner = self.partitions - 1
        points = [0.0, *(self.first_beta ** (1.0 - j / inner) for j in range(inner))] if inner else [0.0]
        points.append(1.0)
        return [(a, b - a) for a, b in itertools.pairwise(points)]

    def tempered(self, log_weight: LogWeight) -> Iterator[tuple[float, float, LogWeight]]:
        """For every interval its left point, its width and the normalised weights ``w^β``."""
        for b, width in self._intervals():
            yield b, width, softmax(b * log_weight)

    def value(self, log_weight: LogWeight) -> PerDatum:
        (_, first), *rest = self._intervals()  # at b = 0 the weights are equal, whatever l is
        finite = log_weight.clip(-3e38, 3e38)  # above it a particle of l = -inf has no weight, and counts 0
        slopes = (width * (softmax(b * log_weight) * finite).sum(axis=0) for b, width in rest)
        return sum(slopes, start=first * log_weight.mean(axis=0))

    def weight(self, log_weight: LogWeight) -> LogWeight:
        total = 0.0 * log_weight
        for b, width, w in self.tempered(log_weight):
            total = total + width * w * self._slope(b, w, log_weight)
        return total

    def curvature(self, log_weight: LogWeight) -> LogWeight:
        total = 0.0 * log_weight
        for b, width, w in self.tempered(log_weight):
            u = self._slope(b, w, log_weight)
            total = total + width * b * w * (u + 1.0 - 2.0 * w * u)
        return total

    @staticmethod
    def _slope(b: float, w: Array, log_weight: Array) -> Array:
        return 1.0 + b * (log_weight - (w * log_weight).sum(axis=0))
