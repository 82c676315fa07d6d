r"""Sums over the states of discrete sites: what is the same in both engines, on arrays of either library."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from elbozoo.inference.arrays import Array, logsumexp
from elbozoo.inference.errors import Refused, must
from elbozoo.inference.terms import Site

MOST_STATES = 4096


def joint_states(sites: Mapping[str, Site], whose: str) -> Mapping[str, np.ndarray]:
    """Every joint state of discrete sites, ``(states, *event)`` by site, whole numbers.

    Args:
        sites: of which the family, the event's shape and the number of classes count.
        whose: what has these sites, for the error.

    Raises: Refused where there are too many.
    """
    each = {n: _entries(site) for n, site in sites.items()}
    total = math.prod(len(choices) ** count for count, choices in each.values())
    if total > MOST_STATES:
        todo = "Use gradient=VIMCO(), or DisARM() for Bernoulli sites"
        raise must(whose, f"have at most {MOST_STATES} joint states", total, todo, Refused)
    pools = [choices for count, choices in each.values() for _ in range(count)]
    joint = list(itertools.product(*(range(len(pool)) for pool in pools)))
    out, start = {}, 0
    for name, (count, choices) in each.items():
        index = np.array(joint)[:, start : start + count]
        out[name], start = choices[index].reshape((len(joint), *sites[name].event_shape)), start + count
    return out


def _entries(site: Site) -> tuple[int, np.ndarray]:
    """How many entries with states of their own a value has, and an entry's states."""
    size = math.prod(site.event_shape)
    if site.guide_family == "OneHotCategorical":
        return size // site.num_classes, np.eye(site.num_classes, dtype=np.int64)
    return size, np.arange(site.num_classes)


# --- sites that a model sums out ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """Where a site of the model stands, as an engine reads it.

    Attributes:
        site: its family, event shape and number of classes.
        plates: name and dim (counted from the right) of the plates around it.
        batch_shape: of its distribution.
        scale: of its log density.
    """

    site: Site
    plates: frozenset[tuple[str, int]]
    batch_shape: tuple[int, ...]
    scale: Any

    @property
    def dims(self) -> set[int]:
        return {dim for _, dim in self.plates}


class Marginal:
    """In place of a site's distribution: what the site adds to a log density with other sites summed out."""

    def __init__(self, fn: Any, log_prob: Array):
        self.event_shape, self.event_dim, self.support = fn.event_shape, fn.event_dim, getattr(fn, "support", None)
        self.has_rsample, self.batch_shape, self._log_prob = fn.has_rsample, log_prob.shape, log_prob

    def log_prob(self, value: Any) -> Array:
        return self._log_prob


def marginal_terms(
    log_probs: Mapping[str, Array], summed_out: Collection[str], plates: Collection[int]
) -> dict[str, Array]:
    r"""What each site adds to the log density when some are summed out of it.

    .. math:: R_j - R_{j-1},\qquad R_j = \log \sum_d p(d) \prod_{i \le j} p(\mathrm{site}_i \mid d)

    per entry of the plates. These sum to the exact marginal, whatever they are multiplied or averaged with later.

    Args:
        log_probs: in the model's order, ``log p(site | d)`` at every joint state d, ``(states, *batch)``.
        summed_out: the sites that d is of.
        plates: the dims of the plates around those, counted from the right; other dims are summed over first.

    Returns: by site that is not summed out, ``(*batch)`` with dims of size 1 where they were summed over.
    """
    width = max(x.ndim for x in log_probs.values()) - 1
    out: dict[str, Array] = {}
    running, before = 0.0, 0.0
    for name, log_prob in log_probs.items():
        outside = tuple(d for d in range(1 - log_prob.ndim, 0) if d not in plates)
        x = log_prob.sum(axis=outside, keepdims=True) if outside else log_prob
        running = running + x.reshape((x.shape[0], *(1,) * (width - x.ndim + 1), *x.shape[1:]))
        if name not in summed_out:
            total = logsumexp(running)
            out[name], before = total - before, total
    return out


def check_summed_out(placed: Mapping[str, Placed], summed_out: Collection[str]) -> None:
    """Refuse what would be summed out wrongly.

    Args:
        placed: the sites from the first that is summed out, in the model's order.
        summed_out: which of them are.

    Raises: Refused for a site of another family, one with entries that no plate holds (all would be given one state),
        and a later site that lies outside of their plates or has a scale of its own.
    """
    first_name, first = next(iter(placed.items()))
    for name in summed_out:
        at = placed[name]
        if at.site.num_classes == 0:
            todo, got = "Draw it in the guide", at.site.guide_family
            raise must(f"site '{name}', marked to be enumerated,", "be Bernoulli or categorical", got, todo, Refused)
        if any(size > 1 and i - len(at.batch_shape) not in first.dims for i, size in enumerate(at.batch_shape)):
            todo = "Put them into a plate, or make them one event with to_event"
            condition = "have no batch entries outside of plates where its states are summed over"
            raise must(f"site '{name}'", condition, f"batch shape {at.batch_shape}", todo, Refused)
    for name, at in placed.items():
        inside = at.plates == first.plates if name in summed_out else at.plates >= first.plates
        if not inside or not _same(at.scale, first.scale):
            raise must(
                f"site '{name}'",
                f"lie in the plates of '{first_name}', which is summed out before it, under one scale",
                "others",
                "Draw what does not depend on it before it",
                Refused,
            )


def _same(a: Any, b: Any) -> bool:
    """One object, or equal numbers; arrays may be traced, and are not looked into."""
    return a is b or (isinstance(a, float | int) and isinstance(b, float | int) and a == b)


def refuse_summed_out(names: Iterable[str]) -> None:
    """Refuse to go on from a guide's latents where the model has others that it is summed over: they are not known.

    Raises: Refused.
    """
    for name in names:
        todo = "Draw it in the guide, and train with ELBO(gradient=Enumerate()) or VIMCO()"
        raise must("the guide", "draw every latent site of the model for this", f"'{name}' summed out", todo, Refused)
