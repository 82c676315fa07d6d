"""Shapes: schedules by hand, shaped gradients against the formula written out, and what is reported left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import oracles
import pytest
from covering import PYRO_ALONE
from oracles import library

from elbozoo.inference.errors import InvalidArgument, Refused
from elbozoo.inference.gradients import STL, DReG
from elbozoo.inference.objectives import ELBO, IWAE
from elbozoo.inference.shapes import AnnealedKL, Beta, Capacity, FreeBits, LayerwiseAnnealedKL, Shape
from elbozoo.inference.terms import Site, Terms

# --- schedules --------------------------------------------------------------------------------------------------

STEPS = "steps"
LINEAR = AnnealedKL(warmup=10, unit=STEPS)
CYCLICAL = AnnealedKL(warmup=10, unit=STEPS, schedule_form="cyclical", cycles=2, ramp=0.5)
SCHEDULES = [
    (LINEAR, {0: 0.0, 1: 0.1, 5: 0.5, 10: 1.0, 11: 1.0, 10**6: 1.0}),
    (AnnealedKL(warmup=4, unit=STEPS, start=0.2), {0: 0.2, 1: 0.4, 4: 1.0, 5: 1.0}),
    (AnnealedKL(warmup=10, unit=STEPS, schedule_form="cosine"), {0: 0.0, 5: 0.5, 2.5: 0.5 - 0.5 * 2**-0.5, 10: 1.0, 20: 1.0}),
    # two cycles of ten steps, each rising over five and then at 1; it ends at 1, not back at 0
    (CYCLICAL, {0: 0.0, 2: 0.4, 4: 0.8, 5: 1.0, 9: 1.0, 10: 0.0, 12: 0.4, 15: 1.0, 19: 1.0, 20: 1.0, 21: 1.0, 1000: 1.0}),
]  # fmt: skip
ARRAYS = [
    "python",
    "numpy",
    pytest.param("torch", marks=pytest.mark.pyro),
    pytest.param("jax", marks=pytest.mark.numpyro),
]


def as_array(arrays: str, step: float) -> Any:
    if arrays == "torch":
        import torch

        return torch.tensor(step)
    if arrays == "jax":
        import jax.numpy as jnp

        return jnp.asarray(step)
    return np.asarray(step) if arrays == "numpy" else step


@pytest.mark.parametrize("arrays", ARRAYS)
@pytest.mark.parametrize(("shape", "values"), SCHEDULES, ids=["linear", "from 0.2", "cosine", "cyclical"])
def test_annealing_schedules(arrays: str, shape: AnnealedKL, values: dict[float, float]) -> None:
    for step, want in values.items():
        assert float(shape.beta(as_array(arrays, step))) == pytest.approx(want, abs=1e-6)


def test_capacity_schedule() -> None:
    capacity = Capacity(capacity=20.0, warmup=10, unit=STEPS)
    assert [capacity.target(s) for s in (0, 5, 10, 50)] == [0.0, 10.0, 20.0, 20.0]
    assert Capacity(capacity=20.0, warmup=0, unit=STEPS).target(0) == 20.0


def test_epochs_become_steps_in_every_wrapping() -> None:
    nested = Capacity(AnnealedKL(Beta(ELBO(), 2.0), warmup=3), warmup=2).in_steps(50)
    assert nested == Capacity(AnnealedKL(Beta(ELBO(), 2.0), warmup=150, unit=STEPS), warmup=100, unit=STEPS)
    assert LINEAR.in_steps(50) == LINEAR
    assert CYCLICAL.total == 20
    assert nested.schedule(Terms(np.zeros((1, 1)), {}, step=50)) == {"capacity": 12.5}
    layerwise = LayerwiseAnnealedKL(ELBO(), 3, 2, ("z1", "z2")).in_steps(50)
    assert layerwise == LayerwiseAnnealedKL(ELBO(), 150, 100, ("z1", "z2"), STEPS)
    assert layerwise.total == 250
    assert nested.uses_step
    assert not Beta(ELBO(), 2.0).uses_step


# --- gradients against the formula written out --------------------------------------------------------------------
# z ~ N(0, I_3), x ~ N(z w, 1/4); guide N(x a + c, exp(r)). At fixed noise every shaped objective is a plain function of
# (w, a, c, r), written below in NumPy and differentiated by central differences.

BATCH, DIM, NUM = 6, 3, 2
X = np.random.default_rng(0).normal(size=BATCH)
VALUES = {"w": [0.9, -0.4, 0.3], "a": [0.8, 0.5, 0.1], "c": [0.1, -0.6, 0.05], "r": [-0.9, -0.3, -0.02]}
START = {n: np.array(v) for n, v in VALUES.items()}


def program(engine: str) -> tuple[Callable, Callable, dict[str, Any]]:
    lib = library(engine)
    init = {n: lib.array(v) for n, v in START.items()}

    def model(x: Any) -> None:
        w = lib.param("w", init["w"])
        with lib.plate("data", BATCH, dim=-1):
            z = lib.sample("z", lib.dist.Normal(lib.array(np.zeros(DIM)), 1.0).to_event(1))
            lib.sample("x", lib.dist.Normal((z * w).sum(-1), 0.5), obs=x)

    def guide(x: Any) -> None:
        a, c, r = (lib.param(n, init[n]) for n in "acr")
        with lib.plate("data", BATCH, dim=-1):
            lib.sample("z", lib.dist.Normal(x[:, None] * a + c, lib.xp.exp(r)).to_event(1))

    return model, guide, init


def by_hand(params: dict[str, np.ndarray], noise: np.ndarray, analytic: bool) -> tuple[np.ndarray, np.ndarray]:
    """``log p(x|z)`` (K, B) and the KL (K, B, D), analytic or sampled."""
    loc, scale = X[:, None] * params["a"] + params["c"], np.exp(params["r"])
    z = loc + scale * noise
    log_lik = oracles.normal(X, z @ params["w"], 0.5)
    sampled = oracles.normal(z, loc, scale) - oracles.normal(z, 0.0, 1.0)
    kl = 0.5 * (scale**2 + loc**2 - 1) - params["r"]
    return log_lik, np.broadcast_to(kl, sampled.shape) if analytic else sampled


# Each formula is a batch mean; λ = 0.25 leaves some dimensions below it and some above; C = 0.5 and 4 lie on either side of the KL.
SHAPED = [
    ("β", Beta(ELBO(NUM), 2.5), lambda l, kl: (l - 2.5 * kl.sum(-1)).mean()),
    ("β of samples", Beta(ELBO(NUM, analytic_kl=False), 2.5), lambda l, kl: (l - 2.5 * kl.sum(-1)).mean()),
    ("β IWAE", Beta(IWAE(NUM), 0.5), lambda l, kl: oracles.iwae(l - 0.5 * kl.sum(-1)).mean()),
    ("annealed, step 3", AnnealedKL(ELBO(NUM), 10, unit=STEPS), lambda l, kl: (l - 0.3 * kl.sum(-1)).mean()),
    ("annealed IWAE", AnnealedKL(IWAE(NUM), 10, unit=STEPS), lambda l, kl: oracles.iwae(l - 0.3 * kl.sum(-1)).mean()),
    ("free bits", FreeBits(ELBO(NUM), 0.25), lambda l, kl: l.mean() - np.maximum(0.25, kl.mean((0, 1))).sum()),
    (
        "free bits of samples", FreeBits(ELBO(NUM, analytic_kl=False), 0.25),
        lambda l, kl: l.mean() - np.maximum(0.25, kl.mean((0, 1))).sum(),
    ),
    ("free bits a site", FreeBits(ELBO(NUM), 0.25, per="site"), lambda l, kl: l.mean() - max(0.25, kl.sum(-1).mean())),
    ("free bits, all free", FreeBits(ELBO(NUM), 9.0, per="site"), lambda l, kl: l.mean() - max(9.0, kl.sum(-1).mean())),
    (
        "annealed free bits", AnnealedKL(FreeBits(ELBO(NUM), 0.25), 10, unit=STEPS),
        lambda l, kl: l.mean() - 0.3 * np.maximum(0.25, kl.mean((0, 1))).sum(),
    ),
    ("capacity, above", Capacity(ELBO(NUM), 0.5, 3.0, 0, STEPS), lambda l, kl: l.mean() - 3.0 * abs(kl.sum(-1).mean() - 0.5)),
    ("capacity, below", Capacity(ELBO(NUM), 4.0, 3.0, 0, STEPS), lambda l, kl: l.mean() - 3.0 * abs(kl.sum(-1).mean() - 4.0)),
    ("capacity, rising", Capacity(ELBO(NUM), 5.0, 3.0, 10, STEPS), lambda l, kl: l.mean() - 3.0 * abs(kl.sum(-1).mean() - 1.5)),
]  # fmt: skip
SCALARS = {
    "β": {"beta": 2.5},
    "annealed, step 3": {"beta": 0.3},
    "annealed free bits": {"beta": 0.3, "free_bits": 0.25},
    "capacity, rising": {"capacity": 1.5},
}


@cache
def measured(engine: str) -> list[dict[str, Any]]:
    """Noise, gradient of the shaped objective, reported bound and logged scalars of every row, at step 3."""
    model, guide, init = program(engine)
    objectives = [row[1] for row in SHAPED]
    x = library(engine).array(X)
    if engine == "numpyro":
        import jax

        from elbozoo.inference import numpyro_engine

        def one(objective: Shape) -> Any:
            def loss(params: Any) -> Any:
                options: dict[str, Any] = {"num_particles": NUM, "analytic_kl": objective.uses_analytic_kl, "step": 3}
                terms, _ = numpyro_engine.particles(jax.random.key(4), params, model, guide, (x,), **options)
                objective.check(terms)
                value = numpyro_engine.value_and_surrogate(objective, terms)[1]
                return value, (terms.values["z"], objective.bound(terms), objective.scalars(terms))

            (value, (z, bound, scalars)), grad = jax.value_and_grad(loss, has_aux=True)(init)
            return {"z": z, "loss": value, "bound": bound, "scalars": scalars, "grad": grad}

        return jax.tree.map(np.asarray, oracles.compiled(lambda: [one(o) for o in objectives])())

    import pyro

    from elbozoo.inference import pyro_engine

    out = []
    for objective in objectives:
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        for name, value in START.items():
            pyro.param(name, library("pyro").array(value.copy()))
        loss = pyro_engine.Loss(objective, max_plate_nesting=1)
        loss.step = 3
        terms = loss.terms(model, guide, x)
        row = {"z": terms.values["z"], "bound": objective.bound(terms), "scalars": objective.scalars(terms)}
        pyro.set_rng_seed(4)
        row["loss"] = loss.loss_and_grads(model, guide, x)
        assert loss.step == 4
        row["grad"] = {n: pyro.param(n).unconstrained().grad.numpy().copy() for n in START}
        out.append({k: _numpy(v) for k, v in row.items()})
    return out


def _numpy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {k: _numpy(v) for k, v in tree.items()}
    return tree.detach().numpy() if hasattr(tree, "detach") else tree


@pytest.mark.parametrize("row", range(len(SHAPED)), ids=[name for name, _, _ in SHAPED])
def test_shaped_gradient_is_that_of_the_formula(engine: str, row: int) -> None:
    name, objective, formula = SHAPED[row]
    got = measured(engine)[row]
    noise = (got["z"] - X[:, None] * START["a"] - START["c"]) / np.exp(START["r"])
    analytic = objective.uses_analytic_kl

    def total(flat: dict[str, float]) -> float:
        params = {n: np.array([flat[f"{n}{i}"] for i in range(DIM)]) for n in START}
        return BATCH * formula(*by_hand(params, noise, analytic))

    at = {f"{n}{i}": float(v[i]) for n, v in START.items() for i in range(DIM)}
    want = oracles.differentiate(total, at, list(at))
    for n, grad in got["grad"].items():
        np.testing.assert_allclose(-grad, [want[f"{n}{i}"] for i in range(DIM)], rtol=1e-6, atol=1e-8)

    log_lik, kl = by_hand(START, noise, analytic)
    plain = oracles.iwae(log_lik - kl.sum(-1)) if isinstance(objective.base, IWAE) else (log_lik - kl.sum(-1)).mean(0)
    np.testing.assert_allclose(got["bound"], plain, rtol=1e-10, err_msg="what is reported must be unshaped")
    assert float(got["loss"]) == pytest.approx(-plain.sum(), rel=1e-10)
    assert float(got["scalars"]["shaped_bound"]) == pytest.approx(formula(log_lik, kl), rel=1e-10)
    for key, value in SCALARS.get(name, {}).items():
        assert float(got["scalars"][key]) == pytest.approx(value)


def test_free_bits_give_no_gradient_below_lambda(engine: str) -> None:
    """Exactly none, not a small one: dimension 2 is free and its scale enters the likelihood alone; a free site charges nothing."""
    rows = {name: measured(engine)[i] for i, (name, _, _) in enumerate(SHAPED)}
    noise = (rows["free bits"]["z"] - X[:, None] * START["a"] - START["c"]) / np.exp(START["r"])
    _, kl = by_hand(START, noise, analytic=True)
    free = kl.mean((0, 1)) < 0.25
    assert free.any()
    assert not free.all(), "the case must have both"
    beta_zero = measured_gradient(engine, Beta(ELBO(NUM), 0.0))
    for n in "acr":
        np.testing.assert_array_equal(rows["free bits"]["grad"][n][free], beta_zero[n][free])
        assert (np.abs(rows["free bits"]["grad"][n][~free] - beta_zero[n][~free]) > 1e-3).all()
        np.testing.assert_array_equal(rows["free bits, all free"]["grad"][n], beta_zero[n])


def measured_gradient(engine: str, objective: Shape) -> dict[str, np.ndarray]:
    model, guide, init = program(engine)
    x = library(engine).array(X)
    if engine == "numpyro":
        import jax

        from elbozoo.inference.numpyro_engine import Loss

        grad = oracles.compiled(jax.grad(lambda p: Loss(objective).loss(jax.random.key(4), p, model, guide, x)))(init)
        return jax.tree.map(np.asarray, grad)
    import pyro

    from elbozoo.inference.pyro_engine import Loss

    pyro.clear_param_store()
    for name, value in START.items():
        pyro.param(name, library("pyro").array(value.copy()))
    pyro.set_rng_seed(4)
    Loss(objective, max_plate_nesting=1).loss_and_grads(model, guide, x)
    return {n: pyro.param(n).unconstrained().grad.numpy() for n in START}


# --- the arithmetic on arrays of every library --------------------------------------------------------------------


@pytest.mark.parametrize("arrays", ARRAYS[1:])
def test_shaped_rates_by_hand(arrays: str) -> None:
    """Two sites; site b does not factorise. Numbers worked out in the comments."""

    def array(x: Any) -> Any:
        return as_array(arrays, x)

    a = Site(array([[3.0]]), array([[4.5]]), array([[[1.0, 2.0]]]), array([[[1.5, 3.0]]]))  # rates 0.5, 1.0
    b = Site(array([[0.0]]), array([[0.2]]))  # rate 0.2
    terms = Terms(array([[-7.0]]), {"a": a, "b": b}, step=5)

    def log_weight(objective: Shape) -> float:
        return float(objective.shape_all(terms).log_weight[0, 0])

    assert log_weight(Beta(ELBO(), 2.0)) == pytest.approx(-7 - 2 * 1.7)
    assert log_weight(LINEAR) == pytest.approx(-7 - 0.5 * 1.7)
    assert log_weight(Beta(LINEAR, 2.0)) == pytest.approx(-7 - 1.7)
    assert log_weight(FreeBits(ELBO(), 0.6, per="site")) == pytest.approx(-7 - 1.5 - 0.6)
    assert log_weight(AnnealedKL(FreeBits(ELBO(), 0.6, per="site"), 10, unit=STEPS)) == pytest.approx(-7 - 0.5 * 2.1)
    assert log_weight(FreeBits(LINEAR, 0.6, per="site")) == pytest.approx(-7 - 0.5 * 2.1)
    assert log_weight(Capacity(ELBO(), 4.0, 3.0, 10, STEPS)) == pytest.approx(-7 - 3 * 0.3)  # C = 2 at step 5
    layerwise = LayerwiseAnnealedKL(ELBO(), 10, 2, unit=STEPS)
    assert log_weight(layerwise) == pytest.approx(-7 - 0.5 * 1.5 - 0.3 * 0.2)
    assert log_weight(replace(layerwise, order=("b", "a"))) == pytest.approx(-7 - 0.3 * 1.5 - 0.5 * 0.2)
    assert log_weight(replace(layerwise, delay=9)) == pytest.approx(-7 - 0.5 * 1.5)
    assert log_weight(replace(layerwise, start=0.2)) == pytest.approx(-7 - 0.6 * 1.5 - 0.44 * 0.2)
    assert log_weight(Beta(layerwise, 2.0)) == pytest.approx(-7 - 2 * (0.5 * 1.5 + 0.3 * 0.2))
    assert log_weight(LayerwiseAnnealedKL(FreeBits(ELBO(), 0.6, per="site"), 10, 2, unit=STEPS)) == pytest.approx(
        -7 - 0.5 * 1.5 - 0.3 * 0.6
    )
    scalars = {name: float(value) for name, value in layerwise.scalars(terms).items()}
    assert scalars == pytest.approx({"shaped_bound": -7 - 0.5 * 1.5 - 0.3 * 0.2, "beta_a": 0.5, "beta_b": 0.3})
    only_a = Terms(array([[-7.0]]), {"a": a}, step=5)
    dims = FreeBits(ELBO(), 0.7).shape(only_a)
    assert float(dims.log_weight[0, 0]) == pytest.approx(-7 - 0.7 - 1.0)
    np.testing.assert_array_equal(np.asarray(dims.sites["a"].gain), [0.0, 1.0])
    assert float(ELBO().bound(dims)[0]) != float(FreeBits(ELBO(), 0.7).bound(only_a)[0]) == pytest.approx(-8.5)

    with pytest.raises(
        Refused, match=r"site 'b' under FreeBits\(per='dimension'\) must have a guide and a prior that factorise"
    ):
        FreeBits(ELBO(), 0.6).check(terms)
    FreeBits(ELBO(), 0.6, per="site").check(terms)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup": 0}, "warmup must be finite and above 0; got 0"),
        ({"delay": -1}, "delay must be finite and at least 0; got -1"),
        ({"start": 2.0}, "start must lie in"),
        ({"objective": IWAE(gradient=DReG())}, "gradient must allow gains that differ; got DReG"),
    ],
)
def test_layerwise_bad_input(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        LayerwiseAnnealedKL(**settings)


def test_layerwise_order() -> None:
    """Names count by their numbers; an order that is not of the sites is refused."""
    zero = np.zeros((1, 1))
    terms = Terms(zero, {name: Site(zero, zero) for name in ("z10", "z9", "z2")}, step=4)
    layerwise = LayerwiseAnnealedKL(ELBO(), 10, 1, unit=STEPS)
    assert layerwise.betas(terms) == pytest.approx({"z2": 0.4, "z9": 0.3, "z10": 0.2})
    with pytest.raises(InvalidArgument, match=r"order must name the sites \['z10', 'z2', 'z9'\]; got \('z2', 'z9'\)"):
        replace(layerwise, order=("z2", "z9")).check(terms)


@PYRO_ALONE  # written once for both engines
def test_free_bits_a_dimension_refuse_a_full_covariance(engine: str) -> None:
    lib = library(engine)
    exact = oracles.LinearGaussian.random()
    model, guide, _ = exact.program(engine)
    with pytest.raises(Refused, match=r"site 'z' under FreeBits.*got MultivariateNormal\. Use per='site'\."):
        if engine == "numpyro":
            import jax

            from elbozoo.inference.numpyro_engine import Loss

            Loss(FreeBits(ELBO())).loss(jax.random.key(0), {}, model, guide, lib.array(exact.x))
        else:
            from elbozoo.inference.pyro_engine import Loss

            Loss(FreeBits(ELBO())).loss(model, guide, lib.array(exact.x))


@pytest.mark.parametrize("gradient", [STL(), DReG()], ids=str)
def test_one_gain_for_all_sites_is_kept_through_nested_shapes(gradient: Any) -> None:
    """The doubly reparameterised gradient needs a single gain; wrapping must not split it into equal copies."""
    one = np.ones((1, 1))
    terms = Terms(-one, {"a": Site(one, one), "b": Site(one, one)}, step=5)
    shaped = Capacity(AnnealedKL(Beta(ELBO(gradient=gradient), 2.0), 10, unit=STEPS), 9.0, 3.0, 0, STEPS).shape_all(
        terms
    )
    assert shaped.gain == -3.0 * 0.5 * 2.0


def test_annealing_and_a_capacity_nest_in_either_order() -> None:
    """β charges the constraint ``γ |KL - C|`` as a whole, below and above C."""
    for rate in (0.44, 2.0):
        one = np.ones((1, 1))
        terms = Terms(0 * one, {"z": Site(0 * one, rate * one)}, step=5)
        charges = [
            -shape.shape_all(terms).log_weight.item()
            for shape in (
                AnnealedKL(Capacity(ELBO(), 1.0, 10.0, 0, STEPS), 10, unit=STEPS),
                Capacity(AnnealedKL(ELBO(), 10, unit=STEPS), 1.0, 10.0, 0, STEPS),
            )
        ]
        assert charges == pytest.approx([0.5 * 10.0 * abs(rate - 1.0)] * 2)
