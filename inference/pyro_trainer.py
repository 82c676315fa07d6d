"""Training on torch: a loop over minibatches, parameters in a store of the run's own.

A step of a zoo program is traced once into a straight line of tensor operations, forward and backward, which is then
replayed: neither Pyro's handlers nor autograd cost anything after the first step. A user's own program may decide in
Python what a trace would freeze, so it is run as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pyro
import torch
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.swa_utils import get_ema_multi_avg_fn

from elbozoo.inference.errors import CorruptFile, must
from elbozoo.inference.objectives import Objective
from elbozoo.inference.optimizers import Adam
from elbozoo.inference.pyro_devices import Together, local
from elbozoo.inference.pyro_engine import (
    OWN,
    OwnNumbers,
    Program,
    flushed_denormals,
    kept_buffers,
    particle_plate,
    particles,
    runs_several,
)
from elbozoo.inference.pyro_graph import traced
from elbozoo.inference.recording import NOBODY, check_amortised, check_counts, first_non_finite, step_metrics
from elbozoo.inference.weights import frozen_names

STEPS_BEFORE_TRACING = 100
"""Steps of a training that are run as they are before one is traced."""


class Trainer:
    """Runs epochs of one objective on a copy of one program. One seed: replicates are separate trainers.

    ``data`` are what :meth:`epoch` takes minibatches from, until ``self.data`` is set to others; the first of them are
    what the program is first run on. There are ``num_data`` in all; ``math.inf`` where nobody can tell.

    With several ``devices`` this is one of as many trainers, each in a process of its own, and the minibatches are
    those of all of them together.

    ``compiled`` is the traced step; None where there is none, and before step ``compile_after``: tracing takes as long
    as it saves in one or two hundred. The step counts from the training's beginning, also where it is resumed, for a
    traced diffusion uses up fewer random numbers.

    ``average`` is the parameters' moving average, by name, where the optimiser keeps one.

    Weights whose names begin with one of ``frozen`` stay as they are.

    Modules train in training mode; held-out data is seen, and the trained program handed back, in evaluation mode.
    """

    def __init__(
        self,
        program: Program,
        objective: Objective,
        optimizer: Any,
        data: tuple,
        *,
        batch_size: int,
        seeds: list[int],
        redraw_pixels: bool,
        device: str | None,
        frozen: tuple[str, ...] = (),
        num_data: float | None = None,
        devices: int = 1,
    ):
        (self.seed,) = seeds
        self.together = Together(devices, self.seed, objective) if devices > 1 else None
        self.num_data = len(data[0]) if num_data is None else num_data
        self.device = _device(local(device) if self.together else device) or program.device or torch.device("cpu")
        self.objective, self.redraw_pixels, self.step = objective, redraw_pixels, 0
        self.compiled: Callable | None = None
        self.compile_after: float = STEPS_BEFORE_TRACING
        self.data = self.put(data)
        self.cuda = [self.device] if self.device.type == "cuda" else []
        self.batch_size = min(batch_size, len(data[0])) // devices
        example = tuple(a[: self.batch_size] for a in self.data)
        if redraw_pixels:  # grey ones are outside the likelihood's support
            example = ((example[0] > 0.5).to(example[0].dtype), *example[1:])
        self.nesting, self.own = None, OwnNumbers(objective)
        # Here already: threads that torch starts take over how the thread that starts them treats small numbers.
        with flushed_denormals(), torch.random.fork_rng(devices=self.cuda):
            torch.manual_seed(self.seed)
            self.program = program.fresh()
            for module in self.program._modules():
                module.to(self.device).eval()  # looking at the program must not move a batch norm's statistics
            finite = all(torch.isfinite(p).all() for p in self.program._tensors().values())
            with nullcontext() if finite else pyro.validation_enabled(False):  # the first step will name what is not
                if self.batch_size < self.num_data:
                    check_amortised(self._shapes(example), self._shapes(tuple(a[:2] for a in example)))
                self.program.materialise(example)
            if runs_several(objective):
                with self.program.parameters():
                    self.nesting = particle_plate(self.program.model, self.program.guide, example, {})
            if objective.gradient.keeps_numbers:
                with self.program.parameters(), torch.no_grad():
                    self.own.put_into(particles(self.program.model, self.program.guide, example))
            self.rng = self._rng()
        if self.together:
            self.together.begin(self.program._tensors())
        for module in self.program._modules():
            module.train()
        dropout = any(isinstance(m, _DropoutNd) for module in self.program._modules() for m in module.modules())
        if program.spec is None or dropout:  # whose masks a replayed guide must draw again
            self.compile_after = math.inf
        tensors = self.program._tensors()
        still = frozen_names((n for n, p in tensors.items() if p.requires_grad), frozen)
        if still and all(n in still for n, p in tensors.items() if p.requires_grad):
            raise must("frozen", "leave a parameter to train", frozen, "Hold fewer weights still")
        self.params = {n: p for n, p in tensors.items() if p.requires_grad and n not in still}
        if not self.params:
            raise must("program", "have a parameter to train", "none", "Add pyro.param or a network to model or guide")
        self.adam = optimizer if isinstance(optimizer, Adam) else None
        self.skip_norm = self.adam.skip_norm if self.adam else None
        self.average = None
        if self.adam is not None and self.adam.average is not None:
            self.average = {n: p.detach().clone() for n, p in self.params.items()}
        make = self.adam.torch if self.adam else optimizer
        self.optimizer: Any = make(list(self.params.values())) if callable(make) and make is not Adam else None
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise must(
                "optimizer",
                "be an Adam or a function from parameters to a torch optimizer for a Pyro program",
                type(optimizer).__name__,
                "Pass lambda params: torch.optim.AdamW(params, lr=1e-3)",
            )

    def _shapes(self, example: tuple) -> dict[str, Any]:
        """The shapes of the parameters of a copy of the program that has seen ``example``."""
        probe = self.program.copy()
        with torch.random.fork_rng(devices=self.cuda):
            probe.materialise(example)
        return {n: [tuple(v.shape)] for n, v in probe._tensors().items()}

    # --- one step, one epoch ---

    def _batch(self, index: torch.Tensor) -> tuple:
        batch = tuple(a[index] for a in self.data)
        return (torch.bernoulli(batch[0]), *batch[1:]) if self.redraw_pixels else batch

    def _terms(self, batch: tuple, step: Any) -> Any:
        terms = particles(
            self.program.model,
            self.program.guide,
            batch,
            num_particles=self.objective.num_particles,
            analytic_kl=self.objective.uses_analytic_kl,
            step=step,
            nesting=self.nesting,
        )
        terms = self.own.put_into(terms)
        self.objective.check(terms)
        return terms

    def _differentiate(self, step: torch.Tensor, memory: Any, *batch: torch.Tensor) -> tuple[Any, ...]:
        """Metrics, the gradient by parameter (None where the loss does not depend on it), its norm, the new memory."""
        self.own.memory = memory
        terms = self._terms(batch, step)
        check_counts(terms, self.num_data, self.batch_size)
        loss = -self.objective.surrogate(terms).mean() / terms.data_per_entry
        with torch.no_grad():
            metrics, memory = step_metrics(self.objective, terms), dict(self.objective.remember(terms))
        if not loss.requires_grad:
            todo = "Let the model or the guide compute with its parameters"
            raise must("objective", "depend on a parameter of the program", "one that does not", todo)
        gradients = torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
        return metrics, gradients, _norm([g for g in gradients if g is not None]), memory

    def _gradient(self, batch: tuple) -> tuple[dict[str, Any], torch.Tensor]:
        """Put the gradient of one step into the parameters; metrics and the gradient's norm."""
        step, memory = torch.tensor(self.step), self.own.memory
        if self.compiled is None and self.step >= self.compile_after:
            with torch.random.fork_rng(devices=self.cuda), kept_buffers(self.program._modules()):
                self.compiled, self.compile_after = traced(self._differentiate, step, memory, *batch), math.inf
        if self.compiled is None:
            metrics, gradients, norm, self.own.memory = self._differentiate(step, memory, *batch)
        else:
            with torch.no_grad():
                metrics, gradients, norm, self.own.memory = self.compiled(step, memory, *batch)
        if self.together:
            metrics, gradients = self.together.mean(metrics, gradients)
            norm = _norm([g for g in gradients if g is not None])
        if self.adam is not None and self.adam.clip_norm is not None:  # not in place: two gradients may be one tensor
            share = (self.adam.clip_norm / norm).clamp(max=1.0)
            gradients = [None if g is None else g * share.to(g.dtype) for g in gradients]
        for parameter, gradient in zip(self.params.values(), gradients, strict=True):
            parameter.grad = gradient
        return metrics, norm

    def put(self, data: tuple) -> tuple:
        """Arrays on the device, for ``self.data``; other threads may call it."""
        return tuple(torch.as_tensor(a).to(self.device) for a in data)

    def epoch(self, order: np.ndarray) -> dict[str, np.ndarray]:
        """Run one epoch; ``order`` is ``(1, steps, batch)``.

        Metrics are ``(1, steps)``; a non-finite step ends the epoch before its update.
        """
        rows: list[dict[str, Any]] = []
        order = self._share(order)
        with self._running():
            self._watch()
            for index in torch.from_numpy(np.ascontiguousarray(order[0])).to(self.device):
                self._own_noise()
                metrics, norm = self._gradient(self._batch(index))
                if not rows:
                    self._watch()
                rows.append(metrics | {"grad_norm": norm})
                if self.skip_norm is not None:
                    rows[-1]["skipped"] = norm.item() > self.skip_norm
                if not math.isfinite(norm.item() + metrics["bound"].item()):
                    break
                if not rows[-1].get("skipped"):
                    self._update()
                if self.average is not None:
                    self._follow(self.average)
                self.step += 1
        return {n: np.array([[float(r[n]) for r in rows]]) for n in rows[0]}

    def _share(self, order: np.ndarray) -> np.ndarray:
        return self.together.share(order) if self.together else order

    def _own_noise(self) -> None:
        if self.together:
            self.together.reseed(self.step)

    def _watch(self) -> None:
        if self.together:
            self.together.watch(self.program._modules())

    def _update(self) -> None:
        """Move the parameters by their gradients."""
        if self.adam is not None and callable(self.adam.learning_rate):
            for group in self.optimizer.param_groups:
                group["lr"] = self.adam.at(self.step)
        self.optimizer.step()

    def _follow(self, average: dict[str, torch.Tensor]) -> None:
        """Move the average towards the parameters after the present step."""
        assert self.adam is not None
        follow = get_ema_multi_avg_fn(1.0 - self.adam.share(self.step))
        follow(tuple(average.values()), tuple(p.detach() for p in self.params.values()), None)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, where the optimiser keeps an average of the parameters, they are that."""
        if self.average is None:
            yield
            return
        raw = {n: p.detach().clone() for n, p in self.params.items()}
        try:
            self._set(self.average)
            yield
        finally:
            self._set(raw)

    @torch.no_grad()
    def _set(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self.params.items():
            parameter.copy_(values[name])

    def _rng(self) -> dict[str, torch.Tensor]:
        on_gpu = {"rng_cuda": torch.cuda.get_rng_state(self.cuda[0])} if self.cuda else {}
        return {"rng": torch.get_rng_state(), **on_gpu}

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Inside: the run's own parameter store and random state, no argument validation, no denormal numbers; in
        this thread the caller's come back.
        """
        with (
            self.program.parameters(),
            torch.random.fork_rng(devices=self.cuda),
            pyro.validation_enabled(False),
            flushed_denormals(),
        ):
            torch.set_rng_state(self.rng["rng"])
            for device in self.cuda:
                torch.cuda.set_rng_state(self.rng["rng_cuda"], device)
            try:
                yield
            finally:
                self.rng = self._rng()

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Inside: modules in evaluation mode; each goes back to its own after."""
        roots = self.program._modules()
        modes = [(m, m.training) for root in roots for m in root.modules()]
        for root in roots:
            root.eval()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode

    def held_out(self, valid: tuple, batch_size: int) -> np.ndarray:
        """The objective's bound on held-out data, nats per datum, ``(1,)``."""
        total, count = 0.0, len(valid[0])
        with (
            self.program.parameters(),
            self._averaged(),
            self._evaluating(),
            torch.random.fork_rng(devices=self.cuda),
            torch.no_grad(),
            pyro.validation_enabled(False),
            flushed_denormals(),
        ):
            torch.manual_seed(self.seed)  # the same noise every epoch, so that epochs compare
            for start in range(0, count, batch_size):
                batch = tuple(torch.as_tensor(a[start : start + batch_size]).to(self.device) for a in valid)
                terms = self._terms(batch, self.step)
                total += float(self.objective.bound(terms).mean()) / terms.data_per_entry * len(batch[0])
        return np.array([total / count])

    def _fits(self, index: int, state: Mapping[str, np.ndarray]) -> bool:
        """Whether a parameter can have this optimiser state; of another optimiser than ours nothing is known."""
        if index >= len(self.params) or self.adam is None:
            return index < len(self.params)
        like = list(self.params.values())[index].detach().cpu().numpy()
        return set(state) == {"step", "exp_avg", "exp_avg_sq"} and all(
            a.ndim == 0 or _alike(a, like) for a in state.values()
        )

    # --- what fit calls ---

    def snapshot(self) -> dict[str, np.ndarray]:
        """A copy of the present state."""
        return {n: a.copy() for n, a in self.arrays().items()}

    def take(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Go back to a snapshot."""
        self.restore(snapshot)

    @torch.no_grad()
    def begin_at(self, weights: Mapping[str, np.ndarray]) -> None:
        """Begin at these weights, by name; the others stay as they are."""
        tensors = self.program._tensors()
        for name, value in weights.items():
            if name not in tensors or tuple(tensors[name].shape) != np.shape(value):
                got, todo = f"{name!r} of shape {np.shape(value)}", f"They are {sorted(tensors)}"
                raise must("weights", "have names and shapes of the program's parameters", got, todo)
            tensors[name].copy_(torch.as_tensor(value))
            if self.average is not None and name in self.average:
                self.average[name].copy_(tensors[name])

    def adopt(self, other: Trainer) -> None:
        """Begin at the parameters of another trainer; the optimiser, which has taken no step, stays as it is."""
        theirs = other.program._tensors()
        with torch.no_grad():
            for name, tensor in self.program._tensors().items():
                tensor.copy_(theirs.get(name, tensor))
        for name, average in (self.average or {}).items():
            average.copy_(self.params[name].detach())

    def bad_parameter(self) -> tuple[str, int] | None:
        """The first parameter that is not finite, and its replicate (0); None when all are."""
        return next(((n, 0) for n, p in self.params.items() if not torch.isfinite(p).all()), None)

    def blame(self, index: np.ndarray) -> tuple[str, int]:
        """What the next step would make non-finite: the site, else the parameter by its gradient; and replicate 0.

        Args:
            index: the step's minibatch, ``(1, batch)``.
        """
        before, index = self.snapshot(), self._share(index)
        with self._running():
            self._own_noise()
            terms = self._terms(
                self._batch(torch.from_numpy(np.ascontiguousarray(index[0])).to(self.device)), self.step
            )
            name = first_non_finite(terms)
            if not name:
                loss = self.objective.surrogate(terms).mean()
                gradients = torch.autograd.grad(loss, list(self.params.values()), allow_unused=True)
                found = zip(self.params, gradients, strict=True)
                name = next((n for n, g in found if g is not None and not torch.isfinite(g).all()), NOBODY)
        self.take(before)  # the forward pass may have moved a batch norm's statistics
        return (self.together.first_named(name, NOBODY) if self.together else name), 0

    def same(self, value: Any) -> Any:
        """``value``, or that of the first of several processes."""
        return self.together.same(value) if self.together else value

    def programs(self) -> list[Program]:
        """The trained program."""
        self.optimizer.zero_grad(set_to_none=True)
        with self._averaged():
            program = self.program.copy()
        for table in program.store.values():
            for name in [n for n in table if n.startswith(OWN)]:
                del table[name]
        for module in program._modules():
            module.eval()
        program.trained = True
        return [program]

    def arrays(self) -> dict[str, np.ndarray]:
        """The whole state as named arrays, for a checkpoint."""
        out = {f"params/{n}": v for n, v in self.program._tensors().items()}
        out |= {f"average/{n}": v for n, v in (self.average or {}).items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer/{i}/{n}": torch.as_tensor(v) for n, v in values.items() if v is not None}
        out |= {f"memory/{n}": v for n, v in self.own.memory.items()}
        out |= self.rng | {"step": torch.tensor(self.step)}
        return {n: v.detach().cpu().numpy() for n, v in out.items()}

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take the state of a checkpoint. Raises: CorruptFile when it is of another program or optimizer."""
        fixed = {n: a for n, a in self.arrays().items() if not n.startswith("optimizer/")}
        state: dict[int, dict[str, np.ndarray]] = {}  # made at the first step, so there may be none yet to compare with
        for name in set(arrays) - set(fixed):
            part, _, rest = name.partition("/")
            index, _, key = rest.partition("/")
            if part == "optimizer" and index.isdecimal():
                state.setdefault(int(index), {})[key] = arrays[name]
        wrong = [n for n, a in fixed.items() if n not in arrays or not _alike(a, arrays[n])]
        wrong += [n for n in arrays if n not in fixed and not n.startswith("optimizer/")]
        for i, saved in state.items():
            wrong += [] if self._fits(i, saved) else [f"optimizer/{i}"]
        if wrong:
            raise must(
                "checkpoint",
                "hold the state of this program and optimizer",
                f"a mismatch at {sorted(wrong)[:3]}",
                "Resume with the settings it was started with",
                CorruptFile,
            )
        with torch.no_grad():
            for name, tensor in self.program._tensors().items():
                tensor.copy_(torch.from_numpy(arrays[f"params/{name}"].copy()))
            for name, average in (self.average or {}).items():
                average.copy_(torch.from_numpy(arrays[f"average/{name}"].copy()))
        memory = {n: torch.from_numpy(arrays[f"memory/{n}"].copy()) for n in self.own.memory}
        self.own.memory = {n: m.to(self.own.memory[n].device) for n, m in memory.items()}
        packed = copy.deepcopy(self.optimizer.state_dict())
        packed["state"] = {i: {k: torch.from_numpy(a.copy()) for k, a in s.items()} for i, s in state.items()}
        self.optimizer.load_state_dict(packed)
        self.rng, self.step = {n: torch.from_numpy(arrays[n].copy()) for n in self.rng}, int(arrays["step"])


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    """The global norm (BLAS's dot products are twice as fast as torch's own ``get_total_norm``)."""
    return torch.stack([torch.dot(g.reshape(-1), g.reshape(-1)) for g in gradients]).sum().sqrt()


def check_copies(program: Program, data: tuple, argument: str = "replicates") -> None:
    """Refuse several trainings of a program whose copies share a module. Raises: InvalidArgument."""
    twin = program.fresh()
    with torch.random.fork_rng(devices=[]):
        twin.materialise(tuple(a[:2] for a in data))
    if twin.shares_modules:
        todo = "Pass a module, or a method of it, as model and guide"
        raise must(argument, "be of a program that can be copied", "a function around a module", todo)


def _alike(one: np.ndarray, two: np.ndarray) -> bool:
    return (one.shape, one.dtype) == (two.shape, two.dtype)


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        device = torch.device("cuda" if name == "gpu" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a build without CUDA
        found = ["cpu", *(["gpu"] if torch.cuda.is_available() else [])]
        todo = f"Use one of {found}, or install torch with support for it"
        raise must("device", "be one that torch can see here", repr(name), todo) from error
    return device
