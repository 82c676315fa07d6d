"""The two engines on programs with every arrangement of plates, masks, scales and sites that they must read right.

Log densities are worked out from the drawn values with SciPy; each program is written once, for both engines.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import oracles
import pytest
from oracles import library
from scipy import stats

from elbozoo.inference.errors import InvalidArgument
from elbozoo.inference.gradients import STL, DReG, ScoreFunction
from elbozoo.inference.objectives import ELBO, IWAE
from elbozoo.inference.shapes import FreeBits
from elbozoo.inference.terms import Terms

RNG = np.random.default_rng(0)
LOGPDF = stats.norm.logpdf


def to_numpy(x: Any) -> np.ndarray:
    return x.detach().numpy() if hasattr(x, "detach") else np.asarray(x)


def terms_of(
    engine: str, model: Callable, guide: Callable, *args: Any, num_particles: int = 3, analytic_kl: bool = False, seed: int = 0,
    vectorize: bool = True,
) -> Terms:  # fmt: skip
    if engine == "numpyro":
        import jax

        from elbozoo.inference import numpyro_engine

        return numpyro_engine.particles(
            jax.random.key(seed), {}, model, guide, args, num_particles=num_particles, analytic_kl=analytic_kl, vectorize=vectorize
        )[0]  # fmt: skip
    import pyro

    from elbozoo.inference import pyro_engine

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return pyro_engine.particles(model, guide, args, num_particles=num_particles, analytic_kl=analytic_kl, vectorize=vectorize)


def handlers(engine: str) -> Any:
    if engine == "numpyro":
        import numpyro

        return numpyro.handlers
    from pyro import poutine

    return poutine


def loss_of(engine: str, objective: Any, model: Callable, guide: Callable, *args: Any, seed: int = 0, **options: Any) -> float:
    if engine == "numpyro":
        import jax

        from elbozoo.inference.numpyro_engine import Loss

        return float(Loss(objective, **options).loss(jax.random.key(seed), {}, model, guide, *args))
    import pyro

    from elbozoo.inference.pyro_engine import Loss

    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    return Loss(objective, **options).loss(model, guide, *args)


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


@pytest.mark.parametrize("case", ARRANGEMENTS, ids=lambda c: c.name)
@pytest.mark.parametrize("particles", [(1, True), (5, True), (3, False)], ids=["K=1", "K=5", "K=3 looped"])
def test_plates(engine: str, case: Arrangement, particles: tuple[int, bool]) -> None:
    """K = 5 is also the number of data, where a particle dim taken for a batch dim would go unseen."""
    num_particles, vectorize = particles
    terms = terms_of(engine, *case.program(library(engine)), num_particles=num_particles, vectorize=vectorize)
    assert tuple(terms.log_weight.shape) == (num_particles, *case.shape)
    assert terms.num_particles == num_particles
    assert (terms.joint, terms.data_per_entry, terms.scale) == (case.joint, case.data_per_entry, case.scale)
    values = {n: to_numpy(v) for n, v in terms.values.items()}
    if num_particles == 1:  # Pyro keeps K = 1 apart, NumPyro adds the dim
        values = {n: v.reshape((1, *v.shape)) if engine == "pyro" and v.shape[:1] != (1,) else v for n, v in values.items()}
    np.testing.assert_allclose(to_numpy(terms.log_weight), case.log_weight(values), rtol=1e-10)
    total = sum(to_numpy(v) for v in terms.observed.values())
    np.testing.assert_allclose(to_numpy(terms.log_lik), total, rtol=1e-12)
    particles_differ = np.ptp(to_numpy(terms.log_weight), axis=0)
    assert num_particles == 1 or particles_differ.min() > 0, "every particle must be a draw of its own"


@pytest.mark.parametrize("case", ARRANGEMENTS, ids=lambda c: c.name)
def test_freezing_changes_no_value(engine: str, case: Arrangement) -> None:
    """Frozen guides and rescaled paths give the same numbers, in the same shapes; so does the score's re-run."""
    terms = terms_of(engine, *case.program(library(engine)), num_particles=3)
    before = to_numpy(terms.log_weight)
    np.testing.assert_allclose(to_numpy(terms.freeze().log_weight), before, rtol=1e-12)
    np.testing.assert_allclose(to_numpy(terms.freeze(0.5 + 0.0 * terms.log_weight).log_weight), before, rtol=1e-12)
    for name, log_guide in terms.log_guide_at_stopped_values().items():
        np.testing.assert_allclose(to_numpy(log_guide), to_numpy(terms.sites[name].log_guide), rtol=1e-12)


@pytest.mark.parametrize("case", [a for a in ARRANGEMENTS if a.name != "global latent"], ids=lambda c: c.name)
@pytest.mark.filterwarnings("ignore:IWAE. a sample site lies outside:UserWarning")
def test_loss_is_minus_the_scaled_sum_of_bounds(engine: str, case: Arrangement) -> None:
    """The subsample's scale multiplies the bound; inside the logarithm it would give another number."""
    model, guide = case.program(library(engine))
    if engine == "numpyro":
        terms = terms_of(engine, model, guide, num_particles=4, seed=3)
    else:  # the loss finds the plate depth with a run of its own, which leaves the random state alone
        terms = terms_of(engine, model, guide, num_particles=4, seed=3)
    want = -case.scale * oracles.iwae(to_numpy(terms.log_weight)).sum()
    assert loss_of(engine, IWAE(4), model, guide, seed=3) == pytest.approx(want, rel=1e-12)


def test_subsampled_gradient_is_scaled(engine: str) -> None:
    """``d/db`` of ``x ~ N(z + b, 1)``: the normalised weights of the unscaled densities, times the scale."""
    lib = library(engine)
    inner_model, guide = _subsampled(lib)

    def data() -> Any:
        options = {"subsample": lib.array(np.arange(5))} if lib.engine == "pyro" else {}
        return lib.plate("data", 20, subsample_size=5, dim=-1, **options)

    def model() -> None:
        b = lib.param("b", lib.array(0.25))
        with data():
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            lib.sample("x", lib.dist.Normal(z + b, 1.0), obs=lib.array(X5))

    terms = terms_of(engine, model, guide, num_particles=4, seed=2)
    z, w = to_numpy(terms.values["z"]), np.exp(to_numpy(terms.log_weight))
    want = -4.0 * (w / w.sum(0) * (X5 - z - 0.25)).sum()
    if engine == "numpyro":
        import jax

        from elbozoo.inference.numpyro_engine import Loss

        got = jax.grad(lambda b: Loss(IWAE(4)).loss(jax.random.key(2), {"b": b}, model, guide))(lib.array(0.25))
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

    subsamples = set()
    for vectorize in (True, False):
        for seed in range(3):
            log_lik = to_numpy(terms_of(engine, model, guide, num_particles=3, vectorize=vectorize, seed=seed).log_lik)
            assert np.ptp(log_lik, axis=0).max() < 1e-6
            subsamples.add(tuple(log_lik[0].round(3)))
    assert len(subsamples) > 1, "the subsample must be random"


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
        terms = terms_of(engine, model, guide, num_particles=2, vectorize=vectorize, seed=5)
        draws = to_numpy(IWAE(2).bound(terms))
        assert abs(draws.mean() - exact) < 4.5 * draws.std() / size**0.5
        assert draws.std() / size**0.5 < 0.01


# --- joint weights ----------------------------------------------------------------------------------------------


def test_joint_weight_warns_once(engine: str) -> None:
    model, guide = _global(library(engine))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for seed in range(3):
            loss_of(engine, IWAE(3), model, guide, seed=seed)
    assert [str(w.message)[:36] for w in caught] == ["IWAE: a sample site lies outside the"]


@pytest.mark.parametrize("case", [a for a in ARRANGEMENTS if not a.joint], ids=lambda c: c.name)
def test_weights_per_datum_do_not_warn(engine: str, case: Arrangement) -> None:
    loss_of(engine, IWAE(3), *case.program(library(engine)))  # warnings are errors


def test_the_elbo_does_not_mind_a_joint_weight(engine: str) -> None:
    model, guide = _global(library(engine))
    loss_of(engine, ELBO(3), model, guide)  # warnings are errors


# --- scales, masks, extra sites ---------------------------------------------------------------------------------

SQUARE = RNG.normal(size=(3, 3))  # as many data as dimensions: a scale over the wrong dim would broadcast in silence
WEIGHTS = np.array([1.0, 0.5, 3.0])


@pytest.mark.parametrize("which", ["number", "per datum"])
@pytest.mark.parametrize("analytic_kl", [False, True], ids=["sampled", "analytic"])
def test_scale_handler(engine: str, which: str, analytic_kl: bool) -> None:
    lib = library(engine)
    scale = 0.5 if which == "number" else WEIGHTS
    given = scale if which == "number" else lib.array(scale)

    def model() -> None:
        with lib.plate("data", 3, dim=-1), handlers(engine).scale(scale=given):
            z = lib.sample("z", lib.dist.Normal(lib.array(np.zeros(3)), 1.0).to_event(1))
            lib.sample("x", lib.dist.Normal(z, 1.0).to_event(1), obs=lib.array(SQUARE))

    def guide() -> None:
        with lib.plate("data", 3, dim=-1), handlers(engine).scale(scale=given):
            lib.sample("z", lib.dist.Normal(lib.array(np.full(3, 0.3)), 0.7).to_event(1))

    terms = terms_of(engine, model, guide, analytic_kl=analytic_kl)
    z = to_numpy(terms.values["z"])
    np.testing.assert_allclose(to_numpy(terms.log_lik), scale * LOGPDF(SQUARE, z).sum(-1), rtol=1e-10)
    kl = 3 * (0.5 * (0.49 + 0.09 - 1) - np.log(0.7))
    want = scale * (np.full((3, 3), kl) if analytic_kl and terms.sites["z"].kl is not None else -ratio(z).sum(-1))
    np.testing.assert_allclose(to_numpy(terms.sites["z"].rate), want, rtol=1e-10)
    if which == "number":
        assert (terms.sites["z"].kl is not None) == analytic_kl


@pytest.mark.parametrize("where", ["observation", "whole datum"])
@pytest.mark.parametrize("analytic_kl", [False, True], ids=["sampled", "analytic"])
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
        with lib.plate("data", 3, dim=-1), handlers(engine).mask(mask=lib.array(keep if where == "whole datum" else np.ones(3, dtype=bool))):
            lib.sample("z", lib.dist.Normal(lib.array(np.full(3, 0.3)), 0.7).to_event(1))

    terms = terms_of(engine, model, guide, analytic_kl=analytic_kl)
    z = to_numpy(terms.values["z"])
    np.testing.assert_allclose(to_numpy(terms.log_lik), keep * LOGPDF(SQUARE, z).sum(-1), rtol=1e-10)
    latent_keep = keep if where == "whole datum" else np.ones(3)
    site = terms.sites["z"]
    want = latent_keep * (-ratio(z).sum(-1) if site.kl is None else 3 * (0.5 * (0.49 + 0.09 - 1) - np.log(0.7)))
    np.testing.assert_allclose(to_numpy(site.rate), want, rtol=1e-10)


def test_auxiliary_site(engine: str) -> None:
    """A variable of the guide alone: its density counts in ``log q`` and there is no prior against it."""
    lib = library(engine)
    model, _ = _data_plate(lib)

    def guide() -> None:
        with lib.plate("data", 5, dim=-1):
            a = lib.sample("a", lib.dist.Normal(lib.array(0.1), 0.9), infer={"is_auxiliary": True})
            lib.sample("z", lib.dist.Normal(0.5 * a, 0.7))

    terms = terms_of(engine, model, guide)
    a, z = to_numpy(terms.values["a"]), to_numpy(terms.values["z"])
    want = LOGPDF(z) + LOGPDF(X5, z) - LOGPDF(z, 0.5 * a, 0.7) - LOGPDF(a, 0.1, 0.9)
    np.testing.assert_allclose(to_numpy(terms.log_weight), want, rtol=1e-10)
    np.testing.assert_array_equal(to_numpy(terms.sites["a"].log_prior), 0.0)


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

    terms = terms_of(engine, model, guide)
    assert (tuple(terms.log_weight.shape), terms.joint) == ((3, 5), False)
    assert set(terms.observed) == {"bonus", "x"}
    z = to_numpy(terms.values["z"])
    np.testing.assert_allclose(to_numpy(terms.log_weight), ratio(z) + LOGPDF(X5, z) + 2 * bonus * z, rtol=1e-10)
    loss_of(engine, IWAE(3, DReG()), model, guide)  # a factor is not drawn: nothing to reparameterise


# --- guides that cannot be right --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([], r"guide must draw every latent site of the model; got no site 'z'\. Add (num)?pyro\.sample\('z', …\) to the guide\."),
        (["z", "y"], r"guide must draw only latent sites of the model; got 'y'\. Mark an auxiliary site with infer="),
        (["z", "x"], r"guide must draw only latent sites of the model; got the observed site 'x'\. Remove it from the guide\."),
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
        terms_of(engine, model, guide)


def test_a_model_without_latent_sites_is_refused(engine: str) -> None:
    lib = library(engine)

    def model() -> None:
        with lib.plate("data", 5, dim=-1):
            lib.sample("x", lib.dist.Normal(lib.array(0.0), 1.0), obs=lib.array(X5))

    with pytest.raises(InvalidArgument, match=r"guide must draw at least one latent site; got none\."):
        loss_of(engine, ELBO(), model, lambda: None)


@pytest.mark.pyro
def test_program_that_cannot_broadcast_is_refused_with_a_way_out() -> None:
    lib = library("pyro")

    def model() -> None:
        with lib.plate("data", 5, dim=-1):
            z = lib.sample("z", lib.dist.Normal(lib.array(0.0), 1.0))
            assert z.shape == (5,) or z.reshape(5) is not None
            lib.sample("x", lib.dist.Normal(z.reshape(5), 1.0), obs=lib.array(X5))

    _, guide = _data_plate(lib)
    with pytest.raises(InvalidArgument, match=r"program must broadcast over a leading particle dim; got .* pass vectorize_particles=False\."):
        loss_of("pyro", IWAE(3), model, guide)
    loss_of("pyro", IWAE(3), model, guide, vectorize_particles=False)


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
    ("model_order", "guide_order", "analytic"), [("ab", "ab", {"a", "b"}), ("ba", "ab", {"b"}), ("ba", "ba", {"a", "b"}), ("ab", "ba", {"a"})]
)
def test_analytic_kl_only_where_its_parents_were_drawn(engine: str, model_order: str, guide_order: str, analytic: set[str]) -> None:
    """The model's second site may depend on its first: where the guide draws them the other way round, that KL is sampled."""
    terms = terms_of(engine, *_two_latents(library(engine), model_order, guide_order), analytic_kl=True)
    assert {n for n, s in terms.sites.items() if s.kl is not None} == analytic
    values = {n: to_numpy(v) for n, v in terms.values.items()}
    p = {model_order[0]: (0.2, 1.0), model_order[1]: (0.8 * values[model_order[0]], 1.2)}
    q = {guide_order[0]: (0.3, 0.7), guide_order[1]: (0.5 * values[guide_order[0]], 0.6)}
    for name, site in terms.sites.items():
        (m, s), (n, t) = q[name], p[name]
        kl = np.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5
        sampled = LOGPDF(values[name], m, s) - LOGPDF(values[name], n, t)
        want = np.broadcast_to(kl if name in analytic else sampled, (3, 5))
        np.testing.assert_allclose(to_numpy(site.rate), want, rtol=1e-10)


def test_analytic_kl_keeps_the_dimensions_of_a_latent_plate(engine: str) -> None:
    """Free bits a dimension must see them, in event dims and in a plate alike."""
    one_dim = 0.5 * (0.49 + 0.09 - 1) - np.log(0.7)
    for program in (_event_dims, _latent_plate):
        terms = terms_of(engine, *program(library(engine)), analytic_kl=True)
        np.testing.assert_allclose(to_numpy(terms.sites["z"].kl), np.full(terms.sites["z"].kl.shape, one_dim), rtol=1e-12)
        assert tuple(terms.sites["z"].rate_terms.shape)[1:] == (5, 2)
        shaped = FreeBits(ELBO(), free_bits=10.0).shape(terms)
        np.testing.assert_allclose(to_numpy(shaped.sites["z"].shaped_rate), 20.0 + np.zeros((shaped.num_particles, 5)))


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
        terms = terms_of(engine, model, guide, analytic_kl=analytic_kl)
        u = to_numpy(terms.values["u"])
        want = LOGPDF(X5, np.exp(u)) + LOGPDF(u) - LOGPDF(u, 0.3, 0.7)  # the change of variables cancels
        np.testing.assert_allclose(to_numpy(terms.log_weight), want, rtol=1e-10)


def test_mean_field_kl_agrees_with_the_librarys(engine: str) -> None:
    """The mean of TraceMeanField_ELBO and ours, over the same program."""
    model, guide = _event_dims(library(engine))
    if engine == "numpyro":
        import jax
        from numpyro.infer import TraceMeanField_ELBO

        reference = -float(TraceMeanField_ELBO(num_particles=4000).loss(jax.random.key(1), {}, model, guide))
    else:
        from pyro.infer import TraceMeanField_ELBO

        import pyro

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

    for num_particles, vectorize in ((1, True), (4, True), (3, False)):
        terms = terms_of(engine, model, guide, num_particles=num_particles, vectorize=vectorize)
        want = to_numpy(terms.log_weight)
        np.testing.assert_allclose(to_numpy(terms.freeze().log_weight), want, rtol=1e-12)
        again = terms.log_guide_at_stopped_values()
        for name in ("a", "z"):
            np.testing.assert_allclose(to_numpy(again[name]), to_numpy(terms.sites[name].log_guide), rtol=1e-12)


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
    from pyro import poutine

    for program, names in ((_event_dims, ["z"]), (lambda lib: _two_latents(lib, "ba", "ab"), ["a", "b"])):
        theirs = terms_of("pyro", *program(library("pyro")), num_particles=1, analytic_kl=True)
        values = {n: to_numpy(theirs.values[n]) for n in names}
        values = {n: v if v.shape[0] == 5 else v[0] for n, v in values.items()}
        model, guide = program(library("numpyro"))
        data = {n: library("numpyro").array(v) for n, v in values.items()}
        ours = terms_of("numpyro", model, numpyro.handlers.substitute(guide, data=data), num_particles=1, analytic_kl=True)
        np.testing.assert_allclose(to_numpy(ours.log_lik), to_numpy(theirs.log_lik), rtol=1e-10)
        for name in names:
            for array in ("log_prior", "log_guide", "log_prior_terms", "log_guide_terms", "kl", "rate", "rate_terms"):
                mine, other = getattr(ours.sites[name], array), getattr(theirs.sites[name], array)
                assert (mine is None) == (other is None), (name, array)
                if mine is not None:
                    assert tuple(mine.shape) == tuple(other.shape), (name, array)
                    np.testing.assert_allclose(to_numpy(mine), to_numpy(other), rtol=1e-10)
    assert poutine is not None


@pytest.mark.parametrize("gradient", [ScoreFunction(pathwise_where_possible=False), STL(), DReG()], ids=lambda g: type(g).__name__)
@pytest.mark.parametrize("vectorize", [True, False], ids=["vectorised", "looped"])
def test_estimators_run_on_a_joint_weight_and_looped_particles(engine: str, gradient: Any, vectorize: bool) -> None:
    """The value is the bound's, whatever the estimator; with one latent a group and one an item."""
    model, guide = _one_not_shared(library(engine))
    terms = terms_of(engine, model, guide, num_particles=3, vectorize=vectorize, seed=1)
    want = -oracles.iwae(to_numpy(terms.log_weight)).sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        got = loss_of(engine, IWAE(3, gradient), model, guide, seed=1, vectorize_particles=vectorize)
    assert got == pytest.approx(want, rel=1e-12)
