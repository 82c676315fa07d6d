"""A VAE whose prior is a diffusion of its latents."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Literal

from elbozoo.guides import DiagonalGaussian, Family
from elbozoo.inference.errors import must
from elbozoo.inference.parts import instance_of, whole_number
from elbozoo.zoo.denoisers import Denoiser, MLPDenoiser
from elbozoo.zoo.diffusion import Steps, check_predicts
from elbozoo.zoo.likelihoods import Bernoulli, Likelihood
from elbozoo.zoo.networks import MLP, Network
from elbozoo.zoo.schedules import LinearSchedule, Schedule
from elbozoo.zoo.spec import Spec, check_shape
from elbozoo.zoo.vae import VAE

__all__ = ["LatentDiffusion"]


@dataclasses.dataclass(frozen=True)
class LatentDiffusion(Spec):
    r"""A variational autoencoder whose prior is a diffusion, in continuous time.

    ``z_1 ~ N(0, I)``, back to ``z_0``, ``z ~ N(z_0 / alpha_0, sigma_0^2 / alpha_0^2)``,
    ``x | z ~ likelihood(decoder(z))``; the guide is ``z | x ~ family(encoder(x))`` and the fixed noising of z. The
    bound is

    .. math:: E \log p(x | z) - E \log q(z | x) + E[\text{the diffusion's ELBO of } z]

    so that the latents' entropy is the guide's, and what it costs to say them is the diffusion's to learn.

    Sites: in the guide ``z`` (latent_dim,), then those of :class:`~elbozoo.zoo.VariationalDiffusion` for it; in the
    model those first, then ``z``, then the observed ``x``. Plate ``data`` at dim -1. The log weight is an unbiased
    estimate of one: multi-sample bounds refuse it. Run by itself the model draws z_0 in ``sampling_steps`` steps.

    Trained jointly by ``fit``; in two stages, first as a VAE and then the diffusion alone, by
    ``fit(..., start=FirstStage(epochs), frozen=("encoder", "decoder"))``.

    Parameters: ``encoder.*``, ``decoder.*``, ``posterior.*`` and ``likelihood.*`` where there are any, as in
    :class:`~elbozoo.zoo.VAE`; ``denoiser.*``; ``schedule.*`` where it is learned.

    Shapes: x (B, data_dim), z (B, latent_dim).

    Args:
        data_dim: entries of one datum, flat.
        latent_dim: entries of one latent vector.
        network: architecture of the encoder and, mirrored, of the decoder.
        likelihood: family of x given z.
        guide: family of z given x.
        denoiser: the diffusion's network.
        predicts: what its output means: "noise", "signal", "velocity", or "prior": the mean and log scale of a normal
            prior of each entry of the signal, which z is then weighed against.
        schedule: of the noise. The first end need not reach as far as for pixels: ``sigma_0`` is to be small beside the
            guide's scales.
        stratified: spread the times of a batch evenly over (0, 1).
        sampling_steps: steps of the chain that the model draws with.

    Raises: InvalidArgument.
    References: Vahdat, Kreis & Kautz 2021, Score-based generative modeling in latent space, arXiv 2106.05931, eqs. 1-4
        (joint); Rombach et al. 2022, arXiv 2112.10752 (two stages).

    Example:
        >>> LatentDiffusion(data_dim=64, latent_dim=8).vae().latent_dim
        8
    """

    process: ClassVar[str] = "one-step"

    data_dim: int = 784
    latent_dim: int = 32
    network: Network = dataclasses.field(default_factory=MLP)
    likelihood: Likelihood = dataclasses.field(default_factory=Bernoulli)
    guide: Family = dataclasses.field(default_factory=DiagonalGaussian)
    denoiser: Denoiser = dataclasses.field(default_factory=MLPDenoiser)
    predicts: Literal["noise", "signal", "velocity", "prior"] = "noise"
    schedule: Schedule = dataclasses.field(default_factory=lambda: LinearSchedule(9.0, -6.0))
    stratified: bool = True
    sampling_steps: int = 100

    def __post_init__(self) -> None:
        self.vae()  # refuses what is not of one
        instance_of("denoiser", self.denoiser, Denoiser)
        instance_of("schedule", self.schedule, Schedule)
        self.denoiser.check_data_dim(self.latent_dim)
        check_predicts(self.predicts, self.denoiser.predicts)
        whole_number("sampling_steps", self.sampling_steps)
        if self.guide.uses_log_joint:
            condition = "be one that does not climb log p(x, z), of which the diffusion has no density"
            raise must("guide", condition, type(self.guide).__name__, "Use another guide")

    def vae(self) -> VAE:
        """The same encoder and decoder under a standard normal prior: the first of two stages."""
        return VAE(self.data_dim, self.latent_dim, self.network, self.likelihood, self.guide)

    @property
    def watched(self) -> bool:
        """Whether the schedule minimises the variance."""
        return getattr(self.schedule, "minimise_variance", False)

    @property
    def steps(self) -> Steps:
        """The sites of the diffusion."""
        return Steps(0, "z1", False, self.stratified, self.watched, self.sampling_steps)

    def check(self, x: Any) -> None:
        self.likelihood.check(check_shape(x, self.data_dim))
