"""q(z | x): a diagonal Gaussian sent through autoregressive affine maps."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np

from elbozoo.guides.family import Family
from elbozoo.inference.errors import must
from elbozoo.inference.parts import whole_number, whole_numbers

__all__ = ["InverseAutoregressiveFlow"]


@dataclasses.dataclass(frozen=True)
class InverseAutoregressiveFlow(Family):
    """A diagonal Gaussian sent through autoregressive affine maps: ``z_t = m_t + exp(s_t) z_{t-1}``, entry by entry.

    ``z_0 ~ N(loc, exp(2 log_scale))``; entry i of ``m_t`` and ``s_t`` is a masked network's output of the entries of
    ``z_{t-1}`` before i and of the context c(x). So ``log q(z_T|x) = log N(z_0) - sum_t sum_i s_ti``. Every other map
    takes the entries in reverse order. Through Pyro's ``AffineAutoregressive`` and NumPyro's
    ``InverseAutoregressiveTransform``, with their clipping of s off, for its gradient is not the density's.

    Shapes: encoder outputs (..., 2 D + context_dim) as loc, log scale and context; z (..., D). Reparameterised. Units:
    nats.

    Parameters, for each map t: ``posterior.flows.<t>.context.weight`` (the first hidden layer's, of c),
    ``posterior.flows.<t>.layers.<i>.weight`` (out, in) and ``.bias``; what a mask hides has no effect. Hidden layers
    are ELUs; weights start Glorot-uniform (of the unmasked fans), biases at 0.

    Args:
        num_flows: maps.
        flow_hidden: units of each hidden layer of each map's network.
        context_dim: entries of c(x).

    Limits: a draw and its density take one pass. The density of a given value takes D passes, one after another: in
    ``evaluate`` only at values from elsewhere (NUTS, annealing), in training under STL and DReG, which run the guide
    again at its draws; there :class:`NeuralSplineFlow` is faster. No closed form of the KL, and no parameters of its
    own for ``optimise_guide``.

    References:
        Kingma et al. 2016, Improving variational inference with inverse autoregressive flow, arXiv 1606.04934, eqs. 10
        and 11; Germain et al. 2015, MADE, arXiv 1502.03509, eq. 12 (the masks).

    Example:
        >>> InverseAutoregressiveFlow(context_dim=32).num_outputs(50)
        132
        >>> InverseAutoregressiveFlow(flow_hidden=(2,)).masks(2, flow=0)[1].tolist()  # mean, then log scale
        [[True, False], [True, True], [True, False], [True, True]]
    """

    num_flows: int = 2
    flow_hidden: tuple[int, ...] = (64,)
    context_dim: int = 32

    def __post_init__(self) -> None:
        whole_number("num_flows", self.num_flows)
        whole_number("context_dim", self.context_dim)
        object.__setattr__(self, "flow_hidden", whole_numbers("flow_hidden", self.flow_hidden))
        if not self.flow_hidden:
            raise must("flow_hidden", "have at least one layer", "()", "Pass flow_hidden=(64,), say")

    def num_outputs(self, latent_dim: int) -> int:
        return 2 * latent_dim + self.context_dim

    def order(self, latent_dim: int, flow: int) -> np.ndarray:
        """The entries of z in the order in which one map takes them."""
        entries = np.arange(latent_dim)
        return entries[::-1].copy() if flow % 2 else entries

    def masks(self, latent_dim: int, flow: int) -> list[np.ndarray]:
        """Which inputs each unit of each layer sees, (units, inputs); the last layer holds means, then log scales.

        A hidden unit of degree m sees the first m entries (in the map's order), an output what those before it see.
        """
        position = np.argsort(self.order(latent_dim, flow))
        degrees = [np.arange(units) * latent_dim // units for units in self.flow_hidden]
        first = position < degrees[0][:, None]
        between = [before <= after[:, None] for before, after in pairwise(degrees)]
        last = degrees[-1] <= position[:, None]
        return [first, *between, np.concatenate([last, last])]
