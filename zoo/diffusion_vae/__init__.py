"""Diffusion in discrete time: a hierarchy of T + 1 layers as wide as the data, under a guide that is fixed."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from elbozoo.inference.errors import must
from elbozoo.inference.parts import instance_of, one_of, whole_number
from elbozoo.zoo.denoisers import Denoiser, MLPDenoiser
from elbozoo.zoo.diffusion import DiscretizedNormal, EndLikelihood, Steps, check_predicts
from elbozoo.zoo.schedules import LinearSchedule, Schedule
from elbozoo.zoo.spec import Spec, check_shape

__all__ = ["DiffusionVAE"]

FORMS = ("one-step", "every-step", "chain")


@dataclasses.dataclass(frozen=True)
class DiffusionVAE(Spec):
    r"""A denoising diffusion model as the hierarchical VAE that it is.

    With times ``t(i) = i / T`` and ``z_i = alpha_i x + sigma_i e`` at each (x being the data, scaled to [-1, 1] where
    they are levels), the model is ``z_T ~ N(0, I)``, ``z_{i-1} ~ p(z_{i-1} | z_i)``, ``x ~ p(x | z_0)``, and the guide

    .. math:: q(z_T | x) \prod_i q(z_{i-1} | z_i, x), \qquad
        p(z_{i-1} | z_i) = q(z_{i-1} | z_i, x = \hat x(z_i, log\_snr_i))

    Its ELBO is ``log p(x | z_0)`` less ``KL(q(z_T | x) || p(z_T))`` less T KLs of one step, each of which is
    ``expm1(log_snr_{i-1} - log_snr_i) / 2 ||e - e_said||^2``.

    Three forms with one bound and the same weights:

    - ``"chain"``: T + 1 sites, ``zT`` to ``z0``, written out. Everything that an importance weight is good for works.
    - ``"one-step"``: one step a datum, drawn uniformly, its KL times T: what is trained on, at the cost of one network
      evaluation. An unbiased estimate of the ELBO, and not of a weight: multi-sample bounds refuse it.
    - ``"every-step"``: all T of them in a plate ``times``, each from a noisy signal of its own: the same mean, without
      the variance of the drawn step.

    Sites: of the chain ``z<T>`` … ``z0``; of the others ``z<T>``, ``time`` (one-step), ``level``, ``noisy``, ``step``,
    ``z0``, of which ``time``, ``level``, ``noisy`` and ``z0`` are masked out of the densities. Observed ``x``, plate
    ``data`` at dim -1. Run by itself the model draws ``z0`` by the chain, in every form.

    Parameters: ``denoiser.*``, ``schedule.*`` where it is learned.

    Shapes: x, z (B, data_dim). Units: nats per datum, of a mass for levels.

    Args:
        data_dim: entries of one datum, flat.
        num_steps: T, the stochastic layers between noise and data.
        process: which of the forms.
        denoiser: the network.
        predicts: what its output means: "noise", "signal", "velocity", or "prior": the mean and log scale of a normal
            prior of each entry of the signal, which z is then weighed against.
        schedule: of the noise.
        likelihood: family of x given z_0.
        stratified: spread the times of a batch evenly over (0, 1) (one-step): the mean is the same, the variance
            smaller.

    Raises: InvalidArgument for T = 0, data out of range, a denoiser that predicts something else.
    Limits: the chain is T network evaluations a datum, and compiles T copies of the network.
    References: Sohl-Dickstein et al. 2015, arXiv 1503.03585; Ho, Jain & Abbeel 2020, arXiv 2006.11239; the bound as
        written here, Kingma, Salimans, Poole & Ho 2021, arXiv 2107.00630, section 4.1, eqs. 11-14.

    Example:
        >>> spec = DiffusionVAE(data_dim=64, num_steps=10, process="chain")
        >>> DiffusionVAE.from_config(spec.to_config()) == spec
        True
    """

    data_dim: int = 784
    num_steps: int = 1000
    process: Literal["one-step", "every-step", "chain"] = "one-step"
    denoiser: Denoiser = dataclasses.field(default_factory=MLPDenoiser)
    predicts: Literal["noise", "signal", "velocity", "prior"] = "noise"
    schedule: Schedule = dataclasses.field(default_factory=LinearSchedule)
    likelihood: EndLikelihood = dataclasses.field(default_factory=DiscretizedNormal)
    stratified: bool = True

    def __post_init__(self) -> None:
        whole_number("data_dim", self.data_dim)
        whole_number("num_steps", self.num_steps)
        one_of("process", self.process, FORMS)
        check_parts(self)
        if self.watched:
            todo = "Use VariationalDiffusion, or minimise_variance=False"
            got = f"{self.num_steps} steps"
            raise must("minimise_variance", "be of continuous time, where the bound is of the ends alone", got, todo)

    @property
    def watched(self) -> bool:
        """Whether the schedule minimises the variance."""
        return getattr(self.schedule, "minimise_variance", False)

    @property
    def steps(self) -> Steps:
        """The sites, where the chain is not written out."""
        every, last = self.process == "every-step", f"z{self.num_steps}"
        return Steps(self.num_steps, last, every, self.stratified, False, self.num_steps)

    def check(self, x: Any) -> None:
        self.likelihood.check(check_shape(x, self.data_dim))


def check_parts(spec: Any) -> None:
    """Refuse parts of the wrong kind, or that do not fit one another."""
    instance_of("denoiser", spec.denoiser, Denoiser)
    instance_of("schedule", spec.schedule, Schedule)
    instance_of("likelihood", spec.likelihood, EndLikelihood)
    spec.denoiser.check_data_dim(spec.data_dim)
    check_predicts(spec.predicts, spec.denoiser.predicts)
