"""Starts: where training begins, when not at the initial weights. To see which minima an objective gets out of."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple

import numpy as np

from elbozoo.inference.errors import must
from elbozoo.inference.objectives import ELBO, Objective
from elbozoo.inference.parts import number, whole_number
from elbozoo.inference.shapes import Beta


class Start(ABC):
    """Where training begins: a phase before it, or given weights.

    After it the objective starts at its step 0 with a fresh optimiser state; of the phase the weights alone are left.
    """

    epochs: int

    reads_data: ClassVar[bool] = True
    """Whether it looks at all of the data, so that they must be in memory."""

    def __post_init__(self) -> None:
        whole_number("epochs", self.epochs)

    def weights(self, program: Any, x: np.ndarray) -> Mapping[str, np.ndarray] | None:
        """Weights that are known without a phase, in torch's layout; None where there must be one.

        Those that it does not name begin as they would.
        """
        return None

    def phase(self, program: Any, objective: Objective, x: np.ndarray) -> tuple[Any, Objective]:
        """The program and the objective of the phase, where :meth:`weights` knows none.

        The program has the parameters of the one to be started.

        Args:
            program: what is to be trained.
            objective: on what.
            x: the data, as the program takes them; of data that are not in memory, unless it ``reads_data``, some.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class _Weighted(Start):
    """A phase on ``E[log p(x|z)] - β KL``, with the gradient estimator of the objective that follows."""

    epochs: int = 5
    beta: float = 1.0

    reads_data: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        number("beta", self.beta, lambda v: v >= 0, "be finite and at least 0", "Use the default")

    def phase(self, program: Any, objective: Objective, x: np.ndarray) -> tuple[Any, Objective]:
        return program, Beta(ELBO(gradient=objective.gradient), self.beta)


@dataclass(frozen=True)
class Collapsed(_Weighted):
    r"""Start collapsed: a phase with so heavy a KL that the guide becomes the prior, and the model does without z.

    It maximises ``E[log p(x|z)] - β KL`` with a large β: under a linear model every direction of variance below
    ``β σ²`` is given up. Any program will do.

    Args:
        epochs: passes over the data.
        beta: β. With the usual scales of weights and data, the default leaves below 0.01 nats.

    References: Lucas et al. 2019 (arXiv 1911.02469), on β and collapse in the linear model.
    """

    beta: float = 1000.0


@dataclass(frozen=True)
class Informative(_Weighted):
    r"""Start informative: an autoencoder phase, in which the latents are all but free of charge.

    It maximises ``E[log p(x|z)] - β KL`` with a small β. Any program will do.

    Args:
        epochs: passes over the data.
        beta: β; 0 is the plain autoencoder, whose posteriors shrink for as long as it is trained.
    """

    beta: float = 0.01


@dataclass(frozen=True)
class PPCA(Start):
    r"""Start at probabilistic PCA, the optimum of the linear model.

    A ``LinearVAE`` gets its optimal weights at once. For a ``VAE`` pPCA of the data is a teacher, with posterior
    ``t(z|x) = N(M^{-1} W^T (x - b), σ² M^{-1})``, diagonal since W's columns are orthogonal, and a phase fits guide and
    model to it by maximising

    .. math:: E_{z \sim t(z|x)} [\log p(x|z) + \log q(z|x) + \log p(z)]

    So a learned prior is fitted to the teacher's aggregate posterior, which has the moments of N(0, I).

    Args:
        epochs: passes over the data, for a ``VAE``.

    Raises: InvalidArgument, from ``fit``, for another program, for a latent as large as the data, and for data that
        vary in no more directions than the latent has.

    References: Tipping & Bishop 1999, Probabilistic principal component analysis, J. R. Stat. Soc. B 61, section 3.
    """

    epochs: int = 5

    def weights(self, program: Any, x: np.ndarray) -> Mapping[str, np.ndarray] | None:
        return program.spec.optimum(x) if hasattr(program.spec, "optimum") else None

    def phase(self, program: Any, objective: Objective, x: np.ndarray) -> tuple[Any, Objective]:
        from elbozoo.zoo import VAE

        if not isinstance(program.spec, VAE):
            got = "a program that is not of the zoo" if program.spec is None else type(program.spec).__name__
            todo = "Use Collapsed or Informative, which any program can start from"
            raise must("PPCA", "start a LinearVAE or a VAE, whose latent it has a posterior for", got, todo)
        taught = import_module(f"elbozoo.inference.{program.engine}_teacher").taught
        return taught(program, Teacher.of(x, program.spec.latent_dim, program.float_dtype)), ELBO()


@dataclass(frozen=True)
class DataMean(Start):
    r"""Start with the likelihood at the data's mean: the bias of the decoder's last layer, all else as it would be.

    Without it the first thing to learn is which pixels are never on, with latents that are noise as yet; by then the
    KL may have shut them. What it is worth, a second layer of latents above all, is in ``docs/benchmarks.md``.

    A Bernoulli's bias is ``log(m / (1 - m))``, m the mean, kept within 0.001 and 0.999; a continuous Bernoulli's is the
    logit with that mean; a Gaussian's, and the location of a discretised logistic, is m. A convolution has one bias a
    channel, so that m is the mean over the channel's pixels. There is no phase.

    Args:
        epochs: 0.

    Raises: InvalidArgument, from ``fit``, for a program without such a layer.

    References: Burda, Grosse & Salakhutdinov 2015 (arXiv 1509.00519), their code; Mnih & Gregor 2014 (arXiv 1402.0030),
        section 4.
    """

    epochs: int = 0

    def __post_init__(self) -> None:
        if self.epochs != 0:
            raise must("epochs", "be 0 for DataMean, which has no phase", self.epochs, "Leave it out")

    def weights(self, program: Any, x: np.ndarray) -> Mapping[str, np.ndarray]:
        if program.spec is None:
            got = "a program that is not of the zoo"
            todo = "Use Collapsed or Informative, which any program can start from"
            raise must("DataMean", "start a model with a network that ends in a bias", got, todo)
        return program.spec.bias_of_mean(np.asarray(x, np.float64).mean(axis=0))


@dataclass(frozen=True)
class FirstStage(Start):
    """Start a ``LatentDiffusion`` as the VAE that it holds, under a standard normal prior: the first of two stages.

    For the second, ``fit(..., frozen=("encoder", "decoder"))`` trains the diffusion alone.

    Args:
        epochs: passes over the data.

    Raises: InvalidArgument, from ``fit``, for another program. References: Rombach et al. 2022 (arXiv 2112.10752),
        section 3.
    """

    epochs: int = 10

    reads_data: ClassVar[bool] = False

    def phase(self, program: Any, objective: Objective, x: np.ndarray) -> tuple[Any, Objective]:
        if not hasattr(program.spec, "vae"):
            got = "a program that is not of the zoo" if program.spec is None else type(program.spec).__name__
            raise must("FirstStage", "start a LatentDiffusion", got, "Use another start, or none")
        return getattr(program.spec.vae(), program.engine)(), ELBO()


class Teacher(NamedTuple):
    """pPCA's posterior ``N(x A^T + c, diag(scale²))``: A (latent_dim, data_dim), c and scale (latent_dim,)."""

    weight: np.ndarray
    bias: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, latent_dim: int, dtype: Any) -> Teacher:
        """pPCA's posterior for the data ``x`` (N, data_dim). Raises: InvalidArgument (see :class:`PPCA`)."""
        from elbozoo.zoo import LinearVAE

        data = np.asarray(x, np.float64)
        covariance = np.cov(data, rowvar=False, bias=True).reshape((data.shape[1],) * 2)
        if (rank := int(np.linalg.matrix_rank(covariance, hermitian=True))) <= latent_dim:
            todo = f"Pass a latent_dim below {rank}, or another start" if rank > 1 else "Use another start"
            raise must("data", f"vary in more directions than the latent's {latent_dim} for PPCA", rank, todo)
        found = LinearVAE(data.shape[1], latent_dim, learn_scale=True).optimum(data)
        names = ("encoder.weight", "encoder.bias", "encoder_log_scale")
        weight, bias, log_scale = (found[name].astype(dtype) for name in names)
        return cls(weight, bias, np.exp(log_scale))
