"""A model's two forms are one distribution: same weights and values in, same log densities and gradients out (float64).

The latents and the data are drawn once, by the Pyro form, under an outer plate of particles; then each form scores them
with its own library's handlers. ``VAE`` and ``LinearVAE`` have their rows here; any other model has a list ``TWINS`` of
specs in its own ``tests/test_<folder>.py``, which is found by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import elbozoo.guides
import elbozoo.zoo
from elbozoo.guides import (
    DiagonalGaussian,
    Family,
    FullCovarianceGaussian,
    InverseAutoregressiveFlow,
    LowRankGaussian,
    MixtureOfGaussians,
    NeuralSplineFlow,
    SemiAmortised,
)
from elbozoo.inference.errors import InvalidArgument
from elbozoo.inference.parts import Part
from elbozoo.inference.weights import from_torch_layout, to_torch_layout, with_values
from elbozoo.zoo import (
    MLP,
    VAE,
    VQVAE,
    AutoregressiveBernoulli,
    Bernoulli,
    ContinuousBernoulli,
    Conv,
    DeepHierarchicalVAE,
    Denoiser,
    DiffusionVAE,
    DiscretizedLogistic,
    EndLikelihood,
    FlowPrior,
    Gaussian,
    HierarchicalVQVAE,
    Likelihood,
    LinearVAE,
    MixturePrior,
    Network,
    Prior,
    Schedule,
    Spec,
    StandardNormal,
    VampPrior,
    VariationalDiffusion,
)
from elbozoo.zoo.networks import ACTIVATIONS

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")
pyro = pytest.importorskip("pyro")
pytest.importorskip("pyro.contrib.autoname")
numpyro = pytest.importorskip("numpyro")

poutine = pyro.poutine
handlers = numpyro.handlers
pytestmark = [pytest.mark.pyro, pytest.mark.numpyro]

BATCH, PARTICLES, TOLERANCE = 3, 2, 1e-10
GUIDES = (DiagonalGaussian(), FullCovarianceGaussian())
LIKELIHOODS = (
    Bernoulli(),
    AutoregressiveBernoulli(data_dim=16),
    AutoregressiveBernoulli(data_dim=16, masked_units=5),
    ContinuousBernoulli(),
    Gaussian(scale=0.7),
    Gaussian(scale="learned"),
    Gaussian(scale="pixel"),
    DiscretizedLogistic(levels=8),
)
PRIORS = (StandardNormal(), MixturePrior(num_components=3), VampPrior(num_components=4))
NETWORKS = (MLP(hidden=(5, 4)), Conv(image_shape=(2, 4, 2), channels=(3,), hidden=6, activation="tanh"))
OTHER_GUIDES = (
    LowRankGaussian(rank=2),
    InverseAutoregressiveFlow(num_flows=2, flow_hidden=(4, 5), context_dim=3),
    NeuralSplineFlow(num_flows=3, flow_hidden=(4, 5), context_dim=3, num_bins=4, bound=2.0),
    MixtureOfGaussians(num_components=3),
    SemiAmortised(steps=2, step_size=0.05, num_points=2),
    SemiAmortised(LowRankGaussian(rank=1), steps=2, step_size=0.05, num_points=4),
)
EVERY_GUIDE = (OTHER_GUIDES[4], GUIDES[1], *OTHER_GUIDES[:4], GUIDES[0], OTHER_GUIDES[5])
"""In the order of the likelihoods: a guide that climbs diverges under one of wide gradients."""
SMALL = VAE(data_dim=16, latent_dim=3, network=MLP(hidden=(5,)))
OF_CODES = ("encoder", "codebook", "conditioner.", "merge.")
"""Beginnings of the names of what places codes: a density of a code's index does not depend on it."""
LINEAR = LinearVAE(data_dim=5, latent_dim=3, scale=0.6)

ROWS: list[Spec] = [
    # Each likelihood, guide and activation in one row: what one of them is does not depend on the others.
    *(
        VAE(16, 3, MLP(hidden=(5,), activation=name), likelihood, guide)
        for likelihood, guide, name in zip(LIKELIHOODS, EVERY_GUIDE, cycle(ACTIVATIONS), strict=False)
    ),
    replace(SMALL, network=MLP(hidden=()), prior=MixturePrior(num_components=3)),
    replace(SMALL, network=NETWORKS[0], guide=GUIDES[1], prior=MixturePrior(num_components=3)),
    replace(SMALL, network=MLP((5, 4), normalization="layer"), prior=VampPrior(num_components=4)),
    VAE(16, 3, NETWORKS[1], LIKELIHOODS[-1], GUIDES[1], prior=VampPrior(num_components=4)),
    replace(SMALL, network=NETWORKS[1], likelihood=Gaussian(), prior=VampPrior(num_components=4)),
    *(replace(SMALL, prior=FlowPrior(guide)) for guide in OTHER_GUIDES[1:3]),
    *(replace(LINEAR, learn_scale=learn, guide=guide) for learn, guide in ((False, "full"), (True, "diagonal"))),
]


def exported(kind: type) -> set[type]:
    names = [(module, name) for module in (elbozoo.zoo, elbozoo.guides) for name in module.__all__]
    values = {getattr(module, name) for module, name in names}
    return {value for value in values if isinstance(value, type) and issubclass(value, kind) and value is not kind}


def collect() -> list[Spec]:
    """The rows above, and ``TWINS`` of the test files named after the other models' folders."""
    rows = list(ROWS)
    for cls in sorted(exported(Spec) - {VAE, LinearVAE}, key=lambda cls: cls.__name__):
        name = "test_" + cls.__module__.rpartition(".")[2]
        if Path(__file__).with_name(name + ".py").exists():
            rows += [spec for spec in importlib.import_module(name).TWINS if type(spec) is cls]
    return rows


def random_weights(spec: Spec, seed: int = 0) -> dict[str, np.ndarray]:
    """Random values for every weight, larger than initial ones so that no nonlinearity is near linear."""
    rng = np.random.default_rng(seed)
    weights = spec.pyro().weights
    return {name: np.asarray(array + 0.3 * rng.standard_normal(array.shape)) for name, array in weights.items()}


def in_plate(library: Any, fn: Callable, *args: Any) -> Callable:
    def plated() -> None:
        with library.plate("particles", PARTICLES, dim=-2):
            fn(*args)

    return plated


def weigh(log_probs: dict[tuple[str, str], Any]) -> Any:
    """A sum of all the log densities with unequal coefficients, so that no gradient can cancel unseen."""
    total = 0.0
    for seed, site in enumerate(sorted(log_probs)):
        total = total + (coefficients(log_probs[site].shape, seed) * log_probs[site]).sum()
    return total


def coefficients(shape: tuple[int, ...], seed: int) -> Any:
    array = np.random.default_rng(seed).uniform(0.5, 1.5, tuple(shape))
    return torch.tensor(array)


def is_point(site: dict) -> bool:
    """Whether a point mass was drawn from, whose value is the form's own: it moves with the parameters."""
    return site["type"] == "sample" and type(getattr(site["fn"], "base_dist", site["fn"])).__name__ == "Delta"


def pyro_side(spec: Spec, weights: dict) -> tuple[dict, dict, dict, np.ndarray]:
    """Draw data and latents, score them: (log densities by role and site, gradients, latents, data)."""
    program = spec.pyro().with_weights(weights)
    with torch.no_grad():
        x = program.model(size=BATCH) if spec.generative else torch.rand(BATCH, spec.data_dim).round()
        drawn = poutine.trace(in_plate(pyro, program.guide, x)).get_trace()
    values = {
        name: drawn.nodes[name]["value"]
        for name in drawn.stochastic_nodes
        if name not in ("data", "particles") and not is_point(drawn.nodes[name])
    }
    log_probs, points = {}, {}
    for role in ("guide", "model"):
        form = in_plate(pyro, getattr(program, role), x)
        trace = poutine.trace(poutine.condition(form, data=values | points)).get_trace()
        trace.compute_log_prob()
        points |= {name: site["value"] for name, site in trace.nodes.items() if role == "guide" and is_point(site)}
        sites = {name: site for name, site in trace.nodes.items() if site["type"] == "sample" and "log_prob" in site}
        log_probs |= {(role, n): s["unscaled_log_prob"] for n, s in sites.items() if n not in ("data", "particles")}
    weigh(log_probs).backward()
    modules = (program.model, program.guide)
    named = {name: p for module in modules for name, p in module.named_parameters()}
    grads = {name: (torch.zeros_like(p) if p.grad is None else p.grad).numpy() for name, p in named.items()}
    latents = {name: value.numpy() for name, value in values.items()}
    return {site: value.detach().numpy() for site, value in log_probs.items()}, grads, latents, x.numpy()


def template(program: Any, x: np.ndarray) -> dict:
    """Shapes of a NumPyro program's parameters, without computing any."""
    return jax.eval_shape(lambda: program.init(jax.random.key(0), x)[0])


def numpyro_side(spec: Spec, weights: dict, latents: dict, x: np.ndarray) -> tuple[dict, dict]:
    """Score the same values: (log densities by role and site, gradients)."""
    program = spec.numpyro()
    params = from_torch_layout(weights, template(program, x))

    def score(params: dict) -> tuple[Any, dict]:
        log_probs, points = {}, {}
        for role in ("guide", "model"):
            form = in_plate(numpyro, getattr(program, role), x)
            form = handlers.substitute(handlers.seed(form, 0), data={**params, **latents, **points})
            trace = handlers.trace(form).get_trace()
            points |= {name: site["value"] for name, site in trace.items() if role == "guide" and is_point(site)}
            sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
            log_probs |= {(role, name): site["fn"].log_prob(site["value"]) for name, site in sites.items()}
        return sum(
            (coefficients(log_probs[s].shape, i).numpy() * log_probs[s]).sum() for i, s in enumerate(sorted(log_probs))
        ), log_probs

    (_, log_probs), grads = jax.jit(jax.value_and_grad(score, has_aux=True))(params)
    return {site: np.asarray(value) for site, value in log_probs.items()}, to_torch_layout(grads)


@pytest.mark.parametrize("spec", collect(), ids=str)
def test_twins(spec: Spec) -> None:
    weights = random_weights(spec)
    log_probs, grads, latents, x = pyro_side(spec, weights)
    twin_log_probs, twin_grads = numpyro_side(spec, weights, latents, x)

    assert sorted(twin_log_probs) == sorted(log_probs)
    for site, value in log_probs.items():
        assert value.shape == (PARTICLES, BATCH)
        np.testing.assert_allclose(twin_log_probs[site], value, TOLERANCE, TOLERANCE, err_msg=str(site))
    assert sorted(twin_grads) == sorted(grads) == sorted(weights)
    for name, grad in grads.items():
        # no density of a point mass, or of its code's index, at a given value depends on what placed it there
        assert np.abs(grad).max() > 0 or (isinstance(spec, (VQVAE, HierarchicalVQVAE)) and name.startswith(OF_CODES))
        # An entry may be the small rest of terms as large as the array's largest, which are rounded as those are.
        scale = max(1.0, np.abs(grad).max())
        np.testing.assert_allclose(twin_grads[name], grad, TOLERANCE, TOLERANCE * scale, err_msg=name)


@pytest.mark.parametrize(
    "kind",
    [Spec, Likelihood, Network, Prior, Family, Denoiser, Schedule, EndLikelihood],
    ids=lambda kind: kind.__name__,
)
def test_no_export_without_a_twin(kind: type[Part]) -> None:
    rows = collect()
    tested = {type(spec) for spec in rows} | {type(part) for spec in rows for part in vars(spec).values()}
    assert exported(kind) <= tested, "add specs to TWINS in tests/test_<folder>.py"


@pytest.mark.parametrize(
    "spec",
    [*(VAE(16, 3, network) for network in NETWORKS), *(replace(SMALL, prior=p) for p in PRIORS[1:]), LINEAR],
    ids=str,
)
def test_weights_convert_both_ways(spec: Spec) -> None:
    weights = random_weights(spec)
    program = spec.numpyro()
    nested = from_torch_layout(weights, template(program, np.zeros((1, spec.data_dim))))
    back = to_torch_layout(nested)
    assert sorted(back) == sorted(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].flags.c_contiguous
    again = from_torch_layout(back, nested)
    assert jax.tree.structure(again) == jax.tree.structure(nested)
    jax.tree.map(np.testing.assert_array_equal, again, nested)


# --- initial weights --------------------------------------------------------------------------------------------


def initial_weights(engine: str, spec: Spec) -> dict[str, np.ndarray]:
    program = getattr(spec, engine)()
    if engine == "pyro":
        return program.weights
    x = np.zeros((1, spec.data_dim))
    return to_torch_layout(jax.jit(lambda key: program.init(key, x)[0])(jax.random.key(0)))


@pytest.mark.parametrize(
    "spec",
    [VAE(64, 5, MLP((80, 60)), Gaussian("pixel")), VAE(64, 5, Conv((1, 8, 8), (20, 30), 50)), LinearVAE(300, 20)],
    ids=lambda spec: type(getattr(spec, "network", spec)).__name__,
)
def test_initial_weights_are_glorot_uniform_and_zero(engine: str, spec: Spec) -> None:
    for name, array in initial_weights(engine, spec).items():
        if not name.endswith(".weight"):
            assert not array.any(), name
            continue
        area = np.prod(array.shape[2:])
        bound = np.sqrt(6 / (area * (array.shape[0] + array.shape[1])))
        assert np.abs(array).max() <= bound, name
        # 5 standard errors of the second moment of U(-a, a), whose fourth moment is a^4 / 5
        moment, error = bound**2 / 3, 5 * bound**2 * np.sqrt((1 / 5 - 1 / 9) / array.size)
        assert abs((array**2).mean() - moment) < error, name


WITHOUT_A_BIAS = (DeepHierarchicalVAE, DiffusionVAE, VariationalDiffusion)
AT_THE_MEAN_OTHERWISE = (AutoregressiveBernoulli, DiscretizedLogistic)
"""Likelihoods that ``DataMean`` puts at a mean in another sense."""


@pytest.mark.parametrize("spec", [s for s in collect() if not isinstance(s, WITHOUT_A_BIAS)], ids=str)
def test_one_bias_puts_the_likelihood_at_the_mean(spec: Spec) -> None:
    mean = np.linspace(0.1, 0.9, spec.data_dim)
    weights = spec.pyro().weights or {}
    ((name, bias),) = spec.bias_of_mean(mean).items()
    assert weights[name].shape == bias.shape
    if not spec.generative or isinstance(getattr(spec, "likelihood", None), AT_THE_MEAN_OTHERWISE):
        return
    matrix = name.removesuffix("bias") + "weight"
    program = spec.pyro().with_weights(weights | {name: bias, matrix: 0 * weights[matrix]})
    with torch.no_grad():
        found = poutine.trace(program.model).get_trace(size=2).nodes["x"]["fn"].mean.numpy()
    if "convs" in name:  # one bias a channel
        channels = spec.data_network.image_shape[0]
        mean = np.repeat(mean.reshape(channels, -1).mean(axis=1), spec.data_dim // channels)
    np.testing.assert_allclose(found, np.stack([mean, mean]), 1e-6)


@pytest.mark.parametrize("spec", [s for s in collect() if isinstance(s, WITHOUT_A_BIAS)], ids=str)
def test_no_bias_for_the_mean(spec: Spec) -> None:
    with pytest.raises(InvalidArgument, match=r"DataMean must start a model .*; got .*\. Use another start"):
        spec.bias_of_mean(np.zeros(spec.data_dim))


def test_values_of_some_leaves() -> None:
    tree = {"a.net$params": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}, "a.scale": np.zeros(())}
    found = with_values(tree, "a.", {"net.weight": np.ones((3, 2))})
    assert list(found) == ["a.net$params"]
    assert found["a.net$params"]["kernel"].sum() == 6
    assert found["a.net$params"]["bias"] is tree["a.net$params"]["bias"]
    several = with_values({"b": np.zeros((4, 3))}, "", {"b": np.arange(3.0)}, replicated=True)
    np.testing.assert_array_equal(several["b"], np.tile(np.arange(3.0), (4, 1)))
    for flat, message in (
        ({"net.wieght": 0.0}, "weights must have names"),
        ({"net.weight": np.ones(3)}, r"shape \(3, 2\)"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            with_values(tree, "a.", flat)


# --- inside a user's own program --------------------------------------------------------------------------------


@pytest.fixture
def pair() -> list[VAE]:
    return [SMALL, replace(SMALL, network=MLP(hidden=(4,)))]


def test_two_models_in_one_pyro_program(pair: list[VAE]) -> None:
    left, right = pair[0].pyro(name="left"), pair[1].pyro(name="right")
    x = torch.zeros(BATCH, 16)

    def model() -> None:
        left.model(x)
        with pyro.contrib.autoname.scope(prefix="second"):
            right.model(x)

    trace = poutine.trace(model).get_trace()
    params = {name for name, site in trace.nodes.items() if site["type"] == "param"}
    expected = {f"left.decoder$$$layers.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    expected |= {name.replace("left", "right") for name in expected}
    assert params == expected == set(pyro.get_param_store())
    assert {name for name in trace.stochastic_nodes if "z" in name} == {"z", "second/z"}
    assert pyro.get_param_store()["right.decoder$$$layers.0.weight"] is right.model.decoder.layers[0].weight
    assert sorted(left.weights) == sorted(pair[0].pyro().weights)  # a file's names have no prefix


def test_two_models_in_one_numpyro_program(pair: list[VAE]) -> None:
    left, right = pair[0].numpyro(name="left"), pair[1].numpyro(name="right")
    x = np.zeros((BATCH, 16))

    def model() -> None:
        left.model(x)
        with handlers.scope(prefix="second"):
            right.model(x)

    trace = handlers.trace(handlers.seed(model, 0)).get_trace()
    params = {name for name, site in trace.items() if site["type"] == "param"}
    assert params == {"left.decoder$params", "second/right.decoder$params"}
    samples = {name for name, site in trace.items() if site["type"] == "sample"}
    assert samples == {"z", "x", "second/z", "second/x"}


def test_a_name_leaves_no_prefix_in_weights_files(engine: str) -> None:
    weights = random_weights(SMALL)
    named = getattr(SMALL, engine)(name="left").with_weights(weights)
    assert sorted(named.weights) == sorted(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(named.weights[name], array)


@pytest.mark.parametrize("name", ["left.right", "0", "a b"])
def test_names_are_identifiers(engine: str, name: str) -> None:
    with pytest.raises(InvalidArgument, match="name must be empty or a Python identifier; got"):
        getattr(SMALL, engine)(name=name)


def forms(engine: str, spec: Spec) -> tuple[Any, Any, Callable]:
    """(model, guide, trace) with the weights bound, seeded, and x as the engine's array."""
    if engine == "pyro":
        program = spec.pyro().with_weights(random_weights(spec))
        return program.model, program.guide, lambda fn, *a, **k: dict(poutine.trace(fn).get_trace(*a, **k).nodes)
    program = spec.numpyro().with_weights(random_weights(spec))
    return (
        program.model,
        program.guide,
        lambda fn, *a, **k: handlers.trace(handlers.seed(fn, 0)).get_trace(*a, **k),
    )


def array(engine: str, x: np.ndarray) -> Any:
    return torch.tensor(x) if engine == "pyro" else x


@pytest.mark.parametrize("spec", [SMALL, LINEAR], ids=lambda spec: type(spec).__name__)
def test_prior_predictive_plate_and_scale(engine: str, spec: Spec) -> None:
    model, guide, trace = forms(engine, spec)
    drawn = trace(model, size=4)
    assert drawn["z"]["value"].shape == (4, 3)
    assert drawn["x"]["value"].shape == (4, spec.data_dim)
    assert not drawn["x"]["is_observed"]
    assert trace(model)["x"]["value"].shape == (1, spec.data_dim)

    x = array(engine, np.zeros((4, spec.data_dim)))
    for sites, names in ((trace(model, x, size=12), ("z", "x")), (trace(guide, x, size=12), ("z",))):
        for name in names:
            assert sites[name]["scale"] == 3.0
            (frame,) = sites[name]["cond_indep_stack"]
            assert (frame.name, frame.dim, frame.size) == ("data", -1, 4)
    assert trace(model, x)["x"]["scale"] in (None, 1.0)
    assert trace(model, x)["x"]["is_observed"]


def test_wrong_shapes_are_refused(engine: str) -> None:
    model, guide, trace = forms(engine, SMALL)
    for form in (model, guide):
        with pytest.raises(InvalidArgument, match=r"x must have shape \(B, 16\); got \(4, 4, 1\)"):
            trace(form, array(engine, np.zeros((4, 4, 1))))
        with pytest.raises(InvalidArgument, match="size must be at least the batch's 4 rows; got 3"):
            trace(form, array(engine, np.zeros((4, 16))), size=3)


def test_posterior_predictive_in_the_library_itself(engine: str) -> None:
    """Latents given, data drawn: Predictive and condition see ordinary sites."""
    spec = replace(LINEAR, scale=1e-6)
    weights = random_weights(spec)
    z = np.random.default_rng(0).standard_normal((7, BATCH, 3))
    expected = z @ weights["decoder.weight"].T + weights["decoder.bias"]
    if engine == "pyro":
        program = spec.pyro().with_weights(weights)
        samples = {"z": torch.tensor(z)}
        x = pyro.infer.Predictive(program.model, samples, return_sites=("x",))(size=BATCH)["x"].detach().numpy()
        conditioned = poutine.condition(program.model, data={"z": torch.tensor(z[0])})(size=BATCH).detach().numpy()
    else:
        program = spec.numpyro().with_weights(weights)
        x = numpyro.infer.Predictive(program.model, {"z": z})(jax.random.key(0), size=BATCH)["x"]
        conditioned = handlers.seed(handlers.condition(program.model, data={"z": z[0]}), 0)(size=BATCH)
    np.testing.assert_allclose(x, expected, atol=1e-4)
    np.testing.assert_allclose(conditioned, expected[0], atol=1e-4)


def test_decode_is_the_mean_image(engine: str) -> None:
    weights = random_weights(LINEAR)
    z = np.random.default_rng(0).standard_normal((2, BATCH, 3))
    if engine == "pyro":
        mean = LINEAR.pyro().with_weights(weights).model.decode(torch.tensor(z)).mean.detach()
    else:
        program = LINEAR.numpyro()
        params = from_torch_layout(weights, template(program, np.zeros((1, 5))))
        mean = handlers.substitute(program.model.decode, data=params)(z).mean
    np.testing.assert_allclose(mean, z @ weights["decoder.weight"].T + weights["decoder.bias"], rtol=1e-12)


def test_library_elbo_of_the_exact_guide_is_the_evidence(engine: str) -> None:
    """With the exact posterior as guide, one sample of the library's own Trace_ELBO is log p(x), whatever the seed."""
    spec = replace(LINEAR, guide="full")
    weights = spec.exact_guide(random_weights(spec))
    x = np.random.default_rng(1).standard_normal((BATCH, 5))
    expected = -spec.log_prob(weights, x).sum()
    if engine == "pyro":
        program = spec.pyro().with_weights(weights)
        losses = [pyro.infer.Trace_ELBO().loss(program.model, program.guide, torch.tensor(x)) for _ in range(2)]
    else:
        program = spec.numpyro()
        params = from_torch_layout(weights, template(program, x))
        elbo = numpyro.infer.Trace_ELBO()
        losses = [elbo.loss(jax.random.key(i), params, program.model, program.guide, x) for i in range(2)]
    np.testing.assert_allclose(losses, expected, rtol=1e-12)


def test_numpyro_seeds_can_be_vmapped_and_weights_substituted() -> None:
    program = SMALL.numpyro()
    x = np.zeros((BATCH, 16))

    def initial(key: Any) -> dict:
        return handlers.trace(handlers.seed(program.guide, key)).get_trace(x)["encoder$params"]["value"]

    keys = jax.random.split(jax.random.key(0), 3)
    many = jax.jit(jax.vmap(initial))(keys)
    one = initial(keys[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b, rtol=1e-12), many, one)
    kernel = many["layers"][0]["kernel"]
    assert np.abs(kernel[0] - kernel[1]).max() > 0.1

    zeros = {"encoder$params": jax.tree.map(np.zeros_like, one)}

    def draw(key: Any, params: dict) -> Any:
        return handlers.seed(handlers.substitute(program.guide, data=params), key)(x)

    # Zero weights make q(z|x) standard normal: the seed's noise, and the same whether or not weights are given.
    noise = jax.vmap(draw, (0, None))(keys, zeros)
    assert noise.shape == (3, BATCH, 3)
    np.testing.assert_allclose(noise[1], draw(keys[1], zeros), rtol=1e-12)
    q = handlers.substitute(program.guide.encode, data={"encoder$params": one})(x).base_dist
    np.testing.assert_allclose(draw(keys[1], {}), q.loc + q.scale * noise[1], rtol=1e-10)
