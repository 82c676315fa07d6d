"""Is it stuck, and why: a trained program's figures, and what they say in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from elbozoo.inference.calibration import Calibration, calibrate
from elbozoo.inference.data import prepare
from elbozoo.inference.errors import InvalidArgument, NonFinite, Refused
from elbozoo.inference.evaluation import LARGE_K, Evaluation, evaluate
from elbozoo.inference.exact import exact_log_lik
from elbozoo.inference.information import Bottleneck, bottleneck
from elbozoo.inference.minima import LocalMinima, local_minima
from elbozoo.inference.parts import whole_number
from elbozoo.inference.suboptimality import Gaps, gaps

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
        exact_nll, exact_nll_se: the mean of ``-log p(x)`` in closed form or by enumeration, where the model has one;
            else None.
        gaps: the bound's gap, split (:class:`elbozoo.inference.Gaps`); None where it was not asked for or is refused.
        calibration: the guide on the model's own data (:class:`elbozoo.inference.Calibration`); None as above.
        minima: the seeds that were trained alike (:class:`elbozoo.inference.LocalMinima`), of which the best is the one
            diagnosed; None for one run.
        refused: by instrument that the program does not allow, why.
    """

    evaluation: Evaluation
    bottleneck: Bottleneck
    exact_nll: float | None = None
    exact_nll_se: float | None = None
    gaps: Gaps | None = None
    calibration: Calibration | None = None
    minima: LocalMinima | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """How far the ELBO is below ``log p(x)``: exactly, or at least so much (by the importance-sampled NLL)."""
        return -self.evaluation.elbo - (self.evaluation.nll if self.exact_nll is None else self.exact_nll)

    @property
    def verdict(self) -> list[str]:
        """One sentence or two on each question, figures included."""
        said = [*self._collapse(), self._nats(), self._looseness(), *self._split(), self._aggregate()]
        seeds = [] if self.minima is None else self.minima.verdict
        return [*said, *self._calibrated(), *seeds, *self._advice()]

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
            "gaps": None if self.gaps is None else self.gaps.summary(),
            "calibration": None if self.calibration is None else self.calibration.summary(),
            "minima": None if self.minima is None else self.minima.summary(),
            "refused": dict(self.refused),
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

    def _split(self) -> list[str]:
        found = self.gaps
        if found is None:
            return [f"The gap is not split: {self.refused['gaps']}"] if "gaps" in self.refused else []
        least = "" if found.log_lik_method == "exact" else "at least about "
        said = (
            f"On {found.num_data} of the data, whose log p(x) is {found.log_lik:.2f} ({found.log_lik_method}), the "
            f"ELBO loses {least}{found.approximation:.2f} ± {found.approximation_se:.2f} nats to the guide's family "
            f"and {found.amortisation:.2f} ± {found.amortisation_se:.2f} to amortisation."
        )
        if found.richer is not None:
            said += f" A full covariance could win {found.richer:.2f} ± {found.richer_se:.2f} of the first."
        return [said]

    def _calibrated(self) -> list[str]:
        if self.calibration is None:
            return [f"No calibration: {self.refused['calibration']}"] if "calibration" in self.refused else []
        return self.calibration.verdict

    def _aggregate(self) -> str:
        found = self.bottleneck
        information = f"{found.mutual_information:.2f} ± {found.mutual_information_se:.2f}"
        distance = f"{found.marginal_kl:.2f} ± {found.marginal_kl_se:.2f}"
        if self._saturated:
            return (
                f"Of the rate, at least {information} nats say which datum it is, which is close to the log "
                f"{found.num_data} = {math.log(found.num_data):.2f} that so many data can show; at most {distance} "
                "are the aggregate posterior's distance from the prior. More data would tell them apart."
            )
        return (
            f"Of the rate, {information} nats say which datum it is; {distance} are the aggregate posterior's distance "
            "from the prior."
        )

    @property
    def _saturated(self) -> bool:
        """Posteriors overlap so little that the information is about how many data there are."""
        return self.bottleneck.mutual_information > 0.9 * math.log(self.bottleneck.num_data)

    def _advice(self) -> list[str]:
        found, advice = self.bottleneck, []
        collapsed = sum(int(c.sum()) for c in found.collapsed(COLLAPSED).values())
        if collapsed:
            advice.append(
                f"Next: AnnealedKL or FreeBits, under which the {collapsed} collapsed dimensions are not charged in "
                "full while they learn. If they collapse again, the likelihood itself may have no use for them: at the "
                "optimum of a linear decoder that is so when a direction's variance is below β σ²."
            )
        advice += [*self._advice_on_the_gap(), *self._advice_on_seeds()]
        if found.marginal_kl > LOOSE and found.marginal_kl > 0.1 * found.rate and not self._saturated:
            advice.append(
                "Next: a learned prior, or more components of one; samples from this one land where no datum's "
                "posterior is."
            )
        return advice or ["Nothing here says that another objective would help."]

    def _advice_on_seeds(self) -> list[str]:
        if self.minima is None or not self.minima.worse.any():
            return []
        count, worst = int(self.minima.worse.sum()), float(self.minima.difference[self.minima.worse].max())
        return [
            f"Next: train several seeds and keep the best, or AnnealedKL: {count} of {len(self.minima.seeds)} seeds "
            f"ended in a worse minimum, by up to {worst:.2f} nats."
        ]

    def _advice_on_the_gap(self) -> list[str]:
        found, advice = self.gaps, []
        if found is None:
            if self.gap > LOOSE:
                advice.append(
                    f"Next: IWAE with DReG, or a richer guide: {self.gap:.1f} nats are lost between the guide and the "
                    "posterior."
                )
            return advice
        if found.amortisation > LOOSE and found.amortisation > 2 * found.amortisation_se:
            advice.append(
                f"Next: a larger encoder, or longer training of the guide alone: {found.amortisation:.1f} nats are the "
                "network's, not the family's."
            )
        if found.approximation > LOOSE and found.approximation > 2 * found.approximation_se:
            worth = found.richer is not None and found.richer > 0.5 * found.approximation
            guide = f"a full-covariance guide (worth up to {found.richer:.1f})" if worth else "a flow as guide"
            advice.append(
                f"Next: {guide}, or IWAE with DReG, whose bound needs less of the guide: {found.approximation:.1f} "
                "nats are beyond the family."
            )
        return advice


def diagnose(
    run_or_program: Any,
    data: Any,
    *,
    num_particles: int = 1000,
    num_data: int | None = 1000,
    num_gaps: int = 50,
    num_simulations: int = 500,
    seed: int = 0,
    progress: bool = False,
) -> Diagnosis:
    r"""Measure a trained program and say what is the matter with it.

    Args:
        run_or_program: a :class:`~elbozoo.inference.Run` (its data are binarised as in training); several that differ
            in their seeds, which are compared, and the best diagnosed; or a trained program of either engine. Every
            site has to be inside the data plate.
        data: data that it was not trained on.
        num_particles: importance samples a datum, K of the NLL.
        num_data: so many of the data for the information (its cost is their square); None for all. The likelihood is
            that of all ``data``.
        num_gaps: so many of the data for the split of the gap (:func:`elbozoo.inference.gaps`); 0 to leave it out.
        num_simulations: of the calibration (:func:`elbozoo.inference.calibrate`); 0 to leave it out.
        seed: equal arguments give equal results.
        progress: show progress bars.

    Returns: a :class:`Diagnosis`. Where a program does not allow the split or the calibration (discrete latents, flows,
        data that are no argument of it), the diagnosis says why in its place.
    Raises: what :func:`~elbozoo.inference.evaluate` and :func:`~elbozoo.inference.bottleneck` raise.
    """
    whole_number("num_gaps", num_gaps, least=0)
    whole_number("num_simulations", num_simulations, least=0)
    minima = None
    if isinstance(run_or_program, Sequence):
        runs, settings = run_or_program, {"num_particles": num_particles, "seed": seed, "progress": progress}
        minima = local_minima(runs, data, **settings)
        run_or_program = runs[minima.best]
    program = getattr(run_or_program, "program", run_or_program)
    arrays = run_or_program.prepare(data) if program is not run_or_program else prepare(program, data)
    options: dict[str, Any] = {"seed": seed, "progress": progress}
    if minima is None:
        evaluation = evaluate(program, arrays, num_particles=num_particles, **options)
    else:
        evaluation = minima.evaluations[minima.best]
    information = bottleneck(program, arrays, num_data=num_data, **options)
    exact = exact_log_lik(program, arrays)
    refused: dict[str, str] = {}

    def unless_refused(name: str, count: int, measure: Callable[[], Any]) -> Any:
        try:
            return measure() if count else None
        except (InvalidArgument, NonFinite, Refused) as error:
            refused[name] = str(error)
            return None

    return Diagnosis(
        evaluation=evaluation,
        bottleneck=information,
        exact_nll=None if exact is None else float(-exact.mean()),
        exact_nll_se=None if exact is None or len(exact) < 2 else float(exact.std(ddof=1)) / math.sqrt(len(exact)),
        gaps=unless_refused("gaps", num_gaps, lambda: gaps(program, arrays, num_data=num_gaps, **options)),
        calibration=unless_refused(
            "calibration",
            num_simulations,
            lambda: calibrate(program, arrays, num_simulations=num_simulations, **options),
        ),
        minima=minima,
        refused=refused,
    )
