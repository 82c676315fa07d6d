"""The optimiser that both engines share, with one set of defaults."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from elbozoo.inference.parts import number, positive


@dataclass(frozen=True)
class Adam:
    r"""Adam with the same defaults in both engines.

    Args:
        learning_rate: step size, or a function of the step (0-based) that returns it (traceable by JAX for a NumPyro
            program).
        b1, b2: decay rates of the two moments.
        eps: added to the root of the second moment. Burda et al. use 1e-4.
        clip_norm: rescale the gradient to this global norm where it is longer; None for never.

    References: Kingma & Ba 2015 (arXiv 1412.6980), algorithm 1.
    """

    learning_rate: float | Callable[[Any], Any] = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.learning_rate):
            positive("learning_rate", self.learning_rate, "1e-3 is a common start")
        for name, value in (("b1", self.b1), ("b2", self.b2)):
            number(name, value, lambda v: 0 <= v < 1, "lie in [0, 1)", "Use the default")
        positive("eps", self.eps, "0 would divide 0 by 0 at a parameter whose gradient is 0; use the default")
        if self.clip_norm is not None:
            positive("clip_norm", self.clip_norm, "Pass None not to clip")

    def optax(self) -> Any:
        """The optax transformation."""
        import optax

        adam = optax.adam(self.learning_rate, b1=self.b1, b2=self.b2, eps=self.eps)
        return adam if self.clip_norm is None else optax.chain(optax.clip_by_global_norm(self.clip_norm), adam)

    def torch(self, params: Iterable[Any]) -> Any:
        """The torch optimiser (one fused kernel over all parameters)."""
        import torch

        # A function's value is set before every step.
        rate = 0.0 if callable(self.learning_rate) else self.learning_rate
        return torch.optim.Adam(list(params), lr=rate, betas=(self.b1, self.b2), eps=self.eps, fused=True)

    def at(self, step: int) -> float:
        """The learning rate at ``step``."""
        return float(self.learning_rate(step)) if callable(self.learning_rate) else self.learning_rate
