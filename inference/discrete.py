r"""Gradient estimators for discrete sites that look at more than the drawn state.

They run the program again with other values at its latent sites (:meth:`Terms.again`): the opposite state (DisARM),
a relaxed one (Gumbel-softmax, REBAR), every one (enumeration). Written once for arrays of either library, for the sites
of ours or of a user's program. What is reported is always the bound of the discrete model, off the first run.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float

from elbozoo.inference.arrays import Array, namespace, stop_gradient, swap_each
from elbozoo.inference.enumeration import joint_states
from elbozoo.inference.errors import Refused, must
from elbozoo.inference.gradients import GradientEstimator, Pathwise
from elbozoo.inference.parts import number
from elbozoo.inference.terms import Choice, Draw, Site, Terms

if TYPE_CHECKING:
    from elbozoo.inference.objectives import Bound

PerDatum = Float[Any, "*P"]

RELAXABLE = ("Bernoulli", "OneHotCategorical")


class DiscreteEstimator(GradientEstimator):
    """One that needs to know the family of every site that is not reparameterised.

    Sites that are reparameterised take the pathwise gradient.
    """

    allows_analytic_kl = True
    families: ClassVar[tuple[str, ...]] = RELAXABLE
    instead: ClassVar[str] = "Use gradient=VIMCO() or ScoreFunction(), which take any family"

    def check_terms(self, bound: Bound, terms: Terms) -> None:
        name = type(self).__name__
        if not any(_is_discrete(site) for site in terms.sites.values()):
            got = ", ".join(f"'{n}' of a {s.guide_family}" for n, s in terms.sites.items())
            todo = "Use gradient=Pathwise(), or DReG()"
            raise must(f"the guide under {name}", "have a site that is not reparameterised", got, todo, Refused)
        for site_name, site in terms.sites.items():
            if _is_discrete(site) and site.guide_family not in self.families:
                wanted = " or ".join(self.families)
                todo = self.instead
                if site.guide_family == "Categorical" and "OneHotCategorical" in self.families:
                    todo = f"Write it as a OneHotCategorical, or: {todo}"
                raise must(f"site '{site_name}' under {name}", f"be of a {wanted}", site.guide_family, todo, Refused)


def _is_discrete(site: Site) -> bool:
    return not site.reparameterised


def _discrete(terms: Terms) -> list[str]:
    """Names of the sites that are not reparameterised, in the guide's order."""
    return [name for name, site in terms.sites.items() if _is_discrete(site)]


def _refuse_two_bounds(estimator: str, bound: Bound) -> None:
    """A relaxed program has one set of paths, and so one bound for model and guide to climb."""
    if bound.model_bound is not bound:
        todo = "Use IWAE or MIWAE, or gradient=VIMCO()"
        raise must(f"bound under {estimator}", "be one for model and guide", type(bound).__name__, todo, Refused)


def _score(site: Site) -> Array:
    """``log q`` of the site's value as it was drawn."""
    return site.log_guide if site.score is None else site.score


# --- antithetic pairs ---------------------------------------------------------------------------------------------


class _Antithetic(DiscreteEstimator):
    """Compare the drawn state with the one that the opposite uniform number gives, site by site."""

    families = ("Bernoulli",)

    def surrogate(self, bound: Bound, terms: Terms) -> PerDatum:
        log_weight = stop_gradient(terms.log_weight)
        value, total = bound.value(log_weight), Pathwise().surrogate(bound, terms)
        for name in _discrete(terms):
            other = terms.again(partial(self._opposite, name, _before(terms, name)))
            swapped = bound.value(swap_each(log_weight, stop_gradient(other.log_weight)))
            total = total + ((value - swapped) * other.scores[name]).sum(axis=0)
        return total

    def _opposite(self, name: str, before: frozenset[str], draw: Draw) -> Choice:
        """The opposite state at the site ``name``; what comes before it as it was, what comes after drawn anew."""
        if draw.name != name:
            return Choice(draw.drawn if draw.name in before else draw.value)
        xp = namespace(draw.logits)
        logits = stop_gradient(draw.logits)
        uniform = _uniform_given(xp, logits, draw.drawn, draw.uniform())
        opposite = _indicator(uniform < _sigmoid(xp, logits), logits)  # the draw was 1[1 - u < p]
        value = xp.where(opposite == draw.drawn, draw.drawn, 1 - draw.drawn)  # of the draw's own type
        return Choice(value, score=self.coefficient(xp, logits, draw.drawn, opposite, uniform) * draw.logits)

    @abstractmethod
    def coefficient(self, xp: Any, logits: Array, drawn: Array, opposite: Array, uniform: Array) -> Array:
        """What the difference of the bound's values is multiplied by, a logit."""


@dataclass(frozen=True)
class DisARM(_Antithetic):
    r"""Antithetic pairs of Bernoulli draws, with the uniform numbers integrated out. Unbiased.

    With ``b = 1[u > σ(-α)]``, ``b̃ = 1[1 - u > σ(-α)]`` and ``F̃_k`` the bound with particle k's state replaced,

    .. math:: g_{\alpha_i} = \tfrac12 (F - \tilde F_k)\, (-1)^{\tilde b_i}\, 1[b_i \ne \tilde b_i]\, \sigma(|\alpha_i|)

    It is :class:`ARM` given the pair alone, so its variance is never larger. Where sites depend on one another each has
    a pair of its own, drawn given the sites before it; the sites after it are drawn anew.

    Limits: costs one more forward pass a site. Bernoulli sites alone.
    References: Dong, Mnih & Tucker 2020 (arXiv 2006.10680), eq. 6 and section 3.2; several particles, section 4.
    """

    def coefficient(self, xp: Any, logits: Array, drawn: Array, opposite: Array, uniform: Array) -> Array:
        sign = 1.0 - 2.0 * opposite
        return 0.5 * sign * (drawn != opposite) * _sigmoid(xp, abs(logits))


@dataclass(frozen=True)
class ARM(_Antithetic):
    r"""Augment, REINFORCE, merge: antithetic pairs of Bernoulli draws. Unbiased.

    ``g_α = (f(1[u > σ(-α)]) - f(1[u < σ(α)])) (u - 1/2)``; sites and particles as in :class:`DisARM`, which has
    the smaller variance.

    Limits: costs one more forward pass a site. Bernoulli sites alone.
    References: Yin & Zhou 2019 (arXiv 1807.11143), eq. 6.
    """

    def coefficient(self, xp: Any, logits: Array, drawn: Array, opposite: Array, uniform: Array) -> Array:
        return uniform - 0.5


def _before(terms: Terms, name: str) -> frozenset[str]:
    """The sites that the guide draws before ``name``."""
    names = list(terms.sites)
    return frozenset(names[: names.index(name)])


def _sigmoid(xp: Any, x: Array) -> Array:
    return 0.5 + 0.5 * xp.tanh(0.5 * x)


def _indicator(condition: Array, like: Array) -> Array:
    """1 where ``condition``, else 0, in the type of ``like``."""
    xp = namespace(like)
    return xp.where(condition, xp.ones_like(like), xp.zeros_like(like))


def _uniform_given(xp: Any, logits: Array, drawn: Array, uniform: Array) -> Array:
    """A uniform number given that ``drawn = 1[u > σ(-logits)]``."""
    zero = _sigmoid(xp, -logits)
    return xp.where(drawn > 0.5, zero + uniform * (1.0 - zero), uniform * zero)


# --- relaxations --------------------------------------------------------------------------------------------------


def _perturbed(draw: Draw, uniform: Array) -> Array:
    """Logits with logistic or Gumbel noise, which nothing is known of."""
    xp = namespace(draw.logits)
    if draw.family == "Bernoulli":
        return draw.logits + xp.log(uniform) - xp.log1p(-uniform)
    return draw.logits - xp.log(-xp.log(uniform))


def _perturbed_given_drawn(draw: Draw, uniform: Array) -> Array:
    """The same given the state that was drawn; differentiable in the logits.

    By Tucker et al.'s appendix C, with logarithms of sums: a state that is all but sure leaves no infinity.
    """
    xp, logits = namespace(draw.logits), draw.logits
    if draw.family == "Bernoulli":
        logistic, zero = xp.log(uniform) - xp.log1p(-uniform), xp.zeros_like(logits)
        one = xp.logaddexp(logistic + xp.logaddexp(logits, zero), zero)
        return xp.where(draw.drawn > 0.5, one, -xp.logaddexp(logistic + xp.logaddexp(-logits, zero), zero))
    log_exponential = xp.log(-xp.log(uniform))
    log_winner = (log_exponential * draw.drawn).sum(-1)[..., None]
    rest = xp.logaddexp(log_exponential - logits, log_winner + xp.zeros_like(logits))
    return -xp.where(draw.drawn > 0.5, log_exponential, rest)


def _relaxed(draw: Draw, perturbed: Array, temperature: Any) -> Array:
    """The point between the states."""
    xp = namespace(perturbed)
    if draw.family == "Bernoulli":
        return _sigmoid(xp, perturbed / temperature)
    largest = stop_gradient(perturbed)
    weight = xp.exp((perturbed - xp.amax(largest, -1)[..., None]) / temperature)
    return weight / weight.sum(-1)[..., None]


def _rounded(draw: Draw, relaxed: Array) -> Array:
    """The state that a relaxed value is nearest to."""
    xp = namespace(relaxed)
    if draw.family == "Bernoulli":
        return _indicator(relaxed > 0.5, relaxed)
    return _indicator(relaxed == xp.amax(relaxed, -1)[..., None], relaxed)


def _check_temperature(value: Any) -> None:
    todo = "Pass a number such as 0.5, or a function of the step"
    if not callable(value):
        number("temperature", value, lambda v: v > 0, "be a finite number above 0", todo)


@dataclass(frozen=True)
class GumbelSoftmax(DiscreteEstimator):
    r"""Train on a relaxation: logistic or Gumbel noise on the logits, and a tempered sigmoid or softmax. **Biased.**

    At every discrete site ``y = σ((α + logit u)/τ)``, or ``softmax((log π + g)/τ)``, takes the state's place, and the
    log densities of the discrete model are continued linearly to it. The gradient is exactly that of the bound of this
    relaxed program, which is never what is reported. With ``hard`` the model sees the nearest state, and the gradient
    is taken as if it saw y (straight-through Gumbel-softmax).

    Args:
        temperature: τ, a number or a function of the step. Lower is less biased and noisier.
        hard: straight-through.

    Limits: Bernoulli and OneHotCategorical sites. A program that tests its state (``z == 1``) has no gradient here.
    Raises: InvalidArgument unless the temperature is above 0.
    References: Jang, Gu & Poole 2017 (arXiv 1611.01144), eqs. 1, 2; Maddison, Mnih & Teh 2017 (arXiv 1611.00712), who
        charge the densities of the relaxed variables where this charges those of the states.
    """

    temperature: float | Callable[[Any], Any] = 0.5
    hard: bool = False

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)

    @property
    def uses_step(self) -> bool:
        return callable(self.temperature)

    def check_terms(self, bound: Bound, terms: Terms) -> None:
        super().check_terms(bound, terms)
        _refuse_two_bounds("GumbelSoftmax", bound)

    def surrogate(self, bound: Bound, terms: Terms) -> PerDatum:
        temperature = self.temperature(terms.step) if callable(self.temperature) else self.temperature
        return Pathwise().surrogate(bound, terms.again(partial(self._relax, temperature)))

    def _relax(self, temperature: Any, draw: Draw) -> Choice:
        if draw.family not in RELAXABLE:
            return Choice(draw.value)
        soft = _relaxed(draw, _perturbed(draw, draw.uniform()), temperature)
        return Choice(stop_gradient(_rounded(draw, soft) - soft) + soft if self.hard else soft)


@dataclass(frozen=True)
class REBAR(DiscreteEstimator):
    r"""The score function with a relaxation as its control variate. Unbiased.

    With ``z`` the perturbed logits, ``b`` the state, ``z̃ ~ p(z | b)`` and ``c`` the bound where the relaxed value takes
    the state's place,

    .. math:: g = (F - \eta\, c(\tilde z))\, \partial \log q(b)
        + \eta\, \partial_\phi c(z) - \eta\, \partial_\phi c(\tilde z)

    ``z`` and ``z̃`` share their noise, so that they are equal numbers with different derivatives. Where sites depend on
    one another each has a control variate of its own: the sites before it as they were drawn, those after it relaxed.

    Args:
        temperature: τ of the relaxation, a number or a function of the step.
        eta: η, weight of the control variate, fixed (the paper adapts η and τ to the variance); 0 is the score function
            without a baseline.

    Limits: Bernoulli and OneHotCategorical sites; costs two more passes a site.
    References: Tucker et al. 2017 (arXiv 1703.07370), eq. 3, and appendix for categorical sites.
    """

    temperature: float | Callable[[Any], Any] = 0.5
    eta: float = 1.0

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        number("eta", self.eta, lambda v: v >= 0, "be finite and at least 0", "The paper begins with 1")

    @property
    def uses_step(self) -> bool:
        return callable(self.temperature)

    def surrogate(self, bound: Bound, terms: Terms) -> PerDatum:
        temperature = self.temperature(terms.step) if callable(self.temperature) else self.temperature
        log_weight = stop_gradient(terms.log_weight)
        value, total = bound.value(log_weight), Pathwise().surrogate(bound, terms)

        def control(other: Terms) -> Array:
            return bound.value(swap_each(log_weight, other.log_weight))

        for name in _discrete(terms):
            relax = partial(self._relax, name, _before(terms, name), temperature)
            free = terms.again(relax)
            tied = terms.again(relax, given=free.kept)
            baseline = self.eta * control(tied)
            signal = value - stop_gradient(baseline)
            total = total + (signal * _score(terms.sites[name])).sum(axis=0)
            total = total + (self.eta * control(free) - baseline).sum(axis=0)
        return total

    def _relax(self, name: str, before: frozenset[str], temperature: Any, draw: Draw) -> Choice:
        """The relaxed value free of the drawn state, or the one given it, where the numbers of the first are given."""
        if draw.name in before or draw.family not in RELAXABLE:
            return Choice(draw.drawn if draw.name in before else draw.value)
        uniform = draw.uniform() if draw.given is None else draw.given["uniform"]
        if draw.name != name:
            return Choice(_relaxed(draw, _perturbed(draw, uniform), temperature), kept={"uniform": uniform})
        tied = _perturbed_given_drawn(draw, uniform)
        noise = stop_gradient(tied - draw.logits)
        perturbed = draw.logits + noise if draw.given is None else tied
        return Choice(_relaxed(draw, perturbed, temperature), kept={"uniform": uniform})


@dataclass(frozen=True)
class StraightThrough(DiscreteEstimator):
    r"""Differentiate as if the discrete value were the encoder's output. **Biased**, and the gradient of no bound.

    At a quantised site with encoder output e and nearest code c, the model is given c and ``dc/de`` is taken for the
    identity; the bound tells a codebook nothing, so it and the encoder's commitment to it have terms of their own (sg
    holds a value constant):

    .. math:: F - w_{codebook} \|sg(e) - c\|^2 - w_{commitment} \|e - sg(c)\|^2

    each summed over the site and averaged over particles. At a Bernoulli or OneHotCategorical site with probabilities p
    and state b it is the classical one: the model is given ``b + p - sg(p)``, and log densities continue linearly.
    Sites that are reparameterised take the pathwise gradient. What is reported is the bound alone.

    Args:
        codebook: weight of the codebook's error; of no effect where the codebook follows moving averages or is fixed.
        commitment: weight of the commitment (β in the paper, which used 0.25).

    Raises: InvalidArgument for a negative weight; Refused where no site is quantised or of these families.
    References: van den Oord, Vinyals & Kavukcuoglu 2017 (arXiv 1711.00937), eq. 3; Bengio, Léonard & Courville 2013
        (arXiv 1308.3432), section 4.
    """

    allows_quantised = True
    codebook: float = 1.0
    commitment: float = 0.25

    def __post_init__(self) -> None:
        for name in ("codebook", "commitment"):
            number(name, getattr(self, name), lambda v: v >= 0, "be finite and at least 0", "The paper uses 1 and 0.25")

    def check_terms(self, bound: Bound, terms: Terms) -> None:
        if _discrete(terms) or not _quantised(terms):
            super().check_terms(bound, terms)
            _refuse_two_bounds("StraightThrough", bound)

    def surrogate(self, bound: Bound, terms: Terms) -> PerDatum:
        total = Pathwise().surrogate(bound, terms.again(self._pass) if _discrete(terms) else terms)
        for site in _quantised(terms):
            total = total - self.codebook * site.codebook_error.mean(axis=0)  # type: ignore[union-attr]
            total = total - self.commitment * site.commitment_error.mean(axis=0)  # type: ignore[union-attr]
        return total

    def _pass(self, draw: Draw) -> Choice:
        if draw.family not in RELAXABLE:
            return Choice(draw.value)
        xp = namespace(draw.logits)
        p = _sigmoid(xp, draw.logits) if draw.family == "Bernoulli" else xp.exp(draw.logits)
        return Choice(draw.drawn + (p - stop_gradient(p)))


def _quantised(terms: Terms) -> list[Site]:
    return [site for site in terms.sites.values() if site.codebook_error is not None]


# --- every state --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Enumerate(DiscreteEstimator):
    r"""Sum over every state of the guide's discrete sites: the exact expectation, no noise from them.

    .. math:: \sum_d q(d | x)\, E_{q(z|x,d)}[\log p(x, d, z) - \log q(d, z | x)]

    Value and gradient are of this Rao-Blackwellised sum; continuous sites keep their draws, one for every state.

    Limits: the ELBO and its shapes (a multi-sample bound needs every combination of particles: leave the site out of
    the guide and mark it ``infer={"enumerate": "parallel"}`` in the model instead). At most 4096 joint states.
    References: Ranganath et al. 2014 (arXiv 1401.0118), section 3.1; Kingma et al. 2014 (arXiv 1406.5298), eq. 7.
    """

    families = ("Bernoulli", "Categorical", "OneHotCategorical")

    def check_terms(self, bound: Bound, terms: Terms) -> None:
        super().check_terms(bound, terms)
        if not bound.linear:
            todo = "Use ELBO, or VIMCO(), or leave the site out of the guide and mark it to be enumerated in the model"
            raise must("bound under Enumerate", "be the ELBO", type(bound).__name__, todo, Refused)
        joint_states(_enumerated(terms), f"the guide under {type(self).__name__}")
        data = math.prod(terms.log_lik.shape)
        for name, site in _enumerated(terms).items():
            if math.prod(np.shape(terms.values[name])) != data * math.prod(site.event_shape):
                todo = "Put all sites into the plates that they share, or use gradient=ScoreFunction()"
                condition = "have one value for each particle and datum: each state is given to all of its entries"
                got = f"values of shape {tuple(np.shape(terms.values[name]))}"
                raise must(f"site '{name}' under Enumerate", condition, got, todo, Refused)

    def value(self, bound: Bound, terms: Terms) -> PerDatum:
        return stop_gradient(self.surrogate(bound, terms))

    def surrogate(self, bound: Bound, terms: Terms) -> PerDatum:
        sites, num_particles = _enumerated(terms), terms.num_particles
        states = joint_states(sites, f"the guide under {type(self).__name__}")
        num_states = len(next(iter(states.values())))
        given = {n: np.tile(s, (num_particles,) + (1,) * (s.ndim - 1)) for n, s in states.items()}
        every = terms.again(_given, given, repeat=num_states)
        log_q = sum(_score(every.sites[n]) for n in states)
        return (namespace(log_q).exp(log_q) * every.log_weight).sum(axis=0) / num_particles


def _given(draw: Draw) -> Choice:
    """The given state, the same for every datum; a fresh draw of what is not enumerated."""
    if draw.given is None:
        return Choice(draw.value)
    state = draw.given
    if state.ndim > draw.event_ndim:  # particles in front, which the plates between are to broadcast with
        batch = (1,) * (draw.drawn.ndim - state.ndim)
        state = state.reshape((state.shape[0], *batch, *state.shape[1:]))
    return Choice(0 * draw.drawn + state)


def _enumerated(terms: Terms) -> dict[str, Site]:
    """The sites whose states are summed over."""
    return {n: terms.sites[n] for n in _discrete(terms)}
