"""How noisy an objective's gradient is on a program, and how far from another's: bias, variance, signal-to-noise."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elbozoo.inference.data import prepare
from elbozoo.inference.objectives import Objective
from elbozoo.inference.parts import instance_of, whole_number

PARTS = ("model", "guide")
WARM_UP = 500


@dataclass(frozen=True, eq=False)
class GradientNoise:
    r"""Mean and variance of the gradient of one batch's objective, entry by entry, from independent draws.

    The gradient is of the batch mean of the surrogate, ascending, in unconstrained parameters. Its entries are in two
    parts: ``"guide"``, the parameters that the guide alone uses, and ``"model"``, all others.

    Attributes:
        objective: whose gradient it is.
        num_draws: gradients drawn.
        bound: their mean value of the bound, nats per datum.
        mean, variance: of each entry, ``(P,)`` by part.
    """

    objective: Objective
    num_draws: int
    bound: float
    mean: Mapping[str, np.ndarray]
    variance: Mapping[str, np.ndarray]

    def total_variance(self, part: str) -> float:
        """The trace of the gradient's covariance."""
        return float(self.variance[part].sum())

    def signal_to_noise(self, part: str) -> float:
        r"""``||E g|| / sqrt(tr Cov g)``, the draws' own noise taken out of the numerator; NaN without noise.

        For one parameter this is the ratio of Rainforth et al. 2018 (arXiv 1802.04537, eq. 6).
        """
        noise = self.total_variance(part)
        signal = float((self.mean[part] ** 2).sum()) - noise / self.num_draws
        return float(np.sqrt(max(signal, 0.0) / noise)) if noise > 0 else float("nan")

    def bias(self, reference: GradientNoise, part: str) -> tuple[float, float]:
        r"""``(||E g - E r|| / ||E r||, resolution)`` of an unbiased reference r of the same program and batch.

        The draws' own noise is taken out of the first number, which is 0 where nothing is left; the second is what that
        noise alone is worth: a bias below it has not been seen.
        """
        mean, other = self.mean[part], reference.mean[part]
        noise = self.total_variance(part) / self.num_draws + reference.total_variance(part) / reference.num_draws
        size = float(np.linalg.norm(other))
        distance = float(((mean - other) ** 2).sum()) - noise
        return float(np.sqrt(max(distance, 0.0))) / size, float(np.sqrt(noise)) / size

    def summary(self) -> dict[str, float]:
        """The figures by name."""
        found = {"num_draws": self.num_draws, "bound": self.bound}
        for part in PARTS:
            if self.mean[part].size:
                found |= {f"variance_{part}": self.total_variance(part), f"snr_{part}": self.signal_to_noise(part)}
        return found


def gradient_noise(
    program: Any,
    data: Any,
    objective: Objective,
    *,
    num_draws: int = 200,
    warm_up: int | None = None,
    step: int = 0,
    seed: int = 0,
) -> GradientNoise:
    """Draw an objective's gradient on one batch again and again, at the program's weights.

    An estimator with numbers of its own (a baseline, a control variate) first trains them, on this batch and with the
    weights held still: what it is worth once it knows them.

    Args:
        program: of either engine; initial weights (of this seed) where it has none.
        data: the batch: an array ``(N, …)``, or a tuple of them.
        objective: bound, gradient and shape.
        num_draws: gradients.
        warm_up: steps of the estimator's own numbers; 500 by default, 0 where it has none.
        step: of the optimisation, for a schedule.
        seed: of the draws.

    Raises: InvalidArgument; Refused where the objective has no right gradient on this program.
    References: Rainforth et al. 2018, arXiv 1802.04537; Tucker et al. 2019, arXiv 1810.04152.

    Example:
        >>> from elbozoo.inference import IWAE, gradient_noise
        >>> from elbozoo.zoo import MLP, VAE
        >>> x = np.ones((3, 4))
        >>> noise = gradient_noise(VAE(4, 2, MLP((5,))).numpyro(), x, IWAE(3), num_draws=10)
        >>> noise.signal_to_noise("guide") >= 0
        True
    """
    instance_of("objective", objective, Objective)
    whole_number("num_draws", num_draws, 2)
    if warm_up is None:
        warm_up = WARM_UP if objective.gradient.keeps_numbers else 0
    whole_number("warm_up", warm_up, 0)
    args = prepare(program, data)
    moments = importlib.import_module(f"elbozoo.inference.{program.engine}_gradient_noise").moments
    bound, mean, variance, guide = moments(program, objective, args, num_draws, warm_up, step, seed)

    def by_part(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        parts: dict[str, list[np.ndarray]] = {part: [np.zeros(0)] for part in PARTS}
        for name in sorted(values):
            parts["guide" if name in guide else "model"].append(np.ravel(values[name]))
        return {part: np.concatenate(pieces) for part, pieces in parts.items()}

    return GradientNoise(objective, num_draws, bound, by_part(mean), by_part(variance))
