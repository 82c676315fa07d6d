"""Likelihoods p(x | z) of flat data: what a decoder's outputs mean, and which data they can explain.

Each is a spec; its forms are in ``likelihoods_pyro.py`` and ``likelihoods_numpyro.py``. A form maps the decoder's
outputs of shape (..., num_outputs * data_dim) to a distribution with batch shape (...) and event shape (data_dim,).
With two outputs the first ``data_dim`` are locations and the last ``data_dim`` log scales. Every log density is in nats
and keeps its normalising constant.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
from scipy.special import logit

from elbozoo.inference.errors import must
from elbozoo.inference.parts import Part, one_of, positive, whole_number

__all__ = [
    "AutoregressiveBernoulli",
    "Bernoulli",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "Gaussian",
    "Likelihood",
]

LEVEL_TOLERANCE = 1e-2
"""How far a value may lie from its level, in level spacings: covers float32 rounding up to 65536 levels."""


@dataclasses.dataclass(frozen=True)
class Likelihood(Part):
    """A family for p(x | z)."""

    stem: ClassVar[str] = "likelihoods"
    unit_interval: ClassVar[bool] = False
    """Whether all data that it can explain lie in [0, 1]."""

    @property
    def num_outputs(self) -> int:
        """Decoder outputs for each entry of x."""
        return 1

    def check(self, x: Any) -> None:
        """Raise InvalidArgument unless every entry of ``x`` lies in the support."""
        raise NotImplementedError

    def outputs_of_mean(self, mean: np.ndarray) -> np.ndarray:
        """The decoder's first output for each entry at which ``E[x | z] = mean``, of its shape; any second output is 0.

        A Bernoulli's is ``log(m / (1 - m))``, m being the mean within [0.001, 0.999]; a continuous Bernoulli's the root
        l of ``1/2 + (coth(l/2) - 2/l) / 2 = m``; a Gaussian's m. A discretised logistic has its location there, which
        at scale 1 is not its mean; an autoregressive Bernoulli its mean while A and U are 0.
        """
        return mean

    def check_data_dim(self, data_dim: int) -> None:
        """Raise InvalidArgument unless the likelihood is of data with so many entries; most are of any number."""


@dataclasses.dataclass(frozen=True)
class Bernoulli(Likelihood):
    """Binary data: ``log p(x|z) = sum_d x_d log s(l_d) + (1 - x_d) log s(-l_d)``, s the sigmoid, l the outputs.

    Shapes: outputs (..., data_dim), x (..., data_dim). Units: nats. Support: {0, 1}.

    Limits: grey values in [0, 1] would turn it into a cross-entropy that is no log density; they are refused.

    Example:
        >>> Bernoulli().num_outputs
        1
    """

    unit_interval: ClassVar[bool] = True

    def check(self, x: Any) -> None:
        array = np.asarray(x)
        _refuse(
            (array == 0) | (array == 1),
            array,
            "be 0 or 1 under a Bernoulli likelihood",
            'Binarize grey pixels with binarize="stochastic" or binarize="threshold", or use ContinuousBernoulli() or '
            "DiscretizedLogistic()",
        )

    def outputs_of_mean(self, mean: np.ndarray) -> np.ndarray:
        return logit(_inside(mean))


@dataclasses.dataclass(frozen=True)
class AutoregressiveBernoulli(Bernoulli):
    """Binary data whose entries depend on those before them: a decoder that can do without z.

    ``log p(x|z) = sum_i log s((2 x_i - 1) a_i)`` with s the sigmoid and, l being the decoder's outputs,
    ``a_i = l_i(z) + sum_{j<i} A_ij x_j + sum_{k: m_k<i} U_ik tanh(c_k + sum_{j<=m_k} V_kj x_j)``.
    Hidden unit k has degree ``m_k = floor(k (D - 1) / masked_units)``: it sees the entries up to m_k and is seen by
    those after. Without masked units the last sum is empty. Entries are in the order of x (for images, row by row).

    Parameters (torch layout, zero above the order whatever they hold there): ``likelihood.autoregression`` A
    (data_dim, data_dim), which starts at 0; with masked units ``likelihood.hidden.weight`` V (masked_units, data_dim),
    ``likelihood.hidden.bias`` c and ``likelihood.readout.weight`` U (data_dim, masked_units).

    Shapes: outputs (..., data_dim), x (..., data_dim). Units: nats. Support: {0, 1}.

    Limits: ``A = U = 0`` is :class:`Bernoulli`. Densities cost one matrix product, draws one pass an entry. E[x | z]
    has no closed form, so pictures show draws in its place.

    Args:
        data_dim: entries of one datum, as in the model.
        masked_units: hidden units between x and its later entries; 0 for none.

    References:
        Frey, Hinton & Dayan 1996, Does the wake-sleep algorithm produce good density estimators? (A alone); Germain,
        Gregor, Murray & Larochelle 2015, MADE, arXiv 1502.03509 (the masks); Chen et al. 2017, Variational lossy
        autoencoder, arXiv 1611.02731 (why such a decoder may leave z unused).

    Example:
        >>> AutoregressiveBernoulli(data_dim=3, masked_units=2).masks()[0].tolist()
        [[True, False, False], [True, True, False]]
    """

    data_dim: int = 784
    masked_units: int = 0

    def __post_init__(self) -> None:
        whole_number("data_dim", self.data_dim)
        whole_number("masked_units", self.masked_units, 0)
        if self.masked_units and self.data_dim < 2:
            todo = "Pass masked_units=0"
            raise must("data_dim", "be at least 2 for a masked unit to have something to predict", self.data_dim, todo)

    def check_data_dim(self, data_dim: int) -> None:
        if data_dim != self.data_dim:
            todo = f"Pass AutoregressiveBernoulli(data_dim={data_dim})"
            raise must("likelihood.data_dim", f"be the model's {data_dim}", self.data_dim, todo)

    def masks(self) -> tuple[np.ndarray, np.ndarray]:
        """Which entries each hidden unit sees, (masked_units, data_dim), and which see it, (data_dim, masked_units)."""
        degree = np.arange(self.masked_units) * (self.data_dim - 1) // max(self.masked_units, 1)
        entry = np.arange(self.data_dim)
        return entry <= degree[:, None], degree < entry[:, None]


@dataclasses.dataclass(frozen=True)
class ContinuousBernoulli(Likelihood):
    """Data in [0, 1]: the normalised form of what the Bernoulli's cross-entropy is often misused for.

    ``p(x|l) = exp(l x) / Z(l)`` with ``Z(l) = (exp(l) - 1) / l``, so that with ``u = l / 2``
    ``log p(x|l) = l (x - 1/2) - log(sinh(u) / u)`` and ``E[x] = 1/2 + (coth(u) - 1/u) / 2``.
    Both forms evaluate it from the logits in this symmetric way, with a Taylor series for |u| < 0.1: the constant is
    exact to rounding near l = 0 and keeps growing as log|l| where ``sigmoid(l)`` saturates (there the densities that
    go through clamped probabilities are wrong and have no gradient).

    Shapes: outputs (..., data_dim), x (..., data_dim). Units: nats (of a density). Support: [0, 1].

    References:
        Loaiza-Ganem & Cunningham 2019, The continuous Bernoulli, arXiv 1907.06845 (with
        ``lambda = sigmoid(l)``).

    Example:
        >>> ContinuousBernoulli().check(np.array([0.0, 0.25]))
    """

    unit_interval: ClassVar[bool] = True

    def check(self, x: Any) -> None:
        array = np.asarray(x)
        condition = "lie in [0, 1] under a ContinuousBernoulli likelihood"
        _refuse((array >= 0) & (array <= 1), array, condition, "Divide 8-bit pixels by 255, or use Gaussian()")

    def outputs_of_mean(self, mean: np.ndarray) -> np.ndarray:
        low, high = np.full(np.shape(mean), -2000.0), np.full(np.shape(mean), 2000.0)  # beyond the means of _inside
        for _ in range(60):  # E[x] grows with l: halve what it lies in, down to rounding
            middle = (low + high) / 2
            below = _continuous_mean(middle) < _inside(mean)
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2


@dataclasses.dataclass(frozen=True)
class Gaussian(Likelihood):
    """Real data: ``log p(x|z) = sum_d log N(x_d; loc_d, scale_d^2)``.

    Shapes: outputs (..., num_outputs * data_dim), x (..., data_dim). Units: nats (of a density). Support: finite reals.

    Limits: with ``scale="pixel"`` the density has no upper bound: an entry that is constant over the data drives its
    scale to 0 and the bound to infinity (Mattei & Frellsen 2018, arXiv 1802.04826).

    Args:
        scale: a number: fixed; ``"learned"``: one parameter ``likelihood.log_scale`` for all entries, from scale 1;
            ``"pixel"``: ``exp`` of a second decoder output for each entry.

    Example:
        >>> Gaussian(scale="pixel").num_outputs
        2
    """

    scale: float | str = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.scale, str):
            one_of("scale", self.scale, ("learned", "pixel"))
        else:
            positive("scale", self.scale)

    @property
    def num_outputs(self) -> int:
        return 2 if self.scale == "pixel" else 1

    def check(self, x: Any) -> None:
        array = np.asarray(x)
        _refuse(np.isfinite(array), array, "be finite", "Drop or fill missing values first")


@dataclasses.dataclass(frozen=True)
class DiscretizedLogistic(Likelihood):
    """Quantised data: the mass that a logistic distribution gives to a level's bin, in nats of a discrete variable.

    With levels ``x = k / (levels - 1)``, half width ``h = 1 / (2 (levels - 1))``, ``a = (x - h - loc) / scale`` and
    ``b = (x + h - loc) / scale``: ``p(x|z) = s(b) - s(a)``, where the lowest level also takes everything below it
    (``s(b)``) and the highest everything above it (``1 - s(a)``). Both forms evaluate the difference as
    ``log s(b) + log s(-a) + log(1 - exp(a - b))``, which is an identity and loses no digits in the tails: no floor on
    the mass or on the scale is needed, and none is used.

    Shapes: outputs (..., 2 * data_dim) as loc and log scale, in units of x; x (..., data_dim). Units: nats (of a mass).
    Support: multiples of 1 / (levels - 1) in [0, 1]. Divide by ``data_dim * log(2)`` for bits per dimension.

    Args:
        levels: number of values an entry can take, 256 for 8-bit images.

    References:
        Salimans, Karpathy, Chen & Kingma 2017, PixelCNN++, arXiv 1701.05517, eq. 2 with one component; Kingma et al.
        2016, arXiv 1606.04934.

    Example:
        >>> DiscretizedLogistic(levels=5).check(np.array([0.0, 0.25]))
    """

    levels: int = 256
    unit_interval: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole_number("levels", self.levels, 2)

    @property
    def num_outputs(self) -> int:
        return 2

    def check(self, x: Any) -> None:
        array = np.asarray(x)
        steps = np.asarray(array, dtype=np.float64) * (self.levels - 1)
        inside = (array >= 0) & (array <= 1) & (np.abs(steps - np.rint(steps)) <= LEVEL_TOLERANCE)
        condition = f"be a multiple of 1/{self.levels - 1} in [0, 1] under DiscretizedLogistic(levels={self.levels})"
        _refuse(inside, array, condition, "Divide whole pixel values by levels - 1, or use ContinuousBernoulli()")


def _inside(mean: np.ndarray) -> np.ndarray:
    """A mean that some odds have, where an entry is 0, or 1, in all data; the limits are Burda et al.'s."""
    return np.clip(mean, 0.001, 0.999)


def _continuous_mean(logits: np.ndarray) -> np.ndarray:
    """``1/2 + (coth(u) - 1/u) / 2`` with ``u = l / 2``; its series where both terms would cancel."""
    u = np.asarray(logits) / 2
    far = np.where(np.abs(u) < 1e-3, 1.0, u)
    return 0.5 + np.where(np.abs(u) < 1e-3, u / 3, 1 / np.tanh(far) - 1 / far) / 2


def _refuse(inside: np.ndarray, array: np.ndarray, condition: str, todo: str) -> None:
    """Raise if any entry is not ``inside``, showing the first one that is not (NaN never is)."""
    if not np.all(inside):
        first = tuple(int(i) for i in np.argwhere(~inside)[0])
        got = f"{array[first]} at index {first} ({np.mean(~inside):.1%} of the entries are outside)"
        raise must("x", condition, got, todo)
