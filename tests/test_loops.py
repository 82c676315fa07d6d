"""The hand-written losses that the benchmarks time the library against are the library's own at the same draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from elbozoo.benchmarks import loops
from elbozoo.benchmarks.estimators import initialised
from elbozoo.zoo import MLP, VAE, HierarchicalVAE, SigmoidBeliefNet

pytestmark = [pytest.mark.pyro, pytest.mark.numpyro]

DATA, BATCH = 6, 3
X = np.random.default_rng(0).integers(0, 2, (BATCH, DATA)).astype(float)
ONE_LAYER, TWO_LAYERS = VAE(DATA, 3, MLP((5, 4), "relu")), HierarchicalVAE(DATA, (3, 2), (5, 4))
NET = SigmoidBeliefNet(DATA, (4,))


def perturbed(spec: Any) -> dict[str, np.ndarray]:
    """Weights by their names, none of them 0."""
    rng = np.random.default_rng(1)
    return {n: w + 0.3 * rng.standard_normal(w.shape) for n, w in initialised(spec.numpyro(), X).weights.items()}


def layers(weights: dict[str, np.ndarray], spec: Any, part: str, layer: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights (outputs, inputs) and biases of a network of the zoo."""
    name = part[:-1] if isinstance(spec, VAE) else f"{part}.{layer}"
    count = len(loops.sizes_of(spec)[part][layer]) - 1
    return [(weights[f"{name}.layers.{i}.weight"], weights[f"{name}.layers.{i}.bias"]) for i in range(count)]


def by_hand(weights: dict[str, np.ndarray], spec: Any) -> tuple[Any, Any]:
    """JAX's parameters and torch's networks with these weights."""
    import torch

    params, nets = loops.params_jax(spec), loops.nets_torch(spec).double()
    for part, sizes in loops.sizes_of(spec).items():
        for number in range(len(sizes)):
            pairs = layers(weights, spec, part, number)
            params[part][number] = [(w.T, b) for w, b in pairs]
            flat = [torch.as_tensor(a) for pair in pairs for a in pair]
            for parameter, value in zip(nets[part][number].parameters(), flat, strict=True):
                parameter.data = value
    if "prior" in params:
        params["prior"] = weights["prior.logits"]
        nets["prior"]["logits"].data = torch.as_tensor(weights["prior.logits"])
    return params, nets


@pytest.mark.parametrize("engine", ["numpyro", "pyro"])
@pytest.mark.parametrize(("spec", "k"), [(ONE_LAYER, 1), (ONE_LAYER, 5), (TWO_LAYERS, 1), (TWO_LAYERS, 5)])
def test_gaussian_losses_are_minus_the_bound(spec: Any, k: int, engine: str) -> None:
    import torch

    weights, objective = perturbed(spec), loops.objective_of(spec, k)
    params, nets = by_hand(weights, spec)
    noise = [np.random.default_rng(2).standard_normal((k, BATCH, d)) for d in loops.latent_dims(spec)]
    jaxs, latents = loops.gaussian_loss_jax(params, X, noise, loops.activation_of(spec))
    torchs, _ = loops.gaussian_loss_torch(nets, torch.as_tensor(X), [torch.as_tensor(e) for e in noise])
    names = ["z"] if isinstance(spec, VAE) else [f"z{i + 1}" for i in range(len(noise))]
    values = {n: np.array(z) for n, z in zip(names, latents, strict=True)}
    program = initialised(getattr(spec, engine)(), X).with_weights(weights, X)
    bound = program.apply(objective.bound, (X,), values=values, analytic_kl=objective.uses_analytic_kl)
    np.testing.assert_allclose(-float(jaxs), np.mean(bound), rtol=1e-10)
    np.testing.assert_allclose(-torchs.item(), np.mean(bound), rtol=1e-10)


def test_sbn_losses_have_vimcos_gradient() -> None:
    """At given latents, weight by weight: NumPyro's trace through the objective against both hand-written losses."""
    import jax
    import torch

    from elbozoo.inference.numpyro_engine import particles

    k, weights = 5, perturbed(NET)
    params, nets = by_hand(weights, NET)
    z = np.random.default_rng(3).integers(0, 2, (k, BATCH, 4)).astype(float)
    program, objective = initialised(NET.numpyro(), X).with_weights(weights, X), loops.objective_of(NET, k)

    def ours(params: Any) -> Any:
        key, forms = jax.random.key(0), (program.model_fn, program.guide_fn)
        terms, _ = particles(key, params, *forms, (X,), num_particles=k, values={"z1": jax.numpy.asarray(z)})
        return -objective.surrogate(terms).mean()

    expected = program.with_params(jax.grad(ours)(program.params)).weights
    found = jax.grad(loops.sbn_loss_jax)(params, X, z, loops.activation_of(NET))
    loops.sbn_loss_torch(nets, torch.as_tensor(X), torch.as_tensor(z)).backward()
    np.testing.assert_allclose(found["prior"], expected["prior.logits"], atol=1e-10)
    np.testing.assert_allclose(nets["prior"]["logits"].grad, expected["prior.logits"], atol=1e-10)
    for part in ("encoders", "decoders"):
        (w, b), net = found[part][0][0], nets[part][0][0]
        assert np.abs(w).max() > 1e-3
        for i, (jaxs, torchs) in enumerate([(w.T, net.weight.grad), (b, net.bias.grad)]):
            theirs = expected[f"{part}.0.layers.0.{('weight', 'bias')[i]}"]
            np.testing.assert_allclose(jaxs, theirs, atol=1e-10)
            np.testing.assert_allclose(torchs, theirs, atol=1e-10)


def test_the_interval_of_a_ratio_is_of_order_statistics() -> None:
    """Of nine values the second and the eighth hold the median with 1 - 2 · (1 + 9) / 2^9 = 96%; of five none do."""
    values = [5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0]
    found = loops.ratio([2.0 * v for v in values], [2.0] * 9)
    assert found == {"median": 5.0, "low": 2.0, "high": 8.0, "min": 1.0, "max": 9.0}
    assert loops.ratio(values[:5], [1.0] * 5) == {"median": 5.0, "low": None, "high": None, "min": 1.0, "max": 9.0}


def test_every_second_round_goes_backwards() -> None:
    order: list[str] = []
    seconds = loops.rounds({name: lambda name=name: order.append(name) for name in "abc"}, repeats=2, warm_up=1)
    assert "".join(order) == "abccbaabc"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 2, "b": 2, "c": 2}
