"""What is read off the terms of one training step, written once for both engines."""

from __future__ import annotations

from typing import Any

import numpy as np

from elbozoo.inference.objectives import Objective
from elbozoo.inference.terms import Terms


def step_metrics(objective: Objective, terms: Terms) -> dict[str, Any]:
    r"""Scalars of one step, nats per datum.

    The unshaped bound, the distortion ``-E log p(x|z)``, the rate in all and by site, the shape's scalars.
    """
    per = 1.0 / terms.data_per_entry
    metrics = {"bound": objective.bound(terms).mean() * per, "distortion": -terms.log_lik.mean() * per}
    for name, site in terms.sites.items():
        metrics[f"kl_{name}"] = site.rate.mean() * per
    metrics["rate"] = sum(metrics[f"kl_{n}"] for n in terms.sites)
    return metrics | objective.scalars(terms)


def first_non_finite(terms: Terms) -> str:
    """Name of the first site with a non-finite log density (the guide's order, then observed ones); empty if none."""
    for name, site in terms.sites.items():
        for x in (site.log_guide, site.log_prior, site.rate):
            if not np.isfinite(_array(x)).all():
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
            return bad[0], step, bad[1]
    raise AssertionError("a replay that ends in a non-finite parameter has a step at which it becomes so")


def _array(x: Any) -> np.ndarray:
    return np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
