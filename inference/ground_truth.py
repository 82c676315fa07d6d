r"""The guide against the truth: NUTS on the posterior of each datum, the guide's beside it, plain and weighted."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from elbozoo.inference.data import prepare_to_measure
from elbozoo.inference.errors import InvalidArgument, NonFinite, must
from elbozoo.inference.evaluation import call_seed, call_size, check_plate, weigh
from elbozoo.inference.parts import ENGINES, number, whole_number
from elbozoo.inference.posterior import _datasets, _join, _Names, _wrap, attributes, effective_draws, resampled
from elbozoo.inference.psis import LARGE_K, pareto_k, pareto_smooth
from elbozoo.inference.terms import Terms, refuse_estimate

_GUIDE, _NUTS, _SHAPES, _RESAMPLE = range(4)  # streams of random numbers
_ROWS = 1024  # draws whose distances to others are held at once
_LOOK = "Look at the model's density there, and at that datum"
_CHECKED = 2  # draws at which a datum's own log density is held against the one among the others

PerDatum = Float[np.ndarray, " N"]
PerDimension = Mapping[str, Float[np.ndarray, "N D"]]


# --- the result -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GroundTruth:
    r"""What :func:`ground_truth` found, for N data. Sites are the model's continuous latents.

    Attributes:
        nuts: ArviZ's ``InferenceData`` (ArviZ 0.23) or xarray's ``DataTree`` (ArviZ 1.x). Groups: ``posterior``, NUTS's
            draws with dims (chain, draw, data, …) as in :func:`~elbozoo.inference.to_arviz`; ``sample_stats``,
            ``diverging`` of each draw and datum, from NumPyro also ``lp`` (of unconstrained latents), ``energy``,
            ``n_steps``, ``acceptance_rate`` and ``step_size``; ``observed_data``.
        guide: the same of the guide, with as many draws, dealt to as many chains. Its ``sample_stats`` are
            ``log_weight`` of each draw, and per datum ``pareto_k`` and ``ess`` of the weights of the
            ``oversample`` times as many draws that ``weighted`` is made from, these among them.
        weighted: the guide's draws corrected by their importance weights: as many draws again, resampled from
            ``oversample`` times as many in proportion to Pareto-smoothed weights
            (:func:`~elbozoo.inference.psis.pareto_smooth`). No ``sample_stats``.
        energy_distance: the energy distance between the two sets of draws, as a share of ``2 E|Z - Z'|`` (Z from one
            set, Z' from the other), so from 0 (the sets are equal) to 1, in the coordinates in which NUTS's draws have
            unit variance in each dimension. Means that differ by d standard deviations in every dimension give about
            ``d²/4``. It is the V-statistic (:func:`energy_distance`), so high by about ``1/n`` for n independent draws.
        energy_floor: the same between two halves of NUTS's own draws, on average over the ways to deal each chain's
            first and second half to one or the other: what the draws can tell apart. Two sets of *all* draws
            from one distribution come out at half of it on average, or below.
        weighted_energy_distance: the same between NUTS's draws and ``weighted``. A set that hangs on m effective draws
            is off by about ``1 / (2 m)`` by that alone. Its floor is the same one: few effective draws are no excuse.
        r_hat: by site, ``(N, D)``: rank-normalised split R-hat over NUTS's chains and the guide's together.
        weighted_r_hat: the same with ``weighted`` in place of the guide.
        mean_error, weighted_mean_error: the largest error of the posterior mean over all dimensions, in the posterior's
            standard deviations in that dimension (both from NUTS): of the guide, and of ``weighted``.
        nuts_r_hat, nuts_ess: by site, ``(N, D)``: R-hat and bulk effective sample size of NUTS's chains alone.
        divergences: NUTS's divergent transitions after warm-up.
        k_hat: Pareto k̂ of the guide's importance weights ``p(x, z) / q(z | x)``, those that ``weighted`` uses.
        num_warmup, num_draws, num_chains: of NUTS; draws are a chain's.
        oversample: draws of the guide that are weighted, for each one of NUTS.
        sampler: whose NUTS ran, ``"numpyro"`` or ``"pyro"``.
        seconds: wall time.
    """

    nuts: Any = field(repr=False)
    guide: Any = field(repr=False)
    weighted: Any = field(repr=False)
    energy_distance: PerDatum
    energy_floor: PerDatum
    weighted_energy_distance: PerDatum
    r_hat: PerDimension
    weighted_r_hat: PerDimension
    mean_error: PerDatum
    weighted_mean_error: PerDatum
    nuts_r_hat: PerDimension
    nuts_ess: PerDimension
    divergences: Int[np.ndarray, " N"]
    k_hat: PerDatum
    num_warmup: int
    num_draws: int
    num_chains: int
    oversample: int
    sampler: str
    seconds: float

    @property
    def num_data(self) -> int:
        """N."""
        return len(self.k_hat)

    def agree(self, *, weighted: bool = False, energy: float = 0.02, r_hat: float = 1.05) -> Bool[np.ndarray, " N"]:
        r"""For which data guide and NUTS agree, ``(N,)``: its draws as they are, or by their importance weights.

        The rule: the energy distance is at most ``energy``, or at most its floor where that is above ``energy``; and
        R-hat across the two is at most ``r_hat`` in every dimension. It is about the size of the difference
        and not about its significance, which any guide but the exact one reaches with draws enough. By default, means
        may differ by 0.28 posterior standard deviations in every dimension (0.02 = 0.28² / 4) or by 0.6 in one of many.

        The two are different statements, and k̂ is about the second alone. *The guide is the posterior*: its draws as
        they are agree. A low k̂ does not say so: it says that the tail of ``p / q`` is light, and a guide that is twice
        too wide has bounded weights and is still wrong. *The guide's importance-weighted expectations are the
        posterior's*: ``weighted`` agrees (the energy distance is the square of the largest error over expectations of a
        ball of functions). Where k̂ is below 0.7 that is so but for a small probability of a large error, if the
        weighted draws are a few thousand or more. Above 0.7 nothing is promised: the error falls too slowly with the
        number of draws for any practical number to help, which leaves room for agreement just above.

        The rule for ``weighted`` is the rule for the guide, thresholds and all, so that the weights alone make the
        difference. It was fixed before it was first measured on a trained model.

        It says little of data where NUTS itself has not :attr:`converged`.

        Args:
            weighted: ask it of the importance-weighted draws.
            energy: largest energy distance.
            r_hat: largest R-hat.

        Raises: InvalidArgument unless ``energy`` is between 0 and 1 and ``r_hat`` above 1.

        References: Vehtari, Simpson, Gelman, Yao & Gabry 2024 (arXiv 1507.02646), section 3.2, for what k̂ promises;
            Yao, Vehtari, Simpson & Gelman 2018, Yes, but did it work?: Evaluating variational inference (arXiv
            1802.02538), for k̂ of a variational posterior.
        """
        number("energy", energy, lambda v: 0 <= v <= 1, "lie in [0, 1]", "Pass 0.02, say")
        number("r_hat", r_hat, lambda v: v > 1, "be finite and above 1", "Pass 1.05, say")
        distance = self.weighted_energy_distance if weighted else self.energy_distance
        near = distance <= np.maximum(self.energy_floor, energy)
        return near & (_worst(self.weighted_r_hat if weighted else self.r_hat) <= r_hat)

    @property
    def converged(self) -> Bool[np.ndarray, " N"]:
        """For which data NUTS can be taken for the truth: no R-hat above 1.05, no effective sample size below 100."""
        return (_worst(self.nuts_r_hat) <= 1.05) & (-_worst({n: -ess for n, ess in self.nuts_ess.items()}) >= 100)

    @property
    def verdict(self) -> list[str]:
        """What it comes to, in words with figures."""
        well, n = self.k_hat <= LARGE_K, self.num_data

        def counts(agree: np.ndarray) -> str:
            return (
                f"agree for {agree.sum()} of {n} data: {(agree & well).sum()} of the {well.sum()} whose k̂ "
                f"is at most {LARGE_K}, {(agree & ~well).sum()} of the other {(~well).sum()}."
            )

        said = [
            f"Guide and NUTS {counts(self.agree())}",
            f"By their importance weights, the guide's draws {counts(self.agree(weighted=True))}",
        ]
        if not self.converged.all():
            which = ", ".join(str(i) for i in np.flatnonzero(~self.converged))
            said.append(f"NUTS has not converged for {(~self.converged).sum()} of them ({which}): draw more there.")
        if self.divergences.any():
            said.append(f"NUTS diverged {self.divergences.sum()} times, for {(self.divergences > 0).sum()} data.")
        return said

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON; None where a number does not exist."""
        agree, weighted, well = self.agree(), self.agree(weighted=True), self.k_hat <= LARGE_K
        found: dict[str, Any] = {
            "num_data": self.num_data,
            "num_warmup": self.num_warmup,
            "num_draws": self.num_draws,
            "num_chains": self.num_chains,
            "oversample": self.oversample,
            "agree": int(agree.sum()),
            "weighted_agree": int(weighted.sum()),
            "energy_distance_median": float(np.median(self.energy_distance)),
            "energy_distance_max": float(self.energy_distance.max()),
            "energy_floor_median": float(np.median(self.energy_floor)),
            "weighted_energy_distance_median": float(np.median(self.weighted_energy_distance)),
            "weighted_energy_distance_max": float(self.weighted_energy_distance.max()),
            "mean_error_max": float(self.mean_error.max()),
            "weighted_mean_error_max": float(self.weighted_mean_error.max()),
            "r_hat_max": float(_worst(self.r_hat).max()),
            "nuts_converged": int(self.converged.sum()),
            "nuts_r_hat_max": float(_worst(self.nuts_r_hat).max()),
            "nuts_ess_min": float(-_worst({n: -ess for n, ess in self.nuts_ess.items()}).max()),
            "divergences": int(self.divergences.sum()),
            "k_hat_max": float(self.k_hat.max()),
            "k_hat_bad": float(np.mean(self.k_hat > LARGE_K)),
            "agree_where_k_hat_good": int((agree & well).sum()),
            "weighted_agree_where_k_hat_good": int((weighted & well).sum()),
            "sampler": self.sampler,
            "seconds": self.seconds,
        }
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}

    def __rich__(self) -> Table:
        title = f"The guide against NUTS: {self.num_data} data, {self.num_chains} × {self.num_draws} draws of each"
        table = Table(title=title, title_justify="left")
        names = ("datum", "agree", "distance", "floor", "R-hat", "k̂", "agree, weighted", "distance", "R-hat")
        for i, name in enumerate((*names, "NUTS's R-hat", "ESS")):
            table.add_column(name, justify="right" if i else "left")
        ess = -_worst({n: -e for n, e in self.nuts_ess.items()})
        plain, weighted = self.agree(), self.agree(weighted=True)
        for i in range(self.num_data):
            table.add_row(
                str(i),
                "yes" if plain[i] else "no",
                f"{self.energy_distance[i]:.4f}",
                f"{self.energy_floor[i]:.4f}",
                f"{_worst(self.r_hat)[i]:.3f}",
                f"{self.k_hat[i]:.2f}",
                "yes" if weighted[i] else "no",
                f"{self.weighted_energy_distance[i]:.4f}",
                f"{_worst(self.weighted_r_hat)[i]:.3f}",
                f"{_worst(self.nuts_r_hat)[i]:.3f}",
                f"{ess[i]:.0f}",
            )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False)
        with console.capture() as text:
            console.print(self)
            console.print("\n".join(self.verdict))
        return text.get().rstrip()


def _worst(by_site: PerDimension) -> np.ndarray:
    """The largest entry of each datum over sites and dimensions, ``(N,)``; nan where there is one."""
    return np.concatenate(list(by_site.values()), axis=1).max(axis=1)


# --- the computation --------------------------------------------------------------------------------------------


def ground_truth(
    program: Any,
    data: Any,
    *,
    num_warmup: int = 500,
    num_draws: int = 500,
    num_chains: int = 4,
    oversample: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> GroundTruth:
    r"""The posterior ``p(z | x_n)`` of each datum by NUTS, the weights fixed, beside the guide's draws.

    The guide is held against it twice, for these are two questions (:meth:`GroundTruth.agree`): as it is, and corrected
    by its importance weights.

    NUTS runs on each datum by itself, with its own adaptation. NumPyro compiles it once for all data and runs the
    chains side by side. A Pyro program of the zoo runs as its NumPyro twin with the same weights where NumPyro is
    installed; any other Pyro program runs in Pyro's own NUTS, which is slow. Constrained latents are sampled
    unconstrained and returned in their support.

    What NUTS is given is held against the program first: the model must give each datum, called with it alone, the log
    density that it has among the others. A plate that counts the whole data set (``plate("data", N,
    subsample_size=len(x))``) multiplies it by a whole number, which is divided out.

    Discrete latents: Pyro's NUTS sums them out where the model allows for it, and the draws are then of the continuous
    ones; in NumPyro they are refused.

    Args:
        program: a trained program of either engine, with every site inside its data plate.
        data: as for :func:`~elbozoo.inference.evaluate`; some tens of data at most, each costs seconds.
        num_warmup: steps of adaptation of each chain.
        num_draws: draws of each chain, from 10 on. The guide gives ``num_chains * num_draws``.
        num_chains: from 2 on.
        oversample: draws of the guide that are weighted, for each one of NUTS. They are made twice and never held all
            at once: memory grows by their weights alone.
        seed: equal arguments give equal results.
        progress: show a progress bar.

    Returns: a :class:`GroundTruth`.
    Raises: InvalidArgument for bad data, a latent outside the data plate, discrete latents in NumPyro, and a model that
        scores a datum otherwise by itself than among others; NonFinite where NUTS finds no point of finite density,
        or a weight of the guide is nan or infinite.

    References: Hoffman & Gelman 2014 (arXiv 1111.4246), NUTS; Székely & Rizzo 2013, Energy statistics: A class of
        statistics based on distances, J. Stat. Plan. Inference 143; Vehtari, Gelman, Simpson, Carpenter & Bürkner 2021
        (arXiv 1903.08008), R-hat and effective sample size; Vehtari et al. 2024 (arXiv 1507.02646), k̂.
    """
    whole_number("num_warmup", num_warmup)
    whole_number("num_draws", num_draws, least=10)
    whole_number("num_chains", num_chains, least=2)
    whole_number("oversample", oversample)
    whole_number("seed", seed, least=0)
    began = time.perf_counter()
    arrays = prepare_to_measure(program, data)
    count = num_draws * num_chains
    guide = _guide(program, arrays, count, count * oversample, seed)
    sampler, engine = _sampler(program, num_warmup, num_draws, num_chains)
    values, statistics = _run(sampler, guide, arrays, seed, progress)
    weighted = _reweighted(program, arrays, guide, count, seed)

    lead = (num_chains, num_draws)

    def dealt(draws: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {name: draws[name].reshape(*lead, *draws[name].shape[1:]) for name in values}

    draws = {"nuts": values, "guide": dealt(guide["values"]), "weighted": dealt(weighted)}
    names, attrs = _Names(program.spec, len(arrays[0]), {}), attributes(program, num_draws, seed)
    observed = names.data(arrays, guide["predictive"])
    dims, log_weight = ("chain", "draw", "data"), guide["log_weight"]
    k_hat = pareto_k(log_weight)
    statistics_of = {
        "nuts": {name: (dims, s) for name, s in statistics.items()},
        "guide": {
            "log_weight": (dims, log_weight[:count].reshape(*lead, -1)),
            "pareto_k": (dims[2:], k_hat),
            "ess": (dims[2:], effective_draws(log_weight)),
        },
    }
    found, posterior = {}, {}
    for which, of_it in draws.items():
        variables = {"posterior": names.latents(of_it, dims[:2]), "observed_data": observed}
        if which in statistics_of:
            variables["sample_stats"] = statistics_of[which]
        origin = attrs | {"draws_of": which, "sampler": engine if which == "nuts" else "guide"}
        datasets = _datasets(variables, {}, origin)
        found[which], posterior[which] = _wrap(datasets, origin), datasets["posterior"]
    plain, corrected = (
        np.array([_distances(_flat(values, i), _flat(draws[which], i)) for i in range(len(arrays[0]))])
        for which in ("guide", "weighted")
    )
    return GroundTruth(
        **found,
        energy_distance=plain[:, 0],
        energy_floor=plain[:, 1],
        weighted_energy_distance=corrected[:, 0],
        **_mixing(posterior["nuts"], posterior["guide"], posterior["weighted"]),
        mean_error=plain[:, 2],
        weighted_mean_error=corrected[:, 2],
        divergences=statistics["diverging"].sum(axis=(0, 1)),
        k_hat=k_hat,
        num_warmup=num_warmup,
        num_draws=num_draws,
        num_chains=num_chains,
        oversample=oversample,
        sampler=engine,
        seconds=time.perf_counter() - began,
    )


def _sampler(program: Any, *sizes: int) -> tuple[Any, str]:
    """Chains on one datum, and the engine that they run in."""
    spec, weights = program.spec, program.weights
    twin = program.engine == "pyro" and all(find_spec(module) for module in ENGINES["numpyro"])
    if twin and spec is not None and weights:
        with contextlib.suppress(InvalidArgument):  # a frozen program hides weights; it runs in its own engine
            program = spec.numpyro().with_weights(weights)
    form = importlib.import_module(f"elbozoo.inference.{program.engine}_nuts")
    return form.Chains(program, *sizes), program.engine


def _draws(terms: Terms) -> dict[str, Any]:
    return {
        "values": dict(terms.values),
        "log_lik": terms.log_lik,
        "log_joint": terms.log_prior + terms.log_lik,
        "rate": {name: site.sampled_rate for name, site in terms.sites.items()},
        "joint": (terms.log_lik == terms.log_lik) * 0.0 + 1.0 * terms.joint,  # a draw's, so that it can be joined
    }


def _values(terms: Terms) -> dict[str, Any]:
    return dict(terms.values)


def _guide(program: Any, arrays: tuple[np.ndarray, ...], count: int, total: int, seed: int) -> dict[str, Any]:
    """``count`` draws of the model's latents from the guide, ``(count, N, …)``, and their log densities.

    With them the log weights of ``total`` draws, ``(total, N)``, of which these are the first.
    """
    refuse_estimate(program.outline(arrays), "ground_truth")
    num_data = len(arrays[0])
    # A run of the model alone names its latents, and their shapes without dims that Pyro adds.
    prior = program.predict(arrays, seed=call_seed(seed, _SHAPES, 0), prior=True)
    kept, log_weight = [], []
    for first, out in _calls(program, _draws, arrays, total, seed):
        if out["log_lik"].ndim < 2 or out["joint"].any():
            todo = "Move every site into the data plate; a latent that all data share has no posterior of one datum"
            raise must("program", "have every latent inside its data plate", "one that is not", todo)
        check_plate(out["log_lik"], num_data)
        log_weight.append(weigh(out["log_lik"], out["rate"]))
        if first < count:
            kept.append(out)
    drawn, shapes = _join(kept, count), {}
    for name, z in prior["latent"].items():
        if z.shape[1:2] != (num_data,):
            todo = "Put other plates to the right of the data plate, or into event dims"
            got = f"shape {z.shape[1:]} for {num_data} data"
            raise must(f"site '{name}'", "have the data along its first dim", got, todo)
        shapes[name] = z.shape[1:]
    return {
        "values": {name: drawn["values"][name].reshape(count, *shape) for name, shape in shapes.items()},
        "log_weight": np.concatenate(log_weight)[:total],
        "log_joint": drawn["log_joint"],
        "predictive": prior["observed"],
    }


def _calls(
    program: Any, fn: Callable[[Terms], Any], arrays: tuple[np.ndarray, ...], total: int, seed: int
) -> Iterator[tuple[int, Any]]:
    """``fn`` of ``total`` draws or a few more, some at a time, with the first one's index: the same every time."""
    _, chunk = call_size(arrays, total, len(arrays[0]))
    for call, first in enumerate(range(0, total, chunk)):
        yield first, program.apply(fn, arrays, num_particles=chunk, seed=call_seed(seed, _GUIDE, call))


def _reweighted(
    program: Any, arrays: tuple[np.ndarray, ...], guide: Mapping[str, Any], count: int, seed: int
) -> dict[str, np.ndarray]:
    """``count`` of the guide's draws, resampled by smoothed weights for each datum by itself, ``(count, N, …)``."""
    log_weight = guide["log_weight"]
    possible = np.isfinite(log_weight.max(axis=0))  # else no draw is better than another
    smooth = pareto_smooth(np.where(possible, log_weight, 0.0))
    chosen = resampled(smooth, np.random.default_rng([seed, _RESAMPLE]), count)
    picked = {name: np.empty_like(z) for name, z in guide["values"].items()}
    for first, values in _calls(program, _values, arrays, len(log_weight), seed):
        size = len(next(iter(values.values())))
        at, datum = np.nonzero((first <= chosen) & (chosen < first + size))
        for name, z in picked.items():
            z[at, datum] = values[name].reshape(size, *z.shape[1:])[chosen[at, datum] - first, datum]
    return picked


def _run(
    sampler: Any, guide: Mapping[str, Any], arrays: tuple[np.ndarray, ...], seed: int, progress: bool
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """NUTS's draws by site, ``(chains, draws, N, …)``, and its statistics, ``(chains, draws, N)``."""
    if not sampler.sums_discrete:
        for name, z in guide["values"].items():
            if z.dtype.kind != "f":
                todo = (
                    "Sum it out in the model (MixtureSameFamily), or write the program in Pyro, whose NUTS sums it out"
                )
                raise must(f"site '{name}'", "be continuous for NUTS in NumPyro", f"values of {z.dtype}", todo)
    out: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []
    num_data = len(arrays[0])
    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("NUTS", total=num_data)
        for i in range(num_data):
            args = tuple(a[i : i + 1] for a in arrays)
            scale = _count(sampler, guide, args, i)
            values, statistics = sampler.run(args, call_seed(seed, _NUTS, i), 1.0 / scale)
            # NumPyro hands out deterministic sites too, and each library has its own order.
            values = {name: values[name] for name in guide["values"] if name in values}
            _check(values, {name: z.shape[2:] for name, z in guide["values"].items()}, i)
            if not np.isfinite(statistics.get("lp", 0.0)).all():
                got = f"log density {statistics['lp'][~np.isfinite(statistics['lp'])][0]}"
                raise must(f"NUTS at datum {i}", "find latents of finite density", got, _LOOK, NonFinite)
            out.append((values, statistics))
            bar.advance(task)
    values = {name: np.concatenate([v[name] for v, _ in out], axis=2) for name in out[0][0]}
    return values, {name: np.stack([s[name] for _, s in out], axis=2) for name in out[0][1]}


def _count(sampler: Any, guide: Mapping[str, Any], args: tuple[np.ndarray, ...], i: int) -> int:
    """By which whole number the model multiplies the log density of datum i when it is called with it alone."""
    latents = {name: z[:_CHECKED, i : i + 1] for name, z in guide["values"].items()}
    alone = sampler.program.log_density(latents, args).astype(np.float64)
    among = guide["log_joint"][:_CHECKED, i]
    tolerance = max(1e-6, 1e3 * float(np.finfo(among.dtype).eps))
    among = among.astype(np.float64)
    if np.allclose(alone, among, rtol=tolerance, atol=tolerance):
        return 1
    with np.errstate(divide="ignore", invalid="ignore"):
        count = int(np.nan_to_num(np.rint(alone / among), nan=0.0, posinf=0.0, neginf=0.0)[0])
    if count < 2 or not np.allclose(alone, count * among, rtol=tolerance, atol=tolerance):
        got = f"{alone[0]:.6g} nats for log p(x, z) alone and {among[0]:.6g} among them, at datum {i}"
        todo = "Put modules into evaluation mode (no batch statistics), and give no datum a parameter of its own"
        raise must("model", "score a datum by itself as it does among others", got, todo)
    return count


def _check(values: Mapping[str, np.ndarray], events: Mapping[str, tuple[int, ...]], i: int) -> None:
    """NUTS's draws of datum i, ``(chains, draws, 1, …)``, hold every continuous latent once, finite."""
    if not values:
        raise must("model", "have a continuous latent", "none", "A discrete one's posterior can be enumerated")
    for name, z in values.items():
        if z.shape[2:] != (1, *events[name]):
            todo = "Sum the discrete one out in the model (MixtureSameFamily)"
            got = f"one value for each of another's: shape {z.shape[2:]} for {(1, *events[name])}"
            raise must(f"site '{name}'", "not depend on a discrete latent that NUTS sums out", got, todo)
        if not np.isfinite(z).all():
            raise must(f"NUTS at datum {i}", "stay at finite latents", f"nan or infinity at '{name}'", _LOOK, NonFinite)


# --- the comparison ---------------------------------------------------------------------------------------------


def _mixing(nuts: Any, guide: Any, weighted: Any) -> dict[str, dict[str, np.ndarray]]:
    """R-hat across NUTS and each of the others, NUTS's own, and its effective sample size, each ``(N, D)`` by site."""
    import arviz  # here, for these take seconds
    import xarray

    chains = nuts.sizes["chain"]

    def with_nuts(other: Any) -> Any:
        return xarray.concat([nuts, other.assign_coords(chain=np.arange(chains, 2 * chains))], dim="chain")

    found = {
        "r_hat": arviz.rhat(with_nuts(guide)),
        "weighted_r_hat": arviz.rhat(with_nuts(weighted)),
        "nuts_r_hat": arviz.rhat(nuts),
        "nuts_ess": arviz.ess(nuts),
    }
    sites = [str(site) for site in nuts.data_vars]
    return {name: {site: _per_dimension(dataset[site].values) for site in sites} for name, dataset in found.items()}


def _per_dimension(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).astype(np.float64)


def _flat(values: Mapping[str, np.ndarray], i: int) -> np.ndarray:
    """All latents of datum i side by side, ``(chains, draws, D)``, float64."""
    return np.concatenate([z[:, :, i].reshape(*z.shape[:2], -1) for z in values.values()], axis=2).astype(np.float64)


def _distances(nuts: Float[np.ndarray, "C S D"], guide: Float[np.ndarray, "C S D"]) -> tuple[float, float, float]:
    """The energy distance and its floor, as shares of ``2 E|Z - Z'|``, and the mean's largest error, in NUTS's unit."""
    flat = nuts.reshape(-1, nuts.shape[-1])
    scale = flat.std(axis=0)
    unit = np.where(scale > 0, scale, 1.0)
    x, y = flat / unit, guide.reshape(flat.shape) / unit
    across, within = 2 * _mean_distance(x, y), _mean_distance(x, x)
    halves = np.stack(np.array_split(nuts / unit, [nuts.shape[1] // 2, nuts.shape[1] // 2 * 2], axis=1)[:2])
    blocks = halves.reshape(-1, *halves.shape[2:])  # 2 C half chains
    own = float(np.mean([_mean_distance(block, block) for block in blocks]))
    even = blocks.reshape(-1, flat.shape[1])
    all_pairs = within if len(even) == len(flat) else _mean_distance(even, even)
    count = len(blocks)
    other = (count * all_pairs - own) / (count - 1)  # mean distance between draws of two different half chains
    # The mean over all ways to deal the half chains to two hands, C each: 2 E|Z - Z'| less twice the mean in a hand.
    floor = (other - own) * 2 / (count / 2)
    if across == 0.0:
        return 0.0, 0.0, 0.0
    distance = (across - within - _mean_distance(y, y)) / across
    mean_error = float(np.abs(x.mean(axis=0) - y.mean(axis=0)).max())
    return distance, floor / (2 * other) if other > 0 else 0.0, mean_error


def energy_distance(x: Float[np.ndarray, "n D"], y: Float[np.ndarray, "m D"]) -> float:
    r"""The (squared) energy distance between two sets of draws.

    .. math:: 2 E|X - Y| - E|X - X'| - E|Y - Y'|

    with Euclidean distances and every mean over all pairs, a draw with itself among them: the V-statistic, which is the
    distance between the two empirical distributions. So it is never negative, 0 for equal sets only, and for finite
    samples high by about :math:`E|X - X'| / n + E|Y - Y'| / m`.

    Shapes: ``x`` (n, D), ``y`` (m, D).

    References: Székely & Rizzo 2013, Energy statistics, J. Stat. Plan. Inference 143.
    """
    return 2 * _mean_distance(x, y) - _mean_distance(x, x) - _mean_distance(y, y)


def _mean_distance(x: np.ndarray, y: np.ndarray) -> float:
    """The mean Euclidean distance over all pairs, some rows at a time."""
    from scipy.spatial.distance import cdist  # here, for it takes half a second

    total = sum(float(cdist(x[start : start + _ROWS], y).sum()) for start in range(0, len(x), _ROWS))
    return total / (len(x) * len(y))
