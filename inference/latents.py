"""The continuous latents of a program as one unconstrained vector a datum: where Hamiltonian dynamics move."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from elbozoo.inference.arrays import Array, concatenate
from elbozoo.inference.errors import must
from elbozoo.inference.terms import Site, Terms, refuse_estimate


def check_one_weight_a_datum(terms: Terms, num_data: int) -> None:
    """Refuse a program with a latent that data share, or whose latents do not have the data along their first axis.

    Raises: InvalidArgument.
    """
    refuse_estimate(terms, "this instrument")
    if terms.joint or terms.log_lik.ndim != 2 or terms.log_lik.shape[1] != num_data:
        got = "one that data share" if terms.joint else f"log densities of shape {tuple(terms.log_lik.shape[1:])}"
        todo = f"Put every site into one plate('data', {num_data}), and nothing else around them"
        raise must("program", "have every latent inside its data plate", got, todo)
    for name, z in terms.values.items():
        if tuple(z.shape[1:2]) != (num_data,):
            todo = "Put other plates to the right of the data plate, or into event dims"
            got = f"shape {tuple(z.shape[1:])} for {num_data} data"
            raise must(f"site '{name}'", "have the data along its first dim", got, todo)


class ChainState(NamedTuple):
    """K chains for each of B data, as annealing moves them.

    Attributes:
        u: where they are, ``(K, B, D)``.
        log_start, log_joint: both end points' log densities there, ``(K, B)``, nats.
        step_size: each datum's, ``(B,)``.
    """

    u: Array
    log_start: Array
    log_joint: Array
    step_size: Array

    def log_density(self, beta: Any) -> Array:
        """``(1 - β) log π_0 + β log π_1``, ``(K, B)``, nats."""
        return (1 - beta) * self.log_start + beta * self.log_joint


def end_points(terms: Terms, log_det: Array, start: str) -> tuple[Array, Array]:
    """``log π_0`` (the guide or the prior) and ``log π_1`` (``log p(x, z)``) of unconstrained latents, ``(K, B)``."""
    log_start = terms.log_guide if start == "guide" else terms.log_prior
    return log_start + log_det, terms.log_prior + terms.log_lik + log_det


class LatentSpace:
    r"""The bijection between a program's latents and vectors ``u`` in ``R^D``, a datum each.

    Shapes: latents ``(K, B, …)`` by site, ``u`` ``(K, B, D)``.

    Args:
        terms: any run of the program on B data: its shapes and supports are what counts.
        num_data: B.
        biject_to: the engine's registry of bijections from unconstrained space.

    Raises: InvalidArgument for latents that data share, for discrete ones, and for auxiliary sites of the guide.
    """

    def __init__(self, terms: Terms, num_data: int, biject_to: Callable[[Any], Any]):
        check_one_weight_a_datum(terms, num_data)
        self.transforms: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}  # of one datum's, unconstrained
        for name, site in terms.sites.items():
            self._check(name, site)
            self.transforms[name] = biject_to(site.support)
            self.shapes[name] = tuple(self.transforms[name].inverse_shape(tuple(terms.values[name].shape)))[2:]

    @staticmethod
    def _check(name: str, site: Site) -> None:
        if site.auxiliary:
            todo = "Use evaluate, whose importance weights need no density of the model's there"
            raise must("guide", "draw latents of the model alone", f"the auxiliary site '{name}'", todo)
        if site.support is None:
            todo = "Give it a distribution that states its support, with bounds that are Python numbers"
            raise must(f"site '{name}'", "have a support that is the same for all data", "none that is", todo)
        if site.support.is_discrete:
            todo = "Use exact_log_lik where its states can be listed, else evaluate"
            raise must(f"site '{name}'", "be continuous, to be moved along gradients", "a discrete one", todo)

    def unconstrain(self, values: Mapping[str, Array]) -> Array:
        """``u`` of latents."""
        parts = [self.transforms[name].inv(values[name]) for name in self.transforms]
        return concatenate([p.reshape((*p.shape[:2], -1)) for p in parts], axis=-1)

    def constrain(self, u: Array) -> tuple[dict[str, Array], Array]:
        """The latents of ``u``, and ``log |dz / du|`` ``(K, B)``."""
        values: dict[str, Array] = {}
        log_det: Array = 0.0 * u[..., 0]
        start = 0
        for name, transform in self.transforms.items():
            size = math.prod(self.shapes[name])
            part = u[..., start : start + size].reshape((*u.shape[:2], *self.shapes[name]))
            values[name] = transform(part)
            each = transform.log_abs_det_jacobian(part, values[name])
            log_det = log_det + each.reshape((*u.shape[:2], -1)).sum(-1)
            start += size
        return values, log_det
