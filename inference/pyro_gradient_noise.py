"""Gradients drawn again and again in torch: the program is run once, where it can be traced."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import torch

from elbozoo.inference.objectives import Objective
from elbozoo.inference.pyro_engine import OWN, Loss, Program, flushed_denormals
from elbozoo.inference.pyro_graph import traced

Moments = tuple[float, dict[str, np.ndarray], dict[str, np.ndarray], frozenset[str]]


def moments(
    program: Program, objective: Objective, args: tuple, num_draws: int, warm_up: int, step: int, seed: int
) -> Moments:
    """The mean bound, the mean and the variance of each gradient entry by name, and the guide's own names."""
    loss, at = Loss(objective), torch.tensor(step)
    with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False), flushed_denormals():
        torch.manual_seed(seed)
        twin = program.fresh()
        inputs = twin._inputs(args)
        with twin.parameters():
            twin.materialise(inputs)
            loss.loss(twin.model, twin.guide, *inputs)  # the estimator's own numbers come to be
            size = loss.terms(twin.model, twin.guide, *inputs).num_data
            own = [p for n, p in twin.store["params"].items() if n.startswith(OWN)]
            others = {n: p for n, p in twin._tensors().items() if p.requires_grad and not n.startswith(OWN)}
            wanted = [*others.values(), *own]

            def differentiate(step: torch.Tensor, memory: Any, *inputs: torch.Tensor) -> tuple[Any, ...]:
                loss.step, loss.own.memory = step.clone(), memory  # type: ignore[assignment]  # Loss counts it up in place
                value, surrogate = loss._value_and_surrogate(twin.model, twin.guide, inputs, {})
                found = torch.autograd.grad(surrogate, wanted, allow_unused=True)
                found = [torch.zeros_like(p) if g is None else g for g, p in zip(found, wanted, strict=True)]
                return value / size, [-g / size for g in found], loss.own.memory

            memory, run = loss.own.memory, differentiate
            if program.spec is not None:
                with torch.random.fork_rng(devices=[]):
                    run = traced(differentiate, at, memory, *inputs) or differentiate
            adam = torch.optim.Adam(own, lr=1e-3) if own else None
            for _ in range(warm_up):
                _, found, memory = run(at, memory, *inputs)
                for parameter, g in zip(own, found[len(others) :], strict=True):
                    parameter.grad = -g
                if adam is not None:
                    adam.step()
            total = 0.0
            mean, squares = ([torch.zeros_like(p) for p in others.values()] for _ in range(2))
            for count in range(1, num_draws + 1):
                value, found, memory = run(at, memory, *inputs)
                total -= float(value)
                with torch.no_grad():
                    for m, s, g in zip(mean, squares, found, strict=False):
                        before = g - m
                        m += before / count
                        s += before * (g - m)
    flat = [dict(zip(others, map(_flat, values), strict=True)) for values in (mean, squares)]
    variance = {name: value / (num_draws - 1) for name, value in flat[1].items()}
    return total / num_draws, flat[0], variance, program.guide_parameters(args)


def _flat(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float64).ravel()
