"""What a guide says of a datum's class or cluster, and how often it is right."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from elbozoo.inference.data import prepare
from elbozoo.inference.errors import must
from elbozoo.inference.evaluation import call_seed
from elbozoo.inference.parts import whole_number
from elbozoo.inference.terms import Choice, Draw, Terms

_FAMILIES = ("Categorical", "OneHotCategorical")


def class_probabilities(
    program: Any, data: Any, *, site: str = "y", num_particles: int = 1, batch_size: int = 1000, seed: int = 0
) -> Float[np.ndarray, "N C"]:
    r"""The guide's ``q(y | x)``, exactly where y is drawn first, else averaged over draws of what y depends on.

    .. math:: \tfrac1K \sum_k q(y \mid x, z_k)

    Args:
        program: of either engine, trained.
        data: the data, without labels (a label that the guide knows is what it would say).
        site: the categorical site of the guide.
        num_particles: K; 1 is enough where the guide draws y first.
        batch_size: data a call.
        seed: of the draws.

    Returns: (N, C); rows sum to 1. ``.argmax(-1)`` is the class.
    Raises: InvalidArgument where the guide has no such site, or its site is not one categorical variable a datum.
    """
    whole_number("num_particles", num_particles)
    whole_number("batch_size", batch_size)
    arrays = prepare(program, data)
    _check_site(program.outline(tuple(a[:1] for a in arrays)), site)
    parts = []
    for start in range(0, len(arrays[0]), batch_size):
        batch = tuple(a[start : start + batch_size] for a in arrays)
        options = {"num_particles": num_particles, "seed": call_seed(seed, start, 0)}
        parts.append(np.exp(program.apply(_log_probabilities(site), batch, **options)).mean(axis=0))
    return np.concatenate(parts)


def _check_site(terms: Terms, name: str) -> None:
    categorical = [n for n, s in terms.sites.items() if s.guide_family in _FAMILIES]
    if name not in categorical:
        raise must("site", "be a categorical site of the guide", f"'{name}'", f"It has {categorical or 'none'}")
    site = terms.sites[name]
    event_shape = () if site.guide_family == "Categorical" else (site.num_classes,)
    if site.event_shape != event_shape or len(terms.log_lik.shape) != 2:
        got = f"event shape {site.event_shape} and plates {tuple(terms.log_lik.shape[1:])}"
        raise must(f"site '{name}'", "be one variable a datum", got, "Read it off the guide's distribution yourself")


@cache
def _log_probabilities(site: str) -> Callable[[Terms], Any]:
    """The site's log-probabilities, (K, B, C), as a function of terms; one object a site, which is compiled once."""

    def keep(draw: Draw) -> Choice:
        if draw.name != site:
            return Choice(draw.drawn)
        spread = draw.drawn[..., None] if draw.family == "Categorical" else draw.drawn
        return Choice(draw.drawn, kept={"log_probabilities": draw.logits + 0 * spread})

    return lambda terms: terms.again(keep).kept[site]["log_probabilities"]


def accuracy(probabilities: Float[np.ndarray, "N C"] | Int[np.ndarray, " N"], labels: Any) -> float:
    """The share of data whose most probable class is their label.

    Args:
        probabilities: (N, C), or the classes themselves, (N,).
        labels: (N,).
    Raises: InvalidArgument unless there is one label a datum.
    """
    classes = probabilities.argmax(-1) if probabilities.ndim == 2 else probabilities
    return float((classes == _labels(labels, len(classes))).mean())


def cluster_accuracy(clusters: Float[np.ndarray, "N C"] | Int[np.ndarray, " N"], labels: Any) -> float:
    r"""Accuracy under the best one-to-one match of clusters to classes.

    .. math:: \max_m \tfrac1N \sum_n 1[m(c_n) = y_n]

    The maximum is over one-to-one maps (of the smaller of the two sets into the larger), found by the Hungarian method.

    Args:
        clusters: probabilities (N, C), of which the largest counts, or whole numbers from 0, (N,).
        labels: (N,), whole numbers from 0.

    Raises: InvalidArgument unless there is one label a datum, and both are whole numbers from 0.
    Limits: chance is above 1/C; clusters beyond the number of classes all count as wrong.
    References: Yang et al. 2010; Jiang et al. 2017 (arXiv 1611.05148), section 4.
    """
    from scipy.optimize import linear_sum_assignment  # here, for it takes half a second

    found = clusters.argmax(-1) if clusters.ndim == 2 else _labels(clusters, len(clusters), "clusters")
    truth = _labels(labels, len(found))
    counts = np.zeros((int(found.max()) + 1, int(truth.max()) + 1))
    np.add.at(counts, (found, truth), 1)
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / len(found))


def _labels(labels: Any, num_data: int, name: str = "labels") -> np.ndarray:
    array = np.asarray(labels)
    whole = array.shape == (num_data,) and num_data > 0 and bool((array == np.floor(array)).all() and array.min() >= 0)
    if not whole:
        got = f"shape {array.shape}" if array.shape != (num_data,) else array
        raise must(name, f"be {num_data} whole numbers from 0", got, "Pass one class a datum")
    return array.astype(int)
