"""The vector-quantised variational autoencoder: latents are indices of codes."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np

from elbozoo.inference.data import prepare
from elbozoo.inference.errors import must
from elbozoo.inference.parts import instance_of, one_of, whole_number
from elbozoo.inference.terms import Terms
from elbozoo.zoo.likelihoods import Bernoulli, Likelihood
from elbozoo.zoo.networks import MLP, FullyConv, Network
from elbozoo.zoo.quantizers import Codebook, Quantizer
from elbozoo.zoo.spec import Spec, check_shape

__all__ = ["VQVAE", "CodeUsage", "code_usage"]

PRIORS = ("uniform", "autoregressive")
HEADS = 4
"""Attention heads of the autoregressive prior."""


class CodePriorSizes(NamedTuple):
    """What an autoregressive prior over ``length`` indices is made from; it may be given others as its context."""

    num_codes: int
    length: int
    width: int
    layers: int
    context_codes: int = 0
    context_length: int = 0

    def visible(self) -> np.ndarray:
        """Which positions (context first) each one attends to: the context, and what came before it and itself."""
        place = np.arange(self.context_length + self.length)
        return (place <= place[:, None]) | (place < self.context_length)


@dataclasses.dataclass(frozen=True)
class VQVAE(Spec):
    r"""A variational autoencoder whose latents are indices of codes (VQ-VAE).

    ``index ~ prior``, ``x | index ~ likelihood(decoder(codes))``; the guide gives all its mass to the codes nearest to
    the encoder's outputs. With P latents of K codes each, ``rate = log q - log p`` is ``P log K`` under a uniform
    prior, whatever the data, and the ELBO is the distortion's alone to change. An autoregressive prior
    ``prod_i p(index_i | index_1 ... index_{i-1})``, a causal transformer, learns which indices go together and lowers
    the rate; none of its gradient reaches codes or encoder. It starts as the uniform one.

    Sites: latent ``z``, whose value is the codes themselves, event shape (P depth, code_dim); observed ``x`` with event
    shape (data_dim,), plate ``data`` at dim -1. Densities are of the index that a value stands for (masses, in nats),
    and minus infinity for a value that is no code. The decoder is given each position's sum over depth.

    Parameters: ``decoder.*``, ``encoder.*`` (see the network), ``codebook.*`` (see the quantizer), of both model and
    guide; ``prior.embedding``, ``prior.positions``, ``prior.start``, ``prior.blocks.<i>.*``, ``prior.norm.*`` and
    ``prior.head.*`` under an autoregressive prior; ``likelihood.*`` where it has any.

    Shapes: x (B, data_dim), z (B, P depth, code_dim), or with (K, B) in front under an outer plate of particles.

    Args:
        data_dim: entries of one datum, flat.
        num_latents: P, positions; a ``FullyConv`` network has one for each place of its smallest map.
        network: architecture of the encoder, to P code_dim outputs, and, mirrored, of the decoder.
        quantizer: what stands for an encoder's output.
        likelihood: family of x given z.
        prior: "uniform" or "autoregressive", of the indices.
        prior_width: units of the autoregressive prior's layers, a multiple of 4.
        prior_layers: its blocks.

    Raises: InvalidArgument, also for ``num_latents`` that a ``FullyConv`` network does not have.

    Limits: train with ``StraightThrough()``; other gradient estimators refuse it. The guide puts no mass on other
    codes, so importance samples are all equal: ``evaluate`` gives ``-ELBO``, an upper bound on the negative
    log-likelihood. With one code the rate is 0 and the decoder sees a constant.

    References: van den Oord, Vinyals & Kavukcuoglu 2017, Neural discrete representation learning, arXiv 1711.00937.

    Example:
        >>> spec = VQVAE(data_dim=64, num_latents=4, network=MLP(hidden=(32,)), quantizer=Codebook(16, code_dim=8))
        >>> spec.num_indices
        4
    """

    fitting_gradient: ClassVar[str] = "straight-through"

    data_dim: int = 784
    num_latents: int = 16
    network: Network = dataclasses.field(default_factory=MLP)
    quantizer: Quantizer = dataclasses.field(default_factory=Codebook)
    likelihood: Likelihood = dataclasses.field(default_factory=Bernoulli)
    prior: str = "uniform"
    prior_width: int = 64
    prior_layers: int = 2

    def __post_init__(self) -> None:
        whole_number("data_dim", self.data_dim)
        whole_number("num_latents", self.num_latents)
        instance_of("network", self.network, Network)
        instance_of("quantizer", self.quantizer, Quantizer)
        instance_of("likelihood", self.likelihood, Likelihood)
        check_prior(self.prior, self.prior_width, self.prior_layers)
        self.network.check_data_dim(self.data_dim)
        self.likelihood.check_data_dim(self.data_dim)
        if isinstance(self.network, FullyConv) and self.network.positions != self.num_latents:
            todo = f"Pass num_latents={self.network.positions}, or change the network's channels"
            condition = f"be the network's {self.network.positions} positions"
            raise must("num_latents", condition, self.num_latents, todo)

    @property
    def num_indices(self) -> int:
        """Indices of a datum: codes of every position."""
        return self.num_latents * self.quantizer.depth

    @property
    def prior_sizes(self) -> CodePriorSizes:
        """What the autoregressive prior's form is made from."""
        return CodePriorSizes(self.quantizer.num_codes, self.num_indices, self.prior_width, self.prior_layers)

    @property
    def codebooks(self) -> dict[str, str]:
        """By latent site, the prefix of its codebook's weights."""
        return {"z": "codebook"}

    @property
    def latent_dim(self) -> int:
        """Entries of what the encoder gives and the decoder takes."""
        return self.num_latents * self.quantizer.code_dim

    def check(self, x: Any) -> None:
        self.likelihood.check(check_shape(x, self.data_dim))


def check_prior(prior: Any, prior_width: Any, prior_layers: Any) -> None:
    """Refuse settings of a prior over indices that there is none for."""
    one_of("prior", prior, PRIORS)
    whole_number("prior_width", prior_width)
    whole_number("prior_layers", prior_layers)
    if prior_width % HEADS:
        raise must("prior_width", f"be a multiple of {HEADS}", prior_width, "Pass prior_width=64, say")


@dataclasses.dataclass(frozen=True)
class CodeUsage:
    """How a program uses its codes on some data; arrays have an entry for each codebook (one, but for ``Residual``).

    Attributes:
        counts: how often each code was chosen, (depth, num_codes).
        perplexity: ``exp`` of the entropy of the codes' frequencies, (depth,): num_codes where all are used alike,
            1 where one is.
        used, dead: how many codes were chosen at all, and how many never, (depth,).
    """

    counts: np.ndarray
    perplexity: np.ndarray
    used: np.ndarray
    dead: np.ndarray


def code_usage(program: Any, data: Any, batch_size: int = 256, level: int = 1) -> CodeUsage:
    """Count which codes a trained VQVAE's guide chooses.

    Args:
        program: a trained program of a :class:`VQVAE` or of a :class:`~elbozoo.zoo.HierarchicalVQVAE`, of either
            engine.
        data: as for ``evaluate``.
        batch_size: data at once.
        level: of a hierarchy, the one whose codes are counted, 1 next to the data.

    Raises: InvalidArgument for another program, for bad data, and for a level that there is not.
    """
    spec = program.spec
    if not hasattr(spec, "codebooks"):
        raise must("program", "be one of a VQVAE", type(spec).__name__, "Build it with VQVAE(...).numpyro() or .pyro()")
    levels = list(spec.codebooks.items())
    if level not in range(1, 1 + len(levels)):
        raise must("level", f"be one of the model's {len(levels)}, from 1", repr(level), "Pass level=1")
    (x,), (site, name) = prepare(program, data), levels[level - 1]
    codes = spec.quantizer.table(program.weights or {}, name)
    depth, num_codes, code_dim = codes.shape
    counts = np.zeros((depth, num_codes), int)
    for start in range(0, len(x), batch_size):
        rows = np.arange(start, min(start + batch_size, len(x)))
        z = program.apply(partial(_codes, site), (x[np.resize(rows, min(batch_size, len(x)))],))[
            0, : len(rows)
        ]  # one shape
        split = z.reshape(-1, depth, code_dim)
        for d, book in enumerate(codes):
            distance = (book**2).sum(-1) - 2 * split[:, d] @ book.T
            counts[d] += np.bincount(distance.argmin(-1), minlength=num_codes)
    share = counts / counts.sum(-1, keepdims=True)
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)
    used = (counts > 0).sum(-1)
    return CodeUsage(counts, np.exp(entropy), used, num_codes - used)


def _codes(site: str, terms: Terms) -> Any:
    return terms.values[site]
