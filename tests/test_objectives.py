"""Every bound on NumPy, torch and JAX (eager and compiled) arrays, against long-hand numbers; limits; derivatives; refusals."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jaxtyping
import numpy as np
import oracles
import pytest
from scipy import special

from elbozoo import options
from elbozoo.inference import Bound, Shape
from elbozoo.inference.errors import ElbozooError, InvalidArgument, Refused
from elbozoo.inference.gradients import STL, DReG, Pathwise, ScoreFunction
from elbozoo.inference.objectives import CIWAE, ELBO, IWAE, MIWAE, PIWAE, TVO, Renyi
from elbozoo.inference.shapes import P2, AnnealedKL, Beta, Capacity, FreeBits, LayerwiseAnnealedKL, MinSNR, SimpleLoss
from elbozoo.inference.terms import Site, Terms

L = np.random.default_rng(0).normal(size=(6, 2, 3)) * 1.5 - 3.0
TABLE = [
    (ELBO(6), oracles.elbo),
    (IWAE(6), oracles.iwae),
    (Renyi(0.3, 6), oracles.renyi(0.3)),
    (Renyi(-1.5, 6), oracles.renyi(-1.5)),
    (Renyi(2.5, 6), oracles.renyi(2.5)),
    (MIWAE(2, 3), oracles.miwae(2, 3)),
    (MIWAE(3, 2), oracles.miwae(3, 2)),
    (CIWAE(0.2, 6), oracles.ciwae(0.2)),
    (PIWAE(2, 3), oracles.miwae(2, 3)),
    (TVO(1, 6), oracles.elbo),
    (TVO(4, 6), oracles.tvo(oracles.log_spaced(4, 0.025))),
    (TVO(7, 6, first_beta=0.1), oracles.tvo(oracles.log_spaced(7, 0.1))),
]
rows = pytest.mark.parametrize(("bound", "oracle"), TABLE, ids=[repr(b).split(", gradient")[0] for b, _ in TABLE])
ARRAYS = [
    "numpy",
    pytest.param("torch", marks=pytest.mark.pyro),
    pytest.param("jax", marks=pytest.mark.numpyro),
    pytest.param("jax compiled", marks=pytest.mark.numpyro),
]


def run(arrays: str, fn: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
    """``fn`` on an array of that library, back as NumPy."""
    if arrays == "torch":
        import torch

        out = fn(torch.from_numpy(x))
        assert isinstance(out, torch.Tensor)
        return out.numpy()
    if arrays.startswith("jax"):
        import jax
        import jax.numpy as jnp

        out = oracles.compiled(fn)(jnp.asarray(x)) if "compiled" in arrays else fn(jnp.asarray(x))
        assert isinstance(out, jax.Array)
        return np.asarray(out)
    out = fn(x)
    assert isinstance(out, np.ndarray)
    return out


def test_the_table_is_complete() -> None:
    assert {type(bound) for bound, _ in TABLE} == set(options.choices(Bound).values())


@rows
@pytest.mark.parametrize("arrays", ARRAYS)
def test_value(arrays: str, bound: Any, oracle: Callable) -> None:
    got = run(arrays, bound.value, L)
    assert got.shape == (2, 3)
    np.testing.assert_allclose(got, oracle(L), rtol=1e-12)


def test_the_long_hand_numbers_themselves() -> None:
    """By hand, for weights 1, 3 and 8: the oracles are not their own judge."""
    l = np.log(np.array([1.0, 3.0, 8.0]))
    np.testing.assert_allclose(oracles.elbo(l), np.log(24) / 3)
    np.testing.assert_allclose(oracles.iwae(l), np.log(4))
    np.testing.assert_allclose(oracles.renyi(-1)(l), np.log(74 / 3) / 2)
    np.testing.assert_allclose(oracles.renyi(2)(l), -np.log((1 + 1 / 3 + 1 / 8) / 3))
    np.testing.assert_allclose(oracles.miwae(3, 1)(l), np.log(24) / 3)
    np.testing.assert_allclose(oracles.ciwae(0.25)(l), 0.25 * np.log(24) / 3 + 0.75 * np.log(4))
    half = np.sqrt([1.0, 3.0, 8.0])
    np.testing.assert_allclose(oracles.tvo([0, 0.5, 1])(l), 0.5 * np.log(24) / 3 + 0.5 * (half @ l) / half.sum())
    np.testing.assert_allclose(oracles.log_spaced(3, 0.01), [0, 0.01, 0.1, 1])
    np.testing.assert_allclose(special.logsumexp(l) - np.log(3), oracles.iwae(l))


@rows
@pytest.mark.parametrize("arrays", ARRAYS)
def test_reported_bound(arrays: str, bound: Any, oracle: Callable) -> None:
    """What is reported is the model's bound (for PIWAE, IWAE over all particles), of log p(x|z) - (log q - log p)."""
    rate = np.random.default_rng(1).normal(size=L.shape)

    def reported(x: Any) -> Any:
        half = x + 0.0
        site = Site(log_prior=0.25 * half, log_guide=1.25 * half)
        return bound.bound(Terms(2.0 * half, {"z": site}))

    want = oracles.iwae if isinstance(bound, PIWAE) else oracle
    np.testing.assert_allclose(run(arrays, reported, rate), want(rate), rtol=1e-11, atol=1e-12)


def _numerical(bound: Any, order: int) -> np.ndarray:
    """First derivative by l_k, or second (the Hessian's diagonal), by central differences of fourth order."""
    out, h = np.empty_like(L), 1e-2 if order == 2 else 1e-3
    stencil = {
        1: {-2: 1 / 12, -1: -2 / 3, 1: 2 / 3, 2: -1 / 12},
        2: {-2: -1 / 12, -1: 4 / 3, 0: -5 / 2, 1: 4 / 3, 2: -1 / 12},
    }
    for k in range(len(L)):
        step = np.zeros_like(L)
        step[k] = h
        out[k] = sum(c * bound.value(L + i * step) for i, c in stencil[order].items()) / h**order
    return out


@rows
@pytest.mark.parametrize("arrays", ARRAYS)
def test_weight_and_curvature(arrays: str, bound: Any, oracle: Callable) -> None:
    np.testing.assert_allclose(run(arrays, bound.weight, L), _numerical(bound, 1), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(run(arrays, bound.curvature, L), _numerical(bound, 2), rtol=1e-5, atol=1e-7)


@pytest.mark.numpyro
@rows
def test_derivatives_by_jax(bound: Any, oracle: Callable) -> None:
    import jax
    import jax.numpy as jnp

    @oracles.compiled
    def compute(flat: Any) -> Any:
        columns = jax.vmap(
            lambda l: (bound.value(l), jax.grad(bound.value)(l), jnp.diag(jax.hessian(bound.value)(l))), 1, (0, 1, 1)
        )(flat)
        return columns, (bound.value(flat), bound.weight(flat), bound.curvature(flat))

    for got, want in zip(*compute(L.reshape(6, 6)), strict=True):
        np.testing.assert_allclose(want, got, rtol=1e-8, atol=1e-12)


@pytest.mark.pyro
@rows
def test_derivatives_by_torch(bound: Any, oracle: Callable) -> None:
    import torch

    flat = torch.from_numpy(L.reshape(6, 6))
    gradient = torch.func.vmap(torch.func.grad(bound.value), in_dims=1, out_dims=1)(flat)
    np.testing.assert_allclose(gradient, bound.weight(flat), rtol=1e-10, atol=1e-13)


@rows
def test_a_constant_factor_moves_every_bound_by_its_logarithm(bound: Any, oracle: Callable) -> None:
    """``F(l + c) = F(l) + c``, so weights sum to one; at c = ±3000 any exponential taken without care has left float64."""
    for c in (-3000.0, 3000.0):
        np.testing.assert_allclose(bound.value(L + c), bound.value(L) + c, rtol=1e-12)
        np.testing.assert_allclose(bound.weight(L + c), bound.weight(L), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(bound.weight(L).sum(axis=0), 1.0, rtol=1e-12)


# --- limits -----------------------------------------------------------------------------------------------------

LIMITS = [
    ("IWAE, K = 1", IWAE(1), ELBO(1), 1, 0.0),
    ("Rényi, α = 0", Renyi(0.0, 6), IWAE(6), 6, 1e-14),
    ("Rényi, α → 1 from below", Renyi(1 - 1e-7, 6), ELBO(6), 6, 1e-6),
    ("Rényi, α → 1 from above", Renyi(1 + 1e-7, 6), ELBO(6), 6, 1e-6),
    ("MIWAE, one particle a group", MIWAE(6, 1), ELBO(6), 6, 1e-14),
    ("MIWAE, one group", MIWAE(1, 6), IWAE(6), 6, 1e-14),
    ("CIWAE, β = 0", CIWAE(0.0, 6), IWAE(6), 6, 1e-14),
    ("CIWAE, β = 1", CIWAE(1.0, 6), ELBO(6), 6, 1e-14),
    ("PIWAE, one group", PIWAE(1, 6), IWAE(6), 6, 1e-14),
    ("TVO, one interval", TVO(1, 6), ELBO(6), 6, 1e-14),
    ("TVO, K = 1", TVO(5, 1), ELBO(1), 1, 1e-14),
    ("TVO, many intervals", TVO(4000, 6, first_beta=1e-4), IWAE(6), 6, 3e-3),
]


@pytest.mark.parametrize(
    ("bound", "limit", "num", "tolerance"), [row[1:] for row in LIMITS], ids=[row[0] for row in LIMITS]
)
def test_limits(bound: Any, limit: Any, num: int, tolerance: float) -> None:
    np.testing.assert_allclose(bound.value(L[:num]), limit.value(L[:num]), atol=tolerance, rtol=1e-12)
    np.testing.assert_allclose(bound.weight(L[:num]), limit.weight(L[:num]), atol=tolerance, rtol=1e-12)
    np.testing.assert_allclose(bound.curvature(L[:num]), limit.curvature(L[:num]), atol=tolerance, rtol=1e-12)


def test_order_of_the_bounds() -> None:
    """ELBO ≤ TVO ≤ IWAE and it grows with its intervals; Rényi falls in α; MIWAE and CIWAE lie between."""
    low, high = ELBO(6).value(L), IWAE(6).value(L)
    tvo = [TVO(j, 6).value(L) for j in (1, 2, 5, 50)]
    for a, b in itertools.pairwise([low - 1e-12, *tvo[1:], high]):
        assert (a < b).all()
    renyi = [Renyi(a, 6).value(L) for a in (3.0, 1.5, 0.5, 0.0, -2.0)]
    for a, b in itertools.pairwise(renyi):
        assert (a < b).all()
    for middle in (MIWAE(2, 3).value(L), CIWAE(0.5, 6).value(L)):
        assert ((low < middle) & (middle < high)).all()


# --- what an objective says of itself ---------------------------------------------------------------------------


def test_objectives_are_frozen_values() -> None:
    for bound, _ in TABLE:
        assert bound == dataclasses.replace(bound)
        assert hash(bound) == hash(dataclasses.replace(bound))
        with pytest.raises(dataclasses.FrozenInstanceError):
            bound.gradient = STL()
    assert MIWAE(3, 4).num_particles == PIWAE(3, 4).num_particles == 12
    assert AnnealedKL(MIWAE(3, 4)).num_particles == 12


@pytest.mark.parametrize(
    ("objective", "analytic"),
    [
        (ELBO(), True), (ELBO(analytic_kl=False), False), (ELBO(gradient=STL()), False), (ELBO(gradient=DReG()), False),
        (ELBO(gradient=ScoreFunction()), True), (ELBO(gradient=ScoreFunction(False)), False), (IWAE(), False), (TVO(), False),
        (AnnealedKL(ELBO()), True), (FreeBits(ELBO(gradient=STL())), False), (Capacity(ELBO()), True),
    ],
    ids=str,
)  # fmt: skip
def test_analytic_kl_is_asked_for_only_where_the_estimator_allows_it(objective: Any, analytic: bool) -> None:
    assert objective.uses_analytic_kl is analytic


# --- refusals ---------------------------------------------------------------------------------------------------

INVALID = [
    (lambda: ELBO(0), "num_particles", 0),
    (lambda: ELBO(-1), "num_particles", -1),
    (lambda: ELBO(1.5), "num_particles", 1.5),  # type: ignore[arg-type]
    (lambda: ELBO(True), "num_particles", True),
    (lambda: IWAE(0), "num_particles", 0),
    (lambda: IWAE("5"), "num_particles", "'5'"),  # type: ignore[arg-type]
    (lambda: Renyi(0.5, 0), "num_particles", 0),
    (lambda: CIWAE(0.5, 0), "num_particles", 0),
    (lambda: TVO(3, 0), "num_particles", 0),
    (lambda: MIWAE(0, 2), "outer", 0),
    (lambda: MIWAE(2, 0), "inner", 0),
    (lambda: PIWAE(2.0, 2), "outer", 2.0),  # type: ignore[arg-type]
    (lambda: TVO(0), "partitions", 0),
    (lambda: TVO(first_beta=0.0), "first_beta", 0.0),
    (lambda: TVO(first_beta=1.0), "first_beta", 1.0),
    (lambda: Renyi(1), "alpha", 1),
    (lambda: Renyi(1.0), "alpha", 1.0),
    (lambda: Renyi(math.nan), "alpha", math.nan),
    (lambda: Renyi(math.inf), "alpha", math.inf),
    (lambda: CIWAE(-0.1), "beta", -0.1),
    (lambda: CIWAE(1.1), "beta", 1.1),
    (lambda: CIWAE(math.nan), "beta", math.nan),
    (lambda: Beta(ELBO(), -1.0), "beta", -1.0),
    (lambda: Beta(ELBO(), math.inf), "beta", math.inf),
    (lambda: AnnealedKL(warmup=0), "warmup", 0),
    (lambda: AnnealedKL(warmup=math.nan), "warmup", math.nan),
    (lambda: AnnealedKL(start=1.5), "start", 1.5),
    (lambda: AnnealedKL(ramp=0.0), "ramp", 0.0),
    (lambda: AnnealedKL(cycles=0), "cycles", 0),
    (lambda: AnnealedKL(schedule_form="sawtooth"), "schedule_form", "'sawtooth'"),  # type: ignore[arg-type]
    (lambda: FreeBits(free_bits=-0.1), "free_bits", -0.1),
    (lambda: FreeBits(per="pixel"), "per", "'pixel'"),  # type: ignore[arg-type]
    (lambda: Capacity(capacity=-1.0), "capacity", -1.0),
    (lambda: Capacity(gamma=math.nan), "gamma", math.nan),
    (lambda: Capacity(warmup=-1), "warmup", -1),
    (lambda: AnnealedKL(unit="epochs").beta(3), "unit", "epochs"),
    (lambda: Capacity(unit="epochs").target(3), "unit", "epochs"),
    (lambda: AnnealedKL(unit="epoch"), "unit", "'epoch'"),  # type: ignore[arg-type]
    (lambda: Capacity(unit="step"), "unit", "'step'"),  # type: ignore[arg-type]
    (lambda: Renyi("a"), "alpha", "'a'"),  # type: ignore[arg-type]
    (lambda: AnnealedKL(warmup=None), "warmup", None),  # type: ignore[arg-type]
    (lambda: IWAE(5, DReG), "gradient", DReG),  # type: ignore[arg-type]
    (lambda: AnnealedKL(ELBO), "objective", ELBO),  # type: ignore[arg-type]
]
REFUSED = [
    (lambda: FreeBits(IWAE(5)), "FreeBits.objective", "IWAE"),
    (lambda: FreeBits(AnnealedKL(TVO())), "FreeBits.objective", "TVO"),
    (lambda: Capacity(MIWAE(2, 2)), "Capacity.objective", "MIWAE"),
    (lambda: Capacity(AnnealedKL(FreeBits())), "Capacity.objective", "FreeBits"),
    (lambda: FreeBits(ELBO(gradient=DReG())), "FreeBits.objective.gradient", "DReG"),
    (lambda: FreeBits(AnnealedKL(ELBO(gradient=DReG()))), "FreeBits.objective.gradient", "DReG"),
    (lambda: FreeBits(ELBO(gradient=ScoreFunction(False))), "FreeBits.objective.gradient", "ScoreFunction"),
]


@pytest.mark.parametrize(
    ("build", "name", "got", "kind"),
    [(*row, InvalidArgument) for row in INVALID] + [(*row, Refused) for row in REFUSED],
    ids=[f"{name}={got}-{i}" for i, (_, name, got) in enumerate([*INVALID, *REFUSED])],
)
def test_refusals(
    build: Callable, name: str, got: object, kind: type[ElbozooError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``<name> must <condition>; got <value>. <what to do>.``"""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without the checks that tests install
    with pytest.raises(kind) as caught:
        build()
    assert type(caught.value) is kind
    message = str(caught.value)
    head, tail = message.split("; got ", 1)
    assert head.startswith(f"{name} must ")
    assert tail.startswith(f"{got}. ")
    assert len(tail) > len(f"{got}. ") + 5, "it must say what to do"
    assert message.endswith(".")
    assert not message.endswith("..")


def test_every_bound_and_shape_with_every_gradient() -> None:
    """Each pair is built or refused; only shapes whose gains differ refuse any of these."""
    for gradient in (Pathwise(), STL(), DReG(), ScoreFunction(), ScoreFunction(False)):
        for bound in options.choices(Bound).values():
            built = bound(gradient=gradient)
            assert built.gradient is gradient
            assert Beta(built, 2.0).gradient is gradient
        for shape in options.choices(Shape).values():
            if (
                shape in (FreeBits, LayerwiseAnnealedKL, MinSNR, P2, SimpleLoss)
                and not gradient.allows_gain_per_dimension
            ):
                with pytest.raises(Refused):
                    shape(ELBO(gradient=gradient))
            else:
                assert shape(ELBO(gradient=gradient)).base == ELBO(gradient=gradient)
