"""q(z | x): a standard normal sent through coupled splines, then shifted and scaled."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np

from elbozoo.guides.family import Family
from elbozoo.inference.errors import must
from elbozoo.inference.parts import positive, whole_number, whole_numbers

__all__ = ["NeuralSplineFlow"]

MIN_SLOPE = 1e-3
"""How flat a spline may get at a knot (zuko's default)."""


@dataclasses.dataclass(frozen=True)
class NeuralSplineFlow(Family):
    """A standard normal sent through coupled rational-quadratic splines: ``z = loc + exp(log_scale) f_T(... f_1(e))``.

    Each map leaves every other entry of its argument as it is and sends each of the rest through a monotonic spline of
    its own on [-bound, bound] (the identity outside), whose knots are a network's outputs of the entries that stay and
    of the context c(x). The next map moves those that stayed. ``log q(z|x) = log N(e; 0, I) - sum log f' - sum
    log_scale``. Splines by zuko in Pyro and by flowjax in NumPyro.

    A spline of k bins has 3 k - 1 unconstrained outputs: widths w, heights h and slopes d at the inner knots. With
    ``soft(a, v) = v / (1 + |a v / log MIN_SLOPE|)``, the bins' widths are ``2 bound softmax(soft(2, w))``, heights
    alike, and slopes ``exp(soft(1, d))``: where all are 0 the spline is the identity.

    Shapes: encoder outputs (..., 2 D + context_dim) as loc, log scale and context; z (..., D). Reparameterised. Units:
    nats.

    Parameters, for each map t: ``posterior.flows.<t>.context.weight`` (the first hidden layer's, of c),
    ``posterior.flows.<t>.layers.<i>.weight`` (out, in) and ``.bias``. The first layer sees all of its argument under a
    mask that hides the entries that move. Hidden layers are ELUs; weights start Glorot-uniform, biases at 0.

    Args:
        num_flows: maps; with two every entry has moved once.
        flow_hidden: units of each hidden layer of each map's network.
        context_dim: entries of c(x).
        num_bins: bins of each spline.
        bound: where splines end, in units of the guide's scale.

    Limits: draws and densities, of given values too, take one pass. No closed form of the KL, and no parameters of its
    own for ``optimise_guide``. With one latent dimension every map moves it, by the context alone.

    References:
        Durkan, Bekasov, Murray & Papamakarios 2019, Neural spline flows, arXiv 1906.04032, section 3 and eqs. 4 to 8.

    Example:
        >>> NeuralSplineFlow(context_dim=32).num_outputs(50)
        132
        >>> [half.tolist() for half in NeuralSplineFlow().halves(5, flow=1)]  # stay, move
        [[0, 2, 4], [1, 3]]
    """

    num_flows: int = 2
    flow_hidden: tuple[int, ...] = (64,)
    context_dim: int = 32
    num_bins: int = 8
    bound: float = 5.0

    def __post_init__(self) -> None:
        whole_number("num_flows", self.num_flows)
        whole_number("context_dim", self.context_dim)
        whole_number("num_bins", self.num_bins, least=2)
        positive("bound", self.bound)
        object.__setattr__(self, "flow_hidden", whole_numbers("flow_hidden", self.flow_hidden))
        if not self.flow_hidden:
            raise must("flow_hidden", "have at least one layer", "()", "Pass flow_hidden=(64,), say")

    def num_outputs(self, latent_dim: int) -> int:
        return 2 * latent_dim + self.context_dim

    def halves(self, latent_dim: int, flow: int) -> tuple[np.ndarray, np.ndarray]:
        """The entries that one map leaves as they are, and those that it moves."""
        entries = np.arange(latent_dim)
        moves = (entries + flow) % 2 == 0 if latent_dim > 1 else np.ones(1, bool)
        return entries[~moves], entries[moves]

    def masks(self, latent_dim: int, flow: int) -> list[np.ndarray]:
        """Which inputs each unit of each layer of one map's network sees, (units, inputs)."""
        stay, move = self.halves(latent_dim, flow)
        sizes = (*self.flow_hidden, (3 * self.num_bins - 1) * len(move))
        first = np.broadcast_to(np.isin(np.arange(latent_dim), stay), (sizes[0], latent_dim))
        return [first.copy(), *(np.ones((after, before), bool) for before, after in pairwise(sizes))]
