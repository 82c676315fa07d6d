r"""Noise schedules: how the log signal-to-noise ratio of a diffusion falls with time.

At time t in [0, 1] the noised signal is ``z_t = alpha_t x + sigma_t e``, ``e ~ N(0, I)``, with
``log_snr = log(alpha_t^2 / sigma_t^2)`` and, variance preserving, ``alpha_t^2 = s(log_snr)``,
``sigma_t^2 = s(-log_snr)``, s the sigmoid. A schedule maps an array of times to ``(log_snr, slope)`` with
``slope = -d log_snr / dt > 0``, both of the array's shape; it is written once, for NumPy, JAX and torch. One that is
learned has its parameters in ``schedules_pyro.py`` and ``schedules_numpyro.py``.

References: Kingma, Salimans, Poole & Ho 2021, Variational diffusion models, arXiv 2107.00630, section 3.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

from elbozoo.inference.arrays import Array, namespace
from elbozoo.inference.errors import must
from elbozoo.inference.parts import Part, number, whole_number

__all__ = [
    "CosineSchedule",
    "LearnedSchedule",
    "LinearSchedule",
    "PolynomialSchedule",
    "Schedule",
    "TabulatedSchedule",
]


MOST = 25
"""The largest log signal-to-noise ratio, of either sign: beyond it a noised signal is rounded to one without noise."""


@dataclasses.dataclass(frozen=True)
class Schedule(Part):
    """How the log signal-to-noise ratio falls from ``log_snr_max`` at time 0 to ``log_snr_min`` at time 1."""

    stem: ClassVar[str] = "schedules"
    learned: ClassVar[bool] = False
    """Whether it has parameters: then its form in an engine is what is called."""

    def __call__(self, t: Array) -> tuple[Array, Array]:
        """``(log_snr, -d log_snr / dt)`` at times ``t``, of its shape."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class _Ends(Schedule):
    """A schedule between two ends."""

    log_snr_max: float = 13.3
    log_snr_min: float = -5.0

    def __post_init__(self) -> None:
        for name in ("log_snr_max", "log_snr_min"):
            number(
                name, getattr(self, name), lambda v: abs(v) <= MOST, f"lie in [-{MOST}, {MOST}]", "Use 13.3 and -5, say"
            )
        if self.log_snr_max <= self.log_snr_min:
            got = f"{self.log_snr_max} and {self.log_snr_min}"
            raise must("log_snr_max", "be above log_snr_min: signal is lost as time goes on", got, "Swap them")


@dataclasses.dataclass(frozen=True)
class PolynomialSchedule(_Ends):
    """``log_snr(t) = log_snr_max + (log_snr_min - log_snr_max) t^power``.

    Args:
        log_snr_max: at time 0, next to the data.
        log_snr_min: at time 1.
        power: at least 1; 1 is linear, 3 cubic.

    Raises: InvalidArgument for ends out of order, or a power below 1 (whose slope is infinite at 0).

    Example:
        >>> [float(v) for v in PolynomialSchedule(6.0, -2.0, 3.0)(0.5)]
        [5.0, 6.0]
    """

    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number("power", self.power, lambda v: v >= 1, "be finite and at least 1", "1 is linear")

    def __call__(self, t: Array) -> tuple[Array, Array]:
        span = self.log_snr_max - self.log_snr_min
        return self.log_snr_max - span * t**self.power, span * self.power * t ** (self.power - 1.0)


@dataclasses.dataclass(frozen=True)
class LinearSchedule(_Ends):
    """A log signal-to-noise ratio that falls linearly; the default ends are those of Kingma et al. 2021, appendix B.

    Args:
        log_snr_max: at time 0, next to the data.
        log_snr_min: at time 1.

    Raises: InvalidArgument for ends out of order.

    Example:
        >>> [float(v) for v in LinearSchedule(6.0, -2.0)(0.5)]
        [2.0, 8.0]
    """

    def __call__(self, t: Array) -> tuple[Array, Array]:
        span = self.log_snr_max - self.log_snr_min
        return self.log_snr_max - span * t, span + 0.0 * t


@dataclasses.dataclass(frozen=True)
class CosineSchedule(_Ends):
    """``log_snr(t) = -2 log tan(a + (b - a) t)``: alpha is the cosine, sigma the sine of an angle linear in time.

    ``a`` and ``b`` are the angles at which it takes its ends, so that it is the cosine schedule cut off at both.

    Args:
        log_snr_max: at time 0, next to the data.
        log_snr_min: at time 1.

    Raises: InvalidArgument for ends out of order.
    References: Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17; the cut, Hoogeboom, Heek & Salimans 2023, arXiv
        2301.11093, section 2.2.

    Example:
        >>> bool(abs(CosineSchedule(4.0, -4.0)(0.5)[0]) < 1e-12)
        True
    """

    def __call__(self, t: Array) -> tuple[Array, Array]:
        first, rest = math.atan(math.exp(-0.5 * self.log_snr_max)), math.atan(math.exp(0.5 * self.log_snr_min))
        xp, turn = namespace(t), 0.5 * math.pi - first - rest
        sine, cosine = xp.sin(first + turn * t), xp.sin(rest + turn * (1.0 - t))  # each exact where it is near 0
        return 2.0 * (xp.log(cosine) - xp.log(sine)), 2.0 * turn / (sine * cosine)


@dataclasses.dataclass(frozen=True)
class TabulatedSchedule(Schedule):
    """Piecewise linear between values at equal steps of time.

    Args:
        log_snr: values from time 0 to time 1, at least two, each below the one before.

    Raises: InvalidArgument for fewer than two values, or values that do not fall.

    Example:
        >>> [float(v) for v in TabulatedSchedule((6.0, 0.0, -2.0))(0.25)]
        [3.0, 12.0]
    """

    log_snr: tuple[float, ...] = (13.3, -5.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_snr", tuple(self.log_snr))
        for value in self.log_snr:
            number(
                "every entry of log_snr",
                value,
                lambda v: abs(v) <= MOST,
                f"lie in [-{MOST}, {MOST}]",
                "Use 13.3 to -5, say",
            )
        pairs = list(zip(self.log_snr, self.log_snr[1:], strict=False))
        if not pairs or any(later >= earlier for earlier, later in pairs):
            todo = "Signal is lost as time goes on: sort them in falling order, without ties"
            raise must("log_snr", "be at least two values, each below the one before", self.log_snr, todo)

    def __call__(self, t: Array) -> tuple[Array, Array]:
        count = len(self.log_snr) - 1
        log_snr, slope = self.log_snr[0] + 0.0 * t, 0.0 * t
        for i, (earlier, later) in enumerate(zip(self.log_snr, self.log_snr[1:], strict=False)):
            fall, begun = earlier - later, t * count - i
            log_snr = log_snr - fall * (begun * (begun > 0) + (1.0 - begun) * (begun > 1))
            inside = (begun > 0) & (begun <= 1) if i else begun <= 1
            slope = slope + fall * count * inside
        return log_snr, slope


@dataclasses.dataclass(frozen=True)
class LearnedSchedule(_Ends):
    r"""A monotone network between learned ends.

    ``log_snr(t) = max - span (m(t) - m(0)) / (m(1) - m(0))`` with
    ``m(t) = exp(c) t + mean_k exp(w_k) s(exp(v_k) (t - b_k))``, s the sigmoid: it falls whatever the parameters. It
    begins near the line between its ends.

    In continuous time the bound depends on the ends alone: where between them signal is lost moves nothing but the
    variance of its estimate. With ``minimise_variance`` the parameters between the ends follow the gradient of
    ``E[l^2] / E[l]``, l being the estimate of a datum's charge at its drawn time, instead of the bound's.

    Parameters: ``schedule.log_snr_max`` (), ``schedule.log_span`` (), ``schedule.log_linear`` (),
    ``schedule.log_height``, ``schedule.log_steepness``, ``schedule.center`` (units,).

    Args:
        log_snr_max: at time 0 before training.
        log_snr_min: at time 1 before training.
        schedule_units: of the network.
        learn_ends: train them; else they stay where they begin.
        minimise_variance: see above; else everything follows the objective.

    Raises: InvalidArgument for ends out of order, or no units.
    References: Kingma, Salimans, Poole & Ho 2021, arXiv 2107.00630, section 5.1 and appendices H, I.
    """

    learned: ClassVar[bool] = True

    schedule_units: int = 64
    learn_ends: bool = True
    minimise_variance: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("schedule_units", self.schedule_units)


def monotone(t: Array, log_linear: Array, log_height: Array, log_steepness: Array, center: Array) -> tuple:
    """``(g, dg/dt)`` at times t: the network of :class:`LearnedSchedule`, from 0 at time 0 to 1 at time 1."""
    xp = namespace(log_linear)
    linear, height, steepness = xp.exp(log_linear), xp.exp(log_height) / log_height.shape[0], xp.exp(log_steepness)

    def value(t: Any) -> tuple[Array, Array]:
        step = 1.0 / (1.0 + xp.exp(-steepness * (t[..., None] - center)))
        slope = linear + (height * steepness * step * (1.0 - step)).sum(-1)
        return linear * t + (height * step).sum(-1), slope

    start, end = (value(t.reshape(-1)[:1] * 0.0 + end)[0][0] for end in (0.0, 1.0))
    now, slope = value(t)
    return (now - start) / (end - start), slope / (end - start)


def _check_level(name: str, value: Any) -> None:
    """Refuse a log signal-to-noise ratio that no float32 can tell from none."""
    number(name, value, lambda v: abs(v) <= MOST, f"lie in [-{MOST}, {MOST}]", "Use 13.3 to -5, say")
