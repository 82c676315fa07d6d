r"""What an engine hands to an objective: the per-particle, per-datum log densities of one guide and model run.

Shapes: ``K`` particles first, then the plates that *every* site shares, ``*P`` (usually one data plate, ``B``), then
``D`` for the dimensions of one latent site. All log densities are in nats, with their normalising constants.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxtyping import Float

from elbozoo.inference.arrays import Array
from elbozoo.inference.errors import Refused, must


@dataclass(frozen=True)
class Site:
    r"""One latent site ``z`` of the guide.

    Attributes:
        log_prior: ``log p(z | parents in the model)``, ``(K, *P)``; ``None`` where ``kl`` stands for both densities
            of a reparameterised value, which are then not worked out.
        log_guide: ``log q(z | parents in the guide, x)``, ``(K, *P)``; ``None`` as above.
        log_prior_terms, log_guide_terms: the same per latent dimension, ``(K, *P, D)``; ``None`` unless both factorise.
            A dimension is an entry of the dims that ``to_event`` made events: where what lies below is a joint
            distribution (of a vector, of a layer), it is one of those.
        kl: analytic ``KL(q || p)`` of the site given what was drawn before it, ``(K, *P)``; ``None`` when it was not
            asked for, has no closed form, or would be wrong because the model's site depends on a value that the guide
            draws later.
        kl_terms: the same per dimension, ``(K, *P, D)``, where both factorise alike.
        score: ``log q`` of a value that is not reparameterised as it was drawn, without the scale and the mask that
            ``log_guide`` has; ``None`` where that is ``log_guide``.
        reparameterised: whether gradients flow through the drawn value.
        plain: whether the guide's site has no scale or mask of its own (the shared plates' scale is not one).
        auxiliary: whether the site is the guide's alone.
        support: where the model's site can lie, a constraint of the engine's; ``None`` for an auxiliary site.
        gain, offset: the shaped rate is ``gain * rate + offset`` (see :mod:`elbozoo.inference.shapes`); ``gain`` is a
            scalar, one number per dimension ``(D,)``, or one a draw ``(K, *P)`` of two dims or more; ``offset`` a
            scalar per site.
        guide_family: the class name of the guide's distribution.
        event_shape: of one value.
        num_classes: how many states each entry of a Bernoulli or categorical site has; 0 for others.
        codebook_error: ``||sg[e] - code||^2`` of a quantised value, summed over the site, ``(K, *P)``: e the encoder's
            output, sg a value held constant; ``None`` where the guide's distribution does not quantise.
        commitment_error: ``||e - sg[code]||^2``, the same number with the other derivative.
    """

    log_prior: Float[Any, "K *P"] | None = None
    log_guide: Float[Any, "K *P"] | None = None
    log_prior_terms: Float[Any, "K *P D"] | None = None
    log_guide_terms: Float[Any, "K *P D"] | None = None
    kl: Float[Any, "K *P"] | None = None
    kl_terms: Float[Any, "K *P D"] | None = None
    score: Float[Any, "K *P"] | None = None
    reparameterised: bool = True
    plain: bool = True
    auxiliary: bool = False
    support: Any = field(default=None, repr=False)
    gain: Any = 1.0
    offset: Any = 0.0
    guide_family: str = ""
    event_shape: tuple[int, ...] = ()
    num_classes: int = 0
    codebook_error: Float[Any, "K *P"] | None = None
    commitment_error: Float[Any, "K *P"] | None = None

    @property
    def rate(self) -> Array:
        """``KL(q || p)``: analytic where the engine found it valid, else the sample ``log q - log p``; ``(K, *P)``."""
        return self.sampled_rate if self.kl is None else self.kl

    @property
    def sampled_rate(self) -> Array:
        """``log q - log p`` of the drawn value, ``(K, *P)``."""
        assert self.log_guide is not None, "the analytic KL was asked for, and stands for both densities"
        return self.log_guide - self.log_prior

    @property
    def rate_terms(self) -> Array | None:
        """The rate per latent dimension, ``(K, *P, D)``, or ``None`` where the site does not factorise."""
        if self.kl is not None:
            return self.kl_terms
        if self.log_guide_terms is None or self.log_prior_terms is None:
            return None
        return self.log_guide_terms - self.log_prior_terms

    @property
    def shaped_rate(self) -> Array:
        """``Σ_j gain_j rate_j + offset``, ``(K, *P)``: what the training objective charges for this site."""
        if getattr(self.gain, "ndim", 0) != 1:
            return self.gain * self.rate + self.offset
        terms = self.rate_terms
        assert terms is not None, "a gain per dimension is set only where the rate factorises"
        return (self.gain * terms).sum(axis=-1) + self.offset


@dataclass(frozen=True)
class Draw:
    """One latent site of the guide while a program is run again, as an estimator that chooses its value sees it.

    Shapes are the program's own, of one particle or with particles in front.

    Attributes:
        name: of the site.
        family: class name of the guide's distribution.
        logits: of a Bernoulli's, a Categorical's or a OneHotCategorical's, given what was chosen before it; ``None``
            for other families.
        value: a fresh draw; its path is kept where the distribution is reparameterised.
        drawn: what the first run drew, its path kept likewise.
        given: the caller's numbers for this site.
        uniform: makes fresh numbers in (0, 1), of the shape of ``logits``.
        event_ndim: dims of one value.
    """

    name: str
    family: str
    logits: Any
    value: Any
    drawn: Any
    given: Any
    uniform: Callable[[], Array]
    event_ndim: int


@dataclass(frozen=True)
class Choice:
    """What an estimator makes of a :class:`Draw`: the site's value, and numbers to hand back.

    Attributes:
        value: the site's value.
        score: of the shape of ``logits``; summed over the site's dimensions it becomes ``Terms.scores[name]``.
        logits: the site has these in place of its own, and its densities are taken with them; of a Bernoulli or a
            OneHotCategorical alone.
        kept: arrays that come back as they are, as ``Terms.kept[name]``.
    """

    value: Any
    score: Any = None
    logits: Any = None
    kept: Mapping[str, Any] = field(default_factory=dict)


def by_number(name: str) -> tuple[Any, ...]:
    """Sort key: z2 before z10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def places_of_data(observed: Mapping[str, Any], args: tuple) -> dict[str, int]:
    """By observed site, which argument of the program is its value: there the model's own draw can stand (a dream).

    Raises: InvalidArgument where one is not an argument as it came.
    """
    places = {}
    for name, value in observed.items():
        found = [i for i, argument in enumerate(args) if argument is value]
        if not found:
            todo = "Write sample('x', …, obs=x) with an argument x of the program, or use sleep=0"
            raise must(f"site '{name}'", "observe an argument as it came, to be dreamt", "other data", todo)
        places[name] = found[0]
    return places


_WORKED_OUT = {"scale_tril": {"covariance_matrix", "precision_matrix"}, "logits": {"probs"}}
"""Parameters that a library's distribution works out on demand from another, by that other."""


def own_parameters(site: str, distribution: Any) -> list[str]:
    """Names of the parameters that a distribution can be made anew from, one way.

    Raises: InvalidArgument where it has none (a flow).
    """
    found = set(distribution.arg_constraints)
    found -= set().union(*(others for kept, others in _WORKED_OUT.items() if kept in found))
    if not found:
        todo = "Give it a distribution with parameters of its own, or compare bounds by evaluate alone"
        family = type(distribution).__name__
        raise must(f"site '{site}'", "be drawn from a distribution that can be optimised by itself", family, todo)
    return sorted(found)


def check_drawn_for(site: str, shape: tuple[int, ...], event_shape: tuple[int, ...]) -> None:
    """Refuse a guide's value that is of another event shape than the model's site: before the model computes with it.

    Raises: InvalidArgument.
    """
    drawn = tuple(shape)[len(shape) - len(event_shape) :]
    if drawn != tuple(event_shape):
        todo = "Build model and guide from one spec, or give their latents one shape"
        raise must(f"the guide's site '{site}'", f"have the model's event shape {tuple(event_shape)}", drawn, todo)


def check_made_of(site: str, cls: type, parameters: Mapping[str, Any]) -> None:
    """Refuse a distribution that takes more than its parameters (a temperature, a base).

    Raises: InvalidArgument.
    """
    try:
        cls(**parameters)
    except (TypeError, ValueError, NotImplementedError) as error:
        todo = "Give it a distribution with parameters of its own, or compare bounds by evaluate alone"
        got = f"{cls.__name__}: {error}"
        raise must(
            f"site '{site}'", "be drawn from a distribution that can be optimised by itself", got, todo
        ) from error


def refuse_estimate(terms: Terms, what: str) -> None:
    """Refuse a log weight that only its mean is right of, where weights are wanted.

    Raises: Refused.
    """
    if terms.estimated:
        todo = "Use ELBO; for a diffusion, its chain: process='chain', or VariationalDiffusion.with_steps"
        raise must(f"the program of {what}", "weigh all that it draws", terms.estimated, todo, Refused)


@dataclass(frozen=True)
class Terms:
    r"""The arrays of one run of guide and model that every objective is made of.

    The log weight is :math:`\log w = \log p(x|z) - \sum_s (\log q_s - \log p_s)`, where a site with an analytic KL
    contributes that KL in place of its sample. Shapes charge each site ``gain * rate + offset`` instead.

    Attributes:
        log_lik: ``log p(x | z)`` summed over observed sites, ``(K, *P)``.
        sites: latent sites in the order the guide draws them.
        step: optimisation step (0-based), for schedules.
        scale: ``size / subsample_size`` of the shared plates; outside every logarithm of a mean.
        joint: a site lies outside a plate that holds latents and data, so one weight covers all of that plate (or the
            whole batch).
        estimated: why the log weight is an estimate of one, unbiased in its logarithm alone: a latent that is masked
            out, or a plate of some sites only that is subsampled; empty where it is a weight.
        data_per_entry: how many data one entry of a bound covers: 1 where a plate is shared by every site (its entries
            are the data); else the size of the plates around the data.
        observed: ``log p`` of each observed site, ``(K, *P)``; they sum to ``log_lik``.
        values: the drawn latent values, ``(K, …)``.
        refreeze: engine callback behind :meth:`freeze`.
        redraw: engine callback behind :meth:`log_guide_at_stopped_values`.
        rerun: engine callback behind :meth:`again`.
        dreamt: engine callback behind :meth:`log_guide_of_dreams`.
        scores: by site, what an estimator's :class:`Choice` scored, ``(K, *P)``; of a run by :meth:`again` alone.
        kept: by site, what it kept, ``(K, …)``; likewise.
        recorded: what the guide records with ``deterministic``, by name, ``(K, …)``; in Pyro with ``event_dim`` given,
            or the shared plates' axes come twice.
        data: the program's first argument, for baselines that are made of it.
        trained, memory: an estimator's own numbers by name: what gradients train, and what it remembers of past steps.
    """

    log_lik: Float[Any, "K *P"]
    sites: Mapping[str, Site]
    step: Any = 0
    scale: Any = 1.0
    joint: bool = False
    estimated: str = ""
    data_per_entry: float = 1.0
    observed: Mapping[str, Array] = field(default_factory=dict)
    values: Mapping[str, Array] = field(default_factory=dict, repr=False)
    refreeze: Callable[[Array | None], Terms] | None = field(default=None, repr=False)
    redraw: Callable[[bool], Mapping[str, Array]] | None = field(default=None, repr=False)
    rerun: Callable[[Callable[[Draw], Choice], Mapping[str, Any], int], Terms] | None = field(default=None, repr=False)
    dreamt: Callable[[], Array] | None = field(default=None, repr=False)
    scores: Mapping[str, Array] = field(default_factory=dict, repr=False)
    kept: Mapping[str, Mapping[str, Array]] = field(default_factory=dict, repr=False)
    recorded: Mapping[str, Array] = field(default_factory=dict, repr=False)
    data: Any = field(default=None, repr=False)
    trained: Mapping[str, Array] = field(default_factory=dict, repr=False)
    memory: Mapping[str, Array] = field(default_factory=dict, repr=False)

    @property
    def num_data(self) -> float:
        """Data in all: what ``scale`` times the sum of a bound's entries is divided by for nats per datum."""
        return self.scale * math.prod(self.log_lik.shape[1:]) * self.data_per_entry

    @property
    def num_particles(self) -> int:
        return self.log_lik.shape[0]

    @property
    def log_weight(self) -> Array:
        """Shaped log importance weight, ``(K, *P)``; the plain one when no shape has touched these terms."""
        total = self.log_lik
        for site in self.sites.values():
            total = total - site.shaped_rate
        return total

    @property
    def log_prior(self) -> Array:
        """``log p(z)`` summed over sites, ``(K, *P)``."""
        return self._total([site.log_prior for site in self.sites.values()])

    @property
    def log_guide(self) -> Array:
        """``log q(z | x)`` summed over sites, ``(K, *P)``."""
        return self._total([site.log_guide for site in self.sites.values()])

    def _total(self, densities: list[Array | None]) -> Array:
        total = self.log_lik.clip(0.0, 0.0)
        for density in densities:
            assert density is not None, "the analytic KL was asked for, and stands for both densities"
            total = total + density
        return total

    @property
    def rate(self) -> Array:
        """Unshaped rate summed over sites, ``(K, *P)``."""
        return sum((site.rate for site in self.sites.values()), start=self.log_lik.clip(0.0, 0.0))

    @property
    def gain(self) -> Any:
        """The gain that all sites share. Objectives that need one number (DReG) call this.

        Raises:
            AssertionError: when sites differ; the gradient estimators refuse such shapes first.
        """
        gains = [site.gain for site in self.sites.values()]
        assert all(g is gains[0] for g in gains)
        return gains[0]

    def shaped(self, gains: Mapping[str, Any], offsets: Mapping[str, Any]) -> Terms:
        """Terms with other gains and offsets by site."""
        sites = {n: replace(s, gain=gains[n], offset=offsets[n]) for n, s in self.sites.items()}
        return replace(self, sites=sites)

    def freeze(self, path_gradient: Array | None = None) -> Terms:
        r"""The same values with the guide's parameters held constant inside ``log q`` (paths through ``z`` are kept).

        Args:
            path_gradient: ``(K, *P)`` factor (taken as constant) on every gradient that flows into the drawn values;
                forward values do not change. ``None`` is a factor of one.
        """
        assert self.refreeze is not None, "these terms were not made by an engine"
        fresh = self.refreeze(path_gradient)
        return replace(fresh, step=self.step).shaped(
            {n: s.gain for n, s in self.sites.items()}, {n: s.offset for n, s in self.sites.items()}
        )

    def log_guide_at_stopped_values(self, as_drawn: bool = False) -> Mapping[str, Array]:
        """``log q`` by site, ``(K, *P)``, differentiable in the guide's parameters alone.

        Args:
            as_drawn: without the scales and masks of the sites: what the score of a draw is the gradient of.
        """
        assert self.redraw is not None, "these terms were not made by an engine"
        return self.redraw(as_drawn)

    def again(self, choose: Callable[[Draw], Choice], given: Mapping[str, Any] | None = None, repeat: int = 1) -> Terms:
        """The terms of another run of guide and model, in which ``choose`` gives every latent site its value.

        Discrete log densities at a value between the states are their linear continuation. Gradients flow into the
        parameters of both, and through the chosen values as far as these carry them.

        Args:
            choose: from a :class:`Draw` to a :class:`Choice`, written for arrays of either library.
            given: by site, numbers for ``choose``, with ``repeat K`` particles in front (of a tree of arrays).
            repeat: run every particle so many times, one after the other along the first axis. ``given`` are then NumPy
                arrays, and what is asked for again on the same terms may be the same run.
        """
        assert self.rerun is not None, "these terms were not made by an engine"
        fresh = self.rerun(choose, given or {}, repeat)
        return replace(fresh, step=self.step).shaped(
            {n: s.gain for n, s in self.sites.items()}, {n: s.offset for n, s in self.sites.items()}
        )

    def log_guide_of_dreams(self) -> Array:
        """``log q(z | x)`` of one ``(z, x)`` a datum that the model draws, ``(1, *P)``.

        Differentiable in the guide's parameters alone.
        """
        assert self.dreamt is not None, "these terms were not made by an engine"
        return self.dreamt()
