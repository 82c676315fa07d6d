"""The guide families' densities, draws and gradients, against SciPy, quadrature and exact posteriors."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest
from covering import PYRO_ALONE, covering
from scipy import special, stats

from elbozoo.guides import (
    Family,
    FullCovarianceGaussian,
    InverseAutoregressiveFlow,
    LowRankGaussian,
    MixtureOfGaussians,
    NeuralSplineFlow,
    SemiAmortised,
)
from elbozoo.inference import ELBO, IWAE, STL, DReG, Objective, Pathwise, evaluate
from elbozoo.inference.errors import InvalidArgument
from elbozoo.inference.weights import from_torch_layout
from elbozoo.zoo import MLP, VAE, Gaussian

IAF = InverseAutoregressiveFlow(num_flows=2, flow_hidden=(6, 5), context_dim=3)
NSF = NeuralSplineFlow(num_flows=2, flow_hidden=(6,), context_dim=3, num_bins=4, bound=2.0)
FLOWS = (IAF, NSF)
FAMILIES = (LowRankGaussian(rank=1), IAF, NSF, MixtureOfGaussians(num_components=3))
TRAINED = (*FAMILIES, SemiAmortised(steps=2, num_points=2))


class Posterior:
    """One family in one engine at given encoder outputs; NumPy in, NumPy out.

    Args:
        weights: of the family's own networks by torch name; random ones where there are none.
        spread: of the random ones.
    """

    def __init__(self, engine: str, family: Family, latent_dim: int, weights: Any = None, spread: float = 0.4):
        self.engine, self.random, self.spread = engine, np.random.default_rng(1), spread
        form = family.form(engine)
        if engine == "pyro":
            import torch

            self.module = form(family, latent_dim)
            state = self.module.state_dict()
            given = {n: self._weight(n, tuple(v.shape), weights) for n, v in state.items()}
            self.module.load_state_dict({n: torch.tensor(v) for n, v in given.items()})
        else:
            from flax import nnx

            self.module = form(family, latent_dim, rngs=nnx.Rngs(0))
            state = nnx.state(self.module, nnx.Param)
            template = {"guide$params": nnx.to_pure_dict(state)}
            names = import_module("elbozoo.inference.weights").to_torch_layout(template)
            given = {n: self._weight(n.removeprefix("guide."), v.shape, weights) for n, v in names.items()}
            nnx.replace_by_pure_dict(state, from_torch_layout(given, template)["guide$params"])
            nnx.update(self.module, state)

    def _weight(self, name: str, shape: tuple[int, ...], weights: Any) -> np.ndarray:
        return self.spread * self.random.standard_normal(shape) if weights is None else weights[name]

    def log_prob(self, outputs: np.ndarray, z: np.ndarray) -> np.ndarray:
        if self.engine == "pyro":
            import torch

            return self.module(torch.tensor(outputs)).log_prob(torch.tensor(z)).detach().numpy()
        import jax

        return np.asarray(jax.jit(lambda o, z: self.module(o).log_prob(z))(outputs, z))

    def own_draw(self, outputs: np.ndarray) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """A draw; its log density and that one's gradient in the outputs, as drawn and with the value given anew."""
        if self.engine == "pyro":
            import torch

            given = torch.tensor(outputs, requires_grad=True)
            q = self.module(given)
            z = q.rsample()
            found = [q.log_prob(z), q.log_prob(z.clone())]
            grads = [torch.autograd.grad(f.sum(), given, retain_graph=True)[0].numpy() for f in found]
            return z.detach().numpy(), [f.detach().numpy() for f in found], grads
        import jax

        def density(outputs: Any, fresh: bool) -> Any:
            q = self.module(outputs)
            z, intermediates = q.sample_with_intermediates(jax.random.key(0))
            log_prob = q.log_prob(z, intermediates) if fresh else q.log_prob(z)
            return log_prob.sum(), (log_prob, z)

        both = [jax.jit(jax.grad(lambda o, f=f: density(o, f), has_aux=True))(outputs) for f in (True, False)]
        return np.asarray(both[0][1][1]), [np.asarray(b[1][0]) for b in both], [np.asarray(b[0]) for b in both]

    def draws(self, outputs: np.ndarray, num: int, test: Any) -> tuple[np.ndarray, np.ndarray]:
        """``test(z)`` of each draw, and its gradients in the outputs by draw."""
        outputs = np.tile(outputs, (num, 1))
        if self.engine == "pyro":
            import torch

            given = torch.tensor(outputs, requires_grad=True)
            value = test(torch, self.module(given).rsample())
            (gradient,) = torch.autograd.grad(value.sum(), given)
            return value.detach().numpy(), gradient.numpy()
        import jax
        import jax.numpy as jnp

        def total(outputs: Any) -> Any:
            value = test(jnp, self.module(outputs).sample(jax.random.key(0)))
            return value.sum(), value

        gradient, value = jax.jit(jax.grad(total, has_aux=True))(outputs)
        return np.asarray(value), np.asarray(gradient)


def some_outputs(family: Family, latent_dim: int, seed: int = 0) -> np.ndarray:
    return 0.5 * np.random.default_rng(seed).standard_normal(family.num_outputs(latent_dim))


# --- densities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize("latent_dim", [1, 2])
def test_densities_integrate_to_one(engine: str, family: Family, latent_dim: int) -> None:
    axis, step = np.linspace(-12, 12, {1: 6001, 2: 601}[latent_dim], retstep=True)
    z = np.stack(np.meshgrid(*[axis] * latent_dim, indexing="ij"), -1).reshape(-1, latent_dim)
    log_prob = Posterior(engine, family, latent_dim).log_prob(some_outputs(family, latent_dim), z)
    assert log_prob.shape == (len(z),)
    assert np.exp(log_prob).sum() * step**latent_dim == pytest.approx(1.0, abs=2e-4)


@PYRO_ALONE
def test_low_rank_gaussian_is_a_gaussian(engine: str) -> None:
    loc, log_scale, factor = np.array([0.3, -1.0, 2.0]), np.array([-0.5, 0.1, 0.4]), np.array([1.0, 2, -1, 0.5, 0.3, 0])
    outputs, z = np.concatenate([loc, log_scale, factor]), np.random.default_rng(0).normal(size=(5, 3))
    w = factor.reshape(3, 2)
    expected = stats.multivariate_normal(loc, w @ w.T + np.diag(np.exp(2 * log_scale))).logpdf(z)
    np.testing.assert_allclose(Posterior(engine, LowRankGaussian(2), 3).log_prob(outputs, z), expected, rtol=1e-12)


@PYRO_ALONE
def test_mixture_is_a_mixture_of_gaussians(engine: str) -> None:
    rng = np.random.default_rng(0)
    logits, locs, log_scales = rng.normal(size=3), rng.normal(size=(3, 2)), 0.5 * rng.normal(size=(3, 2))
    outputs, z = np.concatenate([logits, locs.ravel(), log_scales.ravel()]), rng.normal(size=(5, 2))
    parts = [
        stats.multivariate_normal(m, np.diag(np.exp(2 * s))).logpdf(z) for m, s in zip(locs, log_scales, strict=True)
    ]
    expected = special.logsumexp(special.log_softmax(logits)[:, None] + parts, axis=0)
    found = Posterior(engine, MixtureOfGaussians(3), 2).log_prob(outputs, z)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def linear_flow(slope: float, backwards: float) -> dict[str, np.ndarray]:
    """Weights of a flow of two maps in two dimensions that are linear: ``z_1 += slope z_0``, then ``z_0 += backwards z_1``.

    Far to the right an ELU is the identity: hidden unit 1 is its one input plus 50.
    """
    weights = {}
    for t, (change, source) in enumerate([(slope, 0), (backwards, 1)]):
        hidden, out, bias = np.zeros((2, 2)), np.zeros((4, 2)), np.zeros(4)
        hidden[1, source], out[1 - source, 1], bias[1 - source] = 1.0, change, -50 * change
        weights |= {f"flows.{t}.context.weight": np.zeros((2, 1)), f"flows.{t}.layers.0.weight": hidden}
        weights |= {f"flows.{t}.layers.0.bias": np.array([0.0, 50.0])}
        weights |= {f"flows.{t}.layers.1.weight": out, f"flows.{t}.layers.1.bias": bias}
    return weights


LINEAR_IAF = InverseAutoregressiveFlow(num_flows=2, flow_hidden=(2,), context_dim=1)


@PYRO_ALONE
def test_a_linear_autoregressive_flow_is_a_gaussian_with_correlations(engine: str) -> None:
    """Which takes the order of both maps, and the inverse of one after the other."""
    loc, log_scale, z = np.array([0.5, -1.0]), np.array([0.2, -0.4]), np.random.default_rng(0).normal(size=(6, 2))
    found = Posterior(engine, LINEAR_IAF, 2, linear_flow(0.7, -0.3)).log_prob(np.r_[loc, log_scale, 0.9], z)
    matrix = np.array([[1, -0.3], [0, 1]]) @ np.array([[1, 0], [0.7, 1]])
    covariance = matrix @ np.diag(np.exp(2 * log_scale)) @ matrix.T
    np.testing.assert_allclose(found, stats.multivariate_normal(matrix @ loc, covariance).logpdf(z), rtol=1e-11)


def test_splines_at_rest_are_the_identity(engine: str) -> None:
    z, outputs = np.random.default_rng(0).normal(size=(5, 3)), some_outputs(NSF, 3)
    expected = stats.norm(outputs[:3], np.exp(outputs[3:6])).logpdf(z).sum(-1)
    np.testing.assert_allclose(Posterior(engine, NSF, 3, spread=0.0).log_prob(outputs, z), expected, rtol=1e-12)


@pytest.mark.parametrize("family", FLOWS, ids=lambda f: type(f).__name__)
def test_a_draw_has_the_density_that_its_value_has(engine: str, family: Family) -> None:
    """What sampling leaves behind (caches, intermediates) against the inverse; the total derivative too."""
    outputs = np.stack([some_outputs(family, 4, seed) for seed in range(6)])
    z, log_probs, gradients = Posterior(engine, family, 4).own_draw(outputs)
    assert z.shape == (6, 4)
    np.testing.assert_allclose(log_probs[1], log_probs[0], rtol=1e-9)
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(Posterior(engine, family, 4).log_prob(outputs, z), log_probs[0], rtol=1e-9)


@pytest.mark.pyro
def test_a_coupling_knows_which_value_its_log_slope_is_of() -> None:
    import torch

    coupling = Posterior("pyro", NSF, 3).module.coupling(0, torch.zeros(3))
    one, two = torch.tensor([0.3, -0.4, 0.9]), torch.tensor([1.1, 0.2, -0.7])
    expected = torch.autograd.functional.jacobian(coupling, one).det().log()
    moved = coupling(one)
    coupling(two)
    torch.testing.assert_close(coupling.log_abs_det_jacobian(one, moved), expected)


# --- gradients ----------------------------------------------------------------------------------------------------


def wavy(xp: Any, z: Any) -> Any:
    """A function of z (..., D) that is not symmetric in its entries."""
    return xp.sin(z[..., 0]) * z[..., -1] + 0.3 * z[..., 0] ** 2 - 0.2 * z[..., -1] ** 3


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_implicit_gradients_are_those_of_the_expectation(engine: str, latent_dim: int) -> None:
    """Of ``E[f(z)]`` by central differences of a quadrature over SciPy's densities, within five standard errors."""
    family, num = MixtureOfGaussians(num_components=2), 40_000
    outputs = np.array([0.3, -0.2, -0.8, 0.6, 1.1, -0.3, -0.2, 0.1, 0.3, -0.4])[: family.num_outputs(2)]
    if latent_dim == 1:
        outputs = np.array([0.3, -0.2, -0.8, 1.1, -0.2, 0.3])
    axis, step = np.linspace(-9, 9, 361, retstep=True)
    z = np.stack(np.meshgrid(*[axis] * latent_dim, indexing="ij"), -1).reshape(-1, latent_dim)

    def expectation(outputs: np.ndarray) -> float:
        weights, parameters = special.softmax(outputs[:2]), outputs[2:].reshape(2, 2, latent_dim)
        parts = [stats.norm(parameters[0, c], np.exp(parameters[1, c])).pdf(z).prod(-1) for c in range(2)]
        return float(((weights @ parts) * wavy(np, z)).sum() * step**latent_dim)

    steps = 1e-5 * np.eye(len(outputs))
    expected = np.array([(expectation(outputs + e) - expectation(outputs - e)) / 2e-5 for e in steps])
    value, gradient = Posterior(engine, family, latent_dim).draws(outputs, num, wavy)
    assert abs(value.mean() - expectation(outputs)) < 5 * value.std() / np.sqrt(num)
    error = gradient.std(0) / np.sqrt(num)
    assert (error < 0.05).all(), "the test has power"
    assert (abs(gradient.mean(0) - expected) < 5 * error).all(), (gradient.mean(0), expected, error)


def loss_gradients(engine: str, spec: VAE, weights: dict[str, np.ndarray], x: np.ndarray, objective: Objective) -> dict:
    """The gradient of the engine's own Loss by parameter."""
    Loss = import_module(f"elbozoo.inference.{engine}_engine").Loss
    program = getattr(spec, engine)().with_weights(weights)
    if engine == "pyro":
        import torch

        Loss(objective, max_plate_nesting=1).differentiable_loss(
            program.model, program.guide, torch.tensor(x)
        ).backward()
        modules = (program.model, program.guide)
        return {n: p.grad.numpy() for module in modules for n, p in module.named_parameters()}
    import jax

    def loss(params: Any) -> Any:
        args = (jax.random.key(1), params, program.model_fn, program.guide_fn, x)
        return Loss(objective).loss_with_mutable_state(*args)["loss"]

    from elbozoo.inference.weights import to_torch_layout

    return to_torch_layout(jax.jit(jax.grad(loss))(program.params))


def test_sticking_the_landing_at_an_exact_posterior_of_a_flow(engine: str) -> None:
    """A linear model's posterior has correlations that a linear flow has too; then every path's gradient is 0."""
    spec = VAE(3, 2, MLP(hidden=()), Gaussian(0.5), LINEAR_IAF)
    rng = np.random.default_rng(0)
    decoder, shift, x = rng.normal(size=(3, 2)), rng.normal(size=3), rng.normal(size=(4, 3))
    covariance = np.linalg.inv(np.eye(2) + decoder.T @ decoder / 0.25)
    tril = np.linalg.cholesky(covariance)
    slope = tril[1, 0] / tril[0, 0]
    assert abs(slope) > 0.1
    undo = np.array([[1.0, 0.0], [-slope, 1.0]])
    encoder = undo @ covariance @ decoder.T / 0.25
    weights = {"decoder.layers.0.weight": decoder, "decoder.layers.0.bias": shift}
    weights |= {f"posterior.{n}": w for n, w in linear_flow(slope, 0.0).items()}
    weights["encoder.layers.0.weight"] = np.concatenate([encoder, np.zeros((3, 3))])
    weights["encoder.layers.0.bias"] = np.concatenate([-encoder @ shift, np.log(np.diag(tril)), np.zeros(1)])
    guide = [n for n in weights if not n.startswith("decoder")]
    landed = loss_gradients(engine, spec, weights, x, ELBO(gradient=STL()))
    missed = loss_gradients(engine, spec, weights, x, ELBO(gradient=Pathwise()))
    assert max(abs(landed[n]).max() for n in guide) < 1e-8
    assert max(abs(missed[n]).max() for n in guide) > 0.1


@covering("family", TRAINED, numpyro=(), ids=lambda f: type(f).__name__)
def test_every_parameter_gets_a_finite_gradient_under_dreg(engine: str, family: Family) -> None:
    spec = VAE(5, 3, MLP(hidden=(4,)), Gaussian(0.5), family)
    program = spec.pyro() if engine == "pyro" else spec.numpyro()
    x = np.random.default_rng(0).normal(size=(6, 5))
    if engine == "pyro":
        weights = program.weights
    else:
        import jax

        weights = program.with_params(program.init(jax.random.key(0), x)[0]).weights
    gradients = loss_gradients(engine, spec, weights, x, IWAE(num_particles=3, gradient=DReG()))
    assert gradients.keys() == weights.keys()
    for name, gradient in gradients.items():
        assert np.isfinite(gradient).all(), name
        assert np.abs(gradient).max() > 0, name


@pytest.mark.pyro
@pytest.mark.parametrize("family", TRAINED, ids=lambda f: type(f).__name__)
def test_a_torch_step_is_traced(family: Family) -> None:
    """Whose slower form would train all the same, and say nothing."""
    from elbozoo.inference.pyro_trainer import Trainer

    x = np.random.default_rng(0).normal(size=(6, 5))
    settings: dict[str, Any] = {"batch_size": 6, "seeds": [0], "redraw_pixels": False, "device": None}
    from elbozoo.inference import Adam

    program = VAE(5, 3, MLP(hidden=(4,)), Gaussian(0.5), family).pyro()
    trainer = Trainer(program, IWAE(num_particles=2, gradient=DReG()), Adam(), (x,), **settings)
    trainer.compile_after = 0
    rows = trainer.epoch(np.tile(np.arange(6), (1, 2, 1)))
    assert trainer.compiled is not None
    assert np.isfinite(rows["bound"]).all()


# --- climbing the ELBO --------------------------------------------------------------------------------------------

SCALE = 0.5
WEIGHT, SHIFT = np.array([[0.9, -0.3], [0.2, 0.7], [-0.5, 0.4]]), np.array([0.1, -0.2, 0.3])
PRECISION = np.eye(2) + WEIGHT.T @ WEIGHT / SCALE**2
X = np.random.default_rng(3).normal(size=(4, 3))


def climbing(engine: str, start: np.ndarray, **settings: Any) -> Any:
    """A program whose decoder is linear and whose encoder gives ``start`` whatever x is."""
    family = SemiAmortised(num_points=2, **settings)
    outputs = family.num_outputs(2)
    weights = {"decoder.layers.0.weight": WEIGHT, "decoder.layers.0.bias": SHIFT}
    weights |= {"encoder.layers.0.weight": np.zeros((outputs, 3)), "encoder.layers.0.bias": start}
    return getattr(VAE(3, 2, MLP(hidden=()), Gaussian(SCALE), family), engine)().with_weights(weights)


def moments(engine: str, program: Any) -> tuple[np.ndarray, np.ndarray]:
    if engine == "pyro":
        import torch

        q = program.guide.encode(torch.tensor(X))
        return q.mean.detach().numpy(), q.variance.detach().numpy()
    q = program.guide.encode(X)
    return np.asarray(q.mean), np.asarray(q.variance)


@PYRO_ALONE
def test_one_step_is_one_step_up_the_exact_elbo(engine: str) -> None:
    """Of a linear model, by hand: the points integrate its log joint without error."""
    loc, log_scale = np.array([0.4, -1.0]), np.array([0.3, -0.6])
    mean, variance = moments(engine, climbing(engine, np.r_[loc, log_scale], steps=1, step_size=0.05))
    up_loc = (X - SHIFT) @ WEIGHT / SCALE**2 - PRECISION @ loc
    up_log_scale = 1 - np.exp(2 * log_scale) * np.diag(PRECISION)
    np.testing.assert_allclose(mean, loc + 0.05 * up_loc, rtol=1e-12)
    np.testing.assert_allclose(variance, np.exp(2 * (log_scale + 0.05 * up_log_scale)) + 0 * mean, rtol=1e-12)


def test_many_steps_reach_the_exact_posterior(engine: str) -> None:
    """From where the encoder is of no help: then the ELBO is log p(x)."""
    settings: dict[str, Any] = {"family": FullCovarianceGaussian(), "steps": 40, "step_size": 0.2}
    program = climbing(engine, np.zeros(5), **settings)
    marginal = stats.multivariate_normal(SHIFT, WEIGHT @ WEIGHT.T + SCALE**2 * np.eye(3)).logpdf(X)
    found = evaluate(program, X, num_particles=3).per_datum.elbo
    np.testing.assert_allclose(found, marginal, atol=1e-4)
    short = evaluate(climbing(engine, np.zeros(5), **settings | {"steps": 1}), X, num_particles=3).per_datum.elbo
    assert abs(short - marginal).max() > 0.1


def test_the_steps_are_differentiated_and_are_frozen_with_the_guide(engine: str) -> None:
    """At the end of a long climb the log weight is log p(x) whatever the decoder, so its derivative has no noise.

    With the guide frozen, the decoder's part in its climb among the rest, it is that of ``log p(x, z)`` at the draw.
    """
    program = climbing(engine, np.zeros(5), family=FullCovarianceGaussian(), steps=40, step_size=0.2)

    def log_marginal(shift: np.ndarray) -> float:
        return stats.multivariate_normal(shift, WEIGHT @ WEIGHT.T + SCALE**2 * np.eye(3)).logpdf(X).sum()

    steps = 1e-5 * np.eye(3)
    expected = np.array([(log_marginal(SHIFT + e) - log_marginal(SHIFT - e)) / 2e-5 for e in steps])
    whole, frozen = (
        -loss_gradients(engine, program.spec, program.weights, X, ELBO(gradient=g))["decoder.layers.0.bias"]
        for g in (Pathwise(), STL())
    )
    np.testing.assert_allclose(whole, expected, rtol=1e-3)
    assert abs(frozen - expected).max() > 0.1


@PYRO_ALONE
def test_a_family_that_climbs_must_be_gaussian_and_have_something_to_climb(engine: str) -> None:
    with pytest.raises(InvalidArgument, match="family must be one of DiagonalGaussian, FullCovarianceGaussian"):
        SemiAmortised(family=MixtureOfGaussians())
    posterior = Posterior(engine, SemiAmortised(), 2).module
    with pytest.raises(InvalidArgument, match="guide must be given its model's log joint to be semi-amortised"):
        posterior(np.zeros(4))


# --- what is refused ----------------------------------------------------------------------------------------------


@covering("family", FLOWS, numpyro=(0,), ids=lambda f: type(f).__name__)
def test_a_flow_cannot_be_localised(engine: str, family: Family) -> None:
    spec, x = VAE(5, 3, MLP(hidden=(4,)), Gaussian(0.5), family), np.zeros((2, 5))
    program = getattr(spec, engine)()
    if engine == "numpyro":
        import jax

        program = program.with_params(program.init(jax.random.key(0), x)[0])
    with pytest.raises(
        InvalidArgument, match="site 'z' must be drawn from a distribution that can be optimised by itself"
    ):
        program.localised((x,))


BAD = {
    "rank must be a whole number of at least 1; got 0": lambda: LowRankGaussian(rank=0),
    "rank must be at most latent_dim=3; got 4": lambda: VAE(5, 3, guide=LowRankGaussian(rank=4)),
    "num_components must be a whole number of at least 1; got 0": lambda: MixtureOfGaussians(num_components=0),
    "num_flows must be a whole number of at least 1; got 0": lambda: InverseAutoregressiveFlow(num_flows=0),
    "flow_hidden must have at least one layer": lambda: InverseAutoregressiveFlow(flow_hidden=()),
    "context_dim must be a whole number": lambda: InverseAutoregressiveFlow(context_dim=0),
    "flow_hidden must have at least one layer;": lambda: NeuralSplineFlow(flow_hidden=()),
    "num_bins must be a whole number of at least 2; got 1": lambda: NeuralSplineFlow(num_bins=1),
    "bound must be a finite number above 0; got 0": lambda: NeuralSplineFlow(bound=0.0),
    "every entry of flow_hidden must be a whole number": lambda: NeuralSplineFlow(flow_hidden=(8, 0)),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_families_are_refused(message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        BAD[message]()


@pytest.mark.parametrize("latent_dim", [1, 2, 5])
@pytest.mark.parametrize("flow", [0, 1])
def test_masks_leave_the_order_and_nothing_else(latent_dim: int, flow: int) -> None:
    """Through all layers: output i depends on what precedes i, in the map's order, and on all of it."""
    family = InverseAutoregressiveFlow(flow_hidden=(8, 7))
    first, second, last = family.masks(latent_dim, flow)
    paths = last.astype(int) @ second.astype(int) @ first.astype(int)
    order = family.order(latent_dim, flow)
    before = np.argsort(order)[None, :] < np.argsort(order)[:, None]
    np.testing.assert_array_equal(paths > 0, np.concatenate([before, before]))
