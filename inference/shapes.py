r"""Shapes: how the rate is charged while training. What is reported stays the unshaped bound.

Every shape here replaces each site's rate by ``gain * rate + offset``: annealing and β set one gain, free bits gate
dimensions whose batch-mean rate is below λ (``max(λ, KL)`` has gain 0 and offset λ there), a capacity pulls the rate
to a target. One adds a term instead: what a guide's classifier says of known labels. A shape wraps an objective and is
an objective, so shapes nest: ``AnnealedKL(FreeBits(ELBO()))``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

from elbozoo.inference.arrays import Array, cos, namespace, stop_gradient
from elbozoo.inference.errors import Refused, must
from elbozoo.inference.gradients import GradientEstimator
from elbozoo.inference.objectives import ELBO, Bound, Objective
from elbozoo.inference.parts import instance_of, number, one_of, whole_number
from elbozoo.inference.terms import Terms, by_number

Unit = Literal["steps", "epochs"]


class Shape(Objective):
    """An objective whose training gradient charges the rate differently from the bound it reports."""

    objective: Objective

    reads_batch_means: ClassVar[bool] = False
    """Whether what it makes of a datum depends on the other data of the minibatch."""

    def __post_init__(self) -> None:
        instance_of("objective", self.objective, Objective)

    @abstractmethod
    def shape(self, terms: Terms) -> Terms:
        """The terms with this shape's gains and offsets (constants to differentiation)."""

    @property
    def num_particles(self) -> int:
        return self.objective.num_particles

    @property
    def gradient(self) -> GradientEstimator:
        return self.objective.gradient

    @property
    def uses_analytic_kl(self) -> bool:
        return self.objective.uses_analytic_kl

    @property
    def base(self) -> Bound:
        """The bound inside every wrapping."""
        inner = self.objective
        return inner.base if isinstance(inner, Shape) else inner  # type: ignore[return-value]

    def bound(self, terms: Terms) -> Array:
        return self.objective.bound(terms)

    def surrogate(self, terms: Terms) -> Array:
        return self.objective.surrogate(self.shape(terms))

    def remember(self, terms: Terms) -> Mapping[str, Array]:
        return self.objective.remember(self.shape(terms))

    def check(self, terms: Terms) -> None:
        self.objective.check(terms)

    def shape_all(self, terms: Terms) -> Terms:
        """The terms as the innermost bound sees them while training."""
        inner = self.objective
        terms = self.shape(terms)
        return inner.shape_all(terms) if isinstance(inner, Shape) else terms

    def added(self, terms: Terms) -> Any:
        """What this shape and those inside it add to the shaped bound beside its rates, ``(*P)`` or 0."""
        inner = self.objective
        return inner.added(terms) if isinstance(inner, Shape) else 0.0

    def scalars(self, terms: Terms) -> dict[str, Any]:
        """The shaped bound (batch mean, nats) and every schedule's present value."""
        shaped = (self.base.bound(self.shape_all(terms)) + self.added(terms)).mean() / terms.data_per_entry
        return {"shaped_bound": stop_gradient(shaped), **self._schedules(terms)}

    def _schedules(self, terms: Terms) -> dict[str, Any]:
        inner = self.objective
        return {**(inner._schedules(terms) if isinstance(inner, Shape) else {}), **self.schedule(terms)}

    @property
    def uses_step(self) -> bool:
        return self.objective.uses_step

    def schedule(self, terms: Terms) -> dict[str, Any]:
        """This shape's own scalars at the terms' step, by the name they are logged under."""
        return {}

    def in_steps(self, steps_per_epoch: int) -> Shape:
        """The same shape with every length in epochs turned into optimisation steps."""
        inner = self.objective
        out: Any = self
        if isinstance(inner, Shape):
            out = replace(out, objective=inner.in_steps(steps_per_epoch))
        if getattr(self, "unit", "steps") == "epochs":
            name = self._length
            out = replace(out, unit="steps", **{name: getattr(self, name) * steps_per_epoch})
        return out

    _length = "warmup"


def _progress(length: float, unit: str, step: Any) -> Any:
    """``step / length`` clipped to [0, 1], for Python numbers and arrays alike."""
    if unit == "epochs":
        raise must(
            "unit",
            "be 'steps' outside fit, which alone knows how long an epoch is",
            unit,
            "Pass unit='steps', or shape.in_steps(steps_per_epoch)",
        )
    x = step / length if length > 0 else step * 0 + 1.0
    return x + (1.0 - x) * (x > 1.0)


def _scale_gains(terms: Terms, factor: Any) -> Terms:
    """Multiply every gain and offset by ``factor``; sites that shared one gain go on sharing one object."""
    cache: dict[int, Any] = {}
    gains = {n: cache.setdefault(id(s.gain), s.gain * factor) for n, s in terms.sites.items()}
    return terms.shaped(gains, {n: s.offset * factor for n, s in terms.sites.items()})


@dataclass(frozen=True)
class Beta(Shape):
    r"""A constant weight β on the rate.

    For the ELBO this is ``E[log p(x|z)] - β KL``; elsewhere the log weights charge the rate times β.

    Args:
        objective: the objective to shape.
        beta: β ≥ 0. 1 changes nothing, above 1 narrows the bottleneck, below 1 widens it.

    Raises: InvalidArgument for β < 0. References: Higgins et al. 2017 (β-VAE), eq. 4.
    """

    objective: Objective = field(default_factory=ELBO)
    beta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("beta", self.beta, lambda v: v >= 0, "be finite and at least 0", "Use β = 1 for the plain bound")

    def shape(self, terms: Terms) -> Terms:
        return _scale_gains(terms, self.beta)

    def schedule(self, terms: Terms) -> dict[str, Any]:
        return {"beta": terms.step * 0.0 + self.beta}


@dataclass(frozen=True)
class AnnealedKL(Shape):
    r"""KL warm-up: the rate's weight β rises from ``start`` to 1.

    Args:
        objective: the objective to shape.
        warmup: length of the rise (of one cycle when cyclical), in ``unit``.
        schedule_form: "linear"; "cosine" (half a cosine wave); "cyclical" (``cycles`` rises, each linear over
            ``ramp`` of its cycle, then β = 1).
        unit: "steps" or "epochs" (epochs only inside ``fit``).
        start: β at step 0.
        cycles, ramp: for "cyclical". After the last cycle β stays 1.

    Raises: InvalidArgument for lengths ≤ 0, start outside [0, 1]. ``fit`` warns when the warm-up is longer than the
        run.
    References: Bowman et al. 2016 (arXiv 1511.06349), section 3.1; Sønderby et al. 2016 (arXiv 1602.02282), eq. 18;
        cyclical: Fu et al. 2019 (arXiv 1903.10145), eqs. 6–7.
    """

    objective: Objective = field(default_factory=ELBO)
    warmup: float = 10
    schedule_form: Literal["linear", "cosine", "cyclical"] = "linear"
    unit: Unit = "epochs"
    start: float = 0.0
    cycles: int = 4
    ramp: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        todo = "Use the objective without AnnealedKL for no warm-up"
        number("warmup", self.warmup, lambda v: v > 0, "be finite and above 0", todo)
        number("start", self.start, lambda v: 0 <= v <= 1, "lie in [0, 1]", "β rises from start to 1")
        number("ramp", self.ramp, lambda v: 0 < v <= 1, "lie in (0, 1]", "It is the share of a cycle in which β rises")
        one_of("schedule_form", self.schedule_form, ("linear", "cosine", "cyclical"))
        one_of("unit", self.unit, get_args(Unit))
        whole_number("cycles", self.cycles)

    @property
    def uses_step(self) -> bool:
        return True

    @property
    def total(self) -> float:
        """Length of the whole schedule, in ``unit``."""
        return self.warmup * (self.cycles if self.schedule_form == "cyclical" else 1)

    def beta(self, step: Any) -> Any:
        """β at ``step`` (in steps)."""
        if self.schedule_form == "cyclical":
            whole = _progress(self.total, self.unit, step)
            phase = whole * self.cycles % 1.0 / self.ramp
            x = phase + (1.0 - phase) * ((phase > 1.0) | (whole >= 1.0))
        else:
            x = _progress(self.warmup, self.unit, step)
        if self.schedule_form == "cosine":
            x = 0.5 - 0.5 * cos(math.pi * x)
        return self.start + (1.0 - self.start) * x

    def shape(self, terms: Terms) -> Terms:
        return _scale_gains(terms, self.beta(terms.step))

    def schedule(self, terms: Terms) -> dict[str, Any]:
        return {"beta": self.beta(terms.step)}


@dataclass(frozen=True)
class LayerwiseAnnealedKL(Shape):
    r"""KL warm-up layer by layer: each site's β rises from ``start`` to 1, one site after another.

    Site i of ``order`` (from 0) is charged ``β_i(t) = start + (1 - start) clip((t - i delay) / warmup, 0, 1)``. With
    the default order, ``z1`` (next to the data) first, the upper layers stay free the longest: information that they
    can carry is unlocked from the top down, before its price is asked.

    Args:
        objective: the objective to shape.
        warmup: length of one site's rise, in ``unit``.
        delay: from the beginning of one site's rise to that of the next, in ``unit``.
        order: sites, the first to be charged first; by default by the numbers in their names.
        unit: "steps" or "epochs" (epochs only inside ``fit``).
        start: β before a site's rise.

    Raises: InvalidArgument for lengths below 0 (``warmup`` ≤ 0), start outside [0, 1], or an order that is not of the
        program's sites; Refused with gradients that need one gain for all sites (DReG beyond the ELBO).
    Limits: ``delay=0`` is :class:`AnnealedKL`. Nothing bounds the scales of a site that is not charged at all: where a
        warm-up is long, begin at a small price, ``start=0.001``. A delay as long as the warm-up drives what a hierarchy
        knows into its top; of a tenth of it, upper layers stayed alive in most seeds (``benchmarks/hierarchy.py``).
    References: Sønderby et al. 2016 (arXiv 1602.02282), eq. 18, for all layers at once.
    """

    objective: Objective = field(default_factory=ELBO)
    warmup: float = 10
    delay: float = 5
    order: tuple[str, ...] = ()
    unit: Unit = "epochs"
    start: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        todo = "Use the objective without LayerwiseAnnealedKL for no warm-up"
        number("warmup", self.warmup, lambda v: v > 0, "be finite and above 0", todo)
        number("delay", self.delay, lambda v: v >= 0, "be finite and at least 0", "0 anneals all sites together")
        number("start", self.start, lambda v: 0 <= v <= 1, "lie in [0, 1]", "β rises from start to 1")
        one_of("unit", self.unit, get_args(Unit))
        object.__setattr__(self, "order", tuple(self.order))
        _check_gains(self)

    @property
    def uses_step(self) -> bool:
        return True

    def check(self, terms: Terms) -> None:
        super().check(terms)
        if self.order and sorted(self.order) != sorted(terms.sites):
            todo = "Name each latent once, or leave order empty"
            raise must("order", f"name the sites {sorted(terms.sites)}", self.order, todo)

    @property
    def total(self) -> float:
        """Length of the whole schedule, in ``unit``; of the first site's rise alone where the order is left open."""
        return self.warmup + self.delay * max(len(self.order) - 1, 0)

    def betas(self, terms: Terms) -> dict[str, Any]:
        """β by site at the terms' step."""
        order = self.order or tuple(sorted(terms.sites, key=by_number))
        begun = {name: terms.step - i * self.delay for i, name in enumerate(order)}
        rise = {name: _progress(self.warmup, self.unit, step * (step > 0)) for name, step in begun.items()}
        return {name: self.start + (1.0 - self.start) * x for name, x in rise.items()}

    def shape(self, terms: Terms) -> Terms:
        betas = self.betas(terms)
        gains = {n: s.gain * betas[n] for n, s in terms.sites.items()}
        return terms.shaped(gains, {n: s.offset * betas[n] for n, s in terms.sites.items()})

    def schedule(self, terms: Terms) -> dict[str, Any]:
        return {f"beta_{name}": beta for name, beta in self.betas(terms).items()}

    def in_steps(self, steps_per_epoch: int) -> Shape:
        out: Any = super().in_steps(steps_per_epoch)
        return replace(out, delay=self.delay * steps_per_epoch) if self.unit == "epochs" else out


def _check_gains(shape: Shape) -> None:
    """Refuse a gradient that needs one gain for every site and dimension."""
    if not shape.gradient.allows_gain_per_dimension:
        raise must(
            f"{type(shape).__name__}.objective.gradient",
            "allow gains that differ",
            type(shape.gradient).__name__,
            "Use Pathwise() or STL(); for the ELBO, DReG is STL",
            Refused,
        )


def _check_constraint(shape: Shape) -> None:
    """Refuse what a constraint on the KL term cannot be put on: a multi-sample bound, and another such constraint."""
    name, base = type(shape).__name__, type(shape.base).__name__
    if not isinstance(shape.base, ELBO):
        condition = "be an ELBO, alone or shaped: its KL term is constrained, and a multi-sample bound has none"
        todo = f"Use {name}(ELBO(...)), or AnnealedKL or Beta on {base}"
        raise must(f"{name}.objective", condition, base, todo, Refused)
    inner = shape.objective
    while isinstance(inner, Shape):
        if isinstance(inner, (FreeBits, Capacity)):
            condition = "hold no second constraint on the KL term"
            raise must(f"{name}.objective", condition, type(inner).__name__, "Use one of the two", Refused)
        inner = inner.objective


@dataclass(frozen=True)
class FreeBits(Shape):
    r"""Free bits: a group of latents is not charged below λ nats.

    .. math:: E_q[\log p(x|z)] - \sum_j \max(\lambda, \operatorname{mean}_{batch} KL_j)

    The gradient of group j's rate is exactly zero while its batch mean is below λ.

    Args:
        objective: an ELBO, alone or shaped.
        free_bits: λ, nats per group and entry of the bound (the name is the field's; the unit is nats).
        per: groups are each latent "dimension" or each whole "site".

    Raises: InvalidArgument for λ < 0; Refused on multi-sample bounds, on gradients that need one gain, and per
        dimension on sites whose guide or prior does not factorise.
    References: Kingma et al. 2016 (arXiv 1606.04934), eq. 15.
    """

    reads_batch_means: ClassVar[bool] = True

    objective: Objective = field(default_factory=ELBO)
    free_bits: float = 0.1
    per: Literal["dimension", "site"] = "dimension"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("free_bits", self.free_bits, lambda v: v >= 0, "be finite and at least 0", "0 is the plain ELBO")
        one_of("per", self.per, ("dimension", "site"))
        _check_constraint(self)
        _check_gains(self)

    def check(self, terms: Terms) -> None:
        super().check(terms)
        for name, site in terms.sites.items():
            if self.per == "dimension" and site.rate_terms is None:
                raise must(
                    f"site '{name}' under FreeBits(per='dimension')",
                    "have a guide and a prior that factorise over dimensions",
                    site.guide_family or "one that does not",
                    "Use per='site'",
                    Refused,
                )

    def shape(self, terms: Terms) -> Terms:
        gains, offsets = {}, {}
        for name, site in terms.sites.items():
            if self.per == "dimension":
                rate_terms = site.rate_terms
                assert rate_terms is not None, "check() refuses such sites"
                mean = stop_gradient(rate_terms.reshape((-1, rate_terms.shape[-1])).mean(axis=0))
                charged = (mean > self.free_bits) * 1.0
                free = (site.gain * (1.0 - charged)).sum()
            else:
                charged = (stop_gradient(site.rate.mean()) > self.free_bits) * 1.0
                free = site.gain * (1.0 - charged)
            gains[name], offsets[name] = site.gain * charged, site.offset + self.free_bits * free
        return terms.shaped(gains, offsets)

    def schedule(self, terms: Terms) -> dict[str, Any]:
        return {"free_bits": terms.step * 0.0 + self.free_bits}


@dataclass(frozen=True)
class Capacity(Shape):
    r"""A target for the rate that rises to ``capacity``.

    ``E[log p(x|z)] - γ |KL - C(t)|``, with KL the batch mean over all sites.

    Args:
        objective: an ELBO, alone or shaped.
        capacity: C at the end of the rise, nats.
        gamma: γ, the pull.
        warmup: length of the linear rise from 0, in ``unit``.
        unit: "steps" or "epochs" (epochs only inside ``fit``).

    Raises: InvalidArgument for negative values; Refused on multi-sample bounds. References: Burgess et al. 2018
        (arXiv 1804.03599), eq. 8.
    """

    reads_batch_means: ClassVar[bool] = True

    objective: Objective = field(default_factory=ELBO)
    capacity: float = 25.0
    gamma: float = 1.0
    warmup: float = 10
    unit: Unit = "epochs"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("capacity", "gamma", "warmup"):
            todo = "See Capacity's docstring for its meaning"
            number(name, getattr(self, name), lambda v: v >= 0, "be finite and at least 0", todo)
        one_of("unit", self.unit, get_args(Unit))
        _check_constraint(self)

    @property
    def uses_step(self) -> bool:
        return True

    def target(self, step: Any) -> Any:
        """C at ``step`` (in steps), nats."""
        return self.capacity * _progress(self.warmup, self.unit, step)

    def shape(self, terms: Terms) -> Terms:
        target = self.target(terms.step)
        above = (stop_gradient(terms.rate.mean()) > target) * 2.0 - 1.0
        pulled = _scale_gains(terms, self.gamma * above)
        first = next(iter(terms.sites))  # what charges the rate β charges the constraint β, in either order of nesting
        offsets = {n: s.offset - s.gain * target * (n == first) for n, s in pulled.sites.items()}
        return pulled.shaped({n: s.gain for n, s in pulled.sites.items()}, offsets)

    def schedule(self, terms: Terms) -> dict[str, Any]:
        return {"capacity": self.target(terms.step)}


@dataclass(frozen=True)
class Classification(Shape):
    r"""The auxiliary classification term: the guide's own ``log q(y|x)`` of the labels that are known.

    .. math:: \text{objective} + \text{weight} \cdot 1[\text{labelled}] \log q(y|x)

    A known label takes the place of y's distribution in the guide, so without this term no label trains the classifier.
    It is of training alone: what is reported is the objective's bound.

    Args:
        objective: the objective to add it to.
        weight: of the term, at each labelled datum. The paper's ``α E_labelled[log q(y|x)]`` beside a sum over all data
            is ``weight = α / num_labelled``; its ``α = 0.1 N`` is a tenth of the number of data for each label.
        site: what the guide records (``deterministic``) for it: the log-probability of the label, nats, 0 where there
            is none.

    Raises: InvalidArgument for a weight below 0, and at the first step where the guide records no such number a datum.
    Units: nats per datum.
    Limits: 0 is the objective alone. In minibatches it is unbiased, few of which hold a label where labels are rare.
    References: Kingma et al. 2014 (arXiv 1406.5298), eq. 9; the weight, section 4.
    """

    objective: Objective = field(default_factory=ELBO)
    weight: float = 1.0
    site: str = "log_classifier"

    def __post_init__(self) -> None:
        super().__post_init__()
        number("weight", self.weight, lambda v: v >= 0, "be finite and at least 0", "0 leaves the labels unread")

    def check(self, terms: Terms) -> None:
        super().check(terms)
        todo = "Pass labels beside the data, and record their log-probabilities in the guide"
        if self.site not in terms.recorded:
            got = sorted(terms.recorded) or "nothing"
            raise must("the guide under Classification", f"record '{self.site}' by deterministic", got, todo)
        shape, batch = tuple(terms.recorded[self.site].shape[1:]), tuple(terms.log_lik.shape[1:])
        if shape != batch:
            raise must(f"'{self.site}' under Classification", f"be one number a datum, of shape {batch}", shape, todo)

    def shape(self, terms: Terms) -> Terms:
        return terms

    def _term(self, terms: Terms) -> Array:
        return self.weight * terms.recorded[self.site].mean(axis=0)

    def added(self, terms: Terms) -> Any:
        return super().added(terms) + self._term(terms)

    def surrogate(self, terms: Terms) -> Array:
        return super().surrogate(terms) + self._term(terms)

    def schedule(self, terms: Terms) -> dict[str, Any]:
        return {"classification": stop_gradient(self._term(terms).mean())}


class NoiseWeighting(Shape):
    r"""A weight on each step of a diffusion by how noisy it is, relative to the ELBO's.

    The ELBO charges a step ``charge / 2 ||e - e_said||^2``; these charge ``weight(snr) / 2 ||e - e_said||^2``, snr
    being the signal-to-noise ratio at the drawn time. What the chain's two ends are charged stays as it is.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_gains(self)

    def check(self, terms: Terms) -> None:
        super().check(terms)
        if "step" not in terms.sites or "level" not in terms.values:
            got = sorted(terms.sites)
            todo = "Use it with DiffusionVAE(process='one-step') or VariationalDiffusion"
            condition = "be a diffusion that draws one step a datum (sites 'level' and 'step')"
            raise must(f"the program under {type(self).__name__}", condition, got, todo, Refused)
        if tuple(terms.log_lik.shape) != tuple(terms.values["level"].shape[:-1]):
            todo = "Use process='one-step'"
            got = f"levels of shape {tuple(terms.values['level'].shape)}"
            raise must(f"the program under {type(self).__name__}", "draw one step a datum", got, todo, Refused)

    @abstractmethod
    def weight(self, snr: Array) -> Array:
        """The weight on ``||e - e_said||^2 / 2`` at a signal-to-noise ratio."""

    def shape(self, terms: Terms) -> Terms:
        level = stop_gradient(terms.values["level"])
        gain = self.weight(namespace(level).exp(level[..., 0])) / level[..., 1].clip(1e-20, None)  # 0 costs 0
        gains = {n: s.gain * gain if n == "step" else s.gain for n, s in terms.sites.items()}
        return terms.shaped(gains, {n: s.offset for n, s in terms.sites.items()})

    def schedule(self, terms: Terms) -> dict[str, Any]:
        """What the weighting leaves uncharged (mean, nats): the bound it trains on lies so much above the ELBO."""
        step = terms.sites["step"]
        return {"weighted_gap": stop_gradient((step.rate - self.shape(terms).sites["step"].shaped_rate).mean())}


@dataclass(frozen=True)
class SimpleLoss(NoiseWeighting):
    r"""The simple loss of denoising diffusion: every noise level counts alike, whatever the ELBO charges it.

    ``weight = 1``. Beside the ELBO it takes weight from the little noise that is most of the nats and least of what
    is seen.

    Args:
        objective: the objective to shape.

    Limits: a schedule that is learned would learn to be cheap under it: keep it fixed.
    Raises: Refused for programs that draw no step. References: Ho, Jain & Abbeel 2020 (arXiv 2006.11239), eq. 14.
    """

    objective: Objective = field(default_factory=ELBO)

    def weight(self, snr: Array) -> Array:
        return snr * 0.0 + 1.0


@dataclass(frozen=True)
class P2(NoiseWeighting):
    r"""Perception-prioritised weighting: less for steps with little noise.

    ``weight = (snr_offset + snr)^(-snr_power)``.

    Args:
        objective: the objective to shape.
        snr_offset: k in the paper, above 0.
        snr_power: γ in the paper, at least 0; 0 is :class:`SimpleLoss`.

    Limits: as for :class:`SimpleLoss`.
    Raises: InvalidArgument; Refused for programs that draw no step. References: Choi et al. 2022 (arXiv 2204.00227),
        eq. 8.
    """

    objective: Objective = field(default_factory=ELBO)
    snr_offset: float = 1.0
    snr_power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("snr_offset", self.snr_offset, lambda v: v > 0, "be finite and above 0", "The paper uses 1")
        number("snr_power", self.snr_power, lambda v: v >= 0, "be finite and at least 0", "0 is SimpleLoss")

    def weight(self, snr: Array) -> Array:
        return (self.snr_offset + snr) ** -self.snr_power


@dataclass(frozen=True)
class MinSNR(NoiseWeighting):
    r"""The signal's error, weighted by its signal-to-noise ratio up to a cap.

    ``weight = min(snr, snr_cap) / snr``: of the signal's squared error ``||x - x_said||^2 = ||e - e_said||^2 / snr``
    the weight is ``min(snr, snr_cap)``.

    Args:
        objective: the objective to shape.
        snr_cap: γ in the paper, above 0.

    Limits: as for :class:`SimpleLoss`.
    Raises: InvalidArgument; Refused for programs that draw no step. References: Hang et al. 2023 (arXiv 2303.09556),
        section 3.4.
    """

    objective: Objective = field(default_factory=ELBO)
    snr_cap: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("snr_cap", self.snr_cap, lambda v: v > 0, "be finite and above 0", "The paper uses 5")

    def weight(self, snr: Array) -> Array:
        return (self.snr_cap / snr).clip(None, 1.0)
