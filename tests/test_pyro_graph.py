"""What is taken out of a traced step changes no number, and what must stay stays."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.pyro
torch = pytest.importorskip("torch", reason="elbozoo[pyro] is not installed; every test here is of torch alone")


def trace(step: Callable, *args: Any) -> Any:
    from elbozoo.inference.pyro_graph import traced

    module = traced(step, *args)
    assert module is not None
    return module


def calls(module: Any) -> list[str]:
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


X = torch.tensor([[1.5, -0.0, math.inf], [math.nan, -2.0, 3e-320]])


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x * 1.0,
        lambda x: x / 1,
        lambda x: x - 0.0,
        lambda x: x**1.0,
        lambda x: x.detach().expand(2, 3).reshape(2, 3).view(2, 3),
        lambda x: x.t().t(),
        lambda x: x.neg().neg(),
    ],
)
def test_what_gives_its_argument_back_is_left_out(step: Callable) -> None:
    module = trace(lambda x: step(x).neg(), X)
    assert calls(module) == ["aten.neg.default"]
    assert module(X).contiguous().numpy().tobytes() == step(X).neg().contiguous().numpy().tobytes()


def test_a_result_is_a_tensor_of_its_own() -> None:
    """Else a gradient might be the parameter that it is to move."""
    weight = torch.nn.Parameter(torch.ones(3))
    module = trace(lambda x: (x * 1.0, weight * 1.0, (weight * 1.0).unsqueeze(0), (x * 1.0).split(1)[0]), X)
    for found in module(X):
        assert found.untyped_storage().data_ptr() not in {X.data_ptr(), weight.data_ptr()}


def test_a_constant_that_is_a_result_is_made_anew() -> None:
    module = trace(lambda x: (x.exp(), torch.tensor(2.0).expand(3).log()), X)
    module(X)[1].zero_()
    np.testing.assert_allclose(module(X)[1], math.log(2.0))


def test_a_copy_that_lies_otherwise_in_memory_stays() -> None:
    """Sums over it are taken in another order."""
    wide = torch.as_tensor(np.random.default_rng(0).random((50, 2000)), dtype=torch.float32)
    for step in (lambda x: (x[:, ::2] * 1.0).sum(1), lambda x: (x[0].expand(333, 2000) * 1.0).sum()):
        assert trace(step, wide)(wide).numpy().tobytes() == step(wide).numpy().tobytes()


@pytest.mark.parametrize(
    ("step", "x"),
    [
        (lambda x: x + 0.0, X),  # -0.0 becomes 0.0
        (lambda x: x * 1.0, torch.tensor([1, 2])),  # an integer becomes a real number
        (lambda x: x.expand(2, 2, 3), X),
        (lambda x: x.t(), X),
        (lambda x: torch.sub(x, 0, alpha=2), X),
        (lambda x: x - 1, X),
        (lambda x: x - -0.0, X),  # -0.0 becomes 0.0
    ],
)
def test_what_does_something_stays(step: Callable, x: Any) -> None:
    module = trace(step, x)
    assert len(calls(module)) == 1
    got, wanted = module(x), step(x)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert got.contiguous().numpy().tobytes() == wanted.contiguous().numpy().tobytes()


def test_what_is_done_twice_is_done_once() -> None:
    def step(x: Any) -> Any:
        return x.exp() + x.exp(), x.sum(0), x.sum(1), x * 2, x * 2.0, x / 0.0, x / -0.0

    module = trace(step, X)
    assert sorted(calls(module)).count("aten.exp.default") == 1
    assert len(calls(module)) == 8, "other arguments are others, 2 is not 2.0, and 0.0 not -0.0"
    for got, wanted in zip(module(X), step(X), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_draws_are_each_drawn() -> None:
    """And buffers that are filled with them are two."""

    def step(x: Any) -> Any:
        return torch.empty(3).normal_(), torch.empty(3).normal_(), torch.bernoulli(x), torch.bernoulli(x)

    p = torch.full((50,), 0.5)
    module = trace(step, p)
    for run in (module, step):
        torch.manual_seed(0)
        one, two, three, four = run(p)
        assert not torch.equal(one, two)
        assert not torch.equal(three, four)
    torch.manual_seed(0)
    assert torch.equal(one, module(p)[0])


def test_what_depends_on_written_numbers_alone_is_computed_once() -> None:
    def step(x: Any) -> Any:
        return x * torch.tensor(2.0).expand(2, 3).log().neg().sum()

    module = trace(step, X)
    assert calls(module) == ["aten.mul.Tensor"]
    for _ in range(2):
        np.testing.assert_array_equal(module(X), step(X))


def test_of_a_tensor_that_is_looked_at_for_its_shape_alone_nothing_is_computed() -> None:
    """As where the backward pass begins: nobody needs the loss itself."""

    def step(x: Any) -> Any:
        return x * torch.ones_like(x.exp().sum()).neg() + torch.zeros_like(x.sum(0)).exp()

    module = trace(step, X)
    assert calls(module) == ["aten.mul.Tensor", "aten.add.Tensor"]
    np.testing.assert_array_equal(module(X), step(X))


def test_parameters_and_buffers_are_read_anew() -> None:
    """They change between steps, so what depends on them is no constant."""
    weight, buffer = torch.nn.Parameter(torch.ones(3)), torch.ones(3)
    module = trace(lambda x: x + weight.exp() + buffer.exp(), X)
    with torch.no_grad():
        weight.fill_(2.0)
        buffer.fill_(3.0)
    np.testing.assert_array_equal(module(X).detach(), X + math.exp(2.0) + math.exp(3.0))


def test_a_step_that_writes_into_a_buffer_stays_as_it_is() -> None:
    buffer = torch.zeros(3)

    def step(x: Any) -> Any:
        seen = buffer.expand(2, 3)
        before = seen.exp().sum()
        buffer.add_(x.sum(0))
        return before, seen.exp().sum()

    x = torch.ones(2, 3)
    module = trace(step, x)
    buffer.zero_()
    before, after = module(x)
    assert float(before) == 6.0
    np.testing.assert_allclose(float(after), 6 * math.exp(2.0), rtol=1e-12)
