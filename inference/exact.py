"""``log p(x)`` without error, where the model has it in closed form or its latents can be enumerated."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
from jaxtyping import Float

from elbozoo.inference.arrays import logsumexp
from elbozoo.inference.data import prepare_to_measure
from elbozoo.inference.errors import InvalidArgument
from elbozoo.inference.evaluation import call_size
from elbozoo.inference.latents import check_one_weight_a_datum
from elbozoo.inference.terms import Site, Terms

MAX_STATES = 4096
"""Joint states of the discrete latents up to which they are enumerated."""


def exact_log_lik(program: Any, data: Any, *, max_states: int = MAX_STATES) -> Float[np.ndarray, " N"] | None:
    r"""``log p(x)`` by datum: the spec's closed form, or ``log Σ_z p(x, z)`` over all joint states of discrete latents.

    Args:
        program: a trained program of either engine.
        data: as for :func:`elbozoo.inference.evaluate`.
        max_states: how many joint states may be enumerated.

    Returns: ``(N,)``, nats, float64; None where there is neither (a continuous latent, too many states).
    Raises: InvalidArgument for bad data, and for a program with discrete latents that data share.
    """
    arrays = prepare_to_measure(program, data)
    if hasattr(program.spec, "log_prob"):
        with contextlib.suppress(InvalidArgument):  # of the weights, which a frozen program hides
            return np.asarray(program.spec.log_prob(program.weights or {}, arrays[0]), np.float64)
    template = program.outline(arrays)
    atoms = {name: None if site.auxiliary else _atoms(site) for name, site in template.sites.items()}
    if not atoms or any(a is None for a in atoms.values()):
        return None
    shapes = {name: tuple(template.values[name].shape[2:]) for name in atoms}
    counts = {name: len(a) ** math.prod(shapes[name]) for name, a in atoms.items()}  # type: ignore[arg-type]
    if math.prod(counts.values()) > max_states:
        return None
    check_one_weight_a_datum(template, len(arrays[0]))
    states = _states({n: np.asarray(a) for n, a in atoms.items()}, shapes)
    return _enumerate(program, arrays, states)


def _atoms(site: Site) -> np.ndarray | None:
    """The values that one entry of a discrete latent can take; None where they cannot be listed."""
    support = site.support
    if support is None:
        return None
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if not support.is_discrete or getattr(support, "event_dim", 0):
        return None
    if "boolean" in type(support).__name__.lower():
        return np.array([0, 1])
    bounds = [getattr(support, name, None) for name in ("lower_bound", "upper_bound")]
    if None in bounds:
        return None
    if any(np.unique(np.asarray(b)).size != 1 for b in bounds):  # other states for other data
        return None
    low, high = (int(np.max(np.asarray(b))) for b in bounds)
    return np.arange(low, high + 1)


def _states(atoms: dict[str, np.ndarray], shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Every joint state, ``(S, *event)`` by site."""
    entries = [a for name, a in atoms.items() for _ in range(math.prod(shapes[name]))]
    table = np.stack(np.meshgrid(*entries, indexing="ij"), axis=-1).reshape(-1, len(entries))
    out, start = {}, 0
    for name, shape in shapes.items():
        out[name] = table[:, start : start + math.prod(shape)].reshape(-1, *shape)
        start += math.prod(shape)
    return out


def _enumerate(program: Any, arrays: tuple[np.ndarray, ...], states: dict[str, np.ndarray]) -> np.ndarray:
    num_states = len(next(iter(states.values())))
    batch, chunk = call_size(arrays, num_states)
    out = []
    for start in range(0, len(arrays[0]), batch):
        rows = np.minimum(np.arange(start, start + batch), len(arrays[0]) - 1)
        args = tuple(a[rows] for a in arrays)
        joint = []
        for first in range(0, num_states, chunk):
            at = np.minimum(np.arange(first, first + chunk), num_states - 1)  # one shape, one compilation
            values = {n: np.repeat(z[at, None], batch, axis=1) for n, z in states.items()}
            found = program.apply(_log_joint, args, values=values).astype(np.float64)
            joint.append(found[: num_states - first])
        out.append(logsumexp(np.concatenate(joint))[: len(arrays[0]) - start])
    return np.concatenate(out)


def _log_joint(terms: Terms) -> Any:
    return terms.log_prior + terms.log_lik
