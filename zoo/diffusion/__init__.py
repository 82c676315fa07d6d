r"""What the diffusion models share: the arithmetic of one step, and the last step down to the data.

Everything is of ``z = alpha x + sigma e`` with ``alpha^2 = s(log_snr)``, ``sigma^2 = s(-log_snr)``, s the sigmoid, and
written once for NumPy, JAX and torch. Shapes: z, x, e (..., D); log_snr (...).

References: Kingma, Salimans, Poole & Ho 2021, Variational diffusion models, arXiv 2107.00630 (VDM below).
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from elbozoo.inference.arrays import Array, concatenate, expm1, namespace, stop_gradient
from elbozoo.inference.errors import must
from elbozoo.inference.parts import Part, whole_number
from elbozoo.zoo.likelihoods import DiscretizedLogistic, Gaussian

__all__ = ["PREDICTS", "DiscretizedNormal", "EndLikelihood", "ExactNormal"]

PREDICTS = ("noise", "signal", "velocity", "prior")
"""What a denoiser's output can mean."""


def outputs_of(predicts: str) -> int:
    """Numbers that a denoiser says for each entry of its signal."""
    return 2 if predicts == "prior" else 1


# --- one step -----------------------------------------------------------------------------------------------------


def scales(log_snr: Array) -> tuple[Array, Array]:
    """``(alpha, sigma)`` with a last axis of one, (..., 1)."""
    xp = namespace(log_snr)
    log_snr = log_snr[..., None]
    return (1.0 / (1.0 + xp.exp(-log_snr))) ** 0.5, (1.0 / (1.0 + xp.exp(log_snr))) ** 0.5


def noise_of(z: Array, x: Array, log_snr: Array) -> Array:
    """The noise e in ``z = alpha x + sigma e``."""
    alpha, sigma = scales(log_snr)
    return (z - alpha * x) / sigma


def signal_of(z: Array, noise: Array, log_snr: Array) -> Array:
    """The signal x in ``z = alpha x + sigma e``."""
    alpha, sigma = scales(log_snr)
    return (z - sigma * noise) / alpha


def noise_said(output: Array, z: Array, log_snr: Array, predicts: str, end: EndLikelihood) -> Array:
    """The noise that a denoiser's output says there is.

    ``"prior"`` is ``(m, log s)``, two halves of the last axis: the signal's mean given z, were each entry ``N(m, s^2)``
    before z was seen, with what else ``end`` knows of it. With ``s = 0`` that is m, with large s it is z itself: each
    entry is between what the network knows and what is still to be read off z.
    """
    if predicts == "noise":
        return output
    if predicts == "signal":
        return noise_of(z, output, log_snr)
    if predicts == "prior":
        mean, log_scale = output[..., : z.shape[-1]], output[..., z.shape[-1] :]
        return noise_of(z, end.expected(mean, log_scale, signal_of(z, 0.0 * z, log_snr), log_snr[..., None]), log_snr)
    alpha, sigma = scales(log_snr)
    return alpha * output + sigma * z


def step_back(z: Array, noise: Array, log_snr: Array, earlier: Array) -> tuple[Array, Array]:
    """Location and scale (..., 1) of ``q(z_s | z_t, x)`` for the x that ``noise`` makes of z_t (VDM, eqs. 25-27).

    Args:
        z, noise: at time t.
        log_snr, earlier: at t, and at s < t, where it is larger.
    """
    alpha, sigma = scales(log_snr)
    alpha_s, sigma_s = scales(earlier)
    least = namespace(z).finfo(z.dtype).eps  # of levels that rounding makes one: the step keeps a scale above 0
    lost = (-expm1(log_snr - earlier)).clip(least)[..., None]
    return alpha_s / alpha * (z - lost * sigma * noise), sigma_s * lost**0.5


def step_without_noise(z: Array, noise: Array, log_snr: Array, earlier: Array) -> Array:
    """The step of DDIM: the signal and the noise as they are said to be, mixed as at s (arXiv 2010.02502, eq. 12)."""
    alpha_s, sigma_s = scales(earlier)
    return alpha_s * signal_of(z, noise, log_snr) + sigma_s * noise


def flow(z: Array, noise: Array, log_snr: Array) -> Array:
    r"""``dz / d log_snr`` of the probability flow: ``(sigma^2 z - sigma e) / 2``.

    From ``dz/dt = f z - g^2 score / 2`` with ``f = d log alpha / dt`` and score ``-e / sigma``: in the log
    signal-to-noise ratio ``d log alpha = sigma^2 / 2`` and ``g^2 = -sigma^2``, whatever the schedule.

    References: Song et al. 2021, arXiv 2011.13456, eq. 13; VDM, eq. 13 for the schedule's part in it.
    """
    sigma = scales(log_snr)[1]
    return 0.5 * (sigma**2 * z - sigma * noise)


def relative_charge(x: Array, noise: Array, level: Array, denoise: Any) -> Array:
    """Twice a datum's charge over the mean charge, a constant: by how much its square's gradient is the larger one.

    ``d/dphi E[l^2] = E[2 l dl/dphi]`` (VDM, appendix I); the mean makes it free of scale.

    Args:
        x, noise: the signal and the noise in it, (..., D).
        level: :func:`level_at` the drawn time, (..., 2).
        denoise: (z, log_snr) to the noise that is said to be there.
    """
    level = stop_gradient(level)
    alpha, sigma = scales(level[..., 0])
    said = denoise(stop_gradient(alpha * x + sigma * noise), level[..., 0])
    charge = level[..., 1] * ((noise - said) ** 2).sum(-1)
    return stop_gradient(2.0 * charge / charge.mean())


# --- from z_0 to the data -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EndLikelihood(Part):
    """A family for ``p(x | z_0)`` without parameters: what is left to say when almost no noise is left."""

    stem: ClassVar[str] = "ends"

    def check(self, x: Any) -> None:
        """Raise InvalidArgument unless every entry of ``x`` lies in the support."""
        raise NotImplementedError

    def signal(self, x: Array) -> Array:
        """What of the data is noised."""
        return x

    def expected(self, mean: Array, log_scale: Array, read: Array, log_snr: Array) -> Array:
        """The posterior mean of a signal ``N(mean, scale^2)`` given ``read ~ N(signal, 1 / snr)``, (..., D).

        Args:
            mean, log_scale: of each entry, before it was seen, (..., D).
            read: the noised signal over alpha, (..., D).
            log_snr: of the noise in it, (..., 1).
        """
        return given(mean, log_scale, read, log_snr)[0]


def given(mean: Array, log_scale: Array, read: Array, log_snr: Array) -> tuple[Array, Array]:
    r"""Mean and scale of x ~ N(m, s^2) given ``read ~ N(x, 1 / snr)``.

    ``read + w (m - read)`` and ``s w^1/2`` with ``w = 1 / (1 + snr s^2)``, the prior's share of the precision.
    """
    kept = log_snr + 2.0 * log_scale
    xp = namespace(kept)
    log_share = -xp.logaddexp(kept, 0.0 * kept)  # log sigmoid(-kept), never nan
    return read + xp.exp(log_share) * (mean - read), xp.exp(log_scale + 0.5 * log_share)


@dataclasses.dataclass(frozen=True)
class ExactNormal(EndLikelihood):
    """Real data: ``p(x | z_0) = N(x; z_0 / alpha_0, sigma_0^2 / alpha_0^2)``.

    Shapes: z_0, x (..., data_dim). Units: nats (of a density). Support: finite reals.
    References: VDM, appendix E, for continuous data.

    Example:
        >>> ExactNormal().check(np.array([0.5, -3.0]))
    """

    def check(self, x: Any) -> None:
        Gaussian().check(x)


@dataclasses.dataclass(frozen=True)
class DiscretizedNormal(EndLikelihood):
    r"""Quantised data: ``p(x_i = v_k | z_0) ∝ N(z_{0,i}; alpha_0 u_k, sigma_0^2)``, normalised over the levels.

    Levels are ``v_k = k / (levels - 1)``, noised as ``u_k = 2 v_k - 1`` in [-1, 1].

    Shapes: z_0, x (..., data_dim). Units: nats (of a mass); divide by ``data_dim log 2`` for bits per dimension.
    Support: multiples of 1 / (levels - 1) in [0, 1].

    Args:
        levels: number of values an entry can take, 256 for 8-bit images.

    Raises: InvalidArgument.
    References: VDM, appendix E, eq. 33.

    Example:
        >>> DiscretizedNormal(levels=5).check(np.array([0.0, 0.25]))
    """

    levels: int = 256

    def __post_init__(self) -> None:
        whole_number("levels", self.levels, 2)

    def check(self, x: Any) -> None:
        DiscretizedLogistic(self.levels).check(x)  # of the same data

    def signal(self, x: Array) -> Array:
        return 2.0 * x - 1.0

    def grid(self) -> np.ndarray:
        """The levels as they are noised, (levels,)."""
        return np.linspace(-1.0, 1.0, self.levels)

    def expected(self, mean: Array, log_scale: Array, read: Array, log_snr: Array) -> Array:
        r"""The posterior mean on the levels, of a prior as wide as it must be for ``read`` to be no surprise.

        ``sum_k u_k w_k`` with ``w_k ∝ N(u_k; m', s'^2)``, where m' and s' are a normal posterior's (:func:`given`).
        That prior is ``N(mean, max(scale^2, (read - mean)^2 / SURPRISE^2 - 1 / snr))``: what the network is sure of and
        ``read`` contradicts costs tens of nats, and not half the signal-to-noise ratio times its square. Where it is
        widened the mean is within [-1, 1]. Shapes as in the base class.
        """
        xp = namespace(mean)
        variance = xp.exp(2.0 * log_scale.clip(-12.0, 12.0))
        surprise = ((read - mean.clip(-1.0, 1.0)) / SURPRISE) ** 2 - variance - xp.exp(0.0 * mean - log_snr)
        mean = xp.where(surprise > 0.0, mean.clip(-1.0, 1.0), mean)
        return self.rounded(*given(mean, 0.5 * xp.log(variance + surprise.clip(0.0)), read, log_snr))

    def rounded(self, mean: Array, scale: Array) -> Array:
        """``sum_k u_k w_k`` with ``w_k ∝ N(u_k; mean, scale^2)``, of the nearest level and two either side, (..., D).

        Where the scale is more than :data:`WIDE` of a level's width it is ``mean``, cut off at -1 and 1.
        """
        xp, half = namespace(mean), 0.5 * (self.levels - 1)  # from here on in widths of a level
        level, precision = half * (mean + 1.0), (half * scale).clip(0.01, WIDE) ** -2.0
        nearest = xp.round(level).clip(0, self.levels - 1)
        total, moved = 1.0, 0.0  # masses beside that of the nearest level, whose logit is the largest
        for j in (-2, -1, 1, 2):
            there = (nearest + j >= 0) & (nearest + j <= self.levels - 1)
            mass = xp.exp(xp.where(there, (level - nearest - 0.5 * j) * j * precision, -np.inf))
            total, moved = total + mass, moved + j * mass
        return (nearest + moved / total) / half - 1.0


SURPRISE = 5.0
"""Standard deviations from which on a denoiser's prior is taken to be wider than it said."""

NEAR = 4
"""Levels on either side of the nearest one that a narrow normal distribution is normalised over."""

WIDE = 0.6
"""From this scale on, in widths of a level, the mean of a normal distribution over the levels is its own to 0.004, also
of the five next to it.
"""


def is_narrow(likelihood: EndLikelihood, schedule: Any) -> bool:
    """Whether so little noise is left in z_0 that the rest of the levels has less than e^-40 of the nearest one's mass.

    Known before any tracing where the schedule is not learned.
    """
    if schedule.learned or not isinstance(likelihood, DiscretizedNormal):
        return False
    scale = np.exp(-0.5 * schedule(np.zeros(()))[0])
    return bool(scale < NEAR * 2.0 / (likelihood.levels - 1) / 80.0**0.5)


def near(loc: Array, scale: Array, levels: int) -> Array:
    """Log densities, but for their constant, at the levels around ``loc``, (..., 2 NEAR + 1); -inf where there is none.

    What a diffusion's last step is normalised over: all 256 levels would cost more than its network.
    """
    xp = namespace(loc)
    nearest = xp.round((loc + 1.0) * (0.5 * (levels - 1))).clip(0, levels - 1)
    k = concatenate([(nearest + j)[..., None] for j in range(-NEAR, NEAR + 1)], -1)
    logits = -0.5 * ((loc[..., None] - (2.0 * (k / (levels - 1)) - 1.0)) / scale[..., None]) ** 2
    return xp.where((k >= 0) & (k <= levels - 1), logits, -np.inf)


def check_predicts(predicts: str, needs: str) -> None:
    """Refuse a meaning that there is not, or that the denoiser cannot have."""
    if predicts not in PREDICTS or (needs and predicts != needs):
        choices = [needs] if needs else list(PREDICTS)
        raise must("predicts", f"be one of {choices}", repr(predicts), f"Pass predicts={choices[0]!r}")


# --- sites ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Steps:
    """Which sites a diffusion has where its chain is not written out.

    In order, ``last`` (the chain's z_T), and of each step that is charged ``time``, uniform on (0, 1), ``level``
    (:func:`level_at`), ``noisy``, the noised signal, and ``step``, the chain's next value given that one: the only one
    of these four whose densities count. Then ``z0``, which does not count either: its density is what the others bound.

    Args:
        num_steps: T; 0 for infinitely many.
        last: name of the chain's last site.
        every: all T steps, each from a noisy signal of its own, in a plate ``times`` and without ``time``; else one
            step a datum, scaled by T.
        stratified: spread the times of a batch evenly.
        watched: the guide draws the noise in ``noisy`` as a site ``noise`` before ``level``.
        sampling_steps: steps of the chain that draws z_0 where the model is run by itself.
    """

    num_steps: int
    last: str
    every: bool = False
    stratified: bool = True
    watched: bool = False
    sampling_steps: int = 0


# --- a drawn time -------------------------------------------------------------------------------------------------


def level_at(schedule: Any, t: Array, num_steps: int, *factor: Array) -> Array:
    r"""``(log_snr, charge)`` at times t, (..., 2): a step's whole charge is ``charge / 2 ||e - e_said||^2``.

    ``charge = T expm1(log_snr_s - log_snr_t)`` with ``s = t - 1/T`` (VDM, eqs. 13, 14, times T for the one step of T
    that is drawn), and ``-d log_snr / dt`` for infinitely many steps (eq. 17).

    Args:
        schedule: of the times.
        t: times.
        num_steps: T; 0 for infinitely many.
        factor: on the gradient of what a learned schedule does between its ends.
    """
    log_snr, charge = schedule(t, *factor)
    if num_steps:
        charge = num_steps * expm1(schedule(t - 1.0 / num_steps, *factor)[0] - log_snr)
    return concatenate([log_snr[..., None], charge[..., None]], -1)


def before(level: Array, num_steps: int) -> Array:
    """The log signal-to-noise ratio one step of T before a level's."""
    return level[..., 0] + namespace(level).log1p(level[..., 1] / num_steps)


def to_step(t: Array, num_steps: int) -> Array:
    """A time in (0, 1) as the end of the step, of T, that it falls into; itself for infinitely many."""
    return namespace(t).floor(t * num_steps).clip(0, num_steps - 1.0) / num_steps + 1.0 / num_steps if num_steps else t
