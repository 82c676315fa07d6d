"""Is it stuck, and why: a trained program's figures, and what they say in words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from elbozoo.inference.data import prepare
from elbozoo.inference.evaluation import LARGE_K, Evaluation, evaluate
from elbozoo.inference.information import Bottleneck, bottleneck

COLLAPSED = 0.01
"""ε, nats: a dimension whose KL is below it for nearly all data carries nothing."""

LOOSE = 1.0
"""Nats: a bound this far below the likelihood is worth another guide or objective."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What :func:`diagnose` found; nats per datum.

    Attributes:
        evaluation: likelihood, bound, rate and distortion (:class:`elbozoo.inference.Evaluation`).
        bottleneck: information, aggregate posterior and collapse (:class:`elbozoo.inference.Bottleneck`).
        exact_nll, exact_nll_se: the mean of ``-log p(x)`` in closed form, where the model has one; else None.
    """

    evaluation: Evaluation
    bottleneck: Bottleneck
    exact_nll: float | None = None
    exact_nll_se: float | None = None

    @property
    def gap(self) -> float:
        """How far the ELBO is below ``log p(x)``: exactly, or at least so much (by the importance-sampled NLL)."""
        return -self.evaluation.elbo - (self.evaluation.nll if self.exact_nll is None else self.exact_nll)

    @property
    def verdict(self) -> list[str]:
        """One sentence or two on each question, figures included."""
        return [*self._collapse(), self._nats(), self._looseness(), self._aggregate(), *self._advice()]

    def summary(self) -> dict[str, Any]:
        """Plain numbers and the verdict, for JSON; None where a number does not exist."""
        found = self.bottleneck
        names = ("num_data", "rate", "rate_se", "mutual_information", "mutual_information_se")
        names += ("mutual_information_upper", "marginal_kl", "marginal_kl_se", "delta")
        information: dict[str, Any] = {name: getattr(found, name) for name in names}
        for name in ("kl_per_dimension", "collapse_epsilon", "activity"):
            information[name] = {site: [float(v) for v in value] for site, value in getattr(found, name).items()}
        information["collapsed"] = {s: np.flatnonzero(c).tolist() for s, c in found.collapsed(COLLAPSED).items()}
        exact = {"exact_nll": self.exact_nll, "exact_nll_se": self.exact_nll_se, "gap": self.gap}
        return {
            "evaluation": self.evaluation.summary(),
            "bottleneck": information,
            **{k: v if v is None or math.isfinite(v) else None for k, v in exact.items()},
            "verdict": self.verdict,
        }

    # --- the sentences ---

    def _collapse(self) -> list[str]:
        found, said = self.bottleneck, []
        for site, collapsed in found.collapsed(COLLAPSED).items():
            share = f"KL below {COLLAPSED} nats for {1 - found.delta:.0%} of the data"
            if not collapsed.any():
                said.append(f"No dimension of {site} is collapsed ({share}); {len(collapsed)} carry nats.")
                continue
            which = ", ".join(str(i) for i in np.flatnonzero(collapsed))
            said.append(f"{collapsed.sum()} of {len(collapsed)} dimensions of {site} are collapsed ({share}): {which}.")
        rest = [site for site in found.activity if site not in found.collapse_epsilon]
        for site in rest:
            rate = self.evaluation.rate_per_site[site]
            said.append(f"{site} does not factorise, so its dimensions are not told apart; it carries {rate:.2f} nats.")
        return said

    def _nats(self) -> str:
        found = self.evaluation
        sites = ", ".join(f"{site} {rate:.2f}" for site, rate in found.rate_per_site.items())
        return (
            f"A datum costs {-found.elbo:.2f} nats under the ELBO: {found.rate:.2f} for the latents ({sites}) and "
            f"{found.distortion:.2f} for the data given them."
        )

    def _looseness(self) -> str:
        found, k_hat = self.evaluation, self.evaluation.per_datum.k_hat
        if self.exact_nll is not None:
            exact = f"{self.exact_nll:.3f} ± {self.exact_nll_se:.3f}"
            return f"The bound is {self.gap:.3f} nats loose: the exact NLL is {exact}."
        bad = float(np.mean(k_hat[~np.isnan(k_hat)] > LARGE_K)) if (~np.isnan(k_hat)).any() else 0.0
        trust = f"; k̂ is above {LARGE_K} for {bad:.0%} of the data, where it may be much looser" if bad > 0 else ""
        return (
            f"The bound is at least {self.gap:.2f} nats loose: the NLL with K = {found.num_particles} importance "
            f"samples is {found.nll:.2f} ± {found.nll_se:.2f}{trust}."
        )

    def _aggregate(self) -> str:
        found = self.bottleneck
        full = found.mutual_information > 0.9 * math.log(found.num_data)
        ceiling = (
            f", close to the log {found.num_data} = {math.log(found.num_data):.2f} that so many data can show: "
            "it may be more"
            if full
            else ""
        )
        information = f"{found.mutual_information:.2f} ± {found.mutual_information_se:.2f}"
        return (
            f"Of the rate, {information} nats say which datum it is{ceiling}; "
            f"{found.marginal_kl:.2f} ± {found.marginal_kl_se:.2f} are the aggregate posterior's distance "
            "from the prior."
        )

    def _advice(self) -> list[str]:
        found, advice = self.bottleneck, []
        collapsed = sum(int(c.sum()) for c in found.collapsed(COLLAPSED).values())
        if collapsed:
            advice.append(
                f"Next: AnnealedKL or FreeBits, under which the {collapsed} collapsed dimensions are not charged at "
                "first. If they collapse again, the likelihood itself has no use for them: at the optimum of a linear "
                "decoder that is so when a direction's variance is below β σ²."
            )
        if self.gap > LOOSE:
            advice.append(
                f"Next: IWAE with DReG, or a full-covariance guide: {self.gap:.1f} nats are lost between the guide and "
                "the posterior."
            )
        if found.marginal_kl > LOOSE and found.marginal_kl > 0.1 * found.rate:
            advice.append("Next: a learned prior; samples from this one land where no datum's posterior is.")
        return advice or ["Nothing here says that another objective would help."]


def diagnose(
    run_or_program: Any,
    data: Any,
    *,
    num_particles: int = 1000,
    num_data: int | None = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Diagnosis:
    r"""Measure a trained program and say what is the matter with it.

    Args:
        run_or_program: a :class:`~elbozoo.inference.Run` (its data are binarised as in training), or a trained program
            of either engine, with every site inside its data plate.
        data: data that it was not trained on.
        num_particles: importance samples a datum, K of the NLL.
        num_data: so many of the data for the information (its cost is their square); None for all. The likelihood is
            that of all ``data``.
        seed: equal arguments give equal results.
        progress: show progress bars.

    Returns: a :class:`Diagnosis`.
    Raises: what :func:`~elbozoo.inference.evaluate` and :func:`~elbozoo.inference.bottleneck` raise.
    """
    program = getattr(run_or_program, "program", run_or_program)
    arrays = run_or_program.prepare(data) if program is not run_or_program else prepare(program, data)
    exact: Float[np.ndarray, " N"] | None = None
    if hasattr(program.spec, "log_prob"):
        exact = np.asarray(program.spec.log_prob(program.weights, arrays[0]))
    return Diagnosis(
        evaluation=evaluate(program, arrays, num_particles=num_particles, seed=seed, progress=progress),
        bottleneck=bottleneck(program, arrays, num_data=num_data, seed=seed, progress=progress),
        exact_nll=None if exact is None else float(-exact.mean()),
        exact_nll_se=None if exact is None or len(exact) < 2 else float(exact.std(ddof=1)) / math.sqrt(len(exact)),
    )
