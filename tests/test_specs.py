"""Specs: configs there and back, refusals, missing engines, the weights rule, and the linear VAE's closed forms."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
from scipy import optimize, stats

import elbozoo.guides
import elbozoo.zoo
from elbozoo.guides import DiagonalGaussian, FullCovarianceGaussian
from elbozoo.inference.errors import InvalidArgument
from elbozoo.inference.parts import Part, public_parts
from elbozoo.inference.weights import from_torch_layout, to_torch_layout
from elbozoo.zoo import (
    MLP,
    VAE,
    Bernoulli,
    ContinuousBernoulli,
    Conv,
    DiscretizedLogistic,
    Gaussian,
    LinearVAE,
    Spec,
)
from elbozoo.zoo import linear_vae as closed

SPECS = [
    VAE(),
    VAE(
        data_dim=32,
        network=Conv(image_shape=(2, 4, 4), channels=(3,)),
        likelihood=Gaussian("pixel"),
        guide=FullCovarianceGaussian(),
    ),
    VAE(data_dim=3, latent_dim=2, network=MLP(()), likelihood=DiscretizedLogistic(4)),
    LinearVAE(4, 2, scale=0.5, learn_scale=True, guide="full"),
]

# --- configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_config_round_trip(spec: Spec) -> None:
    text = json.dumps(spec.to_config())
    again = Spec.from_config(json.loads(text))
    assert again == spec
    assert hash(again) == hash(spec)
    assert json.dumps(again.to_config()) == text


def test_config_is_plain() -> None:
    assert VAE(data_dim=3, network=MLP((4,))).to_config() == {
        "class": "VAE",
        "data_dim": 3,
        "latent_dim": 50,
        "network": {
            "class": "MLP",
            "hidden": [4],
            "activation": "tanh",
            "normalization": "none",
            "output_gain": 1.0,
            "hidden_gain": 1.0,
        },
        "likelihood": {"class": "Bernoulli"},
        "guide": {"class": "DiagonalGaussian"},
        "prior": {"class": "StandardNormal"},
    }


def test_config_leaves_defaults_out() -> None:
    assert Spec.from_config({"class": "VAE", "data_dim": 3}) == VAE(data_dim=3)


REFUSED_CONFIGS = [
    ({"class": "VEA"}, "must be one of .*; got 'VEA'. The nearest is 'VAE'"),
    (
        {"class": "VAE", "latent_dims": 3},
        "VAE: field must be one of .*; got 'latent_dims'. The nearest is 'latent_dim'",
    ),
    ({"class": "VAE", "network": {"class": "os.system"}}, r"VAE.network: class must be one of .*; got 'os.system'"),
    ({"class": "public_parts"}, "must be one of"),
    ({"class": ["VAE"]}, "must be one of"),
    ({"data_dim": 3}, 'must name its class under the key "class"'),
    ({"class": "LinearVAE", "data_dim": 3}, r"LinearVAE must have the fields .*; got none for \['latent_dim'\]"),
    ({"class": "VAE", "data_dim": 0}, "data_dim must be a whole number of at least 1; got 0"),
    ({"class": "MLP"}, "config must describe a Spec; got MLP"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED_CONFIGS, ids=lambda value: str(value)[:40])
def test_bad_configs_are_refused(config: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        Spec.from_config(config)


def test_classes_are_the_exported_ones() -> None:
    parts = public_parts()
    assert {"VAE", "LinearVAE", "MLP", "DiagonalGaussian"} <= set(parts)
    assert all(issubclass(part, Part) for part in parts.values())
    for name, part in parts.items():
        assert getattr(elbozoo.zoo, name, None) is part or getattr(elbozoo.guides, name, None) is part


REFUSED_FIELDS: list[tuple[Any, dict, str]] = [
    (VAE, {"data_dim": 3.0}, "data_dim must be a whole number of at least 1; got 3.0"),
    (VAE, {"latent_dim": True}, "latent_dim must be a whole number of at least 1; got True"),
    (VAE, {"network": MLP}, r"network must be a Network; got <class .*Pass MLP\(\)"),
    (VAE, {"likelihood": MLP()}, "likelihood must be a Likelihood; got MLP"),
    (VAE, {"guide": "diagonal"}, "guide must be a Family; got 'diagonal'"),
    (VAE, {"data_dim": 3, "network": Conv()}, "image_shape must have data_dim=3 entries; got"),
    (LinearVAE, {"data_dim": 3, "latent_dim": 2, "guide": "ful"}, "guide must be one of .*The nearest is 'full'"),
    (LinearVAE, {"data_dim": 3, "latent_dim": 2, "scale": 0.0}, "scale must be a finite number above 0; got 0.0"),
    (LinearVAE, {"data_dim": 3, "latent_dim": 2, "learn_scale": 1}, "learn_scale must be True or False; got 1"),
    (MLP, {"hidden": 200}, "hidden must be a tuple of whole numbers; got 200"),
    (MLP, {"hidden": (200, 0)}, "every entry of hidden must be a whole number of at least 1; got 0"),
    (MLP, {"activation": "Tanh"}, "activation must be one of .*; got 'Tanh'. The nearest is 'tanh'"),
    (Conv, {"image_shape": (28, 28)}, "image_shape must be a tuple of 3 whole numbers"),
    (Conv, {"image_shape": (1, 28, 30)}, "channels must have .*; got .*Use fewer channels, or pad to multiples of 4"),
    (Gaussian, {"scale": "pixels"}, "scale must be one of .*The nearest is 'pixel'"),
    (Gaussian, {"scale": -1.0}, "scale must be a finite number above 0; got -1.0"),
    (DiscretizedLogistic, {"levels": 1}, "levels must be a whole number of at least 2; got 1"),
]


@pytest.mark.parametrize(("cls", "fields", "message"), REFUSED_FIELDS, ids=lambda value: str(value)[:40])
def test_bad_fields_are_refused(cls: type[Part], fields: dict, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        cls(**fields)


def test_specs_are_frozen_and_lists_become_tuples() -> None:
    with pytest.raises(FrozenInstanceError):
        VAE().latent_dim = 3  # type: ignore[misc]
    assert MLP(hidden=[3, 4]) == MLP(hidden=(3, 4))


@pytest.mark.parametrize("spec", [VAE(data_dim=3), LinearVAE(3, 2)], ids=lambda spec: type(spec).__name__)
def test_check_of_data(spec: Spec) -> None:
    spec.check(np.ones((2, 3)))
    for shape in ((3,), (2, 4), (2, 3, 1)):
        with pytest.raises(InvalidArgument, match=r"x must have shape \(N, 3\)"):
            spec.check(np.ones(shape))
    with pytest.raises(InvalidArgument, match="got nan"):
        spec.check(np.full((2, 3), np.nan))


def test_conv_shapes() -> None:
    assert Conv((3, 8, 16), channels=(4, 5)).reduced_shape == (5, 2, 4)


def test_num_outputs() -> None:
    likelihoods = (Bernoulli(), ContinuousBernoulli(), Gaussian(), Gaussian("pixel"), DiscretizedLogistic())
    assert [likelihood.num_outputs for likelihood in likelihoods] == [1, 1, 1, 2, 2]
    assert DiagonalGaussian().num_outputs(4) == 8
    assert FullCovarianceGaussian().num_outputs(4) == 14


# --- engines that are not there ---------------------------------------------------------------------------------


def run_without(modules: tuple[str, ...], code: str) -> str:
    """Run code in a fresh interpreter where these modules cannot be imported; its last line of output."""
    block = f"import sys\nsys.modules.update(dict.fromkeys({modules!r}))\n"
    done = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, timeout=300)
    return (done.stdout + done.stderr).strip().splitlines()[-1]


def test_specs_need_no_engine() -> None:
    code = "from elbozoo.zoo import VAE; import elbozoo.guides; print(VAE.from_config(VAE().to_config()) == VAE())"
    assert run_without(("torch", "pyro", "jax", "numpyro", "flax", "optax"), code) == "True"


@pytest.mark.parametrize("first", ["zoo", "guides", "inference"])
def test_packages_import_in_any_order(first: str) -> None:
    rest = "import elbozoo.guides, elbozoo.zoo, elbozoo.inference; print(elbozoo.zoo.VAE().guide)"
    assert run_without((), f"import elbozoo.{first}\n{rest}") == "DiagonalGaussian()"


@pytest.mark.parametrize(
    ("engine", "gone", "spec"),
    [
        ("pyro", "torch", "VAE()"),
        ("pyro", "pyro", "LinearVAE(3, 2)"),
        ("numpyro", "jax", "LinearVAE(3, 2)"),
        ("numpyro", "flax", "VAE()"),
    ],
)
def test_a_missing_engine_says_how_to_install_it(engine: str, gone: str, spec: str) -> None:
    pytest.importorskip(gone)
    line = run_without((gone,), f"from elbozoo.zoo import *; {spec}.{engine}()")
    error = "elbozoo.inference.errors.InvalidArgument: engine must be installed; got no module"
    assert line == f"""{error} '{gone}'. Run pip install "elbozoo[{engine}]"."""


def test_another_missing_module_is_not_called_a_missing_engine(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "homemade"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "import dataclasses\nfrom elbozoo.zoo import Likelihood\n\n@dataclasses.dataclass(frozen=True)\n"
        "class Homemade(Likelihood):\n    pass\n"
    )
    (folder / "likelihoods_pyro.py").write_text("import no_such_module_of_mine\n")
    (folder / "likelihoods_numpyro.py").write_text("class Homemade:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import homemade  # type: ignore[import-not-found]

    with pytest.raises(ModuleNotFoundError, match="no_such_module_of_mine"):
        homemade.Homemade().form("pyro")
    assert homemade.Homemade().form("numpyro").__module__ == "homemade.likelihoods_numpyro"  # found with no registry
    config = VAE(likelihood=homemade.Homemade()).to_config()
    assert homemade.Homemade.from_config(config["likelihood"]) == homemade.Homemade()


def test_unknown_engines_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"engine must be one of .*; got 'numpyr'. The nearest is 'numpyro'"):
        Bernoulli().form("numpyr")


# --- the weights rule -------------------------------------------------------------------------------------------

NESTED = {
    "decoder$params": {
        "layers": {0: {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.arange(3.0)}},
        "convs": {0: {"kernel": np.arange(3 * 3 * 2 * 5.0).reshape(3, 3, 2, 5)}},
        "line": {"kernel": np.arange(24.0).reshape(2, 3, 4)},
        "norm": {"scale": np.arange(4.0), "kernel": np.arange(7.0)},
    },
    "log_scale": np.array(2.0, np.float32),
}


def test_weights_rule() -> None:
    flat = to_torch_layout(NESTED)
    kernel = NESTED["decoder$params"]["convs"][0]["kernel"]
    assert {name: array.shape for name, array in flat.items()} == {
        "decoder.layers.0.weight": (3, 2),
        "decoder.layers.0.bias": (3,),
        "decoder.convs.0.weight": (5, 2, 3, 3),
        "decoder.line.weight": (4, 3, 2),
        "decoder.norm.scale": (4,),
        "decoder.norm.weight": (7,),
        "log_scale": (),
    }
    assert flat["decoder.layers.0.weight"][2, 1] == NESTED["decoder$params"]["layers"][0]["kernel"][1, 2]
    assert flat["decoder.convs.0.weight"][4, 1, 2, 0] == kernel[2, 0, 1, 4]
    back = from_torch_layout(flat, NESTED)
    assert list(back["decoder$params"]["layers"]) == [0]
    for name, array in to_torch_layout(back).items():
        np.testing.assert_array_equal(array, flat[name])
        assert array.dtype == flat[name].dtype
        assert array.flags.c_contiguous
    np.testing.assert_array_equal(back["decoder$params"]["convs"][0]["kernel"], kernel)


def test_weights_are_copies() -> None:
    flat = to_torch_layout({"bias": (bias := np.zeros(3))})
    flat["bias"][0] = 1.0
    assert bias[0] == 0.0


def test_weights_prefix() -> None:
    named = {"left.decoder$params": {"bias": np.ones(2)}, "left.log_scale": np.ones(())}
    flat = to_torch_layout(named, "left.")
    assert sorted(flat) == ["decoder.bias", "log_scale"]
    assert sorted(from_torch_layout(flat, named, "left.")) == sorted(named)
    with pytest.raises(InvalidArgument, match=r"params must have sites that begin with 'right.'; got 'left.decoder"):
        to_torch_layout(named, "right.")


def test_wrong_weights_are_refused() -> None:
    flat = to_torch_layout(NESTED)
    bias = flat.pop("decoder.layers.0.bias")
    with pytest.raises(InvalidArgument, match=r"missing \['decoder.layers.0.bias'\], unexpected \[\]"):
        from_torch_layout(flat, NESTED)
    message = r"unexpected \['decoder.layer.0.bias'\].*nearest to 'decoder.layer.0.bias' is 'decoder.layers.0.bias'"
    with pytest.raises(InvalidArgument, match=message):
        from_torch_layout(flat | {"decoder.layer.0.bias": bias}, NESTED)
    flat |= {"decoder.layers.0.bias": bias, "decoder.layers.0.weight": flat["decoder.layers.0.weight"].T}
    with pytest.raises(InvalidArgument, match=r"decoder.layers.0.weight'\] must have shape \(3, 2\); got \(2, 3\)"):
        from_torch_layout(flat, NESTED)


def test_two_leaves_of_one_name_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"two called 'a.weight'"):
        to_torch_layout({"a$params": {"kernel": np.ones((2, 2)), "weight": np.ones(2)}})


# --- the linear VAE ---------------------------------------------------------------------------------------------

LINEAR = [
    LinearVAE(5, 2, scale=0.7, guide="diagonal"),
    LinearVAE(5, 2, scale=0.7, guide="full"),
    LinearVAE(4, 3, learn_scale=True, guide="full"),
    LinearVAE(2, 3, scale=0.4, guide="full"),
    LinearVAE(1, 1, scale=0.4),
]


def linear_weights(spec: LinearVAE) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    d, x = spec.latent_dim, spec.data_dim
    shapes = {"decoder.weight": (x, d), "decoder.bias": (x,), "encoder.weight": (d, x), "encoder.bias": (d,)}
    if spec.learn_scale:
        shapes["decoder_log_scale"] = ()
    shapes |= {"encoder_tril": (d * (d + 1) // 2,)} if spec.guide == "full" else {"encoder_log_scale": (d,)}
    return {name: np.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}


def decoder(spec: LinearVAE, weights: dict) -> tuple[np.ndarray, np.ndarray, float]:
    scale = np.exp(weights["decoder_log_scale"]) if spec.learn_scale else spec.scale
    return weights["decoder.weight"], weights["decoder.bias"], float(scale) ** 2


def guide(spec: LinearVAE, weights: dict, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of q(z | x), written out entry by entry."""
    mean = x @ weights["encoder.weight"].T + weights["encoder.bias"]
    if spec.guide == "diagonal":
        return mean, np.diag(np.exp(2 * weights["encoder_log_scale"]))
    entries = iter(weights["encoder_tril"])
    tril = np.zeros((spec.latent_dim,) * 2)
    for row in range(spec.latent_dim):
        for column in range(row + 1):
            tril[row, column] = np.exp(next(entries)) if row == column else next(entries)
    return mean, tril @ tril.T


def data(spec: LinearVAE, count: int = 6) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(count, spec.data_dim)) * np.linspace(2.0, 0.5, spec.data_dim) + 0.3


@pytest.mark.parametrize("spec", LINEAR, ids=str)
def test_linear_evidence(spec: LinearVAE) -> None:
    weights, x = linear_weights(spec), data(spec)
    w, b, s2 = decoder(spec, weights)
    expected = stats.multivariate_normal.logpdf(x, b, w @ w.T + s2 * np.eye(spec.data_dim))
    np.testing.assert_allclose(spec.log_prob(weights, x), expected, rtol=1e-12)


def joint_posterior(spec: LinearVAE, weights: dict, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Condition the joint Gaussian of (z, x) on x."""
    w, b, s2 = decoder(spec, weights)
    gain = w.T @ np.linalg.inv(w @ w.T + s2 * np.eye(spec.data_dim))
    return (x - b) @ gain.T, np.eye(spec.latent_dim) - gain @ w


@pytest.mark.parametrize("spec", LINEAR, ids=str)
def test_linear_posterior(spec: LinearVAE) -> None:
    weights, x = linear_weights(spec), data(spec)
    mean, covariance = spec.posterior(weights, x)
    expected_mean, expected_covariance = joint_posterior(spec, weights, x)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(covariance, expected_covariance, rtol=1e-10, atol=1e-12)


def bound(spec: LinearVAE, weights: dict, x: np.ndarray, beta: float = 1.0) -> np.ndarray:
    """``E_q[log p(x|z)] - beta KL(q || p(z))``, from the Gaussian formulas."""
    (w, b, s2), (mean, covariance) = decoder(spec, weights), guide(spec, weights, x)
    error = ((x - b - mean @ w.T) ** 2).sum(-1) + np.trace(w @ covariance @ w.T)
    log_lik = -0.5 * (spec.data_dim * np.log(2 * np.pi * s2) + error / s2)
    log_det = np.linalg.slogdet(covariance)[1]
    return log_lik - beta * 0.5 * (np.trace(covariance) + (mean**2).sum(-1) - spec.latent_dim - log_det)


@pytest.mark.parametrize("spec", LINEAR, ids=str)
def test_linear_elbo(spec: LinearVAE) -> None:
    weights, x = linear_weights(spec), data(spec)
    np.testing.assert_allclose(spec.elbo(weights, x), bound(spec, weights, x), rtol=1e-10)


@pytest.mark.parametrize("spec", LINEAR, ids=str)
def test_linear_exact_guide(spec: LinearVAE) -> None:
    weights, x = linear_weights(spec), data(spec)
    exact = spec.exact_guide(weights)
    assert {name: a.shape for name, a in exact.items()} == {name: a.shape for name, a in weights.items()}
    mean, covariance = guide(spec, exact, x)
    expected_mean, expected_covariance = joint_posterior(spec, weights, x)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-9, atol=1e-11)
    gap = spec.log_prob(weights, x) - spec.elbo(exact, x)
    if spec.guide == "full" or spec.latent_dim == 1:
        np.testing.assert_allclose(covariance, expected_covariance, rtol=1e-9, atol=1e-11)
        np.testing.assert_allclose(gap, 0.0, atol=1e-10)
    else:  # two latents: -1/2 log(1 - rho^2)
        rho = expected_covariance[0, 1] / np.sqrt(expected_covariance[0, 0] * expected_covariance[1, 1])
        np.testing.assert_allclose(gap, -0.5 * np.log1p(-(rho**2)), rtol=1e-9)


@pytest.mark.parametrize("learn_scale", [False, True])
@pytest.mark.parametrize("beta", [1.0, 0.5, 3.0])
def test_linear_optimum_is_the_best_that_a_search_finds(beta: float, learn_scale: bool) -> None:
    spec = LinearVAE(3, 2, scale=0.6, learn_scale=learn_scale, guide="diagonal")
    x = data(spec, 40)
    if learn_scale and beta != 1.0:
        with pytest.raises(InvalidArgument, match="beta must be 1 where the scale is learned"):
            spec.optimum(x, beta)
        return
    template = linear_weights(spec)
    names, sizes = list(template), [array.size for array in template.values()]

    def unpack(vector: np.ndarray) -> dict[str, np.ndarray]:
        pieces = np.split(vector, np.cumsum(sizes)[:-1])
        return {name: piece.reshape(template[name].shape) for name, piece in zip(names, pieces, strict=True)}

    def loss(vector: np.ndarray) -> float:
        return -bound(spec, unpack(vector), x, beta).mean()

    starts = np.random.default_rng(0).normal(size=(4, sum(sizes)))
    found = min(optimize.minimize(loss, start, tol=1e-9).fun for start in starts)
    at_optimum = -bound(spec, spec.optimum(x, beta), x, beta).mean()
    assert at_optimum == pytest.approx(found, abs=1e-6)
    assert at_optimum <= found + 1e-9


@pytest.mark.parametrize("guide_form", ["diagonal", "full"])
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_linear_closed_forms_describe_the_optimum(beta: float, guide_form: str) -> None:
    """Rate, active units, posterior variances and squared error, measured on the optimal weights."""
    spec = LinearVAE(5, 4, scale=0.5, guide=guide_form)
    x = data(spec, 200)
    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(x, rowvar=False, bias=True)))[::-1]
    served, s2 = eigenvalues[:4], 0.25
    weights = spec.optimum(x, beta)
    mean, covariance = guide(spec, weights, x)
    variances = np.diag(covariance)
    kl = 0.5 * (variances + (mean**2).mean(0) - 1.0 - np.log(variances))
    assert (beta == 1.0) == (kl > 0.01).all()  # at beta = 4 some directions have collapsed

    np.testing.assert_allclose(kl, closed.kl_per_direction(served, s2, beta), rtol=1e-9, atol=1e-12)
    active = closed.active_unit_statistic(served, s2, beta)
    np.testing.assert_allclose(mean.var(0), active, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(variances, closed.posterior_variance(served, s2, beta), rtol=1e-9)
    w, b, _ = decoder(spec, weights)
    error = ((x - b - mean @ w.T) ** 2).sum(-1).mean() + np.trace(w @ covariance @ w.T)
    assert error == pytest.approx(closed.squared_error(served, s2, beta).sum() + eigenvalues[4:].sum(), rel=1e-9)
    if beta == 1.0:  # the bound is tight, and a direction's value is what the evidence loses without it
        np.testing.assert_allclose(spec.elbo(weights, x), spec.log_prob(weights, x), rtol=1e-10)
        fewer = replace(spec, latent_dim=3)
        lost = (spec.log_prob(weights, x) - fewer.log_prob(fewer.optimum(x), x)).mean()
        assert lost == pytest.approx(float(closed.direction_value(served[3], s2)), rel=1e-8)


def test_linear_closed_forms_by_hand() -> None:
    np.testing.assert_allclose(closed.kl_per_direction([4.0, 1.0, 0.25], 0.5, 2.0), [np.log(2.0), 0.0, 0.0])
    np.testing.assert_allclose(closed.active_unit_statistic([4.0, 1.0, 0.25], 0.5, 2.0), [0.75, 0.0, 0.0])
    np.testing.assert_allclose(closed.posterior_variance([4.0, 1.0, 0.0], 0.5, 2.0), [0.25, 1.0, 1.0])
    np.testing.assert_allclose(closed.squared_error([4.0, 1.0, 0.25], 0.5, 2.0), [1.0, 1.0, 0.25])
    np.testing.assert_allclose(closed.direction_value([2.0, 0.5], 1.0), [0.5 * (1 - np.log(2.0)), 0.0])
    assert closed.learned_variance([4.0, 1.0, 2.0], 1) == 1.5
    with pytest.raises(InvalidArgument, match="latent_dim must be below the 3 eigenvalues; got 3"):
        closed.learned_variance([4.0, 1.0, 2.0], 3)
    with pytest.raises(InvalidArgument, match=r"s2 and beta must be above 0; got \(0.0, 1.0\)"):
        closed.kl_per_direction([1.0], 0.0)
    with pytest.raises(InvalidArgument, match=r"eigenvalues must be at least 0; got -1.0"):
        closed.kl_per_direction([-1.0], 1.0)


def test_linear_more_latents_than_directions() -> None:
    spec = LinearVAE(2, 4, scale=0.3, guide="full")
    x = data(spec, 50)
    weights = spec.optimum(x)
    np.testing.assert_allclose(spec.elbo(weights, x), spec.log_prob(weights, x), rtol=1e-10)
    moments = x.mean(0), np.cov(x, rowvar=False, bias=True)
    np.testing.assert_allclose(spec.log_prob(weights, x), stats.multivariate_normal.logpdf(x, *moments), rtol=1e-9)


def test_linear_missing_weights_are_named() -> None:
    spec = LINEAR[0]
    with pytest.raises(InvalidArgument, match=r"weights must have 'decoder.weight'; got"):
        spec.log_prob({}, data(spec))
