"""Quantizers: which of finitely many codes stands for an encoder's output.

Each is a spec; its forms are in ``quantizers_pyro.py`` and ``quantizers_numpyro.py``, beside the distributions over
codes. A quantizer has ``depth`` codebooks of ``num_codes`` codes with ``code_dim`` entries. A position's value is one
code of each (depth, code_dim), and stands for their sum: the first is the code nearest to the encoder's output, each
further one nearest to what those before it leave.

Shapes: encoder outputs (..., P, code_dim) for P positions, values (..., P depth, code_dim), a position's codes next to
one another.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from elbozoo.inference.errors import must
from elbozoo.inference.parts import Part, number, one_of, whole_number, whole_numbers

__all__ = ["UPDATES", "Codebook", "FiniteScalar", "Quantizer", "Residual"]

UPDATES = ("gradient", "ema")
"""How a codebook learns: by the gradient of its error, or as moving averages of what chose its codes."""

WALK = 7919
"""How far, in outputs of a minibatch, revived codes move on each step: a prime, so that they come by all of them."""

SLACK = 1e-3
"""How far beyond its outermost levels :class:`FiniteScalar` lets an output go, as a share of the range."""


@dataclasses.dataclass(frozen=True)
class Quantizer(Part):
    """Which of finitely many codes stands for an encoder's output."""

    stem: ClassVar[str] = "quantizers"
    depth = 1  # not annotated: dataclasses would put it first among the fields of those that have it
    num_codes: ClassVar[Any]
    code_dim: ClassVar[Any]

    def table(self, weights: dict[str, Any], name: str = "codebook") -> np.ndarray:
        """The codes, (depth, num_codes, code_dim), given a program's weights, there called ``<name>.codes``."""
        return np.asarray(weights[f"{name}.codes"])


@dataclasses.dataclass(frozen=True)
class Codebook(Quantizer):
    r"""A learned codebook: ``index = argmin_k ||e - code_k||^2``.

    With ``update="gradient"`` the codes are parameters, which descend ``||sg(e) - code||^2`` (see ``StraightThrough``).
    With ``update="ema"`` they are moving averages. Each training step, with ``n_k`` outputs of the minibatch at code k
    and ``s_k`` their sum,

    .. math:: N_k \leftarrow \gamma N_k + (1 - \gamma) n_k,\quad m_k \leftarrow \gamma m_k + (1 - \gamma) s_k,\quad
        c_k \leftarrow m_k / N_k \text{ where } n_k > 0

    from ``N_k = 1``, ``m_k = c_k``. Then every code with ``N_k < revive`` is moved onto an output of the minibatch, no
    two onto one, with ``N_k = 1``: which outputs, changes from step to step and is no matter of chance. Evaluation
    moves nothing.

    Parameters: ``codebook.codes`` (depth, num_codes, code_dim), at first ``U(-1 / num_codes, 1 / num_codes)``; with
    ``update="ema"`` it is a buffer, beside ``codebook.counts`` N (depth, num_codes), ``codebook.sums`` m and
    ``codebook.steps``.

    Args:
        num_codes: K, codes in each codebook.
        code_dim: entries of a code.
        update: one of ``UPDATES``.
        decay: γ of the moving averages.
        revive: outputs a minibatch below which a code counts as dead; 0 revives none.

    Raises: InvalidArgument, also for ``revive`` without moving averages, which are what counts.
    Limits: one code carries nothing, and the rate is 0. With more codes than outputs in a minibatch the rest stays as
    it is. A learned prior has to learn anew what a revived code is used for.
    References: van den Oord, Vinyals & Kavukcuoglu 2017 (arXiv 1711.00937), eq. 3, appendix A.1 (moving averages); dead
        codes: Dhariwal et al. 2020, Jukebox (arXiv 2005.00341), section 3.1.

    Example:
        >>> Codebook(num_codes=16, code_dim=4, update="ema").depth
        1
    """

    num_codes: int = 512
    code_dim: int = 64
    update: str = "gradient"
    decay: float = 0.99
    revive: float = 0.0

    def __post_init__(self) -> None:
        whole_number("num_codes", self.num_codes)
        whole_number("code_dim", self.code_dim)
        one_of("update", self.update, UPDATES)
        number("decay", self.decay, lambda v: 0 <= v < 1, "lie in [0, 1)", "The paper uses 0.99")
        number("revive", self.revive, lambda v: 0 <= v < 1, "lie in [0, 1)", "Pass revive=0.1, say")
        if self.revive and self.update != "ema":
            todo = 'Pass update="ema", which counts how often a code is used'
            raise must("revive", "be 0 for a codebook that gradients move", self.revive, todo)


@dataclasses.dataclass(frozen=True)
class Residual(Codebook):
    """Several codebooks, each of what those before it leave: ``sum_d code_d`` stands for the encoder's output.

    A position's value is its ``depth`` codes, and its rate under a uniform prior ``depth log num_codes``. Errors and
    moving averages are those of :class:`Codebook`, of each codebook with its own residual in place of e.

    Args:
        depth: codebooks at each position.

    Limits: depth 1 is :class:`Codebook`.
    References: Zeghidour et al. 2021, SoundStream (arXiv 2107.03312), algorithm 1.

    Example:
        >>> Residual(num_codes=16, code_dim=4, depth=3).depth
        3
    """

    depth: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("depth", self.depth)


@dataclasses.dataclass(frozen=True)
class FiniteScalar(Quantizer):
    r"""A fixed grid: each entry of an output is bounded and rounded to one of ``levels[i]`` levels.

    ``e_i -> (h tanh(e_i + a) - o) / (L // 2)`` and then to the nearest of the grid ``{-(L // 2), ..., (L - 1) // 2} /
    (L // 2)``, with ``L = levels[i]``, ``h = (L - 1) (1 + 0.001) / 2``, ``o`` one half for even L and 0 for odd, and a
    such that 0 stays 0. There are ``prod(levels)`` codes, all of which exist from the start: no codebook to train,
    none of the errors, no parameters.

    Args:
        levels: of each entry; their number is ``code_dim``.

    Raises: InvalidArgument for fewer than 3 levels.
    Limits: a search among all codes, so some thousands of them at most. The paper's code has ``a = tan(o / h)``, which
    does not keep 0 at 0, and lets an output go a little less far than its levels.
    References: Mentzer et al. 2023, Finite scalar quantization (arXiv 2309.15505), section 3.1, appendix A.1.

    Example:
        >>> FiniteScalar(levels=(4, 3)).num_codes
        12
        >>> sorted(set(FiniteScalar(levels=(4, 3)).table({})[0, :, 0].tolist()))
        [-1.0, -0.5, 0.0, 0.5]
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", whole_numbers("levels", self.levels))
        if not self.levels:
            raise must("levels", "have at least one entry", "()", "Pass levels=(8, 5, 5, 5), say")
        for level in self.levels:
            whole_number("every entry of levels", level, 3)

    @property
    def num_codes(self) -> int:  # type: ignore[override]
        return int(np.prod(self.levels))

    @property
    def code_dim(self) -> int:  # type: ignore[override]
        return len(self.levels)

    def table(self, weights: dict[str, Any], name: str = "codebook") -> np.ndarray:
        axes = [(np.arange(level) - level // 2) / (level // 2) for level in self.levels]
        return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, len(self.levels))

    def bounds(self) -> np.ndarray:
        """``h``, ``a``, ``o`` and ``L // 2`` of each entry, (4, code_dim)."""
        level = np.array(self.levels)
        half, offset = (level - 1) * (1 + SLACK) / 2, np.where(level % 2, 0.0, 0.5)
        return np.stack([half, np.arctanh(offset / half), offset, level // 2])
