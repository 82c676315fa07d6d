r"""Gradient estimators for discrete sites that look at more than the drawn state.

They run the program again with other values at its latent sites (:meth:`Terms.again`): the opposite state (DisARM),
a relaxed one (Gumbel-softmax, REBAR, RELAX), every one (enumeration). Written once for arrays of either library, for
the sites of ours or of a user's program. What is reported is always the bound of the discrete model, off the first run.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float

from elbozoo.inference.arrays import (
    Array,
    concatenate,
    logsumexp,
    namespace,
    squared_gradient,
    stop_gradient,
    swap_each,
)
from elbozoo.inference.enumeration import joint_states
from elbozoo.inference.errors import Refused, must
from elbozoo.inference.gradients import GradientEstimator, Pathwise, hidden_layer
from elbozoo.inference.parts import number, whole_number
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


def _refuse_spread_values(estimator: str, why: str, terms: Terms) -> None:
    """Entries of a discrete site that no shared plate holds."""
    data = math.prod(terms.log_lik.shape)
    for name in _discrete(terms):
        if math.prod(np.shape(terms.values[name])) != data * math.prod(terms.sites[name].event_shape):
            todo = "Put all sites into the plates that they share, or use gradient=ScoreFunction()"
            condition = f"have one value for each particle and datum: {why}"
            got = f"values of shape {tuple(np.shape(terms.values[name]))}"
            raise must(f"site '{name}' under {estimator}", condition, got, todo, Refused)


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


class _ControlVariate(DiscreteEstimator):
    """The score function less a function of the perturbed logits, whose derivative is added back with less noise.

    Numbers of its own are trained on the squared length of the estimate: its expectation differs from the variance by
    the squared mean, which they do not move.
    """

    temperature: float | Callable[[Any], Any]
    eta: float

    def __post_init__(self) -> None:
        _check_temperature(self.temperature)
        number("eta", self.eta, lambda v: v >= 0, "be finite and at least 0", "The paper begins with 1")
        if self.keeps_numbers and callable(self.temperature):
            todo = "Pass the number to begin with"
            raise must("temperature that is adapted", "be a number", "a function of the step", todo)

    def initial(self, data: Any, sites: Mapping[str, Site]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        if not self.keeps_numbers:
            return {}, {}
        return {"eta": np.array(float(self.eta)), "log_temperature": np.log(float(self.temperature))}, {}  # type: ignore[arg-type]

    def control(self, bound: Bound, log_weight: Array, name: str, relaxed: Terms, own: Mapping[str, Any]) -> Array:
        """The control variate of the site ``name``, each particle's in turn, ``(K, *P)``."""
        return own.get("eta", self.eta) * bound.value(swap_each(log_weight, relaxed.log_weight))

    def surrogate(self, bound: Bound, terms: Terms) -> PerDatum:
        total = Pathwise().surrogate(bound, terms)
        if not self.keeps_numbers:
            return total + self._controlled(bound, terms, terms, {}, {})

        def of_shift(shift: Mapping[str, Array], own: Mapping[str, Array]) -> tuple[Array, Array]:
            """The whole surrogate where the logits are moved, and the part of it that ``total`` lacks."""
            given = {n: {"shift": s + 0.0 * stop_gradient(terms.values[n])} for n, s in shift.items()}
            drawn = terms.again(partial(_shifted, _as_drawn), given)
            rest = self._controlled(bound, terms, drawn, own, given)
            return bound.value(drawn.log_weight) + rest, rest

        unmoved = {n: 0.0 * stop_gradient(terms.values[n])[0] for n in _discrete(terms)}
        rest, slope = squared_gradient(of_shift, unmoved, terms.trained)
        descent = sum((slope[n] * (v - stop_gradient(v))).sum() for n, v in terms.trained.items())
        return total + rest - descent / math.prod(total.shape)

    def _controlled(
        self, bound: Bound, terms: Terms, drawn: Terms, own: Mapping[str, Any], given: Mapping[str, Mapping[str, Array]]
    ) -> PerDatum:
        """What the discrete sites add to the gradient along the drawn values.

        Args:
            terms: of the first run.
            drawn: of its values, the densities of which are differentiated.
            own: numbers that are trained, if any.
            given: by site, the ``shift`` of its logits, if any.
        """
        log_weight = stop_gradient(terms.log_weight)
        value, total, temperature = bound.value(log_weight), [], self._temperature(terms.step, own)
        for name in _discrete(terms):
            relax = partial(_shifted, partial(_relax_from, name, _before(terms, name), temperature))
            free = terms.again(relax, given)
            noise = {n: {**free.kept.get(n, {}), **given.get(n, {})} for n in terms.sites}
            tied = terms.again(relax, noise)
            with_noise, baseline = (self.control(bound, log_weight, name, r, own) for r in (free, tied))
            score = _score(drawn.sites[name])
            scored = (value - baseline) * (score - stop_gradient(score))  # a zero, which holds the baseline in θ alone
            total.append(scored.sum(axis=0) + (with_noise - baseline).sum(axis=0))
        return sum(total[1:], start=total[0])

    def _temperature(self, step: Any, own: Mapping[str, Any]) -> Any:
        if own:
            return namespace(own["log_temperature"]).exp(own["log_temperature"])
        return self.temperature(step) if callable(self.temperature) else self.temperature


def _relax_from(name: str, before: frozenset[str], temperature: Any, draw: Draw) -> Choice:
    """The relaxed value free of the drawn state, or the one given it, where the noise of the first is given."""
    if draw.name in before or draw.family not in RELAXABLE:
        return Choice(draw.drawn if draw.name in before else draw.value)
    noise = (draw.given or {}).get("uniform")
    uniform = draw.uniform() if noise is None else noise
    if draw.name != name:
        return Choice(_relaxed(draw, _perturbed(draw, uniform), temperature), kept={"uniform": uniform})
    tied = _perturbed_given_drawn(draw, uniform)
    perturbed = draw.logits + stop_gradient(tied - draw.logits) if noise is None else tied
    return Choice(_relaxed(draw, perturbed, temperature), kept={"uniform": uniform})


def _as_drawn(draw: Draw) -> Choice:
    return Choice(draw.drawn)


def _shifted(choose: Callable[[Draw], Choice], draw: Draw) -> Choice:
    """What ``choose`` makes of a site whose logits are moved by the ``shift`` that is given, if any."""
    if "shift" not in (draw.given or {}):
        return choose(draw)
    logits = draw.logits + draw.given["shift"]
    if draw.family != "Bernoulli":
        logits = logits - logsumexp(logits, -1)[..., None]
    return replace(choose(replace(draw, logits=logits)), logits=logits)


@dataclass(frozen=True)
class REBAR(_ControlVariate):
    r"""The score function with a relaxation as its control variate. Unbiased.

    With ``z`` the perturbed logits, ``b`` the state, ``z̃ ~ p(z | b)`` and ``c`` the bound where the relaxed value takes
    the state's place,

    .. math:: g = (F - \eta\, c(\tilde z))\, \partial \log q(b)
        + \eta\, \partial_\phi c(z) - \eta\, \partial_\phi c(\tilde z)

    ``z`` and ``z̃`` share their noise, so that they are equal numbers with different derivatives. Where sites depend on
    one another each has a control variate of its own: the sites before it as they were drawn, those after it relaxed.

    With ``adapt``, η and log τ are trained along with the program, by its optimiser, on the derivative of the variance

    .. math:: \partial_{\eta, \tau} E\|g_\alpha\|^2 = E[2\, g_\alpha^\top \partial_{\eta, \tau}\, g_\alpha]

    from the very draws that g is made of: as ``E[g]`` depends on neither, this is exact and unbiased. Here
    :math:`g_\alpha` is the gradient in the logits of every discrete site, one number a datum and logit and summed over
    particles: that of a bias of the site, where Tucker et al. take every parameter of the guide. One η and one τ serve
    all sites.

    Args:
        temperature: τ of the relaxation, a number or a function of the step; where the adaptation begins.
        eta: η, weight of the control variate, or where the adaptation begins; 0 is the score function without a
            baseline.
        adapt: train η and τ to lower the variance.

    Limits: Bernoulli and OneHotCategorical sites; costs two more passes a site, and with ``adapt`` one more and two
        further derivatives. A program without derivatives of second order cannot adapt.
    Raises: InvalidArgument for a temperature that is a function of the step, with ``adapt``.
    References: Tucker et al. 2017 (arXiv 1703.07370), eq. 3, and appendix for categorical sites; section 3.2 for the
        adaptation.
    """

    temperature: float | Callable[[Any], Any] = 0.5
    eta: float = 1.0
    adapt: bool = False

    @property
    def uses_step(self) -> bool:
        return callable(self.temperature)

    @property
    def keeps_numbers(self) -> bool:
        return self.adapt


@dataclass(frozen=True)
class RELAX(_ControlVariate):
    r"""REBAR with a free network in the control variate, all of it trained to lower the variance. Unbiased.

    For every discrete site

    .. math:: c(z) = \eta\, F(\sigma_\tau(z)) + r^\top \tanh(W\, (2 \sigma_\tau(z) - 1) + v)

    takes the place of :class:`REBAR`'s ``η c``: ``σ_τ(z)`` are the relaxed values of all discrete sites, those before
    this one as they were drawn; W and v serve all sites, each has an r of its own. At first ``r = 0``, which is REBAR.
    η, log τ and the network are trained on the exact single-sample derivative of the variance, as under
    ``REBAR(adapt=True)``: of the gradient in the logits of the discrete sites.

    Args:
        temperature: τ of the relaxation at first.
        eta: η, weight of the relaxed bound at first.
        network_units: hidden units of the network.

    Limits: as of ``REBAR(adapt=True)``; each discrete site must have one value for each particle and datum. The network
        does not see the datum, what tells of it is the relaxed bound.
    Raises: InvalidArgument for a temperature that is a function of the step; Refused for values that other plates
        spread.
    References: Grathwohl et al. 2018 (arXiv 1711.00123), section 3 (there too a relaxation plus a
        network); several sites as in Tucker et al. 2017.
    """

    temperature: float = 0.5
    eta: float = 1.0
    network_units: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("network_units", self.network_units)

    @property
    def keeps_numbers(self) -> bool:
        return True

    def initial(self, data: Any, sites: Mapping[str, Site]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        sizes = [math.prod(site.event_shape) for site in sites.values() if _is_discrete(site)]
        network = hidden_layer(sum(sizes), self.network_units)
        network["readout"] = np.zeros((len(sizes), self.network_units))
        return super().initial(data, sites)[0] | network, {}

    def check_terms(self, bound: Bound, terms: Terms) -> None:
        super().check_terms(bound, terms)
        _refuse_spread_values("RELAX", "the network sees the values of a datum together", terms)

    def control(self, bound: Bound, log_weight: Array, name: str, relaxed: Terms, own: Mapping[str, Any]) -> Array:
        xp, names = namespace(log_weight), _discrete(relaxed)
        values = [relaxed.values[n].reshape((*log_weight.shape, -1)) * 1.0 for n in names]
        hidden = xp.tanh((2.0 * concatenate(values, -1) - 1.0) @ own["weight"] + own["bias"])
        return super().control(bound, log_weight, name, relaxed, own) + hidden @ own["readout"][names.index(name)]


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
    repeats = True

    def check_terms(self, bound: Bound, terms: Terms) -> None:
        super().check_terms(bound, terms)
        if not bound.linear:
            todo = "Use ELBO, or VIMCO(), or leave the site out of the guide and mark it to be enumerated in the model"
            raise must("bound under Enumerate", "be the ELBO", type(bound).__name__, todo, Refused)
        joint_states(_enumerated(terms), f"the guide under {type(self).__name__}")
        _refuse_spread_values("Enumerate", "each state is given to all of its entries", terms)

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
