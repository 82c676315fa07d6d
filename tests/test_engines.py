"""The two engines on programs with every arrangement of plates, masks, scales and sites that they must read right.

Log densities are worked out from the drawn values with SciPy; each program is written once, for both engines.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracles
import pytest
from covering import covering
from oracles import library
from scipy import stats

from elbozoo.inference.errors import InvalidArgument
from elbozoo.inference.gradients import STL, DReG, ScoreFunction
from elbozoo.inference.objectives import ELBO, IWAE
from elbozoo.inference.shapes import FreeBits
from elbozoo.inference.terms import Terms

RNG = np.random.default_rng(0)
LOGPDF = stats.norm.logpdf


ARRAYS = ("log_prior", "log_guide", "log_prior_terms", "log_guide_terms", "kl", "rate", "rate_terms", "shaped_rate")


def held(terms: Terms) -> dict[str, Any]:
    """Every array that terms hold, as a tree."""
    sites = {n: {a: getattr(s, a) for a in ARRAYS} for n, s in terms.sites.items()}
    arrays = {"log_weight": terms.log_weight, "log_lik": terms.log_lik}
    return {**arrays, "observed": dict(terms.observed), "values": dict(terms.values), "sites": sites}


def held_and_made(terms: Terms) -> dict[str, Any]:
    """Those, and what a second run of the guide gives."""
    refrozen = terms.freeze(0.5 + 0.0 * terms.log_weight).log_weight
    return {**held(terms), "refrozen": refrozen, "scores": dict(terms.log_guide_at_stopped_values())}


def read(
    engine: str, program: tuple[Callable, Callable], fn: Callable = held, *, num_particles: int = 3, analytic_kl: bool = False, seed: int = 0,
    vectorize: bool = True,
) -> Any:  # fmt: skip
    """``fn(terms)`` as NumPy arrays, compiled in NumPyro, with the facts that are not arrays beside it."""
    options: dict[str, Any] = {"num_particles": num_particles, "analytic_kl": analytic_kl}
    facts = {}

    def measure(terms: Terms) -> Any:
        facts.update(joint=terms.joint, scale=terms.scale, data_per_entry=terms.data_per_entry)
        return fn(terms)

    if engine == "numpyro":
        import jax

        from elbozoo.inference import numpyro_engine

        options["vectorize"] = vectorize
        out = oracles.compiled(lambda key: measure(numpyro_engine.particles(key, {}, *program, (), **options)[0]))(
            jax.random.key(seed)
        )
        out = jax.tree.map(np.asarray, out)
    else:
        import pyro

        from elbozoo.inference import pyro_engine

        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        options["nesting"] = pyro_engine.particle_plate(*program, (), {}) if vectorize and num_particles > 1 else None
        out = _to_numpy(measure(pyro_engine.particles(*program, (), **options)))
    if fn not in (held, held_and_made):
        return out
    out["sites"] = {n: SimpleNamespace(**arrays) for n, arrays in out["sites"].items()}
    return SimpleNamespace(**out, **facts)


def _to_numpy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _to_numpy(v) for k, v in tree.items()}
    return tree.detach().numpy() if hasattr(tree, "detach") else tree


def handlers(engine: str) -> Any:
    if engine == "numpyro":
        import numpyro

        return numpyro.handlers
    from pyro import poutine

    return poutine


def loss_class(engine: str) -> Any:
    if engine == "numpyro":
        from elbozoo.inference.numpyro_engine import Loss
    else:
        from elbozoo.inference.pyro_engine import Loss
    return Loss


def pyro_program(model: Callable, guide: Callable) -> Any:
    from elbozoo.inference.pyro_engine import Program

    return Program(model, guide)


def loss_of(engine: str, objective: Any, model: Callable, guide: Callable, seed: int = 0, **options: Any) -> float:
    loss = loss_class(engine)(objective, **options)
    if engine == "numpyro":
        import jax

        return float(oracles.compiled(lambda key: loss.loss(key, {}, model, guide))(jax.random.key(seed)))
    import pyro

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return loss.loss(model, guide)


# --- arrangements of plates -------------------------------------------------------------------------------------
# Guides draw N(0.3, 0.7) for every latent, priors are N(0, 1), observations N(sum of the latents in scope, 1).


@dataclass(frozen=True)
class Arrangement:
    name: str
    program: Callable[[Any], tuple[Callable, Callable]]
    log_weight: Callable[[dict[str, np.ndarray]], np.ndarray]
    shape: tuple[int, ...]
    joint: bool
    data_per_entry: float
    scale: float = 1.0


X5, X34, X532 = RNG.normal(size=5), RNG.normal(size=(3, 4)), RNG.normal(size=(5, 2))


def ratio(z: np.ndarray) -> np.ndarray:
    return LOGPDF(z) - LOGPDF(z, 0.3, 0.7)


def _data_plate(lib: Any) -> tuple[Callable, Callable]:
    normal = lib.dist.Normal

    def model() -> None:
        with lib.plate("data", 5, dim=-1):
            z = lib.sample("z", normal(lib.array(0.0), 1.0))
            lib.sample("x", normal(z, 1.0), obs=lib.array(X5))

    def guide() -> None:
        with lib.plate("data", 5, dim=-1):
            lib.sample("z", normal(lib.array(0.3), 0.7))

    return model, guide


def _event_dims(lib: Any) -> tuple[Callable, Callable]:
    def prior() -> Any:
        return lib.dist.Normal(lib.array(np.zeros(2)), 1.0).to_event(1)

    def model() -> None:
        with lib.plate("data", 5, dim=-1):
            z = lib.sample("z", prior())
            lib.sample("x", lib.dist.Normal(z, 1.0).to_event(1), obs=lib.array(X532))

    def guide() -> None:
        with lib.plate("data", 5, dim=-1):
            lib.sample("z", lib.dist.Normal(lib.array(np.full(2, 0.3)), 0.7).to_event(1))

    return model, guide


def _subsampled(lib: Any) -> tuple[Callable, Callable]:
    def data() -> Any:
        options = {"subsample": lib.array(np.arange(5))} if lib.engine == "pyro" else {}
        return lib.plate("data", 20, subsample_size=5, dim=-1, **options)

    def model() -> None:
        with data():
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=lib.array(X5))

    def guide() -> None:
        with data():
            lib.sample("z", lib.dist.Normal(lib.array(0.3), 0.7))

    return model, guide


def _two_shared(lib: Any) -> tuple[Callable, Callable]:
    """Both plates around every site, the outer one subsampled."""

    def outer() -> Any:
        options = {"subsample": lib.array(np.arange(3))} if lib.engine == "pyro" else {}
        return lib.plate("groups", 6, subsample_size=3, dim=-2, **options)

    def model() -> None:
        with outer(), lib.plate("items", 4, dim=-1):
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=lib.array(X34))

    def guide() -> None:
        with outer(), lib.plate("items", 4, dim=-1):
            lib.sample("z", lib.dist.Normal(lib.array(0.3), 0.7))

    return model, guide


def _one_not_shared(lib: Any) -> tuple[Callable, Callable]:
    """A latent a group, a latent an item."""

    def model() -> None:
        with lib.plate("groups", 3, dim=-2):
            g = lib.sample("g", lib.dist.Normal(lib.array(0.0), 1.0))
            with lib.plate("items", 4, dim=-1):
                z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
                lib.sample("x", lib.dist.Normal(g + z, 1.0), obs=lib.array(X34))

    def guide() -> None:
        with lib.plate("groups", 3, dim=-2):
            lib.sample("g", lib.dist.Normal(lib.array(0.3), 0.7))
            with lib.plate("items", 4, dim=-1):
                lib.sample("z", lib.dist.Normal(lib.array(0.3), 0.7))

    return model, guide


def _pixels(lib: Any) -> tuple[Callable, Callable]:
    """A second plate around the observation alone: the weight is still per datum."""

    def model() -> None:
        with lib.plate("data", 3, dim=-2):
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            with lib.plate("pixels", 4, dim=-1):
                lib.sample("x", lib.dist.Normal(z, 1.0), obs=lib.array(X34))

    def guide() -> None:
        with lib.plate("data", 3, dim=-2):
            lib.sample("z", lib.dist.Normal(lib.array(0.3), 0.7))

    return model, guide


def _latent_plate(lib: Any) -> tuple[Callable, Callable]:
    """A second plate, to the right of the data's, around the latent alone: its dimensions belong to one datum."""

    def model() -> None:
        with lib.plate("data", 5, dim=-2):
            with lib.plate("latent", 2, dim=-1):
                z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            lib.sample("x", lib.dist.Normal(z.sum(-1)[..., None], 1.0), obs=lib.array(X5)[:, None])

    def guide() -> None:
        with lib.plate("data", 5, dim=-2), lib.plate("latent", 2, dim=-1):
            lib.sample("z", lib.dist.Normal(lib.array(0.3), 0.7))

    return model, guide


def _global(lib: Any) -> tuple[Callable, Callable]:
    """A global latent beside the local ones; the data are subsampled, so their scale stays inside the joint weight."""

    def data() -> Any:
        options = {"subsample": lib.array(np.arange(5))} if lib.engine == "pyro" else {}
        return lib.plate("data", 20, subsample_size=5, dim=-1, **options)

    def model() -> None:
        g = lib.sample("g", lib.dist.Normal(lib.array(0.0), 1.0))
        with data():
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            lib.sample("x", lib.dist.Normal(g + z, 1.0), obs=lib.array(X5))

    def guide() -> None:
        lib.sample("g", lib.dist.Normal(lib.array(0.3), 0.7))
        with data():
            lib.sample("z", lib.dist.Normal(lib.array(0.3), 0.7))

    return model, guide


def _no_plates(lib: Any) -> tuple[Callable, Callable]:
    """Batch dims and no plate."""

    def model() -> None:
        z = lib.sample("z", lib.dist.Normal(lib.array(np.zeros(5)), 1.0))
        lib.sample("x", lib.dist.Normal(z, 1.0), obs=lib.array(X5))

    def guide() -> None:
        lib.sample("z", lib.dist.Normal(lib.array(np.full(5, 0.3)), 0.7))

    return model, guide


ARRANGEMENTS = [
    Arrangement("data plate", _data_plate, lambda v: ratio(v["z"]) + LOGPDF(X5, v["z"]), (5,), False, 1.0),
    Arrangement(
        "event dims", _event_dims, lambda v: (ratio(v["z"]) + LOGPDF(X532, v["z"])).sum(-1), (5,), False, 1.0
    ),
    Arrangement("subsampled", _subsampled, lambda v: ratio(v["z"]) + LOGPDF(X5, v["z"]), (5,), False, 1.0, 4.0),
    Arrangement("two shared", _two_shared, lambda v: ratio(v["z"]) + LOGPDF(X34, v["z"]), (3, 4), False, 1.0, 2.0),
    Arrangement(
        "one not shared", _one_not_shared,
        lambda v: ratio(v["g"])[..., 0] + (ratio(v["z"]) + LOGPDF(X34, v["g"] + v["z"])).sum(-1), (3,), True, 1.0,
    ),
    Arrangement("pixels", _pixels, lambda v: ratio(v["z"])[..., 0] + LOGPDF(X34, v["z"]).sum(-1), (3,), False, 1.0),
    Arrangement("latent plate", _latent_plate, lambda v: ratio(v["z"]).sum(-1) + LOGPDF(X5, v["z"].sum(-1)), (5,), False, 1.0),
    Arrangement(
        "global latent", _global,
        lambda v: ratio(v["g"]).reshape(-1) + 4.0 * (ratio(v["z"]) + LOGPDF(X5, v["g"].reshape(-1, 1) + v["z"])).sum(-1),
        (), True, 20.0,
    ),
    Arrangement("no plates", _no_plates, lambda v: (ratio(v["z"]) + LOGPDF(X5, v["z"])).sum(-1), (), True, 5.0),
]  # fmt: skip


# K = 5 is also the number of data, where a particle dim taken for a batch dim would go unseen.
WAYS = [(1, True), (5, True), (3, False)]


@cache
def reading(engine: str, case: int, num_particles: int, vectorize: bool) -> Any:
    return read(
        engine,
        ARRANGEMENTS[case].program(library(engine)),
        held_and_made,
        num_particles=num_particles,
        vectorize=vectorize,
    )


READINGS = [
    pytest.param(i, way, id=f"{a.name} K={way[0]}{'' if way[1] else ' looped'}")
    for i, a in enumerate(ARRANGEMENTS)
    for way in WAYS
    if way == (5, True) or a.name in ("data plate", "one not shared")
]


@pytest.mark.parametrize(("case", "way"), READINGS)
def test_plates(engine: str, case: int, way: tuple[int, bool]) -> None:
    (num_particles, _), want = way, ARRANGEMENTS[case]
    terms = reading(engine, case, *way)
    assert terms.log_weight.shape == (num_particles, *want.shape)
    assert (terms.joint, terms.data_per_entry, terms.scale) == (want.joint, want.data_per_entry, want.scale)
    np.testing.assert_allclose(terms.log_weight, want.log_weight(terms.values), rtol=1e-10)
    np.testing.assert_allclose(terms.log_lik, sum(terms.observed.values()), rtol=1e-12)
    assert num_particles == 1 or np.ptp(terms.log_weight, axis=0).min() > 0, "every particle must be a draw of its own"


@pytest.mark.parametrize(("case", "way"), READINGS)
def test_freezing_changes_no_value(engine: str, case: int, way: tuple[int, bool]) -> None:
    """Frozen guides and rescaled paths give the same numbers, in the same shapes; so does the score's re-run."""
    terms = reading(engine, case, *way)
    np.testing.assert_allclose(terms.refrozen, terms.log_weight, rtol=1e-12)
    for name, log_guide in terms.scores.items():
        np.testing.assert_allclose(log_guide, terms.sites[name].log_guide, rtol=1e-12)


@pytest.mark.parametrize("case", ["subsampled", "two shared", "pixels"])
def test_loss_is_minus_the_scaled_sum_of_bounds(engine: str, case: str) -> None:
    """The subsample's scale multiplies the bound; inside the logarithm it would give another number."""
    index = [a.name for a in ARRANGEMENTS].index(case)
    terms = reading(engine, index, 5, True)
    want = -ARRANGEMENTS[index].scale * oracles.iwae(terms.log_weight).sum()
    got = loss_of(engine, IWAE(5), *ARRANGEMENTS[index].program(library(engine)))  # equal seeds draw equal values
    assert got == pytest.approx(want, rel=1e-12)


def test_subsampled_gradient_is_scaled(engine: str) -> None:
    """``d/db`` of ``x ~ N(z + b, 1)``: the normalised weights of the unscaled densities, times the scale."""
    lib = library(engine)
    _, guide = _subsampled(lib)

    def data() -> Any:
        options = {"subsample": lib.array(np.arange(5))} if lib.engine == "pyro" else {}
        return lib.plate("data", 20, subsample_size=5, dim=-1, **options)

    def model() -> None:
        b = lib.param("b", lib.array(0.25))
        with data():
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            lib.sample("x", lib.dist.Normal(z + b, 1.0), obs=lib.array(X5))

    terms = read(engine, (model, guide), lambda t: {"z": t.values["z"], "l": t.log_weight}, num_particles=4, seed=2)
    z, w = terms["z"], np.exp(terms["l"])
    want = -4.0 * (w / w.sum(0) * (X5 - z - 0.25)).sum()
    if engine == "numpyro":
        import jax

        from elbozoo.inference.numpyro_engine import Loss

        got = oracles.compiled(jax.grad(lambda b: Loss(IWAE(4)).loss(jax.random.key(2), {"b": b}, model, guide)))(0.25)
    else:
        import pyro

        from elbozoo.inference.pyro_engine import Loss

        pyro.clear_param_store()
        pyro.set_rng_seed(2)
        Loss(IWAE(4)).loss_and_grads(model, guide)
        got = pyro.param("b").unconstrained().grad
    assert float(got) == pytest.approx(want, rel=1e-10)


def test_looped_particles_share_one_subsample(engine: str) -> None:
    """A random subsample is drawn once for all particles, or their weights would be of different data."""
    lib = library(engine)
    x = lib.array(np.arange(50.0))

    def model() -> None:
        with lib.plate("data", 50, subsample_size=4, dim=-1) as index:
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=x[index])

    def guide() -> None:
        with lib.plate("data", 50, subsample_size=4, dim=-1):
            lib.sample("z", lib.dist.Normal(lib.array(0.0), 1e-12))

    log_liks = [
        read(engine, (model, guide), lambda t: t.log_lik, vectorize=vectorize, seed=seed) for vectorize, seed in ((True, 0), (False, 0), (False, 1))
    ]  # fmt: skip
    for log_lik in log_liks:
        assert np.ptp(log_lik, axis=0).max() < 1e-6
    assert np.abs(log_liks[1] - log_liks[2]).max() > 1, "the subsample must be random"


def test_vectorised_and_looped_particles_agree_in_distribution(engine: str) -> None:
    """E[IWAE_2] of 4000 copies of one datum, drawn both ways, and against quadrature."""
    lib = library(engine)
    size = 4000

    def model() -> None:
        with lib.plate("data", size, dim=-1):
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=lib.array(np.full(size, 1.3)))

    def guide() -> None:
        with lib.plate("data", size, dim=-1):
            lib.sample("z", lib.dist.Normal(lib.array(0.3), 0.7))

    e, weight = oracles.gauss_hermite(40)
    z = 0.3 + 0.7 * e
    exact = oracles.expected(oracles.iwae, oracles.Nodes(weight, LOGPDF(1.3, z), -ratio(z)), 2)
    for vectorize in (True, False):
        draws = read(engine, (model, guide), IWAE(2).bound, num_particles=2, vectorize=vectorize, seed=5)
        assert abs(draws.mean() - exact) < 4.5 * draws.std() / size**0.5
        assert draws.std() / size**0.5 < 0.01


# --- joint weights ----------------------------------------------------------------------------------------------


def test_joint_weight_warns_once(engine: str) -> None:
    program, objective = _global(library(engine)), IWAE(3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            loss_of(engine, objective, *program, seed=seed)
    assert [str(w.message)[:36] for w in caught] == ["IWAE: a sample site lies outside the"]


def test_weights_per_datum_do_not_warn(engine: str) -> None:
    for name in ("data plate", "pixels", "latent plate", "two shared"):
        case = next(a for a in ARRANGEMENTS if a.name == name)
        loss_of(engine, IWAE(2), *case.program(library(engine)))  # warnings are errors


def test_the_elbo_does_not_mind_a_joint_weight(engine: str) -> None:
    model, guide = _global(library(engine))
    loss_of(engine, ELBO(3), model, guide)  # warnings are errors


# --- scales, masks, extra sites ---------------------------------------------------------------------------------

SQUARE = RNG.normal(size=(3, 3))  # as many data as dimensions: a scale over the wrong dim would broadcast in silence
WEIGHTS = np.array([1.0, 0.5, 3.0])


@pytest.mark.parametrize(("which", "analytic_kl"), [("number", True), ("per datum", False), ("per datum", True)])
def test_scale_handler(engine: str, which: str, analytic_kl: bool) -> None:
    lib = library(engine)
    scale = 0.5 if which == "number" else WEIGHTS
    given = scale if which == "number" else lib.array(scale)

    def data() -> Any:
        options = {"subsample": lib.array(np.arange(3))} if lib.engine == "pyro" else {}
        return lib.plate("data", 6, subsample_size=3, dim=-1, **options)

    def model() -> None:
        with data(), handlers(engine).scale(scale=given):
            z = lib.sample("z", lib.dist.Normal(lib.array(np.zeros(3)), 1.0).to_event(1))
            lib.sample("x", lib.dist.Normal(z, 1.0).to_event(1), obs=lib.array(SQUARE))

    def guide() -> None:
        with data(), handlers(engine).scale(scale=given):
            lib.sample("z", lib.dist.Normal(lib.array(np.full(3, 0.3)), 0.7).to_event(1))

    terms = read(engine, (model, guide), analytic_kl=analytic_kl)
    assert terms.scale == 2, "the subsample's scale stays outside, the handler's inside"
    z = terms.values["z"]
    np.testing.assert_allclose(terms.log_lik, scale * LOGPDF(SQUARE, z).sum(-1), rtol=1e-10)
    kl = 3 * (0.5 * (0.49 + 0.09 - 1) - np.log(0.7))
    want = scale * (np.full((3, 3), kl) if analytic_kl and terms.sites["z"].kl is not None else -ratio(z).sum(-1))
    np.testing.assert_allclose(terms.sites["z"].rate, want, rtol=1e-10)
    if which == "number":
        assert (terms.sites["z"].kl is not None) == analytic_kl


@pytest.mark.parametrize(("where", "analytic_kl"), [("observation", False), ("whole datum", True)])
def test_mask_handler(engine: str, where: str, analytic_kl: bool) -> None:
    lib = library(engine)
    keep = np.array([True, False, True])

    def model() -> None:
        with lib.plate("data", 3, dim=-1):
            outer = handlers(engine).mask(mask=lib.array(keep if where == "whole datum" else np.ones(3, dtype=bool)))
            with outer:
                z = lib.sample("z", lib.dist.Normal(lib.array(np.zeros(3)), 1.0).to_event(1))
                with handlers(engine).mask(mask=lib.array(keep)):
                    lib.sample("x", lib.dist.Normal(z, 1.0).to_event(1), obs=lib.array(SQUARE))

    def guide() -> None:
        with (
            lib.plate("data", 3, dim=-1),
            handlers(engine).mask(mask=lib.array(keep if where == "whole datum" else np.ones(3, dtype=bool))),
        ):
            lib.sample("z", lib.dist.Normal(lib.array(np.full(3, 0.3)), 0.7).to_event(1))

    terms = read(engine, (model, guide), analytic_kl=analytic_kl)
    z = terms.values["z"]
    np.testing.assert_allclose(terms.log_lik, keep * LOGPDF(SQUARE, z).sum(-1), rtol=1e-10)
    latent_keep = keep if where == "whole datum" else np.ones(3)
    site = terms.sites["z"]
    kl = np.full((3, 3), 3 * (0.5 * (0.49 + 0.09 - 1) - np.log(0.7)))
    want = latent_keep * (-ratio(z).sum(-1) if site.kl is None else kl)
    np.testing.assert_allclose(site.rate, want, rtol=1e-10)


def test_auxiliary_site(engine: str) -> None:
    """A variable of the guide alone: its density counts in ``log q`` and there is no prior against it."""
    lib = library(engine)
    model, _ = _data_plate(lib)

    def guide() -> None:
        with lib.plate("data", 5, dim=-1):
            a = lib.sample("a", lib.dist.Normal(lib.array(0.1), 0.9), infer={"is_auxiliary": True})
            lib.sample("z", lib.dist.Normal(0.5 * a, 0.7))

    terms = read(engine, (model, guide))
    a, z = terms.values["a"], terms.values["z"]
    want = LOGPDF(z) + LOGPDF(X5, z) - LOGPDF(z, 0.5 * a, 0.7) - LOGPDF(a, 0.1, 0.9)
    np.testing.assert_allclose(terms.log_weight, want, rtol=1e-10)
    np.testing.assert_array_equal(terms.sites["a"].log_prior, 0.0)


def test_factor_and_deterministic_sites(engine: str) -> None:
    """Factors count on either side; deterministic sites, inside the plate or outside, change nothing."""
    lib = library(engine)
    if engine == "numpyro":
        from numpyro import deterministic, factor
    else:
        from pyro import deterministic, factor
    bonus = np.linspace(0.1, 0.5, 5)

    def model() -> None:
        deterministic("outside", lib.array(2.0))
        with lib.plate("data", 5, dim=-1):
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            deterministic("inside", 2.0 * z)
            factor("bonus", lib.array(bonus) * z)
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=lib.array(X5))

    def guide() -> None:
        with lib.plate("data", 5, dim=-1):
            z = lib.sample("z", lib.dist.Normal(lib.array(0.3), 0.7))
            factor("correction", -lib.array(bonus) * z, **({"has_rsample": True} if engine == "pyro" else {}))

    terms = read(engine, (model, guide))
    assert (tuple(terms.log_weight.shape), terms.joint) == ((3, 5), False)
    assert set(terms.observed) == {"bonus", "x"}
    z = terms.values["z"]
    np.testing.assert_allclose(terms.log_weight, ratio(z) + LOGPDF(X5, z) + 2 * bonus * z, rtol=1e-10)
    loss_of(engine, IWAE(3, DReG()), model, guide)  # a factor is not drawn: nothing to reparameterise


# --- guides that cannot be right --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        (
            [],
            r"guide must draw every latent site of the model; got no site 'z'\. Add (num)?pyro\.sample\('z', …\) to the guide\.",
        ),
        (["z", "y"], r"guide must draw only latent sites of the model; got 'y'\. Mark an auxiliary site with infer="),
        (
            ["z", "x"],
            r"guide must draw only latent sites of the model; got the observed site 'x'\. Remove it from the guide\.",
        ),
    ],
    ids=["missing", "extra", "observed"],
)
def test_model_and_guide_must_match(engine: str, sites: list[str], message: str) -> None:
    lib = library(engine)
    model, _ = _data_plate(lib)

    def guide() -> None:
        with lib.plate("data", 5, dim=-1):
            for name in sites:
                lib.sample(name, lib.dist.Normal(lib.array(0.3), 0.7))

    with pytest.raises(InvalidArgument, match=message):
        read(engine, (model, guide))


def test_a_model_without_latent_sites_is_refused(engine: str) -> None:
    lib = library(engine)

    def model() -> None:
        with lib.plate("data", 5, dim=-1):
            lib.sample("x", lib.dist.Normal(lib.array(0.0), 1.0), obs=lib.array(X5))

    with pytest.raises(InvalidArgument, match=r"guide must draw at least one latent site; got none\."):
        loss_of(engine, ELBO(), model, lambda: None)


@pytest.mark.pyro
@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("how", ["refuses", "mixes"])
def test_a_program_that_does_not_broadcast_is_looped(how: str, size: int) -> None:
    """One refuses a particle dim; the other takes particles for its own event dim, in silence where sizes agree."""
    import torch

    lib = library("pyro")
    data = lib.array(np.linspace(-1, 1, size))

    def refusing() -> None:
        with lib.plate("data", size, dim=-1):
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            lib.sample("x", lib.dist.Normal(z.reshape(size), 1.0), obs=data)

    def mixing() -> None:
        z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
        lib.sample("x", lib.dist.Normal(z * torch.ones(size), 1.0).to_event(1), obs=data)

    def guide() -> None:
        loc = lib.param("m", lib.array(0.3))
        with lib.plate("data", size, dim=-1) if how == "refuses" else contextlib.nullcontext():
            lib.sample("z", lib.dist.Normal(loc, 1.0))

    model = refusing if how == "refuses" else mixing
    looped = loss_of("pyro", IWAE(size), model, guide, vectorize_particles=False)
    with pytest.warns(UserWarning, match="does not broadcast over a particle dim"):
        assert loss_of("pyro", IWAE(size), model, guide) == pytest.approx(looped, rel=1e-12)
    with pytest.warns(UserWarning, match="does not broadcast over a particle dim"):
        values, log_lik = (
            pyro_program(model, guide)
            .apply(lambda t: {"z": t.values["z"], "l": t.log_lik}, (), num_particles=size)
            .values()
        )
    want = LOGPDF(np.linspace(-1, 1, size), values.reshape(size, -1))
    np.testing.assert_allclose(log_lik, want if how == "refuses" else want.sum(-1), rtol=1e-12)


# --- analytic KL ------------------------------------------------------------------------------------------------


def _two_latents(lib: Any, model_order: str, guide_order: str) -> tuple[Callable, Callable]:
    def model() -> None:
        with lib.plate("data", 5, dim=-1):
            first, second = model_order
            z = {first: lib.sample(first, lib.dist.Normal(lib.array(0.2), 1.0))}
            z[second] = lib.sample(second, lib.dist.Normal(0.8 * z[first], 1.2))
            lib.sample("x", lib.dist.Normal(z["a"] + z["b"], 1.0), obs=lib.array(X5))

    def guide() -> None:
        with lib.plate("data", 5, dim=-1):
            first, second = guide_order
            value = lib.sample(first, lib.dist.Normal(lib.array(0.3), 0.7))
            lib.sample(second, lib.dist.Normal(0.5 * value, 0.6))

    return model, guide


@pytest.mark.parametrize(
    ("model_order", "guide_order", "analytic"),
    [("ab", "ab", {"a", "b"}), ("ba", "ab", {"b"}), ("ab", "ba", {"a"})],
)
def test_analytic_kl_only_where_its_parents_were_drawn(
    engine: str, model_order: str, guide_order: str, analytic: set[str]
) -> None:
    """The model's second site may depend on its first: where the guide draws them the other way round, that KL is sampled."""
    terms = read(engine, _two_latents(library(engine), model_order, guide_order), analytic_kl=True)
    assert {n for n, s in terms.sites.items() if s.kl is not None} == analytic
    values = dict(terms.values)
    p = {model_order[0]: (0.2, 1.0), model_order[1]: (0.8 * values[model_order[0]], 1.2)}
    q = {guide_order[0]: (0.3, 0.7), guide_order[1]: (0.5 * values[guide_order[0]], 0.6)}
    for name, site in terms.sites.items():
        (m, s), (n, t) = q[name], p[name]
        kl = np.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5
        sampled = LOGPDF(values[name], m, s) - LOGPDF(values[name], n, t)
        want = np.broadcast_to(kl if name in analytic else sampled, (3, 5))
        np.testing.assert_allclose(site.rate, want, rtol=1e-10)


@pytest.mark.parametrize("parametrised", ["logits", "probs", "mixed"])
@pytest.mark.parametrize("family", ["Bernoulli", "Categorical", "OneHotCategorical"])
def test_analytic_kl_of_discrete_sites(engine: str, family: str, parametrised: str) -> None:
    """The sum over the states of ``q (log q - log p)``, by dimension; the guide rules one state out."""
    lib, rng = library(engine), np.random.default_rng(0)
    q, p = rng.dirichlet(np.ones(2 if family == "Bernoulli" else 3), size=(2, 5, 4))  # (data, dimensions, states)
    if family != "Bernoulli":
        q[0, 0] = [0.25, 0.75, 0.0]

    def distribution(probs: np.ndarray, by_logits: bool) -> Any:
        with np.errstate(divide="ignore"):
            logits = np.log(probs).clip(-1e300)
        cls = lib.one_hot if family == "OneHotCategorical" else getattr(lib.dist, family)
        if family == "Bernoulli":
            probs, logits = probs[..., 1], logits[..., 1] - logits[..., 0]
        if by_logits or (engine == "numpyro" and family == "OneHotCategorical"):
            return cls(logits=lib.array(logits)).to_event(1)
        return cls(probs=lib.array(probs)).to_event(1)

    def model() -> None:
        with lib.plate("data", 5, dim=-1):
            lib.sample("z", distribution(p, parametrised != "probs"))
            lib.sample("x", lib.dist.Normal(lib.array(0.0), 1.0), obs=lib.array(X5))

    def guide() -> None:
        with lib.plate("data", 5, dim=-1):
            lib.sample("z", distribution(q, parametrised == "logits"))

    site = read(engine, (model, guide), analytic_kl=True).sites["z"]
    kl = (q * np.where(q > 0, np.log(np.where(q > 0, q, 1.0)) - np.log(p), 0.0)).sum(-1)
    np.testing.assert_allclose(site.rate_terms, np.broadcast_to(kl, (3, 5, 4)), rtol=1e-10)
    np.testing.assert_allclose(site.kl, np.broadcast_to(kl.sum(-1), (3, 5)), rtol=1e-10)


def test_discrete_families_that_differ_have_no_analytic_kl(engine: str) -> None:
    lib = library(engine)

    def model() -> None:
        with lib.plate("data", 5, dim=-1):
            lib.sample("z", lib.dist.Categorical(logits=lib.array(np.array([0.3, -0.2]))))
            lib.sample("x", lib.dist.Normal(lib.array(0.0), 1.0), obs=lib.array(X5))

    def guide() -> None:
        with lib.plate("data", 5, dim=-1):
            lib.sample("z", lib.dist.Bernoulli(logits=lib.array(0.4)))

    assert read(engine, (model, guide), analytic_kl=True).sites["z"].kl is None


def test_analytic_kl_keeps_the_dimensions_of_a_latent_plate(engine: str) -> None:
    """Free bits a dimension must see them, in event dims and in a plate alike."""
    one_dim = 0.5 * (0.49 + 0.09 - 1) - np.log(0.7)

    def arrays(terms: Terms) -> dict[str, Any]:
        shaped = FreeBits(ELBO(), free_bits=10.0).shape(terms)
        return {
            "kl": terms.sites["z"].kl_terms,
            "rate_terms": terms.sites["z"].rate_terms,
            "charged": shaped.sites["z"].shaped_rate,
        }

    for program in (_event_dims, _latent_plate):
        out = read(engine, program(library(engine)), arrays, analytic_kl=True)
        np.testing.assert_allclose(out["kl"], np.full(out["kl"].shape, one_dim), rtol=1e-12)
        assert out["rate_terms"].shape[1:] == (5, 2)
        np.testing.assert_allclose(out["charged"], 20.0 + np.zeros((3, 5)))


def test_the_terms_of_joint_distributions_are_those_of_its_independent_parts(engine: str) -> None:
    """Three vectors of two entries that hang together: a term a vector, sampled and in closed form."""
    lib = library(engine)
    loc = RNG.standard_normal((3, 2))
    covariance = np.array([[[1.0, r], [r, 2.0]] for r in (0.0, 0.5, -1.2)])
    p, q = stats.multivariate_normal(np.zeros(2), np.eye(2)), [
        stats.multivariate_normal(m, c) for m, c in zip(loc, covariance, strict=True)
    ]  # fmt: skip

    def prior() -> Any:
        return lib.dist.MultivariateNormal(lib.array(np.zeros((3, 2))), lib.array(np.tile(np.eye(2), (3, 1, 1))))

    def model() -> None:
        with lib.plate("data", 5, dim=-1):
            z = lib.sample("z", prior().to_event(1))
            lib.sample("x", lib.dist.Normal(z[..., 0, 0], 1.0), obs=lib.array(X5))

    def guide() -> None:
        with lib.plate("data", 5, dim=-1):
            lib.sample("z", lib.dist.MultivariateNormal(lib.array(loc), lib.array(covariance)).to_event(1))

    sampled = read(engine, (model, guide))
    z = sampled.values["z"]
    exact = np.stack([q[i].logpdf(z[..., i, :]) - p.logpdf(z[..., i, :]) for i in range(3)], axis=-1)
    np.testing.assert_allclose(sampled.sites["z"].rate_terms, exact, rtol=1e-9)
    closed = read(engine, (model, guide), analytic_kl=True)
    trace, mahalanobis = covariance.trace(axis1=1, axis2=2), (loc**2).sum(axis=1)
    kl = 0.5 * (trace + mahalanobis - 2 - np.log(np.linalg.det(covariance)))
    np.testing.assert_allclose(closed.sites["z"].rate_terms, np.broadcast_to(kl, (3, 5, 3)), rtol=1e-9)
    np.testing.assert_allclose(closed.sites["z"].kl, kl.sum() + np.zeros((3, 5)), rtol=1e-9)


def test_a_guide_of_deltas_keeps_its_own_density(engine: str) -> None:
    """Autoguides draw a Delta that carries the log density of a change of variables; a KL that forgets it is wrong."""
    lib = library(engine)

    def model() -> None:
        with lib.plate("data", 5, dim=-1):
            z = lib.sample("z", lib.dist.LogNormal(lib.array(0.0), 1.0))
            lib.sample("x", lib.dist.Normal(z, 1.0), obs=lib.array(X5))

    def guide() -> None:
        with lib.plate("data", 5, dim=-1):
            u = lib.sample("u", lib.dist.Normal(lib.array(0.3), 0.7), infer={"is_auxiliary": True})
            lib.sample("z", lib.dist.Delta(lib.xp.exp(u), log_density=-u))

    for analytic_kl in (False, True):
        terms = read(engine, (model, guide), analytic_kl=analytic_kl)
        u = terms.values["u"]
        want = LOGPDF(X5, np.exp(u)) + LOGPDF(u) - LOGPDF(u, 0.3, 0.7)  # the change of variables cancels
        np.testing.assert_allclose(terms.log_weight, want, rtol=1e-10)


def test_mean_field_kl_agrees_with_the_librarys(engine: str) -> None:
    """The mean of TraceMeanField_ELBO and ours, over the same program."""
    model, guide = _event_dims(library(engine))
    if engine == "numpyro":
        import jax
        from numpyro.infer import TraceMeanField_ELBO

        library_loss = TraceMeanField_ELBO(num_particles=4000).loss
        reference = -float(oracles.compiled(lambda key: library_loss(key, {}, model, guide))(jax.random.key(1)))
    else:
        import pyro
        from pyro.infer import TraceMeanField_ELBO

        pyro.set_rng_seed(1)
        options = {"num_particles": 4000, "vectorize_particles": True, "max_plate_nesting": 1}
        reference = -TraceMeanField_ELBO(**options).loss(model, guide)
    ours = -loss_of(engine, ELBO(4000), model, guide, seed=2)
    kl = 10 * (0.5 * (0.49 + 0.09 - 1) - np.log(0.7))
    exact = (LOGPDF(X532, 0.3) - 0.5 * 0.49).sum() - kl
    assert ours == pytest.approx(exact, abs=0.25)  # its standard error is about 0.04
    assert reference == pytest.approx(exact, abs=0.25)


# --- re-running a guide -----------------------------------------------------------------------------------------


def test_a_guide_with_randomness_of_its_own_is_frozen_as_it_was_drawn(engine: str) -> None:
    """Dropout: log q of the values that were drawn belongs to the mask that drew them."""
    lib = library(engine)
    model, _ = _data_plate(lib)

    def noise(i: int) -> Any:
        if engine == "numpyro":
            import jax
            import numpyro

            return jax.random.bernoulli(numpyro.prng_key(), 0.5, (5,)) * 1.0
        import torch

        return torch.nn.functional.dropout(torch.ones(5), 0.5) / 2.0

    def guide() -> None:
        with lib.plate("data", 5, dim=-1):
            a = lib.sample("a", lib.dist.Normal(noise(0), 0.7), infer={"is_auxiliary": True})
            lib.sample("z", lib.dist.Normal(a + noise(1), 0.7))

    for num_particles, vectorize in WAYS[1:]:
        terms = read(engine, (model, guide), held_and_made, num_particles=num_particles, vectorize=vectorize)
        np.testing.assert_allclose(terms.refrozen, terms.log_weight, rtol=1e-12)
        for name in ("a", "z"):
            np.testing.assert_allclose(terms.scores[name], terms.sites[name].log_guide, rtol=1e-12)


@pytest.mark.pyro
def test_freezing_gives_parameters_back() -> None:
    """Parameters of every kind train again after an STL step: nothing stays frozen, even when the guide fails on its second run."""
    import pyro
    import torch
    from torch.distributions import constraints

    from elbozoo.inference.pyro_engine import Loss

    net = torch.nn.Linear(1, 1)
    calls = []

    def guide() -> None:
        calls.append(0)
        if len(calls) == 4:
            raise KeyError("the second run of the second step")
        pyro.module("net", net)
        scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", 5, dim=-1):
            pyro.sample("z", pyro.distributions.Normal(net(torch.ones(5, 1)).squeeze(-1), scale))

    model, _ = _data_plate(library("pyro"))
    Loss(ELBO(gradient=STL())).loss_and_grads(model, guide)
    with pytest.raises(KeyError):
        Loss(ELBO(gradient=STL())).loss_and_grads(model, guide)
    leaves = [*net.parameters(), pyro.param("scale").unconstrained()]
    assert all(leaf.requires_grad for leaf in leaves)
    Loss(ELBO(gradient=STL())).loss_and_grads(model, guide)
    assert all(torch.isfinite(leaf.grad).all() and leaf.grad.abs().sum() > 0 for leaf in leaves)


# --- twins ------------------------------------------------------------------------------------------------------


@pytest.mark.pyro
@pytest.mark.numpyro
def test_the_same_values_give_the_same_terms_in_both_engines() -> None:
    """Replayed in the other engine, the drawn values give every array of the terms again, to 1e-10."""
    import numpyro

    for make in (_event_dims, lambda lib: _two_latents(lib, "ba", "ab")):
        theirs = read("pyro", make(library("pyro")), num_particles=1, analytic_kl=True)
        model, guide = make(library("numpyro"))
        guide = numpyro.handlers.substitute(
            guide, data={n: library("numpyro").array(v[0]) for n, v in theirs.values.items()}
        )
        ours = read("numpyro", (model, guide), num_particles=1, analytic_kl=True)
        np.testing.assert_allclose(ours.log_lik, theirs.log_lik, rtol=1e-10)
        for name, site in ours.sites.items():
            for array in ARRAYS:
                mine, other = getattr(site, array), getattr(theirs.sites[name], array)
                assert (mine is None) == (other is None), (name, array)
                if mine is not None:
                    assert mine.shape == other.shape, (name, array)
                    np.testing.assert_allclose(mine, other, rtol=1e-10)


@covering("vectorize", (True, False), ids=lambda v: "vectorised" if v else "looped")
@pytest.mark.filterwarnings("ignore:IWAE. a sample site lies outside:UserWarning")
def test_estimators_where_sites_have_different_plates(engine: str, vectorize: bool) -> None:
    """One latent a group, one an item, one weight a group: gradients by the guide's mean m, written out at the drawn values."""
    lib, m = library(engine), 0.3
    model, _ = _one_not_shared(lib)
    gradients = {"STL": STL(), "DReG": DReG(), "score": ScoreFunction(pathwise_where_possible=False)}

    def guide() -> None:
        loc = lib.param("m", lib.array(m))
        with lib.plate("groups", 3, dim=-2):
            lib.sample("g", lib.dist.Normal(loc, 0.7))
            with lib.plate("items", 4, dim=-1):
                lib.sample("z", lib.dist.Normal(loc, 0.7))

    got: dict[str, tuple[float, float]] = {}
    drawn = read(engine, (model, guide), vectorize=vectorize)
    losses = {n: loss_class(engine)(IWAE(3, g), vectorize_particles=vectorize) for n, g in gradients.items()}
    if engine == "numpyro":
        import jax

        def compute(p: Any) -> Any:
            fns = {n: lambda p, f=f: f.loss(jax.random.key(0), {"m": p}, model, guide) for n, f in losses.items()}
            return {n: jax.value_and_grad(fn)(p) for n, fn in fns.items()}

        got = oracles.compiled(compute)(m)
    else:
        import pyro

        for name, loss in losses.items():
            pyro.clear_param_store()
            pyro.set_rng_seed(0)
            value = loss.loss_and_grads(model, guide)
            got[name] = (value, pyro.param("m").unconstrained().grad)

    g, z, l = drawn.values["g"], drawn.values["z"], drawn.log_weight  # (3, 3, 1), (3, 3, 4), (3, 3)
    w = np.exp(l) / np.exp(l).sum(0)
    bound = oracles.iwae(l)
    # m moves g and every z by one, so the mean of x by two; log q is held
    path = (-g + (g - m) / 0.49)[..., 0] + (-z + (z - m) / 0.49 + 2 * (X34 - g - z)).sum(-1)
    score = ((g - m) / 0.49)[..., 0] + ((z - m) / 0.49).sum(-1)
    baseline = np.empty_like(l)
    for k in range(3):
        others = np.delete(l, k, axis=0)
        baseline[k] = oracles.iwae(np.concatenate([others, others.mean(0, keepdims=True)]))
    want = {"STL": (w * path).sum(), "DReG": (w**2 * path).sum(), "score": ((bound - baseline - w) * score).sum()}
    for name, gradient in want.items():
        value, grad = got[name]
        assert float(value) == pytest.approx(-bound.sum(), rel=1e-12), (
            "the value is the bound's, whatever the estimator"
        )
        assert float(grad) == pytest.approx(-gradient, rel=1e-9)


@pytest.mark.parametrize("gradient", [STL(), DReG()], ids=lambda g: type(g).__name__)
def test_a_particle_of_zero_weight_spoils_neither_value_nor_gradient(engine: str, gradient: Any) -> None:
    """A likelihood of bounded support: the surrogate is -inf there, and no value is read off it."""
    lib = library(engine)

    def model() -> None:
        with lib.plate("data", 4, dim=-1):
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            options = {"validate_args": False} if engine == "pyro" else {}
            lib.sample("x", lib.dist.Uniform(z - 1.0, z + 1.0, **options), obs=lib.array(np.full(4, 0.5)))

    def guide() -> None:
        loc = lib.param("m", lib.array(0.3))
        with lib.plate("data", 4, dim=-1):
            lib.sample("z", lib.dist.Normal(loc, 1.0))

    loss = loss_class(engine)(IWAE(12, gradient))
    z = read(engine, (model, guide), lambda t: t.values["z"], num_particles=12)
    inside = np.abs(z - 0.5) < 1
    assert not inside.all(), "some weight must be zero"
    w = np.where(inside, np.exp(LOGPDF(z) - LOGPDF(z, 0.3)) / 2, 0.0)
    share = w / w.sum(0)
    path = -z + (z - 0.3)
    want = (share * path if gradient == STL() else share**2 * path).sum()
    if engine == "numpyro":
        import jax

        value, grad = oracles.compiled(
            jax.value_and_grad(lambda m: loss.loss(jax.random.key(0), {"m": m}, model, guide))
        )(0.3)
    else:
        import pyro

        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        value = loss.loss_and_grads(model, guide)
        grad = pyro.param("m").unconstrained().grad
        pyro.set_rng_seed(0)
        again = loss.differentiable_loss(model, guide)
        assert again.item() == value
        again.backward()
        assert float(pyro.param("m").unconstrained().grad) == pytest.approx(-2 * want, rel=1e-10)
        grad = grad / 2
    assert float(value) == pytest.approx(-np.log(w.mean(0)).sum(), rel=1e-12)
    assert float(grad) == pytest.approx(-want, rel=1e-10)
