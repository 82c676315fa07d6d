r"""The guide against the truth: NUTS on the posterior of each datum, its draws beside the guide's."""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import xarray
from jaxtyping import Bool, Float, Int
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from scipy.spatial.distance import cdist

from elbozoo.inference.data import prepare
from elbozoo.inference.errors import InvalidArgument, NonFinite, must
from elbozoo.inference.evaluation import call_seed, call_size, check_plate, weigh
from elbozoo.inference.parts import ENGINES, number, whole_number
from elbozoo.inference.posterior import _datasets, _gather, _Names, _wrap, attributes, effective_draws
from elbozoo.inference.psis import LARGE_K, pareto_k
from elbozoo.inference.terms import Terms

_GUIDE, _NUTS, _SHAPES = range(3)  # streams of random numbers
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
            ``log_weight`` of each draw, and per datum ``pareto_k`` and ``ess`` of those weights.
        energy_distance: the energy distance between the two sets of draws, as a share of ``2 E|Z - Z'|`` (Z from one
            set, Z' from the other), so from 0 (the sets are equal) to 1, in the coordinates in which NUTS's draws have
            unit variance in each dimension. Means that differ by d standard deviations in every dimension give about
            ``d²/4``. It is the V-statistic (:func:`energy_distance`), so high by about ``1/n`` for n independent draws.
        energy_floor: the same between two halves of NUTS's own draws, on average over the ways to deal each chain's
            first and second half to one or the other: what the draws can tell apart. Two sets of *all* draws
            from one distribution come out at half of it on average, or below.
        r_hat: by site, ``(N, D)``: rank-normalised split R-hat over NUTS's chains and the guide's together.
        nuts_r_hat, nuts_ess: by site, ``(N, D)``: R-hat and bulk effective sample size of NUTS's chains alone.
        divergences: NUTS's divergent transitions after warm-up.
        k_hat: Pareto k̂ of the guide's importance weights ``p(x, z) / q(z | x)``.
        num_warmup, num_draws, num_chains: of NUTS; draws are a chain's.
        sampler: whose NUTS ran, ``"numpyro"`` or ``"pyro"``.
        seconds: wall time.
    """

    nuts: Any = field(repr=False)
    guide: Any = field(repr=False)
    energy_distance: PerDatum
    energy_floor: PerDatum
    r_hat: PerDimension
    nuts_r_hat: PerDimension
    nuts_ess: PerDimension
    divergences: Int[np.ndarray, " N"]
    k_hat: PerDatum
    num_warmup: int
    num_draws: int
    num_chains: int
    sampler: str
    seconds: float

    @property
    def num_data(self) -> int:
        """N."""
        return len(self.k_hat)

    def agree(self, *, energy: float = 0.02, r_hat: float = 1.05) -> Bool[np.ndarray, " N"]:
        r"""For which data guide and NUTS agree, ``(N,)``.

        The rule: the energy distance is at most ``energy``, or at most its floor where that is above ``energy``; and
        R-hat across the two is at most ``r_hat`` in every dimension. It is about the size of the difference
        and not about its significance, which any guide but the exact one reaches with draws enough. By default, means
        may differ by 0.28 posterior standard deviations in every dimension (0.02 = 0.28² / 4) or by 0.6 in one of many.

        It says little of data where NUTS itself has not :attr:`converged`.

        Raises: InvalidArgument unless ``energy`` is between 0 and 1 and ``r_hat`` above 1.
        """
        number("energy", energy, lambda v: 0 <= v <= 1, "lie in [0, 1]", "Pass 0.02, say")
        number("r_hat", r_hat, lambda v: v > 1, "be finite and above 1", "Pass 1.05, say")
        near = self.energy_distance <= np.maximum(self.energy_floor, energy)
        return near & (_worst(self.r_hat) <= r_hat)

    @property
    def converged(self) -> Bool[np.ndarray, " N"]:
        """For which data NUTS can be taken for the truth: no R-hat above 1.05, no effective sample size below 100."""
        return (_worst(self.nuts_r_hat) <= 1.05) & (-_worst({n: -ess for n, ess in self.nuts_ess.items()}) >= 100)

    @property
    def verdict(self) -> list[str]:
        """What it comes to, in words with figures."""
        agree, well, n = self.agree(), self.k_hat <= LARGE_K, self.num_data
        said = [
            f"Guide and NUTS agree for {agree.sum()} of {n} data: {(agree & well).sum()} of the {well.sum()} whose k̂ "
            f"is at most {LARGE_K}, {(agree & ~well).sum()} of the other {(~well).sum()}."
        ]
        if not self.converged.all():
            which = ", ".join(str(i) for i in np.flatnonzero(~self.converged))
            said.append(f"NUTS has not converged for {(~self.converged).sum()} of them ({which}): draw more there.")
        if self.divergences.any():
            said.append(f"NUTS diverged {self.divergences.sum()} times, for {(self.divergences > 0).sum()} data.")
        return said

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON; None where a number does not exist."""
        agree = self.agree()
        found: dict[str, Any] = {
            "num_data": self.num_data,
            "num_warmup": self.num_warmup,
            "num_draws": self.num_draws,
            "num_chains": self.num_chains,
            "agree": int(agree.sum()),
            "energy_distance_median": float(np.median(self.energy_distance)),
            "energy_distance_max": float(self.energy_distance.max()),
            "energy_floor_median": float(np.median(self.energy_floor)),
            "r_hat_max": float(_worst(self.r_hat).max()),
            "nuts_converged": int(self.converged.sum()),
            "nuts_r_hat_max": float(_worst(self.nuts_r_hat).max()),
            "nuts_ess_min": float(-_worst({n: -ess for n, ess in self.nuts_ess.items()}).max()),
            "divergences": int(self.divergences.sum()),
            "k_hat_max": float(self.k_hat.max()),
            "k_hat_bad": float(np.mean(self.k_hat > LARGE_K)),
            "agree_where_k_hat_good": int((agree & (self.k_hat <= LARGE_K)).sum()),
            "sampler": self.sampler,
            "seconds": self.seconds,
        }
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in found.items()}

    def __rich__(self) -> Table:
        title = f"The guide against NUTS: {self.num_data} data, {self.num_chains} × {self.num_draws} draws of each"
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(("datum", "agree", "energy distance", "floor", "R-hat", "NUTS's R-hat", "ESS", "k̂")):
            table.add_column(name, justify="right" if i else "left")
        ess = -_worst({n: -e for n, e in self.nuts_ess.items()})
        columns = (
            self.energy_distance,
            self.energy_floor,
            _worst(self.r_hat),
            _worst(self.nuts_r_hat),
            ess,
            self.k_hat,
        )
        formats = (".4f", ".4f", ".3f", ".3f", ".0f", ".2f")
        for i, agree in enumerate(self.agree()):
            cells = [format(column[i], spec) for column, spec in zip(columns, formats, strict=True)]
            table.add_row(str(i), "yes" if agree else "no", *cells)
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
    seed: int = 0,
    progress: bool = False,
) -> GroundTruth:
    r"""The posterior ``p(z | x_n)`` of each datum by NUTS, the weights fixed, beside the guide's draws.

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
    whole_number("seed", seed, least=0)
    began = time.perf_counter()
    arrays = prepare(program, data)
    guide = _guide(program, arrays, num_draws * num_chains, seed)
    sampler, engine = _sampler(program, num_warmup, num_draws, num_chains)
    values, statistics = _run(sampler, guide, arrays, seed, progress)

    lead = (num_chains, num_draws)
    by_guide = {name: guide["values"][name].reshape(*lead, *guide["values"][name].shape[1:]) for name in values}
    names, attrs = _Names(program.spec, len(arrays[0]), {}), attributes(program, num_draws, seed)
    observed = names.data(arrays, guide["predictive"])
    dims, log_weight = ("chain", "draw", "data"), guide["log_weight"]
    groups = {
        "nuts": (values, {name: (dims, s) for name, s in statistics.items()}),
        "guide": (
            by_guide,
            {
                "log_weight": (dims, log_weight.reshape(*lead, -1)),
                "pareto_k": (dims[2:], pareto_k(log_weight)),
                "ess": (dims[2:], effective_draws(log_weight)),
            },
        ),
    }
    found, posterior = {}, {}
    for which, (draws, stats) in groups.items():
        variables = {
            "posterior": names.latents(draws, dims[:2]), "sample_stats": stats, "observed_data": observed
        }  # fmt: skip
        origin = attrs | {"draws_of": which, "sampler": engine if which == "nuts" else "guide"}
        datasets = _datasets(variables, {}, origin)
        found[which], posterior[which] = _wrap(datasets, origin), datasets["posterior"]
    distances = np.array([_distances(_flat(values, i), _flat(by_guide, i)) for i in range(len(arrays[0]))])
    return GroundTruth(
        **found,
        energy_distance=distances[:, 0],
        energy_floor=distances[:, 1],
        **_mixing(posterior["nuts"], posterior["guide"]),
        divergences=statistics["diverging"].sum(axis=(0, 1)),
        k_hat=pareto_k(log_weight),
        num_warmup=num_warmup,
        num_draws=num_draws,
        num_chains=num_chains,
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


def _guide(program: Any, arrays: tuple[np.ndarray, ...], count: int, seed: int) -> dict[str, Any]:
    """``count`` draws of the model's latents from the guide, ``(count, N, …)``, their log weights and densities."""
    num_data = len(arrays[0])
    _, chunk = call_size(arrays, count, num_data)
    # A run of the model alone names its latents, and their shapes without dims that Pyro adds.
    prior = program.predict(arrays, seed=call_seed(seed, _SHAPES, 0), prior=True)
    drawn = _gather(
        lambda size, call: program.apply(_draws, arrays, num_particles=size, seed=call), count, chunk, seed, _GUIDE
    )
    if drawn["log_lik"].ndim < 2 or drawn["joint"].any():
        todo = "Move every site into the data plate; a latent that all data share has no posterior of one datum"
        raise must("program", "have every latent inside its data plate", "one that is not", todo)
    check_plate(drawn["log_lik"], num_data)
    values = {}
    for name, z in prior["latent"].items():
        if z.shape[1:2] != (num_data,):
            todo = "Put other plates to the right of the data plate, or into event dims"
            got = f"shape {z.shape[1:]} for {num_data} data"
            raise must(f"site '{name}'", "have the data along its first dim", got, todo)
        values[name] = drawn["values"][name].reshape(count, *z.shape[1:])
    log_weight = weigh(drawn["log_lik"], drawn["rate"])
    return {
        "values": values,
        "log_weight": log_weight,
        "log_joint": drawn["log_joint"],
        "predictive": prior["observed"],
    }


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


def _mixing(nuts: xarray.Dataset, guide: xarray.Dataset) -> dict[str, dict[str, np.ndarray]]:
    """R-hat across the two, and NUTS's own R-hat and effective sample size, each ``(N, D)`` by site."""
    import arviz  # here, for it takes seconds

    chains = nuts.sizes["chain"]
    further = guide.assign_coords(chain=np.arange(chains, 2 * chains))
    found = {
        "r_hat": arviz.rhat(xarray.concat([nuts, further], dim="chain")),
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


def _distances(nuts: Float[np.ndarray, "C S D"], guide: Float[np.ndarray, "C S D"]) -> tuple[float, float]:
    """The energy distance and its floor, as shares of ``2 E|Z - Z'|``, in NUTS's units."""
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
        return 0.0, 0.0
    return (across - within - _mean_distance(y, y)) / across, floor / (2 * other) if other > 0 else 0.0


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
    total = sum(float(cdist(x[start : start + _ROWS], y).sum()) for start in range(0, len(x), _ROWS))
    return total / (len(x) * len(y))
