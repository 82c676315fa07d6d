"""The optimiser that both engines share, with one set of defaults."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from elbozoo.inference.arrays import expm1
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
        skip_norm: leave parameters and moments as they are where the gradient's global norm, before any clipping, is
            above this; None for never.
        average: decay of an exponential moving average of the weights, which is what held-out bounds and the trained
            program see; None for the weights themselves.

    A skipped update counts as a step for the learning rate and for every schedule, but not in Adam's own correction
    for the first steps. A gradient that is not finite is not skipped: it stops the training, by name.

    After step t the average is ``a_t = sum_i d^(t-i) w_i / sum_i d^(t-i)`` over the weights ``w_1 … w_t`` after each
    step (skipped or not), so that it owes nothing to the initial weights. Parameters are averaged unconstrained; a
    batch norm's statistics are not averaged. Training goes on from the weights themselves.

    References: Kingma & Ba 2015 (arXiv 1412.6980), algorithm 1 and, for the average, section 7.2. Skipped updates:
    Child 2021 (arXiv 2011.10650), section 4.
    """

    learning_rate: float | Callable[[Any], Any] = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = None
    skip_norm: float | None = None
    average: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.learning_rate):
            positive("learning_rate", self.learning_rate, "1e-3 is a common start")
        for name, value in (("b1", self.b1), ("b2", self.b2)):
            number(name, value, lambda v: 0 <= v < 1, "lie in [0, 1)", "Use the default")
        positive("eps", self.eps, "0 would divide 0 by 0 at a parameter whose gradient is 0; use the default")
        if self.clip_norm is not None:
            positive("clip_norm", self.clip_norm, "Pass None not to clip")
        if self.skip_norm is not None:
            positive("skip_norm", self.skip_norm, "Pass None not to skip")
        if self.average is not None:
            number("average", self.average, lambda v: 0 < v < 1, "lie in (0, 1)", "Pass None not to average")

    def optax(self) -> Any:
        """The optax transformation."""
        import optax

        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps)
        if self.clip_norm is not None:
            adam = optax.chain(optax.clip_by_global_norm(self.clip_norm), adam)
        if self.skip_norm is not None:
            adam = _skipping(adam, self.skip_norm)
        return optax.chain(adam, optax.scale_by_learning_rate(self.learning_rate))

    def torch(self, params: Iterable[Any]) -> Any:
        """The torch optimiser (one fused kernel over all parameters)."""
        import torch

        # A function's value is set before every step.
        rate = 0.0 if callable(self.learning_rate) else self.learning_rate
        return torch.optim.Adam(list(params), lr=rate, betas=(self.b1, self.b2), eps=self.eps, fused=True)

    def share(self, step: Any) -> Any:
        """How much of the averaged weights the weights after ``step`` (0-based) make up: ``1 / sum_i d^i``, i <= step.

        It is 1 at the first step and falls to ``1 - d``; arrays are taken too.
        """
        assert self.average is not None
        return (self.average - 1.0) / expm1((step + 1) * math.log(self.average))

    def at(self, step: int) -> float:
        """The learning rate at ``step``."""
        return float(self.learning_rate(step)) if callable(self.learning_rate) else self.learning_rate


def _skipping(inner: Any, skip_norm: float) -> Any:
    """``inner``, left out where the gradient's global norm is above ``skip_norm``: no update, and its state stays."""
    import jax
    import jax.numpy as jnp
    import optax

    def short(step: Any, **extra: Any) -> Any:
        return extra["norm"] <= skip_norm

    masked = optax.conditionally_mask(inner, short, forward_extra_args=True)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(updates)))
        return masked.update(updates, state, params, norm=norm)

    return optax.GradientTransformation(masked.init, update)
