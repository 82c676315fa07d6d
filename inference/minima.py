"""Which minimum did each seed end in? Replicates compared datum by datum, and what each went through on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from elbozoo.inference import storage
from elbozoo.inference.errors import must
from elbozoo.inference.evaluation import Evaluation
from elbozoo.inference.parts import number, whole_number
from elbozoo.inference.recording import LIVE
from elbozoo.inference.storage import checksum
from elbozoo.inference.training import Run

ERRORS = 2.0
"""So many standard errors must separate two runs that are called different."""


@dataclass(frozen=True, eq=False)
class Course:
    """What one run's latents went through, epoch by epoch, read off its history.

    Live dimensions are those with a minibatch-mean KL above 0.01 nats; their number in an epoch is the mean over its
    minibatches, rounded. A site that does not factorise counts as one dimension, live while all of it carries so much.

    Attributes:
        live: live dimensions of all sites together after each epoch, ``(E,)``.
    """

    live: Int[np.ndarray, " E"]

    @classmethod
    def of(cls, history: Sequence[Mapping[str, Any]]) -> Course:
        """The course that a run's ``history`` tells. Raises: InvalidArgument where it has no epoch or no rates."""
        if not history or not any(name.startswith("kl_") for name in history[0]):
            raise must("history", "have an epoch with a rate by site", list(history), "Pass Run.history of a fit")
        return cls(np.array([sum(_live(row)) for row in history]))

    @property
    def collapse_epoch(self) -> int | None:
        """The epoch (from 1) in which the whole latent collapsed for good; None where something is live at the end."""
        if self.live[-1]:
            return None
        alive = np.flatnonzero(self.live)
        return int(alive[-1]) + 2 if len(alive) else 1

    @property
    def recovery_epoch(self) -> int | None:
        """The epoch (from 1) in which something came to life for good after a collapse; None where that was not."""
        dead = np.flatnonzero(self.live == 0)
        return int(dead[-1]) + 2 if len(dead) and self.live[-1] else None

    @property
    def changes(self) -> list[tuple[int, int]]:
        """Epoch (from 2) and how many dimensions more or fewer are live than in the one before, where that changed."""
        steps = np.diff(self.live)
        return [(int(e) + 2, int(steps[e])) for e in np.flatnonzero(steps)]

    @property
    def lost(self) -> int:
        """How many dimensions fewer are live at the end than at the most."""
        return int(self.live.max() - self.live[-1])


def _live(row: Mapping[str, Any]) -> list[int]:
    """Live dimensions by site, in one epoch."""
    sites = [name.removeprefix("kl_") for name in row if name.startswith("kl_")]
    return [round(row.get(f"live_{site}", float(row[f"kl_{site}"] > LIVE))) for site in sites]


@dataclass(frozen=True, eq=False)
class LocalMinima:
    r"""What :func:`local_minima` found over R runs. Nats per datum; arrays have one entry a run, in the given order.

    Attributes:
        seeds: the runs' seeds.
        num_particles: K of the NLL.
        num_data: N, data that the runs were compared on.
        tolerance: nats within which two runs count as one minimum.
        nll: ``(R,)``, by K importance samples.
        nll_se: their standard errors from the choice of data, which the runs share: they say nothing about differences.
        elbo, rate: ``(R,)``.
        active_units: over all sites; None where they cannot be told.
        difference: mean over data of ``log p_best(x_n) - log p_r(x_n)``, ``(R,)``: how much worse than the best.
        difference_se: its standard error, from the N paired differences: the choice of data and both runs' draws.
        minimum: which minimum each run is in, 0 being the best one's, ``(R,)``.
        courses: what each run's latents went through.
        evaluations: of each run, for whatever else is asked.
    """

    seeds: tuple[int, ...]
    num_particles: int
    num_data: int
    tolerance: float
    nll: Float[np.ndarray, " R"]
    nll_se: Float[np.ndarray, " R"]
    elbo: Float[np.ndarray, " R"]
    rate: Float[np.ndarray, " R"]
    active_units: tuple[int | None, ...]
    difference: Float[np.ndarray, " R"]
    difference_se: Float[np.ndarray, " R"]
    minimum: Int[np.ndarray, " R"]
    courses: tuple[Course, ...]
    evaluations: tuple[Evaluation, ...] = field(repr=False)

    @property
    def best(self) -> int:
        """Which run has the lowest NLL."""
        return int(np.argmin(self.nll))

    @property
    def num_minima(self) -> int:
        """How many distinct minima, by the rule in :func:`local_minima`; as many as it can tell apart."""
        return int(self.minimum.max()) + 1

    @property
    def worse(self) -> np.ndarray:
        """Which runs are worse than the best by more than the tolerance and by two standard errors, ``(R,)``."""
        return (self.difference > self.tolerance) & (self.difference > ERRORS * self.difference_se)

    @property
    def collapsed(self) -> np.ndarray:
        """Which runs ended with no live dimension, ``(R,)``."""
        return np.array([course.collapse_epoch is not None for course in self.courses])

    def summary(self) -> dict[str, Any]:
        """Plain numbers and the verdict, for JSON; None where a number does not exist."""
        vectors = ("nll", "nll_se", "elbo", "rate", "difference", "difference_se", "minimum", "worse", "collapsed")
        return {
            "seeds": list(self.seeds),
            "num_particles": self.num_particles,
            "num_data": self.num_data,
            "tolerance": self.tolerance,
            **{name: [storage.plain(v) for v in getattr(self, name).tolist()] for name in vectors},
            "active_units": list(self.active_units),
            "num_minima": self.num_minima,
            "best_seed": self.seeds[self.best],
            "collapse_epoch": [course.collapse_epoch for course in self.courses],
            "recovery_epoch": [course.recovery_epoch for course in self.courses],
            "live_units": [course.live.tolist() for course in self.courses],
            "units_lost": [course.lost for course in self.courses],
            "verdict": self.verdict,
        }

    @property
    def verdict(self) -> list[str]:
        """What the figures say, in a sentence or two on each question."""
        return [self._spread(), self._minima(), *self._collapse()]

    # --- the sentences ---

    def _spread(self) -> str:
        best, worst = self.nll[self.best], self.nll.max()
        return (
            f"Over {len(self.seeds)} seeds the NLL (K = {self.num_particles}, {self.num_data} data) is {best:.2f} to "
            f"{worst:.2f} nats, the rate {self.rate.min():.2f} to {self.rate.max():.2f}; the best is seed "
            f"{self.seeds[self.best]}."
        )

    def _minima(self) -> str:
        rule = f"the same number of active units and an NLL within {self.tolerance:g} nats or the error"
        if self.num_minima == 1:
            return f"No two minima are told apart ({rule})."
        count = np.bincount(self.minimum)
        said = f"{self.num_minima} minima are told apart ({rule}), with {_listed(count.tolist())} seeds."
        worse = np.flatnonzero(self.worse)
        if not len(worse):
            return f"{said} None is worse than the best by more than that."
        costs = [f"{self.seeds[r]} ({self.difference[r]:.2f} ± {self.difference_se[r]:.2f})" for r in worse]
        return f"{said} {len(worse)} ended in a worse one, by so many nats: seed {_listed(costs)}."

    def _collapse(self) -> list[str]:
        said, when = [], [course.collapse_epoch for course in self.courses if course.collapse_epoch is not None]
        if when:
            epochs = f"epoch {when[0]}" if len(set(when)) == 1 else f"epochs {min(when)} to {max(when)}"
            said.append(f"The whole latent collapsed in {len(when)} of {len(self.seeds)} seeds, in {epochs}.")
        else:
            said.append("No seed's latent is collapsed as a whole at the end.")
        back = [course.recovery_epoch for course in self.courses if course.recovery_epoch is not None]
        if back:
            said.append(f"{len(back)} came back from a collapse, the last in epoch {max(back)}.")
        lost = [course.lost for course in self.courses]
        if any(lost):
            said.append(f"From its most to its end a seed lost {min(lost)} to {max(lost)} live dimensions.")
        return said


def local_minima(
    runs: Sequence[Run],
    data: Any,
    *,
    num_particles: int = 1000,
    tolerance: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> LocalMinima:
    r"""Compare the replicates of one training: how many minima, which seeds are in a worse one, and since when.

    With ``d_n = log p_r(x_n) - log p_s(x_n)`` for two runs r and s, by importance sampling on the same data, the two
    are in one minimum when they have the same number of active units, and ``|mean d_n|`` is at most ``tolerance``
    (which is for training that has not quite ended) or at most two standard errors of it (what cannot be told apart).
    From the best run on, by NLL, each joins the first minimum whose best run that holds with, or opens another. So the
    number of minima is of those that N data and K draws tell apart. A difference in active units may be one of a unit
    near the threshold of 0.01; ``worse`` does not go by it.

    Args:
        runs: what ``fit(…, replicates=n)`` returned; or any runs that are to be compared on the same data.
        data: data that they were not trained on, as for :meth:`Run.evaluate`.
        num_particles: K.
        tolerance: nats per datum.
        seed: of the draws; equal arguments give equal results.
        progress: show progress bars.

    Returns: a :class:`LocalMinima`; nats per datum.
    Raises: InvalidArgument for fewer than two runs, for runs that take the data differently (binarised or not), and for
        programs with one joint weight for all data; what :func:`~elbozoo.inference.evaluate` raises.
    """
    whole_number("num_particles", num_particles, 2)
    number("tolerance", tolerance, lambda v: v >= 0, "be finite and at least 0", "Pass 0.1, say")
    runs = list(runs) if isinstance(runs, Sequence) else [runs]
    if len(runs) < 2 or not all(isinstance(run, Run) for run in runs):
        got = f"{len(runs)} of type {type(runs[0]).__name__}" if runs else "none"
        raise must("runs", "be two Runs at least", got, "Pass what fit(..., replicates=16) returned")
    if len({checksum(run.prepare(data)) for run in runs}) > 1:
        todo = "Compare runs of one binarisation and precision"
        raise must("runs", "take the data alike", "runs that see different arrays", todo)
    found = [run.evaluate(data, num_particles=num_particles, seed=seed, progress=progress) for run in runs]
    log_lik = np.stack([e.per_datum.log_lik_estimate for e in found])  # (R, N)
    if log_lik.shape[1] < 2:
        todo = "Pass more data, to programs with every latent inside the data plate"
        raise must("runs", "have a likelihood for each of two data at least", f"{log_lik.shape[1]}", todo)
    difference, error = _paired(log_lik)
    nll = np.array([e.nll for e in found])
    best = int(np.argmin(nll))
    active = tuple(e.total_active_units for e in found)
    near = (np.abs(difference) <= tolerance) | (np.abs(difference) <= ERRORS * error)
    alike = np.array([[a == b for a in active] for b in active])
    return LocalMinima(
        seeds=tuple(run.config["seed"] for run in runs),
        num_particles=num_particles,
        num_data=found[0].num_data,
        tolerance=float(tolerance),
        nll=nll,
        nll_se=np.array([e.nll_se for e in found]),
        elbo=np.array([e.elbo for e in found]),
        rate=np.array([e.rate for e in found]),
        active_units=active,
        difference=difference[best],
        difference_se=error[best],
        minimum=_group(np.argsort(nll, kind="stable"), near & alike),
        courses=tuple(Course.of(run.history) for run in runs),
        evaluations=tuple(found),
    )


def _paired(log_lik: Float[np.ndarray, "R N"]) -> tuple[Float[np.ndarray, "R R"], Float[np.ndarray, "R R"]]:
    """Mean over data of ``log_lik[r] - log_lik[s]`` and its standard error, for every two runs."""
    pairs = log_lik[:, None] - log_lik[None]
    return pairs.mean(-1), pairs.std(-1, ddof=1) / math.sqrt(log_lik.shape[1])


def _group(order: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Number the runs by group: in ``order`` each joins the first group whose first run it is the ``same`` as."""
    first: list[int] = []
    group = np.zeros(len(order), dtype=int)
    for run in order:
        group[run] = next((g for g, head in enumerate(first) if same[run, head]), len(first))
        if group[run] == len(first):
            first.append(int(run))
    return group


def _listed(items: Sequence[Any]) -> str:
    """``1, 2 and 3``."""
    *most, last = map(str, items)
    return f"{', '.join(most)} and {last}" if most else last
