"""Every estimator's mean gradient against the exact gradient of its bound's expectation, in both engines.

Exact: Gauss–Hermite quadrature or enumeration in NumPy, differentiated by central differences (``oracles.py``).
Estimated: the drop-in ``Loss`` of each engine on ``DRAWS`` independent gradients, in Pyro on as many of them as have the
power. A row passes when every component agrees within 4.5 standard errors, and only if it had the power to fail: a bias
of ``LIMIT`` of the gradient's norm (the model's and the guide's parameters apart) on any single component is at least
that threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import oracles
import pytest
from covering import EVERY_ROW
from oracles import (
    BINARY_LAYERS,
    BOTTOM_UP,
    CONTINUOUS_FIRST,
    DISCRETE,
    DISCRETE_FIRST,
    LADDER,
    ONE_HOT,
    ONE_SITE,
    TOP_DOWN,
    Toy,
)
from scipy import stats

from elbozoo.inference.discrete import ARM, REBAR, RELAX, DisARM, Enumerate
from elbozoo.inference.errors import InvalidArgument, Refused
from elbozoo.inference.gradients import NVIL, STL, DReG, Pathwise, ScoreFunction, leave_one_out
from elbozoo.inference.objectives import CIWAE, ELBO, IWAE, MIWAE, PIWAE, TVO, Objective, Renyi
from elbozoo.inference.shapes import Beta

DRAWS = 200_000
PARTS = 8
"""Of the draws, at most."""
SIGMAS = 4.5
LIMIT = {"REBAR": 0.06, "RELAX": 0.06, "Score": 0.04, "ARM": 0.04, "NVIL": 0.04, "": 0.025}

SCORE = ScoreFunction(pathwise_where_possible=False)
MIXED = ScoreFunction()
TVO_3 = oracles.tvo(oracles.log_spaced(3, 0.025))


@dataclass(frozen=True)
class Row:
    """An objective and the expectation whose gradient its estimator must follow: bound, K and weight on the rate."""

    objective: Objective
    bound: Any
    num_particles: int
    beta: float = 1.0
    model: tuple[Any, int] | None = None  # where the model's parameters climb another bound

    def __str__(self) -> str:
        inner = getattr(self.objective, "objective", self.objective)
        gradient = type(inner.gradient).__name__ + ("-all" if inner.gradient == SCORE else "")
        shape = "" if inner is self.objective else f"-beta{self.beta}"
        gradient += (
            f"-{inner.gradient.baseline}"
            if getattr(inner.gradient, "baseline", "leave-one-out") != "leave-one-out"
            else ""
        )
        gradient += "-adapted" if getattr(inner.gradient, "adapt", False) else ""
        analytic = "-analytic" if inner.uses_analytic_kl else ""
        return f"{type(inner).__name__}{inner.num_particles}{analytic}-{gradient}{shape}"


def _bounds(gradient: Any) -> list[Row]:
    return [
        Row(ELBO(2, gradient, analytic_kl=False), oracles.elbo, 1),
        Row(IWAE(2, gradient), oracles.iwae, 2),
        Row(Renyi(0.3, 2, gradient), oracles.renyi(0.3), 2),
        Row(CIWAE(0.3, 2, gradient), oracles.ciwae(0.3), 2),
        Row(TVO(3, 2, gradient=gradient), TVO_3, 2),
        Row(MIWAE(2, 2, gradient), oracles.iwae, 2),  # groups are independent: the mean bound is one group's
        Row(PIWAE(2, 2, gradient), oracles.iwae, 2, model=(oracles.iwae, 4)),
        Row(Beta(IWAE(2, gradient), 0.5), oracles.iwae, 2, beta=0.5),
    ]


_GAUSSIAN = [
    Row(ELBO(), oracles.elbo, 1),
    Row(ELBO(2, STL()), oracles.elbo, 1),
    Row(ELBO(2, SCORE), oracles.elbo, 1),
    Row(IWAE(2), oracles.iwae, 2),
    Row(IWAE(2, DReG()), oracles.iwae, 2),
    Row(IWAE(2, SCORE), oracles.iwae, 2),
    Row(TVO(3, 2, gradient=DReG()), TVO_3, 2),
    Row(Beta(IWAE(2, DReG()), 0.5), oracles.iwae, 2, beta=0.5),
]
_SCORED = [
    Row(ELBO(gradient=SCORE), oracles.elbo, 1),  # a single particle has no baseline
    Row(ELBO(2, MIXED), oracles.elbo, 1),
    Row(IWAE(2, SCORE), oracles.iwae, 2),
    Row(IWAE(2, MIXED), oracles.iwae, 2),
    Row(TVO(3, 2, gradient=MIXED), TVO_3, 2),
    Row(PIWAE(2, 2, MIXED), oracles.iwae, 2, model=(oracles.iwae, 4)),
    Row(Beta(IWAE(2, MIXED), 0.5), oracles.iwae, 2, beta=0.5),
    Row(ELBO(gradient=ScoreFunction(baseline="none")), oracles.elbo, 1),
    Row(IWAE(2, ScoreFunction(baseline="running-mean")), oracles.iwae, 2),
    Row(IWAE(2, NVIL(baseline_units=3)), oracles.iwae, 2),
]
_BERNOULLI = [
    Row(ELBO(gradient=DisARM()), oracles.elbo, 1),
    Row(ELBO(2, DisARM(), analytic_kl=False), oracles.elbo, 1),
    Row(IWAE(2, DisARM()), oracles.iwae, 2),
    Row(IWAE(2, ARM()), oracles.iwae, 2),
    Row(ELBO(gradient=REBAR()), oracles.elbo, 1),
    Row(IWAE(2, REBAR(0.3, 0.8)), oracles.iwae, 2),
    Row(IWAE(2, REBAR(adapt=True)), oracles.iwae, 2),
    Row(ELBO(gradient=RELAX(network_units=3)), oracles.elbo, 1),
    Row(IWAE(2, RELAX(network_units=3)), oracles.iwae, 2),
    Row(ELBO(gradient=Enumerate()), oracles.elbo, 1),
    Row(Beta(IWAE(2, DisARM()), 0.5), oracles.iwae, 2, beta=0.5),
]


@dataclass(frozen=True)
class Table:
    toy: Toy
    rows: list[Row]
    biased: list[Row] = field(default_factory=list)
    num_nodes: dict[int, int] = field(default_factory=dict)  # nodes a dimension, by K
    numpyro: Literal["all", "first", "last", "none"] = "last"


TABLES = [
    Table(
        ONE_SITE,
        [Row(ELBO(), oracles.elbo, 1), Row(ELBO(2, STL()), oracles.elbo, 1), *_bounds(Pathwise()), *_bounds(DReG()), *_bounds(SCORE)],
        [Row(IWAE(2, STL()), oracles.iwae, 2), Row(Renyi(0.3, 2, STL()), oracles.renyi(0.3), 2)],
        {1: 40, 2: 40, 4: 16},
        "all",
    ),
    Table(TOP_DOWN, _GAUSSIAN, [Row(IWAE(2, STL()), oracles.iwae, 2)], {1: 30, 2: 16}),
    Table(BOTTOM_UP, [_GAUSSIAN[i] for i in (0, 1, 2, 4)], [Row(IWAE(2, STL()), oracles.iwae, 2)], {1: 30, 2: 16}),
    Table(LADDER, _GAUSSIAN[:6], [], {1: 16, 2: 8}),
    Table(DISCRETE, [*_SCORED, Row(ELBO(2, Enumerate()), oracles.elbo, 1)], [], {1: 1, 2: 1, 4: 1}),
    Table(ONE_HOT, [*_SCORED[1:3], *_BERNOULLI[4:10]], [], {1: 1, 2: 1}),
    Table(DISCRETE_FIRST, [*_SCORED[1:4], *_BERNOULLI], [], {1: 40, 2: 24, 4: 10}, "none"),
    Table(CONTINUOUS_FIRST, [*_SCORED[1:], *_BERNOULLI], [], {1: 40, 2: 24, 4: 10}),
    Table(BINARY_LAYERS, [*_SCORED[:4], *_BERNOULLI], [], {1: 1, 2: 1, 4: 1}, "first"),
]  # fmt: skip


def rows_of(engine: str, table: Table) -> list[Row]:
    """Every row in Pyro. NumPyro compiles each, so there each estimator meets one bound a table, the first or the last of
    its rows; one table has all but the bounds that differ in their formula alone, and one none, where what is discrete comes
    first as it does in others.
    """
    rows = [*table.rows, *table.biased]
    if engine == "pyro" or EVERY_ROW:
        return rows
    if table.numpyro == "none":
        return []
    if table.numpyro != "all":
        ordered = rows if table.numpyro == "last" else rows[::-1]
        chosen = {(type(g), getattr(g, "adapt", False)): r for r in ordered for g in [gradient_in(r)]}
        return [r for r in rows if r in chosen.values()]
    formula = (Renyi, CIWAE, MIWAE, TVO)
    return [r for r in rows if type(r.objective) not in formula or r.objective == TVO(3, 2, gradient=DReG())]


def gradient_in(row: Row) -> Any:
    """The row's estimator."""
    return getattr(row.objective, "objective", row.objective).gradient


Estimate = dict[str, tuple[float, float]]
"""Mean and standard error of a gradient's components."""


def estimated(engine: str, table: int, row: Row) -> Estimate:
    return together(table)[str(row)] if engine == "numpyro" else in_parts(table, row)


@cache
def together(table: int) -> dict[str, Estimate]:
    """In NumPyro, which compiles the rows of a table as one program."""
    rows = rows_of("numpyro", TABLES[table])
    found = oracles.estimates("numpyro", TABLES[table].toy, [row.objective for row in rows], DRAWS, seed=1)
    return {str(row): estimate for row, estimate in zip(rows, found, strict=True)}


def in_parts(table: int, row: Row) -> Estimate:
    """In Pyro: a part of the draws after another, until their standard errors, whatever their means, have ample power."""
    parts: list[Estimate] = []
    while len(parts) < PARTS:
        parts += oracles.estimates("pyro", TABLES[table].toy, [row.objective], DRAWS // PARTS, seed=len(parts))
        means, errors = ({n: np.array([part[n][i] for part in parts]) for n in parts[0]} for i in (0, 1))
        found = {n: (float(means[n].mean()), float(np.sqrt((errors[n] ** 2).sum()) / len(parts))) for n in means}
        if not EVERY_ROW and row not in TABLES[table].biased and has_power(table, row, found, SIGMAS + 2):
            break
    return found


def has_power(table: int, row: Row, estimate: Estimate, sigmas: float = SIGMAS) -> bool:
    """Whether a bias of the limit on any component is so many standard errors: at two more than SIGMAS, 98% are seen."""
    norm = norms(TABLES[table].toy, exact_gradient(table, row))
    return all(sigmas * estimate[n][1] < limit_of(row) * norm[n] for n in set(norm) & set(estimate))


def limit_of(row: Row) -> float:
    return next(share for kind, share in LIMIT.items() if kind in str(row))


@cache
def exact(table: int, bound: Any, num_particles: int, beta: float, extra_nodes: int = 0) -> dict[str, float]:
    toy, num = TABLES[table].toy, TABLES[table].num_nodes[num_particles] + extra_nodes
    return toy.gradient(bound, num_particles, num, list(toy.params), beta)


def exact_gradient(table: int, row: Row) -> dict[str, float]:
    toy = TABLES[table].toy
    guide = exact(table, row.bound, row.num_particles, row.beta)
    model = guide if row.model is None else exact(table, *row.model, row.beta)
    return {n: (guide if n in toy.guide_names else model)[n] for n in toy.params}


def norms(toy: Toy, gradient: dict[str, float]) -> dict[str, float]:
    """The Euclidean norm of the group of parameters that each name belongs to."""
    groups = (toy.guide_names, toy.model_names)
    return {n: float(np.linalg.norm([gradient[m] for m in group])) for group in groups for n in group}


def cases(kind: str) -> list[Any]:
    return [
        pytest.param(engine, t, row, id=f"{engine}-{table.toy.name.replace(' ', '-').replace(',', '')}-{row}")
        for engine in ("numpyro", "pyro")
        for t, table in enumerate(TABLES)
        for row in rows_of(engine, table)
        if row in getattr(table, kind)
    ]


@pytest.mark.parametrize(("engine", "table", "row"), cases("rows"))
def test_unbiased(engine: str, table: int, row: Row) -> None:
    toy = TABLES[table].toy
    truth, estimate = exact_gradient(table, row), estimated(engine, table, row)
    assert set(estimate) == set(toy.params), "every parameter must get a gradient"
    for name, (mean, error) in estimate.items():
        assert abs(mean - truth[name]) < SIGMAS * error + 1e-7, f"{name}: {mean} ± {error}, exactly {truth[name]}"
    assert has_power(table, row, estimate), f"no power: {estimate} for {truth}"


@pytest.mark.parametrize(("engine", "table", "row"), cases("biased"))
def test_sticking_the_landing_is_biased_beyond_the_elbo(engine: str, table: int, row: Row) -> None:
    """Documented, not hidden: it estimates the derivative with log q held, and that is another gradient."""
    toy = TABLES[table].toy
    truth, estimate = exact_gradient(table, row), estimated(engine, table, row)
    stl = toy.stl_gradient(row.bound, 2, TABLES[table].num_nodes[2])
    for name in toy.guide_names:
        mean, error = estimate[name]
        assert abs(mean - stl[name]) < SIGMAS * error + 1e-7
    off = max(abs(estimate[n][0] - truth[n]) / estimate[n][1] for n in toy.guide_names)
    assert off > 20, "its bias should be plain here"
    for name in toy.model_names:
        mean, error = estimate[name]
        assert abs(mean - truth[name]) < SIGMAS * error + 1e-7, "the model's gradient is unbiased all the same"


@pytest.mark.parametrize("table", range(len(TABLES)), ids=[t.toy.name for t in TABLES])
def test_quadrature_has_converged(table: int) -> None:
    seen = {(row.bound, row.num_particles, row.beta) for row in TABLES[table].rows}
    seen |= {(*row.model, row.beta) for row in TABLES[table].rows if row.model}
    for bound, num_particles, beta in seen:
        truth = exact(table, bound, num_particles, beta)
        finer = exact(table, bound, num_particles, beta, extra_nodes=3)
        # the smallest standard error in these tables is some 2e-5, of a component of size one
        assert max(abs(truth[n] - finer[n]) for n in truth) < 2e-4


@pytest.mark.parametrize("engine", ["numpyro", "pyro"])
def test_piwae_gives_each_side_its_own_bound(engine: str) -> None:
    """Draw by draw: the model's gradient is IWAE's, the guide's is MIWAE's, from the same particles."""
    objectives = [IWAE(6), MIWAE(3, 2), PIWAE(3, 2)]
    rows = oracles.estimates(engine, ONE_SITE, objectives, 50, seed=7)
    iwae, miwae, piwae = ({n: mean for n, (mean, _) in row.items()} for row in rows)
    for name in ONE_SITE.params:
        same, other = (miwae, iwae) if name in ONE_SITE.guide_names else (iwae, miwae)
        assert piwae[name] == pytest.approx(same[name], rel=1e-10)
        assert abs(piwae[name] - other[name]) > 1e-4


def _snr_toy() -> Toy:
    """``z ~ N(m, 1)``, ``x | z ~ N(z, 1)``, ``q = N(b, 2/3)`` near the optimum (Rainforth et al. 2018), one dimension of it."""

    def program(lib: Any, p: Any, size: int) -> tuple[Any, Any]:
        def model(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                z = lib.sample("z", lib.dist.Normal(p("m"), 1.0))
                lib.sample("x", lib.dist.Normal(z, 1.0), obs=x)

        def guide(x: Any) -> None:
            with lib.plate("data", size, dim=-1):
                lib.sample("z", lib.dist.Normal(p("qb"), (2 / 3) ** 0.5))

        return model, guide

    return Toy("signal to noise", {"m": 0.2, "qb": 0.75}, 0.8, program, lambda p, q, num: None)  # posterior mean 0.5


@pytest.mark.parametrize("engine", ["numpyro", "pyro"])
def test_signal_to_noise_laws(engine: str) -> None:
    """Rainforth et al. 2018, theorem 1; Tucker et al. 2019: in K, the guide's ratio falls as K^-1/2, the model's rises as
    K^1/2, and with DReG the guide's does not fall (its mean is O(1/K), its spread O(K^-3/2))."""
    ks = np.array([16, 64, 256])
    plain, model, dreg = [], [], []
    for k in ks:
        draws = 1_000_000 // int(k)
        pathwise, doubly = oracles.estimates(engine, _snr_toy(), [IWAE(int(k)), IWAE(int(k), DReG())], draws, seed=2)
        root = draws**0.5
        signal = doubly["qb"][0]  # unbiased, and the less noisy of the two
        plain.append(abs(signal) / (pathwise["qb"][1] * root))
        dreg.append(abs(signal) / (doubly["qb"][1] * root))
        model.append(abs(pathwise["m"][0]) / (pathwise["m"][1] * root))
        assert doubly["qb"][1] < 0.03 * abs(signal)

    def slope(ratios: list[float]) -> float:
        return float(np.polyfit(np.log(ks), np.log(ratios), 1)[0])

    assert slope(plain) == pytest.approx(-0.5, abs=0.08)
    assert slope(model) == pytest.approx(0.5, abs=0.08)
    assert slope(dreg) == pytest.approx(0.5, abs=0.15)


def test_leave_one_out_is_vimcos_geometric_baseline() -> None:
    l = np.random.default_rng(0).normal(size=(4, 3))
    want = np.empty_like(l)
    for k in range(4):
        w = np.exp(l)
        others = [w[i] for i in range(4) if i != k]
        w[k] = np.prod(others, axis=0) ** (1 / 3)  # Mnih & Rezende 2016, eq. 10
        want[k] = np.log(w.mean(axis=0))
    np.testing.assert_allclose(leave_one_out(IWAE(4), l), want, rtol=1e-12)
    np.testing.assert_array_equal(leave_one_out(IWAE(1), l[:1]), 0.0)


def test_the_baseline_of_a_particle_of_zero_weight_is_finite() -> None:
    l = np.array([[-np.inf], [0.0], [1.0]])
    want = [np.log(np.mean(np.exp([[0.5, 0.0, 1.0]]))), np.log(np.exp(1.0) / 3), np.log(1 / 3)]
    np.testing.assert_allclose(leave_one_out(IWAE(3), l)[:, 0], want)


@pytest.mark.parametrize("engine", ["numpyro", "pyro"])
@pytest.mark.parametrize("gradient", [Pathwise(), STL(), DReG()], ids=str)
def test_non_reparameterised_site_is_refused(engine: str, gradient: Any) -> None:
    message = (
        rf"site 'd' under {type(gradient).__name__} must have a reparameterised guide distribution; got Categorical"
    )
    with pytest.raises(Refused, match=message):
        oracles.estimates(engine, DISCRETE, [IWAE(2, gradient)], 10)


# --- scales, masks, point masses, loops ----------------------------------------------------------------------------


def gradient_of(engine: str, objective: Any, model: Any, guide: Any, start: float, seeds: int) -> np.ndarray:
    """The gradient of minus the loss in the parameter ``a``, one for each seed."""
    if engine == "numpyro":
        import jax

        from elbozoo.inference.numpyro_engine import Loss

        def one(seed: Any) -> Any:
            return jax.grad(lambda a: -Loss(objective).loss(jax.random.key(seed), {"a": a}, model, guide))(start)

        return np.asarray(oracles.compiled(jax.vmap(one))(np.arange(seeds)))
    import pyro

    from elbozoo.inference.pyro_engine import Loss

    found = []
    for seed in range(seeds):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        Loss(objective).loss_and_grads(model, guide)
        found.append(-float(pyro.param("a").unconstrained().grad))
    return np.array(found)


@pytest.mark.parametrize("how", ["scaled", "masked"])
@pytest.mark.parametrize("analytic", [True, False], ids=["analytic", "sampled"])
def test_a_score_is_of_the_draw_whatever_its_scale(engine: str, how: str, analytic: bool) -> None:
    """A scale or a mask weighs what a draw is charged, and not how probable it was: enumerated over a coin."""
    lib, start = oracles.library(engine), 0.4
    if engine == "numpyro":
        from numpyro import handlers
    else:
        from pyro import poutine as handlers
    charged = 0.3 if how == "scaled" else 0.0

    def weighed() -> Any:
        return handlers.scale(scale=0.3) if how == "scaled" else handlers.mask(mask=False)

    def model() -> None:
        with weighed():
            z = lib.sample("z", lib.dist.Bernoulli(lib.array(0.5)))
        lib.sample("x", lib.dist.Normal(2.0 * z, 1.0), obs=lib.array(1.5))

    def guide() -> None:
        a = lib.param("a", lib.array(start))
        with weighed():
            lib.sample("z", lib.dist.Bernoulli(logits=a))

    def bound(a: float) -> float:
        q = 1 / (1 + np.exp(-a))
        log_lik = stats.norm.logpdf(1.5, [0.0, 2.0])
        return sum(p * (ll - charged * np.log(p / 0.5)) for p, ll in zip((1 - q, q), log_lik, strict=True))

    want = (bound(start + 1e-5) - bound(start - 1e-5)) / 2e-5
    objective = ELBO(40, ScoreFunction(), analytic_kl=analytic)
    found = gradient_of(engine, objective, model, guide, start, 200 if engine == "numpyro" else 60)
    assert found.mean() == pytest.approx(want, abs=4 * stats.sem(found))
    assert 4 * stats.sem(found) < 0.5 * abs(want), "the test must be able to fail"


@pytest.mark.parametrize("gradient", [DReG(), ScoreFunction(False)], ids=lambda g: type(g).__name__)
def test_a_point_mass_that_is_learned_has_no_score(engine: str, gradient: Any) -> None:
    lib = oracles.library(engine)

    def model() -> None:
        z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
        lib.sample("x", lib.dist.Normal(z, 1.0), obs=lib.array(1.5))

    def guide() -> None:
        lib.sample("z", lib.dist.Delta(lib.param("a", lib.array(0.4))))

    with pytest.raises(Refused, match=r"site 'z' under .* must have a density to take the score of; got a Delta"):
        gradient_of(engine, IWAE(2, gradient), model, guide, 0.4, 1)


def test_doubly_reparameterised_refuses_a_scale_of_its_own(engine: str) -> None:
    lib = oracles.library(engine)
    if engine == "numpyro":
        from numpyro import handlers
    else:
        from pyro import poutine as handlers

    def model() -> None:
        with handlers.scale(scale=0.3):
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
        lib.sample("x", lib.dist.Normal(z, 1.0), obs=lib.array(1.5))

    def guide() -> None:
        a = lib.param("a", lib.array(0.4))
        with handlers.scale(scale=0.3):
            lib.sample("z", lib.dist.Normal(a, 1.0))

    with pytest.raises(Refused, match=r"site 'z' under DReG must have no scale or mask"):
        gradient_of(engine, IWAE(2, DReG()), model, guide, 0.4, 1)
    gradient_of(engine, ELBO(2, DReG()), model, guide, 0.4, 1)  # no score is reparameterised


@pytest.mark.numpyro
@pytest.mark.filterwarnings("ignore:IWAE. a sample site lies outside")
def test_a_guide_with_a_scan_is_not_run_again() -> None:
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.contrib.control_flow import scan

    def chain(a: Any) -> Any:
        def step(z: Any, _: Any) -> Any:
            z = numpyro.sample("z", dist.Normal(a * z, 1.0))
            return z, z

        return scan(step, jnp.zeros(()), jnp.arange(3))[1]

    def model() -> None:
        numpyro.sample("x", dist.Normal(chain(0.5), 1.0).to_event(1), obs=jnp.ones(3))

    def guide() -> None:
        chain(numpyro.param("a", 0.4))

    for gradient in (STL(), DReG(), ScoreFunction(False)):
        with pytest.raises(Refused, match="guide must draw its sites outside of scan"):
            gradient_of("numpyro", IWAE(2, gradient), model, guide, 0.4, 1)
    assert np.isfinite(gradient_of("numpyro", IWAE(2), model, guide, 0.4, 2)).all()


def test_a_guide_that_observes_a_site_of_the_model_is_refused(engine: str) -> None:
    lib = oracles.library(engine)

    def model() -> None:
        y = lib.sample("y", lib.dist.Normal(lib.array(0.0), 1.0), obs=lib.array(0.3))
        z = lib.sample("z", lib.dist.Normal(y, 1.0))
        lib.sample("x", lib.dist.Normal(z, 1.0), obs=lib.array(1.5))

    def guide() -> None:
        a = lib.param("a", lib.array(0.4))
        lib.sample("y", lib.dist.Normal(a, 1.0), obs=lib.array(0.3))
        lib.sample("z", lib.dist.Normal(a, 1.0))

    with pytest.raises(
        InvalidArgument, match="guide must draw only latent sites of the model; got the observed site 'y'"
    ):
        gradient_of(engine, ELBO(), model, guide, 0.4, 1)


def test_bounds_of_particles_of_zero_weight() -> None:
    """``-inf`` where the bound is, and a number where it is one; never nan."""
    l = np.array([[-np.inf], [0.0], [1.0]])
    iwae = np.log((1 + np.e) / 3)
    assert CIWAE(0.0, 3).value(l) == pytest.approx(iwae)
    assert CIWAE(1.0, 3).value(l) == TVO(2, 3).value(l) == ELBO(3).value(l) == -np.inf
    np.testing.assert_allclose(ELBO(3).weight(l), 1 / 3)
    np.testing.assert_array_equal(ELBO(3).curvature(l), 0.0)
