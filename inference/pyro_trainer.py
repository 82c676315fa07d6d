"""Training on torch: an eager loop over minibatches, parameters in a store of the run's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pyro
import torch

from elbozoo.inference.errors import CorruptFile, must
from elbozoo.inference.objectives import Objective
from elbozoo.inference.optimizers import Adam
from elbozoo.inference.pyro_engine import Program, particle_plate, particles
from elbozoo.inference.recording import first_non_finite, step_metrics


class Trainer:
    """Runs epochs of one objective on a copy of one program. One seed: replicates are separate trainers.

    Modules train in training mode; held-out data is seen, and the trained program handed back, in evaluation mode.
    """

    def __init__(
        self,
        program: Program,
        objective: Objective,
        optimizer: Any,
        data: tuple,
        *,
        seeds: list[int],
        redraw_pixels: bool,
        device: str | None,
    ):
        (self.seed,) = seeds
        self.device = _device(device)
        self.objective, self.redraw_pixels, self.step = objective, redraw_pixels, 0
        self.data = tuple(torch.as_tensor(a).to(self.device) for a in data)
        self.cuda = [self.device] if self.device.type == "cuda" else []
        example = tuple(a[:2] for a in self.data)  # two: some layers refuse a batch of one
        self.nesting = None
        with torch.random.fork_rng(devices=self.cuda):
            torch.manual_seed(self.seed)
            self.program = program.fresh()
            for module in self.program._modules():
                module.to(self.device).eval()  # looking at the program must not move a batch norm's statistics
            finite = all(torch.isfinite(p).all() for p in self.program._tensors().values())
            with nullcontext() if finite else pyro.validation_enabled(False):  # the first step will name what is not
                self.program.materialise(example)
            if objective.num_particles > 1:
                with self.program.parameters():
                    self.nesting = particle_plate(self.program.model, self.program.guide, example, {})
            self.rng = self._rng()
        for module in self.program._modules():
            module.train()
        self.params = {n: p for n, p in self.program._tensors().items() if p.requires_grad}
        if not self.params:
            raise must("program", "have a parameter to train", "none", "Add pyro.param or a network to model or guide")
        self.adam = optimizer if isinstance(optimizer, Adam) else None
        make = self.adam.torch if self.adam else optimizer
        self.optimizer: Any = make(list(self.params.values())) if callable(make) and make is not Adam else None
        if not isinstance(self.optimizer, torch.optim.Optimizer):
            raise must(
                "optimizer",
                "be an Adam or a function from parameters to a torch optimizer for a Pyro program",
                type(optimizer).__name__,
                "Pass lambda params: torch.optim.AdamW(params, lr=1e-3)",
            )

    # --- one step, one epoch ---

    def _batch(self, index: torch.Tensor) -> tuple:
        batch = tuple(a[index] for a in self.data)
        return (torch.bernoulli(batch[0]), *batch[1:]) if self.redraw_pixels else batch

    def _terms(self, batch: tuple) -> Any:
        terms = particles(
            self.program.model,
            self.program.guide,
            batch,
            num_particles=self.objective.num_particles,
            analytic_kl=self.objective.uses_analytic_kl,
            step=self.step,
            nesting=self.nesting,
        )
        self.objective.check(terms)
        return terms

    def _gradient(self, batch: tuple) -> tuple[Any, dict[str, Any], torch.Tensor]:
        terms = self._terms(batch)
        loss = -self.objective.surrogate(terms).mean() / terms.data_per_entry
        with torch.no_grad():
            metrics = step_metrics(self.objective, terms)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip = None if self.adam is None else self.adam.clip_norm
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params.values() if p.grad is not None])
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.params.values(), clip, norm)
        return terms, metrics, norm

    def epoch(self, order: np.ndarray) -> dict[str, np.ndarray]:
        """Run one epoch; ``order`` is ``(1, steps, batch)``.

        Metrics are ``(1, steps)``; a non-finite step ends the epoch before its update.
        """
        rows: list[dict[str, Any]] = []
        with self._running():
            for index in torch.from_numpy(np.ascontiguousarray(order[0])).to(self.device):
                _, metrics, norm = self._gradient(self._batch(index))
                rows.append(metrics | {"grad_norm": norm})
                if not (torch.isfinite(norm) and torch.isfinite(metrics["bound"])):
                    break
                if self.adam is not None and callable(self.adam.learning_rate):
                    for group in self.optimizer.param_groups:
                        group["lr"] = self.adam.at(self.step)
                self.optimizer.step()
                self.step += 1
        return {n: np.array([[float(r[n]) for r in rows]]) for n in rows[0]}

    def _rng(self) -> dict[str, torch.Tensor]:
        on_gpu = {"rng_cuda": torch.cuda.get_rng_state(self.cuda[0])} if self.cuda else {}
        return {"rng": torch.get_rng_state(), **on_gpu}

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Inside: the run's own parameter store and random state, no argument validation; the caller's come back."""
        with self.program.parameters(), torch.random.fork_rng(devices=self.cuda), pyro.validation_enabled(False):
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
        contexts = (self.program.parameters(), self._evaluating(), torch.random.fork_rng(devices=self.cuda))
        with contexts[0], contexts[1], contexts[2], torch.no_grad(), pyro.validation_enabled(False):
            torch.manual_seed(self.seed)  # the same noise every epoch, so that epochs compare
            for start in range(0, count, batch_size):
                batch = tuple(torch.as_tensor(a[start : start + batch_size]).to(self.device) for a in valid)
                terms = self._terms(batch)
                total += float(self.objective.bound(terms).mean()) / terms.data_per_entry * len(batch[0])
        return np.array([total / count])

    # --- what fit calls ---

    def snapshot(self) -> dict[str, np.ndarray]:
        """A copy of the present state."""
        return {n: a.copy() for n, a in self.arrays().items()}

    def take(self, snapshot: Mapping[str, np.ndarray]) -> None:
        """Go back to a snapshot."""
        self.restore(snapshot)

    def bad_parameter(self) -> tuple[str, int] | None:
        """The first parameter that is not finite, and its replicate (0); None when all are."""
        return next(((n, 0) for n, p in self.params.items() if not torch.isfinite(p).all()), None)

    def blame(self, index: np.ndarray) -> tuple[str, int]:
        """Name the site (else the parameter, by its gradient) that the next step would make non-finite, and the
        replicate (0).

        Args:
            index: the step's minibatch, ``(1, batch)``.
        """
        before = self.snapshot()
        with self._running():
            terms, _, _ = self._gradient(self._batch(torch.from_numpy(index[0]).to(self.device)))
        gradients = ((n, p.grad) for n, p in self.params.items() if p.grad is not None)
        name = first_non_finite(terms) or next((n for n, g in gradients if not torch.isfinite(g).all()), "the bound")
        self.take(before)  # the forward pass may have moved a batch norm's statistics
        return name, 0

    def programs(self) -> list[Program]:
        """The trained program."""
        self.optimizer.zero_grad(set_to_none=True)
        program = self.program.copy()
        for module in program._modules():
            module.eval()
        program.trained = True
        return [program]

    def arrays(self) -> dict[str, np.ndarray]:
        """The whole state as named arrays, for a checkpoint."""
        out = {f"params/{n}": v for n, v in self.program._tensors().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer/{i}/{n}": torch.as_tensor(v) for n, v in values.items() if v is not None}
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
        params, keys = list(self.params.values()), frozenset(k for s in state.values() for k in s)
        for i, saved in state.items():
            like = params[i].detach().cpu().numpy() if i < len(params) else None
            same = like is not None and all(a.ndim == 0 or _alike(a, like) for a in saved.values())
            wrong += [] if same and keys == set(saved) else [f"optimizer/{i}"]
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
        packed = copy.deepcopy(self.optimizer.state_dict())
        packed["state"] = {i: {k: torch.from_numpy(a.copy()) for k, a in s.items()} for i, s in state.items()}
        self.optimizer.load_state_dict(packed)
        self.rng, self.step = {n: torch.from_numpy(arrays[n].copy()) for n in self.rng}, int(arrays["step"])


def _alike(one: np.ndarray, two: np.ndarray) -> bool:
    return (one.shape, one.dtype) == (two.shape, two.dtype)


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device("cpu" if name is None else "cuda" if name == "gpu" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a build without CUDA
        found = ["cpu", *(["gpu"] if torch.cuda.is_available() else [])]
        todo = f"Use one of {found}, or install torch with support for it"
        raise must("device", "be one that torch can see here", repr(name), todo) from error
    return device
