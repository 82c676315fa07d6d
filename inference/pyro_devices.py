"""Data-parallel training on torch: one process a device, each with its share of every minibatch.

Torch's ``DistributedDataParallel`` wraps one ``nn.Module`` and hangs its reductions on that module's backward pass. A
Pyro program is two callables with parameters in modules and in a store, and its gradients come from a traced step
without a backward pass; so the gradients are averaged here, in one vector, between the step and the update.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from elbozoo.inference.errors import Refused, must
from elbozoo.inference.objectives import Objective
from elbozoo.inference.shapes import Shape

_NUMBER = count()


@contextmanager
def group(devices: int, device: str | None) -> Iterator[int]:
    """Inside, the process is one of ``devices`` that train together; its rank among them.

    A process group that is there already is used and left; else one is made of what the launcher put into the
    environment. Raises: InvalidArgument where there is none, or one of another size.
    """
    started = dist.is_initialized()
    size = dist.get_world_size() if started else int(os.environ.get("WORLD_SIZE", 1))
    if size != devices or not (started or "RANK" in os.environ):
        got = f"{devices} with {size} process{'es' if size > 1 else ''}"
        todo = f"Start it by torchrun --nproc-per-node {devices} script.py, or pass devices={size}"
        raise must("devices", "be as many as the processes that a launcher started, for a Pyro program", got, todo)
    on_gpu = (device or "cpu").startswith(("gpu", "cuda"))
    if on_gpu:
        torch.cuda.set_device(local(device))
    if not started:
        store, rank, size = _meeting()
        # Under a name of its own: a group made before has left its addresses in the store.
        store = dist.distributed_c10d.PrefixStore(f"elbozoo-{next(_NUMBER)}", store)
        dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)
    try:
        yield dist.get_rank()
    finally:
        if not started:
            dist.destroy_process_group()


@cache
def _meeting() -> tuple[Any, int, int]:
    """The store in which processes find each other, as the environment says; this one's rank, and their number."""
    return next(rendezvous("env://"))


def local(name: str | None) -> str | None:
    """The name of this process's device: of several GPUs, the one with its number on this machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name in ("gpu", "cuda") else name


class Together:
    """What one of several processes does beside the ordinary step."""

    def __init__(self, devices: int, seed: int, objective: Objective):
        self.devices, self.seed, self.rank = devices, seed, dist.get_rank()
        self.buffers: dict[str, torch.Tensor] | None = None
        _check(objective)

    def share(self, order: np.ndarray) -> np.ndarray:
        """This process's part of minibatches ``(..., batch)``."""
        return np.split(order, self.devices, axis=-1)[self.rank]

    def reseed(self, step: int) -> None:
        """Noise that is this process's own, and at every step the same whether resumed or not."""
        torch.manual_seed(int(np.random.SeedSequence([self.seed, step, self.rank]).generate_state(1, np.uint64)[0]))

    @torch.no_grad()
    def begin(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take the parameters of the first process."""
        for tensor in tensors.values():
            dist.broadcast(tensor.detach(), 0)

    def mean(
        self, metrics: dict[str, Any], gradients: Sequence[torch.Tensor | None]
    ) -> tuple[dict[str, Any], list[torch.Tensor | None]]:
        """Metrics and gradients, averaged over the processes."""
        there = [g for g in gradients if g is not None]
        values = [torch.as_tensor(v).to(there[0]).reshape(1) for v in metrics.values()]
        vector = torch.cat([*(g.reshape(-1) for g in there), *values])
        dist.all_reduce(vector)
        vector /= self.devices
        pieces = iter(vector.split([g.numel() for g in there] + [1] * len(values)))
        averaged = [None if g is None else next(pieces).reshape(g.shape) for g in gradients]
        return {n: next(pieces)[0] for n in metrics}, averaged

    def same(self, value: Any) -> Any:
        """The first process's ``value``: what ends a training must end it in all of them."""
        found = [value]
        dist.broadcast_object_list(found, 0)
        return found[0]

    def first_named(self, name: str, otherwise: str) -> str:
        """The first process's name that is not ``otherwise``."""
        names: list[Any] = [None] * self.devices
        dist.all_gather_object(names, name)
        return next((n for n in names if n != otherwise), otherwise)

    def watch(self, modules: Sequence[torch.nn.Module]) -> None:
        """Refuse statistics of minibatches, each process's of its own share: called before and after one."""
        now = {f"{i}.{n}": b for i, m in enumerate(modules) for n, b in m.named_buffers()}
        if self.buffers is None:
            self.buffers = {n: b.detach().clone() for n, b in now.items()}
        for name, buffer in now.items():
            if name in self.buffers and not torch.equal(buffer, self.buffers[name]):
                todo = "Train it on one device, or without a batch norm or moving averages of what it sees"
                got = f"the buffer {name.partition('.')[2]!r}, which a step changes"
                raise must("program", "keep no statistics of minibatches on several devices", got, todo, Refused)


def _check(objective: Objective) -> None:
    """Refuse objectives that look at a minibatch as a whole, or remember some. Raises: Refused."""
    if objective.gradient.keeps_numbers:
        got = f"{type(objective.gradient).__name__}, which keeps numbers from one minibatch to the next"
        todo = "Train on one device, or use ScoreFunction(baseline='leave-one-out') or VIMCO, say"
        raise must("gradient", "look at each datum by itself on several devices", got, todo, Refused)
    while isinstance(objective, Shape):
        if objective.reads_batch_means:
            got = f"{type(objective).__name__}, which looks at the mean of a minibatch"
            raise must("objective", "be a mean over data on several devices", got, "Train on one device", Refused)
        objective = objective.objective
