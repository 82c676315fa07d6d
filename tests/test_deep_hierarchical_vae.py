"""``DeepHierarchicalVAE``: its densities against a NumPy and SciPy path written out here, its KL, its memory."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE, covering
from scipy import signal, stats

from elbozoo.inference import ELBO, IWAE, STL, Adam, AnnealedKL, DReG, FreeBits, Run, bottleneck, fit
from elbozoo.inference.errors import InvalidArgument
from elbozoo.zoo import AutoregressiveBernoulli, DeepHierarchicalVAE, DiscretizedLogistic

SMALL = DeepHierarchicalVAE(
    (1, 4, 4), 1, 3, 2, latent_channels=1, blocks=(2, 1), likelihood=DiscretizedLogistic(levels=4)
)
TWINS = [
    SMALL,
    DeepHierarchicalVAE((2, 4, 8), 2, 3, 2, 2, (1, 3), DiscretizedLogistic(levels=8), remat=True),
]
DATA = np.random.default_rng(3).integers(0, 4, (6, 16)) / 3.0


def random_weights(spec: DeepHierarchicalVAE, seed: int = 0) -> dict[str, np.ndarray]:
    """Weights with no zeros among them."""
    rng = np.random.default_rng(seed)
    return {name: np.asarray(w + 0.3 * rng.standard_normal(w.shape)) for name, w in spec.pyro().weights.items()}


def program(engine: str, spec: DeepHierarchicalVAE, weights: dict[str, np.ndarray]) -> Any:
    return getattr(spec, engine)().with_weights(weights)


def latents(spec: DeepHierarchicalVAE, num: int, batch: int, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((num, batch, *shape)) for name, shape in spec.shapes.items()}


# --- the path, in NumPy ---------------------------------------------------------------------------------------------


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def convolve(weights: dict[str, np.ndarray], name: str, x: np.ndarray, block: int | None = None) -> np.ndarray:
    """Of one image (channels, height, width)."""
    kernel, bias = (weights[f"{name}.{part}"] for part in ("weight", "bias"))
    if block is not None:
        kernel, bias = kernel[block], bias[block]
    out = [sum(signal.correlate2d(x[i], k[i], "same") for i in range(len(x))) for k in kernel]
    return np.array(out) + bias[:, None, None]


def residual(weights: dict[str, np.ndarray], name: str, x: np.ndarray, block: int) -> np.ndarray:
    for layer in range(3):
        x = convolve(weights, f"{name}.layers.{layer}", silu(x), block)
    return x


def features(spec: DeepHierarchicalVAE, weights: dict[str, np.ndarray], x: np.ndarray) -> list[np.ndarray]:
    """Of one datum, from the coarsest; for patches of one pixel."""
    state, out = convolve(weights, "encoder.input", 2 * x.reshape(spec.image_shape) - 1), []
    for group in reversed(range(len(spec.blocks))):
        for block in range(spec.blocks[group]):
            state = state + residual(weights, f"encoder.residuals.{group}", state, block)
        out.append(state)
        state = (state[:, ::2, ::2] + state[:, 1::2, ::2] + state[:, ::2, 1::2] + state[:, 1::2, 1::2]) / 4
    return out[::-1]


def by_hand(
    spec: DeepHierarchicalVAE, weights: dict[str, np.ndarray], x: np.ndarray, z: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """Of one datum: log p and log q of each layer, the likelihood's outputs, and each layer's standardised draws."""
    seen, channels = features(spec, weights, x), spec.latent_channels
    state, log_p, log_q, noise = weights["generator.start"], {}, {}, {}
    for group, (name, shape) in enumerate(spec.shapes.items()):
        state = state if group == 0 else state.repeat(2, 1).repeat(2, 2)
        log_p[name], log_q[name], noise[name] = np.zeros(shape[0]), np.zeros(shape[0]), np.zeros(shape)
        for block in range(shape[0]):
            raw = residual(weights, f"generator.groups.{group}.prior", state, block)
            shift, loc, log_scale = raw[: spec.width], raw[spec.width : -channels], raw[-channels:]
            both = np.concatenate([state, seen[group]])
            moved = residual(weights, f"encoder.posteriors.{group}", both, block)
            value, scale = z[name][block], np.exp(log_scale + moved[channels:])
            log_p[name][block] = stats.norm.logpdf(value, loc, np.exp(log_scale)).sum()
            log_q[name][block] = stats.norm.logpdf(value, loc + moved[:channels], scale).sum()
            noise[name][block] = (value - loc - moved[:channels]) / scale
            state = state + shift + convolve(weights, f"generator.groups.{group}.project", value, block)
            state = state + residual(weights, f"generator.groups.{group}.residual", state, block)
    return log_p, log_q, convolve(weights, "generator.output", silu(state)), noise


def log_mass(outputs: np.ndarray, x: np.ndarray, levels: int) -> float:
    """Of the discretised logistic."""
    (loc, log_scale), half = outputs.reshape(2, -1), 0.5 / (levels - 1)
    ends = [np.where(x > 1 - half, np.inf, x + half), np.where(x < half, -np.inf, x - half)]
    above, below = (stats.logistic.cdf(end, loc, np.exp(log_scale)) for end in ends)
    return float(np.log(above - below).sum())


def densities(terms: Any) -> dict[str, Any]:
    sites = terms.sites.items()
    priors, guides = {n: s.log_prior_terms for n, s in sites}, {n: s.log_guide_terms for n, s in sites}
    return {"prior": priors, "guide": guides, "lik": terms.log_lik}


@PYRO_ALONE  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_densities_are_those_of_a_path_in_numpy(engine: str) -> None:
    """Every layer's, in model and guide, and the likelihood's; at latents that neither drew."""
    weights, z = random_weights(SMALL), latents(SMALL, 2, len(DATA))
    found = program(engine, SMALL, weights).apply(densities, (DATA,), values=z)
    for k in range(2):
        for i, x in enumerate(DATA):
            log_p, log_q, outputs, _ = by_hand(SMALL, weights, x, {name: value[k, i] for name, value in z.items()})
            for name in z:
                np.testing.assert_allclose(found["prior"][name][k, i], log_p[name], rtol=1e-10)
                np.testing.assert_allclose(found["guide"][name][k, i], log_q[name], rtol=1e-10)
            assert found["lik"][k, i] == pytest.approx(log_mass(outputs, x, 4), rel=1e-9)


def drawn(terms: Any) -> dict[str, Any]:
    return {"values": dict(terms.values), **densities(terms)}


def test_draws_are_from_the_density(engine: str) -> None:
    """Standardised by the path in NumPy they are standard normal, and their densities are the path's."""
    weights, x = random_weights(SMALL), DATA[:1]
    found = program(engine, SMALL, weights).apply(drawn, (x,), num_particles=60)
    noise: dict[str, list[np.ndarray]] = {name: [] for name in SMALL.shapes}
    for k in range(60):
        z = {name: found["values"][name][k, 0] for name in SMALL.shapes}
        log_p, log_q, _, standard = by_hand(SMALL, weights, x[0], z)
        for name in z:
            np.testing.assert_allclose(found["guide"][name][k, 0], log_q[name], rtol=1e-9)
            np.testing.assert_allclose(found["prior"][name][k, 0], log_p[name], rtol=1e-9)
            noise[name].append(standard[name])
    for name, shape in SMALL.shapes.items():
        for block in range(shape[0]):
            standard = np.array(noise[name])[:, block].ravel()
            assert stats.kstest(standard, "norm").pvalue > 1e-3
            for other in range(block):
                above = np.array(noise[name])[:, other].ravel()
                assert abs(np.corrcoef(standard, above)[0, 1]) < 4 / np.sqrt(len(above))


@PYRO_ALONE  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_prior_and_guide_with_networks_of_zeros(engine: str) -> None:
    """N(0, I) at every layer, so no rate at all, and a likelihood that knows nothing of z."""
    zeros = {name: 0 * w for name, w in random_weights(SMALL).items()}
    found = program(engine, SMALL, zeros).apply(drawn, (DATA,), num_particles=2)
    for name in SMALL.shapes:
        exact = stats.norm.logpdf(found["values"][name]).sum(axis=(-3, -2, -1))
        np.testing.assert_allclose(found["prior"][name], exact, rtol=1e-12)
        np.testing.assert_array_equal(found["prior"][name], found["guide"][name])
    exact = [log_mass(np.zeros((2, 16)), x, 4) for x in DATA]
    np.testing.assert_allclose(found["lik"], [exact, exact], rtol=1e-9)


def kls(terms: Any) -> dict[str, Any]:
    return {name: site.kl_terms for name, site in terms.sites.items()}


def rates(terms: Any) -> dict[str, Any]:
    return {name: site.rate_terms for name, site in terms.sites.items()}


@PYRO_ALONE  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_a_guide_that_moves_nothing_has_no_rate(engine: str) -> None:
    weights = random_weights(SMALL)
    weights |= {n: 0 * w for n, w in weights.items() if "posteriors" in n and ".layers.2." in n}
    user = program(engine, SMALL, weights)
    for analytic, fn in ((True, kls), (False, rates)):
        for name, rate in user.apply(fn, (DATA,), num_particles=2, analytic_kl=analytic).items():
            assert rate.shape == (2, 6, SMALL.shapes[name][0])
            np.testing.assert_allclose(rate, 0.0, atol=1e-10)


def test_the_closed_form_of_each_layer_has_the_mean_of_the_samples(engine: str) -> None:
    """And, given the layers above, no noise of its own: the first layer's does not vary at all."""
    weights = {n: 0.5 * w for n, w in random_weights(SMALL).items()}
    user, num = program(engine, SMALL, weights), 3000
    closed = user.apply(kls, (DATA[:1],), num_particles=num, analytic_kl=True)
    sampled = user.apply(rates, (DATA[:1],), num_particles=num, seed=1)
    for name in SMALL.shapes:
        one, two = closed[name][:, 0], sampled[name][:, 0]
        error = np.sqrt((one.var(axis=0) + two.var(axis=0)) / num)
        assert (np.abs(one.mean(axis=0) - two.mean(axis=0)) < 4 * error).all()
        assert (one.mean(axis=0) > 10 * error).all(), "else two zeros were compared"
        assert (one.var(axis=0) < two.var(axis=0)).all()
    assert closed["z2"][:, 0, 0].std() < 1e-12 < sampled["z2"][:, 0, 0].std()


def is_closed(terms: Any) -> dict[str, Any]:
    return {name: 1.0 * (site.kl is not None) for name, site in terms.sites.items()}


def test_no_closed_form_at_values_that_the_guide_did_not_draw(engine: str) -> None:
    weights, z = random_weights(SMALL), latents(SMALL, 2, len(DATA))
    user = program(engine, SMALL, weights)
    exact = user.apply(rates, (DATA,), values=z)
    for name, rate in user.apply(rates, (DATA,), values=z, analytic_kl=True).items():
        np.testing.assert_array_equal(rate, exact[name])
    closed = [user.apply(is_closed, (DATA,), values=given, num_particles=2, analytic_kl=True) for given in (z, None)]
    assert [{name: bool(value) for name, value in found.items()} for found in closed] == [
        {"z1": False, "z2": False}, {"z1": True, "z2": True}
    ]  # fmt: skip


# --- gradients ------------------------------------------------------------------------------------------------------


def gradients(engine: str, spec: DeepHierarchicalVAE, weights: dict, z: dict | None, value: Any) -> tuple[Any, dict]:
    """``value(terms)`` and its gradient by weight, at the latents ``z`` or, for None, at the guide's own draws."""
    user = program(engine, spec, weights)
    num, kl = (2, False) if z is not None else (1, True)
    if engine == "pyro":
        import torch

        from elbozoo.inference.pyro_engine import particles

        torch.manual_seed(0)
        given = None if z is None else {n: torch.tensor(v) for n, v in z.items()}
        options = {"num_particles": num, "nesting": 1, "values": given, "analytic_kl": kl}
        total = value(particles(user.model, user.guide, (torch.tensor(DATA),), **options))
        total.backward()
        tensors = user._tensors().items()
        return total.item(), {n: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for n, p in tensors}
    import jax

    from elbozoo.inference.numpyro_engine import particles
    from elbozoo.inference.weights import to_torch_layout

    given = None if z is None else {n: jax.numpy.asarray(v) for n, v in z.items()}

    def compute(params: Any) -> Any:
        options = {"num_particles": num, "values": given, "analytic_kl": kl}
        return value(particles(jax.random.key(0), params, user.model_fn, user.guide_fn, (DATA,), **options)[0])

    total, found = jax.jit(jax.value_and_grad(compute))(user.params)
    return float(total), to_torch_layout(found)


@covering("remat", (False, True), numpyro=(0,))
def test_frozen_guide_keeps_the_gradient_of_the_shared_path(engine: str, remat: bool) -> None:
    """At given latents nothing is left of log q's gradient, and all of the joint density's."""
    weights, z, spec = random_weights(SMALL), latents(SMALL, 2, len(DATA)), replace(SMALL, remat=remat)
    total, found = gradients(engine, spec, weights, z, lambda terms: terms.freeze().log_weight.sum())
    plain, exact = gradients(engine, SMALL, weights, z, lambda terms: (terms.log_lik + terms.log_prior).sum())
    whole, other = gradients(engine, SMALL, weights, z, lambda terms: terms.log_weight.sum())
    assert total == pytest.approx(whole, rel=1e-12) != pytest.approx(plain, rel=1e-3)
    for name, gradient in found.items():
        np.testing.assert_allclose(gradient, exact[name], rtol=1e-9, atol=1e-9, err_msg=name)
        assert np.abs(gradient).max() > 0 or name.startswith("encoder."), name
    name = "generator.groups.0.prior.layers.0.weight"
    assert np.abs(other[name] - exact[name]).max() > 1e-3, "log q depends on the shared path too"


@covering("draws", ("given", "own"), numpyro=(1,))
def test_remat_changes_no_number(engine: str, draws: str) -> None:
    spec = replace(SMALL, blocks=(4, 1))
    weights, z = {n: 0.6 * w for n, w in random_weights(spec).items()}, latents(spec, 2, len(DATA))
    kept, anew = (
        gradients(
            engine, replace(spec, remat=remat), weights, z if draws == "given" else None, lambda t: t.log_weight.sum()
        )
        for remat in (False, True)
    )
    assert anew[0] == pytest.approx(kept[0], rel=1e-12)
    for name, gradient in kept[1].items():
        assert np.abs(gradient).max() > 0, name
        np.testing.assert_allclose(anew[1][name], gradient, rtol=1e-9, atol=1e-9, err_msg=name)


@pytest.mark.numpyro
@pytest.mark.parametrize("remat", [False, True])
def test_what_is_compiled_does_not_grow_with_depth(remat: bool) -> None:
    """The step of 4 layers has as many operations as that of 16."""
    import jax

    from elbozoo.inference.numpyro_engine import particles

    sizes = []
    for count in (4, 16):
        user = replace(SMALL, blocks=(count,), remat=remat).numpyro()
        params = jax.eval_shape(lambda key, user=user: user.init(key, DATA)[0], jax.random.key(0))

        def loss(params: Any, user: Any = user) -> Any:
            terms, _ = particles(jax.random.key(0), params, user.model_fn, user.guide_fn, (DATA,), analytic_kl=True)
            return terms.log_weight.sum()

        sizes.append(str(jax.make_jaxpr(jax.grad(loss))(params)).count(" = "))
    assert sizes[0] == sizes[1]


# --- with the harness -----------------------------------------------------------------------------------------------

OBJECTIVES = [
    FreeBits(ELBO(), free_bits=0.5), ELBO(gradient=STL()), AnnealedKL(IWAE(2, DReG()), warmup=2.0)
]  # fmt: skip


# benchmarks/depth.py trains it in NumPyro.
@covering("objective", OBJECTIVES, numpyro=(), ids=lambda o: type(o).__name__)
def test_it_trains(engine: str, objective: Any) -> None:
    spec = replace(SMALL, remat=isinstance(objective, AnnealedKL))
    options = {"batch_size": 3, "epochs": 2, "optimizer": Adam(0.01, skip_norm=1e3, average=0.5), "progress": False}
    run = fit(getattr(spec, engine)(), DATA, objective=objective, **options)
    row = run.history[-1]
    assert row["rate"] == pytest.approx(row["kl_z1"] + row["kl_z2"])
    assert 0 <= row["live_z1"] <= 1
    assert 0 <= row["live_z2"] <= 2
    for name, w in run.weights.items():
        assert np.isfinite(w).all(), name
        assert w.any(), name


@pytest.mark.pyro
@pytest.mark.parametrize("remat", [False, True])
def test_a_torch_step_is_traced(remat: bool) -> None:
    from elbozoo.inference.pyro_trainer import Trainer

    options = {"batch_size": 3, "seeds": [0], "redraw_pixels": False, "device": None}
    weights, order = [], np.arange(6).reshape(1, 2, 3)
    for traced in (True, False):
        trainer = Trainer(replace(SMALL, remat=remat).pyro(), ELBO(), Adam(0.01), (DATA,), **options)
        trainer.compile_after = 0 if traced else math.inf
        trainer.epoch(order)
        assert (trainer.compiled is not None) == traced
        weights.append(trainer.arrays())
    for name, w in weights[0].items():
        np.testing.assert_array_equal(w, weights[1][name], err_msg=name)


@PYRO_ALONE  # NumPyro's densities are Pyro's: tests/test_twins.py
def test_under_an_outer_plate(engine: str) -> None:
    """Each of its entries is drawn on its own, all the way down."""
    user = program(engine, SMALL, random_weights(SMALL))
    if engine == "pyro":
        import pyro
        import torch

        with torch.no_grad(), pyro.plate("particles", 2, dim=-2):
            draws = [user.guide(torch.tensor(DATA)).numpy(), user.model(size=3).numpy()]
    else:
        import numpyro

        with numpyro.handlers.seed(rng_seed=0), numpyro.plate("particles", 2, dim=-2):
            draws = [np.asarray(user.guide(DATA)), np.asarray(user.model(size=3))]
    assert [d.shape for d in draws] == [(2, 6, *SMALL.shapes["z1"]), (2, 3, 16)]
    assert all((d[0] != d[1]).any() for d in draws)


@PYRO_ALONE  # written once for both engines
def test_instruments(engine: str) -> None:
    user = program(engine, SMALL, random_weights(SMALL))
    run = Run(user, ELBO(), [], {"binarize": "none"})
    found = run.evaluate(DATA, num_particles=4)
    assert {n: v.shape for n, v in found.rate_per_dimension.items()} == {"z1": (1,), "z2": (2,)}
    assert sum(v.sum() for v in found.rate_per_dimension.values()) == pytest.approx(found.rate, rel=1e-9)
    carried = bottleneck(user, DATA, num_particles=4).kl_per_dimension
    assert {n: v.shape for n, v in carried.items()} == {"z1": (1,), "z2": (2,)}
    prior = user.predict((DATA,), num_particles=2, prior=True)
    assert prior["latent"]["z2"].shape == (2, 6, *SMALL.shapes["z2"])
    assert set(np.unique(prior["observed"]["x"] * 3).round(6)) <= {0.0, 1.0, 2.0, 3.0}
    posterior = run.to_arviz(DATA, num_draws=3).posterior
    assert posterior["z2"].shape[-4:] == SMALL.shapes["z2"]
    with pytest.raises(InvalidArgument, match="site 'z2' must be drawn from a distribution that can be optimised"):
        user.localised((DATA,))


def test_initial_weights(engine: str) -> None:
    """Glorot-uniform and zero, the last layers smaller by the root of the depth, the prior's zero."""
    spec = DeepHierarchicalVAE((1, 4, 4), 1, 20, 16, 8, (3, 6))
    if engine == "pyro":
        weights = spec.pyro().weights
    else:
        import jax

        from elbozoo.inference.weights import to_torch_layout

        weights = to_torch_layout(jax.jit(lambda k: spec.numpyro().init(k, np.zeros((1, 16)))[0])(jax.random.key(0)))
    assert weights["generator.groups.1.prior.layers.1.weight"].shape == (6, 16, 16, 3, 3)
    for name, w in weights.items():
        if name.endswith((".bias", "start")) or "prior.layers.2." in name:
            assert not w.any(), name
            continue
        small = "project" in name or ".layers.2." in name
        bound = np.sqrt(6 / (w.shape[-1] ** 2 * (w.shape[-3] + w.shape[-4]))) / (3 if small else 1)
        moment, error = bound**2 / 3, 5 * bound**2 * np.sqrt((1 / 5 - 1 / 9) / w.size)
        assert np.abs(w).max() <= bound, name
        assert abs((w**2).mean() - moment) < error, name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blocks": ()}, r"blocks must have an entry for at least one resolution; got \(\)"),
        ({"blocks": (2, 0)}, "every entry of blocks must be a whole number of at least 1; got 0"),
        ({"blocks": 3}, "blocks must be a tuple of whole numbers"),
        ({"image_shape": (1, 28, 30)}, r"image_shape must have a height and width that are multiples of 4"),
        ({"image_shape": (28, 28)}, "image_shape must be a tuple of 3 whole numbers"),
        ({"width": 0}, "width must be a whole number of at least 1; got 0"),
        ({"latent_channels": 1.5}, "latent_channels must be a whole number"),
        ({"remat": 1}, "remat must be a bool"),
        ({"likelihood": AutoregressiveBernoulli(data_dim=9)}, "likelihood.data_dim must be the model's 784; got 9"),
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        DeepHierarchicalVAE(**fields)


def test_data_of_another_shape_are_refused(engine: str) -> None:
    user = program(engine, SMALL, random_weights(SMALL))
    with pytest.raises(InvalidArgument, match=r"x must have shape"):
        fit(user, DATA[:, :9], epochs=1, progress=False)
