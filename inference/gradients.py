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

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Float

from elbozoo.inference.arrays import Array, namespace, stop_gradient, swap_each
from elbozoo.inference.errors import Refused, must
from elbozoo.inference.parts import number, one_of, whole_number
from elbozoo.inference.terms import Site, Terms

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
    allows_quantised = False
    """Whether it can serve a site whose path is a straight-through one, and train its codebook."""
    repeats = False
    """Whether it runs the program at several values for each particle, which an engine may then run as particles."""

    @property
    def uses_step(self) -> bool:
        """Whether a schedule in it reads the optimisation step."""
        return False

    @property
    def keeps_numbers(self) -> bool:
        """Whether it trains or remembers numbers of its own."""
        return False

    def initial(self, data: Any, sites: Mapping[str, Site]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The estimator's own numbers before the first step: those that gradients train, and its memory.

        Args:
            data: the program's first argument.
            sites: the guide's, of which only what is the same for every draw is to be read.
        """
        return {}, {}

    def remember(self, bound: Bound, terms: Terms) -> Mapping[str, Array]:
        """The memory after a step with these terms, under the same names."""
        return terms.memory

    @abstractmethod
    def surrogate(self, bound: Bound, terms: Terms) -> PerDatum:
        """A function of ``terms`` whose gradient is the estimate."""

    def value(self, bound: Bound, terms: Terms) -> PerDatum:
        """The bound's value that is reported; an estimator that knows it with less noise has its own."""
        return bound.model_bound.value(terms.log_weight)

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


Baseline = Literal["leave-one-out", "none", "running-mean", "learned"]


@dataclass(frozen=True)
class ScoreFunction(GradientEstimator):
    r"""The score-function (REINFORCE) gradient with a baseline.

    .. math:: \sum_k (F - b_k)\, \partial_\phi \log q_\phi(z_k|x) + \partial F

    No ``b_k`` depends on ``z_k``, so the gradient is unbiased whichever is used:

    - ``"leave-one-out"``: the bound with ``l_k`` replaced by the mean of the other particles' ``l`` (for IWAE this is
      VIMCO's geometric baseline; for the ELBO the leave-one-out mean). At K = 1 there is no other particle and no
      baseline.
    - ``"running-mean"``: a running mean of the bound over data and steps.
    - ``"learned"``: that, and a network of the datum with one hidden layer, trained by least squares (NVIL).
    - ``"none"``.

    Sites whose guide distribution is reparameterised take the pathwise gradient, unless ``pathwise_where_possible`` is
    False.

    Args:
        pathwise_where_possible: take the pathwise gradient at reparameterised sites; False scores every site.
        baseline: see above.
        baseline_decay: of the running mean.
        baseline_units: hidden units of the learned baseline.

    Raises: InvalidArgument for an unknown baseline; with a learned one, for data that the network cannot read.
    References: Williams 1992; Mnih & Rezende 2016 (arXiv 1602.06725), eqs. 7-10; Kool et al. 2019; Mnih & Gregor 2014
        (arXiv 1402.0030), section 2.3, without its normalisation by the variance, which is no baseline and rescales
        every step.
    """

    pathwise_where_possible: bool = True
    baseline: Baseline = "leave-one-out"
    baseline_decay: float = 0.9
    baseline_units: int = 100

    def __post_init__(self) -> None:
        one_of("baseline", self.baseline, get_args(Baseline))
        todo = "Pass baseline_decay=0.9, say"
        number("baseline_decay", self.baseline_decay, lambda v: 0 <= v < 1, "lie in [0, 1)", todo)
        whole_number("baseline_units", self.baseline_units)

    @property
    def allows_analytic_kl(self) -> bool:
        # A site scored at stopped values has no other way for the gradient of its analytic KL to come in.
        return self.pathwise_where_possible

    @property
    def allows_gain_per_dimension(self) -> bool:
        return self.pathwise_where_possible

    @property
    def keeps_numbers(self) -> bool:
        return self.baseline in ("running-mean", "learned")

    def initial(self, data: Any, sites: Mapping[str, Site]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        features, units = math.prod(np.shape(data)[1:]), self.baseline_units
        trained = hidden_layer(features, units) | {"readout": np.zeros(units)} if self.baseline == "learned" else {}
        return trained, {"mean": np.zeros(()), "share": np.zeros(())} if self.keeps_numbers else {}

    def remember(self, bound: Bound, terms: Terms) -> Mapping[str, Array]:
        if not terms.memory:
            return {}
        old, value = terms.memory, bound.value(stop_gradient(terms.log_weight)).mean()
        keep = self.baseline_decay
        return {"mean": keep * old["mean"] + (1 - keep) * value, "share": keep * old["share"] + (1 - keep)}

    def check_terms(self, bound: Bound, terms: Terms) -> None:
        if not self.pathwise_where_possible:
            refuse_point_masses("ScoreFunction(pathwise_where_possible=False)", terms)
        if self.baseline == "learned" and terms.log_lik.shape[1:] != np.shape(terms.data)[:1]:
            todo = 'Pass the data first, in a plate that every site shares, or use baseline="running-mean"'
            got = f"shape {tuple(np.shape(terms.data))} for bounds of shape {tuple(terms.log_lik.shape[1:])}"
            raise must("the program's first argument under a learned baseline", "have a row a datum", got, todo)

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
        value, baseline = bound.value(log_weight), self._baseline(bound, log_weight, terms)
        signal = value - stop_gradient(baseline)
        total = rest + (signal * sum(scored[1:], start=scored[0])).sum(axis=0)
        return total - 0.5 * (value - baseline) ** 2 if self.baseline == "learned" else total

    def _baseline(self, bound: Bound, log_weight: LogWeight, terms: Terms) -> Array:
        """``(K, *P)`` or ``(*P)``; differentiable in the learned one's weights."""
        if self.baseline == "leave-one-out":
            return leave_one_out(bound, log_weight)
        if self.baseline == "none":
            return 0.0 * log_weight[0]
        mean = terms.memory["mean"] / terms.memory["share"].clip(1e-6)
        if self.baseline == "running-mean":
            return mean
        xp, own = namespace(log_weight), terms.trained
        x = terms.data.reshape((terms.data.shape[0], -1)) * 1.0
        return mean + xp.tanh(x @ own["weight"] + own["bias"]) @ own["readout"]


@dataclass(frozen=True)
class NVIL(ScoreFunction):
    """The score function with a learned baseline of each datum: :class:`ScoreFunction` with ``baseline="learned"``.

    References: Mnih & Gregor 2014 (arXiv 1402.0030), sections 2.3.1 and 2.3.2.
    """

    baseline: Baseline = "learned"


@dataclass(frozen=True)
class VIMCO(ScoreFunction):
    r"""The score function for several particles, each with a baseline made of the others.

    :class:`ScoreFunction` under the name it has for IWAE: ``b_k`` is the bound with ``w_k`` replaced by the geometric
    mean of the other weights.

    Raises: InvalidArgument at K = 1, where there are no others. References: Mnih & Rezende 2016 (arXiv 1602.06725),
        eqs. 7-10.
    """

    def check_terms(self, bound: Bound, terms: Terms) -> None:
        super().check_terms(bound, terms)
        if self.baseline != "leave-one-out":
            raise must("baseline of VIMCO", 'be "leave-one-out"', repr(self.baseline), "Use ScoreFunction(baseline=…)")
        if terms.num_particles < 2:
            todo = "Pass num_particles=5, say, or use gradient=DisARM() or REBAR()"
            raise must("num_particles under VIMCO", "be at least 2", terms.num_particles, todo)


@dataclass(frozen=True)
class RWS(GradientEstimator):
    r"""Reweighted wake-sleep: model and guide climb objectives of their own, and no site needs a path.

    .. math:: \Delta\theta = \sum_k \tilde w_k\, \partial_\theta \log p_\theta(x, z_k),\qquad
        \Delta\phi = a \sum_k \tilde w_k\, \partial_\phi \log q_\phi(z_k | x)
        + s\, \partial_\phi \log q_\phi(z' | x'),\quad (z', x') \sim p_\theta

    with ``w̃`` the normalised weights of the K particles. The model's is IWAE's gradient; the guide's first term lowers
    ``KL(p(z|x) || q(z|x))`` (estimated with a bias that vanishes as K grows), its second the same under the model's
    own data. It follows the gradient of no single bound.

    Args:
        wake: a, weight of the wake phase of the guide.
        sleep: s, weight of its sleep phase; the program's observed sites must then observe its arguments as they came.

    Raises: Refused for bounds other than IWAE, point masses, and a wake phase of one particle.
    References: Bornschein & Bengio 2015 (arXiv 1406.2751), eqs. 4, 8, 9; Le et al. 2019 (arXiv 1805.10469).
    """

    wake: float = 1.0
    sleep: float = 0.0

    def __post_init__(self) -> None:
        for name in ("wake", "sleep"):
            number(name, getattr(self, name), lambda v: v >= 0, "be finite and at least 0", "1 and 0 is wake-wake")
        if self.wake + self.sleep == 0:
            raise must("wake + sleep", "be above 0 for the guide to learn", 0, "Pass wake=1.0")

    def check_terms(self, bound: Bound, terms: Terms) -> None:
        if type(bound).__name__ != "IWAE":
            todo = "Use IWAE(num_particles=5, gradient=RWS()), or another gradient"
            raise must("bound under RWS", "be IWAE", type(bound).__name__, todo, Refused)
        if self.wake and terms.num_particles < 2:
            todo = "Pass num_particles=5, say, or RWS(wake=0, sleep=1)"
            raise must("num_particles under RWS", "be at least 2 in the wake phase", terms.num_particles, todo)
        refuse_point_masses("RWS", terms)

    def surrogate(self, bound: Bound, terms: Terms) -> PerDatum:
        weight = bound.weight(stop_gradient(terms.log_weight))
        total = weighted(terms, weight, 0.0 * weight, None)
        if self.wake:
            log_guide = list(terms.log_guide_at_stopped_values().values())
            total = total + self.wake * (weight * sum(log_guide[1:], start=log_guide[0])).sum(axis=0)
        if self.sleep:
            total = total + self.sleep * terms.log_guide_of_dreams().mean(axis=0)
        return total


@dataclass(frozen=True)
class Covariance(GradientEstimator):
    r"""The thermodynamic objective's own score gradient, from self-normalised importance weights.

    With :math:`\pi_\beta \propto q (p/q)^\beta`,

    .. math:: \partial E_{\pi_\beta}[\log w] = E_{\pi_\beta}[\partial \log w]
        + \mathrm{Cov}_{\pi_\beta}[\partial \log \tilde\pi_\beta, \log w]

    and every expectation by the K particles with weights ``w^β``. It needs no path, so any site will do. Its bias in
    K is that of the weights; :class:`ScoreFunction` is unbiased for the K-sample value of :class:`TVO`.

    Raises: Refused for bounds other than TVO and point masses. References: Masrani et al. 2019 (arXiv 1907.00031),
        eq. 12.
    """

    def check_terms(self, bound: Bound, terms: Terms) -> None:
        if type(bound).__name__ != "TVO":
            raise must(
                "bound under Covariance", "be TVO", type(bound).__name__, "Use gradient=ScoreFunction()", Refused
            )
        refuse_point_masses("Covariance", terms)

    def surrogate(self, bound: Any, terms: Terms) -> PerDatum:
        log_weight = stop_gradient(terms.log_weight)
        score = 0.0 * log_weight
        for beta, width, w in bound.tempered(log_weight):
            centred = log_weight - (w * log_weight).sum(axis=0)
            score = score + width * w * (1.0 - (1.0 - beta) * centred)
        return weighted(terms, bound.weight(log_weight), 0.0 * log_weight, score)


def hidden_layer(inputs: int, units: int) -> dict[str, np.ndarray]:
    """Weight and bias of a tanh layer before it is trained: Glorot's uniform numbers, the same every time."""
    limit = (6.0 / (inputs + units)) ** 0.5
    return {"weight": np.random.default_rng(0).uniform(-limit, limit, (inputs, units)), "bias": np.zeros(units)}


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


def refuse_quantised(estimator: str, terms: Terms) -> None:
    """A quantised value has no derivative: what flows through it is a straight-through gradient, to be asked for."""
    for name, site in terms.sites.items():
        if site.codebook_error is not None:
            raise must(
                f"site '{name}' under {estimator}",
                "have a gradient, and leave no codebook untrained",
                f"a {site.guide_family}, whose values are quantised",
                "Use gradient=StraightThrough()",
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
