"""Networks inside a NumPyro program: weights that are given are taken as they are, and no others are drawn for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest

from elbozoo.zoo import MLP

pytestmark = pytest.mark.numpyro
X = np.random.default_rng(0).normal(size=(5, 4))


def build() -> Any:
    from elbozoo.zoo.networks.networks_numpyro import MLPEncoder

    return partial(MLPEncoder, MLP(hidden=(3,)), 4, 2)


def program(make: Any = None) -> Any:
    """A network's output, and a draw after it."""
    import numpyro
    import numpyro.distributions as dist

    from elbozoo.zoo.networks.networks_numpyro import network

    return network("net", build() if make is None else make)(X), numpyro.sample("z", dist.Normal(0.0, 1.0))


def run(given: Any = None, make: Any = None) -> tuple[Any, Any]:
    """The program with these weights, and its trace's."""
    from numpyro import handlers

    data = {} if given is None else {"net$params": given}
    tracer = handlers.trace(handlers.substitute(handlers.seed(partial(program, make), 0), data=data))
    out = tracer(), tracer.trace["net$params"]["value"]
    return out


def test_given_weights_are_taken_and_later_draws_stay() -> None:
    import jax

    (first, z), weights = run()
    (again, same), _ = run(weights)
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(same, z)
    (doubled, _), _ = run(jax.tree.map(lambda w: 2.0 * w, weights))
    assert not np.allclose(doubled, first)


def test_nothing_is_drawn_for_weights_that_are_given() -> None:
    import jax

    _, weights = run()

    initial, given = jax.make_jaxpr(lambda: run()[0])(), jax.make_jaxpr(lambda w: run(w)[0])(weights)
    assert str(given).count("random_bits") == 1, "that of z"
    assert str(initial).count("random_bits") == 3


def test_weights_given_in_part_are_filled_up_with_initial_ones() -> None:
    (first, _), _ = run()
    (filled, _), _ = run({})
    np.testing.assert_array_equal(filled, first)


def test_arguments_without_a_hash_and_of_equal_value() -> None:
    """What is kept of a module is known by the values and types of its arguments, where they have a hash."""
    from flax import nnx

    class Scaled(nnx.Module):
        def __init__(self, by: Any, rngs: nnx.Rngs):
            self.by, self.weight = str(by), nnx.Param(rngs.params.normal((1,)))

        def __call__(self, x: Any) -> Any:
            return self.by

    for by in ([1, 2], 1, 1.0, True):
        make = partial(Scaled, by)
        _, weights = run(make=make)
        assert run(weights, make=make)[0][0] == str(by)


def test_inputs_in_parts_are_inputs_side_by_side() -> None:
    """A part that others share is multiplied once, before it is broadcast."""
    import jax
    from flax import nnx

    module = build()(nnx.Rngs(0))
    parts = X[:, :3], np.linspace(-1.0, 1.0, 7)[:, None, None]
    whole = np.concatenate([np.broadcast_to(part, (7, 5, part.shape[-1])) for part in parts], -1)
    np.testing.assert_allclose(module(*parts), module(whole), rtol=1e-12)
    cost = [jax.jit(module).lower(*x).compile().cost_analysis()["flops"] for x in (parts, (whole,))]
    assert cost[0] < 0.7 * cost[1]


@pytest.mark.pyro
@pytest.mark.parametrize("hidden", [(3,), ()])
def test_inputs_in_parts_are_inputs_side_by_side_in_torch(hidden: tuple[int, ...]) -> None:
    import torch

    from elbozoo.zoo.networks.networks_pyro import MLPEncoder

    module = MLPEncoder(MLP(hidden), 4, 2).double()
    parts = torch.as_tensor(X[:, :3]), torch.linspace(-1.0, 1.0, 7, dtype=torch.float64)[:, None, None]
    whole = torch.cat([part.expand(7, 5, -1) for part in parts], -1)
    torch.testing.assert_close(module(*parts), module(whole), rtol=1e-12, atol=1e-12)
