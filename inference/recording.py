"""What is read off the terms of one training step, written once for both engines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from elbozoo.inference.errors import must
from elbozoo.inference.objectives import Objective
from elbozoo.inference.terms import Terms

NOBODY = "the bound"
"""Who is to blame where no site and no parameter is."""

LIVE = 0.01
"""Nats: a latent dimension whose minibatch-mean KL is above it is live."""


def step_metrics(objective: Objective, terms: Terms) -> dict[str, Any]:
    r"""Scalars of one step, nats per datum.

    The unshaped bound, the distortion ``-E log p(x|z)``, the rate in all and by site, how many dimensions of a site are
    live where its rate factorises, the shape's scalars.
    """
    per = 1.0 / terms.data_per_entry
    metrics = {"bound": objective.bound(terms).mean() * per, "distortion": -terms.log_lik.mean() * per}
    for name, site in terms.sites.items():
        metrics[f"kl_{name}"] = site.rate.mean() * per
        if (terms_of_rate := site.rate_terms) is not None:
            mean = terms_of_rate.reshape((-1, terms_of_rate.shape[-1])).mean(axis=0)
            metrics[f"live_{name}"] = 1.0 * (mean > LIVE).sum()
    metrics["rate"] = sum(metrics[f"kl_{n}"] for n in terms.sites)
    return metrics | objective.scalars(terms)


def check_counts(terms: Terms, num_data: float, batch_size: int) -> None:
    """Refuse to train on minibatches that a program with one joint weight takes for the whole data.

    Args:
        num_data: how many data there are; ``math.inf`` where nobody can tell.

    Raises: InvalidArgument.
    """
    covered = terms.data_per_entry * terms.scale * math.prod(terms.log_lik.shape[1:])
    if terms.joint and math.isinf(num_data):
        if covered > batch_size:  # a number of its own
            return
        raise must(
            "data",
            "have a known number where a site lies outside the data plate, which is charged once for all of them",
            f"an iterable without a length, and a plate over the {batch_size} data of a minibatch",
            "Pass an array, an iterable with a length, or plate('data', N, subsample_size=len(x)) with its N",
        )
    if terms.joint and batch_size < num_data and covered < num_data:
        raise must(
            "program",
            "know the size of the whole data where a site lies outside the data plate, whose share of a minibatch is "
            f"otherwise charged {num_data / batch_size:g} times too much",
            f"a plate over the {batch_size} data of a minibatch, of {num_data}",
            f"Write plate('data', {num_data}, subsample_size=len(x)), or pass batch_size={num_data}",
        )


def check_amortised(shapes: Mapping[str, Any], shapes_of_fewer: Mapping[str, Any]) -> None:
    """Refuse minibatches where a parameter has an entry a datum, which other data of another minibatch would share.

    Args:
        shapes, shapes_of_fewer: the parameters' shapes, by name, as a minibatch and as fewer data make them.

    Raises: InvalidArgument.
    """
    for name, shape in shapes.items():
        if shapes_of_fewer.get(name, shape) != shape:
            todo = "Compute it from the data, or pass batch_size=len(data)"
            got = f"{shape[0]} for a minibatch, {shapes_of_fewer[name][0]} for fewer data"
            raise must(
                f"parameter '{name}'", "have one shape, whatever the data, to be trained on minibatches", got, todo
            )


def first_non_finite(terms: Terms) -> str:
    """Name of the first site with a non-finite log density (the guide's order, then observed ones); empty if none."""
    for name, site in terms.sites.items():
        for x in (site.log_guide, site.log_prior, site.rate):
            if x is not None and not np.isfinite(_array(x)).all():
                return name
    for name, x in terms.observed.items():
        if not np.isfinite(_array(x)).all():
            return name
    return ""


def rewind(trainer: Any, snapshot: Any, order: np.ndarray, bad_step: int) -> tuple[str, int, int]:
    """Put ``trainer`` back to the last good state by replaying the epoch from ``snapshot``.

    Args:
        order: the epoch's minibatches, ``(replicates, steps, batch)``.
        bad_step: the first step with a non-finite bound or gradient; ``steps`` where only the parameters tell.

    Returns: the site or parameter that went non-finite first, the step within the epoch, and the replicate.
    """
    trainer.take(snapshot)
    if bad := trainer.bad_parameter():
        return bad[0], 0, bad[1]
    if bad_step:
        trainer.epoch(order[:, :bad_step])
    if not trainer.bad_parameter():
        name, replicate = trainer.blame(order[:, bad_step])
        return name, bad_step, replicate
    trainer.take(snapshot)  # an update broke a parameter before a bound showed it: find which
    for step in range(bad_step):
        before = trainer.snapshot()
        trainer.epoch(order[:, step : step + 1])
        if bad := trainer.bad_parameter():
            trainer.take(before)
            name, replicate = trainer.blame(order[:, step])  # clipping may have spread it from where it came from
            return (name, step, replicate) if name != NOBODY else (bad[0], step, bad[1])
    raise AssertionError("a replay that ends in a non-finite parameter has a step at which it becomes so")


def _array(x: Any) -> np.ndarray:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
