"""Diffusion in continuous time: infinitely many layers, one of which is drawn for each datum."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from elbozoo.inference.parts import whole_number
from elbozoo.zoo.denoisers import Denoiser, MLPDenoiser
from elbozoo.zoo.diffusion import DiscretizedNormal, EndLikelihood, Steps
from elbozoo.zoo.diffusion_vae import DiffusionVAE, check_parts
from elbozoo.zoo.schedules import LinearSchedule, Schedule
from elbozoo.zoo.spec import Spec, check_shape

__all__ = ["VariationalDiffusion"]


@dataclasses.dataclass(frozen=True)
class VariationalDiffusion(Spec):
    r"""A variational diffusion model: the limit of :class:`~elbozoo.zoo.DiffusionVAE` for T to infinity.

    .. math:: -ELBO = KL(q(z_1 | x) || N(0, I)) - E \log p(x | z_0)
        + \tfrac12 E_{t, e} \left[ -\tfrac{d\, log\_snr}{dt} \| e - \hat e(z_t, log\_snr_t) \|^2 \right]

    with ``t ~ U(0, 1)``, ``e ~ N(0, I)``, ``z_t = alpha_t x + sigma_t e``. The last term is the KL of two paths with
    the same noise (Girsanov). In the program it is the KL at the site ``step``: the path's increment at time t in units
    of its own noise, ``N(sqrt(slope) e, I)`` in the guide and ``N(sqrt(slope) e_said, I)`` in the model. It depends on
    the schedule by its ends alone.

    Sites: latent ``z1`` (at time 1), ``time``, ``level``, ``noisy``, ``step``, ``z0``, of which ``time``, ``level``,
    ``noisy`` and ``z0`` are masked out of the densities (and ``noise``, with a schedule that minimises the variance);
    observed ``x``; plate ``data`` at dim -1. An unbiased estimate of the ELBO, and not of a weight: multi-sample bounds
    refuse it. Run by itself the model draws ``z0`` in ``sampling_steps`` steps.

    Parameters: ``denoiser.*``, ``schedule.*`` where it is learned.

    Shapes: x, z (B, data_dim). Units: nats per datum, of a mass for levels.

    Args:
        data_dim: entries of one datum, flat.
        denoiser: the network.
        predicts: what its output means: "noise", "signal", "velocity", or "prior": the mean and log scale of a normal
            prior of each entry of the signal, which z is then weighed against.
        schedule: of the noise.
        likelihood: family of x given z_0.
        stratified: spread the times of a batch evenly over (0, 1): the mean is the same, the variance smaller.
        sampling_steps: steps of the chain that the model draws with.

    Raises: InvalidArgument for data out of range, a denoiser that predicts something else.
    References: Kingma, Salimans, Poole & Ho 2021, Variational diffusion models, arXiv 2107.00630, section 4.2, eq. 17;
        low-discrepancy times, appendix I.1.

    Example:
        >>> VariationalDiffusion(data_dim=64).with_steps(10).num_steps
        10
    """

    process: ClassVar[str] = "one-step"

    data_dim: int = 784
    denoiser: Denoiser = dataclasses.field(default_factory=MLPDenoiser)
    predicts: Literal["noise", "signal", "velocity", "prior"] = "noise"
    schedule: Schedule = dataclasses.field(default_factory=LinearSchedule)
    likelihood: EndLikelihood = dataclasses.field(default_factory=DiscretizedNormal)
    stratified: bool = True
    sampling_steps: int = 250

    def __post_init__(self) -> None:
        whole_number("data_dim", self.data_dim)
        whole_number("sampling_steps", self.sampling_steps)
        check_parts(self)

    @property
    def watched(self) -> bool:
        """Whether the schedule minimises the variance."""
        return getattr(self.schedule, "minimise_variance", False)

    @property
    def steps(self) -> Steps:
        """The sites."""
        return Steps(0, "z1", False, self.stratified, self.watched, self.sampling_steps)

    def with_steps(self, num_steps: int, process: Literal["one-step", "every-step", "chain"] = "chain") -> DiffusionVAE:
        """The same model in so many steps, of the same weights: its chain has importance weights."""
        names = {f.name for f in dataclasses.fields(self)} - {"sampling_steps"}
        parts = {name: getattr(self, name) for name in names}
        if self.watched:
            parts["schedule"] = dataclasses.replace(self.schedule, minimise_variance=False)  # type: ignore[type-var]
        return DiffusionVAE(**parts, num_steps=num_steps, process=process)

    def check(self, x: Any) -> None:
        self.likelihood.check(check_shape(x, self.data_dim))
