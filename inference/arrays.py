"""The few array functions whose spelling differs between NumPy, JAX and PyTorch, chosen by the argument's type."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import special

Array = Any  # a NumPy, JAX or PyTorch array


def _library(x: Array) -> str:
    """Name the library of ``x`` without importing any."""
    if isinstance(x, np.ndarray | np.generic | float | int):
        return "numpy"
    torch = sys.modules.get("torch")
    return "torch" if torch is not None and isinstance(x, torch.Tensor) else "jax"


def logsumexp(x: Array, axis: int = 0) -> Array:
    r"""``log Σ exp x`` along ``axis``, stable; all ``-inf`` gives ``-inf``."""
    match _library(x):
        case "numpy":
            return special.logsumexp(x, axis=axis)
        case "torch":
            return x.logsumexp(dim=axis)
        case _:
            from jax.nn import logsumexp as jax_logsumexp

            return jax_logsumexp(x, axis=axis)


def softmax(x: Array, axis: int = 0) -> Array:
    r"""``exp x / Σ exp x`` along ``axis``."""
    match _library(x):
        case "numpy":
            return special.softmax(x, axis=axis)
        case "torch":
            return x.softmax(dim=axis)
        case _:
            from jax.nn import softmax as jax_softmax

            return jax_softmax(x, axis=axis)


def stop_gradient(x: Array) -> Array:
    """The value of ``x``, a constant to differentiation."""
    match _library(x):
        case "numpy":
            return x
        case "torch":
            return x.detach()
        case _:
            from jax.lax import stop_gradient as jax_stop_gradient

            return jax_stop_gradient(x)


def scale_gradient(x: Array, factor: Array) -> Array:
    """The value of ``x``, with the gradient that flows through it multiplied by a constant."""
    return x * factor + stop_gradient(x - x * factor)


def squared_gradient(
    fn: Callable[[dict[str, Array], dict[str, Array]], tuple[Array, Array]],
    at: Mapping[str, Array],
    knobs: Mapping[str, Array],
) -> tuple[Array, dict[str, Array]]:
    r"""What ``fn`` carries, and ``∂/∂knobs Σ (∂ Σ f/∂at)²``: how the squared length of a gradient moves with knobs.

    Args:
        fn: from ``at`` and ``knobs`` to ``f`` and an array to carry, which stays differentiable in all else that ``fn``
            computes with.
        at: arrays by name, of JAX or PyTorch, that the inner gradient is with respect to.
        knobs: arrays by name, that the outer one is with respect to.

    Returns: the carried array, and constants by the names of ``knobs``.
    """
    if _library(next(iter(at.values()))) == "torch":
        import torch

        at, knobs = ({n: v.detach().requires_grad_() for n, v in each.items()} for each in (at, knobs))
        value, carried = fn(at, knobs)
        inner = torch.autograd.grad(value.sum(), list(at.values()), create_graph=True, materialize_grads=True)
        total = torch.stack([(g**2).sum() for g in inner]).sum()
        outer = torch.autograd.grad(total, list(knobs.values()), retain_graph=True, materialize_grads=True)
        return carried, dict(zip(knobs, outer, strict=True))
    import jax

    def length(knobs: dict[str, Array]) -> tuple[Array, Array]:
        def total(at: dict[str, Array]) -> tuple[Array, Array]:
            value, carried = fn(at, knobs)
            return value.sum(), carried

        inner, carried = jax.grad(total, has_aux=True)(at)
        return sum((g**2).sum() for g in inner.values()), carried

    outer, carried = jax.grad(length, has_aux=True)({n: stop_gradient(v) for n, v in knobs.items()})
    return carried, {n: stop_gradient(g) for n, g in outer.items()}


def namespace(x: Array) -> Any:
    """The module whose functions are for ``x``: what they have in common they call alike (``exp``, ``where``, …)."""
    match _library(x):
        case "numpy":
            return np
        case "torch":
            return sys.modules["torch"]
        case _:
            import jax.numpy as jnp

            return jnp


def cos(x: Array) -> Array:
    """``cos x``; a Python number stays one."""
    return namespace(x).cos(x)


def expm1(x: Array) -> Array:
    """``exp x - 1`` without loss of digits near 0; a Python number stays one."""
    return namespace(x).expm1(x)


def swap_each(x: Array, y: Array) -> Array:
    """``out[j, i] = y[i] if i == j else x[j]``: column ``i`` is ``x``, its row ``i`` replaced; ``(K, K, *P)``."""
    num, library = x.shape[0], _library(x)
    eye = np.eye(num, dtype=bool).reshape((num, num) + (1,) * (x.ndim - 1))
    if library == "torch":
        import torch

        return torch.where(torch.from_numpy(eye).to(x.device), y[None], x[:, None])
    if library == "jax":
        import jax.numpy as jnp

        return jnp.where(eye, y[None], x[:, None])
    return np.where(eye, y[None], x[:, None])


def plates_first(x: Array, batch_ndim: int, dims: Sequence[int]) -> Array:
    """Move the batch dims ``dims`` (negative, counted from the last batch dim) to the front and flatten the rest.

    Shapes: ``x`` is ``batch + event`` with ``batch_ndim`` batch dims; the result is ``(*dims, D)`` where ``D``
    gathers every other batch dim and all event dims.
    """
    missing = max((-d for d in dims), default=0) - batch_ndim
    if missing > 0:
        x, batch_ndim = x.reshape((1,) * missing + tuple(x.shape)), batch_ndim + missing
    front = [batch_ndim + d for d in sorted(dims)]
    rest = [i for i in range(x.ndim) if i not in front]
    order = front + rest
    if order != list(range(x.ndim)):
        x = x.permute(*order) if _library(x) == "torch" else x.transpose(order)
    lead, size = tuple(x.shape[: len(front)]), 1
    for n in x.shape[len(front) :]:
        size *= n
    return x.reshape((*lead, size))


def concatenate(xs: Sequence[Array], axis: int = 0) -> Array:
    """The arrays joined along ``axis``."""
    match _library(xs[0]):
        case "numpy":
            return np.concatenate(xs, axis=axis)
        case "torch":
            import torch

            return torch.cat(list(xs), dim=axis)
        case _:
            import jax.numpy as jnp

            return jnp.concatenate(xs, axis=axis)


def standard_error(x: np.ndarray) -> float:
    """Of the mean of independent ``x`` ``(N,)``: ``sd / √N``; nan for one."""
    return float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else float("nan")
