r"""Gradient estimators for any bound ``F(l_1 … l_K)``.

Each estimator is a choice of three coefficients per particle: ``c_k`` on the model's parameters, ``d_k`` on the paths
through the drawn values, ``e_k`` on the guide's parameters inside ``log q`` (the score, whose expectation for
constant ``e`` is zero):

.. math:: g = \sum_k c_k\, \partial_\theta l_k + d_k\, \partial_{z_k} l_k\, \partial_\phi z_k
    - e_k\, \partial_\phi \log q_\phi(z_k)

=============  ============  =======================  =======================================
estimator      ``c_k``       ``d_k``                  ``e_k``
=============  ============  =======================  =======================================
Pathwise       ``∂F/∂l_k``   ``∂F/∂l_k``              ``∂F/∂l_k``
STL            ``∂F/∂l_k``   ``∂F/∂l_k``              0
DReG           ``∂F/∂l_k``   ``∂F/∂l_k - ∂²F/∂l_k²``  0
ScoreFunction  ``∂F/∂l_k``   0                        ``∂F/∂l_k - (F - baseline_k)``
=============  ============  =======================  =======================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Float

from elbozoo.inference.arrays import Array, stop_gradient, swap_each
from elbozoo.inference.errors import Refused, must
from elbozoo.inference.terms import Terms

if TYPE_CHECKING:
    from elbozoo.inference.objectives import Bound

LogWeight = Float[Any, "K *P"]
PerDatum = Float[Any, "*P"]

# Below this a particle's coefficient on the model is replaced by it: the path's factor d/c stays finite, the model's
# gradient moves by less than float64 can tell.
_TINY = 1e-16


class GradientEstimator(ABC):
    """How the gradient of a bound is estimated."""

    allows_analytic_kl = False
    allows_gain_per_dimension = True

    @abstractmethod
    def surrogate(self, bound: Bound, terms: Terms) -> PerDatum:
        """A function of ``terms`` whose gradient is the estimate."""

    def check_terms(self, bound: Bound, terms: Terms) -> None:
        """Refuse sites that this estimator cannot serve, at the first step.

        Default: every site must be reparameterised.
        """
        for name, site in terms.sites.items():
            if not site.reparameterised:
                raise must(
                    f"site '{name}' under {type(self).__name__}",
                    "have a reparameterised guide distribution",
                    site.guide_family or "one without rsample",
                    "Use gradient=ScoreFunction(), which handles such sites",
                    Refused,
                )


@dataclass(frozen=True)
class Pathwise(GradientEstimator):
    """Total derivative through the reparameterised samples, ``∇ F(l(ε, θ, φ))``: unbiased for every bound.

    Its guide gradient's signal-to-noise ratio falls as ``K^-1/2`` for IWAE; see :class:`DReG`.
    References: Kingma & Welling 2014; Rainforth et al. 2018 (arXiv 1802.04537), theorem 1.
    """

    allows_analytic_kl = True

    def surrogate(self, bound: Bound, terms: Terms) -> PerDatum:
        if bound.model_bound is bound:
            return bound.value(terms.log_weight)
        log_weight = stop_gradient(terms.log_weight)
        weight = bound.weight(log_weight)
        return weighted(terms, bound.model_bound.weight(log_weight), weight, weight)


@dataclass(frozen=True)
class STL(GradientEstimator):
    """Sticking the landing: the pathwise gradient without the score term, zero at the exact posterior.

    Unbiased for the ELBO; **biased for K > 1** under IWAE and its relatives (use :class:`DReG`).
    References: Roeder et al. 2017 (arXiv 1703.09194), eq. 8; the bias: Tucker et al. 2019 (arXiv 1810.04152).
    """

    def surrogate(self, bound: Bound, terms: Terms) -> PerDatum:
        if bound.model_bound is bound:
            return bound.value(terms.freeze().log_weight)
        log_weight = stop_gradient(terms.log_weight)
        return weighted(terms, bound.model_bound.weight(log_weight), bound.weight(log_weight), None)


@dataclass(frozen=True)
class DReG(GradientEstimator):
    r"""The doubly reparameterised gradient: the score term is reparameterised once more, unbiased for every K.

    For a bound F, ``E[c_k ∂_φ log q] = E[∂_{z_k} c_k ∂_φ z_k]`` turns the score into a path with coefficient
    ``∂²F/∂l_k²``. For IWAE the whole path's coefficient is then the squared normalised weight. Under a shape with gain
    β on the rate it is ``c_k - β ∂²F/∂l_k²``. It needs one gain for all sites and dimensions, so shapes that gate
    single dimensions are refused.

    References: Tucker et al. 2019 (arXiv 1810.04152), eq. 8; for α ≠ 0 their appendix; here for any F.
    """

    allows_gain_per_dimension = False

    def check_terms(self, bound: Bound, terms: Terms) -> None:
        super().check_terms(bound, terms)
        if bound.linear:  # no score is reparameterised
            return
        for name, site in terms.sites.items():
            if not site.plain:
                raise must(
                    f"site '{name}' under DReG",
                    "have no scale or mask but that of the plates that all sites share: its score has another weight",
                    "one of its own",
                    "Use gradient=Pathwise(), or ELBO(gradient=STL())",
                    Refused,
                )
        refuse_point_masses("DReG", terms)

    def surrogate(self, bound: Bound, terms: Terms) -> PerDatum:
        log_weight = stop_gradient(terms.log_weight)
        path = bound.weight(log_weight) - terms.gain * bound.curvature(log_weight)
        return weighted(terms, bound.model_bound.weight(log_weight), path, None)


@dataclass(frozen=True)
class ScoreFunction(GradientEstimator):
    r"""The score-function (REINFORCE) gradient with a leave-one-out baseline.

    .. math:: \sum_k (F - b_k)\, \partial_\phi \log q_\phi(z_k|x) + \partial F

    ``b_k`` is the bound with ``l_k`` replaced by the mean of the other particles' ``l`` (for IWAE this is VIMCO's
    geometric baseline; for the ELBO the leave-one-out mean); it does not depend on ``z_k``, so the gradient stays
    unbiased. At K = 1 there is no other particle and no baseline. Sites whose guide distribution is reparameterised
    take the pathwise gradient, unless ``pathwise_where_possible`` is False.

    Args:
        pathwise_where_possible: take the pathwise gradient at reparameterised sites; False scores every site.

    References: Williams 1992; Mnih & Rezende 2016 (arXiv 1602.06725), eqs. 7–10; Kool et al. 2019.
    """

    pathwise_where_possible: bool = True

    @property
    def allows_analytic_kl(self) -> bool:
        # A site scored at stopped values has no other way for the gradient of its analytic KL to come in.
        return self.pathwise_where_possible

    @property
    def allows_gain_per_dimension(self) -> bool:
        return self.pathwise_where_possible

    def check_terms(self, bound: Bound, terms: Terms) -> None:
        if not self.pathwise_where_possible:
            refuse_point_masses("ScoreFunction(pathwise_where_possible=False)", terms)

    def surrogate(self, bound: Bound, terms: Terms) -> PerDatum:
        log_weight = stop_gradient(terms.log_weight)
        if self.pathwise_where_possible:
            sites = [s for s in terms.sites.values() if not s.reparameterised]
            scored: list[Array] = [s.log_guide if s.score is None else s.score for s in sites]
            rest = Pathwise().surrogate(bound, terms)
        else:
            scored = list(terms.log_guide_at_stopped_values(as_drawn=True).values())
            weight = bound.weight(log_weight)
            rest = weighted(terms, bound.model_bound.weight(log_weight), 0.0 * weight, weight)
        if not scored:
            return rest
        signal = bound.value(log_weight) - leave_one_out(bound, log_weight)
        return rest + (signal * sum(scored[1:], start=scored[0])).sum(axis=0)


def refuse_point_masses(estimator: str, terms: Terms) -> None:
    """A point mass has no score. One that is a function of an auxiliary draw (autoguides make them) needs none."""
    auxiliary = False
    for name, site in terms.sites.items():
        auxiliary |= site.auxiliary
        if site.guide_family == "Delta" and not auxiliary:
            raise must(
                f"site '{name}' under {estimator}",
                "have a density to take the score of",
                "a Delta",
                "Use gradient=Pathwise()",
                Refused,
            )


def leave_one_out(bound: Bound, log_weight: LogWeight) -> Array:
    """``F`` with ``l_k`` replaced by the mean of the others, ``(K, *P)``; zero at K = 1. Holds K² numbers a datum."""
    num = log_weight.shape[0]
    if num == 1:
        return 0.0 * log_weight
    # Not the sum less each: a particle of zero weight has l = -inf, and inf - inf is nan.
    mean_of_others = swap_each(log_weight, log_weight.clip(0.0, 0.0)).sum(axis=0) / (num - 1)
    return bound.value(swap_each(log_weight, mean_of_others))


def weighted(terms: Terms, model: LogWeight, path: LogWeight, score: LogWeight | None) -> PerDatum:
    """The surrogate of constant coefficients: ``model`` on parameters, ``path`` on drawn values, ``score`` on log q.

    One backward pass serves model and path: gradients into ``z_k`` are rescaled by ``path / model``.
    """
    model = model + _TINY * (abs(model) < _TINY)
    total = (model * terms.freeze(path / model).log_weight).sum(axis=0)
    if score is not None:
        for name, log_guide in terms.log_guide_at_stopped_values().items():
            total = total - (score * terms.sites[name].gain * log_guide).sum(axis=0)
    return total
